"""``phi35.generate`` and the two commands, with a tiny vision model of random weights and the package's tokenizer."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import phi35
from phi35 import api
from phi35.cli import main
from phi35.cli.chat import Conversation
from phi35.cli.chat import chat as chat_command
from phi35.cli.generate import generate
from phi35.generation.streaming import text_of
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer

RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (128, 64), "blue")


@functools.cache
def pair(name: str = "tiny-phi-3.5-vision") -> tuple[Any, Processor]:
    model = phi35.create(name, seed=2, initializer_range=0.3)  # peaked logits: answers differ
    return model, Processor(Tokenizer.from_folder(api.SMALL_MODEL), model.config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    phi35.save(*pair(), path)
    return path


def ask(prompt: Any = None, images: Any = None, **options: Any) -> Any:
    return phi35.generate(prompt, images, **{"model": pair(), "max_new_tokens": 8, **options})


def by_hand(text: str, images: Any = None, steps: int = 8) -> str:
    """The greedy answer to a templated text, by full forward passes."""
    model, processor = pair()
    batch = processor(text, images=images)
    ids = batch.pop("input_ids")
    start = ids.shape[1]
    batch.pop("attention_mask")
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(ids, **batch).logits[0, -1].argmax())
        ids = torch.cat((ids, torch.tensor([[token]])), dim=1)
        if token in model.config.stop_token_ids:
            break
    return text_of(processor.tokenizer, ids[0, start:].tolist())


def chat(*turns: str) -> str:
    return "".join(turns) + "<|assistant|>\n"


def test_a_prompt_becomes_a_user_turn_with_its_images_first() -> None:
    text = chat("<|user|>\n<|image_1|>\n<|image_2|>\nWhat?<|end|>\n")
    expected = by_hand(text, [RED, BLUE])
    assert ask("What?", [RED, BLUE]) == expected
    assert ask("<|image_1|>\n<|image_2|>\nWhat?", images=[RED, BLUE]) == expected
    assert ask(text, [RED, BLUE]) == expected
    assert ask("What?", [BLUE, RED]) != expected


def test_a_list_gives_each_prompt_what_it_gets_alone() -> None:
    prompts = ["What?", "Which of <|image_2|> and <|image_1|>?", "A longer question without a picture"]
    images = [[RED], [RED, BLUE], []]
    alone = [ask(prompt, row) for prompt, row in zip(prompts, images, strict=True)]
    assert ask(prompts, images) == alone
    assert alone[2] == by_hand(chat("<|user|>\nA longer question without a picture<|end|>\n"))
    assert len(set(alone)) == 3
    sampled = {"temperature": 1.0, "seed": 3, "top_p": 0.9}
    assert ask(prompts, images, **sampled) == [ask(*both, **sampled) for both in zip(prompts, images, strict=True)]


def test_messages_and_system() -> None:
    turns = ["<|system|>\nBe brief.<|end|>\n", "<|user|>\nHi<|end|>\n", "<|assistant|>\nYes?<|end|>\n"]
    expected = by_hand(chat(*turns, "<|user|>\nWhat?<|end|>\n"))
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "What?"},
    ]
    assert ask(messages=messages, system="Be brief.") == expected
    assert ask(messages=[{"role": "system", "content": "Be brief."}, *messages]) == expected
    part = {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What?"}]}
    assert ask(messages=[part]) == ask("What?", [RED])


def test_a_stream_makes_up_the_answer() -> None:
    for options in ({}, {"temperature": 1.2, "seed": 5}):
        whole = ask("What?", [RED], max_new_tokens=24, **options)
        pieces = ask("What?", [RED], max_new_tokens=24, stream=True, **options)
        assert not isinstance(pieces, str)
        assert "".join(pieces) == whole
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    cut = whole[: whole.index(stop)]
    assert ask("What?", [RED], max_new_tokens=24, stop=stop, **options) == cut
    assert "".join(ask("What?", [RED], max_new_tokens=24, stop=[stop], stream=True, **options)) == cut


def test_the_same_seed_gives_the_same_text() -> None:
    options = {"temperature": 1.5, "max_new_tokens": 16}
    assert ask("Hi", seed=1, **options) == ask("Hi", seed=1, **options) != ask("Hi", seed=2, **options)


def test_pictures_of_every_kind_give_the_same_answer(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    RED.save(path)
    answers = {ask("What?", [image]) for image in (RED, path, str(path), path.read_bytes(), np.asarray(RED))}
    assert len(answers) == 1


def test_a_text_only_model_takes_the_same_call() -> None:
    text = pair("tiny-phi-3.5-moe")
    assert isinstance(ask("Hi", model=text), str)
    assert ask("Hi", [], model=text) == ask("Hi", model=text)
    with pytest.raises(ValueError, match="text only"):
        ask("Hi", [RED], model=text)
    with pytest.raises(ValueError, match=r"<\|image_1\|> and this model reads text only"):
        ask("What shows <|image_1|>?", model=text)


def test_a_model_is_found_by_folder_and_by_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask("What?", [RED])
    assert ask("What?", [RED], model=str(folder), device="cpu", dtype="float32") == expected
    assert ask("What?", [RED], model=phi35.load(folder, device="cpu")[0]) == expected
    monkeypatch.setenv("PHI35_MODEL", str(folder))
    assert ask("What?", [RED], model=None, device="cpu") == expected
    monkeypatch.setenv("PHI35_MODEL", "/no/such/folder")
    with pytest.raises(ValueError, match="PHI35_MODEL names '/no/such/folder'"):
        ask("What?", model=None)


def test_a_folder_saved_anew_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for place, seed in (("one", 3), ("one", 4), ("two", 5)):
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        model = phi35.create("tiny-phi-3.5-mini", seed=seed, initializer_range=0.3)
        saved = model, Processor(Tokenizer.from_folder(api.SMALL_MODEL), model.config)
        phi35.save(*saved, "model")
        answers.append(ask("What?", model="model", device="cpu"))
        assert answers[-1] == ask("What?", model=saved)
    assert len(set(answers)) == 3
    assert api.resolve_model("model", "cpu")[0] is api.resolve_model("model", "cpu")[0]
    assert api.resolve_model("model", "cpu", "auto")[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "x", "max_tokens": 3}, "'max_tokens' .did you mean max_new_tokens"),
        ({"prompt": "x", "temprature": 3, "foo": 1}, "temperature.*"),
        ({}, "exactly one"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "exactly one"),
        ({"prompt": ""}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": ["x", ""]}, "prompt must be"),
        ({"prompt": ["x"], "stream": True}, "stream"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "stop": ["a", 3]}, "stop"),
        ({"prompt": "x", "stop": 3}, "stop must be a string or a list"),
        ({"prompt": "x", "seed": 2**64}, "seed must fit"),
        ({"prompt": "x", "images": ["a\0b"]}, "null character"),
        ({"prompt": "x", "model": ""}, "expected a folder or a hub id"),
        ({"prompt": "x", "temperature": -1.0, "top_p": 2.0}, "temperature.*top_p"),
        ({"prompt": "x", "model": 3}, "model= must be"),
        ({"prompt": "x", "model": "no/such/model/folder"}, "no/such/model/folder"),
        ({"prompt": "x", "device": "cpu"}, "device="),
        ({"prompt": "<|user|>\nx", "system": "y"}, "system="),
        ({"messages": [{"role": "system", "content": "a"}], "system": "y"}, "system="),
        ({"prompt": "x", "images": ["/no/such.png"]}, "/no/such.png"),
        ({"prompt": "x", "images": RED}, "must be a list"),
        ({"prompt": "x", "images": np.zeros((64, 64, 3), np.uint8)}, "must be a list"),
        ({"prompt": ["x", "y"], "images": [RED, RED]}, "2 lists"),
        ({"messages": [{"role": "user", "content": "a"}], "images": "a.png"}, "must be a list"),
        ({"prompt": "<|image_2|>", "images": [RED]}, r"<\|image_2\|>"),
        ({"messages": [{"role": "assistant", "content": "a"}], "images": [RED]}, "user turn"),
        ({"prompt": "x", "rope_mode": "linear"}, "rope_mode"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(**options)


def command(function: Any, *arguments: str, stdin: str = "") -> Any:
    """Run a command in this process, its standard input a pipe."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(function)
    return CliRunner().invoke(app, arguments, input=stdin, catch_exceptions=False)


