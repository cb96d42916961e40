"""Calls that are wrong, too large, too many, too slow or without a key are refused by name, and the server goes on."""

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from live_server import NAME, LiveServer, live_server, tiny_model
from PIL import Image

from phi35.serving.settings import ServingSettings

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
KEY = "secret-key"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """The small vision model with narrow limits."""
    with live_server(
        max_body_bytes=300_000,
        max_image_bytes=100_000,
        max_image_pixels=1_000_000,
        max_images=2,
        body_timeout=0.5,
        max_grammar_bytes=2000,
        max_choices=4,
        max_length=512,
        max_output_tokens=400,
    ) as live:
        yield live


def post(server: LiveServer, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    return httpx.post(server.url + path, content=content, headers=headers, timeout=30, **options)


def refusal(response: httpx.Response) -> tuple[int, str | None, str]:
    """Status, code and message, in the form that OpenAI's clients read."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"], error["message"]


def with_picture(url: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    return CHAT | {"messages": [{"role": "user", "content": content}]}


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n:"),
        ({"n": 5}, "4 answers"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 401}, "at most 400"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "<|image_1|> what?"}]}, "image_1"),
        ({"tempreature": 1}, "tempreature: unknown field"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"top_logprobs": 2}, "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream=true"),
        ({"stop": ""}, "non-empty"),
        ({"stop_token_ids": [99999]}, "vocabulary"),
        ({"seed": 2**70}, "seed"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "one of them"),
        ({"guided_json": {"type": "no such type"}}, "form"),
        ({"guided_json": {"$ref": "http://127.0.0.1:1/schema"}}, "form"),
        ({"guided_regex": "("}, "form"),
        ({"guided_regex": "((a{1000}){1000}){1000}"}, "form"),
        ({"guided_regex": "a" * 2001}, "2000 bytes"),
        ({"guided_grammar": "start: @other"}, "form"),
    ],
)
def test_wrong_fields_are_named(server: LiveServer, changes: dict[str, Any], said: str) -> None:
    status, _, message = refusal(post(server, CHAT | changes))
    assert status == 400
    assert said in message, message


def test_wrong_bodies_types_paths_and_models(server: LiveServer) -> None:
    assert refusal(post(server, b"{"))[:2] == (400, "invalid_json")
    assert refusal(post(server, b"[" * 100_000))[0] == 400
    assert refusal(post(server, b"\xff"))[0] == 400
    assert refusal(post(server, b"[]"))[0] == 400
    assert refusal(post(server, CHAT, headers={"content-type": "text/plain"}))[:2] == (415, "unsupported_type")
    assert refusal(post(server, CHAT | {"model": "gpt-4"}))[:2] == (404, "model_not_found")
    assert refusal(httpx.get(f"{server.url}/v1/models/none"))[:2] == (404, "model_not_found")
    assert refusal(httpx.get(f"{server.url}/v1/nothing"))[0] == 404
    assert refusal(httpx.get(f"{server.url}/v1/chat/completions"))[0] == 405
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        server.client().completions.create(model="gpt-4", prompt="x")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "prompt"),
        ("", "prompt"),
        ([[1], []], "prompt"),
        ([5000], "vocabulary"),
        ([-1], "vocabulary"),
        (["a"] * 5, "4"),
    ],
)
def test_wrong_prompts(server: LiveServer, prompt: Any, said: str) -> None:
    status, _, message = refusal(post(server, {"model": NAME, "prompt": prompt}, "/v1/completions"))
    assert status == 400 and said in message


def test_prompts_that_are_too_long(server: LiveServer) -> None:
    long = [{"role": "user", "content": "circle " * 600}]
    for changes in ({"messages": long}, {"messages": [{"role": "user", "content": "a " * 300}], "max_tokens": 390}):
        status, code, message = refusal(post(server, CHAT | changes))
        assert (status, code) == (400, "context_length_exceeded") and "at most 512" in message
    with pytest.raises(openai.BadRequestError, match="shorten"):
        server.client().completions.create(model=NAME, prompt=[5] * 512, max_tokens=1)


def test_bodies_that_are_too_large_declared_or_not(server: LiveServer) -> None:
    large = json.dumps(CHAT | {"user": "x" * 400_000}).encode()
    assert refusal(post(server, large))[:2] == (413, "body_too_large")

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 10_000):
            yield large[start : start + 10_000]

    response = httpx.post(
        f"{server.url}/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    assert refusal(response)[:2] == (413, "body_too_large")


def test_a_body_that_does_not_come_is_not_waited_for(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


def test_a_caller_that_leaves_in_the_middle_of_its_body_is_no_failure(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        time.sleep(0.1)
    end = time.monotonic() + 10
    while (
        'phi35_calls_total{endpoint="/v1/completions",status="499"} 1.0' not in httpx.get(f"{server.url}/metrics").text
    ):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_pictures_beyond_the_limits(server: LiveServer) -> None:
    assert post(server, with_picture(data_url(png(64, 64)))).status_code == 200
    # Fifty thousand pixels a side in a few bytes: its header alone is read.
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    began = time.perf_counter()
    assert refusal(post(server, with_picture(data_url(bomb))))[:2] == (400, "image_too_large")
    assert time.perf_counter() - began < 2
    assert refusal(post(server, with_picture(data_url(png(1001, 1000)))))[:2] == (400, "image_too_large")
    assert refusal(post(server, with_picture(data_url(bytes(100_001)))))[:2] == (400, "image_too_large")
    three = with_picture(data_url(png(8, 8)))
    three["messages"] = three["messages"] * 3
    assert "at most 2" in refusal(post(server, three))[2]


@pytest.mark.parametrize(
    "url",
    [
        data_url(b"no picture"),
        data_url(b""),
        data_url(png(64, 64)[:-40]),
        data_url(png(1, 1)) + "!",
        "data:image/png;base64,====",
        "data:image/png,rawbytes",
        "data:text/html;base64,AAAA",
        "http://127.0.0.1:1/x.png",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
    ],
)
def test_pictures_that_are_none(server: LiveServer, url: str) -> None:
    status, _, message = refusal(post(server, with_picture(url)))
    assert status == 400 and "root:" not in message


def test_keys() -> None:
    model, processor = tiny_model()
    with live_server(model, processor, api_keys=("other", KEY)) as server:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY}):
            response = post(server, CHAT, headers=given)
            assert refusal(response)[:2] == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(server.url + path).status_code == 401
            assert httpx.get(server.url + path, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(server.url).status_code == 200
        # Before the body is read.
        assert refusal(post(server, b"x" * 1000))[0] == 401
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert server.client("other").chat.completions.create(**CHAT).choices  # type: ignore[call-overload]


def test_a_text_model_refuses_pictures() -> None:
    model, processor = tiny_model()
    with live_server(model, processor, cors_origins=("https://pages.example",)) as server:
        assert "reads text only" in refusal(post(server, with_picture(data_url(png(8, 8)))))[2]
        asked = {"origin": "https://pages.example", "access-control-request-method": "POST"}
        allowed = httpx.options(f"{server.url}/v1/chat/completions", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://pages.example"
        other = httpx.options(f"{server.url}/v1/chat/completions", headers=asked | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_settings_name_all_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="max_rows.*max_waiting.*image_networks.*no effect.*ASCII"):
        ServingSettings(
            model_name="x", max_rows=0, max_waiting=-1, image_networks=("300.0.0.0/8",), api_keys=("größe",)
        )
