"""Models from presets, folders and hub ids, and back to folders."""

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phi35 import presets
from phi35.checkpoint.reader import check_dtypes, fill, match_headers, read_headers, stored_dtype
from phi35.checkpoint.rules import CheckpointPlan, state_shapes, to_disk
from phi35.checkpoint.streaming import StoredWeights
from phi35.checkpoint.writer import parse_size, write_json, write_weights
from phi35.config import ModelConfig
from phi35.config_io import from_hf_dict, to_generation_dict, to_hf_dict
from phi35.device import pick_device, pick_dtype
from phi35.meta_model import meta_model
from phi35.model import CausalLM
from phi35.registry import resolve

if TYPE_CHECKING:
    from phi35.processor import Processor
    from phi35.quantization.config import QuantizationConfig

HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "*.tiktoken",
    "tokenizer_module.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What is fetched of a hub repository: never code, never pickled weights."""

COMPANION_FILES = tuple(
    name for name in HUB_FILES if "safetensors" not in name and name not in ("config.json", "generation_config.json")
)
"""Files beside weights and config that a conversion copies as they are."""


def load(
    folder_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    config: ModelConfig | None = None,
    *,
    quantization: "str | QuantizationConfig | None" = None,
    expert_memory: int | str | None = None,
) -> tuple[CausalLM, "Processor | None"]:
    """A model and its processor from a folder in Hugging Face form.

    Args:
        folder_or_hub_id: a local folder, or an id such as "microsoft/Phi-3.5-mini-instruct".
        device: where the weights go; by default a GPU if there is one.
        dtype: of the weights; by default bfloat16 on a GPU and float32 on a CPU; "auto" keeps what is stored.
        config: in place of the folder's own, such as one with other dropout; its sizes must be those of the weights.
        quantization: "int4", "int8", "fp8" or a ``QuantizationConfig``: weights of a plain checkpoint are rounded to
            the nearest codes as they are read, tensor by tensor.
        expert_memory: device memory for the experts of a sparse model, e.g. "40GB"; all of them lie in host memory, and
            those used last on the device, too (``moe.offloaded_experts``). None puts all of them on the device.

    Returns:
        The model in evaluation mode, and the processor; None in its place, with a warning, where the folder has
        no tokenizer.

    Raises:
        ValueError: for a folder or checkpoint that cannot be used; everything wrong with its tensors at once.
        OSError: if the hub cannot be reached.
    """
    picked_device = pick_device(device)
    if dtype != "auto":
        dtype = pick_dtype(dtype, picked_device)
    folder = find_folder(folder_or_hub_id)
    config = load_config(folder) if config is None else config
    if quantization is not None:
        config = resolve("phi35.quantization.on_load:quantized_config")(config, quantization)
    plain = config if quantization is None else config.replace(quantization=None)
    model = meta_model(plain)
    stored = read_headers(folder)
    match = match_headers(CheckpointPlan(plain, state_shapes(plain, model.state_dict())), stored, folder)
    check_dtypes(match, stored, model.state_dict())
    picked_dtype = stored_dtype(stored) if dtype == "auto" else pick_dtype(dtype, picked_device)
    if quantization is not None:
        model = meta_model(config)
    if expert_memory is not None:
        _offload(model, expert_memory, picked_dtype)
    model = allocate(model, picked_device, picked_dtype)
    if picked_device.type != "meta":
        if quantization is None:
            fill(model, match, stored)
        else:
            fill_rounded = resolve("phi35.quantization.on_load:fill_rounded")
            fill_rounded(model, StoredWeights(folder, plain), config, picked_device)
    model.processor = load_processor(folder, config)
    return model, model.processor


def save(
    model: CausalLM,
    processor: "Processor | None",
    folder: str | Path,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model in Hugging Face form, as transformers, vLLM and llama.cpp read it.

    Args:
        model: the model, on any device.
        processor: its tokenizer, template and image settings; None leaves them out.
        folder: where to; made if absent, its weights of an earlier save are replaced.
        max_shard_size: bytes per weight file.

    Raises:
        ValueError: if the path is a file, the size is none, or the model's tensors do not fit its config (such as
            under expert parallelism or ZeRO-3, where a process holds parts of them alone).
    """
    if not isinstance(model, torch.nn.Module) or not isinstance(folder, str | os.PathLike):
        given = ", ".join(type(argument).__name__ for argument in (model, processor, folder))
        raise ValueError(f"save takes (model, processor, folder), got ({given})")
    target = Path(folder).expanduser()
    if target.exists() and not target.is_dir():
        raise ValueError(f"cannot save into {target}: it is a file, expected a folder or a new name")
    parse_size(max_shard_size)
    meta = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if meta:
        raise ValueError(f"the model's weights are on the meta device ({meta[0]}, …): there is nothing to save")
    tensors = to_disk(model.config, model.state_dict())
    write_weights(target, tensors, max_shard_size)
    write_configs(target, model.config, model.dtype)
    if processor is not None:
        processor.save(target)


def write_configs(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Write ``config.json`` and ``generation_config.json`` beside weights of this dtype."""
    write_json(folder / "config.json", to_hf_dict(config, dtype))
    write_json(folder / "generation_config.json", to_generation_dict(config))


def load_config(folder: Path) -> ModelConfig:
    """The config of a checkpoint folder, from its ``config.json`` and the files beside it.

    Raises:
        ValueError: if there is none, it is no JSON object, or describes no model of this family.
    """
    data = read_json(folder / "config.json")
    if data is None:
        raise ValueError(
            f"{folder} has no config.json: expected a folder in Hugging Face form; it holds "
            f"{sorted(path.name for path in folder.iterdir())[:20]}"
        )
    return from_hf_dict(
        data, read_json(folder / "generation_config.json"), read_json(folder / "preprocessor_config.json")
    )


