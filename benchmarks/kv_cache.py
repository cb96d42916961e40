"""Keys and values in eight bits: memory and speed on a GPU, and what they cost the small model in the package.

    python benchmarks/kv_cache.py                       # on a GPU: phi-3.5-mini with 32k and 128k tokens in the cache
    python benchmarks/kv_cache.py --sweep --lengths 32640   # shapes of the attention kernel's programs, too (60 s)
    python benchmarks/kv_cache.py --quality             # the small model, on a CPU: error of logits, answers
    python benchmarks/kv_cache.py --models moe --quantization int4

A step is a captured one of one row, random weights in bfloat16 and random codes. The bound is the measured rate of a
device copy over the bytes that a step must read: weights, and keys and values with their scales. The sweep, over
eight-bit keys of the first length, takes the best block, warps and stages first and then the number of programs for
them; the best is timed at every length. Prints a table and, last, one JSON line.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import decode_steps  # noqa: E402
import moe_layer  # noqa: E402
import quantize  # noqa: E402

import phi35  # noqa: E402
from phi35.cache import KVCache  # noqa: E402
from phi35.generation.fast_step import DecodeStep  # noqa: E402
from phi35.kernels.configs import AttentionConfig  # noqa: E402
from phi35.kernels.tuning import DEFAULT, StepTuning  # noqa: E402

PRESETS = {"mini": "phi-3.5-mini", "moe": "phi-3.5-moe"}
KINDS = (None, "int8", "fp8")
SHAPES = [(32, 2, 3), (64, 4, 2), (64, 4, 3), (64, 2, 2), (128, 8, 2)]
"""Block, warps and stages beside those of the table: 4.7 to 5.2 instructions a number of int8, 5.9 to 6.3 of fp8."""
PROGRAMS = (528, 2112)
STEPS = 40


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini"], choices=list(PRESETS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[32640, 130944], help="tokens in the cache")
    parser.add_argument("--quantization", choices=["int4", "int8", "fp8"], help="of the weights")
    parser.add_argument("--sweep", action="store_true", help="shapes of attention's programs, at the first length")
    parser.add_argument("--quality", action="store_true", help="the small model's logits and answers, instead")
    parser.add_argument("--questions", type=int, default=400, help="of easy-vqa's test split, for --quality")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.quality else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible; --quality runs on the CPU")
    record: dict[str, Any] = {"environment": moe_layer.environment(device, arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/kv_cache.py", *sys.argv[1:]])
    if arguments.quality:
        record["quality"] = quality(arguments.questions)
    else:
        record["copy_tb_per_s"] = rate = moe_layer.copy_rate(device)
        print(f"{record['environment']['device']}: copy {rate:.3f} TB/s", flush=True)
        record["rows"] = []
        for model in arguments.models:
            record["rows"] += steps(model, arguments.lengths, rate, arguments.sweep, arguments.quantization)
            gc.collect()
            torch.cuda.empty_cache()
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


@torch.no_grad()
def steps(
    name: str, lengths: Sequence[int], rate: float, sweep: bool, quantization: str | None
) -> list[dict[str, Any]]:
    """Steps of one model with each kind of cache."""
    few = {} if quantization is None else {"quantization": quantization}
    model = phi35.create(PRESETS[name], device="cuda", dtype="bfloat16", seed=0, **few)
    rows: list[dict[str, Any]] = [check(name, model, kind) for kind in KINDS]
    best_of: dict[str | None, dict[str, StepTuning]] = {}
    for place, length in enumerate(lengths):
        for kind in KINDS:
            started = time.perf_counter()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            cache = filled(model, length, kind)
            found = [time_step(model, cache, length, rate, "table", DEFAULT)]
            if sweep and place == 0 and kind is not None:
                more, best_of[kind] = sweep_shapes(model, cache, length, rate, found[0])
                found += more
            elif kind in best_of:
                found += [time_step(model, cache, length, rate, *one) for one in best_of[kind].items()]
            best = max(found, key=lambda row: row["tokens_per_s"])
            shared = {"model": name, "kind": kind or "bfloat16", "length": length}
            shared |= {"cache_gb": cache.nbytes / 1e9, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
            for row in found:
                rows.append(shared | row)
            for row in [found[0]] + [best] * (best is not found[0]):
                if row["ms"] is None:
                    print(f"{name} {shared['kind']:9s}{length:8,} tokens ({row['tuning']}): {row['error']}", flush=True)
                    continue
                print(
                    f"{name} {shared['kind']:9s}{length:8,} tokens ({row['tuning']}): {row['ms']:.3f} ms, "
                    f"{row['tokens_per_s']:.1f} tokens/s, {100 * row['of_bound']:.1f} % of {row['bound']:.1f}; cache "
                    f"{shared['cache_gb']:.2f} GB, peak {shared['peak_gib']:.1f} GiB",
                    flush=True,
                )
            if len(found) > 2:
                print(
                    f"    {', '.join(shown(row) for row in found)} ({time.perf_counter() - started:.0f} s)", flush=True
                )
            del cache
    return rows


def sweep_shapes(
    model: Any, cache: KVCache, length: int, rate: float, table: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, StepTuning]]:
    """Rows of other shapes of the programs, and the best of all by its name, the table's too."""
    alone = model.config.num_attention_heads == model.config.num_key_value_heads
    config, programs = (DEFAULT.coded, DEFAULT.coded_programs) if alone else (DEFAULT.grouped, DEFAULT.programs)
    tried = {"table": ((config.block, config.num_warps, config.num_stages), programs)}
    rows = [table]

    def time_all(choices: Sequence[tuple[tuple[int, int, int], int]]) -> str:
        for shape, number in choices:
            label = f"{shape} {number}"
            tried[label] = (shape, number)
            rows.append(time_step(model, cache, length, rate, label, shaped(shape, number)))
        return str(max(rows, key=lambda row: row["tokens_per_s"])["tuning"])

    best = time_all([(shape, programs) for shape in SHAPES])
    best = time_all([(tried[best][0], number) for number in PROGRAMS])
    return rows[1:], {best: DEFAULT if best == "table" else shaped(*tried[best])}


