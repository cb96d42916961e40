"""The experts as torch operators, with shapes known without running them and gradients.

As ``torch.library`` operators they go through torch.compile and CUDA graphs whole; nothing in them reads a value on
the host. A training pass is two operators, so that what the second saved is freed before the first one's backward
needs memory: ``experts_up`` keeps the sorted rows, ``experts_down`` the gate and up rows; the gated rows are computed
again from those.
"""

import importlib
from types import ModuleType
from typing import Any

import torch

from moe.kernels import decode, grouped_gemm, rows, tuning
from moe.kernels.hopper_config import HopperConfig
from moe.kernels.routing import RoutingPlan, padded_rows, plan_routing, plan_size
from phi35 import gradient_squares

_ALIGN = grouped_gemm.HALF_ROWS
STRIP = 1024
"""Columns of gate_up_proj's gradient that are made together where there are many rows: so much of the sorted tokens
is held again in backward, instead of all of them since the forward pass."""
_MANY_ROWS = 4096


@torch.library.custom_op("phi35_moe::experts_decode", mutates_args=())
def experts_decode(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str,
) -> torch.Tensor:
    """Weighted sum of each token's experts for a few tokens, (N, D); no gradients."""
    config = tuning.choose_decode(hidden_states.shape[0])
    return decode.decode_experts(
        hidden_states, expert_indices, expert_weights, gate_up_proj, down_proj, hidden_act, config
    )


