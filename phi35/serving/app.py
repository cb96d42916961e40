"""The HTTP interface: OpenAI's endpoints, health, metrics, and a page for chatting."""

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from phi35.generation.batcher import Batcher
from phi35.processor import Processor
from phi35.serving.answers import ChatForm, CompletionForm, Form, events, whole
from phi35.serving.calls import Call, Service, open_call
from phi35.serving.engine import Engine
from phi35.serving.errors import ApiError
from phi35.serving.grammar import GrammarCompiler
from phi35.serving.limits import check_key, read_body, unless_disconnected
from phi35.serving.metrics import CONTENT_TYPE, Metrics
from phi35.serving.prompts import PromptBuilder
from phi35.serving.protocol import ChatRequest, CompletionRequest, Generation, parse
from phi35.serving.settings import ServingSettings

WEB = Path(__file__).parent / "web"
PAGES = {
    "/": ("index.html", "text/html"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/chat.css": ("chat.css", "text/css"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
CLOSED_REQUEST = 499
"""The status that is counted for callers that went away."""


def build_service(model: Any, processor: Processor, settings: ServingSettings) -> Service:
    """A batcher around a model, and what calls need beside it.

    Raises:
        ValueError: for sizes that the batcher refuses.
    """
    batcher = Batcher(
        model,
        max_rows=settings.max_rows,
        max_tokens=settings.max_cache_tokens,
        max_length=settings.max_length,
        chunk_size=settings.prefill_chunk_size,
        tokenizer=processor.tokenizer,
        prefix_caching=settings.prefix_caching,
        kv_cache_dtype=settings.kv_cache_dtype,
    )
    engine = Engine(batcher, settings.max_waiting)
    return Service(
        settings=settings,
        engine=engine,
        processor=processor,
        prompts=PromptBuilder(processor, model.dtype, settings),
        grammars=GrammarCompiler(processor.tokenizer, model.config),
        metrics=Metrics(engine),
    )


def create_app(service: Service) -> FastAPI:
    """The application; its lifespan starts and stops the engine."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            service.prompts.close()
            await service.engine.stop()

    app = FastAPI(title="phi35", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.state.began = int(time.time())
    _add_calls(app, service)
    _add_state(app, service)
    _add_errors(app)
    for path, (name, kind) in PAGES.items():
        app.add_api_route(path, _page(name, kind), include_in_schema=False)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


class EventStream(StreamingResponse):
    """Server-sent events of a call, which ends with the connection."""

    def __init__(self, call: Call, form: Form) -> None:
        super().__init__(events(form), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until all answers have ended or the caller has gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.close()


def _add_calls(app: FastAPI, service: Service) -> None:
    def endpoint(path: str, kind: type[Generation], form: type[ChatForm] | type[CompletionForm]) -> None:
        async def answer(request: Request) -> Response:
            check_key(request, service.settings)
            parsed = parse(kind, await read_body(request, service.settings))
            opened = await unless_disconnected(request, open_call(service, parsed))
            if opened is None:
                return Response(status_code=CLOSED_REQUEST)
            if parsed.stream:
                return EventStream(opened, form(opened))
            body = await unless_disconnected(request, whole(form(opened)))
            return Response(status_code=CLOSED_REQUEST) if body is None else JSONResponse(body)

        async def counted(request: Request) -> Response:
            try:
                response = await answer(request)
            except ApiError as error:
                response = error.response()
            except ClientDisconnect:  # in the middle of the body
                response = Response(status_code=CLOSED_REQUEST)
            service.metrics.calls.labels(path, str(response.status_code)).inc()
            return response

        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        app.state.schemas = getattr(app.state, "schemas", {}) | schema.pop("$defs", {}) | {kind.__name__: schema}
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        app.add_api_route(
            path, counted, methods=["POST"], openapi_extra={"requestBody": {"required": True, "content": content}}
        )

    endpoint("/v1/chat/completions", ChatRequest, ChatForm)
    endpoint("/v1/completions", CompletionRequest, CompletionForm)
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        described = plain()
        described.setdefault("components", {}).setdefault("schemas", {}).update(app.state.schemas)
        return described

    app.openapi = openapi  # type: ignore[method-assign]


def _add_state(app: FastAPI, service: Service) -> None:
    settings, engine = service.settings, service.engine

    def described() -> dict[str, Any]:
        return {
            "id": settings.model_name,
            "object": "model",
            "created": app.state.began,
            "owned_by": "phi35",
            "max_model_len": engine.batcher.max_length,
            "reads_images": service.prompts.reads_images,
        }

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request, settings)
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        check_key(request, settings)
        if name != settings.model_name:
            raise ApiError(404, f"the model {name!r} does not exist", "model_not_found", "model")
        return described()

    @app.get("/health")
    async def health() -> JSONResponse:
        state = "failed" if engine.failure else "stopping" if engine.draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        check_key(request, settings)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        # The server's log has the traceback; the caller learns no more than that.
        return ApiError(500, "the server has made a mistake; its log tells more", "internal_error").response()


def _page(name: str, kind: str) -> Any:
    async def page() -> FileResponse:
        return FileResponse(WEB / name, media_type=kind, headers=PAGE_HEADERS)

    return page
