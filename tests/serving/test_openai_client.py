"""OpenAI's own client against a live server: texts are what ``phi35.generate`` gives alone (greedy, float32, CPU)."""

import base64
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from live_server import NAME, LiveServer, live_server, small_model, tiny_model
from PIL import Image, ImageDraw

import phi35

pytest.importorskip("fastapi")

QUESTIONS = ["which colours are there?", "what shape is in the picture?", "is there a red circle?", "how many?"]


@pytest.fixture(scope="module")
def small() -> Iterator[LiveServer]:
    with live_server() as server:
        yield server


@pytest.fixture(scope="module")
def tiny() -> Iterator[LiveServer]:
    """A model of random weights, whose texts are long and hold broken characters."""
    model, processor = tiny_model()
    with live_server(model, processor) as server:
        yield server


def drawing(colour: str, shape: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    {"circle": draw.ellipse, "rectangle": draw.rectangle}[shape]((16, 16, 48, 48), fill=colour)
    return image


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def streamed(stream: Any) -> tuple[dict[int, str], dict[int, str], Any]:
    """Texts and reasons of the end by choice, and the usage."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in reasons, "a chunk after the end"
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage


def test_models(small: LiveServer) -> None:
    client = small.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "phi35"


def test_chats_whole_and_streamed_equal_generate(tiny: LiveServer) -> None:
    client = tiny.client()
    for system in (None, "be brief"):
        for question in QUESTIONS[:2]:
            messages: list[Any] = [{"role": "user", "content": question}]
            if system:
                messages.insert(0, {"role": "developer", "content": system})
            expected = phi35.generate(question, system=system, model=tiny_model(), max_new_tokens=40)
            options: dict[str, Any] = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 40}
            whole = client.chat.completions.create(**options)
            assert whole.choices[0].message.content == expected
            assert whole.choices[0].message.role == "assistant"
            texts, reasons, usage = streamed(
                client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
            )
            assert texts == {0: expected}
            assert reasons == {0: whole.choices[0].finish_reason}
            assert whole.usage is not None and usage == whole.usage
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_pictures_in_two_turns_equal_generate(small: LiveServer) -> None:
    circle, rectangle = drawing("red", "circle"), drawing("blue", "rectangle")
    turns: list[tuple[list[Image.Image], str]] = [([circle], "what shape is it?"), ([rectangle], "and this one?")]
    messages: list[Any] = []
    ours: list[Any] = []
    for images, question in turns:
        parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        pictures = [{"type": "image", "image": image} for image in images]
        ours.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        expected = phi35.generate(messages=ours, model=small_model(), max_new_tokens=20)
        texts, _, _ = streamed(
            small.client().chat.completions.create(
                model=NAME, messages=messages, temperature=0, max_completion_tokens=20, stream=True
            )
        )
        assert texts[0] == expected
        messages.append({"role": "assistant", "content": texts[0]})
        ours.append({"role": "assistant", "content": expected})
    assert ours[1]["content"] == "circle", "the small model sees the picture"


def test_completions_of_texts_and_ids_equal_generate(tiny: LiveServer) -> None:
    client, (_, processor) = tiny.client(), tiny_model()
    prompts = [f"<|user|>\n{question}<|end|>\n<|assistant|>\n" for question in QUESTIONS]
    expected = phi35.generate(prompts, model=tiny_model(), max_new_tokens=24)
    options: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(prompt=prompts, **options)
    assert [choice.text for choice in whole.choices] == expected
    ids = [processor.tokenizer.encode(prompt) for prompt in prompts]
    texts, _, _ = streamed(client.completions.create(prompt=ids, stream=True, **options))
    assert [texts[index] for index in range(len(prompts))] == expected
    echoed = client.completions.create(prompt=prompts[0], echo=True, **options)
    assert echoed.choices[0].text == prompts[0] + expected[0]
    short = client.completions.create(model=NAME, prompt=prompts[0])
    assert short.usage is not None and short.usage.completion_tokens <= 16
    assert whole.usage is not None and whole.usage.prompt_tokens == sum(map(len, ids))


def test_sampling_options_and_seeds_equal_generate(tiny: LiveServer) -> None:
    """Seed s of n answers: answer i is what the seed s + i gives."""
    client = tiny.client()
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 24}
    extra = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    ours = {**options, **extra}
    ours["max_new_tokens"] = ours.pop("max_tokens")
    expected = [phi35.generate("hello", model=tiny_model(), seed=7 + place, **ours) for place in range(3)]
    assert len(set(expected)) == 3
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "hello"}],
            seed=7,
            n=3,
            stream=stream,
            extra_body=extra,
            **options,
        )
        if stream:
            texts, reasons, _ = streamed(answer)
            assert [texts[place] for place in range(3)] == expected and len(reasons) == 3
        else:
            assert [choice.message.content for choice in answer.choices] == expected


def test_stop_strings_end_before_them_and_no_part_of_one_is_sent(tiny: LiveServer) -> None:
    client = tiny.client()
    messages: list[Any] = [{"role": "user", "content": QUESTIONS[0]}]
    whole = str(phi35.generate(QUESTIONS[0], model=tiny_model(), max_new_tokens=40))
    for start, length in ((5, 3), (9, 7), (0, 2)):
        stop = whole[start : start + length]
        assert "�" not in stop
        expected = whole[: whole.index(stop)]
        stream = client.chat.completions.create(
            model=NAME, messages=messages, temperature=0, max_tokens=40, stop=[stop, "never"], stream=True
        )
        so_far = ""
        for chunk in stream:
            so_far += chunk.choices[0].delta.content or ""
            assert expected.startswith(so_far)
            reason = chunk.choices[0].finish_reason
        assert (so_far, reason) == (expected, "stop")


def test_log_probabilities_are_the_models_and_belong_to_the_text(tiny: LiveServer) -> None:
    """Measured error of a log-probability: 2.9e-6 (float32, other shapes of the products)."""
    client, (model, processor) = tiny.client(), tiny_model()
    messages: list[Any] = [{"role": "user", "content": QUESTIONS[1]}]
    expected = phi35.generate(QUESTIONS[1], model=tiny_model(), max_new_tokens=12, return_logprobs=True)
    whole = client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3
    )
    content = whole.choices[0].logprobs.content  # type: ignore[union-attr]
    tokens = [token for token in content or []]
    assert [round(a.logprob - b, 4) for a, b in zip(tokens, expected.logprobs, strict=True)] == [0] * 12
    spoken = [bytes(token.bytes or []) for token in tokens if token.token not in processor.tokenizer.special_ids]
    assert b"".join(spoken).decode("utf-8", "replace").removeprefix(" ") == whole.choices[0].message.content
    ids = processor(processor.apply_chat_template(messages))["input_ids"]
    for token, chosen in zip(tokens, expected.token_ids, strict=True):
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, -1].log_softmax(dim=-1)
        best = logprobs.topk(3)
        assert max(abs(a.logprob - b) for a, b in zip(token.top_logprobs, best.values.tolist(), strict=True)) < 5e-5
        data = [processor.tokenizer.token_bytes(one, skip_special=False) for one in best.indices.tolist()]
        assert [bytes(one.bytes or []) for one in token.top_logprobs] == data
        ids = torch.cat((ids, torch.tensor([[chosen]])), dim=1)
    # Streamed, each piece brings its own tokens; a stop string's tokens never come.
    stop = str(expected.text)[6:9]
    pieces, streamed_tokens = "", []
    for chunk in client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=12, logprobs=True, stop=stop, stream=True
    ):
        pieces += chunk.choices[0].delta.content or ""
        if chunk.choices[0].logprobs is not None:
            streamed_tokens += chunk.choices[0].logprobs.content or []
    assert pieces == expected.text[: expected.text.index(stop)]
    assert 0 < len(streamed_tokens) < 12
    assert [token.bytes for token in streamed_tokens] == [token.bytes for token in tokens[: len(streamed_tokens)]]
    old = client.completions.create(
        model=NAME, prompt=processor.apply_chat_template(messages), temperature=0, max_tokens=12, logprobs=2
    )
    logprobs = old.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs == [token.logprob for token in tokens]
    assert logprobs.text_offset is not None and logprobs.text_offset[0] == 0
    assert [max(one, key=lambda name: one[name]) for one in logprobs.top_logprobs or []] == logprobs.tokens


SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "rectangle"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "colours": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
    },
    "required": ["shape", "count", "colours"],
    "additionalProperties": False,
}


def test_answers_keep_to_a_schema_whatever_the_model_wants(tiny: LiveServer) -> None:
    """Random weights at temperature 1, beside free calls: all sixteen texts parse and fit."""
    client = tiny.client()
    messages: list[Any] = [{"role": "user", "content": "describe"}]
    form: Any = {"type": "json_schema", "json_schema": {"name": "picture", "schema": SCHEMA, "strict": True}}
    free = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=20)
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=NAME, messages=messages, n=8, seed=3, max_tokens=400, response_format=form, stream=stream
        )
        if stream:
            texts, reasons, _ = streamed(answer)
        else:
            texts = {choice.index: choice.message.content for choice in answer.choices}
            reasons = {choice.index: choice.finish_reason for choice in answer.choices}
        assert set(reasons.values()) == {"stop"}
        for text in texts.values():
            value = json.loads(text)
            assert sorted(value) == ["colours", "count", "shape"]
            assert value["shape"] in ("circle", "rectangle") and 0 <= value["count"] <= 99
            assert len(value["colours"]) <= 2 and all(len(one) <= 6 for one in value["colours"])
    again = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=20)
    assert again.choices[0].message.content == free.choices[0].message.content


def test_patterns_choices_grammars_and_any_object(tiny: LiveServer, small: LiveServer) -> None:
    for server in (tiny, small):
        client = server.client()

        def ask(temperature: float = 1.0, client: Any = client, **extra: Any) -> Any:
            return client.chat.completions.create(
                model=NAME,
                messages=[{"role": "user", "content": "what colour?"}],
                temperature=temperature,
                max_tokens=100,
                seed=1,
                extra_body=extra,
            ).choices[0]

        assert ask(guided_regex=r"\d{3}-\d{4}").message.content[3] == "-"
        assert ask(guided_choice=["mauve ", 'a "b"', "größe"]).message.content in ("mauve ", 'a "b"', "größe")
        found = ask(guided_grammar='start: NUM ("+" NUM)~2\nNUM: /[0-9]{1,2}/')
        assert re.fullmatch(r"\d{1,2}\+\d{1,2}\+\d{1,2}", found.message.content)
        found = ask(response_format={"type": "json_object"})
        if found.finish_reason == "stop":
            assert isinstance(json.loads(found.message.content), dict)
        assert found.message.content.startswith("{")
        assert ask(temperature=0, guided_json={"const": "x"}).message.content == '"x"'


def test_health_metrics_and_schema(tiny: LiveServer) -> None:
    assert httpx.get(f"{tiny.url}/health").json() == {"status": "ok"}
    before = _metrics(tiny)
    tiny.client().completions.create(model=NAME, prompt="hi", max_tokens=5, extra_body={"ignore_eos": True})
    after = _metrics(tiny)
    assert after["phi35_generated_tokens_total"] - before.get("phi35_generated_tokens_total", 0) == 5
    assert after['phi35_answers_total{reason="length"}'] >= 1
    assert after["phi35_running"] == after["phi35_waiting"] == after["phi35_admitted"] == 0
    assert after["phi35_free_cache_pages"] == after["phi35_cache_pages"] > 0
    assert after["phi35_healthy"] == 1
    described = httpx.get(f"{tiny.url}/openapi.json").json()
    body = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rpartition("/")[2]
    assert "messages" in described["components"]["schemas"][name]["properties"]


def _metrics(server: LiveServer) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}
