"""An exponential moving average of the trained weights (Polyak averaging, arXiv 1803.05407 and older).

average <- d average + (1 - d) weights after every update, with d = min(decay, (1 + n) / (10 + n)) after n updates, so
that the first steps do not drag the random start along. It is kept in float32, cut into the pieces that each rank's
optimizer holds, and costs 4 bytes for each of those.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from phi35.training.flat_layout import Piece, refresh_weights


class WeightAverage:
    """The average of an engine's masters.

    Args:
        pieces: of every trained parameter.
        zero: DeepSpeed's optimizer.
        stage: ZeRO stage.
        base: the optimizer that DeepSpeed drives.
        decay: largest d.

    Attributes:
        num_updates: n.
    """

    def __init__(
        self, pieces: Mapping[nn.Parameter, Piece], zero: Any, stage: int, base: torch.optim.Optimizer, decay: float
    ) -> None:
        self.pieces, self.decay = pieces, decay
        self._zero, self._stage, self._base = zero, stage, base
        self._flats = list({id(piece.flat): piece.flat for piece in pieces.values()}.values())
        self._values: list[torch.Tensor] = []
        self.num_updates = 0
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begins with the present weights."""
        self.num_updates = 0
        self._values = [flat.detach().float().clone() for flat in self._flats]

    @torch.no_grad()
    def update(self) -> None:
        """Moves towards the present weights; called once an update."""
        self.num_updates += 1
        share = 1.0 - min(self.decay, (1.0 + self.num_updates) / (10.0 + self.num_updates))
        for value, flat in zip(self._values, self._flats, strict=True):
            value.lerp_(flat.detach().float(), share)

    def value_of(self, piece: Piece) -> torch.Tensor:
        """(count,) this rank's part of a parameter's average; others write through it."""
        index = next(index for index, flat in enumerate(self._flats) if flat is piece.flat)
        return piece.slice(self._values[index])

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within it the model computes with the average; afterwards with its weights, to the bit. Collective."""
        own = [flat.data for flat in self._flats]
        for flat, value in zip(self._flats, self._values, strict=True):
            flat.data = value.to(flat.dtype)  # float32 masters: the average itself, nothing is copied
        try:
            refresh_weights(self._zero, self._stage, self._base)
            yield
        finally:
            for flat, data in zip(self._flats, own, strict=True):
                flat.data = data
            refresh_weights(self._zero, self._stage, self._base)
