"""``phi35 export-gguf``: a checkpoint as one file for llama.cpp."""

from pathlib import Path
from typing import Annotated

import typer


def export_gguf(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint; quantized ones keep their codes.")],
    target: Annotated[Path, typer.Argument(help="File to write, such as model.gguf.")],
    kind: Annotated[
        str | None, typer.Option("--type", help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; default: as stored.")
    ] = None,
    text_only: Annotated[bool, typer.Option(help="Of a vision model, the text model alone.")] = False,
    routing: Annotated[
        str, typer.Option(help="equal: stand in for SparseMixer, which llama.cpp lacks; softmax: leave the weights.")
    ] = "equal",
) -> None:
    """Write a checkpoint as a GGUF file for llama.cpp, tokenizer and chat template included."""
    from phi35.gguf_export.export import export_gguf as run

    report = run(source, target, kind, text_only, routing)
    types = ", ".join(f"{count} in {name}" for name, count in sorted(report.types.items()))
    print(f"{report.path}: {report.architecture}, {report.num_bytes:,} bytes, matrices {types}")
    for note in report.notes:
        print(f"note: {note}")
