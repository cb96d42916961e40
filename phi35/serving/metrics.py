"""What /metrics tells, in Prometheus' form; one registry for each server, none of the process."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from phi35.serving.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of one server.

    Args:
        engine: whose state is told.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        kept = self.registry
        self.calls = Counter("phi35_calls", "Calls by endpoint and HTTP status.", ["endpoint", "status"], registry=kept)
        self.ends = Counter("phi35_answers", "Answers by the reason of their end.", ["reason"], registry=kept)
        self.prompt_tokens = Counter("phi35_prompt_tokens", "Tokens of prompts, once a call.", registry=kept)
        self.generated_tokens = Counter("phi35_generated_tokens", "New tokens.", registry=kept)
        self.first_token = Histogram(
            "phi35_time_to_first_token_seconds", "From a call's arrival.", buckets=SECONDS, registry=kept
        )
        self.token = Histogram(
            "phi35_time_per_token_seconds",
            "Between tokens of an answer, on average.",
            buckets=TOKEN_SECONDS,
            registry=kept,
        )
        self.call = Histogram("phi35_call_seconds", "Whole calls that were answered.", buckets=SECONDS, registry=kept)
        cache, prefixes = engine.batcher.cache, engine.batcher.prefix_statistics
        for name, text, value in (
            ("phi35_running", "Answers that have a row.", lambda: engine.num_running),
            ("phi35_waiting", "Answers that wait for a row.", lambda: engine.num_waiting),
            ("phi35_admitted", "Answers of open calls.", lambda: engine.num_admitted),
            ("phi35_cache_pages", "Pages of the key-value cache.", lambda: cache.num_pages),
            ("phi35_free_cache_pages", "Pages that nobody owns.", lambda: cache.num_free),
            ("phi35_read_tokens", "Tokens of prompts that have been read.", lambda: prefixes.prompt_tokens),
            ("phi35_cached_tokens", "Those of them that lay in the cache already.", lambda: prefixes.hit_tokens),
            ("phi35_healthy", "Whether the engine serves.", lambda: float(engine.failure is None)),
        ):
            Gauge(name, text, registry=kept).set_function(value)

    def text(self) -> bytes:
        """The present values."""
        return generate_latest(self.registry)


class Stopwatch:
    """Times of one call.

    Args:
        metrics: that hear of them.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.began = metrics, time.perf_counter()
        self._first: float | None = None

    def tokens(self, count: int) -> None:
        """More tokens have come."""
        self.metrics.generated_tokens.inc(count)
        if self._first is None:
            self._first = time.perf_counter()
            self.metrics.first_token.observe(self._first - self.began)

    def finish(self, longest_answer: int) -> None:
        """The call has been answered; its longest answer has so many tokens."""
        now = time.perf_counter()
        self.metrics.call.observe(now - self.began)
        if self._first is not None and longest_answer > 1:
            self.metrics.token.observe((now - self._first) / (longest_answer - 1))
