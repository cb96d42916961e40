"""``phi35 convert``: checkpoints re-saved, in another dtype or sharding, or with CLIP's own tower."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, e.g. 5GB or 300MiB.")] = "5GB",
    open_clip: Annotated[
        str | None, typer.Option(help='CLIP weights for the tower: a file, or a tag of open_clip such as "openai".')
    ] = None,
) -> None:
    """Write a checkpoint anew in Hugging Face form."""
    from phi35.checkpoint.writer import parse_size
    from phi35.loading import find_folder, load, save
    from phi35.registry import resolve

    parse_size(max_shard_size)
    folder = find_folder(source)
    if target.exists() and folder.resolve() == target.resolve():
        raise ValueError(f"{target} is the source itself: give another folder, so that no run leaves half of each")
    model, processor = load(folder, device="cpu", dtype=dtype or "auto")
    if open_clip is not None:
        written = resolve("tower.open_clip")(model, open_clip)
        print(f"tower: {len(written)} tensors from open_clip weights {open_clip}")
    save(model, processor, target, max_shard_size=max_shard_size)
    files = sorted(target.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{target}: {len(files)} weight files, {size:,} bytes, {str(model.dtype).removeprefix('torch.')}")
