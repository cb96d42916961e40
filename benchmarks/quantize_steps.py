"""Where a captured step of phi-3.5-mini in few bits spends its time, and which shapes of programs are best.

    python benchmarks/quantize_steps.py                    # int4, needs a CUDA GPU; about a minute
    python benchmarks/quantize_steps.py --format int8 --no-sweep

Whole captured steps of one row with 384 tokens in the cache, as ``quantize.py`` times them, under each candidate of
``FewBitShapes``: one field changed at a time, then the best of each field together. The kernels are compiled first in
processes side by side. The profile lists each kernel's part of a replay: ``alone`` is how long it runs, most of which
may be waiting for the one before (kernels are launched early); ``adds`` is the time from that one's end to its own, the
sum of which is the step. Prints tables and, last, one JSON line.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import moe_layer  # noqa: E402
from decode_steps import step_times  # noqa: E402
from quantize import LENGTH, PRESETS, quantization  # noqa: E402

import phi35  # noqa: E402
from phi35 import presets  # noqa: E402
from phi35.generation.fast_step import DecodeStep  # noqa: E402
from phi35.quantization.kernels.shapes import FewBitShapes, WordConfig  # noqa: E402

FIELDS: dict[str, list[Any]] = {
    "qkv": [(8, 4, 4), (8, 2, 2), (32, 4, 4), (32, 8, 8), (8, 4, 2), (16, 4, 2), (16, 2, 1)],
    "gate_up": [(32, 8, 8), (16, 8, 8), (16, 8, 4), (16, 4, 2), (32, 4, 4), (16, 2, 1)],
    "long_add": [(8, 8, 4), (8, 4, 2), (16, 8, 2), (16, 8, 4), (8, 4, 1), (8, 8, 1)],
    "short_add": [(8, 4, 1), (16, 2, 1), (16, 4, 1)],
}
"""Candidates of each field: rows, warps and groups of a program."""


def candidates() -> dict[str, FewBitShapes]:
    """Name -> shapes: each program prepares its vector; the defaults; one field changed at a time."""
    found = {"unprepared": FewBitShapes(prepares=False), "default": FewBitShapes()}
    for field, values in FIELDS.items():
        for value in values:
            change: dict[str, Any] = {field: WordConfig(*value)}
            found[f"{field} {value}"] = replace(FewBitShapes(), **change)
    return found


def build(name: str, num_layers: int | None = None) -> Any:
    """The model with random codes."""
    config = presets.get(PRESETS["mini"]).replace(quantization=quantization(name))
    if num_layers is not None:
        config = config.replace(num_hidden_layers=num_layers)
    return phi35.create(config, device="cuda", dtype="bfloat16", seed=0)


def step_of(model: Any, shapes: FewBitShapes, pdl: bool = True) -> DecodeStep:
    """A step over a cache of its own, not yet captured."""
    step = DecodeStep(model, model.new_cache(1, 1024), pdl=pdl)
    step.operations.shapes = shapes  # type: ignore[attr-defined]
    step.state.tokens.fill_(7)
    return step


def compile_shapes(name: str, given: list[tuple[str, FewBitShapes]]) -> list[str]:
    """Run two layers with each of the shapes; the compiled kernels stay in Triton's cache."""
    model, problems = build(name, num_layers=2), []
    for label, shapes in given:
        try:
            step_of(model, shapes).run()
            torch.cuda.synchronize()
        except Exception as error:  # the parent meets it again
            problems.append(f"{label}: {error}")
    return problems


def compile_all(name: str, shapes: dict[str, FewBitShapes], processes: int) -> None:
    """Compile for all shapes, side by side; the defaults' kernels first, in one process, as all others need them."""
    context = multiprocessing.get_context("spawn")
    items = list(shapes.items())
    shares = [items[start::processes] for start in range(processes)]
    with context.Pool(processes) as pool:
        jobs = [pool.apply_async(compile_shapes, (name, share)) for share in shares if share]
        for job in jobs:
            for problem in job.get():
                print(problem, flush=True)


@torch.no_grad()
def time_step(model: Any, shapes: FewBitShapes, pdl: bool = True) -> tuple[float, DecodeStep]:
    """Median milliseconds of a replay."""
    step = step_of(model, shapes, pdl)
    step.state.lengths.fill_(LENGTH - 64)
    step.capture()
    return statistics.median(step_times(step, 96)[16:]), step


