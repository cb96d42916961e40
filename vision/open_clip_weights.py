"""Weights of OpenAI's CLIP for the tower, by way of open_clip.

open_clip's ``ViT-L-14-336-quickgelu`` with the tag "openai" is the tower that the published models started from.
Its tensors are renamed by a table to timm's names; files are read as safetensors or as tensors alone
(``weights_only``), never as pickled objects.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OPEN_CLIP_MODEL = "ViT-L-14-336-quickgelu"

_PREFIX = "visual."
_BLOCK = r"transformer\.resblocks\.(\d+)\."
_RENAMES = (
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"conv1\.weight", "patch_embed.proj.weight"),
    (r"ln_pre\.(weight|bias)", r"norm_pre.\1"),
    (r"ln_post\.(weight|bias)", r"norm.\1"),
    (_BLOCK + r"ln_([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (_BLOCK + r"attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (_BLOCK + r"attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"mlp\.c_fc\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"mlp\.c_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
)
_UNUSED = ("proj",)  # maps the class token to the space shared with text, which the tower does not have
_LEADING_ONES = {"cls_token": 2, "pos_embed": 1}


def from_open_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames an open_clip image tower to timm's names.

    Args:
        state_dict: of open_clip's ``visual`` module, or of the whole CLIP (then the text side is left out).

    Returns:
        timm name -> tensor; the tensors are views of those given.

    Raises:
        ValueError: for names that no rule knows, all of them listed.
    """
    if any(name.startswith(_PREFIX) for name in state_dict):
        state_dict = {name[len(_PREFIX) :]: value for name, value in state_dict.items() if name.startswith(_PREFIX)}
    renamed, unknown = {}, []
    for name, value in state_dict.items():
        target = _timm_name(name)
        if target is not None:
            renamed[target] = value.reshape((1,) * _LEADING_ONES.get(target, 0) + tuple(value.shape))
        elif name not in _UNUSED:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors are not those of an open_clip VisionTransformer: {_some(unknown)}; give the "
            f"weights of {OPEN_CLIP_MODEL} (a plain ViT with class token)"
        )
    return renamed


def load_open_clip(tag_or_path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads open_clip weights from a file, or fetches them by their tag.

    Args:
        tag_or_path: a ``.safetensors`` file, a file written by ``torch.save`` that holds tensors alone, or a
            pretrained tag of open_clip's ViT-L-14-336-quickgelu ("openai").

    Returns:
        The file's tensors under open_clip's names.

    Raises:
        ValueError: if the file is missing, unreadable or would need unpickling, the tag is unknown, or its
            weights cannot be fetched; the message says how to point at a file.
    """
    path = Path(tag_or_path)
    if path.is_file():
        return _read(path)
    if path.suffix or len(path.parts) > 1:
        raise ValueError(f"open_clip weights {str(path)!r} do not exist or are no file")
    return _read(_fetch(str(tag_or_path)))


def import_tower(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> list[str]:
    """Copies open_clip's image tower into a model.

    Args:
        model: a vision model, its image embedding, or its tower.
        source: as for ``load_open_clip``, or a state dict with open_clip's names.

    Returns:
        The tower's parameters that were written: all of them.

    Raises:
        ValueError: if the model has no tower, or its tensors differ in names or shapes; nothing is written then.
    """
    tower = _tower(model)
    state_dict = source if isinstance(source, Mapping) else load_open_clip(source)
    incoming = from_open_clip(state_dict)
    present = tower.state_dict()
    problems = [f"missing {name}" for name in sorted(present.keys() - incoming.keys())]
    problems += [f"unexpected {name}" for name in sorted(incoming.keys() - present.keys())]
    problems += [
        f"{name} is {tuple(incoming[name].shape)} in the file and {tuple(value.shape)} in the model"
        for name, value in present.items()
        if name in incoming and incoming[name].shape != value.shape
    ]
    if problems:
        raise ValueError(
            f"these weights do not fit the model's tower, {len(problems)} problems: {_some(problems)}; "
            f"the published tower takes {OPEN_CLIP_MODEL}"
        )
    with torch.no_grad():
        for name, value in present.items():
            value.copy_(incoming[name])
    return list(present)


def _timm_name(name: str) -> str | None:
    for pattern, replacement in _RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def _tower(model: nn.Module) -> nn.Module:
    for path in ("model.vision_embed_tokens.img_processor", "vision_embed_tokens.img_processor", "img_processor", ""):
        try:
            tower = model.get_submodule(path)
        except AttributeError:
            continue
        if hasattr(tower, "patch_embed"):
            return tower
    raise ValueError(f"{type(model).__name__} has no vision tower: give a vision model, e.g. 'phi-3.5-vision'")


def _read(path: Path) -> dict[str, Tensor]:
    advice = "give a .safetensors file, or one that torch.save wrote from a plain state dict"
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise many kinds for broken or pickled files
        raise ValueError(f"cannot read tensors from {str(path)!r} ({_first_line(error)}): {advice}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not a dict of tensors: {advice}")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _fetch(tag: str) -> Path:
    try:
        from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
    except ImportError as error:
        raise ValueError(
            f"fetching the open_clip weights {tag!r} needs open_clip: pip install 'phi35[clip]', or give the path of "
            "a file"
        ) from error
    tags = list_pretrained_tags_by_model(OPEN_CLIP_MODEL)
    if tag not in tags:
        raise ValueError(
            f"{tag!r} is neither a file nor a pretrained tag of {OPEN_CLIP_MODEL}; tags are {tags}, and a file may be "
            "named by its path"
        )
    try:
        return Path(download_pretrained(get_pretrained_cfg(OPEN_CLIP_MODEL, tag)))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the open_clip weights {tag!r} could not be fetched ({_first_line(error)}): without a network, fetch "
            "open_clip_model.safetensors of the hub's timm/vit_large_patch14_clip_336.openai elsewhere and give its "
            "path"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _some(items: list[str], limit: int = 8) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
