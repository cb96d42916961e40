"""Weights in few bits: decoding beside bfloat16 and beside what the memory allows, on a GPU and on a CPU.

    python benchmarks/quantize.py                       # whole models on the GPU: bfloat16, int8, fp8, int4
    python benchmarks/quantize.py --kernels             # each kernel alone (benchmarks/quantize_kernels.py)
    python benchmarks/quantize.py --cpu                 # a phi-3.5-mini of 8 layers beside transformers, in turns
    python benchmarks/quantize.py --cpu --small         # shows that it runs

Random codes, greedy, one row. A bound is the bytes that a step reads (of a sparse layer the chosen experts', of the
cache the tokens in it) over the measured rate of a device copy, or on a CPU of a plain read on as many threads. On a
CPU the sides take their steps in turns, so that what else runs there meets both. Prints a table and, last, one JSON
line.
"""

import argparse
import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import moe_layer  # noqa: E402
import quantize_cpu  # noqa: E402

import phi35  # noqa: E402
from phi35 import presets  # noqa: E402
from phi35.config import ModelConfig  # noqa: E402
from phi35.quantization.config import QuantizationConfig, WeightFormat  # noqa: E402

PRESETS = {"mini": "phi-3.5-mini", "moe": "phi-3.5-moe"}
FORMATS = ("bf16", "int8", "fp8", "int4", "int4 all")
LENGTH = 384


def quantization(name: str) -> QuantizationConfig | None:
    """What a format's name stands for; "int4 all" has embedding and head in 4 bits, too."""
    if name == "bf16":
        return None
    one = {
        "int8": WeightFormat(bits=8),
        "fp8": WeightFormat(bits=8, type="float", group_size=None),
        "int4": WeightFormat(),
        "int4 all": WeightFormat(),
    }[name]
    return (
        QuantizationConfig(linear=one, embedding=one, head=one)
        if name == "int4 all"
        else QuantizationConfig(linear=one)
    )


def step_bytes(config: ModelConfig, length: int) -> int:
    """Bytes that a step of one row reads: all but the embedding, the chosen experts alone, and the cache."""
    model = phi35.create(config, device="meta", dtype="bfloat16")
    share = config.num_experts_per_tok / config.num_local_experts if config.is_sparse else 1.0
    total = 0.0
    for name, tensor in model.state_dict().items():
        if name.startswith(("model.layers.", "lm_head.")):
            total += tensor.nbytes * (share if ".mlp.experts." in name else 1.0)
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.attention_head_dim
    return int(total + 2 * kv * length)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument(
        "--formats",
        nargs="+",
        help="of whole models: bf16, int8, fp8, int4, 'int4 all'; on a CPU: int4, int8, bfloat16, ...",
    )
    parser.add_argument("--kernels", action="store_true", help="each kernel alone, instead of whole models")
    parser.add_argument("--cpu", action="store_true", help="the CPU's part")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each side, on a CPU")
    parser.add_argument("--lulls", type=float, default=0, help="on a shared CPU: wait so many seconds for quiet rounds")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    cpu = arguments.cpu
    if not cpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible; --cpu measures the CPU")
    device = torch.device("cpu" if cpu else "cuda")
    record: dict[str, Any] = {"environment": moe_layer.environment(device, arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/quantize.py", *sys.argv[1:]])
    if cpu:
        quantize_cpu.lulls["seconds"] = arguments.lulls
        record |= quantize_cpu.measure(arguments.small, arguments.rounds, arguments.formats)
    else:
        record["copy_tb_per_s"] = rate = moe_layer.copy_rate(device)
        print(f"{record['environment']['device']}: copy {rate:.3f} TB/s", flush=True)
        if arguments.kernels:
            import quantize_kernels

            forms = arguments.formats or ["int4", "int8", "fp8", "int4z"]
            record["kernels"] = quantize_kernels.measure(arguments.models, forms, rate)
            record["best"] = quantize_kernels.best(record["kernels"])
            for name, row in record["best"].items():
                print(f"best: {name:28s}{row.get('config', ''):14s}{100 * row['of_copy']:6.1f} % of the copy's rate")
        else:
            record["rows"] = whole_models(arguments, rate)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def whole_models(arguments: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """A captured step of one row with ``LENGTH`` tokens in the cache, for each model and format."""
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        plain = None
        for name in arguments.formats or FORMATS:
            try:
                row = whole_model(model, name, rate)
            except (RuntimeError, ValueError) as error:
                print(f"{model} {name}: {error}", flush=True)
                rows.append({"model": model, "format": name, "error_text": str(error)[:500]})
                continue
            plain = row["ms"] if name == "bf16" else plain
            row["times_bf16"] = None if plain is None else plain / row["ms"]
            rows.append(row)
            times = "" if plain is None else f", {row['times_bf16']:.2f} times bf16"
            print(
                f"{model:5s}{name:9s}{row['ms']:8.3f} ms{row['tokens_per_s']:9.1f} tokens/s, "
                f"{100 * row['of_bound']:.1f} % of {row['bound']:.1f}{times}; {row['weights_gb']:.2f} GB of weights, "
                f"capture {row['capture_s']:.1f} s, logits against the plain path {row['error']:.1e}",
                flush=True,
            )
            gc.collect()
            torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def whole_model(model: str, name: str, rate: float) -> dict[str, Any]:
    """One model in one format."""
    import time

    from decode_steps import step_times

    from phi35.generation.fast_step import DecodeStep

    config = presets.get(PRESETS[model]).replace(quantization=quantization(name))
    loaded = phi35.create(config, device="cuda", dtype="bfloat16", seed=0)
    ids = torch.randint(5, 30000, (1, 64), device="cuda")
    caches = [loaded.new_cache(1, 1024) for _ in range(2)]
    for cache in caches:
        loaded(ids, past_key_values=cache, logits_to_keep=1)
    step = DecodeStep(loaded, caches[0])
    start = time.perf_counter()
    step.capture()
    captured = time.perf_counter() - start
    step.state.tokens.fill_(7)
    step.run()
    expected = loaded(torch.full((1, 1), 7, device="cuda"), past_key_values=caches[1]).logits[:, 0].float()
    error = float((step.logits - expected).norm() / expected.norm())
    step.state.lengths.fill_(LENGTH - 64)
    spent = statistics.median(step_times(step)[16:])
    bound = 1e12 * rate / step_bytes(config, LENGTH)
    weights = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    row = {"model": model, "format": name, "ms": spent, "tokens_per_s": 1e3 / spent, "bound": bound, "error": error}
    return row | {"of_bound": 1e3 / spent / bound, "weights_gb": weights / 1e9, "capture_s": captured}


if __name__ == "__main__":
    main()
