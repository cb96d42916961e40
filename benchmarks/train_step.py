"""Training steps of the family's models, beside transformers with and without Liger kernels, in one run.

    python benchmarks/train_step.py                        # what the project claims, on one H200: about 6 minutes
    python benchmarks/train_step.py --all                  # and what each part gives: about 14 minutes
    python benchmarks/train_step.py --cases mini vision --profile
    python benchmarks/train_step.py --list

Each case is a process of its own with a time limit; one that fails is named and the others go on. A step is forward,
backward, clipping by the global norm and the update, on fresh random tokens; medians after warm-up, by events on the
device. MFU divides the operations that phi35/training/flops.py counts by 989 TFLOP/s: never recomputation, and no
looked-up embeddings; "6N" has these too, as rates published elsewhere often do.
Prints a table and, last, one JSON line.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

PEAK = 989e12
MARK = "RESULT "


def main() -> None:
    """Parse, run each case, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="by name (default: those that the project claims)")
    parser.add_argument("--all", action="store_true", help="also what each part gives")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a case")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print the kernels that take most of a step")
    parser.add_argument("--trace", type=Path, help="with --profile: write a Chrome trace of two steps into this folder")
    parser.add_argument("--case-limit", type=float, default=120.0, help="seconds for one case")
    parser.add_argument("--time-limit", type=float, default=570.0, help="seconds after which no case begins")
    parser.add_argument("--tiny", action="store_true", help="tiny models (the default without a GPU)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--run-case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from train_step_cases import CASES, MAIN

    if arguments.list:
        print("\n".join(f"{name:<30} {case.group}" for name, case in CASES.items()))
        return
    if arguments.run_case:
        child(arguments.run_case, arguments)
        return
    names = arguments.cases or (list(CASES) if arguments.all else MAIN)
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise SystemExit(f"unknown cases {unknown}; --list names them")
    results = run_all(names, arguments)
    record = {"environment": environment(arguments.commit), "peak_flops": PEAK, "cases": results}
    print(table(results), flush=True)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def run_all(names: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the cases one after the other; the next one's process imports while one works."""
    started, results = time.monotonic(), []
    waiting: subprocess.Popen[str] | None = None
    for index, name in enumerate(names):
        if time.monotonic() - started > arguments.time_limit:
            results.append({"case": name, "error": f"not begun: {arguments.time_limit:.0f} s were over"})
            continue
        process = waiting or start(name, arguments)
        waiting = start(names[index + 1], arguments) if index + 1 < len(names) else None
        results.append(finish(process, name, arguments.case_limit))
        print(summary(results[-1]), flush=True)
    if waiting is not None:
        waiting.kill()
    return results


def start(name: str, arguments: argparse.Namespace) -> "subprocess.Popen[str]":
    """A child that imports and waits for a line before it touches the device."""
    command = [sys.executable, __file__, "--run-case", name, "--steps", str(arguments.steps)]
    command += ["--warmup", str(arguments.warmup)]
    command += ["--profile"] * arguments.profile + ["--tiny"] * arguments.tiny
    command += ["--trace", str(arguments.trace)] if arguments.trace else []
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def finish(process: "subprocess.Popen[str]", name: str, limit: float) -> dict[str, Any]:
    """Lets a child go and reads its result."""
    killer = threading.Timer(limit, process.kill)
    killer.start()
    began = time.monotonic()
    output, errors = process.communicate("go\n")
    in_time = killer.is_alive()
    killer.cancel()
    lines = output.splitlines()
    found = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    other = [line for line in lines if not line.startswith(MARK)]
    if other:
        print("\n".join(other), flush=True)
    if found:
        return {**found[0], "seconds": time.monotonic() - began}
    reason = f"exit {process.returncode}" if in_time else f"over {limit:.0f} s"
    tail = [line for line in errors.strip().splitlines() if line.strip()][-12:]
    return {"case": name, "error": f"{reason}: " + " | ".join(tail)}


def child(name: str, arguments: argparse.Namespace) -> None:
    """One case: built, warmed up, timed."""
    import torch
    from train_step_cases import CASES, small

    import phi35.training.engine  # noqa: F401

    if CASES[name].side == "transformers":
        import transformers  # noqa: F401
    else:
        import deepspeed  # noqa: F401
    sys.stdin.readline()
    gpu = torch.cuda.is_available()
    case = CASES[name] if gpu and not arguments.tiny else small(CASES[name])
    result: dict[str, Any] = {"case": name}
    try:
        device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        if name.startswith("check"):
            forms = ("compiled",) if CASES[name].settings else ("plain", "fused", "selective")
            result["errors"] = check(device, forms)
        else:
            result |= measure(case, arguments, device)
    except Exception as error:
        traceback.print_exc(limit=6)
        result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    print(MARK + json.dumps(result), flush=True)
    os._exit(0)  # process groups need no farewell here


def check(device: Any, forms: tuple[str, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """Errors of loss and gradients against the plain model in float32: in bfloat16 and each form."""
    import torch
    from train_step_cases import CHECKED

    from phi35.loading import create
    from phi35.training.acceleration import compile_layers, fast_attention, fuse

    tiny = device.type != "cuda"
    report: dict[str, dict[str, dict[str, float]]] = {}
    for preset, changes in CHECKED.items():
        ids = torch.randint(3, 1000, (2, 64 if tiny else 1024), generator=torch.Generator().manual_seed(1)).to(device)
        wanted: dict[str, Any] = {}
        report[preset] = {}
        for form in ("float32", *forms):
            model = create(f"tiny-{preset}" if tiny else preset, device=device, dtype="bfloat16", seed=0, **changes)
            model.train().to(torch.float32 if form == "float32" else torch.bfloat16)
            fuse(model, form in ("fused", "selective"))
            model.gradient_checkpointing = form == "selective" and form
            if form == "compiled":
                compile_layers(model)
            torch.manual_seed(0)
            with fast_attention(device) if form != "float32" else contextlib.nullcontext():
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
            gradients = {name: value.grad.float() for name, value in model.named_parameters()}
            if form == "float32":
                wanted = {"loss": loss.item(), **gradients}
                continue
            errors = {
                name: float((value - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-30))
                for name, value in gradients.items()
            }
            worst = max(errors, key=lambda name: errors[name])
            mean = statistics.mean(errors.values())
            report[preset][form] = {"loss": abs(loss.item() - wanted["loss"]), "mean": mean, worst: errors[worst]}
            print(f"  {preset} {form}: " + ", ".join(f"{key} {one:.2e}" for key, one in report[preset][form].items()))
    return report


def measure(case: Any, arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Times a case's steps."""
    import torch
    from train_step_cases import draw_batch, flops_per_step

    gpu = device.type == "cuda"
    began = time.perf_counter()
    marks = Marks(gpu)
    step, parameters = (build_ours if case.side == "ours" else build_theirs)(case, device, marks)
    built = time.perf_counter() - began
    generator = torch.Generator().manual_seed(1)
    losses, timed = [], []
    for index in range(arguments.warmup + arguments.steps):
        batches = [draw_batch(case, device, generator) for _ in range(case.micro_batches)]
        if index == arguments.warmup and gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        marks.begin()
        losses.append(step(batches))
        marks.add("end")
        if index >= arguments.warmup:
            timed.append(marks.moments)
    times = [marks.spans(moments) for moments in timed]  # read at the end, so that no step waits for the device
    numbers = {key: statistics.median(one[key] for one in times) for key in times[0]}
    flops = flops_per_step(case)
    seconds = numbers["total"] / 1000
    values = torch.stack(losses).tolist()
    result = {
        "ms": {key: round(value, 2) for key, value in numbers.items()},
        "spread_ms": round(max(one["total"] for one in times) - min(one["total"] for one in times), 2),
        "tokens_per_second": round(case.rows * case.length * case.micro_batches / seconds),
        "tflops": flops["needed"] / seconds / 1e12,
        "mfu": flops["needed"] / seconds / PEAK,
        "mfu_with_embeddings": flops["with embeddings"] / seconds / PEAK,
        "parameters": parameters,
        "losses": [round(value, 4) for value in values],
        "build_seconds": round(built, 1),
        "shape": f"{case.micro_batches} x {case.rows} x {case.length}",
    }
    if gpu:
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    if arguments.profile:
        trace = arguments.trace and arguments.trace / f"{arguments.run_case.replace(' ', '_')}.json"
        profile(lambda: step([draw_batch(case, device, generator) for _ in range(case.micro_batches)]), gpu, trace)
    return result


class Marks:
    """Named moments of a step, as events on the device (or the clock of a CPU)."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.moments: list[tuple[str, Any]] = []

    def begin(self) -> None:
        """A step begins here."""
        self.moments = []
        self.add("start")

    def add(self, name: str) -> None:
        """The phase called ``name`` ends here."""
        import torch

        if self.gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.moments.append((name, event))
        else:
            self.moments.append((name, time.perf_counter()))

    def spans(self, moments: list[tuple[str, Any]] | None = None) -> dict[str, float]:
        """Milliseconds of each phase of a step (by default the last), summed over micro-batches, and "total"."""
        import torch

        moments = self.moments if moments is None else moments
        if self.gpu:
            torch.cuda.synchronize()
        spans: dict[str, float] = {}
        for (_, before), (name, after) in zip(moments, moments[1:], strict=False):
            took = before.elapsed_time(after) if self.gpu else (after - before) * 1000
            name = "other" if name == "end" else name
            spans[name] = spans.get(name, 0.0) + took
        spans["total"] = sum(spans.values())
        return spans


def build_ours(case: Any, device: Any, marks: Marks) -> tuple[Callable[[list[Any]], Any], int]:
    """A step of ``Engine``, with marks between its phases."""
    from phi35.loading import create
    from phi35.parameter_count import count_parameters
    from phi35.training import engine as engines
    from phi35.training.config import TrainingConfig
    from phi35.training.environment import start as join
    from phi35.training.parameter_groups import freeze_parameters

    place = join(device.type)
    model_config = case.model_config
    config = TrainingConfig(
        model=case.preset,
        dtype="bfloat16",
        global_batch_size=case.rows * case.micro_batches,
        micro_batch_size=case.rows,
        max_steps=10_000,
        learning_rate=1e-5,
        schedule="constant",
        warmup_steps=0,
        **case.settings,
    ).resolve(world_size=1, num_experts=model_config.num_local_experts)
    if "attention" in case.plain:
        engines.fast_attention = flash_attention  # type: ignore[assignment]
    model = create(model_config, device=place.device, dtype="bfloat16", seed=0)
    freeze_parameters(model, config)
    engine = engines.Engine(model, config, place)
    for module in model.modules():
        if hasattr(type(module), "fused") and case.plain:
            kind = "loss" if module is model.lm_head else "norms"
            module.fused = module.fused and kind not in case.plain
    forward, backward, update = engine.deepspeed.forward, engine.deepspeed.backward, engine.deepspeed.step
    engine.deepspeed.forward = marked(forward, "forward", marks)
    engine.deepspeed.backward = marked(backward, "backward", marks)
    engine.deepspeed.step = marked(update, "update", marks)
    num_steps = iter(range(10_000))

    def step(drawn: list[tuple[dict[str, Any], int]]) -> Any:
        batches, counts = [batch for batch, _ in drawn], [count for _, count in drawn]
        engine.set_learning_rate(next(num_steps))
        return engine.step(batches, counts, sum(counts)).loss

    return step, count_parameters(model).total


def flash_attention(device: Any) -> Any:
    """Within it, attention takes torch's flash attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else contextlib.nullcontext()


def marked(function: Callable[..., Any], name: str, marks: Marks) -> Callable[..., Any]:
    """A function that notes its end."""

    def run(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        marks.add(name)
        return result

    return run


def build_theirs(case: Any, device: Any, marks: Marks) -> tuple[Callable[[list[Any]], Any], int]:
    """A step of a plain loop over transformers' model."""
    import torch
    from train_step_cases import build_transformers

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    model = build_transformers(case, device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(drawn: list[tuple[dict[str, Any], int]]) -> Any:
        total = 0.0
        for batch, _ in drawn:
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss / len(drawn)
            marks.add("forward")
            loss.backward()
            marks.add("backward")
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        marks.add("update")
        return total

    return step, sum(parameter.numel() for parameter in parameters)


def profile(step: Callable[[], Any], gpu: bool, trace: Path | None = None) -> None:
    """Prints the kernels of two steps by the time they take on the device; ``trace``: a file for their order."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * gpu
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(2):
            step()
        if gpu:
            torch.cuda.synchronize()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    on_device = [event for event in profiler.key_averages() if str(event.device_type).endswith("CUDA")] if gpu else []
    rows = [(event.key, event.self_device_time_total / 2000, event.count / 2) for event in on_device]
    if not gpu:
        rows = [(event.key, event.self_cpu_time_total / 2000, event.count / 2) for event in profiler.key_averages()]
    rows.sort(key=lambda row: -row[1])
    whole = sum(row[1] for row in rows)
    print(f"  kernels of one step: {whole:.1f} ms in {sum(row[2] for row in rows):.0f} launches")
    for key, took, count in rows[:32]:
        print(f"  {took:9.2f} ms {100 * took / max(whole, 1e-9):5.1f} % {count:7.0f} x  {key[:110]}")


def environment(commit: str | None) -> dict[str, Any]:
    """What ran where."""
    import torch

    if commit is None:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
        commit = asked.stdout.strip() or "unknown"
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "versions": dict(_versions("torch", "triton", "transformers", "deepspeed", "liger_kernel", "timm")),
        "commit": commit,
        "command": " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _versions(*names: str) -> Iterator[tuple[str, str | None]]:
    for name in names:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, None


HEADER = (
    f"{'case':<30} {'batch':>12} {'tokens/s':>9} {'ms':>8} {'forward':>8} {'backward':>8} {'update':>7} {'other':>6} "
    f"{'TFLOP/s':>8} {'MFU':>6} {'6N':>6} {'GiB':>7}  loss"
)


def summary(result: dict[str, Any]) -> str:
    """One line of the table."""
    name = f"{result['case']:<30}"
    if "error" in result:
        return f"{name} FAILED {result['error']}"
    if "ms" not in result:
        return f"{name} done"
    ms = result["ms"]
    parts = " ".join(f"{ms.get(key, 0.0):{width}.1f}" for key, width in PHASES)
    losses = result["losses"]
    return (
        f"{name} {result['shape']:>12} {result['tokens_per_second']:>9} {parts} {result['tflops']:8.1f} "
        f"{100 * result['mfu']:5.1f}% {100 * result['mfu_with_embeddings']:5.1f}% {result.get('peak_gib', 0.0):7.2f}  "
        f"{losses[0]:.3f} -> {losses[-1]:.3f}"
    )


PHASES = (("total", 8), ("forward", 8), ("backward", 8), ("update", 7), ("other", 6))


def table(results: list[dict[str, Any]]) -> str:
    """All lines."""
    return "\n".join(["", HEADER, *(summary(result) for result in results)])


if __name__ == "__main__":
    main()
