"""Block-sparse attention of phi-3-small on one GPU: correct, and how fast beside dense attention.

    python benchmarks/block_sparse.py            # checks, attention by length, whole models; needs a GPU
    python benchmarks/block_sparse.py --small    # a tiny pattern on any device: shows that it runs

bfloat16. Checks compare FlexAttention with exact masks in float32 (forward, gradients, a later chunk of a prompt), and
a captured step's logits with the model's own pass and with the same weights in float32, which the step may miss by
1.25 times what the model's own pass misses it by. Attention is timed alone, forward and with gradients, beside
torch's fused causal attention on the same tensors, which sees more; "pairs" is the share of the causal pairs that the
pattern sees. --tiles times other tiles of FlexAttention's kernels, and kernels built for one length. "kernels" counts
what torch compiled. Medians after warm-up. Prints rows and, last, one JSON line; a case that fails is printed and the
others go on.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import moe_layer  # noqa: E402

import phi35  # noqa: E402
from phi35 import block_sparse, flex_kernels, presets  # noqa: E402
from phi35.block_sparse import BlockPattern, BlockSparsePlan, attend_block_sparse, block_pattern, plan_sequence  # noqa: E402
from phi35.generation.fast_prefill import Prompt, prefill  # noqa: E402
from phi35.generation.fast_step import DecodeStep  # noqa: E402
from phi35.parameter_count import count_parameters  # noqa: E402
from phi35.training.acceleration import fast_attention, fuse  # noqa: E402

HEADS, GROUPS, WIDTH = 32, 8, 128
FORWARD = {"BLOCK_M": 128, "BLOCK_N": 64}
TILES: list[tuple[str, bool, int, bool, dict[str, Any]]] = [
    # name, with gradients, keys of a block, one length alone, options
    ("as it is", False, 64, False, FORWARD),
    ("one length", False, 64, True, FORWARD),
    ("divisible", False, 64, False, FORWARD | {"IS_DIVISIBLE": True}),
    ("4 warps", False, 64, False, FORWARD | {"IS_DIVISIBLE": True, "num_warps": 4, "num_stages": 3}),
    ("as it is", True, 128, False, {}),
    ("one length", True, 128, True, {}),
    ("divisible", True, 128, False, {"IS_DIVISIBLE": True}),
    *(
        (
            f"64 keys, {m1} {n1} {m2} {n2}, {warps} warps, {stages} stages",
            True,
            64,
            False,
            {"IS_DIVISIBLE": True, "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64}
            | {"bwd_BLOCK_M1": m1, "bwd_BLOCK_N1": n1, "bwd_BLOCK_M2": m2, "bwd_BLOCK_N2": n2}
            | {"bwd_num_warps": warps, "bwd_num_stages": stages},
        )
        for m1, n1, m2, n2, warps, stages in (
            (64, 64, 64, 64, 4, 2),
            (64, 64, 64, 64, 4, 3),
            (64, 64, 64, 64, 8, 2),
            (64, 64, 128, 64, 8, 2),
            (64, 64, 128, 64, 4, 2),
            (32, 64, 64, 32, 4, 3),
        )
    ),
]
"""What --tiles compares."""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768, 131072])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a tiny pattern and model, on any device")
    parser.add_argument("--tiles", type=int, metavar="LENGTH", help="time other tiles too, at this length")
    parser.add_argument("--no-models", action="store_true", help="attention alone")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.small:
        raise SystemExit("no CUDA device is visible; --small runs a tiny pattern on the CPU")
    record: dict[str, Any] = {"environment": moe_layer.environment(device, arguments.commit), "failed": {}}
    record["environment"]["command"] = " ".join(["python", "benchmarks/block_sparse.py", *sys.argv[1:]])
    preset = presets.get("tiny-phi-3-small-8k" if arguments.small else "phi-3-small-8k")
    pattern = block_pattern(preset)
    assert pattern is not None
    lengths = [200, 300] if arguments.small else arguments.lengths
    record["checks"] = attempt(record, "checks", lambda: checks(pattern, device)) or []
    record["attention"] = []
    for length in lengths:
        for gradients in (False, True):
            name = f"attention {length}{' with gradients' if gradients else ''}"
            row = attempt(
                record, name, lambda n=length, g=gradients: time_attention(pattern, n, g, device, arguments.rounds)
            )  # type: ignore[misc]
            if row:
                record["attention"].append(row)
                print(
                    {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()},
                    flush=True,
                )
    if arguments.tiles:
        record["tiles"] = time_tiles(record, pattern, arguments.tiles, device, arguments.rounds)
    if not arguments.no_models:
        for name, run in (("chunks", model_chunks), ("step", model_step), ("training", model_training)):
            record[name] = attempt(record, name, lambda f=run: f(arguments.small, device))  # type: ignore[misc]
            print(name, record[name], flush=True)
        step = record["step"]
        if step and step["captured_error"] > 1.25 * step["own_error"] + 1e-5:
            record["failed"]["step"] = "the captured step misses float32 by more than the model's own pass does"
    record["kernels"] = counted()
    print("kernels", record["kernels"])
    line = json.dumps(record)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(line)


def attempt(record: dict[str, Any], name: str, run: Callable[[], Any]) -> Any:
    """The result of a case, or None and a note where it fails."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        record["failed"][name] = f"{type(error).__name__}: {error}"[:500]
        print(f"FAILED {name}: {record['failed'][name]}", flush=True)
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def draw(length: int, num_keys: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator(device).manual_seed(length)
    shapes = ((1, HEADS, length, WIDTH), (1, GROUPS, num_keys, WIDTH), (1, GROUPS, num_keys, WIDTH))
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


def checks(pattern: BlockPattern, device: torch.device) -> list[dict[str, Any]]:
    """Relative errors of outputs and gradients against exact masks in float32."""
    scale, rows = 1.0 / WIDTH, []
    size = pattern.dense_length
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for first, length in (
        (0, size + 500),
        (0, 3 * size),
        (size + 37, size),
        (5 * size, 129),
        (2 * size, 7),
        (2 * size, 1),
    ):
        num_keys = first + length
        given = draw(length, num_keys, device, dtype)
        plan = plan_sequence(pattern, (0, HEADS), first, length, num_keys, device)
        queries = torch.arange(first, num_keys, device=device)[None]
        keys = torch.arange(num_keys, device=device)[None]
        exact = BlockSparsePlan(pattern=pattern, queries=queries, keys=keys, heads=(0, HEADS))
        results = []
        for use, kind in ((plan, dtype), (exact, torch.float32)):
            tensors = [tensor.to(kind).requires_grad_() for tensor in given]
            out = attend_block_sparse(*tensors, use, scale)
            # A loss that weighs all places differently.
            weights = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
            grads = torch.autograd.grad((out.float() * weights).sum(), tensors)
            results.append([out.detach().float(), *(grad.float() for grad in grads)])
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
        with torch.no_grad():  # FlexAttention in smaller blocks
            plan = plan_sequence(pattern, (0, HEADS), first, length, num_keys, device)
            out = attend_block_sparse(*given, plan, scale).float()
        errors.append(float((out - results[1][0]).norm() / results[1][0].norm()))
        row = {"first": first, "length": length, "form": "flex" if plan.flex is not None else "mask"}
        row |= {"output": errors[0], "gradients": max(errors[1:4]), "output without gradients": errors[4]}
        print("check", rounded(row, 5), flush=True)
        rows.append(row)
    return rows


def time_attention(
    pattern: BlockPattern, length: int, gradients: bool, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Milliseconds of one layer's attention, sparse and dense."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = [tensor.requires_grad_(gradients) for tensor in draw(length, length, device, dtype)]

    def make() -> BlockSparsePlan:
        with torch.set_grad_enabled(gradients):
            return plan_sequence(pattern, (0, HEADS), 0, length, length, device)

    planned, plan = timed(make, device, rounds), make()

    def run(attend: Callable[[], torch.Tensor]) -> None:
        with torch.set_grad_enabled(gradients):
            out = attend()
        if gradients:
            torch.autograd.grad(out, tensors, torch.ones_like(out))

    def dense() -> torch.Tensor:
        with fast_attention(device):
            return F.scaled_dot_product_attention(*tensors, is_causal=True, scale=1.0 / WIDTH, enable_gqa=True)

    sparse_time = timed(lambda: run(lambda: attend_block_sparse(*tensors, plan, 1.0 / WIDTH)), device, rounds)
    dense_time = timed(lambda: run(dense), device, rounds)
    pairs = pattern.num_pairs(length, HEADS) / (HEADS * length * (length + 1) / 2)
    return {
        "length": length,
        "gradients": gradients,
        "sparse_ms": 1e3 * sparse_time,
        "dense_ms": 1e3 * dense_time,
        "speedup": dense_time / sparse_time,
        "pairs": pairs,
        "plan_ms": 1e3 * planned,
    }


def time_tiles(
    record: dict[str, Any], pattern: BlockPattern, length: int, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Milliseconds with other tiles of the kernels, and how far their results are from those in use."""
    rows: list[dict[str, Any]] = []
    base: dict[bool, list[torch.Tensor]] = {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, gradients, key_block, fixed, options in TILES:

        def measure(
            gradients: bool = gradients, key_block: int = key_block, fixed: bool = fixed, options: Any = options
        ) -> dict[str, Any]:
            tensors = [tensor.requires_grad_(gradients) for tensor in draw(length, length, device, dtype)]
            blocks = block_sparse.flex_blocks(
                pattern,
                (0, HEADS),
                0,
                length,
                length,
                device,
                gradients=gradients,
                key_block=key_block,
                options=options,
            )
            blocks = dataclasses.replace(blocks, fixed_lengths=fixed)

            def run() -> list[torch.Tensor]:
                with torch.set_grad_enabled(gradients):
                    out = flex_kernels.attend_flex(*tensors, blocks, 1.0 / WIDTH)
                return [out, *torch.autograd.grad(out, tensors, out.detach())] if gradients else [out]

            began = time.perf_counter()
            found = [tensor.detach().float() for tensor in run()]
            synchronise(device)
            built = time.perf_counter() - began
            wanted = base.setdefault(gradients, found)
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
            return {"ms": 1e3 * timed(run, device, rounds), "difference": error, "build_s": built}

        kind = f"{'with gradients' if gradients else 'forward'}: {name}"
        row = attempt(record, f"tiles, {kind}", measure)
        if row:
            rows.append({"tiles": kind, **row})
            print(rounded(rows[-1], 4), flush=True)
    return rows


def counted() -> dict[str, int]:
    """Ways in which FlexAttention was called, and graphs that torch compiled."""
    from torch._dynamo.utils import counters

    ways = flex_kernels.compiled.cache_info().currsize
    return {"ways": ways, "graphs": int(counters["stats"]["unique_graphs"])}


def model_chunks(small: bool, device: torch.device) -> dict[str, Any]:
    """Last logits of a long prompt: in one chunk, in several, and with exact masks alone."""
    model, length = build(small, device, 4), 300 if small else 6000
    ids = torch.randint(3, 1000, (1, length), device=device, generator=torch.Generator(device).manual_seed(0))
    results = {}
    with torch.no_grad():
        results["one"] = model(ids, logits_to_keep=1).logits[0, -1].float()
        cache, start = model.new_cache(1), 0
        for size in (length // 3, length // 2, length - length // 3 - length // 2):
            logits = model(ids[:, start : start + size], past_key_values=cache, logits_to_keep=1).logits
            start += size
        results["chunks"] = logits[0, -1].float()
        kept = block_sparse.FLEX_QUERY_BLOCK
        block_sparse.FLEX_QUERY_BLOCK = 2**40  # no chunk is long enough: exact masks
        results["masks"] = model(ids, logits_to_keep=1).logits[0, -1].float()
        block_sparse.FLEX_QUERY_BLOCK = kept
    real = [token for token in range(model.config.vocab_size) if token not in set(model.config.dummy_token_indices)]
    base = results["masks"][real]
    return {name: float((results[name][real] - base).norm() / base.norm()) for name in ("one", "chunks")}


def model_step(small: bool, device: torch.device) -> dict[str, Any]:
    """Decoding by a captured step: its logits beside the model's own pass, and tokens a second beside the loop."""
    model, length, new = build(small, device, None), 200 if small else 2000, 8 if small else 128
    ids = torch.randint(3, 1000, (1, length), device=device, generator=torch.Generator(device).manual_seed(0))
    result: dict[str, Any] = {"parameters": count_parameters(model.config).total}
    plain = device.type == "cpu"
    cache = model.new_cache(1, length + 16)
    prefill(model, cache, [Prompt(ids[0].tolist(), None, 0, False)], plain=plain)
    cache.lengths.fill_(length)
    step = DecodeStep(model, cache, plain=plain)
    if not plain:
        step.capture()
    real = torch.ones(model.config.vocab_size, dtype=torch.bool, device=device)
    real[list(model.config.dummy_token_indices)] = False
    steps, own = [], []
    for token in (7, 8, 9, 10):
        ids = torch.cat((ids, torch.tensor([[token]], device=device)), dim=1)
        step.state.tokens.fill_(token)
        step.run()
        steps.append(step.logits[0, real].clone())
        with torch.no_grad():
            own.append(model(ids, logits_to_keep=1).logits[0, -1, real].float())
    result["step_error"] = distance(steps, own)
    for name, fast in (("captured", None), ("loop", False)):
        times = []
        for count in (1, new + 1, 1, new + 1):  # the first two compile and capture
            synchronise(device)
            began = time.perf_counter()
            model.generate(ids, max_new_tokens=count, stop_token_ids=(), fast=fast)
            synchronise(device)
            times.append(time.perf_counter() - began)
        result[f"{name}_tokens_per_second"] = new / (times[3] - times[2])
    del step, cache
    model.float()
    with torch.no_grad():
        wanted = [model(ids[:, : length + count], logits_to_keep=1).logits[0, -1, real] for count in range(1, 5)]
    return result | {"captured_error": distance(steps, wanted), "own_error": distance(own, wanted)}


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest relative difference."""
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True))


def model_training(small: bool, device: torch.device) -> dict[str, Any]:
    """A training pass of a few layers: tokens a second, sparse and with all layers dense."""
    length = 150 if small else 8192
    result: dict[str, Any] = {}
    for name, changes in (("sparse", {}), ("dense", {"blocksparse_block_size": 0})):
        model = build(small, device, 4, attention_dropout=0.0, **changes).train()
        fuse(model, device.type == "cuda")
        ids = torch.randint(3, 1000, (1, length), device=device)

        def step(model: Any = model, ids: torch.Tensor = ids) -> None:
            with fast_attention(device):
                model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad(set_to_none=True)

        before = counted()
        result[f"{name}_tokens_per_second"] = length / timed(step, device, 3)
        result[f"{name}_kernels"] = {kind: count - before[kind] for kind, count in counted().items()}
        del model
    return result


def build(small: bool, device: torch.device, num_layers: int | None, **changes: Any) -> Any:
    """phi-3-small with random weights, whole or cut."""
    name = "tiny-phi-3-small-8k" if small else "phi-3-small-8k"
    if num_layers is not None and not small:
        changes["num_hidden_layers"] = num_layers
    return phi35.create(name, device=device, seed=0, **changes)


def rounded(row: dict[str, Any], digits: int) -> dict[str, Any]:
    """A row as it is printed."""
    return {key: round(value, digits) if isinstance(value, float) else value for key, value in row.items()}


def timed(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median seconds after two warm-ups."""
    times = []
    for turn in range(rounds + 2):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        if turn > 1:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
