"""What is asked of a call before its content is looked at: key, type, size, and that it arrives in time."""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request

from phi35.serving.errors import ApiError, invalid
from phi35.serving.settings import ServingSettings


def check_key(request: Request, settings: ServingSettings) -> None:
    """Ask for one of the keys; comparing takes equally long for every wrong one.

    Raises:
        ApiError: 401.
    """
    if not settings.api_keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in settings.api_keys]
    if scheme.lower() != "bearer" or not any(matches):
        came = "a key that is not one of this server's" if given else "none"
        raise ApiError(
            401,
            f"this server asks for a key (Authorization: Bearer KEY), and {came} came",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_body(request: Request, settings: ServingSettings) -> bytes:
    """The body of a call, no more of it than is allowed.

    A body that is not declared as JSON is refused: a page of another origin could send one without asking first.

    Raises:
        ApiError: 415, 413, 408, or 400 where the length is no number.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be sent as application/json, got {kind or 'no type'!r}", "unsupported_type")
    length = request.headers.get("content-length", "0")
    if not length.isdigit():
        raise invalid(f"content-length must be a number, got {length!r}")
    if int(length) > settings.max_body_bytes:
        raise _too_large(settings)
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for part in request.stream():
                size += len(part)
                if size > settings.max_body_bytes:
                    raise _too_large(settings)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {settings.body_timeout:g} seconds", "timeout") from None
    return b"".join(parts)


async def unless_disconnected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of ``work``, which is cancelled when the caller goes away; None then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(settings: ServingSettings) -> ApiError:
    return ApiError(413, f"the body may have at most {settings.max_body_bytes} bytes", "body_too_large")
