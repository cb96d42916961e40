"""What a training pass keeps for its backward pass, counted on the model itself.

The modules run once on the meta device, where tensors have shapes and no values, with the batch and the settings of
the run; whatever is still alive when the forward pass ends is what autograd and the modules keep. So the count follows
the code: fused or plain operations, selective or full recomputation, any router. Attention stands for the flash form
(queries, keys, values, the result and a float32 number for each query and head), as on a GPU.
"""

import dataclasses
import functools
import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phi35.attention import plan_attention
from phi35.config import ModelConfig
from phi35.meta_model import meta_model
from phi35.training.acceleration import fuse
from phi35.training.parameter_groups import part_of


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """What decides the size of a training pass on one rank.

    Attributes:
        batch_size: rows of a micro-batch.
        length: positions of a row.
        crops: of all its pictures.
        dtype: of weights and activations.
        fused: whether the modules take their fused operations.
        gradient_checkpointing: False, True or "selective".
        compiled: whether layers go through torch.compile, which computes again what costs no matrix product.
        ep_size: ranks that share one set of experts.
        freeze: parts without gradients.
    """

    batch_size: int
    length: int
    crops: int = 0
    dtype: torch.dtype = torch.bfloat16
    fused: bool = True
    gradient_checkpointing: bool | str = False
    compiled: bool = False
    ep_size: int = 1
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank while a micro-batch is trained.

    Attributes:
        decoder: alive when the forward pass reaches the head.
        tower: the image tower's and the projector's part, which comes on top.
        layer: what one decoder layer (the largest) keeps without recomputation; under full recomputation that much
            comes back for one layer at a time.
        tower_block: the same for a block of the tower.
    """

    decoder: int
    tower: int
    layer: int
    tower_block: int


def count_activations(config: ModelConfig, settings: PassSettings) -> Activations:
    """Runs the model's forward pass on the meta device and counts what stays.

    Args:
        config: of the model.
        settings: of the pass.
    """
    if config.is_sparse and settings.dtype == torch.float32:
        # Without values only bfloat16 experts run; twice their count is a little more than float32 keeps.
        half = _counted(config, dataclasses.replace(settings, ep_size=1, dtype=torch.bfloat16))
        return Activations(*(2 * getattr(half, item.name) for item in dataclasses.fields(half)))
    return _counted(config, dataclasses.replace(settings, ep_size=1))


@functools.lru_cache(maxsize=64)
def _counted(config: ModelConfig, settings: PassSettings) -> Activations:
    model = _prepared(config, settings)
    embeds = _leaf(model, settings, settings.batch_size, settings.length, config.hidden_size)
    decoder = _alive_after(lambda: model.model(None, inputs_embeds=embeds)) + _bytes(embeds)
    tower = 0
    if config.vision is not None and settings.crops:
        tower = _alive_after(lambda: _run_tower(model, settings))
    whole = settings.gradient_checkpointing is True
    model.gradient_checkpointing = False if whole else model.gradient_checkpointing
    layer, block = 0, 0
    if whole:
        kinds = {type(one.mlp): one for one in model.model.layers}
        layer = max(_alive_after(functools.partial(_run_layer, model, one, embeds)) for one in kinds.values())
        if tower:
            block = _alive_after(lambda: _run_block(model, settings))
    return Activations(decoder, tower, layer, block)


def extra_for_expert_parallelism(config: ModelConfig, settings: PassSettings) -> tuple[int, int]:
    """What experts on other ranks cost besides, with tokens spread evenly.

    Returns:
        Bytes kept for the backward pass over all layers (the rows that arrived), and bytes of the rows on their way
        (those that leave and those that come, results likewise) while one layer runs.
    """
    if settings.ep_size == 1:
        return 0, 0
    rows = settings.batch_size * settings.length * config.num_experts_per_tok
    row_bytes = config.hidden_size * settings.dtype.itemsize
    away = rows * (settings.ep_size - 1) // settings.ep_size
    trained = "experts" not in settings.freeze
    kept = rows * row_bytes * len(config.sparse_layers) if trained else 0
    if settings.gradient_checkpointing is True:
        kept //= max(1, len(config.sparse_layers))
    return kept, 2 * (rows + away) * row_bytes


def _prepared(config: ModelConfig, settings: PassSettings) -> Any:
    model = meta_model(config).to(settings.dtype).train()
    for name, parameter in model.named_parameters():
        if part_of(name) in settings.freeze:
            parameter.requires_grad_(False)
    fuse(model, settings.fused)
    # What torch.compile keeps of a layer is what is left where everything but matrix products is computed again.
    lean = settings.compiled and not settings.gradient_checkpointing
    model.gradient_checkpointing = "selective" if lean else settings.gradient_checkpointing
    triton = importlib.util.find_spec("triton") is not None
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "backend"):
            module.backend = "triton" if triton else "grouped_mm"
    return model


def _leaf(model: Any, settings: PassSettings, *shape: int) -> torch.Tensor:
    """An input whose gradient is wanted where something before it is trained."""
    upstream = {"embeddings", "projector", "tower"} - set(settings.freeze)
    wanted = bool(upstream) if model.config.vision is not None else "embeddings" in upstream
    return torch.empty(*shape, dtype=settings.dtype, device="meta", requires_grad=wanted)


def _run_tower(model: Any, settings: PassSettings) -> Any:
    """Features of all crops, as one picture of ``crops`` - 1 tiles in a row."""
    side = model.config.vision.image_size
    pixels = torch.empty(settings.crops, 3, side, side, device="meta")  # float32, as they come to the device
    embedding = model.model.vision_embed_tokens
    return embedding.features(pixels, [[side, side * max(1, settings.crops - 1)]] if settings.crops > 1 else [])


def _run_block(model: Any, settings: PassSettings) -> Any:
    vision, tower = model.config.vision, model.model.vision_embed_tokens.img_processor
    positions = (vision.image_size // vision.patch_size) ** 2 + 1
    wanted = "tower" not in settings.freeze
    states = torch.empty(
        settings.crops, positions, vision.hidden_size, dtype=settings.dtype, device="meta", requires_grad=wanted
    )
    return tower.blocks[0](states)


def _run_layer(model: Any, layer: nn.Module, embeds: torch.Tensor) -> Any:
    decoder = model.model
    plan = plan_attention(model.config, decoder.rope, embeds, None, None, None, None)
    return layer(embeds, plan, None)


def _alive_after(run: Callable[[], Any]) -> int:
    """Bytes of the tensors made by a call that are alive when it has returned, as long as its result is held."""
    storages: dict[int, tuple[StorageWeakRef, int]] = {}
    with _Storages(storages), _DeviceForms():
        result = run()
    gc.collect()
    alive = sum(size for reference, size in storages.values() if not reference.expired())
    del result
    return alive


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Storages(TorchDispatchMode):
    """Notes every storage that an operation makes, and its size."""

    def __init__(self, found: dict[int, Any]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                known = self.found.get(storage._cdata)
                if known is None or known[0].expired():
                    # A storage of an input may come out as a view; only what is new counts.
                    self.found[storage._cdata] = (StorageWeakRef(storage), self._new_bytes(storage, args))
        return result

    def _new_bytes(self, storage: Any, args: Any) -> int:
        inputs = {one.untyped_storage()._cdata for one in tree_leaves(args) if isinstance(one, torch.Tensor)}
        return 0 if storage._cdata in inputs else storage.nbytes()


class _DeviceForms(TorchFunctionMode):
    """Puts the forms that torch has on a GPU in place of those it picks without a device: flash attention, and RMSNorm
    as one operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attended.apply(*args[:3])
        if func is F.rms_norm:
            return _Normalised.apply(args[0])
        return func(*args, **(kwargs or {}))


class _Attended(torch.autograd.Function):
    """What flash attention keeps, without its values."""

    @staticmethod
    def forward(ctx: FunctionCtx, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        # The result lies as the queries do: head after head within a token, so that joining heads copies nothing.
        attended = torch.empty_like(queries)
        if not attended.transpose(1, 2).is_contiguous():
            attended = queries.new_empty(queries.transpose(1, 2).shape).transpose(1, 2)
        log_sums = queries.new_empty(queries.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(queries, keys, values, attended, log_sums)
        return attended

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        queries, keys, values, _, _ = ctx.saved_tensors
        return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)


class _Normalised(torch.autograd.Function):
    """What torch's RMSNorm keeps on a GPU, without its values."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_states: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_states, hidden_states.new_empty(hidden_states.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden_states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(ctx.saved_tensors[0])
