"""Models of transformers from folders and back, by this package's own readers and writers."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import _IncompatibleKeys
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from phi35.checkpoint.reader import read_headers, stored_dtype
from phi35.checkpoint.rules import CheckpointPlan, state_shapes, to_disk
from phi35.checkpoint.writer import write_json, write_weights
from phi35.config import ModelConfig
from phi35.config_io import from_hf_dict, to_hf_dict
from phi35.device import pick_dtype
from phi35.interop.configuration import OWN, WrappedConfig
from phi35.interop.placement import PlacementMap, device_of, one_place, resolve_map
from phi35.loading import find_folder, load, load_config, load_processor, read_json, save, write_configs
from phi35.meta_model import meta_model
from phi35.registry import resolve

_HARMLESS = {
    "trust_remote_code",
    "_from_auto",
    "low_cpu_mem_usage",
    "use_safetensors",
    "adapter_kwargs",
    "_commit_hash",
    "offload_state_dict",
}


class Folders:
    """``from_pretrained`` and ``save_pretrained``."""

    config: Any
    causal_lm: Any
    config_class: Any

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        config: WrappedConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Any:
        """The model of a folder or hub id, its weights read by ``phi35.load``.

        Args:
            folder: as ``phi35.load`` takes it.
            config: what ``AutoConfig`` gave. Fields changed on it are changed in the model.
            dtype: of the weights; by default as stored.
            torch_dtype: the older name of ``dtype``.
            device_map: a device, such as "cpu", "cuda:0" or {"": 0}; by default the CPU. Or several: "auto",
                "balanced", "balanced_low_0", "sequential" or a dictionary of modules and devices, "cpu" and "disk"
                among them, as accelerate has them, with ``max_memory``, ``offload_folder`` and ``offload_buffers``
                (by default true: codes of weights in few bits are buffers).
            attn_implementation: "sdpa", which is what these models use.
            revision: branch, tag or commit of a hub repository.
            **options: of transformers; fields of the config change it, others that would change what is loaded are
                refused.

        Raises:
            ValueError: for an option that is not supported, a map or config that does not fit, and as ``phi35.load``.
            ImportError: for a map over several devices without accelerate.
        """
        if attn_implementation not in (None, "sdpa"):
            raise ValueError(f"attn_implementation must be 'sdpa' for the models of phi35, got {attn_implementation!r}")
        picked = dtype if dtype is not None else torch_dtype
        found = find_folder(folder, revision)
        wrapped, rest = _config_of(cls.config_class, found, config, options)
        memory, offload_folder = rest.pop("max_memory", None), rest.pop("offload_folder", None)
        offload_buffers = rest.pop("offload_buffers", True)
        refuse({key: value for key, value in rest.items() if key not in _HARMLESS}, "from_pretrained")
        model: Any
        place, wrapped.name_or_path = one_place(device_map), str(folder)
        if place is None:
            model, places = cls._empty(wrapped, found, picked, device_map, memory, offload_buffers)
            if places.is_spread:
                load_spread = resolve("phi35.interop.dispatch:load_spread")
                load_spread(model, found, places, offload_folder, offload_buffers)
                model.causal_lm.processor = load_processor(found, model.causal_lm.config)
                return model
            place = places.main
        kind = "auto" if picked is None else picked
        causal_lm, _ = load(found, device=device_of(place), dtype=kind, config=wrapped.current())
        model = cls(wrapped, causal_lm)  # type: ignore[call-arg]
        if device_map is not None:
            model.hf_device_map = {"": place}
        return model.eval()

    @classmethod
    def _empty(
        cls, wrapped: Any, folder: Path, dtype: Any, device_map: Any, memory: Any, offload_buffers: bool
    ) -> tuple[Any, PlacementMap]:
        """The model on the meta device, in its dtype, and where its parts go."""
        if importlib.util.find_spec("accelerate") is None:
            raise ImportError(f"device_map={device_map!r} needs accelerate: pip install accelerate")
        causal_lm = meta_model(wrapped.current())
        kind = stored_dtype(read_headers(folder)) if dtype in (None, "auto") else dtype
        empty: Any = cls(wrapped, causal_lm.to(pick_dtype(kind, torch.device("cpu"))))  # type: ignore[call-arg]
        places = resolve_map(empty, device_map, memory, offload_buffers)
        causal_lm.to(pick_dtype(kind, device_of(places.main)))
        wrapped.dtype = causal_lm.dtype
        return empty.eval(), places

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        **options: Any,
    ) -> None:
        """Write weights and config in the published names, as ``phi35.save``.

        Args:
            save_directory: where to.
            is_main_process: others write nothing.
            state_dict: weights to write in place of the model's own, under this module's names, as trainers gather
                them.
            max_shard_size: bytes per weight file.
            **options: those that would change what is written are refused.

        Raises:
            ValueError: for options and weights that do not fit, and as ``phi35.save``.
        """
        refuse({key: value for key, value in options.items() if key != "safe_serialization"}, "save_pretrained")
        if not is_main_process:
            return
        target = Path(save_directory).expanduser()
        self._take_config()
        if state_dict is None and self.causal_lm.spread is not None:
            resolve("phi35.interop.dispatch:check_target")(self.causal_lm, target)
            tensors = resolve("phi35.interop.dispatch:spread_weights")(self.causal_lm)
            write_weights(target, tensors, max_shard_size)
            write_configs(target, self.causal_lm.config, self.causal_lm.dtype)
        elif state_dict is None:
            save(self.causal_lm, None, target, max_shard_size)
        else:
            tensors = to_disk(self.causal_lm.config, _own_names(state_dict, self.causal_lm.state_dict()))
            write_weights(target, tensors, max_shard_size)
            write_configs(target, self.causal_lm.config, self.causal_lm.dtype)
        contents = to_hf_dict(self.causal_lm.config, self.causal_lm.dtype)
        if self.config.output_router_logits:
            contents["output_router_logits"] = True
        if target.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            # Trainers read this file again as a config of no class, where both spellings of LongRoPE are an error.
            contents.pop("rope_scaling")
        write_json(target / "config.json", contents)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take weights under this module's names, as torch does, or under the published ones that it saves.

        Trainers read checkpoints this way when they go on from one, shard by shard.

        Raises:
            RuntimeError: with ``strict``, for missing and unknown names.
            ValueError: for a tensor of another shape, or a model whose weights wait on the host or on disk.
        """
        if self.causal_lm.spread is not None and any(one.is_meta for one in self.causal_lm.state_dict().values()):
            raise ValueError("weights that wait on 'cpu' or 'disk' cannot be replaced: load the model on one device")
        if not state_dict or any(name.startswith("causal_lm.") for name in state_dict):
            parent: Any = super()
            return parent.load_state_dict(state_dict, strict, assign)
        own = self.causal_lm.state_dict()
        plan = CheckpointPlan(self.causal_lm.config, state_shapes(self.causal_lm.config, own))
        missing, known = [], set()
        with torch.no_grad():
            for placement in plan.written():
                known.add(placement.disk_name)
                tensor = state_dict.get(placement.disk_name)
                if tensor is None:
                    missing.append(placement.disk_name)
                    continue
                if tuple(tensor.shape) != plan.disk_shape(placement):
                    expected = plan.disk_shape(placement)
                    raise ValueError(f"{placement.disk_name} must be {expected}, got {tuple(tensor.shape)}")
                placement.put(own[placement.memory_name], tensor.to(own[placement.memory_name].device))
        unknown = sorted(set(state_dict) - known)
        if strict and (missing or unknown):
            raise RuntimeError(f"weights are missing: {missing[:5]}, or unknown: {unknown[:5]}")
        return _IncompatibleKeys(missing, unknown)

    def _take_config(self) -> None:
        """Build the frozen config anew from what was set on the wrapped one."""
        config = self.config.current()
        self.config.hold(config)
        self.causal_lm.config = self.causal_lm.model.config = config


