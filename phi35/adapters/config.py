"""What an adapter is and where it sits, in the family's own terms."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from phi35.config import ModelConfig

TARGETS = ("attention", "feed_forward", "experts", "router", "projector", "tower")
"""Places of adapters: both attention projections, dense feed-forwards (a shared expert's too), the routed experts'
stacked weights, the router's matrix, the image projector, the image tower's blocks."""

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
ROUTER_PARAMETER = "mlp.router.weight"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter (arXiv 2106.09685).

    Attributes:
        rank: r.
        alpha: the addition is alpha / r times B A; with ``rslora`` alpha / sqrt(r) (arXiv 2312.03732).
        dropout: of what goes into A; a router's inputs pass none.
        targets: places (``TARGETS``); None for attention, feed-forwards and experts, what a model has of them.
        dora: decompose weights into length and direction (DoRA, arXiv 2402.09353); for linear layers alone.
        rslora: see ``alpha``.

    Raises:
        ValueError: for values that no adapter can have, all of them at once.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    dora: bool = False
    rslora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        problems = []
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            problems.append(f"rank must be a whole number of at least 1, got {self.rank!r}")
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            problems.append(f"alpha must be a number above 0, got {self.alpha!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            problems.append(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        unknown = [one for one in self.targets or () if one not in TARGETS]
        if unknown or self.targets == ():
            problems.append(f"targets must be some of {TARGETS}, got {self.targets}")
        if self.dora and {"experts", "router"} & set(self.targets or ()):
            problems.append("dora is for linear layers: leave experts and router out of targets, or set dora=false")
        if problems:
            raise ValueError("adapter: " + "; ".join(problems))

    @staticmethod
    def of(values: dict[str, Any]) -> "AdapterConfig":
        """From plain data, as a YAML file holds it.

        Raises:
            ValueError: for unknown keys, all of them named, and as the class.
        """
        known = set(AdapterConfig.__dataclass_fields__)
        unknown = sorted(set(values) - known, key=str)
        if unknown:
            raise ValueError(f"adapter has unknown keys {unknown}; known are {sorted(known)}")
        return AdapterConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def resolve(self, config: ModelConfig) -> tuple[str, ...]:
        """The places that this adapter has in a model.

        Raises:
            ValueError: if the model lacks one that is asked for.
        """
        num_sparse = len(config.sparse_layers)
        present = {
            "attention": True,
            "feed_forward": num_sparse < config.num_hidden_layers or config.shared_expert_intermediate_size > 0,
            "experts": config.is_sparse,
            "router": config.is_sparse,
            "projector": config.vision is not None,
            "tower": config.vision is not None,
        }
        if self.targets is None:
            usual = ("attention", "feed_forward") if self.dora else ("attention", "feed_forward", "experts")
            return tuple(place for place in usual if present[place])
        absent = [place for place in self.targets if not present[place]]
        if absent:
            has = [place for place in TARGETS if present[place]]
            raise ValueError(f"adapter: the model has no {', '.join(absent)}; targets can be {has}")
        return self.targets


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def linear_names(model: nn.Module, places: tuple[str, ...]) -> list[str]:
    """What names the linear layers at some places, as PEFT matches them: ends of names, or whole names.

    Layers of a tower that no feature depends on are left out.

    Args:
        model: a ``CausalLM`` on any device, or what wraps one.
        places: some of ``TARGETS``.
    """
    found = ["qkv_proj", "o_proj"] if "attention" in places else []
    found += ["gate_up_proj", "down_proj"] if "feed_forward" in places else []
    for name, module in model.named_modules():
        if ".vision_embed_tokens." in name and hasattr(module, "in_features"):
            place = "tower" if ".img_processor." in name else "projector"
            if place in places and not _is_unused(model, name):
                found.append(name)
    return found


def is_targeted(parameter: str, targets: Iterable[str]) -> bool:
    """Whether ``target_parameters`` of a ``LoraConfig`` name a parameter: by its whole name or by an end of it."""
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def expert_names(model: nn.Module) -> list[str]:
    """Names of the modules that hold stacked experts, plain or in few bits."""
    return [
        name
        for name, module in model.named_modules()
        if name.endswith(".mlp.experts") and hasattr(module, "hidden_act")
    ]


def _is_unused(model: nn.Module, name: str) -> bool:
    """Whether a layer of the tower is one that no feature depends on."""
    prefix, _, inner = name.partition(".img_processor.")
    if not inner:
        return False
    tower = model.get_submodule(f"{prefix}.img_processor")
    return any(unused.startswith(f"{inner}.") for unused in tower.unused_parameter_names)  # type: ignore[union-attr]
