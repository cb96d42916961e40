"""``phi35 plan``: what fits, how fast, and for how long."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

GIGABYTE = 1e9


def plan(
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings of the training config as key=value; open ones are tried.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset, or folder of a model.")] = "phi-3.5-mini",
    gpus: Annotated[int, typer.Option(help="GPUs in all.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU: 141GB, 80GiB, or h100, h200, a100.")] = "h200",
    tokens: Annotated[float, typer.Option(help="Tokens to train on, for time and GPU-hours.")] = 1e9,
    crops: Annotated[int, typer.Option(help="Crops of a micro-batch's pictures (vision).")] = 0,
    device: Annotated[str, typer.Option(help="GPU whose peak speed counts, as in phi35.training.flops.")] = "H200",
    mfu: Annotated[float | None, typer.Option(help="Share of the peak to expect, in place of a measured one.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of training settings.")] = None,
    deepspeed_config: Annotated[
        Path | None, typer.Option(help="Ready DeepSpeed JSON whose settings hold unless given otherwise.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write the DeepSpeed JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="List all settings, not only the best ones.")] = False,
) -> None:
    """Plan a training run: memory per GPU by part, settings that fit, speed, time, and the DeepSpeed JSON."""
    from phi35.planning.plan import candidates, deepspeed_json, seconds_for
    from phi35.training.build import read_model_config
    from phi35.training.flops import peak_flops

    values = _settings(config, settings or [], preset, gpus, deepspeed_config)
    known = _training_config(values)
    model_config = read_model_config(known)
    peak = known.peak_flops or peak_flops(device, known.dtype)
    if peak is None:
        raise ValueError(f"no peak of device {device!r} is known; give peak_flops=NUMBER")
    capacity = _capacity(gpu_memory)
    found = candidates(model_config, values, gpus, capacity, peak, crops=crops, mfu=mfu)
    best = found[0]
    rendered = deepspeed_json(best, gpus)
    seconds, steps = seconds_for(best, model_config, tokens, crops=crops)
    if write is not None:
        write.write_text(json.dumps(rendered, indent=2) + "\n")
    if as_json:
        print(json.dumps({"best": _row(best), "all": [_row(one) for one in found], "deepspeed": rendered}))
        return
    _print_parameters(model_config, best, gpus)
    _print_table(found if everything else found[:12], len(found), capacity)
    _print_parts(best, capacity)
    print(f"\nExpected: {best.speed.tokens_per_second:,.0f} tokens/s at {best.speed.mfu:.1%} MFU ({best.speed.basis})")
    hours = seconds / 3600
    print(f"{tokens:,.0f} tokens: {steps:,.0f} steps, {hours:,.1f} hours, {hours * gpus:,.1f} GPU-hours")
    print(f"\nDeepSpeed JSON ({best.label})" + (f", written to {write}" if write else "") + ":")
    print(json.dumps(rendered, indent=2))
    if not best.fits:
        raise ValueError(
            f"nothing fits {gpu_memory} a GPU: the least is {best.memory.peak / GIGABYTE:.1f} GB ({best.label}); take "
            "more GPUs, a smaller micro_batch_size or sequence_length, optimizer_dtype=bfloat16, or freeze parts"
        )


def _settings(
    config: Path | None, overrides: list[str], preset: str, gpus: int, deepspeed_file: Path | None
) -> dict[str, Any]:
    """Fields of the training config that the user decides, and the defaults of a plan below them."""
    from phi35.training.config import read_settings
    from phi35.training.deepspeed_config import config_fields, read_deepspeed_file

    decided = {"offload": "none", **config_fields(read_deepspeed_file(deepspeed_file))} if deepspeed_file else {}
    given = read_settings(config, overrides, decided)
    defaults = {"model": preset, "dtype": "bfloat16", "sequence_length": 4096, "micro_batch_size": 1}
    values = {**defaults, **given}
    values.setdefault("global_batch_size", int(values["micro_batch_size"]) * gpus)
    return values


def _training_config(values: dict[str, Any]) -> Any:
    from phi35.training.config import TrainingConfig

    return TrainingConfig(**values)


def _capacity(text: str) -> int:
    from phi35.checkpoint.writer import parse_size
    from phi35.planning.plan import GPUS

    return GPUS.get(text.lower()) or parse_size(text)


def _print_parameters(model_config: Any, best: Any, gpus: int) -> None:
    from phi35.parameter_count import count_parameters
    from phi35.planning.parameters import nominal_states, rank_parameters

    count, config = count_parameters(model_config), best.config
    mine = rank_parameters(model_config, config)
    print(f"{config.model}: {count.total:,} parameters, {count.active:,} active, on {gpus} GPU(s)")
    print(f"on each GPU: {mine.held:,} held, {mine.trained:,} of them trained", end="")
    nominal = nominal_states(mine, gpus, config.ep_size or 1, config.zero_stage)
    print(f"; {nominal / GIGABYTE:.1f} GB of states by the usual 16 bytes a parameter\n")


def _print_table(found: list[Any], total: int, capacity: int) -> None:
    from phi35.cli.table import render

    rows = [{name: str(value) for name, value in _row(one).items()} for one in found]
    print(render(rows))
    if total > len(found):
        print(f"({total - len(found)} more: --all)")
    print(f"A setting fits if its peak, 6 % of it and 1.5 GB stay within {capacity / GIGABYTE:.1f} GB.\n")


def _print_parts(best: Any, capacity: int) -> None:
    from phi35.cli.table import render

    memory = best.memory
    print(f"Memory of one GPU with {best.label}, in GB:")
    parts = {**memory.states, **memory.gathered}
    print(render([{"part": name, "GB": f"{value / GIGABYTE:.2f}"} for name, value in parts.items() if value]))
    print()
    moments = sorted(memory.moments.items(), key=lambda pair: -pair[1])
    print(render([{"alive at": name, "GB": f"{value / GIGABYTE:.2f}"} for name, value in moments]))
    if memory.host:
        print(f"and {memory.host / GIGABYTE:.1f} GB of host memory for each GPU")


def _row(one: Any) -> dict[str, Any]:
    config = one.config
    return {
        "fits": "yes" if one.fits else "no",
        "ZeRO": config.zero_stage,
        "ep": config.ep_size,
        "offload": config.offload,
        "checkpointing": {False: "none", True: "layers"}.get(config.gradient_checkpointing, "selective"),
        "peak GB": round(one.memory.peak / GIGABYTE, 1),
        "host GB": round(one.memory.host / GIGABYTE, 1),
        "at": one.memory.peak_moment,
        "tokens/s": round(one.speed.tokens_per_second),
    }
