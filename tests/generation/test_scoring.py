"""Log-probabilities of answers and continuations against the model's own logits."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import phi35
from phi35.api import SMALL_MODEL
from phi35.processor import Processor
from phi35.scoring import token_logprobs
from phi35.tokenizer import Tokenizer

TOLERANCE = 2e-5  # measured: 2.4e-6


@pytest.fixture(scope="module")
def pair() -> tuple[phi35.CausalLM, Processor]:
    model = phi35.create("tiny-phi-3.5-vision", seed=0, initializer_range=0.3)
    return model, Processor(Tokenizer.from_folder(SMALL_MODEL), model.config)


@torch.no_grad()
def naive(pair: tuple[phi35.CausalLM, Processor], text: str, ids: tuple[int, ...], **inputs: object) -> list[float]:
    """One forward pass a token."""
    model, processor = pair
    batch = processor(text, **inputs)  # type: ignore[arg-type]
    row, found = batch["input_ids"], []
    extra = {name: value for name, value in batch.items() if name in ("pixel_values", "image_sizes")}
    for token in ids:
        found.append(float(model(row, **extra).logits[0, -1].log_softmax(dim=-1)[token]))
        row = torch.cat((row, torch.tensor([[token]])), dim=1)
    return found


def near(found: tuple[float, ...], expected: list[float]) -> bool:
    return len(found) == len(expected) and max(abs(a - b) for a, b in zip(found, expected, strict=True)) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 5, "seed": 3, "repetition_penalty": 1.3}])
def test_answers_carry_the_models_own_log_probabilities(
    pair: tuple[phi35.CausalLM, Processor], options: dict[str, float]
) -> None:
    prompts = ["<|user|>\nHi<|end|>\n<|assistant|>\n", "<|user|>\nWhat is this?<|end|>\n<|assistant|>\n"]
    found = phi35.generate(prompts, model=pair, max_new_tokens=6, return_logprobs=True, **options)
    texts = phi35.generate(prompts, model=pair, max_new_tokens=6, **options)
    assert [answer.text for answer in found] == texts
    for prompt, answer in zip(prompts, found, strict=True):
        assert near(answer.logprobs, naive(pair, prompt, answer.token_ids))
    one = phi35.generate(prompts[0], model=pair, max_new_tokens=2, return_logprobs=True)
    assert (
        isinstance(one, phi35.Answer)
        and one.token_ids[:2]
        == phi35.generate(prompts[0], model=pair, max_new_tokens=2, return_logprobs=True).token_ids
    )
    with pytest.raises(ValueError, match="stream=True"):
        phi35.generate(prompts[0], model=pair, stream=True, return_logprobs=True)


def test_scores_of_several_continuations_equal_token_by_token(pair: tuple[phi35.CausalLM, Processor]) -> None:
    prompt = "<|user|>\nWhat colour?<|end|>\n<|assistant|>\n"
    answers = ["red", "green and blue", "a"]
    found = phi35.score(prompt, answers, model=pair, batch_size=2)
    assert len({len(one.token_ids) for one in found}) >= 2
    for answer, one in zip(answers, found, strict=True):
        assert pair[1].decode(one.token_ids).strip() == answer
        expected = naive(pair, prompt, one.token_ids)
        assert near(one.logprobs, expected)
        assert math.isclose(one.logprob, sum(expected), abs_tol=1e-4)
    alone = phi35.score(prompt, "red", model=pair)
    assert isinstance(alone, phi35.Score) and near(alone.logprobs, list(found[0].logprobs))


def test_a_greedy_answer_is_known_as_such(pair: tuple[phi35.CausalLM, Processor]) -> None:
    model = pair[0]
    ids = torch.randint(3, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    out = model.generate(ids, max_new_tokens=5, stop_token_ids=[])
    logprobs, greedy = token_logprobs(model, out, last=5)
    assert greedy.all() and logprobs.shape == (2, 5)
    other = out.clone()
    other[1, -2] = (other[1, -2] + 1) % 1000
    assert not token_logprobs(model, other, last=5)[1][1].all()
    with torch.no_grad():
        expected = model(out).logits[:, -6:-1].log_softmax(dim=-1).gather(-1, out[:, -5:, None]).squeeze(-1)
    assert (logprobs - expected).abs().max() < TOLERANCE


def test_pictures_count(pair: tuple[phi35.CausalLM, Processor]) -> None:
    """Two prompts with a picture each, beside one pass a token; another picture gives another score."""
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    prompts = ["<|user|>\n<|image_1|>\nColour?<|end|>\n<|assistant|>\n"] * 2
    found = phi35.score(prompts, ["red", "red"], images=[[red], [blue]], model=pair, num_crops=1)
    for prompt, picture, one in zip(prompts, (red, blue), found, strict=True):
        assert near(one.logprobs, naive(pair, prompt, one.token_ids, images=[picture], num_crops=1))
    assert abs(found[0].logprob - found[1].logprob) > 1e-3
    several = phi35.score(prompts[0], ["red", "blue"], images=[red], model=pair, num_crops=1)
    assert near(several[0].logprobs, list(found[0].logprobs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Hi", ""), "continuation must be"),
        (("Hi", []), "continuation must be"),
        ((["Hi", "Ho"], ["a"]), "2 prompts and 1"),
        ((3, "a"), "int prompts"),
    ],
)
def test_bad_arguments_are_named(
    pair: tuple[phi35.CausalLM, Processor], arguments: tuple[object, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        phi35.score(*arguments, model=pair)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last must lie"):
        token_logprobs(pair[0], torch.tensor([[5, 6]]), last=2)
