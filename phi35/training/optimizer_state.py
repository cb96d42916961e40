"""Float32 masters and Adam moments as whole tensors, one per parameter name, under every ZeRO stage.

DeepSpeed keeps them flat and cut in pieces. Reading gives a tensor of the parameter's own shape (for an
expert-parallel parameter: of this rank's experts); writing spreads it again. Reading and writing are collective:
all ranks call them for the same parameters in the same order.
"""

from typing import Any

import torch
from torch import nn

from phi35.training.engine import Engine
from phi35.training.mixed_precision import MixedPrecisionAdamW

PARAMETER, FIRST_MOMENT, SECOND_MOMENT = "parameter", "exp_avg", "exp_avg_sq"
MOMENTS = (FIRST_MOMENT, SECOND_MOMENT)


class OptimizerState:
    """Access to an engine's masters and moments by parameter.

    Args:
        engine: whose optimizer holds them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.zero, self.base = engine.optimizer, engine.base_optimizer
        self.stage = engine.config.zero_stage
        self.has_masters = engine.config.dtype == "bfloat16"
        if self.num_steps:
            self._link()

    @property
    def num_steps(self) -> int:
        """Updates that Adam has made, by which it corrects its moments' bias."""
        for state in self.base.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    @torch.no_grad()
    def read(self, parameter: nn.Parameter, kind: str) -> torch.Tensor:
        """The master weights or a moment of a parameter, float32, on whatever device they lie.

        Args:
            parameter: of the engine's model; frozen ones have a value but no moments.
            kind: PARAMETER, FIRST_MOMENT or SECOND_MOMENT.
        """
        if not parameter.requires_grad:
            assert kind == PARAMETER, "frozen parameters have no moments"
            return self._frozen(parameter)
        if isinstance(self.base, MixedPrecisionAdamW):
            return (self.base.value(parameter) if kind == PARAMETER else self.base.state[parameter][kind]).float()
        if self.stage == 0:
            return parameter.detach() if kind == PARAMETER else self.base.state[parameter][kind]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == PARAMETER:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, kind)
        assert value is not None, "DeepSpeed knows no master of a trained parameter"
        return value.view(_whole_shape(parameter))

    def allocate_moments(self, num_steps: int) -> None:
        """Gives Adam zero moments and a step count, as if it had made ``num_steps`` updates."""
        for flat in self._flat_parameters():
            if isinstance(self.base, MixedPrecisionAdamW):
                self.base.allocate_moments(flat, num_steps)
                continue
            self.base.state[flat] = {
                "step": torch.tensor(float(num_steps), dtype=torch.float32, device=flat.device),
                **{kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in MOMENTS},
            }
        self._link()

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
        """Sets the master weights or a moment of a trained parameter.

        Args:
            parameter: of the engine's model.
            kind: PARAMETER, FIRST_MOMENT or SECOND_MOMENT (after ``allocate_moments``).
            value: float32, of the parameter's whole shape on this rank.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == PARAMETER and isinstance(self.base, MixedPrecisionAdamW):
            self.base.set_value(parameter, value)
        elif self.stage == 0:
            (parameter if kind == PARAMETER else self.base.state[parameter][kind]).copy_(value)
        elif self.stage == 3:
            self._write_partition(parameter, kind, value)
        elif kind == PARAMETER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _link(self) -> None:
        """Ties each parameter to its moments; DeepSpeed does it once, after the first group's first update."""
        if self.stage in (1, 2):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _write_partition(self, parameter: Any, kind: str, value: torch.Tensor) -> None:
        """DeepSpeed's own setter of whole tensors fails where the ranks do not divide the elements."""
        size = parameter.ds_tensor.ds_numel
        start = size * self.zero._get_param_partition_rank(parameter)
        mine = torch.zeros(size, dtype=torch.float32)
        stop = min(start + size, value.numel())
        if start < stop:
            mine[: stop - start] = value.flatten()[start:stop]
        self.zero.set_local_hp_param(mine, parameter, None if kind == PARAMETER else kind)

    def _flat_parameters(self) -> list[torch.Tensor]:
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return [parameter for group in self.base.param_groups for parameter in group["params"]]

    def _frozen(self, parameter: Any) -> torch.Tensor:
        if not hasattr(parameter, "ds_id"):
            return parameter.detach().float()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()


def _whole_shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