def shown(row: dict[str, Any]) -> str:
    """A shape and its time, in short."""
    return f"{row['tuning']}: " + ("failed" if row["ms"] is None else f"{row['ms']:.3f} ms")


def shaped(shape: tuple[int, int, int], programs: int) -> StepTuning:
    """The table with another shape of attention's programs."""
    block, warps, stages = shape
    config = AttentionConfig(block=block, num_warps=warps, num_stages=stages)
    return replace(DEFAULT, grouped=config, programs=programs, coded=config, coded_programs=programs)


def filled(model: Any, length: int, kind: str | None) -> KVCache:
    """A cache of one row with random contents and room for 128 tokens more."""
    cache = model.new_cache(1, length + 128, kind)
    for tensors in (cache.keys, cache.values):
        for tensor in tensors:
            if kind is None:
                tensor.normal_()
            else:
                tensor.random_(64, 192) if kind == "int8" else tensor.random_(0, 120)
    for tensors in (cache.key_scales, cache.value_scales):
        for tensor in tensors:
            tensor.fill_(0.02)
    return cache


def time_step(model: Any, cache: KVCache, length: int, rate: float, name: str, tuning: StepTuning) -> dict[str, Any]:
    """A captured step with so many tokens in the cache."""
    try:
        step = DecodeStep(model, cache, tuning=tuning)
        step.state.lengths.fill_(length)
        step.capture()
        step.state.lengths.fill_(length)
        spent = statistics.median(decode_steps.step_times(step, STEPS)[STEPS // 4 :])
    except Exception as error:  # a shape that does not fit must not lose the others
        return {"tuning": name, "error": str(error)[:300], "ms": None, "tokens_per_s": 0.0}
    num_bytes = quantize.step_bytes(model.config, 0) + cache.nbytes * length / cache.capacity
    bound = 1e12 * rate / num_bytes
    return {"tuning": name, "ms": spent, "tokens_per_s": 1e3 / spent, "bound": bound, "of_bound": 1e3 / spent / bound}


def check(name: str, model: Any, kind: str | None) -> dict[str, Any]:
    """Relative errors of a captured step's logits against the plain path's, over 24 steps after 300 tokens."""
    ids = torch.randint(5, 30000, (1, 324), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    caches = [model.new_cache(1, 512, kind) for _ in range(2)]
    for cache in caches:
        model(ids[:, :300], past_key_values=cache, logits_to_keep=1)
    step = DecodeStep(model, caches[0])
    step.capture()
    mine, plain = [], []
    for place in range(300, 324):
        step.state.tokens.copy_(ids[:, place])
        step.run()
        mine.append(step.logits.clone())
        plain.append(model(ids[:, place : place + 1], past_key_values=caches[1]).logits[:, 0].float())
    found, expected = torch.cat(mine), torch.cat(plain)
    exact = model(ids).logits[0, 300:].float()
    row = {
        "model": name,
        "kind": kind or "bfloat16",
        "step_error": float((found - expected).norm() / expected.norm()),
        "error": float((found - exact).norm() / exact.norm()),
    }
    print(
        f"{name} {row['kind']:9s}logits of a captured step against the plain path {row['step_error']:.1e}, "
        f"against no cache {row['error']:.1e}",
        flush=True,
    )
    return row


@torch.no_grad()
def quality(questions: int) -> list[dict[str, Any]]:
    """The small model: error of logits over text and pictures' answers, beside a cache in float32."""
    from phi35.api import SMALL_MODEL
    from vision.easy_vqa import evaluation_questions

    model, processor = phi35.load(SMALL_MODEL, device="cpu", dtype="float32")
    assert processor is not None
    text = Path(json.__file__).read_text() + Path(statistics.__file__).read_text()
    ids = torch.tensor(processor.tokenizer.encode(text)[: 8 * 512]).view(8, 512)
    exact = model(ids).logits
    split, every = evaluation_questions()
    asked = every[:: max(1, len(every) // questions)][:questions]
    prompts = [one.prompt for one in asked]
    pictures = [[split.image_paths[number] for number in one.images] for one in asked]
    rows: list[dict[str, Any]] = []
    plain: Any = None
    for kind in KINDS:
        logits = model(ids, past_key_values=model.new_cache(8, None, kind)).logits
        answers: Any = phi35.generate(prompts, images=pictures, model=(model, processor), kv_cache_dtype=kind)
        plain = answers if kind is None else plain
        same = sum(a == b for a, b in zip(answers, plain, strict=True)) / len(plain)
        rows.append(
            {
                "kind": kind or "float32",
                "logits_error": float((logits - exact).norm() / exact.norm()),
                "same_token": float((logits.argmax(-1) == exact.argmax(-1)).float().mean()),
                "same_answers": same,
                "right": sum(a.strip().lower() == q.answer for a, q in zip(answers, asked, strict=True)) / len(asked),
                "questions": len(asked),
            }
        )
        print(
            "  ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in rows[-1].items()
            )
        )
    return rows


if __name__ == "__main__":
    main()
