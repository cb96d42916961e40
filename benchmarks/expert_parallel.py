"""Experts spread over GPUs beside one GPU that holds them all: training throughput, the exchange, and errors.

    torchrun --nproc_per_node 2 benchmarks/expert_parallel.py            # two GPUs (NCCL); tiny on a CPU (gloo)
    torchrun --nproc_per_node 2 benchmarks/expert_parallel.py --full     # 41.9 B parameters, experts frozen
    deepspeed --num_gpus 2 benchmarks/expert_parallel.py --layers 2 --zero-stage 1

Layers of Phi-3.5-MoE with SparseMixer's sampling under the training engine, bfloat16, every GPU with the same local
batch; at stage 0 with bfloat16 masters and moments, so that four layers fit one 80 GB GPU. First GPU 0 trains alone and
holds all experts; then all train together, with the exchange in 1, 2, ... chunks. "Waited" is how long products stood
still for rows (by events on the device, slower ranks included); "alone" is all messages of a step with nothing beside
them. Then loss, output and gradients, spread and on one GPU, are compared with a float32 loop over experts. Each part
is a process of its own. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

MARK = "RESULT "
LAUNCH = "torchrun --nproc_per_node 2 benchmarks/expert_parallel.py"


def main() -> None:
    """Start the parts on this rank; print on rank 0."""
    arguments = parse()
    if arguments.part:
        run_part(arguments)
        return
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise SystemExit(f"this benchmark needs a launcher and two processes or more: {LAUNCH}")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus = count_gpus()
    if world_size < 2:
        raise SystemExit(f"one process has nobody to share experts with; start two or more: {LAUNCH}")
    if gpus and gpus < world_size:
        raise SystemExit(f"{world_size} processes need as many GPUs, and torch sees {gpus}")
    arguments.tiny = arguments.tiny or not gpus
    began = time.monotonic()
    together = start("full" if arguments.full else "together", arguments, alone=False)
    record: dict[str, Any] = {}
    if rank == 0 and not arguments.full:
        record |= finish(start("alone", arguments, alone=True), arguments.limit)
    record |= finish(together, arguments.limit)
    if rank:
        return
    record["seconds"] = round(time.monotonic() - began, 1)
    report(record)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record), flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, help="samples of a GPU's batch (default: 4; 1 with --full)")
    parser.add_argument("--length", type=int, help="tokens of a sample (default: 4096; 32 when tiny)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4], help="pieces of the exchange, in turn")
    parser.add_argument("--waves", type=int, nargs="+", default=[4], help="of products beside an exchange, in turn")
    parser.add_argument("--zero-stage", type=int, default=0, choices=(0, 1, 2))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the run")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="the whole model with frozen experts, no comparison")
    parser.add_argument("--no-check", action="store_true", help="leave the comparison with float32 out")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in float32 (the default without a GPU)")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one part")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def count_gpus() -> int:
    """GPUs that torch sees, asked in another process: this one only waits and needs no context on a device."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def start(part: str, arguments: argparse.Namespace, alone: bool) -> "subprocess.Popen[str]":
    """A process for one part: with this rank's place, or on its own; it imports, then waits for a line."""
    environment = dict(os.environ)
    if alone:
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        for name in [name for name in environment if name in launched or name.startswith("TORCHELASTIC")]:
            del environment[name]
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part, *["--tiny"] * arguments.tiny]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)


def finish(process: "subprocess.Popen[str]", limit: float) -> dict[str, Any]:
    """Lets a part go; its result, or an exit where it failed."""
    assert process.stdin is not None and process.stdout is not None
    killer = threading.Timer(limit, process.kill)
    killer.start()
    process.stdin.write("go\n")
    process.stdin.flush()  # and stays open: its end tells the part that this process has died
    output = process.stdout.read()
    process.wait()
    in_time = killer.is_alive()
    killer.cancel()
    lines = output.splitlines()
    other = [line for line in lines if not line.startswith(MARK)]
    if other:
        print("\n".join(other), flush=True)
    found: dict[str, Any] = {}
    for line in lines:
        if line.startswith(MARK):
            found |= json.loads(line.removeprefix(MARK))
    if process.returncode:
        raise SystemExit(f"a part ended with {process.returncode}" + ("" if in_time else f", over {limit:.0f} s"))
    return found


