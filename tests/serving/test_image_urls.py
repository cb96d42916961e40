"""Pictures from URLs: from public (here: expressly allowed) addresses alone, within size, time and redirects."""

import asyncio
import io
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from live_server import NAME, LiveServer, live_server, small_model
from PIL import Image

import phi35
from phi35.serving.errors import ApiError
from phi35.serving.fetching import PictureFetcher, is_public

ALLOWED = "127.0.0.1/32"
"""The only address of this machine that the tests allow; 127.0.0.2 is as private as any other."""


def picture(colour: str = "blue") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


class Site(BaseHTTPRequestHandler):
    """What the tests fetch."""

    asked: list[str] = []

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        self.asked.append(f"{self.headers['Host']} {self.path}")
        redirects = {
            "/to-picture": "/picture.png",
            "/to-private": f"http://127.0.0.2:{port}/picture.png",
            "/to-file": "file:///etc/passwd",
            "/around": "/around",
        }
        if self.path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[self.path])
            self.end_headers()
        elif self.path == "/picture.png":
            self.answer(picture())
        elif self.path == "/declared":
            self.answer(b"x", length=10_000_000)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(1000):
                    self.wfile.write(bytes(10_000))
            except OSError:
                return  # the reader has had enough
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(50):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            except OSError:
                return
        else:
            self.send_error(404)

    def answer(self, content: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port of a site that listens at all addresses of this machine."""
    server = ThreadingHTTPServer(("", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(image_urls=True, image_networks=(ALLOWED,), max_image_bytes=200_000, image_timeout=1.0) as live:
        yield live


def ask(server: LiveServer, url: str) -> str:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what colour is it?"}]
    answer = server.client().chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item]
        temperature=0,
        max_tokens=8,
    )
    return answer.choices[0].message.content or ""


def test_a_picture_is_fetched_also_through_a_redirect(server: LiveServer, site: int) -> None:
    expected = phi35.generate("what colour is it?", images=[picture()], model=small_model(), max_new_tokens=8)
    for path in ("picture.png", "to-picture"):
        assert ask(server, f"http://127.0.0.1:{site}/{path}") == expected
    assert f"127.0.0.1:{site} /picture.png" in Site.asked


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.2:{port}/picture.png", "image_url_not_allowed"),
        ("http://127.0.0.1:{port}/to-private", "image_url_not_allowed"),
        ("http://127.1.1.1:{port}/picture.png", "image_url_not_allowed"),
        ("http://2130706434:{port}/picture.png", "image_url_not_allowed"),
        ("http://0x7f.0.0.2:{port}/picture.png", "image_url_not_allowed"),
        ("http://0.0.0.0:{port}/picture.png", "image_url_not_allowed"),
        ("http://[::1]:{port}/picture.png", "image_url_not_allowed"),
        ("http://[::ffff:127.0.0.2]:{port}/picture.png", "image_url_not_allowed"),
        ("http://[64:ff9b::7f00:2]:{port}/picture.png", "image_url_not_allowed"),
        ("http://169.254.169.254/latest/meta-data", "image_url_not_allowed"),
        ("http://10.0.0.1/x.png", "image_url_not_allowed"),
        ("http://127.0.0.1:{port}/to-file", "invalid_image_url"),
        ("http://127.0.0.1:{port}/around", "invalid_image_url"),
        ("http://127.0.0.1:{port}/missing", "invalid_image_url"),
        ("http://127.0.0.1:{port}/slow", "invalid_image_url"),
        ("http://127.0.0.1:{port}/declared", "image_too_large"),
        ("http://127.0.0.1:{port}/endless", "image_too_large"),
        ("http://user:word@127.0.0.1:{port}/picture.png", "invalid_image_url"),
        ("http://127.0.0.1:{port}/a b", "invalid_image_url"),
        ("http://127.0.0.1:99999/x", "invalid_image_url"),
        ("http://127.0.0.1:1/x", "invalid_image_url"),
        ("http://no-such-host.invalid/x", "invalid_image_url"),
        ("https://127.0.0.1:{port}/picture.png", "invalid_image_url"),
        ("ftp://127.0.0.1/x", "invalid_image_url"),
        ("http:///x", "invalid_image_url"),
    ],
)
def test_other_urls_are_refused(server: LiveServer, site: int, url: str, code: str) -> None:
    Site.asked.clear()
    began = time.perf_counter()
    with pytest.raises(openai.BadRequestError) as raised:
        ask(server, url.format(port=site))
    assert raised.value.code == code
    assert time.perf_counter() - began < 5
    assert not any(line.startswith(("127.0.0.2", "[::", "0", "2130706434")) for line in Site.asked)


def test_a_name_that_stands_for_a_private_address_is_refused(site: int) -> None:
    """Names are judged by what they resolve to: localhost is the one that every machine has."""
    assert all(ipaddress.ip_address(one[4][0]).is_loopback for one in socket.getaddrinfo("localhost", site))
    fetcher = PictureFetcher(1000, 2.0)
    with pytest.raises(ApiError, match="not public"):
        asyncio.run(fetcher.fetch(f"http://localhost:{site}/picture.png"))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("::ffff:10.1.2.3", False),
        ("64:ff9b::a01:203", False),
        ("2002:a01:203::1", False),
        ("2001:0:a01:203::1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.1.1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("224.0.0.1", False),
        ("ff02::1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("::1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public
