"""The adapters for lmms-eval and VLMEvalKit: their requests give the answers of phi35.generate."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import phi35
from phi35 import presets
from phi35.evaluation.visual_questions import KitModel, LmmsModel, crops_for, with_tags
from phi35.processor import Processor

SMALL_MODEL = Path(presets.__file__).parent / "small_model"


@dataclasses.dataclass
class Asked:
    """As lmms-eval's ``Instance``: what the model class reads of it."""

    args: tuple[Any, ...]


class Hook:
    """As lmms-eval's cache."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Any, str]] = []

    def add_partial(self, kind: str, arguments: Any, answer: str) -> None:
        self.kept.append((kind, arguments, answer))


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Processor]:
    model = phi35.create("tiny-phi-3.5-vision", seed=3, initializer_range=0.2, vision={"num_crops": 1})
    return model.eval(), Processor.from_folder(SMALL_MODEL, model.config)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (48, 40), color) for color in ("red", "blue", "green")]


def visuals(doc: dict[str, Any]) -> list[Image.Image]:
    shown: list[Image.Image] = doc["pictures"]
    return shown


@pytest.fixture
def lmms(pair: tuple[Any, Processor], pictures: list[Image.Image]) -> LmmsModel:
    asked = LmmsModel(pair, batch_size=3, max_new_tokens=6, num_crops=1)
    asked.task_dict = {"task": {"test": [{"pictures": pictures[:n]} for n in (1, 2, 0, 1, 3)]}}
    asked.cache_hook = Hook()
    return asked


def test_lmms_requests_are_answered_as_by_generate(
    lmms: LmmsModel, pair: tuple[Any, Processor], pictures: list[Image.Image]
) -> None:
    """Batches of questions with one, two, three and no pictures; places in the text; two groups of options."""
    short, long = {"max_new_tokens": 3, "until": ["\n\n"], "do_sample": False}, {"temperature": 0, "num_beams": 1}
    texts = ["what?", "<image> or <image>?", "hello", "where?", "which of these?"]
    requests = [
        Asked((text, dict((short, long)[number % 2]), visuals, number, "task", "test"))
        for number, text in enumerate(texts)
    ]
    found = lmms.generate_until(requests)
    for number, text in enumerate(texts):
        count = (1, 2, 0, 1, 3)[number]
        prompt = "<|image_1|> or <|image_2|>?" if number == 1 else text
        images = {"images": pictures[:count], "num_crops": 1} if count else {}
        tokens = 6 if number % 2 else 3
        assert found[number] == phi35.generate(prompt, model=pair, max_new_tokens=tokens, **images)
    assert len(lmms.cache_hook.kept) == 5 and len(set(found)) > 2


def test_lmms_loglikelihoods_are_those_of_score(
    lmms: LmmsModel, pair: tuple[Any, Processor], pictures: list[Image.Image]
) -> None:
    requests = [
        Asked(("what?", "a red one", visuals, 0, "task", "test")),
        Asked(("hello", lambda doc: f"{len(doc['pictures'])} of them", visuals, 2, "task", "test")),
    ]
    found = lmms.loglikelihood(requests)
    with_picture = phi35.score("what?", "a red one", images=pictures[:1], num_crops=1, model=pair)
    assert found[0] == (with_picture.logprob, with_picture.is_greedy)
    assert found[1][0] == phi35.score("hello", "0 of them", model=pair).logprob


def test_what_has_no_counterpart_is_refused(lmms: LmmsModel, pair: tuple[Any, Processor]) -> None:
    for options, message in (({"num_beams": 3}, "beams"), ({"length_penalty": 2}, "length_penalty")):
        with pytest.raises(ValueError, match=message):
            lmms.generate_until([Asked(("what?", options, visuals, 0, "task", "test"))])
    with pytest.raises(ValueError, match="2 places"):
        with_tags("<image> <image>", 1)
    with pytest.raises(ValueError, match="rounds"):
        lmms.generate_until_multi_round([])
    with pytest.raises(ValueError, match="unheard_of"):
        LmmsModel(pair, unheard_of=1)
    with pytest.raises(ValueError, match="video"):
        KitModel(*pair).generate([{"type": "video", "value": "a.mp4"}])


def test_as_many_crops_as_the_card_advises() -> None:
    assert [crops_for([None] * n, None) for n in (1, 2)] == [16, 4] and crops_for([None], 9) == 9


def test_kit_messages_keep_their_order(
    pair: tuple[Any, Processor], pictures: list[Image.Image], tmp_path: Path
) -> None:
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    kit = KitModel(*pair, num_crops=1, max_new_tokens=6)
    kit.set_dump_image(lambda line: line)
    assert kit.INTERLEAVE and not kit.use_custom_prompt("MMBench")
    assert kit.generate("hello") == phi35.generate("hello", model=pair, max_new_tokens=6)
    parts = [
        {"type": "text", "value": "first"},
        {"type": "image", "value": paths[0]},
        {"type": "image", "value": paths[2]},
        {"type": "text", "value": "which?"},
    ]
    text = "first\n<|image_1|>\n<|image_2|>\nwhich?"
    expected = phi35.generate(text, images=[paths[0], paths[2]], num_crops=1, model=pair, max_new_tokens=6)
    assert kit.generate(parts, dataset="MMMU") == expected
    turns = [{"role": "user", "content": parts}]
    assert kit.chat_inner(turns) == kit.chat(turns) == expected
    turns = [*turns, {"role": "assistant", "content": "the first"}, {"role": "user", "content": "why?"}]
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "the first"}]
    messages.append({"role": "user", "content": "why?"})
    both = {"images": [paths[0], paths[2]], "num_crops": 1}
    assert kit.chat(turns) == phi35.generate(messages=messages, model=pair, max_new_tokens=6, **both)


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval (pip install lmms_eval)")
def test_lmms_eval_finds_the_class_by_its_entry_point(pair: tuple[Any, Processor]) -> None:
    from lmms_eval.api.model import lmms as base
    from lmms_eval.models import get_model

    found = get_model("phi35")
    assert issubclass(found, base) and issubclass(found, LmmsModel)
    made = found.create_from_arg_string("batch_size=2,max_new_tokens=5", {"device": "cpu"})
    assert made.rank == 0 and made.world_size == 1 and made.batch_size == 2 and made.max_new_tokens == 5
