"""The 8-bit moments of bitsandbytes' AdamW, as float32 values by parameter and, exactly, as they are.

A block of 256 codes shares one scale, and blocks run over the optimizer's flat tensors, past the parameters' ends.
So a checkpoint holds the moments twice: as float32 values by parameter, which any other layout reads and quantizes
again (within the width of a code), and each rank's codes and scales, by which the same layout goes on to the bit.
"""

from collections.abc import Sequence
from typing import Any

import torch

from phi35.training.flat_layout import Piece

BLOCK = 256
_PLACES = {"exp_avg": "1", "exp_avg_sq": "2"}


class QuantizedMoments:
    """Access to the moments of a bitsandbytes optimizer.

    Args:
        optimizer: AdamW8bit.
        flats: its tensors (each may come more than once).
    """

    def __init__(self, optimizer: Any, flats: Sequence[torch.Tensor]) -> None:
        self.optimizer = optimizer
        self.flats = list({id(flat): flat for flat in flats}.values())
        self._staged: dict[tuple[int, str], torch.Tensor] = {}

    def read(self, piece: Piece, kind: str) -> torch.Tensor:
        """(count,) float32 values of this rank's part of a moment."""
        state, place = self.optimizer.state[piece.flat], _PLACES[kind]
        codes = state[f"state{place}"].view(-1)
        first, stop = piece.offset // BLOCK, -(-(piece.offset + piece.count) // BLOCK)
        if codes.dtype != torch.uint8 or piece.count == 0:
            return piece.slice(codes).float()
        from bitsandbytes import functional

        values = functional.dequantize_blockwise(
            codes[first * BLOCK : stop * BLOCK].contiguous(),
            absmax=state[f"absmax{place}"][first:stop],
            code=state[f"qmap{place}"],
            blocksize=BLOCK,
        )
        start = piece.offset - first * BLOCK
        return values[start : start + piece.count]

    def allocate(self, num_steps: int) -> None:
        """Zero moments, as if the optimizer had made ``num_steps`` updates."""
        groups = self.optimizer.param_groups
        for flat in self.flats:
            # Which group a tensor stands in decides its rates alone, and those are read at each step.
            self.optimizer.param_groups = [{**groups[0], "params": [flat]}]
            self.optimizer.init_state(self.optimizer.param_groups[0], flat, 0, 0)
            self.optimizer.state[flat]["step"] = num_steps
        self.optimizer.param_groups = groups

    def write(self, piece: Piece, kind: str, part: torch.Tensor) -> None:
        """Takes this rank's part of a moment; ``finish`` quantizes what was taken."""
        key = (id(piece.flat), kind)
        if key not in self._staged:
            self._staged[key] = torch.zeros_like(piece.flat, dtype=torch.float32, requires_grad=False)
        piece.slice(self._staged[key]).copy_(part)

    def finish(self) -> None:
        """Makes codes and scales of the values that were written."""
        for flat in self.flats:
            for kind, place in _PLACES.items():
                values = self._staged.pop((id(flat), kind), None)
                if values is None:
                    continue
                state = self.optimizer.state[flat]
                if state[f"state{place}"].dtype != torch.uint8:
                    state[f"state{place}"].copy_(values)
                    continue
                from bitsandbytes import functional

                codes, found = functional.quantize_blockwise(values, code=state[f"qmap{place}"], blocksize=BLOCK)
                state[f"state{place}"].copy_(codes)
                state[f"absmax{place}"].copy_(found.absmax)

    def exact(self) -> dict[str, torch.Tensor]:
        """Codes and scales of this rank, by name."""
        found = {}
        for index, flat in enumerate(self.flats):
            for name in ("state1", "state2", "absmax1", "absmax2"):
                if name in self.optimizer.state[flat]:
                    found[f"{index}.{name}"] = self.optimizer.state[flat][name]
        return found

    def load_exact(self, values: dict[str, torch.Tensor]) -> None:
        """Puts back what ``exact`` gave, after ``allocate``."""
        for index, flat in enumerate(self.flats):
            for name in ("state1", "state2", "absmax1", "absmax2"):
                if name in self.optimizer.state[flat]:
                    self.optimizer.state[flat][name].copy_(values[f"{index}.{name}"])
