"""How long a training waits for its checkpoints, at once and asynchronously, and what the writing costs its steps.

    python benchmarks/checkpoint_saving.py                              # on a GPU: 8 layers of phi-3.5-mini, 1.1 B
    python benchmarks/checkpoint_saving.py --preset tiny-phi-3.5-mini --layers 2 --tokens 64      # anywhere

Steps on fresh random tokens; the folder is emptied after each save, so that the disk needs room for two checkpoints.
The first asynchronous save allocates the host buffers, later ones find them. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from phi35 import presets
from phi35.cli.table import render
from phi35.loading import create
from phi35.training import environment
from phi35.training.checkpoint_files import CheckpointReader
from phi35.training.config import TrainingConfig
from phi35.training.description import commit, versions
from phi35.training.engine import Engine
from phi35.training.saving import CheckpointSaver


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--preset", default="phi-3.5-mini" if on_gpu else "tiny-phi-3.5-mini")
    parser.add_argument("--layers", type=int, default=8 if on_gpu else 2)
    parser.add_argument("--tokens", type=int, default=4096 if on_gpu else 64)
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(arguments, Path(folder))
    rows = [
        {
            "save": name,
            "training waits, ms": round(row["waited"] * 1e3),
            "on disk after, ms": round(row["done_after"] * 1e3),
            "steps meanwhile, ms": f"{row['step_while_writing'] * 1e3:,.1f}",
        }
        for name, row in result["saves"].items()
    ]
    print(f"{result['gigabytes']:.2f} GB a checkpoint; a step takes {result['step'] * 1e3:,.1f} ms")
    print(render(rows))
    environment.stop()
    text = json.dumps(result)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    print(text)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Saves at once, asynchronously for the first time, and again."""
    engine = build(arguments)
    step_seconds = statistics.median(run_steps(engine, arguments.tokens, 8)[3:])
    saves, size = {}, 0
    for name, asynchronous in (("at once", False), ("asynchronous, first", True), ("asynchronous", True)):
        if name != "asynchronous":
            saver = CheckpointSaver(folder / "checkpoints", engine, asynchronous=asynchronous)
        began = time.perf_counter()
        saver.save(1, {})
        waited, meanwhile = time.perf_counter() - began, []
        while saver.in_flight and not saver.is_written:
            meanwhile += run_steps(engine, arguments.tokens, 1)
        saver.finish()
        done = time.perf_counter() - began
        assert saver.last is not None
        size = sum(entry["bytes"] for entry in CheckpointReader(saver.last).manifest["files"].values())
        shutil.rmtree(saver.last)
        slowed = statistics.median(meanwhile) if meanwhile else 0.0
        saves[name] = {"waited": waited, "done_after": done, "step_while_writing": slowed}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "hardware": f"{device}, {os.cpu_count()} cores",
        "versions": versions(),
        "commit": arguments.commit or commit(),
        "command": sys.argv,
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        "gigabytes": size / 1e9,
        "step": step_seconds,
        "saves": saves,
    }


def build(arguments: argparse.Namespace) -> Engine:
    """An engine on one process, bfloat16 with float32 masters where there is a GPU."""
    place = environment.start()
    dtype = "bfloat16" if place.device.type == "cuda" else "float32"
    settings = {"global_batch_size": 1, "max_steps": 1000, "warmup_steps": 0, "zero_stage": 0, "dtype": dtype}
    config = TrainingConfig(model=arguments.preset, **settings).resolve(world_size=1)
    model_config = presets.get(arguments.preset).replace(num_hidden_layers=arguments.layers)
    return Engine(create(model_config, device=place.device, dtype="float32", seed=0), config, place)


def run_steps(engine: Engine, num_tokens: int, count: int) -> list[float]:
    """Seconds of each of some steps, until the device is done."""
    device, seconds = engine.environment.device, []
    vocabulary = engine.model.config.vocab_size  # type: ignore[union-attr]
    for _ in range(count):
        began = time.perf_counter()
        ids = torch.randint(3, vocabulary, (1, num_tokens), device=device)
        engine.step([{"input_ids": ids, "labels": ids}], [num_tokens - 1], num_tokens - 1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
