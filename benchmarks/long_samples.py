"""Training passes over long samples: one GPU that has a row whole, and all GPUs that share it.

    torchrun --nproc_per_node 2 benchmarks/long_samples.py                       # GPUs (NCCL); tiny on a CPU (gloo)
    torchrun --nproc_per_node 2 benchmarks/long_samples.py --layers 32 --lengths 131072

One row of phi-3.5-mini, cut to some layers, forward and backward in bfloat16 with recomputed layers, fused kernels and
the loss in chunks. First rank 0 has the row alone, then every rank has a stretch of it (Ulysses). Loss and gradients of
both are compared; tokens per second are those of the row; memory is the peak of a GPU. Prints a table and, last, one
JSON line on rank 0.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from phi35.language_model_head import shift_labels  # noqa: E402
from phi35.loading import create  # noqa: E402
from phi35.sequence_parallel import SequenceParallel  # noqa: E402
from phi35.training.acceleration import fast_attention, fuse  # noqa: E402
from phi35.training.description import commit  # noqa: E402


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row (default: 32768 131072; 256 on a CPU)")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes, of which the median counts")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("needs a launcher: torchrun --nproc_per_node 2 benchmarks/long_samples.py")
    on_gpu = (options.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    name, changes = ("phi-3.5-mini", {"num_hidden_layers": options.layers}) if on_gpu else ("tiny-phi-3.5-mini", {})
    model = create(name, device=str(device), dtype="bfloat16" if on_gpu else "float32", seed=0, **changes).train()
    model.gradient_checkpointing = True
    fuse(model, on_gpu)
    shared = SequenceParallel(distributed.group.WORLD)
    lines = []
    for length in options.lengths or ([32768, 131072] if on_gpu else [256]):
        line: dict[str, Any] = {"length": length}
        alone = measure(model, None, length, options.rounds, device) if rank == 0 else None
        distributed.barrier()
        together = measure(model, shared, length, options.rounds, device)
        if alone is not None:
            line["alone"], line["together"] = alone[0], together[0]
            line["loss_difference"] = abs(alone[0]["loss"] - together[0]["loss"])
            pairs = zip(alone[1], together[1], strict=True)
            line["gradient_error"] = max(float((one - other).norm() / one.norm()) for one, other in pairs)
            line["speedup"] = alone[0]["seconds"] / together[0]["seconds"]
            lines.append(line)
            show(line, world_size)
    if rank == 0:
        record = {
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
            "ranks": world_size,
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "commit": commit(),
            "command": " ".join(["torchrun", *sys.argv]),
            "model": name,
            "layers": model.config.num_hidden_layers,
            "lengths": lines,
        }
        print(json.dumps(record), flush=True)
    distributed.destroy_process_group()


def measure(
    model: Any, shared: SequenceParallel | None, length: int, rounds: int, device: torch.device
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Times of passes over one row, and the gradients summed over the ranks that share it."""
    model.model.sequence_parallel = shared
    ids = torch.randint(3, 900, (1, length), generator=torch.Generator().manual_seed(0))
    lengths, targets = torch.tensor([[length]]), shift_labels(ids)
    total = length - 1
    if shared is not None:
        ids, targets = shared.local(ids), shared.local(targets)
    share = int((targets >= 0).sum()) / total
    ids, targets = ids.to(device), targets.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = [], torch.zeros(())
    for _ in range(rounds + 1):
        model.zero_grad(set_to_none=True)
        wait(shared, device)
        start = time.perf_counter()
        with fast_attention(device):
            loss = model(ids, targets=targets, sequence_lengths=lengths).loss * share
            loss.backward()
        wait(shared, device)
        seconds.append(time.perf_counter() - start)
    loss = loss.detach()
    gradients = [parameter.grad.float() for parameter in model.parameters()]
    if shared is not None:
        for tensor in (loss, *gradients):
            distributed.all_reduce(tensor, group=shared.group)
    took = statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    result = {"seconds": took, "tokens_per_second": length / took, "peak_gib": peak, "loss": float(loss)}
    return result, [gradient.cpu() for gradient in gradients]


def wait(shared: SequenceParallel | None, device: torch.device) -> None:
    """Until the device, and all ranks that share the row, are done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if shared is not None:
        distributed.barrier(group=shared.group)


def show(line: dict[str, Any], world_size: int) -> None:
    """One length's lines of the table."""
    for name, ranks in (("alone", 1), ("together", world_size)):
        result = line[name]
        memory = "" if result["peak_gib"] is None else f"{result['peak_gib']:8.1f} GiB"
        print(
            f"{line['length']:>8} tokens on {ranks}: {result['seconds']:8.3f} s "
            f"{result['tokens_per_second']:10.0f} tokens/s{memory}"
        )
    print(
        f"         {line['speedup']:.2f} times as fast; loss {line['loss_difference']:.1e} apart, gradients at most "
        f"{line['gradient_error']:.1e} (relative norm of a tensor)",
        flush=True,
    )


if __name__ == "__main__":
    main()