def load_processor(folder: Path, config: ModelConfig) -> "Processor | None":
    """The processor of a checkpoint folder; None, with a warning, where it has no tokenizer."""
    from phi35.processor import Processor

    if not (folder / "tokenizer.json").exists() and not any(folder.glob("*.tiktoken")):
        warnings.warn(
            f"{folder} has no tokenizer.json (nor *.tiktoken): the model comes without a processor", stacklevel=3
        )
        return None
    return Processor.from_folder(folder, config)


def find_folder(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The local folder itself, or the local copy of a hub repository, fetched where needed.

    Args:
        folder_or_hub_id: a local folder or a hub id.
        revision: branch, tag or commit of a hub repository; None for its main branch.

    Raises:
        ValueError: if it is neither a folder nor a hub id, or the hub has no such repository.
        OSError: if the hub cannot be reached.
    """
    if not isinstance(folder_or_hub_id, str | os.PathLike) or not str(folder_or_hub_id):
        raise ValueError(f"expected a folder or a hub id (owner/name), got {folder_or_hub_id!r}")
    path = Path(folder_or_hub_id).expanduser()
    if path.is_dir():
        return path
    name = str(folder_or_hub_id)
    if path.exists():
        raise ValueError(f"{name} is a file: give the folder that holds config.json and the weights")
    if name in presets.names():
        raise ValueError(
            f"{name!r} is a preset, a config without weights: phi35.create({name!r}) makes one with random weights; "
            "to load trained ones give a folder, or a hub id such as 'microsoft/Phi-3.5-mini-instruct'"
        )
    if isinstance(folder_or_hub_id, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"folder {name!r} does not exist, and it is not a hub id (owner/name) either")
    return _fetch(name, revision)


def create(
    preset_or_config: str | ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    seed: int | None = None,
    expert_memory: int | str | None = None,
    **changes: Any,
) -> CausalLM:
    """A model with random weights.

    Args:
        preset_or_config: name of a preset, or a config.
        device: where the weights are drawn; "meta" allocates nothing.
        dtype: of the weights; by default float32 on a CPU and bfloat16 on a GPU.
        seed: makes the weights reproducible on one kind of device; None draws from torch's global generator.
        expert_memory: device memory for experts, the others in host memory, as of ``load``; the weights drawn are the
            same.
        **changes: config fields to change, e.g. ``num_hidden_layers=2`` or ``quantization="int4"`` (random codes).

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: for an unknown preset, field, device or dtype, before memory is allocated.
    """
    if isinstance(preset_or_config, ModelConfig):
        config = preset_or_config
    elif isinstance(preset_or_config, str):
        config = presets.get(preset_or_config)
    else:
        raise ValueError(f"expected a preset's name or a ModelConfig, got {type(preset_or_config).__name__}")
    if isinstance(changes.get("quantization"), str):
        changes["quantization"] = resolve("phi35.quantization.on_load:quantization_of")(changes["quantization"])
    if changes:
        config = config.replace(**changes)
    picked_device = pick_device(device)
    picked_dtype = pick_dtype(dtype, picked_device)
    model = meta_model(config)
    if expert_memory is not None:
        _offload(model, expert_memory, picked_dtype)
    model = allocate(model, picked_device, picked_dtype)
    if picked_device.type != "meta":
        if seed is None and expert_memory is not None:
            seed = int(torch.randint(2**62, ()))  # numbers for host memory are drawn on the device, too
        generator = None if seed is None else torch.Generator(picked_device).manual_seed(seed)
        model.init_weights(generator)
    return model


def allocate(
    model: CausalLM, device: torch.device, dtype: torch.dtype | Callable[[torch.nn.Parameter], torch.dtype]
) -> CausalLM:
    """Give a model on the meta device memory, unset, and evaluation mode; no weight is drawn or cast on the way.

    Args:
        model: as built, or with some parameters frozen or cut to this process's part; what its tensors were marked
            with stays with them.
        device: where the memory is.
        dtype: of all weights, or of each parameter.
    """
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    else:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype(parameter))
    if device.type != "meta":
        marks = [dict(vars(tensor)) for tensor in (*model.parameters(), *model.buffers())]
        model.to_empty(device=device)
        if device.type == "cpu" and model.config.quantization is not None:
            resolve("phi35.quantization.cpu.pages:ask_for_large_pages")(model)
        model.tie_weights()
        for tensor, mark in zip((*model.parameters(), *model.buffers()), marks, strict=True):
            vars(tensor).update(mark)
    model.tie_weights()
    return model.eval()


def _offload(model: CausalLM, expert_memory: int | str, dtype: torch.dtype) -> None:
    """Make a model on the meta device keep its experts in host memory."""
    model.to(dtype)
    resolve("experts.offload")(model, parse_size(expert_memory, "expert_memory"))


def _fetch(name: str, revision: str | None = None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise ValueError(
            f"no folder {name!r} here, and the hub gives no repository of that name (absent, private or gated): {error}"
        ) from error
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        raise OSError(
            f"no folder {name!r} here, and the hub could not be reached ({type(error).__name__}: {error}); without a "
            "network, copy the checkpoint folder to this machine and give its path"
        ) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file.

    Raises:
        ValueError: if it holds anything else.
    """
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data
