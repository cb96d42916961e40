"""Phi-3.5-MoE, 41.9 B parameters (84 GB in bfloat16), on one device of 80 GB: few bits, or experts in host memory.

    python benchmarks/moe_on_80gb.py                          # all parts, one after the other
    python benchmarks/moe_on_80gb.py --parts int4 bf16        # some: int4, int8, bf16 (offload), check, load
    python benchmarks/moe_on_80gb.py --budgets 64GB 20GB      # device memory for bfloat16 experts
    python benchmarks/moe_on_80gb.py --small                  # a tiny model: shows that it runs, on a CPU too

Random weights, one row, a prompt of 512 tokens and 64 new ones, sampled at temperature 1, so that experts change from
token to token; the second run counts. Part "check" compares four layers in place and offloaded, bit by bit, and says
what differs first; part "load" writes four layers to disk in bfloat16 and loads them in four bits. Each part runs in a
process of its own, so that the peaks of host memory are its own, and tells every few seconds how far it is. Prints a
table and, last, one JSON line.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import moe_layer  # noqa: E402
import offload_check  # noqa: E402

import phi35  # noqa: E402
from phi35.generation import step_pool  # noqa: E402
from phi35.generation.decoding import Decoding  # noqa: E402

PARTS = ("int4", "int8", "bf16", "check", "load")
STARTED = time.perf_counter()
PRESET, SMALL = "phi-3.5-moe", "tiny-phi-3.5-moe"


def main() -> None:
    """Parse, measure each part in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--budgets", nargs="+", default=["64GB", "20GB"], help="expert_memory of part bf16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.small:
        raise SystemExit("no CUDA device is visible; --small runs a tiny model on the CPU")
    if arguments.inside:
        print(json.dumps(run_part(arguments.parts[0], arguments, device)))
        return
    record: dict[str, Any] = {"environment": moe_layer.environment(device, arguments.commit), "rows": []}
    record["environment"]["command"] = " ".join(["python", "benchmarks/moe_on_80gb.py", *sys.argv[1:]])
    for part in arguments.parts:
        for budget in arguments.budgets if part == "bf16" else [""]:
            record["rows"] += apart(part, budget, arguments)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def apart(part: str, budget: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One part in a process of its own; a failure is kept and the others go on."""
    command = [sys.executable, __file__, "--inside", "--parts", part, "--prompt", str(arguments.prompt)]
    command += ["--new-tokens", str(arguments.new_tokens)] + ["--small"] * arguments.small
    command += ["--budgets", budget] * bool(budget)
    started = time.perf_counter()
    told = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:  # what it prints at its end fits a pipe
            print(line, end="", file=sys.stderr, flush=True)
            told.append(line)
        printed = process.stdout.read()
    if process.returncode:
        error = f"exit {process.returncode}: {''.join(told)[-2000:]}"
        print(f"{part} {budget}: FAILED, {error}", flush=True)
        return [{"part": part, "budget": budget, "error": error}]
    rows: list[dict[str, Any]] = json.loads(printed.splitlines()[-1])
    for row in rows:
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print("  ".join(shown), flush=True)
    print(f"({part} {budget}: {time.perf_counter() - started:.0f} s)", flush=True)
    return rows


def run_part(part: str, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One part, in this process."""
    if part == "check":
        return [check(arguments, device)]
    if part == "load":
        return [load(arguments, device)]
    options: dict[str, Any] = {}
    if part == "bf16":
        options["expert_memory"] = "150KB" if arguments.small else arguments.budgets[0]
    else:
        options["quantization"] = few_bits(part, arguments.small)
    started = time.perf_counter()
    with progress("building", device):
        model = phi35.create(SMALL if arguments.small else PRESET, device=device, dtype="bfloat16", seed=0, **options)
        wait(device)
    built = {"part": part, "budget": options.get("expert_memory"), "build_s": time.perf_counter() - started}
    if part != "bf16":
        return [built | generate(model, arguments, device) | memory(device)]
    rows = []
    for ahead in (True, False):
        for layer in model.model.layers:
            layer.mlp.experts.guess_ahead = ahead
        say(f"guess_ahead={ahead}: generating", device)
        rows.append(built | {"guess_ahead": ahead} | generate(model, arguments, device) | memory(device))
        say(
            ", ".join(f"{name} {rows[-1][name]:.3g}" for name in ("tokens_per_s", "gb_per_token", "copy_gb_per_s")),
            device,
        )
    return rows


def few_bits(name: str, small: bool) -> Any:
    """The quantization of a part; a tiny model's rows are short."""
    from phi35.quantization.config import QuantizationConfig, WeightFormat

    return QuantizationConfig(linear=WeightFormat(bits=4 if name == "int4" else 8, group_size=32)) if small else name


def generate(model: Any, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Tokens per second of the decoding loop, and what it copied."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(30000, model.config.vocab_size), (1, arguments.prompt), generator=generator)
    experts = getattr(model.model.layers[0].mlp, "experts", None)
    counts = getattr(experts, "statistics", None)
    found: dict[str, Any] = {}
    for turn in range(2):
        options = {"max_new_tokens": arguments.new_tokens, "temperature": 1.0, "seed": turn, "stop_token_ids": ()}
        before = vars(counts).copy() if counts is not None else {}
        wait(device)
        started = time.perf_counter()
        decoding = Decoding(model, ids.to(device), **options)
        decoding.step()
        first = time.perf_counter()
        decoding.step()  # before it the step is captured, which is warm-up
        second = time.perf_counter()
        middle = vars(counts).copy() if counts is not None else {}
        while not decoding.done:
            decoding.step()
        end = time.perf_counter()
        found = {
            "steps": type(decoding._steps).__name__,
            "first_token_s": first - started,
            "tokens_per_s": (arguments.new_tokens - 2) / (end - second),
        }
        if counts is not None:
            after = vars(counts)
            used, copied, guessed = (after[name] - middle[name] for name in ("used", "copied", "guessed"))
            num_bytes = after["num_bytes"] - middle["num_bytes"]
            found |= {
                "copied_when_needed": copied / used,
                "copied_ahead": guessed / used,
                "gb_per_token": num_bytes / 1e9 / (arguments.new_tokens - 2),
                "copy_gb_per_s": num_bytes / 1e9 / (end - second),
                "prompt_copy_gb": (middle["num_bytes"] - before["num_bytes"]) / 1e9,
            }
    step_pool.drop(model)
    return found


def check(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Four layers in place and with 6 places of 16 each (see ``offload_check``)."""
    preset, changes = (SMALL, {}) if arguments.small else (PRESET, {"num_hidden_layers": 4})
    plain = phi35.create(preset, device=device, dtype="bfloat16", seed=0, **changes)
    one = sum(tensor[0].nbytes for tensor in plain.model.layers[0].mlp.experts.parameters())
    places = 3 if arguments.small else 6
    budget = places * one * plain.config.num_hidden_layers
    say("in place; now offloaded", device)
    model = phi35.create(preset, device=device, dtype="bfloat16", seed=0, expert_memory=budget, **changes)
    say("created", device)
    row = {"part": "check", "places": places}
    num_steps = min(15, arguments.prompt - 1)
    row |= offload_check.check(
        plain, model, arguments.prompt, num_steps, arguments.new_tokens, lambda text: say(text, device)
    )
    return row | memory(device)


def load(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Four layers in bfloat16 from disk into four bits on the device."""
    preset, changes = (SMALL, {}) if arguments.small else (PRESET, {"num_hidden_layers": 4})
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, as its peaks are not loading's.
        code = (
            "import json, sys, phi35; model = phi35.create(sys.argv[1], device=sys.argv[2], dtype='bfloat16', seed=0, "
            "**json.loads(sys.argv[3])); phi35.save(model, None, sys.argv[4])"
        )
        subprocess.run([sys.executable, "-c", code, preset, device.type, json.dumps(changes), folder], check=True)
        stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        before = memory(device)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no tokenizer
            model, _ = phi35.load(folder, device, "bfloat16", quantization=few_bits("int4", arguments.small))
        wait(device)
        seconds = time.perf_counter() - started
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    row = {"part": "load", "stored_gb": stored / 1e9, "held_gb": held / 1e9, "load_s": seconds}
    row["host_before_gib"] = before["host_gib"]
    return row | generate(model, arguments, device) | memory(device)


def memory(device: torch.device) -> dict[str, Any]:
    """Peaks of this process: allocated on the device, and resident on the host (locked memory and mapped files too)."""
    found: dict[str, Any] = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        found["device_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


@contextmanager
def progress(what: str, device: torch.device) -> Iterator[None]:
    """Say every ten seconds how long it has taken and what the host holds."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(10):
            say(what, device)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        say(f"{what}: done", device)


def say(what: str, device: torch.device) -> None:
    """A line to standard error: seconds since the start, memory in use."""
    statm = Path("/proc/self/statm")
    used = f"{int(statm.read_text().split()[1]) * resource.getpagesize() / 2**30:.1f}" if statm.exists() else "?"
    there = f", device {torch.cuda.memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(f"  {time.perf_counter() - STARTED:6.1f} s, host {used} GiB{there}: {what}", file=sys.stderr, flush=True)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
