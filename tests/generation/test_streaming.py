"""Stop strings across pieces, and streams whose pieces make up the text."""

import itertools
import random

import pytest

from phi35.api import SMALL_MODEL
from phi35.generation.stopping import StopStrings
from phi35.generation.streaming import TextStream, text_of
from phi35.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(SMALL_MODEL)


def naive_cut(text: str, stops: list[str]) -> str:
    """Read character by character; at the first end of a stop string cut before the longest that ends there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@pytest.mark.parametrize("stops", [["ab"], ["aab", "b"], ["abab", "ba"], ["aaa"], ["abc", "b"], []])
def test_stop_strings_cut_the_same_however_the_text_arrives(stops: list[str]) -> None:
    for letters in itertools.product("abc", repeat=5):
        text = "".join(letters)
        expected = naive_cut(text, stops)
        for cuts in itertools.product((False, True), repeat=4):
            pieces, start = [], 0
            for end in [place + 1 for place, cut in enumerate(cuts) if cut] + [5]:
                pieces.append(text[start:end])
                start = end
            finder, shown = StopStrings(stops), ""
            for piece in pieces:
                shown += finder.feed(piece)
                assert expected.startswith(shown), "text was shown that must be taken back"
            assert shown + finder.finish() == expected
            assert finder.stopped == (expected != text)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["<stop>"])
    assert [finder.feed(piece) for piece in ("ab<s", "tart", "<st", "op>x")] == ["ab", "<start", "", ""]
    assert finder.stopped and finder.finish() == ""


def test_an_emoji_of_byte_tokens_arrives_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 😀!", add_special_tokens=False)
    assert len(ids) >= 6
    stream = TextStream(tokenizer)
    pieces = [stream.feed(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == "ok 😀!"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "😀" in [piece.strip("!") for piece in pieces]


def test_an_unfinished_character_shows_at_the_end_alone(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert [stream.feed(3 + byte) for byte in "😀".encode()[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_pieces_make_up_the_decoded_text_for_any_tokens(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    for _ in range(300):
        ids = [
            generator.randrange(1088) if generator.random() < 0.5 else generator.randrange(3, 259) for _ in range(20)
        ]
        stream = TextStream(tokenizer)
        text = "".join([*(stream.feed(token) for token in ids), stream.finish()])
        assert text == tokenizer.decode(ids) == text_of(tokenizer, ids)


def test_the_leading_space_goes_once_even_behind_a_special_token(tokenizer: Tokenizer) -> None:
    end = tokenizer.special_ids["<|end|>"]
    ids = [end, *tokenizer.encode(" red", add_special_tokens=False)]
    assert text_of(tokenizer, ids) == tokenizer.decode(ids) == " red"
    plain = tokenizer.encode("red", add_special_tokens=False)
    assert text_of(tokenizer, plain) == "red"


def test_text_is_cut_before_a_stop_string_across_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("red circle\n\nQuestion: what?", add_special_tokens=False)
    assert text_of(tokenizer, ids, ["\n\nQ"]) == "red circle"
    assert text_of(tokenizer, ids, ["never"]) == "red circle\n\nQuestion: what?"
