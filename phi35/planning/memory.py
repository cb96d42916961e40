"""Memory of a training run on each GPU, by part and by moment.

What stays from step to step (weights, masters, moments, buffers) follows from the parameters of one rank and from how
DeepSpeed 0.19.8 keeps them at each ZeRO stage (read in its sources and checked with a count of live tensors,
``tests/planning``); what a training pass keeps is counted on the model itself (``phi35.planning.activations``). The
peak is the largest of a few moments: the head's loss, the start and the end of the backward pass, the reduction of
gradients, and the update.
"""

from dataclasses import dataclass, field

import torch

from phi35.config import ModelConfig
from phi35.fused_head import LOGITS_PER_CHUNK as FUSED_LOGITS
from phi35.fused_head import ROWS_PER_TILE
from phi35.language_model_head import LOGITS_PER_CHUNK as PLAIN_LOGITS
from phi35.planning.activations import (
    Activations,
    PassSettings,
    count_activations,
    extra_for_expert_parallelism,
)
from phi35.planning.parameters import RankParameters, rank_parameters
from phi35.training.config import TrainingConfig
from phi35.training.deepspeed_config import BUCKET_SIZE

WORKSPACES = 100_000_000
"""Bytes that matrix products and attention take as workspace on a GPU."""
ALLREDUCE_ELEMENTS = 500_000_000
"""DeepSpeed reduces gradients in buckets of this many elements where it keeps them whole (bfloat16 at stage 1)."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements that ZeRO-3 may hold gathered at once."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU.

    Attributes:
        states: what stays from step to step, by part.
        moments: everything that is alive at each moment.
        host: in the host's memory for this GPU.
        gathered: float32 and bfloat16 parts by name that explain the largest moment besides ``states``.
    """

    states: dict[str, int]
    moments: dict[str, int]
    host: int
    gathered: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """The most that is allocated at once."""
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        """When that is."""
        return max(self.moments, key=lambda name: self.moments[name])


def plan_memory(
    model_config: ModelConfig,
    config: TrainingConfig,
    world_size: int,
    *,
    length: int | None = None,
    crops: int = 0,
    device_type: str = "cuda",
    bucket_size: int = BUCKET_SIZE,
) -> MemoryPlan:
    """Works out a run's memory on each GPU.

    Args:
        model_config: of the model.
        config: resolved for ``world_size``.
        world_size: number of ranks.
        length: positions of a row; None: ``sequence_length``.
        crops: of a micro-batch's pictures.
        device_type: "cuda" or "cpu".
        bucket_size: elements of DeepSpeed's buckets.
    """
    assert config.is_resolved and config.micro_batch_size is not None
    length = (length or config.sequence_length) // config.sequence_parallel_size
    settings = pass_settings(config, length, crops, device_type)
    parameters = rank_parameters(model_config, config)
    work = _Sizes(model_config, settings, count_activations(model_config, settings), config.micro_batch_size * length)
    states = _states(parameters, config, world_size, bucket_size, device_type)
    host = _host(parameters, config, world_size)
    standing = sum(states.values()) + (WORKSPACES if device_type == "cuda" else 0)
    growing = _growing_gradients(parameters, config, world_size)
    arrived, travelling = extra_for_expert_parallelism(model_config, settings)
    acts = work.activations
    kept = acts.decoder + acts.tower + arrived
    gathered = _gathered_weights(parameters, config, bucket_size)
    recomputed = max(acts.layer, acts.tower_block)
    backward = work.layer_backward + recomputed + travelling + gathered
    head = work.dtype_bytes * (work.tokens * model_config.hidden_size + parameters.head)
    buckets = _buckets(parameters, config, bucket_size, device_type)
    moments = {
        "head and loss": standing + kept + gathered + work.head_forward(parameters.head),
        "backward of the head": standing + kept + head + _head_backward(work, parameters.head) + buckets,
        "backward of the last layer": standing
        + kept
        + backward
        + buckets
        + _first_gradients(parameters, config, growing),
        "end of the backward pass": standing + acts.tower + backward + buckets + growing,
        "reduction of gradients": standing + growing + _reduction(parameters, config, world_size),
        "update": standing + growing + _update(parameters, config, world_size),
    }
    parts = {"activations": kept, "gradients that grow in the pass": growing, "buckets": buckets}
    parts |= {"logits and their gradients": work.head_forward(parameters.head), "one layer's backward": backward}
    return MemoryPlan(states, moments, host, parts)


