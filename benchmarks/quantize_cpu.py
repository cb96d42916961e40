"""The CPU's part of ``quantize.py``: whole models step by step in turns, and the kernels alone."""

import ctypes
import itertools
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers_peer

import phi35
from phi35 import presets
from phi35.quantization.codes import QuantizedTensor, round_to_nearest
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.cpu import native, pages

LAYERS = 8
PROMPT = 16

READ = """
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *p, size_t n, int threads) {
    uint64_t total = 0;
#pragma omp parallel for simd num_threads(threads) reduction(^ : total) schedule(static)
    for (size_t i = 0; i < n; i++) total ^= p[i];
    return total;
}
"""

Step = Callable[[], object]


def measure(small: bool, rounds: int, wanted: list[str] | None = None) -> dict[str, Any]:
    """Kernels, then whole models, with one thread and with two."""
    found: dict[str, Any] = {"kernel": native.missing() or native.best_variant(), "threads": {}}
    found["only_undisturbed_rounds"] = lulls["seconds"] > 0
    print(f"CPU kernel: {found['kernel']}", flush=True)
    before = torch.get_num_threads()
    sides = build(small, wanted)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found["threads"][threads] = {"kernels": kernels(small, rounds), "models": models(sides, small, rounds)}
    finally:
        torch.set_num_threads(before)
    report(found)
    return found


