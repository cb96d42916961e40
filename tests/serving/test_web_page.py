"""The page for chatting, in a real browser: streams, pictures, the stop button, keys, errors, and no foreign hosts."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server, small_model, tiny_model
from PIL import Image, ImageDraw

import phi35

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: one of {', '.join(BROWSERS)}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def small() -> Iterator[LiveServer]:
    with live_server() as server:
        yield server


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page on which every message of an error, and every request elsewhere, fails the test."""
    context = browser.new_context(viewport={"width": 900, "height": 700})
    shown = context.new_page()
    problems: list[str] = []
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    shown.on("request", lambda asked: problems.append(asked.url) if not _own(asked.url) else None)
    shown.problems = problems
    yield shown
    _keep(shown, request, "end")
    context.close()
    assert not problems


def _keep(page: Any, request: pytest.FixtureRequest, moment: str) -> None:
    """A picture of the page, where the option asks for them."""
    folder = request.config.getoption("--screenshots", default=None)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{request.node.name}_{moment}.png")


def _own(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill="red")
    image.save(tmp_path / "circle.png")
    return tmp_path / "circle.png"


def answered(page: Any, count: int) -> str:
    """The text of the last answer, once there are so many and none is on its way."""
    page.wait_for_function(
        "count => document.querySelectorAll('.assistant').length === count && !document.querySelector('.running')",
        arg=count,
    )
    return str(page.locator(".assistant .text").last.text_content())


def test_a_chat_with_pictures_over_two_turns(page: Any, small: LiveServer, picture: Path) -> None:
    page.goto(small.url)
    page.wait_for_selector("#attach:not([hidden])")
    assert page.text_content("#model") == "small"
    page.set_input_files("#files", picture)
    page.wait_for_selector("#pictures img")
    page.fill("#prompt", "what shape is in the picture?")
    page.press("#prompt", "Enter")
    first = answered(page, 1)
    question = {
        "role": "user",
        "content": [{"type": "image", "image": picture}, _text("what shape is in the picture?")],
    }
    messages = [question]
    assert first == phi35.generate(messages=messages, model=small_model()) == "circle"
    assert page.locator(".user img").count() == 1 and page.locator("#pictures img").count() == 0
    assert "tokens" in page.text_content("#status")
    page.fill("#prompt", "what colour is it?")
    page.click("#send")
    second = answered(page, 2)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "what colour is it?"}]
    assert second == phi35.generate(messages=messages, model=small_model())


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_the_stop_button_ends_the_answer_on_the_server_too(page: Any) -> None:
    endless = tiny_model(stop_token_ids=())
    with live_server(*endless) as server:
        page.goto(server.url)
        page.click("#settings summary")
        page.fill("#max_tokens", "3000")
        page.wait_for_function("() => document.getElementById('model').textContent === 'small'")
        assert page.locator("#attach").is_hidden()
        page.fill("#prompt", "<b>go</b>")
        page.click("#send")
        page.wait_for_function("() => document.querySelector('.assistant .text')?.textContent.length > 20")
        assert server.service.engine.num_running == 1
        page.click("#stop")
        text = answered(page, 1)
        assert page.locator(".assistant .note").text_content() == "stopped"
        whole = phi35.generate("<b>go</b>", model=endless, max_new_tokens=len(text) + 50)
        assert len(text) > 20 and str(whole).startswith(text)
        assert page.locator(".user b").count() == 0, "a message is text, not markup"
        page.wait_for_timeout(500)
        assert server.service.engine.num_running == 0
        page.wait_for_selector("#send:not([hidden])")


def test_a_key_is_asked_for_and_errors_are_shown(page: Any, request: pytest.FixtureRequest) -> None:
    model, processor = tiny_model()
    with live_server(model, processor, api_keys=("word",), max_length=200) as server:
        page.goto(server.url)
        page.wait_for_selector("#error:not([hidden])")
        assert "key" in page.text_content("#error")
        page.fill("#key", "word")
        page.press("#key", "Tab")
        page.wait_for_selector("#error", state="hidden")
        page.fill("#max_tokens", "1000")
        page.fill("#prompt", "hello")
        page.click("#send")
        page.wait_for_selector("#error:not([hidden])")
        assert "at most 200" in page.text_content("#error")
        _keep(page, request, "error")
        assert page.input_value("#prompt") == "hello" and page.locator(".turn").count() == 0
        page.fill("#max_tokens", "8")
        page.click("#send")
        assert answered(page, 1) == phi35.generate("hello", model=tiny_model(), max_new_tokens=8)
        # The browser's own lines about the two refused calls.
        assert len(page.problems) == 2 and all("status of 40" in problem for problem in page.problems)
        page.problems.clear()
        page.click("#new")
        assert page.locator(".turn").count() == 0