def pass_settings(config: TrainingConfig, length: int, crops: int, device_type: str) -> PassSettings:
    """What the planner's pass takes from a training config."""
    assert config.micro_batch_size is not None
    fused = config.kernels == "fused" or (config.kernels == "auto" and device_type == "cuda" and not config.compile)
    return PassSettings(
        batch_size=config.micro_batch_size,
        length=length,
        crops=crops,
        dtype=getattr(torch, config.dtype),
        fused=fused,
        gradient_checkpointing=config.gradient_checkpointing,
        compiled=config.compile,
        ep_size=config.ep_size or 1,
        freeze=config.freeze,
    )


class _Sizes:
    """Passing tensors of one micro-batch, from the model's shapes."""

    def __init__(
        self, model_config: ModelConfig, settings: PassSettings, activations: Activations, tokens: int
    ) -> None:
        self.config, self.settings, self.activations, self.tokens = model_config, settings, activations, tokens
        self.dtype_bytes = settings.dtype.itemsize

    def head_forward(self, head: int) -> int:
        """The head's logits in chunks, and the gradients it makes of them in the forward pass."""
        vocab, width, size = self.config.vocab_size, self.config.hidden_size, self.dtype_bytes
        states = self.tokens * width * size
        if self.settings.fused:
            rows = max(ROWS_PER_TILE, FUSED_LOGITS // vocab // ROWS_PER_TILE * ROWS_PER_TILE)
            chunk = min(rows, self.tokens) * vocab * size
            alone = self.tokens <= rows
            weight = head * size if alone else head * 8  # a sum in float32, and the chunk's product
            return states + chunk + weight
        rows = min(max(1, PLAIN_LOGITS // vocab), self.tokens)
        chunk = rows * vocab * max(8, 4 + size)
        return states + chunk + head * (4 + size)

    @property
    def layer_backward(self) -> int:
        """Gradients of values in the widest place of a decoder layer, in its dtype."""
        config, size = self.config, self.dtype_bytes
        width = config.hidden_size
        heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.attention_head_dim
        attention = self.tokens * (2 * width + 2 * heads)
        dense = self.tokens * (2 * width + 4 * (config.dense_intermediate_size or config.intermediate_size))
        sparse = 0
        if config.is_sparse:
            rows = self.tokens * config.num_experts_per_tok + 64 * config.num_local_experts // self.settings.ep_size
            sparse = rows * (width + 4 * config.intermediate_size) + self.tokens * 2 * width
            dense = dense if config.decoder_sparse_step > 1 else 0
        return size * max(attention, dense, sparse)


def _states(
    parameters: RankParameters, config: TrainingConfig, world_size: int, bucket_size: int, device_type: str
) -> dict[str, int]:
    """What stays from one step to the next."""
    weight = 2 if config.dtype == "bfloat16" else 4
    held = parameters.held * weight
    if config.zero_stage == 3:
        held //= world_size
    states = {"weights": held}
    sharded = _shard(parameters, config, world_size)
    on_host = config.offload != "none"
    states["master weights"] = 0 if on_host else round(sharded * _master_bytes(config))
    states["moments"] = 0 if on_host else _moments(parameters, config, world_size)
    if config.zero_stage == 3:
        states["gradients"] = 0 if on_host else round(sharded * 4)
        states["buckets"] = bucket_size * weight
    if config.zero_stage == 1 and config.dtype == "bfloat16" and not on_host:
        states["gradients"] = parameters.trained * 4  # DeepSpeed keeps their float32 sums whole here
    if on_host and config.zero_stage != 3:
        states["buckets"] = 2 * parameters.largest  # where a gradient stands on its way to the host
    if config.ema_decay and not on_host:
        states["average of the weights"] = round(sharded * 4)
    return states


def _shard(parameters: RankParameters, config: TrainingConfig, world_size: int) -> float:
    """Trained parameters of which this rank keeps masters and moments."""
    if config.zero_stage == 0:
        return parameters.trained
    replicas = world_size // (config.ep_size or 1)
    return parameters.dense / world_size + parameters.experts / replicas


def _master_bytes(config: TrainingConfig) -> int:
    if config.dtype == "float32":
        return 0 if config.zero_stage == 0 else 4
    return 4 if config.optimizer_dtype == "float32" else 0


def _moments(parameters: RankParameters, config: TrainingConfig, world_size: int) -> int:
    share = _shard(parameters, config, world_size) / max(1, parameters.trained)
    if config.optimizer == "adamw8bit":
        return round(share * parameters.trained * (2 + 8 / 256))
    size = 4 if config.optimizer_dtype == "bfloat16" else 8
    return round(share * (parameters.trained - parameters.muon) * size + share * parameters.muon * 4)


def _host(parameters: RankParameters, config: TrainingConfig, world_size: int) -> int:
    """Masters, moments, gradients and the rounded copy of offloaded states."""
    if config.offload == "none":
        return 0
    sharded = _shard(parameters, config, world_size)
    average = 4 if config.ema_decay else 0
    return round(sharded * (4 + 4 + 2 + average)) + _moments(parameters, config, world_size)


def _growing_gradients(parameters: RankParameters, config: TrainingConfig, world_size: int) -> int:
    """Gradients that come up in the backward pass and go with the update."""
    trained, stage = parameters.trained, config.zero_stage
    if stage == 0:
        many = config.gradient_accumulation_steps(world_size) > 1
        return trained * (2 if config.dtype == "bfloat16" and not many else 4)
    sharded = round(_shard(parameters, config, world_size))
    if config.dtype == "float32":
        return 0 if stage == 3 else sharded * 4 + (trained * 4 if stage == 1 else 0)
    if stage == 1:
        return trained * 4 + sharded * 4 if config.offload != "none" else trained * 2
    return sharded * 4 if stage == 2 else 0


def _first_gradients(parameters: RankParameters, config: TrainingConfig, growing: int) -> int:
    """Of the growing gradients, those that stand when the last layer's are made."""
    if config.zero_stage == 2 and config.dtype == "bfloat16":
        return growing  # a group's whole share is allocated with its first gradient
    return round(growing * (parameters.head + parameters.layer) / max(1, parameters.trained))


def _buckets(parameters: RankParameters, config: TrainingConfig, bucket_size: int, device_type: str) -> int:
    """Gradients on their way between ranks during the backward pass, stages 1 and 2."""
    if config.zero_stage not in (1, 2) or (
        config.zero_stage == 1 and config.dtype == "bfloat16" and config.offload == "none"
    ):
        return 0
    size = 2 if config.dtype == "bfloat16" and config.zero_stage == 2 else 4
    buffers = 2 if device_type == "cuda" and config.offload == "none" else 1
    # The buffers, and the flat copy of the slices of one of them, or of a tensor that is larger than a bucket.
    largest = parameters.largest if parameters.largest > bucket_size else 0
    flat = max(min(bucket_size, parameters.trained), largest)
    return size * (buffers * bucket_size + flat + largest) + 4 * parameters.largest  # one more in float32 is added up


def _reduction(parameters: RankParameters, config: TrainingConfig, world_size: int) -> int:
    """Copies of gradients while they are reduced whole: of the small ones at stage 0, of all at stage 1."""
    if config.zero_stage == 0 and world_size > 1:
        return parameters.small * (2 if config.dtype == "bfloat16" else 4)
    if config.zero_stage == 1 and config.dtype == "bfloat16" and config.offload == "none":
        # Groups are joined until they pass the bucket's size: a flat float32 copy of several, one in bfloat16 of all.
        joined, count, most = 0, 0, 0
        for size in parameters.groups:
            joined, count = joined + size, count + 1
            most = max(most, joined * (2 + (4 if count > 1 else 0)))
            if joined > ALLREDUCE_ELEMENTS:
                joined, count = 0, 0
        return max(most, parameters.experts * 2)
    return 0


def _update(parameters: RankParameters, config: TrainingConfig, world_size: int) -> int:
    """Passing tensors of the optimizer."""
    assert config.zero_stage is not None
    if config.zero_stage == 3:
        return min(4 * round(_shard(parameters, config, world_size)), 4 * 1_000_000_000)
    if config.optimizer == "muon":
        return 14 * parameters.largest
    if config.optimizer == "adamw8bit" and config.zero_stage == 0 and config.dtype == "bfloat16":
        return 4 * parameters.largest
    return 0


def _head_backward(work: _Sizes, head: int) -> int:
    """The head's gradients times the loss's, through float32 where the fused form makes them."""
    passing = head * 8 if work.settings.fused else 0
    return work.dtype_bytes * (work.tokens * work.config.hidden_size + head) + passing


def _gathered_weights(parameters: RankParameters, config: TrainingConfig, bucket_size: int) -> int:
    """Whole weights that ZeRO-3 holds while a layer runs: it fetches ahead as far as its limit, and what has just come
    stands once as it came and once in order."""
    if config.zero_stage != 3:
        return 0
    weight = 2 if config.dtype == "bfloat16" else 4
    live = max(parameters.sparse_layer, min(parameters.held, LIVE_PARAMETERS))
    coming = max(parameters.sparse_layer, parameters.largest, min(parameters.held, bucket_size // 4))
    return weight * (live + coming)
