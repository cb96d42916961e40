"""Decoding on one GPU: tokens per second beside transformers and beside what the memory allows.

    python benchmarks/decode.py --kernels --step        # each kernel alone, then whole steps
    python benchmarks/decode.py                         # the table of docs/inference.md

Random weights, drawn on the device. The bound is the measured rate of a device copy over the bytes that a step must
read: all weights but the embedding (of a sparse model the chosen experts' alone), keys and values of the mean length.
Prints a table and, last, one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import decode_kernels  # noqa: E402
import moe_layer  # noqa: E402

import phi35  # noqa: E402
from phi35.config import ModelConfig  # noqa: E402
from phi35.generation.fast_step import DecodeStep  # noqa: E402
from phi35.kernels.configs import VectorConfig  # noqa: E402
from phi35.kernels.tuning import DEFAULT, StepTuning  # noqa: E402


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini", "moe"], choices=["mini", "moe"])
    parser.add_argument("--kernels", action="store_true", help="each kernel alone")
    parser.add_argument("--step", action="store_true", help="whole steps, by the table's shapes and the best found")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible")
    record: dict[str, Any] = {"environment": moe_layer.environment(torch.device("cuda"), arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]])
    record["copy_tb_per_s"] = moe_layer.copy_rate(torch.device("cuda"))
    print(f"{record['environment']['device']}: copy {record['copy_tb_per_s']:.3f} TB/s", flush=True)
    if arguments.kernels:
        record["kernels"] = decode_kernels.measure(arguments.models, record["copy_tb_per_s"])
    if arguments.step:
        record["steps"] = []
        for model in arguments.models:
            try:
                record["steps"] += time_steps(model, record)
            except (RuntimeError, ValueError) as error:
                record["steps"].append({"model": model, "error_text": str(error)})
                print(f"{model}: {error}", flush=True)
    line = json.dumps(record)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(line)


def step_bytes(config: ModelConfig, length: float, batch: int = 1) -> float:
    """Bytes that a step reads: weights but the embedding, and keys and values of ``length`` tokens a row."""
    with torch.device("meta"):
        layers = phi35.create(config, device="meta", dtype="bfloat16").model.layers
    total = config.vocab_size * config.hidden_size
    for layer in layers:
        for name, parameter in layer.named_parameters():
            share = 1.0
            if ".experts." in name:
                share = config.num_experts_per_tok / config.num_local_experts
            total += share * parameter.numel()
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.attention_head_dim
    return 2 * (total + batch * kv * length)


def best_tuning(record: dict[str, Any], model: str) -> StepTuning:
    """The fastest right shapes of the kernels' table."""
    fields = {
        "qkv": "qkv",
        "o_proj": "short_add",
        "down": "long_add",
        "gate_up": "gate_up",
        "logits": "logits",
        "expert_gate_up": "expert_gate_up",
        "expert_down": "expert_down",
    }
    found: dict[str, Any] = {}
    for kernel, name in fields.items():
        rows = [
            row
            for row in record.get("kernels", [])
            if row["model"] == model and row["kernel"] == kernel and row.get("pdl") and row.get("error", 1) < 0.02
        ]
        if rows:
            best = min(rows, key=lambda row: row["us"])
            found[name] = VectorConfig(*map(int, best["config"].split()))
    return StepTuning(**found)


def time_steps(model: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Captured steps at 384 tokens in the cache: by the table, by the best found, and without programmatic launch."""
    preset = decode_kernels.PRESETS[model]
    loaded = phi35.create(preset, device="cuda", dtype="bfloat16", seed=0)
    rows = [{"model": model, "check": check_step(preset)}]
    print(f"{model}: logits' errors against float32 {rows[0]['check']}", flush=True)
    bound = 1e12 * record["copy_tb_per_s"] / step_bytes(loaded.config, 384)
    for name, tuning, pdl in (
        ("table", DEFAULT, True),
        ("table, no pdl", DEFAULT, False),
        ("best found", best_tuning(record, model), True),
    ):
        cache = loaded.new_cache(1, 1024)
        step = DecodeStep(loaded, cache, tuning=tuning, pdl=pdl)
        step.state.lengths.fill_(384 - 64)
        start = time.perf_counter()
        step.capture()
        captured = time.perf_counter() - start
        times = []
        for _ in range(128):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            step.run()
            last.record()
            times.append((first, last))
        torch.cuda.synchronize()
        spent = statistics.median(a.elapsed_time(b) for a, b in times[16:])
        rate = 1e3 / spent
        rows.append(
            {"model": model, "step": name, "ms": spent, "tokens_per_s": rate, "bound": bound, "of_bound": rate / bound}
        )
        print(
            f"{model}: step ({name}) {spent:.3f} ms, {rate:.1f} tokens/s, {100 * rate / bound:.1f} % of {bound:.1f}; "
            f"warm-up and capture {captured:.2f} s",
            flush=True,
        )
        del step, cache
    return rows


@torch.no_grad()
def check_step(preset: str) -> dict[str, float]:
    """Relative errors of bfloat16 logits over 2 layers against float32: of the captured step and of the plain path."""
    narrow = phi35.create(preset, device="cuda", dtype="bfloat16", seed=1, num_hidden_layers=2)
    wide = phi35.create(preset, device="cuda", dtype="float32", num_hidden_layers=2)
    wide.load_state_dict(narrow.state_dict())
    ids = torch.randint(5, 30000, (1, 200), device="cuda")
    expected = wide(ids).logits[:, 100:]
    caches = [narrow.new_cache(1, 256) for _ in range(2)]
    for cache in caches:
        narrow(ids[:, :100], past_key_values=cache)
    step = DecodeStep(narrow, caches[0])
    step.capture()
    mine, plain = [], []
    for place in range(100, 200):
        step.state.tokens.copy_(ids[:, place])
        step.run()
        mine.append(step.logits.clone())
        plain.append(narrow(ids[:, place : place + 1], past_key_values=caches[1]).logits[:, 0].float())
    return {
        name: float((torch.stack(found, dim=1) - expected).norm() / expected.norm())
        for name, found in (("step", mine), ("plain", plain))
    }


if __name__ == "__main__":
    main()
