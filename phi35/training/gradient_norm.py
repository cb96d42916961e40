"""The global norm of all gradients, exact whatever is sharded, and on one GPU found while the backward pass runs.

A norm that is taken after the backward pass reads every gradient once more before the first weight can move. Where one
process holds all gradients, each is read as soon as it is there instead, by kernels beside the backward pass's own.
Small tensors (norms, adapters) are read together at the end: launching a kernel for each takes longer than reading it.
"""

from typing import Any

import torch
from torch import distributed, nn

from phi35 import gradient_squares
from phi35.fused import uses_kernels
from phi35.registry import resolve

LEAST = 2**22
"""Elements from which a tensor has kernels of its own."""


class GradientNorm:
    """Norm of the gradients of some parameters, each expert counted once, where gradients are already averaged.

    Args:
        parameters: all that may have gradients; expert-parallel ones carry ``allreduce=False`` and ``group_name``.
        ahead: sum the squares of a gradient when the backward pass has made it, after ``watch``. Only where the
            gradients are not reduced over processes afterwards.
        least: elements of a tensor that is read ahead.
    """

    def __init__(self, parameters: list[nn.Parameter], ahead: bool, least: int = LEAST) -> None:
        self._watching = False
        self._parts: dict[nn.Parameter, torch.Tensor] = {}
        self._seen: set[nn.Parameter] = set()
        self._buffer = torch.empty(0)
        if ahead and parameters and uses_kernels(parameters[0]):
            self._set_up([parameter for parameter in parameters if parameter.numel() >= least])

    def __call__(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """The norm, a float32 scalar on the gradients' device; ``parameters``: those with gradients."""
        if self._parts:
            self._watching = False
            return self._sum_of_parts(parameters).sqrt()
        return global_gradient_norm(parameters)

    def watch(self) -> None:
        """The next backward pass is the step's last."""
        self._watching = True
        for parameter in self._parts:
            if parameter.grad is None:  # else what is made next is not the whole gradient
                gradient_squares.ask(parameter)

    def _set_up(self, parameters: list[nn.Parameter]) -> None:
        if not parameters:
            return
        counts = [resolve("phi35.kernels.squares:num_parts")(parameter.numel()) for parameter in parameters]
        device = parameters[0].device
        self._buffer = torch.zeros(sum(counts), dtype=torch.float32, device=device)
        self._parts = dict(zip(parameters, self._buffer.split(counts), strict=True))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: Any) -> None:
        """A gradient was accumulated."""
        if not self._watching:
            return
        self._seen.add(parameter)
        squares = gradient_squares.take(parameter)
        if squares is not None:
            part = self._parts[parameter].zero_()
            part[0] = squares
        elif self._stream is None:
            self._write(parameter)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._write(parameter)

    def _write(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        resolve("phi35.kernels.squares:write_parts")(parameter.grad.contiguous(), self._parts[parameter])

    def _sum_of_parts(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        given, small = set(parameters), [parameter for parameter in parameters if parameter not in self._parts]
        for parameter in (self._parts.keys() & given) - self._seen:  # its last micro-batch gave it none
            self._write(parameter)
        for parameter in self._parts.keys() - given:
            self._parts[parameter].zero_()
        self._seen.clear()
        total = self._buffer.sum()
        return total + sum_of_squares(small) if small else total


def global_gradient_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Norm of all gradients after the backward pass, where they are already averaged; see ``GradientNorm``."""
    squares = sum_of_squares([parameter for parameter in parameters if getattr(parameter, "allreduce", True)])
    experts = [parameter for parameter in parameters if not getattr(parameter, "allreduce", True)]
    for name in sorted({parameter.group_name for parameter in experts}):  # type: ignore[attr-defined]
        local = sum_of_squares([one for one in experts if one.group_name == name])  # type: ignore[attr-defined]
        distributed.all_reduce(local, group=resolve("moe.deepspeed_adapter:expert_group")(name))
        squares = squares + local
    return squares.sqrt()


def sum_of_squares(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Of all gradients; float32 from the start, where a norm of bfloat16 would be rounded to it."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return parameters[0].new_zeros((), dtype=torch.float32)
    large = [grad for grad in grads if uses_kernels(grad) and grad.numel() >= LEAST]
    small = [grad for grad in grads if not uses_kernels(grad) or grad.numel() < LEAST]
    total = parameters[0].new_zeros((), dtype=torch.float32)
    if large:
        num_parts, write = resolve("phi35.kernels.squares:num_parts"), resolve("phi35.kernels.squares:write_parts")
        counts = [num_parts(grad.numel()) for grad in large]
        parts = total.new_zeros(sum(counts))
        for grad, part in zip(large, parts.split(counts), strict=True):
            write(grad.contiguous(), part)
        total = total + parts.sum()
    if small:
        total = total + torch.stack(torch._foreach_norm(small, 2.0, torch.float32)).square().sum()
    return total
