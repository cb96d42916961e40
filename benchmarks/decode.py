"""Decoding on one GPU: tokens per second beside transformers and beside what the memory allows.

    python benchmarks/decode.py                         # the table of docs/inference.md
    python benchmarks/decode.py --kernels --step        # each kernel alone, then whole steps

Greedy, bfloat16, random weights drawn on the device, warm. The bound is the measured rate of a device copy over the
bytes that a step must read: all weights but the embedding (of a sparse model the chosen experts'), and keys and values
of the mean length. transformers: a static cache and its compiled forward pass for one row, its default for batches.
Prints a table and, last, one JSON line.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import decode_kernels  # noqa: E402
import decode_steps  # noqa: E402
import moe_layer  # noqa: E402
import transformers_peer  # noqa: E402

import phi35  # noqa: E402
from phi35 import presets  # noqa: E402
from phi35.cache_codes import KINDS  # noqa: E402
from phi35.generation import step_pool  # noqa: E402
from phi35.generation.decoding import Decoding  # noqa: E402

PRESETS = {"mini": "phi-3.5-mini", "moe": "phi-3.5-moe", "vision": "phi-3.5-vision"}
SMALL = {"mini": "tiny-phi-3.5-mini", "moe": "tiny-phi-3.5-moe", "vision": "tiny-phi-3.5-vision"}


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: what it is.
        model: "mini", "moe" or "vision".
        lengths: prompt lengths, one a row.
        new_tokens: tokens added to each row.
        images: pictures of 672 x 672 (5 crops each) before the text of each row.
        peer: "static", "dynamic" or None.
    """

    name: str
    model: str
    lengths: tuple[int, ...]
    new_tokens: int
    images: int = 0
    peer: str | None = None


def mixed(rows: int) -> tuple[int, ...]:
    """Prompt lengths from 32 to 512, the same at every call."""
    drawn = torch.randint(32, 513, (rows,), generator=torch.Generator().manual_seed(rows))
    return tuple(drawn.tolist())


CASES = [
    Case("mini, 128 + 512", "mini", (128,), 512, peer="static"),
    Case("mini, 32k + 128", "mini", (32640,), 128),
    *(Case(f"mini, {rows} rows", "mini", mixed(rows), 128, peer="dynamic") for rows in (8, 32, 128)),
    Case("vision, 1 image + 512", "vision", (64,), 512, images=1),
    Case("mini, 128k + 128", "mini", (130816,), 128),
    Case("moe, 128 + 512", "moe", (128,), 512, peer="static"),
    Case("moe, 32k + 128", "moe", (32640,), 128),
    *(Case(f"moe, {rows} rows", "moe", mixed(rows), 128, peer="dynamic") for rows in (8, 32)),
]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--cases", nargs="+", help="parts of names of cases, e.g. '128 + 512' 'rows'")
    parser.add_argument("--kv-cache-dtype", choices=KINDS, help="ours with keys and values in eight bits")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--kernels", action="store_true", help="each kernel alone, instead of the table")
    parser.add_argument("--step", action="store_true", help="whole steps, instead of the table")
    parser.add_argument("--sweep", action="store_true", help="with --step: by several shapes of the programs too")
    parser.add_argument(
        "--small", action="store_true", help="tiny models and lengths: shows that it runs, on a CPU too"
    )
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.small:
        raise SystemExit("no CUDA device is visible; --small runs tiny models on the CPU")
    record: dict[str, Any] = {"environment": moe_layer.environment(device, arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]])
    record["kv_cache_dtype"] = arguments.kv_cache_dtype
    record["copy_tb_per_s"] = rate = moe_layer.copy_rate(device) if device.type == "cuda" else 0.01
    print(f"{record['environment']['device']}: copy {rate:.3f} TB/s", flush=True)
    chosen = [model for model in arguments.models if model in decode_kernels.PRESETS]
    if arguments.kernels:
        record["kernels"] = decode_kernels.measure(chosen, rate)
    if arguments.step:
        for model in chosen:
            attempt(record, model, lambda m=model: decode_steps.check_steps(m, PRESETS[m]))
            kernels = record.get("kernels", [])
            attempt(
                record,
                model,
                lambda m=model, k=kernels: decode_steps.time_steps(m, PRESETS[m], k, rate, arguments.sweep),
            )
    if not arguments.kernels and not arguments.step:
        table(record, arguments, device)
    line = json.dumps(record)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(line)