def reader() -> Callable[[torch.Tensor], None]:
    """Reads a tensor once on torch's threads, with the widest instructions the compiler finds."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("no C compiler (cc) on the PATH: the bound is measured by a plain read in C")
    folder = Path(tempfile.mkdtemp())
    (folder / "read.c").write_text(READ)
    flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, str(folder / "read.c"), "-o", str(folder / "read.so")], check=True)
    library = ctypes.CDLL(str(folder / "read.so"))
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda data: library.read_all(data.data_ptr(), data.nbytes // 8, torch.get_num_threads())


def in_turns(steps: dict[str, Step], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each side's calls, one after the other, round after round; with ``lulls``, of undisturbed rounds."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    end = time.monotonic() + lulls["seconds"]
    while min(map(len, spent.values())) < rounds + warm:
        others = lulls["seconds"] > 0 and wait_for_lull(end)
        times, before, start = {}, disturbance(), time.perf_counter()
        for name, call in steps.items():
            begin = time.perf_counter()
            call()
            times[name] = time.perf_counter() - begin
        if others and disturbance() - before > 0.05 * (time.perf_counter() - start) + 0.01:
            continue
        for name, value in times.items():
            spent[name].append(value)
    return {name: values[warm:] for name, values in spent.items()}


lulls = {"seconds": 0.0}
"""How long one comparison may wait for rounds in which other programs leave the processors alone; 0: any round."""


def disturbance() -> float:
    """Seconds of processor time that other programs have taken so far."""
    numbers = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = (sum(numbers[:8]) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:2])


def wait_for_lull(end: float) -> bool:
    """Sleep until others have left the processors alone for a moment."""
    while True:
        before = disturbance()
        time.sleep(0.15)
        if disturbance() - before <= 0.02:
            return True
        if time.monotonic() > end:
            raise SystemExit("other programs leave the processors no lull: wait, or measure without --lulls")


def summary(times: list[float]) -> dict[str, float]:
    """Median, lower quartile and least, in milliseconds."""
    ordered = sorted(1e3 * value for value in times)
    return {"median": statistics.median(ordered), "quartile": ordered[len(ordered) // 4], "least": ordered[0]}


def kernels(small: bool, rounds: int) -> dict[str, Any]:
    """A product of phi-3.5-mini's width in each way: GB/s of the weight's bytes."""
    rows, columns = (512, 1024) if small else (8192, 3072)
    size = 2**22 if small else 2**27
    read, hidden = reader(), torch.randn(1, columns).bfloat16()
    data = torch.zeros(2 * size, dtype=torch.uint8)
    parts = data.split(2**20 if small else 2**25)
    steps: dict[str, Step] = {}
    sizes: dict[str, int] = {}

    def add(name: str, num_bytes: int, call: Callable[[int], object]) -> None:
        turn = [0]

        def step() -> None:
            turn[0] += 1
            call(turn[0] % max(2, size // num_bytes))

        steps[name], sizes[name] = step, num_bytes

    add("read", parts[0].nbytes, lambda i: read(parts[i % len(parts)]))
    plain = [torch.randn(rows, columns).bfloat16() for _ in range(max(2, size // (2 * rows * columns)))]
    add("torch bfloat16", plain[0].nbytes, lambda i: torch.nn.functional.linear(hidden, plain[i % len(plain)]))
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = [torch._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(max(2, size // (rows * columns // 2)))]
    zeros = torch.rand(columns // 128, rows, 2).bfloat16()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    add("torch int4", packed[0].nbytes + zeros.nbytes, lambda i: product(hidden, packed[i % len(packed)], 128, zeros))
    for one in (WeightFormat(), WeightFormat(group_size=32), WeightFormat(symmetric=False), WeightFormat(bits=8)):
        weight = round_to_nearest(torch.randn(rows, columns), one, torch.bfloat16)
        num_bytes = sum(tensor.nbytes for tensor in weight.tensors().values())
        copies = [copied(weight) for _ in range(max(2, size // num_bytes))]
        for variant in [native.best_variant(), "avx2"] if one.label == "int4 g128" else [native.best_variant()]:
            add(
                f"{one.label} {variant}",
                num_bytes,
                lambda i, c=copies, v=variant: native.product(hidden, c[i % len(c)], None, v),
            )
    spent = in_turns(steps, rounds)
    return {name: {"gb_per_s": {k: sizes[name] / v / 1e6 for k, v in summary(spent[name]).items()}} for name in steps}


def copied(weight: QuantizedTensor) -> QuantizedTensor:
    """The same codes elsewhere."""
    return QuantizedTensor.of(weight.format, {suffix: tensor.clone() for suffix, tensor in weight.tensors().items()})


def build(small: bool, wanted: list[str] | None) -> dict[str, Any]:
    """Models of phi-3.5-mini's shape cut to 8 layers: ours by format, and transformers'."""
    config = presets.get("phi-3.5-mini").replace(num_hidden_layers=LAYERS)
    if small:
        config = config.replace(
            hidden_size=256,
            num_attention_heads=4,
            num_key_value_heads=4,
            rope_scaling=None,
            max_position_embeddings=4096,
            intermediate_size=512,
            vocab_size=1024,
            num_hidden_layers=2,
            eos_token_id=1,
            pad_token_id=1,
            stop_token_ids=(1,),
        )
    one, eight = WeightFormat(), WeightFormat(bits=8)
    formats = {
        "int4": QuantizationConfig(linear=one),
        "int4, head int8": QuantizationConfig(linear=one, head=eight, embedding=eight),
        "int4, head int4": QuantizationConfig(linear=one, head=one, embedding=one),
        "int8": QuantizationConfig(linear=eight),
        "bfloat16": None,
    }
    formats = {name: form for name, form in formats.items() if wanted is None or name in wanted}
    models = {name: phi35.create(config, quantization=form, dtype="bfloat16", seed=0) for name, form in formats.items()}
    return models | {"transformers": transformers_peer.build(config, "cpu", torch.bfloat16)}


@torch.inference_mode()
def models(sides: dict[str, Any], small: bool, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of each model, and the bytes that it reads."""
    steps = {name: stepper(name, model) for name, model in sides.items()}
    read, size = reader(), 2**22 if small else 2**26
    for kind, data in (("4 kB", filled(4 * size, large=False)), ("2 MB", filled(4 * size, large=True))):
        parts = itertools.cycle(data.split(size))
        steps[f"read {kind}"] = lambda parts=parts: read(next(parts))
    spent = in_turns(steps, rounds)
    rates = {kind: {k: size / v / 1e6 for k, v in summary(spent[f"read {kind}"]).items()} for kind in ("4 kB", "2 MB")}
    # The bound is the faster read's: the weights lie in large pages where the system has them.
    found: dict[str, Any] = {"reads": rates, "read_gb_per_s": max(rates.values(), key=lambda rate: rate["median"])}
    if "int4" in sides:
        found["int4 parts"] = parts_of(sides["int4"], steps["int4"], rounds)
    for name, model in sides.items():
        kept = [tensor for key, tensor in model.state_dict().items() if "embed_tokens" not in key]
        found[name] = {"ms": summary(spent[name]), "bytes": sum(tensor.nbytes for tensor in kept)}
        pairs = [theirs / mine for mine, theirs in zip(spent[name], spent["transformers"], strict=True)]
        found[name]["paired_ratio"] = statistics.median(pairs)
    return found