@experts_decode.register_fake
def _(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str,
) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@torch.library.custom_op("phi35_moe::experts_up", mutates_args=())
def experts_up(
    hidden_states: torch.Tensor, expert_indices: torch.Tensor, gate_up_proj: torch.Tensor, hidden_act: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort tokens by expert, multiply by gate and up, gate.

    Args:
        hidden_states: (N, D).
        expert_indices: (N, k) in [0, E).
        gate_up_proj: (E, 2F, D), gate first.
        hidden_act: "silu" or "gelu".
        save: return the gate and up rows, which the backward pass needs; else that result is empty.

    Returns:
        gated rows (P, F); gate and up rows (P, 2F), through which gradients come back; the routing plan's buffer.
    """
    num_experts, double, hidden_size = gate_up_proj.shape
    how = tuning.choose(hidden_states.dtype, hidden_states.device, (hidden_size, double // 2), hidden_act).up
    plan = plan_routing(expert_indices, num_experts, _ALIGN)
    sorted_rows = rows.gather_rows(hidden_states, plan, expert_indices.shape[1])
    acted, gate_up = rows_by_experts_gated(sorted_rows, gate_up_proj, plan, hidden_act, how, save)
    return acted, gate_up if save else hidden_states.new_empty(0), plan.buffer


@experts_up.register_fake
def _(
    hidden_states: torch.Tensor, expert_indices: torch.Tensor, gate_up_proj: torch.Tensor, hidden_act: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_experts, double, _ = gate_up_proj.shape
    num_pairs = expert_indices.shape[0] * expert_indices.shape[1]
    num_rows = padded_rows(num_pairs, num_experts, _ALIGN)
    return (
        hidden_states.new_empty((num_rows, double // 2)),
        hidden_states.new_empty((num_rows, double) if save else (0,)),
        hidden_states.new_empty((plan_size(num_pairs, num_experts, _ALIGN),), dtype=torch.int32),
    )


@torch.library.custom_op("phi35_moe::experts_up_backward", mutates_args=())
def experts_up_backward(
    gate_up_grad: torch.Tensor,
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    plan_buffer: torch.Tensor,
    top_k: int,
    hidden_act: str,
    input_wanted: bool,
    weights_wanted: bool,
    squares_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``experts_up`` to hidden_states and gate_up_proj; one that is not wanted is empty.

    The third result holds partial sums of the squares of gate_up_proj's gradient, if they are wanted and its kernel
    can leave them; else it is empty.
    """
    num_experts, double, hidden_size = gate_up_proj.shape
    plan = RoutingPlan.view(plan_buffer, hidden_states.shape[0] * top_k, num_experts, _ALIGN)
    how = tuning.choose(gate_up_grad.dtype, gate_up_grad.device, (hidden_size, double // 2), hidden_act)
    input_grad, weights_grad = gate_up_grad.new_empty(0), gate_up_grad.new_empty(0)
    squares = gate_up_grad.new_empty(0, dtype=torch.float32)
    # The weights' gradient last: it is the largest, and the rows' gradient is freed by then.
    if input_wanted:
        rows_grad = rows_by_experts(gate_up_grad, gate_up_proj, plan, False, how.up_rows)
        input_grad = rows.combine_rows(rows_grad, plan.places, top_k, None, gate_up_grad.dtype)
        del rows_grad
    if weights_wanted:
        weights_grad = torch.empty_like(gate_up_proj, memory_format=torch.contiguous_format)
        strip = STRIP if plan.num_rows >= _MANY_ROWS else hidden_size
        strips = weights_grad.split(strip, dim=2)
        sizes = [_num_squares(one, how.up_weights) if squares_wanted else 0 for one in strips]
        squares = squares.new_empty(sum(sizes))
        for index, (out, part) in enumerate(zip(strips, squares.split(sizes), strict=True)):
            sorted_rows = rows.gather_rows(hidden_states[:, index * strip : (index + 1) * strip], plan, top_k)
            rows_by_rows(gate_up_grad, sorted_rows, plan, how.up_weights, out, part)
            del sorted_rows
    return input_grad, weights_grad, squares


@experts_up_backward.register_fake
def _(
    gate_up_grad: torch.Tensor,
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    plan_buffer: torch.Tensor,
    top_k: int,
    hidden_act: str,
    input_wanted: bool,
    weights_wanted: bool,
    squares_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        gate_up_grad.new_empty(hidden_states.shape if input_wanted else (0,)),
        gate_up_proj.new_empty(gate_up_proj.shape if weights_wanted else (0,)),
        _squares_of_unknown_number(gate_up_grad, squares_wanted),
    )


@torch.library.custom_op("phi35_moe::experts_down", mutates_args=())
def experts_down(
    acted: torch.Tensor,
    gate_up: torch.Tensor,
    expert_weights: torch.Tensor,
    down_proj: torch.Tensor,
    plan_buffer: torch.Tensor,
    hidden_act: str,
) -> torch.Tensor:
    """Multiply gated rows (P, F) by down_proj (E, D, F) and add each token's rows, weighted: (N, D).

    Gradients go to ``gate_up``, from which ``acted`` came, to ``expert_weights`` (N, k) and to ``down_proj``.
    """
    num_experts, hidden_size, width = down_proj.shape
    how = tuning.choose(acted.dtype, acted.device, (hidden_size, width), hidden_act)
    plan = RoutingPlan.view(plan_buffer, expert_weights.numel(), num_experts, _ALIGN)
    mixed = rows_by_experts(acted, down_proj, plan, True, how.down)
    return rows.combine_rows(mixed, plan.places, expert_weights.shape[1], expert_weights, acted.dtype)


@experts_down.register_fake
def _(
    acted: torch.Tensor,
    gate_up: torch.Tensor,
    expert_weights: torch.Tensor,
    down_proj: torch.Tensor,
    plan_buffer: torch.Tensor,
    hidden_act: str,
) -> torch.Tensor:
    return acted.new_empty((expert_weights.shape[0], down_proj.shape[1]))


@torch.library.custom_op("phi35_moe::experts_down_backward", mutates_args=())
def experts_down_backward(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    expert_weights: torch.Tensor,
    down_proj: torch.Tensor,
    plan_buffer: torch.Tensor,
    hidden_act: str,
    weights_wanted: bool,
    squares_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``experts_down`` to gate_up, expert_weights (float32) and down_proj (empty if not wanted).

    The last result is as of ``experts_up_backward``, of down_proj's gradient.
    """
    num_experts, hidden_size, width = down_proj.shape
    how = tuning.choose(grad.dtype, grad.device, (hidden_size, width), hidden_act)
    plan = RoutingPlan.view(plan_buffer, expert_weights.numel(), num_experts, _ALIGN)
    upstream = rows.gather_rows(grad, plan, expert_weights.shape[1])
    acted_grad = rows_by_experts(upstream, down_proj, plan, False, how.down_rows)
    gate_up_grad, acted, expert_weights_grad = rows.gate_rows_backward(
        acted_grad, gate_up, plan, expert_weights, hidden_act
    )
    if not weights_wanted:
        return gate_up_grad, expert_weights_grad, grad.new_empty(0), grad.new_empty(0, dtype=torch.float32)
    weights_grad = torch.empty_like(down_proj, memory_format=torch.contiguous_format)
    size = _num_squares(weights_grad, how.down_weights) if squares_wanted else 0
    squares = grad.new_empty(size, dtype=torch.float32)
    rows_by_rows(upstream, acted, plan, how.down_weights, weights_grad, squares)
    return gate_up_grad, expert_weights_grad, weights_grad, squares


@experts_down_backward.register_fake
def _(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    expert_weights: torch.Tensor,
    down_proj: torch.Tensor,
    plan_buffer: torch.Tensor,
    hidden_act: str,
    weights_wanted: bool,
    squares_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(gate_up),
        expert_weights.new_empty(expert_weights.shape, dtype=torch.float32),
        down_proj.new_empty(down_proj.shape if weights_wanted else (0,)),
        _squares_of_unknown_number(grad, squares_wanted),
    )


def _squares_of_unknown_number(like: torch.Tensor, wanted: bool) -> torch.Tensor:
    """Their number hangs on the kernel that is chosen on the device."""
    if not wanted:
        return like.new_empty(0, dtype=torch.float32)
    return like.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)


def _up_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden_states, expert_indices, gate_up_proj, hidden_act, _ = inputs
    plan_buffer = output[-1]
    # Gradients come through the gate and up rows alone; zeros must not be made for the other outputs.
    ctx.set_materialize_grads(False)
    # The tokens, which others keep too, not their sorted copies: those are made again.
    ctx.save_for_backward(hidden_states, gate_up_proj, plan_buffer)
    ctx.top_k = expert_indices.shape[1]
    ctx.hidden_act = hidden_act


def _up_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    gate_up_grad = grads[1]
    if gate_up_grad is None:
        return (None,) * 5
    input_wanted, _, weights_wanted, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors
    squares_wanted = weights_wanted and gradient_squares.are_wanted(saved[1])
    input_grad, weights_grad, squares = experts_up_backward(
        gate_up_grad, *saved, ctx.top_k, ctx.hidden_act, input_wanted, weights_wanted, squares_wanted
    )
    gradient_squares.offer(saved[1], squares)
    return input_grad if input_wanted else None, None, weights_grad if weights_wanted else None, None, None


def _down_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, gate_up, expert_weights, down_proj, plan_buffer, hidden_act = inputs
    ctx.save_for_backward(gate_up, expert_weights, down_proj, plan_buffer)
    ctx.hidden_act = hidden_act


def _down_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    _, rows_wanted, weights_wanted, down_wanted, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors  # once: under checkpointing a second look is an error
    squares_wanted = down_wanted and gradient_squares.are_wanted(saved[2])
    gate_up_grad, weights_grad, down_grad, squares = experts_down_backward(
        grad, *saved, ctx.hidden_act, down_wanted, squares_wanted
    )
    gradient_squares.offer(saved[2], squares)
    return (
        None,
        gate_up_grad if rows_wanted else None,
        weights_grad.to(saved[1].dtype) if weights_wanted else None,
        down_grad if down_wanted else None,
        None,
        None,
    )


experts_up.register_autograd(_up_backward, setup_context=_up_context)
experts_down.register_autograd(_down_backward, setup_context=_down_context)


def rows_by_experts_gated(
    values: torch.Tensor,
    gate_up_proj: torch.Tensor,
    plan: RoutingPlan,
    hidden_act: str,
    config: tuning.ProductConfig,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(rows W_gate) * (rows W_up) by the kernel that the config names, and the products with ``save``."""
    gate_up_proj = _aligned(gate_up_proj)
    if isinstance(config, HopperConfig):
        return _hopper("hopper_gemm").rows_by_experts_gated(values, gate_up_proj, plan, config, save=save)
    return grouped_gemm.rows_by_experts_gated(values, gate_up_proj, plan, hidden_act, config, save=save)


def rows_by_experts(
    values: torch.Tensor,
    weights: torch.Tensor,
    plan: RoutingPlan,
    transposed: bool,
    config: tuning.ProductConfig,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each expert's rows times its weights by the kernel that the config names; ``out`` is allocated where None."""
    weights = _aligned(weights)
    if isinstance(config, HopperConfig):
        return _hopper("hopper_gemm").rows_by_experts(values, weights, plan, transposed, config, out)
    return grouped_gemm.rows_by_experts(values, weights, plan, transposed, config, out)


def rows_by_rows(
    left: torch.Tensor,
    right: torch.Tensor,
    plan: RoutingPlan,
    config: tuning.ProductConfig,
    out: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each expert's sum of outer products by the kernel that the config names; ``out`` is allocated where None.

    ``squares`` is as ``_num_squares`` says, or empty or None if they are not wanted.
    """
    if isinstance(config, HopperConfig):
        squares = None if squares is None or len(squares) == 0 else squares
        return _hopper("hopper_weights").rows_by_rows(left, right, plan, config, out, squares)
    return grouped_gemm.rows_by_rows(left, right, plan, config, out)


def _num_squares(weights_grad: torch.Tensor, config: tuning.ProductConfig) -> int:
    """Partial sums of squares that the kernel of a gradient (E, M, C) leaves; 0 where it leaves none."""
    if not isinstance(config, HopperConfig):
        return 0
    return int(_hopper("hopper_weights").num_squares(*weights_grad.shape, config))


def _aligned(weights: torch.Tensor) -> torch.Tensor:
    """The weights, copied if they start at an odd place of a flat buffer: descriptors need multiples of 16 bytes."""
    return weights if weights.data_ptr() % 16 == 0 else weights.clone()


def _hopper(name: str) -> ModuleType:
    """A module of Gluon kernels, imported where it is used: the dialect is experimental and changes with Triton."""
    return importlib.import_module(f"moe.kernels.{name}")
