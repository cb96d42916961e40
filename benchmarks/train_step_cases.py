"""The cases of ``train_step.py`` and how one of them is built; each runs in a process of its own.

"ours" trains through ``phi35.training.engine.Engine``, that is DeepSpeed's engine. "transformers" is a plain loop over
its model in bfloat16 (weights, gradients and Adam's moments: less work and memory than ours with float32 states), with
fused AdamW and clipping, with and without Liger kernels.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from phi35 import presets
from phi35.config import ModelConfig
from phi35.training.flops import TrainingFlops, Work, visible_pairs
from phi35.training.loss import count_label_tokens


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training step to time.

    Attributes:
        group: cases of one group train the same model and are compared.
        preset: the model.
        changes: of its config.
        side: "ours" or "transformers".
        rows: samples of a micro-batch.
        length: tokens of a sample.
        micro_batches: per step.
        settings: fields of ``TrainingConfig``; for transformers "liger" and "gradient_checkpointing".
        images: pictures of 672x672 a sample (five crops each).
        plain: parts of ours to switch off, for the table of what each gives: "loss", "norms" (with gates and
            rotations), "attention" (flash attention in place of cuDNN's).
    """

    group: str
    preset: str = "phi-3.5-mini"
    changes: dict[str, Any] = field(default_factory=dict)
    side: str = "ours"
    rows: int = 4
    length: int = 4096
    micro_batches: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    images: int = 0
    plain: tuple[str, ...] = ()

    @property
    def model_config(self) -> ModelConfig:
        """Of the model that is trained."""
        return presets.get(self.preset).replace(**self.changes)


_MOE = {"preset": "phi-3.5-moe", "changes": {"num_hidden_layers": 8}}
_STATES16 = {"optimizer_dtype": "bfloat16"}

CASES: dict[str, Case] = {
    # What the project claims, beside its peers.
    "mini": Case(group="mini"),
    "check": Case(group="check"),
    "check compiled": Case(group="check parts", settings={"compile": True}),
    "mini transformers": Case(group="mini", side="transformers", settings={"gradient_checkpointing": True}),
    "mini transformers+liger": Case(
        group="mini", side="transformers", settings={"gradient_checkpointing": True, "liger": True}
    ),
    "mini transformers+liger kept": Case(group="mini", side="transformers", rows=2, settings={"liger": True}),
    "moe-8": Case(group="moe-8", **_MOE, settings=_STATES16),
    "moe-8 x2": Case(group="moe-8", **_MOE, rows=2, settings=_STATES16),
    "moe-8 transformers": Case(group="moe-8", **_MOE, side="transformers"),
    "moe-8 transformers x2": Case(group="moe-8", **_MOE, side="transformers", rows=2),
    "moe-5": Case(group="moe-5", preset="phi-3.5-moe", changes={"num_hidden_layers": 5}),
    "vision": Case(
        group="vision",
        preset="phi-3.5-vision",
        rows=6,
        length=2048,
        images=2,
        settings={"gradient_checkpointing": "selective"},
    ),
    "moe-32 frozen experts": Case(
        group="moe-32",
        preset="phi-3.5-moe",
        rows=1,
        settings={"freeze": ("experts",), "gradient_checkpointing": True},
    ),
    # What each part gives. First without any, then with all but one, then other choices.
    "mini plain": Case(
        group="mini parts",
        settings={"kernels": "torch", "zero_stage": 1, "gradient_checkpointing": True},
        plain=("attention",),
    ),
    "mini plain, own masters": Case(
        group="mini parts", settings={"kernels": "torch", "gradient_checkpointing": True}, plain=("attention",)
    ),
    "mini but loss": Case(group="mini parts", plain=("loss",)),
    "mini but attention": Case(group="mini parts", plain=("attention",)),
    "mini x2 but norms": Case(group="mini parts", rows=2, plain=("norms",)),
    "mini x2": Case(group="mini parts", rows=2),
    "mini but masters (ZeRO-1)": Case(group="mini parts", rows=2, settings={"zero_stage": 1}),
    "mini compile": Case(group="mini parts", settings={"compile": True}),
    "mini compile, recompute": Case(group="mini parts", settings={"compile": True, "gradient_checkpointing": True}),
    "mini recompute": Case(group="mini parts", settings={"gradient_checkpointing": True}),
    "mini selective": Case(group="mini parts", settings={"gradient_checkpointing": "selective"}),
    "mini selective x6": Case(group="mini parts", rows=6, settings={"gradient_checkpointing": "selective"}),
    "mini x8 in two": Case(group="mini parts", micro_batches=2),
    "mini bfloat16 states": Case(group="mini parts", settings=_STATES16),
    "moe-8 compile": Case(group="moe-8 parts", **_MOE, settings={**_STATES16, "compile": True}),
    "vision x4 kept": Case(group="vision parts", preset="phi-3.5-vision", rows=4, length=2048, images=2),
    "vision compile": Case(
        group="vision parts", preset="phi-3.5-vision", rows=4, length=2048, images=2, settings={"compile": True}
    ),
    "vision plain": Case(
        group="vision parts",
        preset="phi-3.5-vision",
        rows=6,
        length=2048,
        images=2,
        settings={"kernels": "torch", "gradient_checkpointing": True},
    ),
}
MAIN = [name for name, case in CASES.items() if "parts" not in case.group]


