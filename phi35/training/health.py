"""Whether a run is well: updates that were left out, and losses that jump.

Both are read from the numbers that the metrics bring from the device anyway, on every rank alike, so that all ranks
judge alike. A jump is a loss far above the mean of the last ones, in their standard deviations; going back to a
checkpoint from before and leaving out the data since is what PaLM did (arXiv 2204.02311, section 5.1).
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phi35.training.config import TrainingConfig

MIN_LOSSES = 8
"""Losses that a judgement of the next one needs."""
LEAST_DEVIATION = 0.005
"""Of the mean: losses that hardly vary must not make a small step a jump."""


class RunDiverged(Exception):
    """A run that goes on would train nothing; the message says why and which checkpoint is left."""


@dataclass(frozen=True)
class Outcome:
    """What all ranks know of a step.

    Attributes:
        step: updates made, this one included.
        loss: of the global batch.
        gradient_norm: global, before clipping; None where it was not computed.
    """

    step: int
    loss: float
    gradient_norm: float | None

    @property
    def is_finite(self) -> bool:
        """Whether the step changed the weights."""
        return math.isfinite(self.gradient_norm) if self.gradient_norm is not None else math.isfinite(self.loss)


@dataclass(frozen=True)
class Trouble:
    """Why a run must not go on as it is.

    Attributes:
        step: the first bad step.
        reason: in words.
        action: "stop" or "rollback".
        may_go_on: whether the run goes on where there is no checkpoint to go back to.
    """

    step: int
    reason: str
    action: str
    may_go_on: bool = False


class Health:
    """Judges outcomes in order.

    Args:
        config: its ``max_skipped_steps``, ``on_skipped_steps``, ``spike_threshold`` and ``spike_window`` count.

    Attributes:
        num_skipped: updates left out since the run began.
        num_rollbacks: since the run began.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.num_skipped = self.num_rollbacks = 0
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)

    def observe(self, outcomes: Sequence[Outcome]) -> Trouble | None:
        """Takes steps as they come; the first trouble ends the judgement."""
        for outcome in outcomes:
            trouble = self._judge(outcome)
            if trouble is not None:
                return trouble
        return None

    def rolled_back(self) -> None:
        """Begins anew after a rollback; the losses from before stay the measure."""
        self.num_rollbacks += 1
        self._in_a_row = 0

    def state(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return {"skipped": self.num_skipped, "rollbacks": self.num_rollbacks, "losses": list(self._losses)}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Goes on from a checkpoint; one that was saved without leaves everything at zero."""
        if state is not None:
            self.num_skipped, self.num_rollbacks = state["skipped"], state["rollbacks"]
            self._losses.extend(state["losses"])

    def _judge(self, outcome: Outcome) -> Trouble | None:
        if not outcome.is_finite:
            self.num_skipped += 1
            self._in_a_row += 1
            if self.config.max_skipped_steps and self._in_a_row >= self.config.max_skipped_steps:
                first = outcome.step - self._in_a_row + 1
                reason = (
                    f"{self._in_a_row} updates in a row were left out, steps {first} to {outcome.step}: loss or "
                    "gradient was not finite"
                )
                return Trouble(first, reason, self.config.on_skipped_steps)
            return None
        self._in_a_row = 0
        height = self._height(outcome.loss)
        if self.config.spike_threshold and height > self.config.spike_threshold:
            reason = (
                f"the loss jumped to {outcome.loss:.4f} at step {outcome.step}, {height:.1f} standard deviations above "
                f"the mean of the last {len(self._losses)}"
            )
            return Trouble(outcome.step, reason, "rollback", may_go_on=True)
        self._losses.append(outcome.loss)
        return None

    def _height(self, loss: float) -> float:
        """Standard deviations of a loss above the last ones' mean; 0 while there are too few."""
        count = len(self._losses)
        if count < min(MIN_LOSSES, self.config.spike_window):
            return 0.0
        mean = math.fsum(self._losses) / count
        variance = math.fsum((value - mean) ** 2 for value in self._losses) / count
        return (loss - mean) / max(math.sqrt(variance), LEAST_DEVIATION * abs(mean), 1e-12)