def refuse(options: dict[str, Any], where: str) -> None:
    """Raise ValueError for options that were set."""
    given = sorted(name for name, value in options.items() if value not in (None, False))
    if given:
        raise ValueError(f"{where} does not support {given} for the models of phi35: leave them out")


def _config_of(
    kind: Any, folder: Path, given: WrappedConfig | None, options: dict[str, Any]
) -> tuple[WrappedConfig, dict[str, Any]]:
    """The folder's config with the fields that ``given`` and the options change, and the options left."""
    contents = read_json(folder / "config.json") or {}
    stored, rest = kind.from_dict(contents, return_unused_kwargs=True, **options)
    whole = load_config(folder)
    if given is not None and not isinstance(given, WrappedConfig):
        raise ValueError(
            f"config must be what AutoConfig gives after phi35.interop.register(), got {type(given).__name__}"
        )
    changes: dict[str, Any] = {}
    for source in (given, stored):
        changes |= {} if source is None else _changes(source.current(), from_hf_dict(contents))
    config = kind.of(whole.replace(**changes))
    for name in OWN:
        source = stored if name in options or given is None else given
        setattr(config, name, getattr(source, name))
    return config, rest


def _changes(wanted: ModelConfig, stored: ModelConfig) -> dict[str, Any]:
    pairs = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(ModelConfig)}
    return {name: value for name, value in pairs.items() if value != getattr(stored, name)}


def _own_names(given: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under ``CausalLM``'s names; tied ones may be missing."""
    named = {name.removeprefix("causal_lm."): tensor for name, tensor in given.items()}
    if "lm_head.weight" in own and "lm_head.weight" not in named and "model.embed_tokens.weight" in named:
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    wrong = sorted(set(named) ^ set(own))
    if wrong:
        raise ValueError(f"state_dict does not name this model's tensors: {wrong[:5]} are missing or unknown")
    return named