def table(record: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """All cases of ours model by model, then transformers'."""
    wanted = [case for case in CASES if case.model in arguments.models]
    if not arguments.cases:
        wanted = [case for case in wanted if "128k" not in case.name]  # a minute by itself
    else:
        wanted = [case for case in wanted if any(part in case.name for part in arguments.cases)]
    if arguments.small:
        wanted = [Case(c.name, c.model, tuple(min(n, 20) for n in c.lengths[:3]), 6, c.images, c.peer) for c in wanted]
    names = SMALL if arguments.small else PRESETS
    sides = ["ours"] if arguments.no_peer else ["ours", "transformers"]
    for side in sides:
        for model in dict.fromkeys(case.model for case in wanted):
            cases = [case for case in wanted if case.model == model and (side == "ours" or case.peer)]
            if not cases:
                continue
            built = attempt(record, model, lambda s=side, m=model: build(s, names[m], device))
            for case in cases if built is not None else []:
                attempt(record, case.name, lambda s=side, c=case, b=built: time_case(s, c, b, record, device))
            del built
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    report(record)


def attempt(record: dict[str, Any], name: str, call: Callable[[], Any]) -> Any:
    """Run one part; a failure is printed and kept, and the others go on."""
    try:
        found = call()
    except Exception as error:  # one failure must not lose the other cases
        text = f"{type(error).__name__}: {error}"[:500]
        print(f"{name}: FAILED {text}", flush=True)
        record.setdefault("failures", []).append({"name": name, "error": text})
        return None
    if isinstance(found, dict | list):
        record.setdefault("rows", []).extend([found] if isinstance(found, dict) else found)
    return found


def build(side: str, preset: str, device: torch.device) -> Any:
    """A model of either side."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if side == "ours":
        return phi35.create(preset, device=device, dtype=dtype, seed=0)
    return transformers_peer.build(presets.get(preset), device.type, dtype)


def time_case(side: str, case: Case, model: Any, record: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One case of one side."""
    row: dict[str, Any] = {"case": case.name, "side": side, "rows": len(case.lengths), "new_tokens": case.new_tokens}
    batch = draw_batch(case, model.config.vocab_size, device)
    if side == "transformers":
        row |= transformers_peer.decode_rate(model, batch, case.new_tokens, case.peer == "static")
        row["cache"] = case.peer
    else:
        kind = record["kv_cache_dtype"]
        row |= ours(case, model, batch, device, kind) | {"kv_cache_dtype": kind}
        length = sum(row.pop("prompt_tokens")) / len(case.lengths) + case.new_tokens / 2
        num_bytes = decode_steps.step_bytes(model.config, length, len(case.lengths), kind)
        row["bound"] = 1e12 * record["copy_tb_per_s"] * len(case.lengths) / num_bytes
        row["of_bound"] = row["tokens_per_s"] / row["bound"]
    print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    return row


def draw_batch(case: Case, vocab: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random ids, padded on the left, and random crops."""
    longest = max(case.lengths)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(vocab, 30000) - 64, (len(case.lengths), longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(case.lengths)[:, None]).long()
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def ours(
    case: Case, model: Any, batch: dict[str, torch.Tensor], device: torch.device, kind: str | None
) -> dict[str, Any]:
    """Tokens per second through the decoding loop that ``generate`` is; the second run counts."""
    if case.images:
        batch = with_images(case, model, batch, device)
    found: dict[str, Any] = {}
    for turn in range(3):
        if turn == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        transformers_peer.synchronise()
        start = time.perf_counter()
        options = {"max_new_tokens": case.new_tokens, "stop_token_ids": (), "kv_cache_dtype": kind}
        decoding = Decoding(model, **batch, **options)
        decoding.step()
        first = time.perf_counter()
        decoding.step()  # before it a step that is not kept is captured, which is warm-up
        second = time.perf_counter()
        while not decoding.done:
            decoding.step()
        end = time.perf_counter()
        if turn == 0:
            found["warm_up_s"] = end - start
    rows = len(case.lengths)
    found |= {
        "tokens_per_s": rows * (case.new_tokens - 2) / (end - second),
        "call_tokens_per_s": rows * case.new_tokens / (end - start),
        "first_token_s": first - start,
        "second_token_s": second - first,
        "steps": type(decoding._steps).__name__,
        "prompt_tokens": [row.prompt_length for row in decoding.rows],
    }
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    step_pool.drop(model)
    return found


def with_images(
    case: Case, model: Any, batch: dict[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """The batch with pictures before each row's text."""
    vision = model.config.vision
    side, rows = 2 * vision.image_size, len(case.lengths)
    sizes = torch.tensor([[side, side]] * (rows * case.images))
    shape = (5 * rows * case.images, 3, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, device=device, dtype=model.dtype)
    with torch.no_grad():
        counts = [len(one) for one in model.image_features(pixels, sizes)]
    marks = torch.tensor([[-1 - number for number in range(case.images) for _ in range(counts[number])]] * rows)
    ids = torch.cat((marks.to(device), batch["input_ids"]), dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}


def report(record: dict[str, Any]) -> None:
    """The table."""
    rows = record.get("rows", [])
    print(f"{'case':26s}{'ours':>10s}{'bound':>10s}{'':>8s}{'transformers':>14s}{'times':>8s}   tokens/s")
    for mine in (row for row in rows if row.get("side") == "ours"):
        theirs = [row for row in rows if row.get("side") == "transformers" and row["case"] == mine["case"]]
        line = f"{mine['case']:26s}{mine['tokens_per_s']:10.1f}{mine['bound']:10.1f}{100 * mine['of_bound']:7.1f}%"
        if theirs:
            line += f"{theirs[0]['tokens_per_s']:14.1f}{mine['tokens_per_s'] / theirs[0]['tokens_per_s']:8.2f}"
            calls = mine["call_tokens_per_s"], theirs[0]["call_tokens_per_s"]
            line += f"   whole call {calls[0]:.1f} / {calls[1]:.1f} = {calls[0] / calls[1]:.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
