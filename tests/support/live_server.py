"""A server in a thread of the test's process, on a free port of this machine."""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai

import phi35
from phi35.api import SMALL_MODEL
from phi35.model import CausalLM
from phi35.processor import Processor
from phi35.serving.app import build_service, create_app
from phi35.serving.calls import Service
from phi35.serving.server import GracefulServer
from phi35.serving.settings import ServingSettings
from phi35.tokenizer import Tokenizer

NAME = "small"


class LiveServer:
    """A running server.

    Attributes:
        url: of its root.
        service: its parts.
    """

    def __init__(self, server: GracefulServer, service: Service) -> None:
        self.server, self.service = server, service
        self.url = f"http://127.0.0.1:{server.bound_port}"

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """OpenAI's client for it, without retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def async_client(self, key: str = "none", **options: Any) -> openai.AsyncOpenAI:
        """The same for an event loop."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, **options)


@contextlib.contextmanager
def live_server(model: Any = None, processor: Processor | None = None, **settings: Any) -> Iterator[LiveServer]:
    """Serve a model (the package's small one by default) until the end of the block."""
    if model is None:
        model, processor = small_model()
    assert processor is not None
    settings = {"model_name": NAME, "max_rows": 8, "max_cache_tokens": 8192, "drain_seconds": 1.0} | settings
    service = build_service(model, processor, ServingSettings(**settings))
    server = GracefulServer(create_app(service), service, "127.0.0.1", 0, log_level="warning")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.01)
    live = LiveServer(server, service)
    try:
        yield live
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


@functools.cache
def small_model() -> tuple[CausalLM, Processor]:
    """The package's small vision model."""
    return phi35.load(SMALL_MODEL, device="cpu", dtype="float32")


@functools.cache
def tiny_model(**changes: Any) -> tuple[CausalLM, Processor]:
    """A tiny text model of random weights with peaked logits, under the small model's tokenizer."""
    model = phi35.create("tiny-phi-3.5-mini", seed=0, vocab_size=1088, initializer_range=0.15, **changes)
    return model, Processor(Tokenizer.from_folder(SMALL_MODEL), model.config)
