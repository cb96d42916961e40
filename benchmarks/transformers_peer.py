"""transformers' models with random weights and our configs' sizes, and how fast they generate and read prompts.

Built on the device. ``static`` generation is what its guide recommends for speed: a static cache and the compiled
forward pass that comes with it.
"""

import time
from typing import Any

import torch

from phi35.config import ModelConfig

COMMON = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "rms_norm_eps max_position_embeddings original_max_position_embeddings sliding_window tie_word_embeddings "
    "bos_token_id eos_token_id pad_token_id"
)
SPARSE = "attention_bias lm_head_bias num_local_experts num_experts_per_tok router_jitter_noise input_jitter_noise"


def build(config: ModelConfig, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model with transformers' own random weights, in evaluation mode, that stops at no token."""
    import transformers

    names = COMMON.split() + (SPARSE.split() if config.is_sparse else [])
    kind = "Phimoe" if config.is_sparse else "Phi3"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": config.original_max_position_embeddings}
        rope |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
        if config.is_sparse:
            rope |= {"short_mscale": scaling.short_mscale, "long_mscale": scaling.long_mscale}
    made = getattr(transformers, f"{kind}Config")(
        **{name: getattr(config, name) for name in names},
        head_dim=config.attention_head_dim,
        rope_parameters=rope,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{kind}ForCausalLM")(made)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def generate(model: Any, batch: dict[str, torch.Tensor], new_tokens: int, static: bool) -> float:
    """Seconds of a greedy generation."""
    options = {"cache_implementation": "static"} if static else {}
    synchronise()
    start = time.perf_counter()
    out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, **options)
    synchronise()
    spent = time.perf_counter() - start
    if out.shape[1] != batch["input_ids"].shape[1] + new_tokens:
        raise RuntimeError(f"transformers gave {tuple(out.shape)} for {new_tokens} new tokens")
    return spent


def decode_rate(model: Any, batch: dict[str, torch.Tensor], new_tokens: int, static: bool) -> dict[str, float]:
    """Tokens per second of a row after its first token, and of the whole call; warm."""
    first = time.perf_counter()
    generate(model, batch, new_tokens, static)
    warm = time.perf_counter() - first
    # The compiled pass specialises over its first calls.
    generate(model, batch, 8, static)
    spent = generate(model, batch, new_tokens, static)
    once = min(generate(model, batch, 1, static) for _ in range(2))
    rows = batch["input_ids"].shape[0]
    return {
        "tokens_per_s": rows * (new_tokens - 1) / (spent - once),
        "call_tokens_per_s": rows * new_tokens / spent,
        "first_token_s": once,
        "warm_up_s": warm,
    }


@torch.no_grad()
def prefill_time(model: Any, ids: torch.Tensor, rounds: int = 5) -> float:
    """Median seconds of one forward pass with a new cache and the last token's logits."""
    times = []
    for turn in range(rounds + 2):
        synchronise()
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        synchronise()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def synchronise() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
