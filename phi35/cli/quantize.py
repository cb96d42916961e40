"""``phi35 quantize``: a checkpoint written anew with its weights in few bits."""

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    bits: Annotated[int, typer.Option(help="4 or 8.")] = 4,
    kind: Annotated[str, typer.Option("--type", help="int, or float: e4m3, with --bits 8.")] = "int",
    group_size: Annotated[int, typer.Option(help="Values that share a scale: 32, 64, 128; -1: a whole row.")] = 128,
    symmetric: Annotated[bool, typer.Option(help="Without zero points.")] = True,
    scale_bits: Annotated[int, typer.Option(help="16, or 8: bytes times a float32 for each row.")] = 16,
    embedding: Annotated[int, typer.Option(help="Bits of the token embedding; 16 keeps it.")] = 16,
    head: Annotated[int, typer.Option(help="Bits of the output head; 16 keeps it.")] = 16,
    tower: Annotated[int, typer.Option(help="Bits of the image tower and projector; 16 keeps them.")] = 16,
    method: Annotated[str, typer.Option(help="rtn, or gptq: calibrated on a text.")] = "rtn",
    calibration: Annotated[Path | None, typer.Option(help="Text file for gptq, such as the model is to read.")] = None,
    samples: Annotated[int, typer.Option(help="Stretches of the text that calibrate.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a stretch.")] = 512,
    min_tokens: Annotated[int, typer.Option(help="Experts that saw fewer are rounded to nearest.")] = 128,
    device: Annotated[str | None, typer.Option(help="Where gptq runs: cpu, cuda, ...")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, e.g. 5GB or 300MiB.")] = "5GB",
) -> None:
    """Write a checkpoint with its linear layers and experts in few bits."""
    from phi35.cli.table import render
    from phi35.device import pick_device
    from phi35.loading import load_config
    from phi35.quantization.calibrate import quantize_calibrated
    from phi35.quantization.calibration_text import text_batches
    from phi35.quantization.config import QuantizationConfig, WeightFormat
    from phi35.quantization.convert import quantize as run
    from phi35.quantization.report import size_report

    def form(width: int) -> WeightFormat | None:
        if width == 16:
            return None
        return WeightFormat(
            bits=width,
            type=kind if width == 8 else "int",
            group_size=None if group_size == -1 else group_size,
            symmetric=symmetric,
            scale_bits=scale_bits,
        )

    quantization = QuantizationConfig(
        linear=form(bits), embedding=form(embedding), head=form(head), tower=form(tower), method=method
    )
    if method == "gptq":
        if calibration is None:
            raise ValueError("method gptq needs --calibration, a text file such as the model is to read")
        batches = text_batches(source, calibration, samples, length)
        place = pick_device(device)
        report = quantize_calibrated(
            source, target, quantization, batches, min_tokens=min_tokens, device=place, max_shard_size=max_shard_size
        )
        print(report.summary())
    elif calibration is not None:
        raise ValueError(f"--calibration is for method gptq, and the method is {method!r}")
    else:
        run(source, target, quantization, max_shard_size=max_shard_size)
    config = load_config(target)
    before, after = size_report(config.replace(quantization=None)), size_report(config)
    rows = [
        {
            "weights": name,
            "in bfloat16": before.kinds[name],
            "stored": size,
            "share": f"{size / before.kinds[name]:.1%}",
        }
        for name, size in after.kinds.items()
    ]
    rows.append({"weights": "in memory", "in bfloat16": before.memory, "stored": after.memory, "share": ""})
    files = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    rows.append({"weights": "on disk", "in bfloat16": before.disk, "stored": files, "share": ""})
    print(f"{target}: {quantization.label}, {quantization.method}\n{render(rows)}")
