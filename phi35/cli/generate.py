"""``phi35 generate``: one prompt, its pictures, and the answer on standard output as it comes."""

from typing import Annotated, Any

import typer


def generate(
    prompt: Annotated[str, typer.Argument(help="The question; tags such as <|image_1|> are optional.")],
    image: Annotated[list[str] | None, typer.Option(help="A picture file; give it again for more.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: PHI35_MODEL, else the small one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Text of a system turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 for greedy, else sampling.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the smallest set with this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below this fraction of the best.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that occurred get less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    num_crops: Annotated[int | None, typer.Option(help="Limit of tiles a picture.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    quantization: Annotated[str | None, typer.Option(help="int4, int8 or fp8: round weights as they are read.")] = None,
    expert_memory: Annotated[
        str | None, typer.Option(help="Device memory for experts (40GB); others on the host.")
    ] = None,
    rope_mode: Annotated[str, typer.Option(help="reference or pinned (LongRoPE).")] = "reference",
    kv_cache_dtype: Annotated[str | None, typer.Option(help="int8 or fp8: keys and values in eight bits.")] = None,
    speculation: Annotated[str | None, typer.Option(help="prompt_lookup: draft tokens from the text so far.")] = None,
    draft_model: Annotated[str | None, typer.Option(help="Folder or hub id of a smaller model that drafts.")] = None,
) -> None:
    """Answer a prompt, with or without pictures."""
    from phi35 import api

    pieces: Any = api.generate(
        prompt,
        images=image or None,
        model=model,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or None,
        seed=seed,
        stream=True,
        num_crops=num_crops,
        device=device,
        dtype=dtype,
        quantization=quantization,
        expert_memory=expert_memory,
        rope_mode=rope_mode,
        kv_cache_dtype=kv_cache_dtype,
        speculation=speculation,
        draft_model=draft_model,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
