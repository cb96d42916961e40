"""What a server allows: sizes, limits, times, keys."""

import dataclasses
import ipaddress
from collections.abc import Iterator

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """Everything about a server but its model.

    Attributes:
        model_name: the name that requests must give.
        max_rows: most requests that run at a time.
        max_cache_tokens: tokens that the key-value cache holds for all of them.
        max_length: most tokens of a request, prompt and answer; None takes what cache and model allow.
        prefix_caching: whether the keys of a prompt's beginning serve later prompts that begin alike.
        kv_cache_dtype: "int8" or "fp8" for a cache of half the bytes; None keeps the model's dtype.
        prefill_chunk_size: most prompt tokens that are read between two steps.
        max_waiting: most requests that wait for a row; more are refused with 429.
        max_output_tokens: most new tokens of an answer; None leaves it to the length.
        max_choices: most answers of one call (prompts times ``n``).
        request_timeout: seconds after which a call is cancelled.
        body_timeout: seconds in which a call's body must have come.
        max_body_bytes: largest body; more is refused with 413.
        max_images: most pictures of a call.
        max_image_bytes: largest picture file.
        max_image_pixels: largest picture; more pixels are refused before they are decoded.
        max_grammar_bytes: largest schema, pattern or grammar.
        image_urls: whether pictures may be named by http(s) URLs.
        image_networks: networks that such URLs may lead to although they are not public, as "10.1.0.0/16".
        image_timeout: seconds for fetching a picture, redirects included.
        api_keys: keys of which a call must bear one; none leaves the server open.
        cors_origins: origins whose pages may call; "*" for all.
        drain_seconds: how long running calls may go on when the server is told to stop.
        ping_seconds: silence after which a stream sends a comment, so that proxies keep it.
    """

    model_name: str
    max_rows: int = 64
    max_cache_tokens: int = 65536
    max_length: int | None = None
    prefix_caching: bool = True
    kv_cache_dtype: str | None = None
    prefill_chunk_size: int = 2048
    max_waiting: int = 256
    max_output_tokens: int | None = None
    max_choices: int = 16
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    max_body_bytes: int = 32 * MEBIBYTE
    max_images: int = 16
    max_image_bytes: int = 16 * MEBIBYTE
    max_image_pixels: int = 50_000_000
    max_grammar_bytes: int = 64 * 1024
    image_urls: bool = False
    image_networks: tuple[str, ...] = ()
    image_timeout: float = 10.0
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    drain_seconds: float = 30.0
    ping_seconds: float = 15.0

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("cannot serve: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        if not self.model_name:
            yield "model_name must not be empty"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "max_waiting":
                fine = isinstance(value, int) and value >= 0
            elif field.type in (int, float, int | None):
                fine = (value is None and field.type == (int | None)) or (
                    isinstance(value, int | float) and not isinstance(value, bool) and value > 0
                )
            else:
                continue
            if not fine:
                yield f"{field.name} must be positive, got {value!r}"
        for network in self.image_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                yield f"image_networks holds {network!r}, which is no network: {error}"
        if self.image_networks and not self.image_urls:
            yield "image_networks has no effect without image_urls"
        if not all(self.api_keys):
            yield "an API key must not be empty"
        if not all(key.isascii() for key in self.api_keys):
            yield "an API key must be ASCII, as HTTP headers are"
