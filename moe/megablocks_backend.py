"""The "megablocks" experts backend: MegaBlocks' dropless MLP (arXiv 2211.15841) with our routing and our weights.

``ParallelDroplessMLP`` takes the routing as arguments, so that SparseMixer drops in. It wants gate, up and down
weights as three matrices (E F, D), each expert's down projection transposed; they are packed from the canonical form
at every call, by operations that gradients pass through. That costs a pass over the weights: time MegaBlocks in its
own layout when comparing kernels (benchmarks/moe_layer.py does).
"""

import functools
import importlib.util
from typing import Any

import torch
from torch.nn import functional as F

_MODULES = ("megablocks", "megablocks_ops", "stk", "grouped_gemm", "grouped_gemm_backend")


def missing() -> str | None:
    """Why MegaBlocks cannot run on this machine, or None."""
    absent = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed; `make megablocks` (scripts/build_megablocks.py) builds them"
    if not torch.cuda.is_available():
        return "MegaBlocks runs on CUDA devices only, and none is visible"
    return None


def limit(hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> str | None:
    """Why MegaBlocks does not take these tensors, or None."""
    for name, tensor in (("tokens", hidden_states), ("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if tensor.dtype != torch.bfloat16:
            return f"MegaBlocks' grouped products take bfloat16, {name} are {str(tensor.dtype).removeprefix('torch.')}"
    if hidden_states.device.type != "cuda":
        return f"tokens are on {hidden_states.device.type}, MegaBlocks runs on CUDA"
    return None


def megablocks(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str = "silu",
) -> torch.Tensor:
    """Weighted sum of each token's experts; shapes as in ``moe.experts.Experts.forward``.

    MegaBlocks multiplies by weights of the tokens' dtype, so the routing weights are rounded to bfloat16. The token
    counts go to the host: one synchronisation per call.

    Raises:
        ValueError: for a dtype or device that MegaBlocks does not take.
    """
    reason = limit(hidden_states, gate_up_proj, down_proj)
    if reason is not None:
        raise ValueError(f"experts backend 'megablocks' cannot run: {reason}; use 'grouped_mm', 'loop' or 'auto'")
    return run_dropless(hidden_states, expert_indices, expert_weights, gate_up_proj, down_proj, hidden_act)


def run_dropless(
    hidden_states: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_act: str,
) -> torch.Tensor:
    """``megablocks`` without its checks."""
    if expert_indices.shape[0] == 0:
        return hidden_states * 1
    num_experts, hidden_size, intermediate_size = down_proj.shape
    layer = dropless_layer(num_experts, hidden_size, intermediate_size, expert_indices.shape[1], hidden_act)
    weights = pack(gate_up_proj, down_proj)
    # The first argument feeds a balance loss of its own, which is off.
    routing = (expert_indices.new_empty(0), expert_weights.to(hidden_states.dtype), expert_indices.contiguous())
    return torch.func.functional_call(layer, weights, (hidden_states.contiguous(), *routing), strict=True)


def pack(gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> dict[str, torch.Tensor]:
    """The canonical weights as MegaBlocks' parameters w1 (gate), v1 (up) and w2 (down), each (E F, D)."""
    gate, up = gate_up_proj.chunk(2, dim=1)
    return {
        "mlp.w1": gate.reshape(-1, gate.shape[-1]),
        "mlp.v1": up.reshape(-1, up.shape[-1]),
        "mlp.w2": down_proj.transpose(1, 2).reshape(-1, down_proj.shape[1]),
    }


@functools.cache
def dropless_layer(num_experts: int, hidden_size: int, intermediate_size: int, top_k: int, hidden_act: str) -> Any:
    """MegaBlocks' layer without weights of its own; one per shape, they hold nothing."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    arguments = Arguments(
        hidden_size=hidden_size,
        ffn_hidden_size=intermediate_size,
        bias=False,
        return_bias=False,
        activation_fn={"silu": F.silu, "gelu": F.gelu}[hidden_act],
        moe_num_experts=num_experts,
        moe_top_k=top_k,
        mlp_type="glu",
        mlp_impl="grouped",
        fp16=False,
        bf16=True,
        device=torch.device("meta"),
    )
    # In eval mode it adds nothing to MegaBlocks' module-level list of balance losses; ours come from the routing.
    return ParallelDroplessMLP(arguments).eval()
