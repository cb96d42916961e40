"""AdamW (arXiv 1711.05101) for bfloat16 weights, with what the update needs beside them.

With float32 state each weight has a float32 master and float32 moments (14 bytes a parameter beside the gradient, as
in arXiv 1710.03740). With bfloat16 state the weights are their own master and the moments are bfloat16 too (6 bytes);
every value is then rounded stochastically (arXiv 1502.02551), or an update below 1/256 of a weight would always be
lost. The noise is a function of seed, step, parameter and element: a resumed run rounds as an unbroken one.

On a CUDA device one kernel updates a tensor and reads and writes everything once; elsewhere torch operations do.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from phi35.jitter import WORD, mix, noise_bits
from phi35.registry import resolve
from phi35.training import optimizers
from phi35.training.config import TrainingConfig
from phi35.training.parameter_groups import parameter_groups

MASTER, FIRST_MOMENT, SECOND_MOMENT = "master", "exp_avg", "exp_avg_sq"


def build_optimizer(model: nn.Module, config: TrainingConfig, world_size: int) -> torch.optim.Optimizer:
    """The optimizer of the model's trained parameters, which it makes bfloat16 where it keeps their masters itself.

    Args:
        model: on its device.
        config: resolved.
        world_size: number of processes.
    """
    groups = parameter_groups(model, config)
    options: dict[str, Any] = {"betas": config.adam_betas, "eps": config.adam_epsilon}
    own_masters = config.dtype == "bfloat16" and config.zero_stage == 0
    optimizer: torch.optim.Optimizer
    if config.optimizer != "adamw":
        optimizer = optimizers.build(model, groups, config)
    elif own_masters:
        state_dtype = getattr(torch, config.optimizer_dtype)
        optimizer = MixedPrecisionAdamW(groups, state_dtype=state_dtype, seed=config.seed, **options)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True, **options)
    for parameter in model.parameters() if own_masters else ():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
        elif config.gradient_accumulation_steps(world_size) > 1:
            # Several micro-batches are summed in float32; a single one is exact in bfloat16, for half the memory.
            parameter.grad_dtype = torch.float32
    return optimizer


class MixedPrecisionAdamW(torch.optim.Optimizer):
    """AdamW whose parameters become bfloat16; their float32 values, if they had them, become the masters.

    Args:
        groups: parameter groups with "params", "lr" and "weight_decay"; contiguous parameters.
        betas: decay of the moments.
        eps: Adam's epsilon.
        state_dtype: float32 or bfloat16, of masters and moments.
        seed: of stochastic rounding.

    Attributes:
        gradient_factor: float32 scalar on the device by which the next step multiplies every gradient (clipping);
            the gradients themselves are left alone. NaN leaves weights and moments as they are.

    Raises:
        ValueError: for another state dtype.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype}")
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "betas": betas, "eps": eps})
        self.state_dtype, self.seed = state_dtype, seed
        self.gradient_factor: torch.Tensor | None = None
        for parameter in self._parameters():
            if state_dtype == torch.float32:
                # The float32 storage itself where there is one: no second copy while the model is converted.
                self.state[parameter][MASTER] = parameter.data.float()
            parameter.data = parameter.data.to(torch.bfloat16)

    def value(self, parameter: torch.Tensor) -> torch.Tensor:
        """The most exact value of a parameter: its master, or itself."""
        return self.state[parameter].get(MASTER, parameter.data)

    @torch.no_grad()
    def set_value(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Sets a parameter and its master."""
        if MASTER in self.state[parameter]:
            self.state[parameter][MASTER].copy_(value)
        parameter.copy_(value)

    def allocate_moments(self, parameter: torch.Tensor, num_steps: int = 0) -> None:
        """Gives a parameter zero moments, as if it had made ``num_steps`` updates."""
        moments = {
            name: torch.zeros_like(parameter, dtype=self.state_dtype, memory_format=torch.preserve_format)
            for name in (FIRST_MOMENT, SECOND_MOMENT)
        }
        self.state[parameter].update(step=torch.tensor(float(num_steps)), **moments)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure, no loss
        """One update of every parameter that has a gradient."""
        assert closure is None, "the loss is not computed again"
        index = -1
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1  # counts parameters without gradient too: the noise of the others must not hang on them
                if parameter.grad is not None:
                    self._update(parameter, group, index)
        self.gradient_factor = None

    @torch.no_grad()
    def take_back(self, num_steps: int) -> None:
        """Forgets steps that a NaN factor left out, and which only the host's step counts hold."""
        for parameter in self._parameters():
            if num_steps and "step" in self.state[parameter]:
                self.state[parameter]["step"] -= num_steps

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[parameter]
        if FIRST_MOMENT not in state:
            self.allocate_moments(parameter)
        state["step"] += 1
        num_steps, (beta1, beta2) = int(state["step"]), group["betas"]
        assert parameter.grad is not None
        arguments: dict[str, Any] = {
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": group["eps"],
            "decay": 1.0 - group["lr"] * group["weight_decay"],
            "step_size": group["lr"] / (1.0 - beta1**num_steps),
            "second_correction": (1.0 - beta2**num_steps) ** -0.5,
            "key": _key(self.seed, num_steps, index) if self.state_dtype == torch.bfloat16 else 0,
        }
        update = resolve("phi35.kernels.adamw:update") if parameter.is_cuda else _update_with_torch
        update(
            parameter.data,
            parameter.grad.contiguous(),
            state.get(MASTER),
            state[FIRST_MOMENT],
            state[SECOND_MOMENT],
            self.gradient_factor,
            **arguments,
        )

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _update_with_torch(
    weights: torch.Tensor,
    grad: torch.Tensor,
    master: torch.Tensor | None,
    first: torch.Tensor,
    second: torch.Tensor,
    factor: torch.Tensor | None,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    step_size: float,
    second_correction: float,
    key: int,
) -> None:
    """What the kernel does, element for element (``phi35.kernels.adamw``)."""
    if factor is not None and factor.isnan():
        return
    upstream = grad.float() if factor is None else grad.float() * factor
    mean = first.float() * beta1 + upstream * (1.0 - beta1)
    square = second.float() * beta2 + upstream.square() * (1.0 - beta2)
    value = (weights if master is None else master).float() * decay
    value -= step_size * mean / (square.sqrt() * second_correction + epsilon)
    if master is not None:
        master.copy_(value)
    bits = more = None
    if first.dtype == torch.bfloat16 or master is None:
        bits = noise_bits(weights.numel(), key, weights.device).view(weights.shape)
        more = mix(bits + 1640531527 & WORD)
    weights.copy_(value if master is not None or bits is None else round_stochastically(value, bits >> 16))
    if first.dtype == torch.bfloat16:
        assert bits is not None and more is not None
        mean, square = round_stochastically(mean, bits & 0xFFFF), round_stochastically(square, more >> 16)
    first.copy_(mean)
    second.copy_(square)


def round_stochastically(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """float32 to a value that bfloat16 holds: up with the probability of the part cut off.

    Args:
        value: float32.
        noise: int64 in [0, 2^16), of the same shape.
    """
    bits = value.view(torch.int32) + noise.to(torch.int32)
    return (bits & ~0xFFFF).view(torch.float32)


def _key(seed: int, step: int, index: int) -> int:
    """31 bits from a hash: neighbouring steps and parameters share no pattern."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