@torch.no_grad()
def error_of(model: Any, shapes: FewBitShapes) -> float:
    """Relative error of the step's logits against the plain path."""
    ids = torch.randint(5, 30000, (1, 64), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    caches = [model.new_cache(1, 1024) for _ in range(2)]
    for cache in caches:
        model(ids, past_key_values=cache, logits_to_keep=1)
    step = DecodeStep(model, caches[0])
    step.operations.shapes = shapes  # type: ignore[attr-defined]
    step.state.tokens.fill_(7)
    step.run()
    expected = model(torch.full((1, 1), 7, device="cuda"), past_key_values=caches[1]).logits[:, 0].float()
    return float((step.logits - expected).norm() / expected.norm())


def profile(step: DecodeStep, replays: int = 8) -> list[dict[str, Any]]:
    """For each kernel of a replay by name: calls a step, microseconds alone, and added to the step's end."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(replays):
            step.run()
        torch.cuda.synchronize()
    events = [event for event in found.events() or [] if str(event.device_type).endswith("CUDA")]
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in events)
    return joined(spans, replays)


def joined(spans: Iterable[tuple[float, float, str]], replays: int) -> list[dict[str, Any]]:
    """Sums by name over (start, end, name) in order, the first kernel of all left out of what is added."""
    totals: dict[str, list[float]] = {}
    last = None
    for start, end, name in spans:
        row = totals.setdefault(name[:60], [0, 0.0, 0.0])
        row[0] += 1
        row[1] += end - start
        row[2] += 0.0 if last is None else max(0.0, end - last)
        last = end if last is None else max(last, end)
    return [
        {"kernel": name, "calls": calls / replays, "alone_us": alone / calls, "adds_us": adds / calls}
        for name, (calls, alone, adds) in totals.items()
    ]


def print_profile(label: str, rows: list[dict[str, Any]]) -> None:
    """One line a kernel, the largest part first."""
    print(f"profile of {label}: calls a step, us alone, us added each, us added in all", flush=True)
    for row in sorted(rows, key=lambda row: -row["calls"] * row["adds_us"]):
        whole = row["calls"] * row["adds_us"]
        print(f"  {row['kernel']:48s}{row['calls']:7.1f}{row['alone_us']:9.2f}{row['adds_us']:9.2f}{whole:9.1f}")


def best_together(rows: dict[str, float]) -> FewBitShapes:
    """The defaults with each field's fastest candidate, where that is faster than the default by 0.5 %."""
    chosen, base = FewBitShapes(), rows["default"]
    for name, shapes in candidates().items():
        field = name.split()[0]
        if field not in FIELDS or name not in rows:
            continue
        rivals = {other: spent for other, spent in rows.items() if other.split()[0] == field}
        if rows[name] == min(rivals.values()) and rows[name] < 0.995 * base:
            chosen = replace(chosen, **{field: getattr(shapes, field)})
    return chosen


def sweep(model: Any, shapes: dict[str, FewBitShapes], record: dict[str, Any]) -> FewBitShapes:
    """Time all shapes; the best together."""
    times: dict[str, float] = {}
    for name, one in shapes.items():
        try:
            times[name], _ = time_step(model, one)
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)
            continue
        print(f"{name:28s}{times[name]:8.4f} ms{1e3 / times[name]:9.1f} tokens/s", flush=True)
    best = best_together(times)
    record["shapes"] = times
    return best


def main() -> None:
    """Compile, time, profile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int4", help="int4 or int8")
    parser.add_argument("--no-sweep", action="store_true", help="the defaults alone")
    parser.add_argument("--processes", type=int, default=14, help="that compile side by side")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible")
    device = torch.device("cuda")
    record: dict[str, Any] = {"environment": moe_layer.environment(device, arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/quantize_steps.py", *sys.argv[1:]])
    shapes = candidates()
    if arguments.no_sweep:
        shapes = {name: shapes[name] for name in ("unprepared", "default")}
    start = time.perf_counter()
    compile_all(arguments.format, shapes, min(arguments.processes, len(shapes)))
    record["compile_s"] = time.perf_counter() - start
    print(f"compiled in {record['compile_s']:.0f} s", flush=True)
    model = build(arguments.format)
    best = sweep(model, shapes, record)
    for label, one in (("unprepared", FewBitShapes(prepares=False)), ("default", FewBitShapes()), ("best", best)):
        spent, step = time_step(model, one)
        row: dict[str, Any] = {"ms": spent, "error": error_of(model, one), "shapes": str(one), "profile": profile(step)}
        record[label] = row
        print(f"{label}: {spent:.4f} ms, {1e3 / spent:.1f} tokens/s, error {row['error']:.1e}; {one}", flush=True)
        print_profile(label, row["profile"])
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
