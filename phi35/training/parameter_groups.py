"""Which parameters are trained, at which rate, and which are decayed.

Every parameter belongs to one part of the model (embeddings, decoder, router, experts, tower, projector); a part
may have a learning rate of its own or be frozen. Vectors (norms, biases, separators) are never decayed.
"""

from typing import Any

from torch import nn

from phi35.training.config import TrainingConfig
from phi35.training.config_checks import PARTS

VISION_PREFIX = "model.vision_embed_tokens."
TOWER_PREFIX = VISION_PREFIX + "img_processor."


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its in-memory name."""
    if name.startswith(TOWER_PREFIX):
        return "tower"
    if name.startswith(VISION_PREFIX):
        return "projector"
    if ".mlp.router." in name:
        return "router"
    if ".mlp.experts." in name:
        return "experts"
    if name.startswith(("model.embed_tokens.", "lm_head.")):
        return "embeddings"
    return "decoder"


def is_decayed(name: str, parameter: nn.Parameter, config: TrainingConfig) -> bool:
    """Whether weight decay applies: to matrices, and to embeddings only where the config says so."""
    part = part_of(name)
    if part == "embeddings" and not config.decay_embeddings:
        return False
    if part == "projector" and not name.endswith(".weight"):
        return False  # separators are vectors in the shape of a picture row
    if part == "tower" and name.endswith(("pos_embed", "cls_token")):
        return False
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2


def uses_muon(name: str, parameter: nn.Parameter, config: TrainingConfig) -> bool:
    """Whether Muon updates a parameter, where the config asks for it: the inner matrices, experts included."""
    if config.optimizer != "muon" or part_of(name) not in ("decoder", "experts", "tower", "projector"):
        return False
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return is_decayed(name, parameter, config) and len(shape) == (3 if part_of(name) == "experts" else 2)


def freeze_parameters(model: nn.Module, config: TrainingConfig) -> list[str]:
    """Freezes the parts named in ``config.freeze``; what the model froze itself stays frozen.

    Returns:
        Names of all parameters that are not trained.

    Raises:
        ValueError: if nothing is left to train.
    """
    frozen = []
    if config.adapter is not None:
        model.requires_grad_(False)  # the adapter comes later
        return [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        if part_of(name) in config.freeze:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            frozen.append(name)
    if all(not parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze={list(config.freeze)} leaves nothing to train in model {config.model!r}")
    return frozen


def kept_parameters(model: nn.Module, config: TrainingConfig) -> list[tuple[str, nn.Parameter]]:
    """What a run's checkpoints hold: all parameters; with an adapter, beside which nothing changes, the adapter's."""
    named = list(model.named_parameters())
    return named if config.adapter is None else [(name, one) for name, one in named if one.requires_grad]


def part_rates(model: nn.Module, config: TrainingConfig) -> dict[str, float]:
    """Peak learning rate of every part of the model that is trained."""
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {part: config.learning_rates.get(part, config.learning_rate) for part in PARTS if part in trained}


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Groups for AdamW; each keeps its peak rate under "peak_lr", which the loop multiplies by the schedule.

    Expert-parallel parameters stand in groups of their own with the keys by which DeepSpeed finds their process
    group ("moe", "name").
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decayed = part_of(name), is_decayed(name, parameter, config)
        peak = config.learning_rates.get(part, config.learning_rate)
        expert_group = None if getattr(parameter, "allreduce", True) else getattr(parameter, "group_name")  # noqa: B009
        muon = uses_muon(name, parameter, config)
        key = (expert_group, peak, decayed, muon)
        if key not in groups:
            label = expert_group or f"{'decayed' if decayed else 'plain'}-{peak:g}"
            groups[key] = {
                "params": [],
                "name": label,
                "lr": peak,
                "peak_lr": peak,
                "weight_decay": config.weight_decay if decayed else 0.0,
                "muon": muon,
            }
            if expert_group is not None:
                groups[key]["moe"] = True
        groups[key]["params"].append(parameter)
    return list(groups.values())