def test_the_generate_command_prints_the_answer(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    RED.save(path)
    done = command(
        generate, "--model", str(folder), "--image", str(path), "--max-new-tokens", "8", "--device", "cpu", "What?"
    )
    assert done.stdout == ask("What?", [RED]) + "\n"
    drafted = command(
        generate,
        "--model",
        str(folder),
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
        "--speculation",
        "prompt_lookup",
        "A",
    )
    assert drafted.stdout == ask("A") + "\n"


@pytest.mark.parametrize("error", [ValueError("a bad value"), OSError("no network")])
def test_the_command_line_gives_one_message(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(api, "resolve_model", refuse)
    monkeypatch.setattr("sys.argv", ["phi35", "generate", "--model", "owner/name", "Hi"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"phi35: error: {error}\n"


def test_a_picture_that_cannot_be_asked_about_is_refused_at_once(tmp_path: Path) -> None:
    conversation = Conversation(pair(), max_new_tokens=4)
    path = tmp_path / "narrow.png"
    Image.new("RGB", (2000, 1)).save(path)
    with pytest.raises(ValueError, match="aspect ratio"):
        conversation.take(f"/image {path}")
    assert "".join(conversation.take("Hi")) == ask("Hi", max_new_tokens=4)


def test_the_chat_command_reads_a_pipe(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    RED.save(path)
    lines = ["Hi", f"/image {path}", "/image /no/such.png", "/dance", "What?", "/reset", "Hi", "/exit", "never"]
    done = command(
        chat_command, "--model", str(folder), "--max-new-tokens", "8", "--device", "cpu", stdin="\n".join(lines) + "\n"
    )
    first = ask("Hi")
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "<|image_1|>\nWhat?"},
    ]
    second = ask(messages=messages, images=[RED])
    assert done.stdout == f"{first}\n(picture 1: {path})\n\n\n{second}\n(started anew)\n{first}\n"
    assert "/no/such.png" in done.stderr and "/dance" in done.stderr
