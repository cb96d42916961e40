"""The model configuration: one frozen dataclass for the whole family.

Field names are those of the published ``config.json`` files (arXiv 2404.14219, the Phi-3.5 model cards and
their configuration classes), so that a preset diffs cleanly against a published file. Everything that
varies between models is a field here; no code below asks for a model's name.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

from phi35.config_checks import ROUTER_TYPES, inconsistencies
from phi35.quantization.config import QuantizationConfig

__all__ = ["ROPE_TYPES", "ROUTER_TYPES", "ModelConfig", "RopeScaling", "VisionConfig"]

ROPE_TYPES = ("longrope", "su", "yarn")
"""Spellings of LongRoPE in published configs (``su`` and ``yarn`` are older names of the same computation)."""

_ID_LISTS = ("stop_token_ids", "dummy_token_indices")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """LongRoPE's two sets of frequency factors (arXiv 2402.13753).

    Attributes:
        short_factor: head_dim / 2 divisors, used by sequences of at most the original length.
        long_factor: head_dim / 2 divisors, used by longer sequences.
        short_mscale: multiplier of cos and sin under the short factors; None takes the formula
            sqrt(1 + ln(max / original) / ln(original)).
        long_mscale: the same for the long factors.
        type: how the published config spells it ("longrope" or "su"), which makes no difference between configs.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    short_mscale: float | None = None
    long_mscale: float | None = None
    type: str = dataclasses.field(default="longrope", compare=False)

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ValueError(f"rope_scaling.type must be one of {ROPE_TYPES}, got {self.type!r}")
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, _numbers(f"rope_scaling.{name}", getattr(self, name)))
            if not all(factor > 0 for factor in getattr(self, name)):
                raise ValueError(f"rope_scaling.{name} must hold positive numbers")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image side of a vision model: CLIP tower, HD transform, projector.

    Attributes:
        image_size: side S of one crop in pixels (336 for CLIP ViT-L/14-336).
        patch_size: side of one tower patch in pixels.
        hidden_size: width of the tower (published: ``img_processor.image_dim_out``).
        intermediate_size: width of the tower's feed-forward.
        num_hidden_layers: blocks of the tower, the unused last one included.
        num_attention_heads: heads of the tower.
        layer_norm_eps: epsilon of the tower's LayerNorms.
        num_crops: default limit of tiles in the HD transform (4 published for 3.5, 16 for 3).
        image_mean: per-channel mean of the normalisation.
        image_std: per-channel standard deviation of the normalisation.
        image_token_id: id of ``<|image|>``, accepted as a placeholder in place of the negative ids.
        model_name: name of the published tower, kept for the export.
    """

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-5
    num_crops: int = 4
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    image_token_id: int = 32044
    model_name: str = "openai/clip-vit-large-patch14-336"

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, _numbers(f"vision.{name}", getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise ValueError(f"vision.{name} must hold 3 numbers, one a channel, got {getattr(self, name)}")
        if problems := list(_mistyped(self)):
            raise ValueError("invalid vision config: " + "; ".join(problems))
        _check_positive(
            self,
            "image_size patch_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_crops",
        )
        if self.image_size % (2 * self.patch_size):
            raise ValueError(
                f"vision.image_size ({self.image_size}) must be a multiple of twice vision.patch_size "
                f"({self.patch_size}): features are merged 2x2"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision.hidden_size ({self.hidden_size}) must be a multiple of vision.num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.num_hidden_layers < 2:
            raise ValueError("vision.num_hidden_layers must be at least 2: features come from the last but one block")

    @property
    def grid_size(self) -> int:
        """Patches along one side of a crop (24 published)."""
        return self.image_size // self.patch_size

    @property
    def merged_grid_size(self) -> int:
        """Features along one side of a crop after the 2x2 merge (12 published)."""
        return self.grid_size // 2


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that defines a model of the family.

    Defaults are those of phi-3-mini-4k. ``num_local_experts > 0`` fills the feed-forward slot with the
    sparse layer, ``vision`` fills the embedding slot with the image path; a model may fill both.

    No published model of the family mixes dense and sparse layers; for such models ``decoder_sparse_step``,
    ``norm_topk_prob`` and ``shared_expert_intermediate_size`` have the names that transformers' Qwen models use.

    Attributes:
        intermediate_size: width of the dense feed-forward, or of each expert in a sparse model.
        num_local_experts: experts E of every sparse layer; 0 for a dense model.
        num_experts_per_tok: experts k that each token uses (2 under SparseMixer).
        norm_topk_prob: whether the "topk" router divides a token's k weights by their sum; SparseMixer never does.
        decoder_sparse_step: layer i (from 0) is sparse where i + 1 is a multiple of it; 1 makes every layer sparse.
        dense_intermediate_size: width of the dense layers between sparse ones; None takes ``intermediate_size``.
        shared_expert_intermediate_size: width of a dense expert that every token passes in every sparse layer,
            added to the routed ones; 0 for none.
        quantization: which weights are held in few bits; None for none.
        hidden_act: of the gated feed-forward; "gegelu" is quick_gelu(gate) * (up + 1), both clamped by
            ``gegelu_limit``: the gate from above, up on both sides.
        mlp_bias: whether the dense feed-forward's projections have biases.
        ffn_pdrop: dropout of the feed-forward's output; None takes ``resid_pdrop``, which attention's output has.
        mup_embedding_multiplier: factor on the token embeddings (muP, arXiv 2203.03466).
        mup_use_scaling: divide attention scores by head_dim / ``mup_attn_multiplier`` instead of sqrt(head_dim).
        mup_width_multiplier: divisor of the logits.
        blocksparse_block_size: tokens of a block of block-sparse attention (``phi35.block_sparse``); 0: all layers
            attend densely.
        blocksparse_num_local_blocks: blocks up to a query's own that it sees whole.
        blocksparse_vert_stride: of the earlier blocks every so many-th is seen, by each head another one.
        blocksparse_homo_head_pattern: all heads see the same blocks.
        dense_attention_every_n_layers: layer i (from 0) attends densely where i + 1 is a multiple of it; 0: none does.
        dummy_token_indices: ids that no text has, whose logits are the least number of their dtype.

    Raises:
        ValueError: on any inconsistent field, all of them named at once.
    """

    model_type: str = "phi3"
    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None
    hidden_act: str = "silu"
    norm_type: str = "rmsnorm"
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    bos_token_id: int = 1
    eos_token_id: int = 32000
    pad_token_id: int = 32000
    stop_token_ids: tuple[int, ...] = (32007, 32001, 32000)
    num_local_experts: int = 0
    num_experts_per_tok: int = 2
    router_type: str = "sparsemixer"
    router_jitter_noise: float = 0.01
    input_jitter_noise: float = 0.0
    router_aux_loss_coef: float = 0.0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    dense_intermediate_size: int | None = None
    shared_expert_intermediate_size: int = 0
    experts_backend: str = "auto"
    vision: VisionConfig | None = None
    quantization: QuantizationConfig | None = None
    mlp_bias: bool = False
    gegelu_limit: float | None = None
    ffn_pdrop: float | None = None
    mup_embedding_multiplier: float = 1.0
    mup_use_scaling: bool = False
    mup_attn_multiplier: float = 1.0
    mup_width_multiplier: float = 1.0
    blocksparse_block_size: int = 0
    blocksparse_num_local_blocks: int = 16
    blocksparse_vert_stride: int = 8
    blocksparse_homo_head_pattern: bool = False
    dense_attention_every_n_layers: int = 0
    dummy_token_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _ID_LISTS:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = list(_mistyped(self))
        if not problems:
            if self.head_dim is None and self.num_attention_heads > 0:
                object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
            problems = list(inconsistencies(self))
        if problems:
            raise ValueError("invalid model config: " + "; ".join(problems))

    @property
    def attention_head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def is_sparse(self) -> bool:
        """Whether the feed-forward slot holds the sparse layer, in all layers or some."""
        return self.num_local_experts > 0

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers (from 0) of the layers whose feed-forward is sparse."""
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_sparse_layer(layer))

    def is_sparse_layer(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) routes its tokens to experts."""
        return self.is_sparse and (layer + 1) % self.decoder_sparse_step == 0

    def is_block_sparse_layer(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) attends to some blocks of the keys alone."""
        every = self.dense_attention_every_n_layers
        return self.blocksparse_block_size > 0 and not (every and (layer + 1) % every == 0)

    @property
    def attention_scale(self) -> float | None:
        """Factor on the products of queries and keys; None for 1 / sqrt(head_dim)."""
        return self.mup_attn_multiplier / self.attention_head_dim if self.mup_use_scaling else None

    @property
    def rope_attention_scaling(self) -> tuple[float, float]:
        """Multipliers of cos and sin under the (short, long) factors."""
        if self.rope_scaling is None:
            return (1.0, 1.0)
        ratio = self.max_position_embeddings / self.original_max_position_embeddings
        formula = (
            1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(self.original_max_position_embeddings))
        )
        short, long = self.rope_scaling.short_mscale, self.rope_scaling.long_mscale
        return (formula if short is None else short, formula if long is None else long)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed.

        Dicts are accepted for ``rope_scaling`` and ``vision``; ``vision`` dicts change fields of the present one.
        A change of ``hidden_size`` or ``num_attention_heads`` without ``head_dim`` recomputes ``head_dim``.

        Raises:
            ValueError: for unknown fields, all of them named, or an inconsistent result.
        """
        _check_known("config", changes, ModelConfig)
        if isinstance(changes.get("rope_scaling"), dict):
            _check_known("rope_scaling", changes["rope_scaling"], RopeScaling)
            changes["rope_scaling"] = RopeScaling(**changes["rope_scaling"])
        if isinstance(changes.get("vision"), dict):
            _check_known("vision", changes["vision"], VisionConfig)
            base = self.vision or VisionConfig()
            changes["vision"] = dataclasses.replace(base, **changes["vision"])
        if ("hidden_size" in changes or "num_attention_heads" in changes) and "head_dim" not in changes:
            changes["head_dim"] = None
        return dataclasses.replace(self, **changes)


def _check_known(what: str, given: dict[str, Any], kind: type) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"unknown {what} fields {unknown}; known fields are {sorted(known)}")


def _mistyped(config: Any) -> typing.Iterator[str]:
    """Fields with a value of another type than declared; a whole number may stand where a float is meant."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        declared = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        kinds = tuple(typing.get_origin(kind) or kind for kind in declared)
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        whole = field.name not in _ID_LISTS or fits and all(type(token) is int for token in value)
        if not fits or not whole or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
            yield f"{field.name} must be {names}{' of ids' if not whole else ''}, got {value!r}"


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{name} must be a list of numbers, got {values!r}")
    return tuple(float(value) for value in values)


def _check_positive(config: Any, names: str) -> None:
    for name in names.split():
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
