"""Errors in the form that OpenAI's clients read."""

from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """A call that is refused or fails.

    Args:
        status: HTTP status.
        message: what was expected, what came, what to do.
        code: a short name that programs can test, such as "model_not_found".
        param: the field at fault.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A mistake of the caller."""
    return ApiError(400, message, code, param)


def too_busy(message: str) -> ApiError:
    """The queue is full."""
    return ApiError(429, message, "queue_full", headers={"Retry-After": "1"})


def unavailable(message: str) -> ApiError:
    """The server is stopping, or its engine has failed."""
    return ApiError(503, message, "unavailable", headers={"Retry-After": "5"})


def timed_out(seconds: float) -> ApiError:
    """A call took too long."""
    return ApiError(504, f"the answer was not finished within {seconds:g} seconds and was cancelled", "timeout")