def filled(size: int, large: bool) -> torch.Tensor:
    """Bytes in pages of 2 MB or of 4 kB."""
    data = torch.empty(size, dtype=torch.uint8)
    if large and not pages.ask(data):
        print("this system gives no large pages")
    return data.fill_(1)


def parts_of(model: Any, step: Step, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step's parts: the layers' one call of the kernel, the head's, and what lies around them."""
    spent: dict[str, list[float]] = {"layers in C": [], "head": [], "around": []}
    real = native.step, native.bfloat16_product

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            start = time.perf_counter()
            result = call(*given)
            spent[name].append(time.perf_counter() - start)
            return result

        return run

    native.step, native.bfloat16_product = timed("layers in C", real[0]), timed("head", real[1])
    try:
        for _ in range(rounds):
            if lulls["seconds"] > 0:
                wait_for_lull(time.monotonic() + lulls["seconds"])
            start = time.perf_counter()
            step()
            whole = time.perf_counter() - start
            spent["around"].append(
                whole - sum(times[-1] for name, times in spent.items() if name != "around" and times)
            )
    finally:
        native.step, native.bfloat16_product = real
    return {name: summary(times) for name, times in spent.items() if times}


def stepper(name: str, model: Any) -> Step:
    """One more token at each call."""
    prompt, token = torch.arange(2, 2 + PROMPT)[None], torch.tensor([[5]])
    if name != "transformers":
        cache = model.new_cache(1, 512)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        return lambda: model(token, past_key_values=cache).logits
    from transformers import DynamicCache

    past = DynamicCache(config=model.config)
    model(prompt, past_key_values=past, use_cache=True)
    return lambda: model(token, past_key_values=past, use_cache=True).logits


def report(found: dict[str, Any]) -> None:
    """Tables, and the ratios at each side's best number of threads."""
    for threads, part in found["threads"].items():
        print(f"\n{threads} thread(s): GB/s of weights, median / lower quartile of time / best")
        for name, row in part["kernels"].items():
            print(f"  {name:24s}" + " / ".join(f"{value:6.1f}" for value in row["gb_per_s"].values()))
        rate = part["models"]["read_gb_per_s"]
        for kind, row in part["models"]["reads"].items():
            print(f"  a read in pages of {kind}: " + " / ".join(f"{value:.1f}" for value in row.values()) + " GB/s")
        for name, row in part["models"].get("int4 parts", {}).items():
            print(f"  of int4's step, {name}: " + " / ".join(f"{value:.2f}" for value in row.values()) + " ms")
        print("  step, ms: median / quartile / best; ratio to transformers, pair by pair; share of the bound at best")
        for name, row in part["models"].items():
            if "ms" not in row:
                continue
            bound = row["bytes"] / rate["least"] / 1e6
            row["of_bound"] = {key: row["bytes"] / rate[key] / 1e6 / row["ms"][key] for key in rate}
            print(
                f"  {name:24s}"
                + " / ".join(f"{value:7.1f}" for value in row["ms"].values())
                + f"   {row['paired_ratio']:5.2f}   {100 * bound / row['ms']['least']:5.1f} % of {bound:.1f} ms"
            )
    best = {
        name: {
            key: min(part["models"][name]["ms"][key] for part in found["threads"].values())
            for key in ("median", "least")
        }
        for name in found["threads"][1]["models"]
        if "ms" in found["threads"][1]["models"][name]
    }
    found["best_threads"] = {
        name: {key: best["transformers"][key] / value for key, value in row.items()} for name, row in best.items()
    }
    print("\ntimes transformers, each at its best number of threads (median, least):")
    for name, row in found["best_threads"].items():
        print(f"  {name:24s}{row['median']:6.2f}{row['least']:6.2f}")
