"""The experts as two torch operators, forward and backward, with shapes known without running them.

As ``torch.library`` operators they go through torch.compile and CUDA graphs whole; nothing in them reads a value on
the host. Backward keeps the sorted rows and the first product; the gated rows are computed again from it.
"""

import importlib
from types import ModuleType
from typing import Any

import torch

from moe.kernels import decode, grouped_gemm, rows, tuning
from moe.kernels.hopper_config import HopperConfig
from moe.kernels.routing import RoutingPlan, padded_rows, plan_routing, plan_size


@torch.library.custom_op("phi35_moe::experts_forward", mutates_args=())
def experts_forward(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum of each token's experts.

    Args:
        hidden_states: (N, D).
        expert_indices: (N, k) in [0, E).
        expert_weights: (N, k).
        gate_up_proj: (E, 2F, D), gate first.
        down_proj: (E, D, F).
        hidden_act: "silu" or "gelu".
        save: return what the backward pass needs; else those three are empty.

    Returns:
        (N, D); then sorted rows (P, D), gate and up rows (P, 2F), and the routing plan's buffer.
    """
    num_tokens, top_k = expert_indices.shape
    if not save and num_tokens <= decode.MAX_TOKENS:
        config = tuning.choose_decode(num_tokens)
        out = decode.decode_experts(
            hidden_states, expert_indices, expert_weights, gate_up_proj, down_proj, hidden_act, config
        )
        return out, *_nothing(hidden_states)
    num_experts, _, width = down_proj.shape
    how = tuning.choose(hidden_states.dtype, hidden_states.device, (hidden_states.shape[1], width), hidden_act)
    plan = plan_routing(expert_indices, num_experts, grouped_gemm.TILE_ROWS)
    sorted_rows = rows.gather_rows(hidden_states, plan, top_k)
    if isinstance(how.up, HopperConfig):
        acted, gate_up = _hopper("hopper_gemm").rows_by_experts_gated(
            sorted_rows, gate_up_proj, plan, how.up, save=save
        )
    elif how.up is None:
        gate_up = _torch_rows(sorted_rows, gate_up_proj.transpose(1, 2), plan)
        acted = rows.gate_rows(gate_up, plan, hidden_act)
    else:
        acted, gate_up = grouped_gemm.rows_by_experts_gated(
            sorted_rows, gate_up_proj, plan, hidden_act, how.up, save=save
        )
    if not save:
        sorted_rows, gate_up, _ = _nothing(hidden_states)
    mixed = _rows_by_experts(acted, down_proj, plan, True, how.down)
    out = rows.combine_rows(mixed, plan, top_k, expert_weights, hidden_states.dtype)
    if not save:
        return out, *_nothing(hidden_states)
    return out, sorted_rows, gate_up, plan.buffer


@experts_forward.register_fake
def _(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    if not save:
        return out, *_nothing(hidden_states)
    num_experts, double, hidden_size = gate_up_proj.shape
    num_pairs = expert_indices.shape[0] * expert_indices.shape[1]
    num_rows = padded_rows(num_pairs, num_experts, grouped_gemm.TILE_ROWS)
    size = plan_size(num_pairs, num_experts, grouped_gemm.TILE_ROWS)
    return (
        out,
        hidden_states.new_empty((num_rows, hidden_size)),
        hidden_states.new_empty((num_rows, double)),
        hidden_states.new_empty((size,), dtype=torch.int32),
    )


@torch.library.custom_op("phi35_moe::experts_backward", mutates_args=())
def experts_backward(
    grad: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    sorted_rows: torch.Tensor,
    gate_up: torch.Tensor,
    plan_buffer: torch.Tensor,
    hidden_act: str,
    input_wanted: bool,
    weights_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``experts_forward`` to hidden_states, expert_weights (float32), gate_up_proj and down_proj.

    Args:
        grad: (N, D) upstream.
        expert_weights: (N, k).
        gate_up_proj: (E, 2F, D).
        down_proj: (E, D, F).
        sorted_rows: (P, D) from forward.
        gate_up: (P, 2F) from forward.
        plan_buffer: the routing plan's buffer from forward.
        hidden_act: "silu" or "gelu".
        input_wanted: compute the gradient to hidden_states; else it is empty.
        weights_wanted: compute those to gate_up_proj and down_proj; else they are empty.
    """
    num_experts, hidden_size, width = down_proj.shape
    top_k = expert_weights.shape[1]
    plan = RoutingPlan.view(plan_buffer, expert_weights.numel(), num_experts, grouped_gemm.TILE_ROWS)
    how = tuning.choose(grad.dtype, grad.device, (hidden_size, width), hidden_act)
    upstream = rows.gather_rows(grad, plan, top_k)
    acted_grad = _rows_by_experts(upstream, down_proj, plan, False, how.down_rows)
    gate_up_grad, acted, expert_weights_grad = rows.gate_rows_backward(
        acted_grad, gate_up, plan, expert_weights, hidden_act
    )
    down_grad, up_grad, input_grad = grad.new_empty(0), grad.new_empty(0), grad.new_empty(0)
    if weights_wanted:
        down_grad = _rows_by_rows(upstream, acted, plan, how.down_weights)
    # Freed before the next large product.
    del upstream, acted, acted_grad
    if weights_wanted:
        up_grad = _rows_by_rows(gate_up_grad, sorted_rows, plan, how.up_weights)
    if input_wanted:
        rows_grad = _rows_by_experts(gate_up_grad, gate_up_proj, plan, False, how.up_rows)
        input_grad = rows.combine_rows(rows_grad, plan, top_k, None, grad.dtype)
    return input_grad, expert_weights_grad, up_grad, down_grad


@experts_backward.register_fake
def _(
    grad: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    sorted_rows: torch.Tensor,
    gate_up: torch.Tensor,
    plan_buffer: torch.Tensor,
    hidden_act: str,
    input_wanted: bool,
    weights_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        grad.new_empty(grad.shape if input_wanted else (0,)),
        expert_weights.new_empty(expert_weights.shape, dtype=torch.float32),
        gate_up_proj.new_empty(gate_up_proj.shape if weights_wanted else (0,)),
        down_proj.new_empty(down_proj.shape if weights_wanted else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, expert_weights, gate_up_proj, down_proj, hidden_act, _ = inputs
    # The saved outputs get no gradient; zeros of their size must not be made for them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(expert_weights, gate_up_proj, down_proj, *output[1:])
    ctx.hidden_act = hidden_act


def _backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    grad = grads[0]
    if grad is None:
        return (None,) * 7
    expert_weights, gate_up_proj, down_proj, sorted_rows, gate_up, plan_buffer = ctx.saved_tensors
    wants = ctx.needs_input_grad
    weights_wanted = wants[3] or wants[4]
    input_grad, weights_grad, up_grad, down_grad = experts_backward(
        grad,
        expert_weights,
        gate_up_proj,
        down_proj,
        sorted_rows,
        gate_up,
        plan_buffer,
        ctx.hidden_act,
        wants[0],
        weights_wanted,
    )
    return (
        input_grad if wants[0] else None,
        None,
        weights_grad.to(expert_weights.dtype) if wants[2] else None,
        up_grad if wants[3] else None,
        down_grad if wants[4] else None,
        None,
        None,
    )


experts_forward.register_autograd(_backward, setup_context=_setup_context)


def _nothing(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty outputs in place of what only the backward pass reads."""
    return like.new_empty(0), like.new_empty(0), like.new_empty(0, dtype=torch.int32)


def _rows_by_experts(
    values: torch.Tensor,
    weights: torch.Tensor,
    plan: RoutingPlan,
    transposed: bool,
    config: tuning.ProductConfig,
) -> torch.Tensor:
    if config is None:
        return _torch_rows(values, weights.transpose(1, 2) if transposed else weights, plan)
    if isinstance(config, HopperConfig):
        return _hopper("hopper_gemm").rows_by_experts(values, weights, plan, transposed, config)
    return grouped_gemm.rows_by_experts(values, weights, plan, transposed, config)


def _rows_by_rows(
    left: torch.Tensor, right: torch.Tensor, plan: RoutingPlan, config: tuning.ProductConfig
) -> torch.Tensor:
    if config is None:
        return torch._grouped_mm(left.t(), right, offs=plan.starts[1:])
    if isinstance(config, HopperConfig):
        return _hopper("hopper_weights").rows_by_rows(left, right, plan, config)
    return grouped_gemm.rows_by_rows(left, right, plan, config)


def _torch_rows(values: torch.Tensor, weights: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    return torch._grouped_mm(values, weights, offs=plan.starts[1:])


def _hopper(name: str) -> ModuleType:
    """A module of Gluon kernels, imported where it is used: the dialect is experimental and changes with Triton."""
    return importlib.import_module(f"moe.kernels.{name}")
