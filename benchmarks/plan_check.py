"""The planner's memory beside that of real training steps, through the training engine with random data.

    python benchmarks/plan_check.py                  # on one H100 or H200: six settings in well under 100 seconds
    python benchmarks/plan_check.py --cases mini-8 moe-2
    python benchmarks/plan_check.py --tiny           # tiny models (the default without a GPU)

Each case makes three steps in this process; measured is ``torch.cuda.max_memory_allocated`` over the second and third,
less what earlier cases left. "all" is the peak over building the model and the first step too. Prints a table and,
last, one JSON line; the status is 1 where a plan misses by more than ``--tolerance``.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from train_step_cases import Case, draw_batch, small  # noqa: E402

from phi35.planning.live_memory import LiveMemory  # noqa: E402
from phi35.planning.memory import MemoryPlan, plan_memory  # noqa: E402
from phi35.training import environment  # noqa: E402
from phi35.training.build import build_model, read_model_config  # noqa: E402
from phi35.training.config import TrainingConfig  # noqa: E402
from phi35.training.engine import Engine  # noqa: E402

GIGABYTE = 1e9
LEFT_BYTES = 2_000_000_000
"""Where earlier cases left more than this on the device, the next one gets a process of its own."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A setting to train with.

    Attributes:
        case: model and batch, as the training benchmark describes them.
        settings: further fields of ``TrainingConfig``.
    """

    case: Case
    settings: dict[str, Any] = field(default_factory=dict)


def _mini(rows: int, **settings: Any) -> Check:
    return Check(case=Case(group="plan", changes={"num_hidden_layers": 8}, rows=rows), settings=settings)


CHECKS: dict[str, Check] = {
    "mini-8": _mini(4),
    "mini-8 ZeRO-1 checkpointing": _mini(1, zero_stage=1, gradient_checkpointing=True),
    "mini-8 ZeRO-2 selective": _mini(4, zero_stage=2, gradient_checkpointing="selective"),
    "moe-2": Check(case=Case(group="plan", preset="phi-3.5-moe", changes={"num_hidden_layers": 2}, rows=4)),
    "moe-3 bf16 states": Check(
        case=Case(group="plan", preset="phi-3.5-moe", changes={"num_hidden_layers": 3}, rows=2),
        settings={"optimizer_dtype": "bfloat16"},
    ),
    "vision-8": Check(
        case=Case(
            group="plan", preset="phi-3.5-vision", changes={"num_hidden_layers": 8}, rows=2, length=2048, images=2
        ),
        settings={"gradient_checkpointing": "selective"},
    ),
}


def main() -> int:
    """Runs the cases and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--tiny", action="store_true", help="tiny models (the default without a GPU)")
    parser.add_argument("--tolerance", type=float, default=0.1, help="largest difference, as a part of the measured")
    parser.add_argument("--time-limit", type=float, default=100.0, help="seconds after which no case begins")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    arguments = parser.parse_args()
    started, place = time.monotonic(), environment.start()
    rows = []
    for name in arguments.cases:
        if time.monotonic() - started > arguments.time_limit:
            rows.append({"case": name, "error": f"not begun: {arguments.time_limit:.0f} s were over"})
            continue
        if place.device.type == "cuda" and torch.cuda.memory_allocated() > LEFT_BYTES:
            rows.append(apart(name, arguments))
        else:
            rows.append(run(name, CHECKS[name], place, arguments.tiny or place.device.type != "cuda"))
        print(_line(rows[-1]), flush=True)
    environment.stop()
    record = {"environment": _environment(arguments.commit), "tolerance": arguments.tolerance, "cases": rows}
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return int(any("error" in row or abs(row["ratio"] - 1) > arguments.tolerance for row in rows))


