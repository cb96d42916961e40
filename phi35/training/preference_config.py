"""How a run learns from pairs of replies."""

import math
from dataclasses import asdict, dataclass
from typing import Any

LOSSES = ("sigmoid", "ipo")
REFERENCES = ("auto", "adapter", "precomputed", "none")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """How a run learns from pairs.

    Attributes:
        loss: "sigmoid" or "ipo".
        beta: strength of the tie to the reference.
        label_smoothing: share of pairs that are taken to be labelled the wrong way round ("sigmoid" alone; cDPO).
        reference: "adapter": the model without its adapter, at every step; "precomputed": log-probabilities of every
            pair, computed before the first step and kept in the run's folder; "none": reference-free; "auto" takes the
            first where there is an adapter, else the second.
        routing_noise: whether routers sample experts and jitter inputs, as in other training.

    Raises:
        ValueError: for values that no run can have, all of them at once.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference: str = "auto"
    routing_noise: bool = False

    def __post_init__(self) -> None:
        problems = []
        for name, choices in (("loss", LOSSES), ("reference", REFERENCES)):
            if getattr(self, name) not in choices:
                problems.append(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, low, high in (("beta", 0.0, math.inf), ("label_smoothing", -1e-9, 0.5)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                problems.append(
                    f"{name} must be a number in {'(0, inf)' if name == 'beta' else '[0, 0.5)'}, got {value!r}"
                )
        if self.label_smoothing and self.loss != "sigmoid":
            problems.append(f"label_smoothing is for loss 'sigmoid', got {self.loss!r}")
        if not isinstance(self.routing_noise, bool):
            problems.append(f"routing_noise must be true or false, got {self.routing_noise!r}")
        if problems:
            raise ValueError("preference: " + "; ".join(problems))

    @staticmethod
    def of(values: dict[str, Any]) -> "PreferenceConfig":
        """From plain data.

        Raises:
            ValueError: for unknown keys, all of them named, and as the class.
        """
        known = set(PreferenceConfig.__dataclass_fields__)
        unknown = sorted(set(values) - known, key=str)
        if unknown:
            raise ValueError(f"preference has unknown keys {unknown}; known are {sorted(known)}")
        return PreferenceConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def reference_for(self, has_adapter: bool) -> str:
        """What ``reference`` means for a run.

        Raises:
            ValueError: for "adapter" in a run without one.
        """
        if self.reference == "adapter" and not has_adapter:
            raise ValueError("preference.reference='adapter' needs an adapter: set adapter, or 'precomputed'")
        return self.reference if self.reference != "auto" else "adapter" if has_adapter else "precomputed"
