"""Updates that are left out where a loss or gradient is not finite, on all ranks alike and without asking the device.

A loss that is not finite makes all gradients of its rank NaN, and so, once they are summed over ranks, everybody's
gradient norm. At ZeRO stages 1 to 3 DeepSpeed looks at that norm before it updates. At stage 0 this module does: the
fused optimizers take the decision as a number on the device; others wait for it on the host.
"""

from typing import Any

import torch
from torch import nn

from phi35.training.mixed_precision import MixedPrecisionAdamW
from phi35.training.optimizers import OverMasters


def poisoned(objective: torch.Tensor) -> torch.Tensor:
    """The objective itself where it is finite, to the bit; else one whose gradients are all NaN.

    A loss can be infinite while its gradient is not: that of a label whose logit is -inf.
    """
    return objective * (objective.detach() * 0 + 1)


def is_applied(gradient_norm: torch.Tensor | float | None) -> torch.Tensor | bool:
    """Whether a step of this global gradient norm changed the weights; a bool scalar on the norm's device."""
    if gradient_norm is None:
        return True
    return torch.isfinite(torch.as_tensor(gradient_norm))


class UpdateGuard:
    """Clips, and updates only where the gradient norm is finite: what DeepSpeed lacks at ZeRO stage 0.

    It takes the place of the optimizer's ``step``.

    Args:
        optimizer: whose step is guarded.
        parameters: all that are trained.
        clipping: largest global norm; 0 for no clipping.
        norm: gives the global norm of the gradients of parameters, float32 on the device, equal on all ranks.

    Attributes:
        gradient_norm: of the last step, before clipping.
    """

    def __init__(self, optimizer: Any, parameters: list[nn.Parameter], clipping: float, norm: Any) -> None:
        self.optimizer, self.parameters, self.clipping, self.norm = optimizer, parameters, clipping, norm
        self.gradient_norm: torch.Tensor | None = None
        self._update = optimizer.step
        optimizer.step = self.step

    @torch.no_grad()
    def step(self, *arguments: Any, **options: Any) -> None:
        """One update, or none."""
        parameters = [parameter for parameter in self.parameters if parameter.grad is not None]
        norm = self.gradient_norm = self.norm(parameters)
        finite = torch.isfinite(norm)
        factor = (self.clipping / (norm + 1e-6)).clamp(max=1.0) if self.clipping else torch.ones_like(norm)
        if isinstance(self.optimizer, MixedPrecisionAdamW):  # multiplies where the update reads the gradients anyway
            self.optimizer.gradient_factor = torch.where(finite, factor, torch.nan)
            self._update(*arguments, **options)
            return
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if isinstance(self.optimizer, torch.optim.AdamW) and self.optimizer.defaults["fused"]:
            if self.clipping:
                torch._foreach_mul_(grads, factor)
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # as GradScaler sets it
            self._update(*arguments, **options)
        elif bool(finite):
            if isinstance(self.optimizer, OverMasters):
                self.optimizer.gradient_factor = factor
            elif self.clipping:
                torch._foreach_mul_(grads, factor)
            self._update(*arguments, **options)
