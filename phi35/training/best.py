"""Which checkpoints have the lowest held-out loss, so that they stay."""

from typing import Any


class BestCheckpoints:
    """The steps with the lowest losses; equal on all ranks.

    Args:
        count: how many to keep; 0 keeps track of the lowest loss alone.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: list[tuple[float, int]] = []
        self.lowest: float | None = None

    def observe(self, step: int, loss: float) -> bool:
        """Takes an evaluation.

        Returns:
            Whether its step belongs to those that are kept, and must be saved.
        """
        if self.lowest is None or loss < self.lowest:
            self.lowest = loss
        if not self.count or loss != loss:
            return False
        self._kept = sorted([*self._kept, (loss, step)])[: self.count]
        return (loss, step) in self._kept

    def steps(self) -> frozenset[int]:
        """The steps that stay."""
        return frozenset(step for _, step in self._kept)

    def rewind(self, step: int) -> None:
        """Forgets what came after a step."""
        self._kept = [(loss, kept) for loss, kept in self._kept if kept <= step]

    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best one that is kept."""
        return (self._kept[0][1], self._kept[0][0]) if self._kept else None

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {"kept": [list(pair) for pair in self._kept], "lowest": self.lowest}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Goes on from a checkpoint."""
        if state:
            self._kept = [(float(loss), int(step)) for loss, step in state["kept"]][: self.count]
            self.lowest = state["lowest"]
