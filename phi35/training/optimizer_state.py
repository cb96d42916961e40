"""Float32 masters and moments as whole tensors, one per parameter name, under every ZeRO stage and optimizer.

DeepSpeed keeps them flat and cut in pieces (``phi35.training.flat_layout``). Reading gives a tensor of the
parameter's own shape (for an expert-parallel parameter: of this rank's experts); writing spreads it again. Reading
and writing are collective: all ranks call them for the same parameters in the same order.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from phi35.training.engine import Engine
from phi35.training.flat_layout import Piece, pieces_of
from phi35.training.mixed_precision import MixedPrecisionAdamW
from phi35.training.optimizers import MOMENTUM, MuonWithAdamW, OverMasters
from phi35.training.quantized_moments import QuantizedMoments

PARAMETER, FIRST_MOMENT, SECOND_MOMENT = "parameter", "exp_avg", "exp_avg_sq"
AVERAGE = "average"
MOMENTS = (FIRST_MOMENT, SECOND_MOMENT)


class OptimizerState:
    """Access to an engine's masters and moments by parameter.

    Args:
        engine: whose optimizer holds them.

    Attributes:
        quantized: the 8-bit moments, where the optimizer has them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.zero, self.base = engine.optimizer, engine.base_optimizer
        assert engine.config.zero_stage is not None
        self.stage = engine.config.zero_stage
        self.has_masters = engine.config.dtype == "bfloat16"
        self.pieces = pieces_of(self.zero, self.stage, self.base)
        self.driven: Any = self.base.inner if isinstance(self.base, OverMasters) else self.base
        self.quantized: QuantizedMoments | None = None
        if engine.config.optimizer == "adamw8bit":
            self.quantized = QuantizedMoments(self.driven, [piece.flat for piece in self.pieces.values()])

    @property
    def num_steps(self) -> int:
        """Updates that the optimizer has made, by which Adam corrects its moments' bias."""
        for state in self.driven.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def moments_of(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Kinds of the moments that the optimizer keeps of a trained parameter."""
        if isinstance(self.driven, MuonWithAdamW):
            key = self.base.masters[parameter] if isinstance(self.base, OverMasters) else parameter
            if key in self.driven.rows:
                return (MOMENTUM,)
        return MOMENTS

    def kinds_of(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Everything that a checkpoint holds of a parameter."""
        if not parameter.requires_grad:
            return (PARAMETER,)
        average = (AVERAGE,) if self.engine.average is not None else ()
        return (PARAMETER, *average, *(self.moments_of(parameter) if self.num_steps else ()))

    @torch.no_grad()
    def read(self, parameter: nn.Parameter, kind: str) -> torch.Tensor:
        """The master weights, their average or a moment of a parameter, float32, on whatever device they lie.

        Args:
            parameter: of the engine's model; frozen ones have a value but no moments.
            kind: one of ``kinds_of``.
        """
        if not parameter.requires_grad:
            assert kind == PARAMETER, "frozen parameters have no moments"
            return self._frozen(parameter)
        piece = self.pieces[parameter]
        if kind == PARAMETER:
            part = piece.slice(piece.flat.detach())
        elif kind == AVERAGE:
            assert self.engine.average is not None
            part = self.engine.average.value_of(piece)
        elif self.quantized is not None:
            part = self.quantized.read(piece, kind)
        else:
            part = piece.slice(self._state(parameter, piece)[kind])
        return piece.gather(part.float(), self.engine.environment.device)

    def allocate_moments(self, num_steps: int) -> None:
        """Gives the optimizer zero moments and a step count, as if it had made ``num_steps`` updates."""
        if self.quantized is not None:
            self.quantized.allocate(num_steps)
            return
        for parameter, piece in self.pieces.items():
            if isinstance(self.base, MixedPrecisionAdamW):
                self.base.allocate_moments(parameter, num_steps)
                continue
            flat = piece.flat
            self.driven.state[flat] = {
                "step": torch.tensor(float(num_steps), dtype=torch.float32, device=self._step_device(parameter, flat)),
                **{
                    kind: torch.zeros_like(flat, memory_format=torch.preserve_format)
                    for kind in self.moments_of(parameter)
                },
            }

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
        """Sets the master weights or a moment of a trained parameter.

        Args:
            parameter: of the engine's model.
            kind: PARAMETER, AVERAGE, or one of ``moments_of`` (after ``allocate_moments``).
            value: float32, of the parameter's whole shape on this rank.
        """
        piece = self.pieces[parameter]
        part = piece.part_of(value)
        if kind == PARAMETER:
            piece.slice(piece.flat.detach()).copy_(part)
            if self.stage == 0 and piece.flat is not parameter:
                parameter.copy_(value)
        elif kind == AVERAGE:
            assert self.engine.average is not None
            self.engine.average.value_of(piece).copy_(part)
        elif self.quantized is not None:
            self.quantized.write(piece, kind, part)
        else:
            piece.slice(self._state(parameter, piece)[kind]).copy_(part)

    def finish(self) -> None:
        """After the last ``write``: makes 8-bit moments of what was written."""
        if self.quantized is not None:
            self.quantized.finish()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Makes the model's weights follow masters that were written while it is in training."""
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            self.zero._partition_all_parameters()
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            if self.zero.persistent_parameters:
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def own_tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, name, tensor) of what this rank keeps besides, so that the same layout goes on to the bit."""
        if self.quantized is not None and self.num_steps:
            for name, value in self.quantized.exact().items():
                yield self._own_kind(), name, value

    def read_own_tensors(self, reader: Any) -> bool:
        """Takes back ``own_tensors``; False where the checkpoint has none of this rank in this layout."""
        names = reader.names(self._own_kind()) if self.quantized is not None and self.num_steps else ()
        if not names:
            return False
        assert self.quantized is not None
        self.quantized.load_exact({name: reader.read(self._own_kind(), name) for name in names})
        return True

    def _own_kind(self) -> str:
        """Names rank and layout: in another one, codes would stand beside other scales."""
        flats = {id(piece.flat): None for piece in self.pieces.values()}
        order = {flat: index for index, flat in enumerate(flats)}
        layout = [
            (order[id(one.flat)], one.flat.numel(), one.offset, one.start, one.count) for one in self.pieces.values()
        ]
        place = self.engine.environment
        digest = hashlib.sha256(json.dumps([place.world_size, layout]).encode()).hexdigest()[:16]
        return f"rank-{place.rank:05d}-{digest}"

    def _state(self, parameter: nn.Parameter, piece: Piece) -> dict[str, Any]:
        if isinstance(self.base, MixedPrecisionAdamW):
            return self.base.state[parameter]
        return self.driven.state[piece.flat]

    def _step_device(self, parameter: nn.Parameter, flat: torch.Tensor) -> torch.device:
        """torch's fused AdamW counts on the tensor's device, Muon on the host."""
        return torch.device("cpu") if self.moments_of(parameter) == (MOMENTUM,) else flat.device

    def _frozen(self, parameter: Any) -> torch.Tensor:
        if not hasattr(parameter, "ds_id"):
            return parameter.detach().float()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