CHECKED: dict[str, dict[str, Any]] = {
    "phi-3.5-mini": {"num_hidden_layers": 2},
    # One layer, where rounding sends few tokens to other experts, and no jitter, whose draws hang on the dtype.
    "phi-3.5-moe": {"num_hidden_layers": 1, "input_jitter_noise": 0.0},
}
"""Models whose fast forms are compared with the plain one in float32."""


def small(case: Case) -> Case:
    """The same case on a tiny model, for a machine without a GPU."""
    changes = {"num_hidden_layers": 2} if case.changes else {}
    settings = {name: value for name, value in case.settings.items() if name not in ("compile", "liger")}
    length = 768 if case.images else 64
    return dataclasses.replace(
        case, preset=f"tiny-{case.preset}", changes=changes, rows=min(2, case.rows), length=length, settings=settings
    )


def flops_per_step(case: Case) -> dict[str, float]:
    """Operations of a step; recomputation is not counted.

    Returns:
        "needed": as ``phi35.training.flops`` counts them; "with embeddings": with 6 for each of the token embeddings
        too, as 6 x parameters x tokens has it, though a look-up costs nothing.
    """
    config, rows = case.model_config, case.rows * case.micro_batches
    pictures = case.images * rows
    work = Work(
        tokens=rows * case.length,
        attention_pairs=rows * visible_pairs(case.length, config.sliding_window),
        crops=5 * pictures,
        image_tokens=image_tokens(config) * pictures if pictures else 0,
    )
    needed = TrainingFlops(config, case.settings.get("freeze", ()))(work)
    return {"needed": needed, "with embeddings": needed + 6.0 * config.vocab_size * config.hidden_size * work.tokens}


def image_tokens(config: ModelConfig) -> int:
    """Positions that one picture of two by two tiles takes."""
    assert config.vision is not None
    merged = config.vision.merged_grid_size
    return 5 * merged**2 + 1 + 3 * merged


def draw_batch(case: Case, device: torch.device, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    """One micro-batch and its labels' number: random ids, all of them labels; pictures of noise in front of them."""
    config = case.model_config
    shape = (case.rows, case.length)
    input_ids = torch.randint(3, min(1000, config.vocab_size), shape, generator=generator)
    labels = input_ids.clone()
    batch = {}
    if case.images:
        assert config.vision is not None
        side, each = config.vision.image_size, image_tokens(config)
        for image in range(case.images):
            input_ids[:, 1 + image * each : 1 + (image + 1) * each] = -1 - image
        labels[:, : 1 + case.images * each] = -100
        num_crops = 5 * case.images * case.rows
        batch["pixel_values"] = without_waiting(torch.randn(num_crops, 3, side, side, generator=generator), device)
        batch["image_sizes"] = torch.tensor([[2 * side, 2 * side]] * (case.images * case.rows))
    count = count_label_tokens(labels)
    batch |= {"input_ids": without_waiting(input_ids, device), "labels": without_waiting(labels, device)}
    return batch, count


def without_waiting(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that the host does not wait for, as a loader with pinned memory makes it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def build_transformers(case: Case, device: torch.device) -> nn.Module:
    """transformers' model of the same shape, with random weights in bfloat16."""
    import transformers

    config = case.model_config
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings original_max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id "
        "eos_token_id pad_token_id"
    ).split()
    values: dict[str, Any] = {name: getattr(config, name) for name in names}
    scaling = config.rope_scaling
    assert scaling is not None
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": config.rope_theta}
    rope |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
    rope |= {"original_max_position_embeddings": config.original_max_position_embeddings}
    if config.is_sparse:
        more = "attention_bias lm_head_bias num_local_experts num_experts_per_tok router_jitter_noise "
        more += "input_jitter_noise head_dim"
        values |= {name: getattr(config, name) for name in more.split()}
        rope |= {"short_mscale": scaling.short_mscale, "long_mscale": scaling.long_mscale}
        theirs = transformers.PhimoeConfig(**values, rope_parameters=rope, attn_implementation="sdpa")
        theirs._experts_implementation = "grouped_mm"
        kind = transformers.PhimoeForCausalLM
    else:
        if case.settings.get("liger"):
            from liger_kernel.transformers import apply_liger_kernel_to_phi3

            apply_liger_kernel_to_phi3()
        theirs = transformers.Phi3Config(**values, rope_parameters=rope, attn_implementation="sdpa")
        kind = transformers.Phi3ForCausalLM
    theirs.use_cache = False
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = kind(theirs)
    finally:
        torch.set_default_dtype(default)
    if case.settings.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()
