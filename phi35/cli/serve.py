"""``phi35 serve``: the OpenAI-compatible server (docs/serving.md)."""

import os
from pathlib import Path
from typing import Annotated

import typer

KEY_VARIABLE = "PHI35_API_KEY"


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id; default: PHI35_MODEL, else the small one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name that calls must give; default: the folder's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    quantization: Annotated[str | None, typer.Option(help="int4, int8 or fp8: round weights as they are read.")] = None,
    expert_memory: Annotated[
        str | None, typer.Option(help="Device memory for experts (40GB); others on the host.")
    ] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="int8 or fp8: keys and values in eight bits.")] = None,
    prefix_caching: Annotated[bool, typer.Option(help="Keep keys of prompts for others that begin alike.")] = True,
    max_rows: Annotated[int, typer.Option(help="Answers that run at a time.")] = 64,
    max_cache_tokens: Annotated[int, typer.Option(help="Tokens that the key-value cache holds in all.")] = 65536,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a prompt and its answer.")] = None,
    prefill_chunk_size: Annotated[int, typer.Option(help="Prompt tokens that are read between two steps.")] = 2048,
    max_waiting: Annotated[int, typer.Option(help="Answers that may wait; more are refused (429).")] = 256,
    max_output_tokens: Annotated[int | None, typer.Option(help="Most new tokens of an answer.")] = None,
    request_timeout: Annotated[float, typer.Option(help="Seconds after which a call is cancelled (504).")] = 600.0,
    max_body_megabytes: Annotated[float, typer.Option(help="Largest body of a call (413).")] = 32.0,
    max_images: Annotated[int, typer.Option(help="Most pictures of a call.")] = 16,
    max_image_pixels: Annotated[int, typer.Option(help="Most pixels of a picture.")] = 50_000_000,
    image_urls: Annotated[bool, typer.Option(help="Fetch pictures from http(s) URLs of public addresses.")] = False,
    image_network: Annotated[
        list[str] | None, typer.Option(help="A network that picture URLs may lead to although it is not public.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File with a key a line; the variable {KEY_VARIABLE} holds one, too.")
    ] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Origin whose pages may call; * for all.")] = None,
    drain_seconds: Annotated[float, typer.Option(help="How long calls may go on after SIGTERM.")] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model over HTTP as OpenAI's API, with a page for chatting at /."""
    from phi35 import api

    try:
        from phi35.serving.app import build_service, create_app
        from phi35.serving.server import GracefulServer
    except ImportError as error:
        raise ValueError(f"serving needs further packages ({error}): pip install 'phi35[serve]'") from error
    from phi35.serving.settings import ServingSettings

    settings = ServingSettings(
        model_name=name or _name(model),
        max_rows=max_rows,
        max_cache_tokens=max_cache_tokens,
        max_length=max_length,
        prefix_caching=prefix_caching,
        kv_cache_dtype=kv_cache_dtype,
        prefill_chunk_size=prefill_chunk_size,
        max_waiting=max_waiting,
        max_output_tokens=max_output_tokens,
        request_timeout=request_timeout,
        max_body_bytes=int(max_body_megabytes * 2**20),
        max_images=max_images,
        max_image_pixels=max_image_pixels,
        image_urls=image_urls,
        image_networks=tuple(image_network or ()),
        api_keys=_keys(api_key_file),
        cors_origins=tuple(cors_origin or ()),
        drain_seconds=drain_seconds,
    )
    loaded, processor = api.resolve_model(model, device, dtype, quantization, expert_memory)
    service = build_service(loaded, processor, settings)
    GracefulServer(create_app(service), service, host, port, log_level).run()


def _name(model: str | None) -> str:
    """What a model is called where no name was given."""
    from phi35.api import MODEL_VARIABLE

    named = model or os.environ.get(MODEL_VARIABLE)
    if not named:
        return "small-vision"
    return Path(named).expanduser().resolve().name if Path(named).expanduser().is_dir() else named


def _keys(path: Path | None) -> tuple[str, ...]:
    """Keys from a file and from the environment."""
    keys = [] if path is None else [line.strip() for line in path.read_text("utf-8").splitlines()]
    if path is not None and not any(keys):
        raise ValueError(f"{path} holds no key: write one a line")
    return tuple(key for key in [*keys, os.environ.get(KEY_VARIABLE, "")] if key)
