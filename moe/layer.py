"""The sparse feed-forward: a router, experts, and nothing that outlives the call.

Follows Phi-3.5-MoE's block (model card and published code, arXiv 2404.14219 and 2409.12136). Departure: the input
jitter multiplies a copy of the block's input, once; the published block and transformers write into the caller's
tensor, transformers twice.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from moe.experts import Experts
from moe.router import build_router
from phi35.config import ModelConfig
from phi35.feed_forward import GatedMLP
from phi35.outputs import RouterOutput


class SparseMoE(nn.Module):
    """Fills the decoder's feed-forward slot: each token goes to k of E experts.

    Parameters: ``router.weight`` (E, D), ``experts.gate_up_proj`` (E, 2F, D), ``experts.down_proj`` (E, D, F); no
    biases. With ``shared_expert_intermediate_size`` S there is one more expert, dense, whose output is added to every
    token's (arXiv 2401.06066, without a gate): ``shared_expert.gate_up_proj.weight`` (2S, D) and
    ``shared_expert.down_proj.weight`` (D, S). Can be built on the meta device.

    Args:
        config: with ``num_local_experts > 0``.

    Raises:
        ValueError: if the config is dense, or names a router or backend that cannot be had.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.is_sparse:
            raise ValueError("SparseMoE needs num_local_experts > 0; this config is dense")
        self.num_experts = config.num_local_experts
        self.input_jitter_noise = config.input_jitter_noise
        self.router = build_router(config)
        self.experts = Experts(
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
            hidden_act=config.hidden_act,
            backend=config.experts_backend,
            initializer_range=config.initializer_range,
        )
        shared_size = config.shared_expert_intermediate_size
        self.shared_expert = GatedMLP(config, shared_size) if shared_size else None

    def forward(
        self, hidden_states: torch.Tensor, routing: RouterOutput | None = None, jittered: bool = False
    ) -> tuple[torch.Tensor, RouterOutput]:
        """Route every token, run its experts, add their outputs.

        In training both router and experts see the input times uniform noise in
        [1 - input_jitter_noise, 1 + input_jitter_noise]; the caller's tensor is left alone.

        Args:
            hidden_states: (B, T, D).
            routing: what an earlier call on the same tokens returned, to use the same experts again (replay).
            jittered: the input was multiplied by such noise already, by the norm before it (``phi35.jitter``).

        Returns:
            (B, T, D) in the input's dtype, and the routing of the N = B T tokens.

        Raises:
            ValueError: if ``routing`` does not fit the tokens.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.training and self.input_jitter_noise > 0 and not jittered:
            noise = torch.empty_like(tokens, memory_format=torch.contiguous_format)
            tokens = tokens * noise.uniform_(1.0 - self.input_jitter_noise, 1.0 + self.input_jitter_noise)
        router_output = self.router(tokens, routing)
        if router_output.expert_gradient_weights is None:
            mixed = self.run_experts(tokens, router_output)
        else:
            mixed = self._run_experts_apart(tokens, router_output)
        if self.shared_expert is not None:
            mixed = mixed + self.shared_expert(tokens)[0]
        return mixed.view(hidden_states.shape), router_output

    def run_experts(self, tokens: torch.Tensor, router_output: RouterOutput) -> torch.Tensor:
        """(N, D) weighted sum of each token's experts; expert parallelism puts its exchange here."""
        return self.experts(tokens, router_output.expert_indices, router_output.expert_weights)

    def _run_experts_apart(self, tokens: torch.Tensor, router_output: RouterOutput) -> torch.Tensor:
        """The same sum, with other multipliers in the experts' gradient than in their output.

        Each choice runs as a token of its own, so that every backend, and the exchange between processes, gives
        single expert outputs. Costs k copies of the tokens.
        """
        num_tokens, top_k = router_output.expert_indices.shape
        # expand, not repeat_interleave: its backward adds the copies in order.
        copies = tokens.unsqueeze(1).expand(-1, top_k, -1).reshape(num_tokens * top_k, -1)
        flat = router_output.expert_indices.reshape(-1, 1)
        ones = torch.ones_like(router_output.expert_weights).reshape(-1, 1)
        outputs = self.run_experts(copies, RouterOutput(router_output.logits, flat, ones))
        return _WeightedSum.apply(
            outputs.view(num_tokens, top_k, -1), router_output.expert_weights, router_output.expert_gradient_weights
        )


class _WeightedSum(torch.autograd.Function):
    """Sum over choices of weight times output; the outputs' gradient takes other multipliers."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, outputs: torch.Tensor, weights: torch.Tensor, gradient_weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(outputs, gradient_weights)
        wide = torch.promote_types(torch.promote_types(outputs.dtype, weights.dtype), torch.float32)
        return (outputs.to(wide) * weights.to(wide).unsqueeze(-1)).sum(dim=1).to(outputs.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        outputs, gradient_weights = ctx.saved_tensors
        wide = torch.promote_types(outputs.dtype, gradient_weights.dtype)
        upstream = grad_outputs[0].to(wide).unsqueeze(1)
        to_outputs = (upstream * gradient_weights.unsqueeze(-1)).to(outputs.dtype)
        return to_outputs, (upstream * outputs.to(wide)).sum(dim=-1).to(gradient_weights.dtype), None