def run_part(arguments: argparse.Namespace) -> None:
    """One part in this process: wait to be let go, measure, print the result."""
    import expert_parallel_parts as parts
    import torch
    from train_step import environment as describe

    from phi35.training import environment

    sys.stdin.readline()
    threading.Thread(target=leave_with_parent, daemon=True).start()
    fill_in(arguments)
    place = environment.start()
    gpu = place.device.type == "cuda"
    result: dict[str, Any] = {}
    needed = parts.needed_gib(arguments, place.world_size, gpu)
    if gpu:
        free = torch.cuda.mem_get_info()[0] / 2**30
        if needed > free:
            raise SystemExit(
                f"needs about {needed:.0f} GiB on each GPU, {free:.0f} are free: fewer --layers or --rows, "
                "--set optimizer_dtype=bfloat16, or GPUs with more memory"
            )
    run = parts.Run(arguments, place)
    result["build_seconds"] = round(run.build_seconds, 1)
    if arguments.part == "alone":
        result = {"one_gpu": run.time(arguments.warmup, arguments.steps) | result}
    else:
        chunks = [arguments.chunks[-1]] if arguments.full else arguments.chunks
        result["spread"] = [
            run.time_exchanges(count, waves, arguments.warmup, arguments.steps)
            for waves in arguments.waves
            for count in chunks
        ]
        result["exchange_alone"] = run.time_exchange_alone()
        result["environment"] = describe(arguments.commit) | {"world_size": place.world_size, "needed_gib": needed}
        result["environment"]["command"] = " ".join([LAUNCH, *sys.argv[1 : sys.argv.index("--part")]])
        result["config"] = run.config.to_dict()
        if not arguments.full and not arguments.no_check:
            del run
            if gpu:
                torch.cuda.empty_cache()
            result["errors"] = parts.check(arguments, place)
    print(MARK + json.dumps(result), flush=True)
    os._exit(0)  # process groups need no farewell here


def fill_in(arguments: argparse.Namespace) -> None:
    """Sizes that depend on others, and the settings as a dict."""
    import yaml

    arguments.rows = arguments.rows or (1 if arguments.full else 4)
    arguments.length = arguments.length or (32 if arguments.tiny else 4096)
    if arguments.tiny:
        arguments.layers = min(arguments.layers, 2)
    arguments.settings = {
        key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in arguments.set)
    }


def leave_with_parent() -> None:
    """Ends this process when the one that started it is gone."""
    sys.stdin.read()
    os._exit(1)


def report(record: dict[str, Any]) -> None:
    """The tables."""
    one = record.get("one_gpu")
    head = f"{'':26s}{'tokens/s/GPU':>13s}{'of one':>8s}{'ms':>9s}{'forward':>9s}{'backward':>9s}{'update':>8s}"
    print(head + f"{'waited':>8s}{'peak GiB':>9s}{'load':>6s}")
    rows = [("one GPU", one)] if one else []
    rows += [(f"spread, {row['chunks']} chunks, {row['waves']} waves", row) for row in record["spread"]]
    for name, row in rows:
        share = f"{row['tokens_per_second_per_gpu'] / one['tokens_per_second_per_gpu']:.1%}" if one else ""
        row["of_one_gpu"] = share
        ms, peak = row["ms"], row["peak_gib"]
        line = f"{name:26s}{row['tokens_per_second_per_gpu']:13,d}{share:>8s}{ms['total']:9.1f}{ms['forward']:9.1f}"
        line += f"{ms['backward']:9.1f}{ms['update']:8.1f}"
        line += f"{row['waited_share']:8.1%}" if "waited_share" in row else f"{'':8s}"
        print(line + (f"{peak:9.1f}" if peak is not None else f"{'':9s}") + f"{row['load_max_over_mean']:6.2f}")
    alone = record["exchange_alone"]
    shares = ", ".join(f"{alone['ms_per_step'] / row['ms']['total']:.1%}" for row in record["spread"])
    print(
        f"exchange alone: {alone['ms_per_layer']:.2f} ms a layer, {alone['ms_per_step']:.1f} ms a step "
        f"({shares} of the steps above), {alone['gb_per_second']:.0f} GB/s a direction"
    )
    print(f"built in {record['build_seconds']} s; all of it took {record['seconds']} s")
    for name, errors in record.get("errors", {}).items():
        shown = ("loss", "output", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight")
        worst = max(errors, key=lambda key: errors[key])
        chosen = dict.fromkeys((*shown, worst))
        print(f"error of {name}: " + ", ".join(f"{key} {errors[key]:.1e}" for key in chosen))


if __name__ == "__main__":
    main()
