"""Optimizers besides AdamW: Muon for matrices, and AdamW with 8-bit moments.

Muon (the momentum made orthogonal, https://kellerjordan.github.io/posts/muon/) is torch.optim.Muon, matrix by
matrix, with the step size that matches AdamW's (arXiv 2502.16982), so that one learning rate serves both; everything
that is no inner matrix (embeddings, head, router, norms, biases, the tower's first convolution) stays with AdamW.
Projections that share a tensor (queries, keys and values; gate and up; the experts of a layer) are made orthogonal
each by itself. Under ZeRO a matrix is gathered for that alone; its momentum stays sharded.

8-bit AdamW (arXiv 2110.02861) is bitsandbytes' AdamW8bit, on the float32 masters.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from phi35.training.config import TrainingConfig
from phi35.training.flat_layout import Piece

MOMENTUM = "momentum_buffer"
MUON_MOMENTUM = 0.95


def check_optimizer(config: TrainingConfig) -> None:
    """Checks that a run's optimizer can be had here, before anything is allocated.

    Raises:
        ValueError: if its package is missing.
    """
    if config.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("optimizer 'adamw8bit' needs bitsandbytes, which is not installed: pip install bitsandbytes")


def build(model: Any, groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that a config names, other than AdamW.

    Args:
        model: a ``CausalLM`` whose parameters the groups hold.
        groups: of ``parameter_groups``.
        config: resolved.
    """
    over_masters = config.dtype == "bfloat16" and config.zero_stage == 0
    if config.optimizer == "adamw8bit":
        if over_masters:
            return OverMasters(groups, lambda masters, _: build_adamw8bit(masters, config))
        return build_adamw8bit(groups, config)
    chosen = {id(parameter) for group in groups if group["muon"] for parameter in group["params"]}
    rows = {
        parameter: matrix_rows(name, parameter, model.config)
        for name, parameter in model.named_parameters()
        if id(parameter) in chosen
    }

    def muon(muon_groups: list[dict[str, Any]], rows: dict[nn.Parameter, tuple[int, ...]]) -> torch.optim.Optimizer:
        return MuonWithAdamW(muon_groups, rows, betas=config.adam_betas, eps=config.adam_epsilon)

    if over_masters:
        return OverMasters(groups, lambda masters, of: muon(masters, {of[one]: cut for one, cut in rows.items()}))
    return muon(groups, rows)


def build_adamw8bit(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit moments; tensors under 4,096 elements keep float32 ones."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(
        groups, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_epsilon
    )


