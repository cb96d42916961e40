"""The scripts that prepare text and chats, as they are called."""

import runpy
import sys
from pathlib import Path

import pytest
from text_data import chat, write_lines

from phi35.data.token_files import open_tokens
from phi35.training.build import SMALL_MODEL

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs a script's code in this process; gives its exit code and what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return ended.value.code, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "script, records, counts",
    [
        ("prepare_text.py", [{"body": "one"}, {"body": "two"}, {"body": ""}], "2 documents"),
        ("prepare_chat.py", [chat("q", "a"), chat("q")], "1 documents"),
    ],
)
def test_scripts_prepare_and_verify(call, tmp_path, script, records, counts):
    data = write_lines(tmp_path / "a.jsonl", records)
    extra = ["--text-field", "body"] if script == "prepare_text.py" else []
    output = tmp_path / "tokens"
    code, printed = call(script, data, "--model", SMALL_MODEL, "--output", output, *extra)
    assert code == 0 and counts in printed and "left out 1: " in printed and f"{data}:" in printed
    assert open_tokens(output, end_of_text=1000).kind == script.removeprefix("prepare_").removesuffix(".py")
    code, printed = call(script, "--output", output, "--verify")
    assert code == 0 and "every file is as it was written" in printed
    part = output / "part-00000.tokens.npy"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, printed = call(script, "--output", output, "--verify")
    assert code == 2 and "part-00000.tokens.npy has another SHA-256" in printed


def test_mistakes_are_one_message(call, tmp_path):
    code, printed = call("prepare_text.py", tmp_path / "nowhere", "--model", SMALL_MODEL, "--output", tmp_path / "out")
    assert code == 2 and "does not exist" in printed
    assert call("prepare_text.py", "--output", tmp_path / "out")[0] == 2