def apart(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--cases", name, "--tolerance", "1e9"] + ["--tiny"] * arguments.tiny
    # Not this process's rank and port, which are taken.
    own = {name: value for name, value in os.environ.items() if name not in environment.LAUNCHER_VARIABLES}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=own)
    if done.returncode:
        return {"case": name, "error": f"exit {done.returncode}: " + " | ".join(done.stderr.strip().splitlines()[-5:])}
    return json.loads(done.stdout.splitlines()[-1])["cases"][0]


def run(name: str, check: Check, place: Any, tiny: bool) -> dict[str, Any]:
    """Trains one case for three steps and compares the peak with the plan."""
    case = small(check.case) if tiny else check.case
    config = TrainingConfig(
        model=case.preset,
        model_overrides=case.changes,
        dtype="bfloat16",
        init_device="cuda" if place.device.type == "cuda" else "cpu",
        sequence_length=case.length,
        global_batch_size=case.rows,
        max_steps=100,
        **check.settings,
    )
    model_config = read_model_config(config)
    config = config.resolve(
        world_size=1, num_experts=model_config.num_local_experts, router_aux_loss_coef=model_config.router_aux_loss_coef
    )
    crops = 5 * case.images * case.rows
    plan = plan_memory(model_config, config, 1, crops=crops, device_type=place.device.type)
    meter = CudaMeter(place.device) if place.device.type == "cuda" else CpuMeter()
    began = time.monotonic()
    with meter:
        engine = Engine(build_model(config, model_config, None, place.device), config, place)
        for step in range(3):
            if step == 1:
                meter.restart()
            batch, num_tokens = draw_batch(case, place.device, torch.Generator().manual_seed(step))
            engine.set_learning_rate(step)
            engine.step([batch], [num_tokens], num_tokens)
            del batch
        meter.finish()
    engine.deepspeed.destroy()
    del engine
    gc.collect()
    return {"case": name, **_compared(plan, meter), "seconds": round(time.monotonic() - began, 1)}


class CudaMeter:
    """The allocator's peak, less what was there before."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        self.device, self.before = device, torch.cuda.memory_allocated(device)
        self.first = self.steps = 0

    def __enter__(self) -> "CudaMeter":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def restart(self) -> None:
        """Ends the building and the first step."""
        torch.cuda.synchronize(self.device)
        self.first = torch.cuda.max_memory_allocated(self.device) - self.before
        torch.cuda.reset_peak_memory_stats(self.device)

    def finish(self) -> None:
        """Reads the steps' peak."""
        torch.cuda.synchronize(self.device)
        self.steps = torch.cuda.max_memory_allocated(self.device) - self.before


class CpuMeter(LiveMemory):
    """The same by live tensors, where there is no GPU."""

    first = steps = 0

    def restart(self) -> None:
        """Ends the building and the first step."""
        self.first = self.peak
        super().restart()

    def finish(self) -> None:
        """Reads the steps' peak."""
        self.steps = self.peak


def _compared(plan: MemoryPlan, meter: Any) -> dict[str, Any]:
    return {
        "planned_gb": plan.peak / GIGABYTE,
        "measured_gb": meter.steps / GIGABYTE,
        "ratio": plan.peak / max(1, meter.steps),
        "all_gb": max(meter.first, meter.steps) / GIGABYTE,
        "at": plan.peak_moment,
        "moments_gb": {moment: round(size / GIGABYTE, 3) for moment, size in plan.moments.items()},
    }


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['case']:<30} {row['error']}"
    numbers = f"planned {row['planned_gb']:8.3f} GB  measured {row['measured_gb']:8.3f}  ratio {row['ratio']:.3f}"
    return f"{row['case']:<30} {numbers}  (all {row['all_gb']:.3f}; {row['at']}; {row['seconds']} s)"


def _environment(commit: str | None) -> dict[str, Any]:
    if commit is None:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
        commit = asked.stdout.strip() or "unknown"
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "torch": str(torch.__version__),
        "commit": commit,
        "command": " ".join(["python", "benchmarks/plan_check.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
