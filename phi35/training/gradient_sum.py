"""Gradients added over ranks in place, where no ZeRO stage does it.

DeepSpeed's own reduction at stage 0 copies every gradient to a float32 buffer and back, those of experts too, which
with as many ranks as share them need no reduction at all. Here a large gradient is reduced where it lies, in its own
dtype; only small ones are joined.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from phi35.registry import resolve

LARGE = 1_000_000
"""Elements from which a gradient travels alone."""


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Adds each gradient over all ranks; an expert-parallel one over the ranks that hold the same experts.

    Args:
        parameters: trained ones, the same on every rank; a missing gradient counts as zeros.
    """
    by_group: dict[str | None, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
        name = None if getattr(parameter, "allreduce", True) else parameter.group_name  # type: ignore[attr-defined]
        by_group.setdefault(name, []).append(parameter.grad)
    works: list[Any] = []
    joined: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    for name, grads in by_group.items():
        group = distributed.group.WORLD if name is None else resolve("moe.deepspeed_adapter:expert_data_group")(name)
        if distributed.get_world_size(group) == 1:
            continue
        for grad in grads:
            if grad.numel() >= LARGE and grad.is_contiguous():
                works.append(distributed.all_reduce(grad, group=group, async_op=True))
        for dtype in dict.fromkeys(grad.dtype for grad in grads):  # in the order of the parameters on every rank
            small = [g for g in grads if g.dtype == dtype and not (g.numel() >= LARGE and g.is_contiguous())]
            if small:
                flat = _flatten_dense_tensors(small)
                works.append(distributed.all_reduce(flat, group=group, async_op=True))
                joined.append((flat, small))
    for work in works:
        work.wait()
    for flat, small in joined:
        torch._foreach_copy_(small, list(_unflatten_dense_tensors(flat, small)))
