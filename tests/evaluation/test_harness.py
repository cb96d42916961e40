"""lm-evaluation-harness: log-likelihoods and answers beside its own wrapper, local task files, the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers_models import phi3_pair
from typer.testing import CliRunner

from phi35 import presets
from phi35.cli.eval import app
from phi35.evaluation.harness import HarnessModel, evaluate
from phi35.processor import Processor

SMALL_MODEL = Path(presets.__file__).parent / "small_model"
PAIRS = [
    ("What is the capital of France?", " Paris"),
    ("What is the capital of France?", " London"),
    ("A. one\nB. two\nAnswer:", " A"),
    ("A. one\nB. two\nAnswer:", " B"),
    ("A. one\nB. two\nAnswer: ", "B and more of it"),  # the space moves over
    ("", "a text without a context"),
    ("some words " * 30, "that are far too long for the model"),
]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=n) for n, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def sides() -> tuple[HarnessModel, HFLM]:
    """One model as ours, and as transformers' in the harness's own wrapper."""
    config = presets.get("tiny-phi-3.5-mini").replace(vocab_size=2048)
    ours, theirs = phi3_pair(config)
    processor = Processor.from_folder(SMALL_MODEL, ours.config)
    processor.tokenizer = processor.tokenizer.with_settings(add_bos_token=False)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(SMALL_MODEL)
    peer = HFLM(theirs, tokenizer=tokenizer, batch_size=3, max_length=60, add_bos_token=False)
    return HarnessModel(ours, processor, batch_size=3, max_length=60), peer


def test_loglikelihoods_equal_the_harness_own_wrapper(sides: tuple[HarnessModel, HFLM]) -> None:
    requests = instances("loglikelihood", PAIRS)
    ours, theirs = (side.loglikelihood(requests, disable_tqdm=True) for side in sides)
    for (mine, greedy), (other, other_greedy) in zip(ours, theirs, strict=True):
        assert abs(mine - other) < 1e-4  # measured: at most 2e-5, of sums around -150
        assert greedy == other_greedy
    assert len({round(value, 3) for value, _ in ours}) == len(PAIRS)


def test_whole_texts_equal_the_harness_own_wrapper(sides: tuple[HarnessModel, HFLM]) -> None:
    """Texts of one window and of several."""
    requests = instances("loglikelihood_rolling", [("short",), ("a longer text about many things. " * 25,), ("x y z",)])
    ours, theirs = (side.loglikelihood_rolling(requests, disable_tqdm=True) for side in sides)
    for mine, other in zip(ours, theirs, strict=True):
        assert abs(mine - other) < 1e-4 * max(1.0, abs(other) / 100)


def test_answers_equal_the_harness_own_wrapper(sides: tuple[HarnessModel, HFLM]) -> None:
    """Stop strings, two groups of options, a prompt that is cut."""
    short, long = {"until": ["e"], "max_gen_toks": 5}, {"until": [], "max_gen_toks": 9, "do_sample": False}
    contexts = ["What is this?", "A much longer prompt with more words in it. " * 12, "One", "Two and three"]
    requests = instances("generate_until", [(text, (short, long)[n % 2]) for n, text in enumerate(contexts)])
    ours, theirs = (side.generate_until(requests, disable_tqdm=True) for side in sides)
    assert [text.strip() for text in ours] == [text.strip() for text in theirs]
    assert any(ours)


def test_rows_of_a_batch_do_not_touch_each_other(sides: tuple[HarnessModel, HFLM]) -> None:
    mine = sides[0]
    together = mine.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    alone = [mine.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)[0] for pair in PAIRS]
    assert max(abs(a[0] - b[0]) for a, b in zip(together, alone, strict=True)) < 1e-4


def test_what_has_no_counterpart_is_refused(sides: tuple[HarnessModel, HFLM]) -> None:
    mine = sides[0]
    with pytest.raises(ValueError, match="num_beams"):
        mine.generate_until(instances("generate_until", [("x", {"num_beams": 4})]))
    with pytest.raises(ValueError, match="no room"):
        mine.generate_until(instances("generate_until", [("x", {"max_gen_toks": 60})]))
    with pytest.raises(ValueError, match="continued"):
        mine.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=False)
    with pytest.raises(ValueError, match=r"batch_size.*max_gen_toks"):
        HarnessModel(mine.model, mine.processor, batch_size=0, max_gen_toks=0)
    with pytest.raises(ValueError, match="positions"):
        HarnessModel(mine.model, mine.processor, max_length=10**7)


@pytest.fixture
def local_task(tmp_path: Path) -> Path:
    """A folder with a multiple-choice task over a file."""
    data = tmp_path / "data.jsonl"
    lines = [{"question": f"{n} plus {n}?", "choices": [str(2 * n), str(2 * n + 1)], "answer": n % 2} for n in range(5)]
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "task.yaml").write_text(
        "task: local_letters\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nAnswer:"\n'
        'doc_to_choice: ["A", "B"]\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n'
    )
    return tmp_path


def test_local_task_files_run_without_a_network_and_are_cached(
    sides: tuple[HarnessModel, HFLM], local_task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(local_task / "datasets"))
    mine = sides[0]
    options: dict[str, Any] = {"include_path": [local_task], "cache": local_task / "kept", "batch_size": 4}
    found = evaluate(mine.model, mine.processor, ["local_letters"], **options)
    score = found["results"]["local_letters"]["acc,none"]
    docs = found["samples"]["local_letters"]
    picked = [max((0, 1), key=lambda n, doc=doc: doc["resps"][n][0][0]) for doc in docs]
    assert score == sum(choice == doc["doc"]["answer"] for choice, doc in zip(picked, docs, strict=True)) / 5
    monkeypatch.setattr(HarnessModel, "_loglikelihood_tokens", None)  # a second run asks the model nothing
    again = evaluate(mine.model, mine.processor, ["local_letters"], **options)
    assert again["results"]["local_letters"]["acc,none"] == score
    with pytest.raises(ValueError, match="absent_task"):
        evaluate(mine.model, mine.processor, ["absent_task"], include_path=[local_task])


def test_the_command_writes_its_results(local_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(local_task / "datasets"))
    output = local_task / "results.json"
    options = ["--tasks", "local_letters", "--include-path", str(local_task), "--chat", "--output", str(output)]
    result = CliRunner().invoke(app, ["tasks", *options])
    assert result.exit_code == 0, result.output
    assert "local_letters" in result.output
    assert 0 <= json.loads(output.read_text())["results"]["local_letters"]["acc,none"] <= 1
