"""Reading prompts on one GPU: time to the first token beside transformers and beside the dense matrix rate.

    python benchmarks/prefill.py                    # the table of docs/inference.md
    python benchmarks/prefill.py --parts            # and where the time of one prompt goes
    python benchmarks/prefill.py --over-cache       # a chunk's attention over a long cache alone

bfloat16, random weights drawn on the device, one prompt of random tokens, warm. Operations are counted as usual, twice
the active parameters times the tokens and no attention; "needed" leaves out the embedding, and the head but for the
last token. The bound is what is needed and causal attention, most of it at 128k tokens, at the rate of a square matrix
product of 8,192. Long prompts run in chunks; peak memory is shown. Medians of 7 after one to warm up; beyond 32,768
tokens one run after a shorter prompt, as each row tells. Prints a table and, last, one JSON line.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import moe_layer  # noqa: E402
import transformers_peer  # noqa: E402
from decode import PRESETS, SMALL, attempt, build  # noqa: E402

from phi35 import presets  # noqa: E402
from phi35.config import ModelConfig  # noqa: E402
from phi35.generation import fast_prefill  # noqa: E402
from phi35.generation.fast_prefill import Prompt, prefill  # noqa: E402
from phi35.generation.split_attention import attend_in_two  # noqa: E402
from phi35.parameter_count import count_parameters  # noqa: E402
from phi35.training.flops import attention_pairs  # noqa: E402

LONG, WARM_UP = 32768, 1024
"""Prompts beyond ``LONG`` tokens run once, after a chunk and ``WARM_UP`` more tokens."""
HEADS = ((32, 32, 96), (32, 8, 128))
"""Heads of queries and keys, and their width: phi-3.5-mini, phi-3.5-moe."""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini", "moe"], choices=list(PRESETS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 131000])
    parser.add_argument("--chunks", type=int, nargs="+", default=[fast_prefill.CHUNK_SIZE])
    parser.add_argument("--peer-lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--parts", action="store_true", help="profile one prompt of each model")
    parser.add_argument("--over-cache", action="store_true", help="attention of one chunk, instead of the table")
    parser.add_argument("--small", action="store_true", help="tiny models: shows that it runs, on a CPU too")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.small:
        raise SystemExit("no CUDA device is visible; --small runs tiny models on the CPU")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record: dict[str, Any] = {"environment": moe_layer.environment(device, arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/prefill.py", *sys.argv[1:]])
    size = 512 if device.type == "cpu" else 8192
    record["dense_tflops"] = moe_layer.dense_rate(size, device, dtype, 15)
    print(f"{record['environment']['device']}: dense {record['dense_tflops']:.1f} TFLOP/s", flush=True)
    names = SMALL if arguments.small else PRESETS
    if arguments.over_cache:
        for total in (300,) if arguments.small else (16384, 65536, 131072):
            for shape in HEADS:
                attempt(record, f"{shape} over {total}", lambda n=total, s=shape: over_cache(n, s, device, dtype))  # type: ignore[misc]
    for model in [] if arguments.over_cache else arguments.models:
        run(record, arguments, model, names[model], device)
    record["dense_tflops_after"] = moe_layer.dense_rate(size, device, dtype, 15)
    report(record)
    line = json.dumps(record)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(line)


def run(record: dict[str, Any], arguments: argparse.Namespace, model: str, preset: str, device: torch.device) -> None:
    """All lengths of one model, ours and transformers'."""
    for side in ["ours"] if arguments.no_peer else ["ours", "transformers"]:
        run_side(record, arguments, model, preset, side, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_side(
    record: dict[str, Any], arguments: argparse.Namespace, model: str, preset: str, side: str, device: torch.device
) -> None:
    """All lengths of one side's model."""
    built = attempt(record, f"{model} {side}", lambda: build(side, preset, device))
    if built is None:
        return
    for length in arguments.lengths if side == "ours" else arguments.peer_lengths:
        length = min(length, 300) if arguments.small else length
        for chunk in arguments.chunks if side == "ours" else [0]:
            name = f"{model} {length} {side}"
            attempt(record, name, lambda n=length, c=chunk: time_prompt(record, model, side, built, n, c, device))  # type: ignore[misc]
    if side == "ours" and arguments.parts:
        attempt(record, f"{model} parts", lambda: {"parts": parts(built, 4096, device), "model": model})


def flops(config: ModelConfig, tokens: int) -> tuple[float, float]:
    """Operations of a prompt: twice the active parameters a token, and those that are needed.

    Attention is in neither; needed are no products with the embedding, and with the head at the last token alone.
    """
    active, table = count_parameters(config).active, config.vocab_size * config.hidden_size
    return 2.0 * tokens * active, 2.0 * tokens * (active - 2 * table) + 2.0 * table


def attention_flops(config: ModelConfig, tokens: int) -> float:
    """Operations of causal attention in all layers: two products of each visible pair of a query and a key."""
    width = config.num_attention_heads * config.attention_head_dim
    return 4.0 * attention_pairs(tokens, config) * width * config.num_hidden_layers


def time_prompt(
    record: dict[str, Any], model: str, side: str, built: Any, length: int, chunk: int, device: torch.device
) -> dict[str, Any]:
    """One length of one side."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(built.config.vocab_size, 30000) - 64, (1, length), generator=generator)
    rounds = 7 if length <= LONG else 1
    row: dict[str, Any] = {"model": model, "side": side, "length": length, "chunk": chunk, "rounds": rounds}
    if side == "transformers":
        spent = transformers_peer.prefill_time(built, ids.to(device), rounds)
        counted = presets.get(PRESETS[model]) if device.type == "cuda" else presets.get(SMALL[model])
    else:
        spent, counted = ours(built, ids[0].tolist(), chunk, rounds, device, row), built.config
    usual, needed = flops(counted, length)
    rate = record["dense_tflops"]
    row |= {"ms": 1e3 * spent, "tflops": usual / spent / 1e12}
    row |= {"of_dense": row["tflops"] / rate, "needed_of_dense": needed / spent / 1e12 / rate}
    attention = attention_flops(counted, length)
    row |= {"attention_share": attention / (needed + attention), "bound_ms": (needed + attention) / rate / 1e9}
    row["of_bound"] = row["bound_ms"] / row["ms"]
    print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    return row


def ours(model: Any, ids: list[int], chunk: int, rounds: int, device: torch.device, row: dict[str, Any]) -> float:
    """Median seconds from the ids on the host to the last token's logits; one run of a long prompt."""
    cache = model.new_cache(1, len(ids))
    long = len(ids) > model.config.original_max_position_embeddings
    prompts = [Prompt(ids, None, 0, long)]
    warm = ids if rounds > 1 else ids[: chunk + WARM_UP]
    row["warm_up"] = len(warm)
    times = []
    for turn in range(rounds + 1):
        if turn == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        transformers_peer.synchronise()
        start = time.perf_counter()
        given = prompts if turn else [Prompt(warm, None, 0, long)]
        prefill(model, cache, given, chunk, plain=device.type == "cpu")
        transformers_peer.synchronise()
        if turn:
            times.append(time.perf_counter() - start)
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["cache_gib"] = cache.nbytes / 2**30
    return statistics.median(times)


def over_cache(total: int, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A chunk of one layer's queries over so many keys: the corner triangle beside two parts, in milliseconds."""
    generator = torch.Generator(device).manual_seed(0)
    chunk, (heads, num_kv, head_dim) = min(8192, total // 2), shape
    queries = torch.randn(1, heads, chunk, head_dim, device=device, dtype=dtype, generator=generator)
    keys, values = (
        torch.randn(1, num_kv, total, head_dim, device=device, dtype=dtype, generator=generator) for _ in "kv"
    )
    corner = causal_lower_right(chunk, total)
    ways = {
        "corner": lambda: F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=corner, enable_gqa=heads != num_kv
        ),
        "two_parts": lambda: attend_in_two(queries, keys, values),
    }
    row: dict[str, Any] = {"over_cache": total, "chunk": chunk, "heads": heads, "num_kv": num_kv, "head_dim": head_dim}
    results = {}
    for name, way in ways.items():
        times = []
        for _ in range(4):
            transformers_peer.synchronise()
            start = time.perf_counter()
            results[name] = way()
            transformers_peer.synchronise()
            times.append(1e3 * (time.perf_counter() - start))
        row[name] = statistics.median(times[1:])
        row[f"{name}_tflops"] = 4.0 * heads * head_dim * chunk * (total - chunk / 2) / row[name] / 1e9
    row["largest_value"] = float(results["corner"].abs().max())
    row["largest_difference"] = float((results["corner"].float() - results["two_parts"].float()).abs().max())
    print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    return row


def parts(model: Any, length: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each kind of kernel in one prompt."""
    from torch.profiler import ProfilerActivity, profile

    cache, ids = model.new_cache(1, length), [5 + place % 1000 for place in range(length)]
    prompts, plain = [Prompt(ids, None, 0, False)], device.type == "cpu"
    prefill(model, cache, prompts, plain=plain)
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as found:
        prefill(model, cache, prompts, plain=plain)
        transformers_peer.synchronise()
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, kind) / 1e3 for event in found.key_averages()}
    top = dict(sorted(times.items(), key=lambda item: -item[1])[:16])
    for name, spent in top.items():
        print(f"  {spent:9.3f} ms  {name[:110]}", flush=True)
    return top


def report(record: dict[str, Any]) -> None:
    """The table."""
    rows = record.get("rows", [])
    print(
        f"{'model':8s}{'tokens':>8s}{'chunk':>8s}{'ms':>10s}{'TFLOP/s':>9s}{'of dense':>10s}{'needed':>8s}"
        f"{'bound':>10s}{'of it':>7s}{'GiB':>7s}   side"
    )
    for row in (row for row in rows if "ms" in row):
        print(
            f"{row['model']:8s}{row['length']:8d}{row['chunk']:8d}{row['ms']:10.2f}{row['tflops']:9.1f}"
            f"{100 * row['of_dense']:9.1f}%{100 * row['needed_of_dense']:7.1f}%"
            f"{row['bound_ms']:10.2f}{100 * row['of_bound']:6.1f}%{row.get('peak_gib', 0):7.1f}   {row['side']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
