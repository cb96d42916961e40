"""Whole captured steps: their error, and their time by several shapes of the kernels' programs."""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

import phi35
from phi35 import presets
from phi35.cache_codes import cache_bytes
from phi35.config import ModelConfig
from phi35.generation.fast_step import DecodeStep
from phi35.kernels.configs import VectorConfig
from phi35.kernels.tuning import DEFAULT, StepTuning

FIELDS = {
    "qkv": "qkv",
    "o_proj": "short_add",
    "down": "long_add",
    "gate_up": "gate_up",
    "logits": "logits",
    "expert_gate_up": "expert_gate_up",
    "expert_down": "expert_down",
}
"""Kernels of ``decode_kernels`` and the fields of ``StepTuning`` that they choose."""


def step_bytes(config: ModelConfig, length: float, batch: int = 1, kv_cache_dtype: str | None = None) -> float:
    """Bytes that a step reads: weights but the embedding, and keys and values of ``length`` tokens a row.

    Of a sparse layer the chosen experts count: of a batch the expected number of different ones.
    """
    layers = phi35.create(config, device="meta", dtype="bfloat16").model.layers
    total = float(config.vocab_size * config.hidden_size)
    chosen = 1.0
    if config.is_sparse:
        chosen = 1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** batch
    for layer in layers:
        for name, parameter in layer.named_parameters():
            total += parameter.numel() * (chosen if ".experts." in name else 1.0)
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.attention_head_dim
    per_token = cache_bytes(kv, config.attention_head_dim, kv_cache_dtype, torch.bfloat16)
    return 2 * total + batch * per_token * length


RESIDENT = {(4, 4): 528, (8, 4): 396, (4, 8): 264, (2, 8): 528, (2, 4): 528, (4, 2): 924}
"""Programs of a config (rows, warps) that 132 multiprocessors hold at once, by their registers."""


def with_waves(tuning: StepTuning, ahead: int) -> StepTuning:
    """The same shapes, with so many waves of weights asked for ahead."""
    changes = {}
    for name in set(FIELDS.values()) - {"expert_gate_up"}:
        config = getattr(tuning, name)
        wave = RESIDENT.get((config.rows, config.num_warps), 396) if ahead else 0
        changes[name] = replace(config, wave=wave, ahead=max(1, ahead))
    return replace(tuning, **changes)


def variants(base: StepTuning) -> dict[str, StepTuning]:
    """What prefetching gives, part by part, and shapes of attention over few keys."""
    mib = 2**20
    bare = with_waves(replace(base, ahead_bytes=0), 0)
    found = {
        "bare": bare,
        "attention 19": replace(bare, ahead_bytes=19 * mib),
        "attention 32": replace(bare, ahead_bytes=32 * mib),
        "attention 44": replace(bare, ahead_bytes=44 * mib),
        "waves 1": with_waves(bare, 1),
        "waves 2": with_waves(bare, 2),
    }
    for size in (19, 32):
        for ahead in (1, 2):
            found[f"both {size} {ahead}"] = replace(with_waves(bare, ahead), ahead_bytes=size * mib)
    both = found["both 32 1"]
    found["few programs"] = replace(both, programs=128)
    found["many programs"] = replace(both, programs=512)
    found["two warps"] = replace(both, one=replace(both.one, num_warps=2))
    found["two stages"] = replace(
        both, one=replace(both.one, num_stages=2), grouped=replace(both.grouped, num_stages=2)
    )
    found["wide blocks"] = replace(both, one=replace(both.one, block=64, num_warps=8, num_stages=2))
    return found


def best_tuning(kernels: list[dict[str, Any]], model: str) -> StepTuning:
    """The fastest right shapes of the kernels' table."""
    found: dict[str, Any] = {}
    for kernel, name in FIELDS.items():
        rows = [row for row in kernels if (row["model"], row["kernel"]) == (model, kernel)]
        rows = [row for row in rows if row.get("pdl") and row.get("error", 1) < 0.02]
        if rows:
            best = min(rows, key=lambda row: row["us"])
            found[name] = VectorConfig(*map(int, best["config"].split()))
    return StepTuning(**found)


def time_steps(
    model: str, preset: str, kernels: list[dict[str, Any]], copy_rate: float, sweep: bool
) -> list[dict[str, Any]]:
    """Captured steps of one row at 384 tokens in the cache: by the table, by the best found, without early launch."""
    loaded = phi35.create(preset, device="cuda", dtype="bfloat16", seed=0)
    bound = 1e12 * copy_rate / step_bytes(loaded.config, 384)
    tunings = [("table", DEFAULT, True), ("table, no pdl", DEFAULT, False)]
    base = DEFAULT
    if kernels:
        base = best_tuning(kernels, model)
        tunings.append(("best found", base, True))
    if sweep:
        tunings += [(name, tuning, True) for name, tuning in variants(base).items()]
    rows = []
    for name, tuning, pdl in tunings:
        cache = loaded.new_cache(1, 1024)
        step = DecodeStep(loaded, cache, tuning=tuning, pdl=pdl)
        step.state.lengths.fill_(384 - 64)
        start = time.perf_counter()
        step.capture()
        captured = time.perf_counter() - start
        spent = statistics.median(step_times(step)[16:])
        rate = 1e3 / spent
        row = {"model": model, "step": name, "ms": spent, "tokens_per_s": rate, "bound": bound}
        rows.append(row | {"of_bound": rate / bound, "capture_s": captured, "tuning": str(tuning)})
        print(
            f"{model}: step ({name}) {spent:.3f} ms, {rate:.1f} tokens/s, {100 * rate / bound:.1f} % of {bound:.1f}; "
            f"warm-up and capture {captured:.2f} s",
            flush=True,
        )
        del step, cache
    return rows


def step_times(step: DecodeStep, count: int = 128) -> list[float]:
    """Milliseconds of replays that follow each other."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step.run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events[:-1], events[1:], strict=True)]


@torch.no_grad()
def check_steps(model: str, preset: str) -> dict[str, Any]:
    """Relative errors of bfloat16 logits over 2 layers against float32: the captured step and the plain path."""
    config = presets.get(preset).replace(num_hidden_layers=2)
    narrow = phi35.create(config, device="cuda", dtype="bfloat16", seed=1)
    wide = phi35.create(config, device="cuda", dtype="float32")
    wide.load_state_dict(narrow.state_dict())
    row: dict[str, Any] = {"model": model}
    for batch in (1, 3):
        ids = torch.randint(5, 30000, (batch, 160), device="cuda")
        expected = wide(ids).logits[:, 100:]
        caches = [narrow.new_cache(batch, 256) for _ in range(2)]
        for cache in caches:
            narrow(ids[:, :100], past_key_values=cache)
        step = DecodeStep(narrow, caches[0])
        step.capture()
        mine, plain = [], []
        for place in range(100, 160):
            step.state.tokens.copy_(ids[:, place])
            step.run()
            mine.append(step.logits.clone())
            plain.append(narrow(ids[:, place : place + 1], past_key_values=caches[1]).logits[:, 0].float())
        for name, found in (("step", mine), ("plain", plain)):
            row[f"{name} {batch}"] = float((torch.stack(found, dim=1) - expected).norm() / expected.norm())
    shown = ", ".join(f"{name} {value:.2e}" for name, value in row.items() if name != "model")
    print(f"{model}: logits against float32, two layers: {shown}", flush=True)
    return row
