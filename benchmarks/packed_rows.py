"""Packed rows against plain ones: attention alone, training passes of phi-3.5-mini, and how fast rows are read.

    python benchmarks/packed_rows.py              # one GPU, bfloat16, about two minutes
    python benchmarks/packed_rows.py --small      # the same on a CPU, tiny, in seconds

Attention is timed forward and backward on four rows of 4,096 tokens: whole rows by torch's causal attention (cuDNN on a
GPU), the same rows and rows of shorter samples by the packed form, and by torch's attention sample by sample. TFLOP/s
count the pairs of a query and a key that are needed. The model's passes are forward and backward with fused kernels.
Prints tables and, last, one JSON line.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from phi35.data.source import TextSource  # noqa: E402
from phi35.data.stream import DocumentStream, Mixture  # noqa: E402
from phi35.data.token_files import TokenFiles, TokenPart  # noqa: E402
from phi35.loading import create  # noqa: E402
from phi35.packed_attention import PackedRows, _one_by_one, attend_packed, packed_rows  # noqa: E402
from phi35.training.acceleration import fast_attention, fuse  # noqa: E402
from phi35.training.description import commit  # noqa: E402
from phi35.training.flops import visible_pairs  # noqa: E402


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--layers", type=int, default=8, help="layers of phi-3.5-mini in the model's passes")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds, of which the median counts")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --small runs on a CPU")
    device = torch.device("cpu" if options.small else "cuda")
    rows, length = (2, 128) if options.small else (4, 4096)
    if options.small:
        options.rounds = 3
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
        "command": " ".join(sys.argv),
        "rows": rows,
        "length": length,
    }
    result["attention"] = attention_table(device, rows, length, options.rounds)
    result["model"] = model_table(device, rows, length, options)
    result["reading"] = reading_table(length)
    print(json.dumps(result))


def packings(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Lengths of the samples of each row, by name."""
    generator = np.random.default_rng(0)
    mixed = []
    for _ in range(rows):
        cuts = np.sort(generator.choice(np.arange(1, length), size=7, replace=False))
        mixed.append(np.diff(np.concatenate(([0], cuts, [length]))).tolist())
    return {
        "whole rows": torch.full((rows, 1), length),
        "2 samples a row": torch.full((rows, 2), length // 2),
        "8 samples a row, mixed": torch.tensor(mixed),
        "32 samples a row": torch.full((rows, 32), length // 32),
    }


def attention_table(device: torch.device, rows: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Times of attention forward and backward."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    table = []
    shapes = {"mini: 32 heads of 96": (32, 32, 96), "moe: 32 heads, 8 of keys, of 128": (32, 8, 128)}
    for shape, (heads, kv_heads, width) in shapes.items():
        # As a layer has them: heads are a view of the projection.
        sizes = [(rows, length, count, width) for count in (heads, kv_heads, kv_heads)]
        leaves = [torch.randn(size, device=device, dtype=dtype).requires_grad_() for size in sizes]
        tensors = [leaf.transpose(1, 2) for leaf in leaves]
        upstream = torch.randn(sizes[0], device=device, dtype=dtype).transpose(1, 2)
        for name, lengths in packings(rows, length).items():
            packed = packed_rows(lengths, rows, length, device)
            pairs = sum(visible_pairs(size, None) for size in packed.segments)
            for form, attend in FORMS.items():
                if form == "plain" and name != "whole rows":
                    continue
                run = functools.partial(gradients, attend, tensors, packed, upstream, leaves)
                with fast_attention(device):
                    seconds = timed(run, device, rounds)
                teraflops = 12 * heads * width * pairs / seconds / 1e12
                table.append({"shape": shape, "rows": name, "form": form, "ms": seconds * 1e3, "teraflops": teraflops})
    print("attention, forward and backward")
    for line in table:
        print(f"  {line['shape']:<34} {line['rows']:<24} {line['form']:<18}", end="")
        print(f"{line['ms']:9.3f} ms {line['teraflops']:8.1f} TFLOP/s")
    return table


def gradients(
    attend: Callable[..., torch.Tensor],
    tensors: list[torch.Tensor],
    packed: PackedRows,
    upstream: torch.Tensor,
    leaves: list[torch.Tensor],
) -> Any:
    """One pass forward and backward."""
    return torch.autograd.grad(attend(tensors, packed), leaves, upstream)


def attend_plainly(tensors: list[torch.Tensor], packed: PackedRows) -> torch.Tensor:
    """torch's causal attention over whole rows."""
    grouped = tensors[0].shape[1] != tensors[1].shape[1]
    return F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=grouped)


def attend_in_one(tensors: list[torch.Tensor], packed: PackedRows) -> torch.Tensor:
    """The packed form, as the model takes it."""
    return attend_packed(*tensors, packed)


def attend_by_sample(tensors: list[torch.Tensor], packed: PackedRows) -> torch.Tensor:
    """torch's causal attention sample by sample."""
    flat = tuple(tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors)
    attended = _one_by_one(flat, packed.segments, None, 0.0, None)
    return attended.unflatten(0, (len(packed.samples), packed.length)).transpose(1, 2)


FORMS = {"plain": attend_plainly, "packed": attend_in_one, "sample by sample": attend_by_sample}


def model_table(device: torch.device, rows: int, length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of the model's training passes."""
    name, changes = (
        ("tiny-phi-3.5-mini", {}) if options.small else ("phi-3.5-mini", {"num_hidden_layers": options.layers})
    )
    dtype = "float32" if options.small else "bfloat16"
    model = create(name, device=str(device), dtype=dtype, seed=0, **changes).train()
    fuse(model, device.type == "cuda")
    ids = torch.randint(3, 900, (rows, length), device=device)
    table = []
    for packing, lengths in {"plain": None, **packings(rows, length)}.items():

        def run(lengths: torch.Tensor | None = lengths) -> None:
            model.zero_grad(set_to_none=True)
            with fast_attention(device):
                model(ids, labels=ids, sequence_lengths=lengths).loss.backward()

        seconds = timed(run, device, options.rounds)
        table.append({"rows": packing, "ms": seconds * 1e3, "tokens_per_second": rows * length / seconds})
    print(f"{name}, {model.config.num_hidden_layers} layers, forward and backward of {rows} rows of {length} tokens")
    for line in table:
        print(f"  {line['rows']:<24} {line['ms']:9.2f} ms {line['tokens_per_second']:12.0f} tokens/s")
    return table


def reading_table(length: int, num_documents: int = 20_000) -> dict[str, Any]:
    """Tokens a second of the source itself: packing by best fit and reading from a mapped file, in one process."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.5, 1.0, num_documents).astype(np.int64), 2, 4 * length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokens.npy")
        np.save(path, generator.integers(3, 900, int(lengths.sum()), dtype=np.uint16))
        part = TokenPart(np.load(path, mmap_mode="r"), np.cumsum(np.concatenate(([0], lengths))))
        stream = DocumentStream(TokenFiles([part], identity="benchmark"), 0, max_length=length, seed=0)
        source = TextSource(
            Mixture([stream], [1.0]), sequence_length=length, micro_batch_size=4, vocab_size=1000, pad_token_id=0
        )
        batches = iter(source)
        next(batches)
        start, tokens, real, rounds = time.perf_counter(), 0, 0, 100
        for _ in range(rounds):
            batch = next(batches)
            tokens += batch["input_ids"].numel()
            real += int(batch["sequence_lengths"].sum())
        seconds = time.perf_counter() - start
    result = {"tokens_per_second": tokens / seconds, "filled": real / tokens, "samples": num_documents}
    print(
        f"reading: {result['tokens_per_second']:.0f} tokens/s in one process, rows {100 * result['filled']:.2f} % full"
    )
    return result


def timed(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median seconds of a round, after three to warm up."""
    seconds = []
    for number in range(rounds + 3):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            passed = start.elapsed_time(end) / 1e3
        else:
            begun = time.perf_counter()
            run()
            passed = time.perf_counter() - begun
        if number >= 3:
            seconds.append(passed)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