def matrix_rows(name: str, parameter: nn.Parameter, model_config: Any) -> tuple[int, ...]:
    """Rows of the matrices that share a parameter's (last two) dimensions, by its in-memory name."""
    rows = getattr(parameter, "ds_shape", parameter.shape)[-2]
    if name.endswith("self_attn.qkv_proj.weight"):
        width = model_config.attention_head_dim
        heads, shared = model_config.num_attention_heads, model_config.num_key_value_heads
        return heads * width, shared * width, shared * width
    if name.endswith(".attn.qkv.weight"):
        return (rows // 3,) * 3
    if "gate_up_proj" in name:
        return rows // 2, rows // 2
    return (rows,)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups that say ``muon=True``, AdamW for the others.

    Args:
        groups: with "params", "lr", "weight_decay" and "muon".
        rows: of every Muon parameter, as ``matrix_rows`` gives them.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        rows: Mapping[nn.Parameter, tuple[int, ...]],
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float = MUON_MOMENTUM,
    ) -> None:
        groups = list(groups)
        adamw = [group for group in groups if not group["muon"]]
        self._adamw = torch.optim.AdamW(adamw, betas=betas, eps=eps, fused=True) if adamw else None
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        if self._adamw is not None:
            self._adamw.state = self.state
        self.rows, self.momentum = dict(rows), momentum
        # Until DeepSpeed shards them, every parameter is its own tensor.
        whole = {one: Piece(one, 0, 0, one.numel(), one.shape) for one in self.rows}
        self._matrices: dict[int, list[tuple[Piece, tuple[int, ...]]]] = {}
        self._device: torch.device | None = None
        self.attach(whole)

    def attach(self, pieces: Mapping[nn.Parameter, Piece], device: torch.device | None = None) -> None:
        """Tells where the parameters lie, once they were sharded.

        Args:
            pieces: of every trained parameter.
            device: where ranks exchange matrices; None where there are no others.
        """
        self._matrices, self._device = {}, device
        for parameter, rows in self.rows.items():
            self._matrices.setdefault(id(pieces[parameter].flat), []).append((pieces[parameter], rows))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure, no loss
        """One update of every tensor that has a gradient; collective where matrices are spread over ranks."""
        assert closure is None, "the loss is not computed again"
        for group in self.param_groups:
            for flat in group["params"] if group["muon"] else ():
                if flat.grad is not None:
                    self._update(flat, group)
        if self._adamw is not None:
            # DeepSpeed shows one group at a time.
            self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            self._adamw.step()

    def _update(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        assert flat.grad is not None
        state = self.state[flat]
        if MOMENTUM not in state:
            state["step"] = torch.tensor(0.0)
            state[MOMENTUM] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        state["step"] += 1
        for piece, rows in self._matrices[id(flat)]:
            gradient, momentum = piece.slice(flat.grad.contiguous()), piece.slice(state[MOMENTUM])
            momentum.lerp_(gradient, 1.0 - self.momentum)
            update = gradient.lerp(momentum, self.momentum)
            whole = piece.gather(update, self._device or flat.device)
            if piece.count == 0:
                continue  # another rank's matrix: it was gathered together, and is updated there
            change = orthogonal_step(whole.to(self._device or flat.device), rows, group["lr"])
            weights = piece.slice(flat)
            weights.mul_(1.0 - group["lr"] * group["weight_decay"])
            weights.add_(piece.part_of(change).to(flat.device))


def orthogonal_step(update: torch.Tensor, rows: tuple[int, ...], lr: float) -> torch.Tensor:
    """What torch.optim.Muon adds to weights of 0 for given updates.

    Args:
        update: (R, C), or (E, R, C) for E experts.
        rows: R cut into the matrices that share the tensor.
        lr: learning rate.

    Returns:
        A tensor of the shape of ``update``.
    """
    change = torch.empty_like(update)
    experts = update.unbind() if update.dim() == 3 else (update,)
    targets = change.unbind() if update.dim() == 3 else (change,)
    for whole, target in zip(experts, targets, strict=True):
        for matrix, part in zip(whole.split(rows), target.split(rows), strict=True):
            weights = nn.Parameter(torch.zeros_like(matrix))
            weights.grad = matrix
            # Momentum and decay were applied where the weights lie; torch's class does the rest.
            torch.optim.Muon(
                [weights], lr=lr, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
            ).step()
            part.copy_(weights)
    return change


class OverMasters(torch.optim.Optimizer):
    """Any optimizer over float32 masters of parameters that become bfloat16 (ZeRO stage 0).

    Args:
        groups: of the model's parameters, in float32.
        build: makes the optimizer from groups of masters; called once, with the masters by parameter.

    Attributes:
        inner: that optimizer; its state belongs to the masters.
        gradient_factor: float32 scalar on the device by which the next step multiplies every gradient (clipping).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        build: Callable[[list[dict[str, Any]], dict[nn.Parameter, nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.gradient_factor: torch.Tensor | None = None
        self.masters: dict[nn.Parameter, nn.Parameter] = {}
        over_masters = []
        for group in self.param_groups:
            for parameter in group["params"]:
                self.masters[parameter] = nn.Parameter(parameter.data.float())
                parameter.data = parameter.data.to(torch.bfloat16)
            over_masters.append({**group, "params": [self.masters[one] for one in group["params"]]})
        self.inner = build(over_masters, self.masters)
        self._inner_groups = list(self.inner.param_groups)

    def value(self, parameter: nn.Parameter) -> torch.Tensor:
        """The master of a parameter."""
        return self.masters[parameter].data

    @torch.no_grad()
    def set_value(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Sets a parameter and its master."""
        self.masters[parameter].copy_(value)
        parameter.copy_(value)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure, no loss
        """One update of every parameter that has a gradient, one after the other: one float32 gradient at a time."""
        assert closure is None, "the loss is not computed again"
        for group, over_masters in zip(self.param_groups, self._inner_groups, strict=True):
            over_masters.update({name: group[name] for name in ("lr", "weight_decay")})
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                master = self.masters[parameter]
                master.grad = parameter.grad.float()
                if self.gradient_factor is not None:
                    master.grad.mul_(self.gradient_factor)
                self.inner.param_groups = [{**over_masters, "params": [master]}]
                self.inner.step()
                master.grad = None
                parameter.copy_(master)
        self.inner.param_groups = self._inner_groups
        self.gradient_factor = None
