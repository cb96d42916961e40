"""Models whose parts lie on several devices, or wait on the host or on disk, by accelerate's hooks.

Each weight is read straight to its place, so that no device and no host ever holds the whole model. What waits on disk
is read from the checkpoint itself where a tensor is stored as the model holds it, and else from a file of its own.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

from phi35.checkpoint.reader import check_dtypes, match_headers
from phi35.checkpoint.rules import CheckpointPlan, Placement, state_shapes
from phi35.checkpoint.streaming import StoredWeights
from phi35.checkpoint.writer import DeferredTensor, Writable, write_safetensors
from phi35.device import Spread, num_meta
from phi35.interop.placement import PlacementMap, device_of
from phi35.model import CausalLM
from phi35.registry import resolve

PREFIX = "causal_lm."
TIED = ("lm_head.weight", "model.embed_tokens.weight")

DiskIndex = dict[str, dict[str, str]]
"""Tensor name -> file, name in it and dtype, as accelerate reads them."""


def load_spread(
    model: Any, folder: Path, places: PlacementMap, offload_folder: str | Path | None, offload_buffers: bool
) -> None:
    """Give a model on the meta device its weights, each in its place, and the hooks that let it run.

    Args:
        model: a ``WrappedCausalLM`` in the dtype that it shall have.
        folder: the checkpoint.
        places: where the weights go.
        offload_folder: where weights are written that wait on disk and are stored otherwise in the checkpoint.
        offload_buffers: whether codes of weights in few bits wait where the map says, or stay on the device.

    Raises:
        ValueError: for a checkpoint that does not fit, or weights to be written and no folder for them.
    """
    causal_lm: CausalLM = model.causal_lm
    weights = StoredWeights(folder, causal_lm.config)
    state = causal_lm.state_dict()
    check_dtypes(match_headers(weights.plan, weights.stored, folder), weights.stored, state)
    kept = set() if offload_buffers else {name for name, _ in causal_lm.named_buffers()}
    on_disk = [name for name in weights.plan.shapes if name not in kept and places.place(PREFIX + name) == "disk"]
    written = [name for name in on_disk if weights.verbatim(name) is None] if offload_folder is None else []
    if written:
        raise ValueError(
            f"{written[0]} and {len(written) - 1} more wait on disk and are stored otherwise in the checkpoint: give "
            "offload_folder, a folder with room for them"
        )
    index: DiskIndex = {}
    for name in weights.plan.shapes:
        dtype, full = state[name].dtype, PREFIX + name
        if name in on_disk:
            index[full] = _on_disk(weights, name, dtype, offload_folder)
        else:
            device = places.computes_on(full) if name in kept else device_of(places.place(full))
            install(causal_lm, name, weights.tensor(name).to(device=device, dtype=dtype))
    for name, buffer in list(causal_lm.named_buffers()):
        if name not in state and buffer.is_meta:
            assert buffer.numel() == 0, f"{name} follows from nothing"
            install(causal_lm, name, torch.empty_like(buffer, device=places.computes_on(PREFIX + name)))
    causal_lm.tie_weights()
    if causal_lm.config.tie_word_embeddings and PREFIX + TIED[1] in index:
        index[PREFIX + TIED[0]] = index[PREFIX + TIED[1]]
    spread(model, places, index, offload_buffers)


def spread(model: Any, places: PlacementMap, index: DiskIndex | None = None, offload_buffers: bool = True) -> None:
    """Put hooks on a model whose weights are in place (those on disk: on the meta device)."""
    causal_lm: CausalLM = model.causal_lm
    for name in places.places:
        device = places.computes_on(name)
        if device.type == "cuda" and name in dict(model.named_modules()):
            _compute_on(model.get_submodule(name), device)
    with _without_empty_buffers(model):
        dispatch_model(
            model,
            dict(places.places),
            main_device=places.main,
            offload_index=index or None,
            offload_buffers=offload_buffers,
            skip_keys=list(model._skip_keys_device_placement),
            preload_module_classes=["VisionEmbedding"],
        )
    causal_lm.spread = Spread(
        inputs=places.computes_on(f"{PREFIX}model.embed_tokens.weight"),
        layers=tuple(
            places.computes_on(f"{PREFIX}model.layers.{layer}.input_layernorm.weight")
            for layer in range(len(causal_lm.model.layers))
        ),
        num_waiting=num_meta(causal_lm),
    )


def install(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, which may be on the meta device."""
    parent, _, leaf = name.rpartition(".")
    module = root.get_submodule(parent)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    old = module._parameters[leaf]
    assert old is not None
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    module._parameters[leaf] = new


def spread_weights(causal_lm: CausalLM) -> dict[str, Writable]:
    """A spread model's weights under the published names, each fetched when its turn to be written comes."""
    state = causal_lm.state_dict()
    plan = CheckpointPlan(causal_lm.config, state_shapes(causal_lm.config, state))

    @functools.lru_cache(maxsize=1)  # the experts of a layer are one tensor here and many there
    def fetch(name: str) -> torch.Tensor:
        return state[name] if not state[name].is_meta else _waiting(causal_lm, name)

    def take(placement: Placement) -> Callable[[], torch.Tensor]:
        return lambda: placement.take(fetch(placement.memory_name))

    found: dict[str, Writable] = {
        one.disk_name: DeferredTensor(plan.disk_shape(one), state[one.memory_name].dtype, take(one))
        for one in plan.written()
    }
    if causal_lm.config.quantization is not None:
        found |= resolve("phi35.quantization.names:packed_shapes")(plan)
    return found


def check_target(causal_lm: CausalLM, target: Path) -> None:
    """Check that a folder holds no file from which a model's waiting weights are read.

    Raises:
        ValueError: if it does: writing there would replace them.
    """
    for name, tensor in causal_lm.state_dict().items():
        if tensor.is_meta and (info := getattr(_weights_map(causal_lm, name)[0], "index", {}).get(PREFIX + name)):
            if Path(info["safetensors_file"]).resolve().parent == target.resolve():
                raise ValueError(f"the model reads weights from {target} as it runs: save into another folder")
            return


def _on_disk(weights: StoredWeights, name: str, dtype: torch.dtype, folder: str | Path | None) -> dict[str, str]:
    kind = str(dtype).removeprefix("torch.")
    stored = weights.verbatim(name)
    if stored is not None:
        file, disk_name = stored
        return {"safetensors_file": str(file), "weight_name": disk_name, "dtype": kind}
    assert folder is not None
    file = Path(folder).expanduser() / f"{PREFIX}{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(file, {name: weights.tensor(name).to(dtype)}, metadata={"format": "pt"})
    return {"safetensors_file": str(file), "weight_name": name, "dtype": kind}


@contextlib.contextmanager
def _without_empty_buffers(model: nn.Module) -> Iterator[None]:
    """Hides names of buffers that are None, as of a router's bias, which accelerate 1.15 would move."""
    hidden = [
        (module, {name for name in module._non_persistent_buffers_set if module._buffers[name] is None})
        for module in model.modules()
    ]
    for module, names in hidden:
        module._non_persistent_buffers_set -= names
    try:
        yield
    finally:
        for module, names in hidden:
            module._non_persistent_buffers_set |= names


def _compute_on(module: nn.Module, device: torch.device) -> None:
    """Let a module run with its device as the current one, on which kernels of our own are launched."""
    forward = module.forward

    @functools.wraps(forward)
    def on_device(*arguments: Any, **options: Any) -> Any:
        with torch.cuda.device(device):
            return forward(*arguments, **options)

    module.forward = on_device


def _waiting(causal_lm: CausalLM, name: str) -> torch.Tensor:
    """A weight that waits on the host or on disk."""
    weights, key = _weights_map(causal_lm, name)
    tensor: torch.Tensor = weights[key]
    return tensor


def _weights_map(causal_lm: CausalLM, name: str) -> tuple[Mapping[str, torch.Tensor], str]:
    """Where the hooks find a waiting weight, and its name there."""
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        hook = getattr(causal_lm.get_submodule(parent), "_hf_hook", None)
        for one in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
            if isinstance(one, AlignDevicesHook) and one.offload and one.weights_map is not None:
                inside = name[len(parent) + 1 :] if parent else name
                dataset = one.weights_map
                return dataset.dataset, dataset.prefix + inside
    raise ValueError(f"{name} is on the meta device and no hook knows where its values are")
