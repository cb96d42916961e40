"""Routers: which experts each token uses, and with what weight.

``SparseMixerRouter`` is SparseMixer-v2 as Phi-3.5-MoE uses it (GRIN-MoE, arXiv 2409.12136, section 2); its choice
and its gradient are not those of a softmax top-2. ``TopKSoftmaxRouter`` is the common softmax router, an explicit
second choice that changes the model.

Departures from the published code: scores and everything after them are float32 whatever the model's dtype
(published: the model's dtype, so that bfloat16 scores tie often), and the input jitter lies in the layer, where it
happens once. Noise is drawn in the published order (exponentials, then uniforms, first choice then second), so that
one seed gives one routing in float32. The paper leaves an expert's own gradient unscaled by the midpoint factor c;
the published code scales it, and so does "sparsemixer"; "sparsemixer-paper" is the paper's form.

Every router may carry a selection bias (arXiv 2408.15664), which moves the choice of experts and enters no weight.
"""

import warnings
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from phi35.config import ROUTER_TYPES, ModelConfig
from phi35.fused import uses_kernels, wide_product
from phi35.outputs import RouterOutput
from phi35.registry import resolve

MIDPOINT_LOW = 0.3333
"""c of a sample that is neither the likeliest expert nor kept by the coin (Heun's third-order rule)."""
MIDPOINT_SPAN = 0.6667
"""c of every other sample is MIDPOINT_LOW + MIDPOINT_SPAN."""
MIDPOINT_THRESHOLD = 0.75
"""The coin: a uniform number above this keeps c at its upper value."""


class SparseMixerRouter(nn.Module):
    """SparseMixer-v2: two experts per token, each drawn from a thresholded softmax.

    For each of the two choices, with s the scores and m = s (for the second choice: the first at minus infinity):
    experts with (max m - s_i) / max(|s_i|, max m) > 2 eps are dropped; g is the softmax of m over the others. At
    inference the choice D is argmax m; in training it is sampled from g (Gumbel-max). The weight is p = g[D], in
    training times c (1 if D is the likeliest or a coin says so, else 1/3). The two weights are not renormalised.

    The gradient to s for an upstream gradient G of the weight is (G p) (onehot(D) - g): c is not in it. An expert's
    own gradient is scaled by p c as published, or by p alone as in the paper.

    A selection bias b moves the choice: the threshold, the sampling and c look at s + b. The weight stays p = g[D]
    with g from s alone, in which the chosen expert is never dropped.

    Args:
        hidden_size: D, width of the tokens.
        num_experts: E.
        jitter_eps: eps above (``router_jitter_noise`` in the config).
        initializer_range: standard deviation of the initial weight.
        scale_expert_gradient: whether c scales the experts' own gradient (published) or not (paper).

    Attributes:
        selection_bias: (E,) float32 or None; no part of the state dict.
    """

    selection_bias: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        jitter_eps: float = 0.01,
        initializer_range: float = 0.02,
        scale_expert_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.jitter_eps = jitter_eps
        self.initializer_range = initializer_range
        self.scale_expert_gradient = scale_expert_gradient
        self.register_buffer("selection_bias", None, persistent=False)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution, as the published initialisation does."""
        nn.init.normal_(self.weight, std=self.initializer_range)

    def forward(self, hidden_states: torch.Tensor, routing: RouterOutput | None = None) -> RouterOutput:
        """Route tokens.

        Args:
            hidden_states: (N, D) tokens, any floating dtype.
            routing: an earlier result for the same tokens, to be replayed: its experts are used again and its
                midpoint factors too, while scores and weights are computed anew (with gradient). No noise is drawn.

        Returns:
            Scores (N, E) float32, experts (N, 2) int64, weights (N, 2) float32 (float64 for float64 tokens).

        Raises:
            ValueError: if ``routing`` does not fit the tokens.
        """
        scores = _router_scores(hidden_states, self.weight)
        if routing is None:
            indices, weights, chances = _sparsemixer(scores, self.jitter_eps, self.training, self.selection_bias)
        else:
            check_routing(routing, hidden_states.shape[0], self.weight.shape[0], top_k=2)
            indices = routing.expert_indices
            weights, chances = self._replayed_weights(scores, routing)
        unscaled = self.training and not self.scale_expert_gradient
        return RouterOutput(scores, indices, weights, expert_gradient_weights=chances if unscaled else None)

    def _replayed_weights(self, scores: torch.Tensor, routing: RouterOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 2) weights of given experts under new scores, with the c that the recorded routing had, and their p."""
        with torch.no_grad():
            recorded = routing.logits.to(scores.dtype)
            recorded_p = torch.cat(
                [
                    gates.gather(1, routing.expert_indices[:, choice : choice + 1])
                    for choice, gates in enumerate(_replayed_gates(recorded, routing.expert_indices, self.jitter_eps))
                ],
                dim=1,
            )
            # c takes two values only: the recorded weight tells which one, whatever rounding did to it.
            kept = routing.expert_weights > (MIDPOINT_LOW + MIDPOINT_SPAN / 2) * recorded_p
            factor = _midpoint_factor(kept, scores.dtype)
        columns, chances = [], []
        for choice, gates in enumerate(_replayed_gates(scores, routing.expert_indices, self.jitter_eps)):
            chosen = routing.expert_indices[:, choice : choice + 1]
            columns.append(_MixerWeight.apply(scores, gates.detach(), chosen, factor[:, choice : choice + 1]))
            chances.append(gates.detach().gather(1, chosen))
        return torch.cat(columns, dim=1), torch.cat(chances, dim=1)


class TopKSoftmaxRouter(nn.Module):
    """Softmax over all experts, then the k largest (Mixtral's and DeepSpeed's form; deterministic).

    Args:
        hidden_size: D, width of the tokens.
        num_experts: E.
        top_k: experts per token.
        renormalize: divide each token's weights by their sum, so that they sum to one.
        initializer_range: standard deviation of the initial weight.

    Attributes:
        selection_bias: (E,) float32 added to the probabilities for the choice alone, or None; no part of the state
            dict.
    """

    selection_bias: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        renormalize: bool = True,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie between 1 and num_experts ({num_experts}), got {top_k}")
        self.top_k = top_k
        self.renormalize = renormalize
        self.initializer_range = initializer_range
        self.register_buffer("selection_bias", None, persistent=False)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution."""
        nn.init.normal_(self.weight, std=self.initializer_range)

    def forward(self, hidden_states: torch.Tensor, routing: RouterOutput | None = None) -> RouterOutput:
        """Route tokens.

        Args:
            hidden_states: (N, D) tokens, any floating dtype.
            routing: an earlier result for the same tokens: its experts are used again, with new weights.

        Returns:
            Scores (N, E) float32, experts (N, k) int64, weights (N, k) float32 (float64 for float64 tokens).

        Raises:
            ValueError: if ``routing`` does not fit the tokens.
        """
        scores = _router_scores(hidden_states, self.weight)
        probabilities = scores.softmax(dim=-1)
        if routing is None:
            preference = probabilities if self.selection_bias is None else probabilities + self.selection_bias
            indices = preference.topk(self.top_k, dim=-1).indices
        else:
            check_routing(routing, hidden_states.shape[0], self.weight.shape[0], self.top_k)
            indices = routing.expert_indices
        weights = probabilities.gather(1, indices)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return RouterOutput(logits=scores, expert_indices=indices, expert_weights=weights)


def build_router(config: ModelConfig) -> SparseMixerRouter | TopKSoftmaxRouter:
    """The router that ``config.router_type`` names."""
    if config.router_type in ("sparsemixer", "sparsemixer-paper"):
        return SparseMixerRouter(
            config.hidden_size,
            config.num_local_experts,
            jitter_eps=config.router_jitter_noise,
            initializer_range=config.initializer_range,
            scale_expert_gradient=config.router_type == "sparsemixer",
        )
    if config.router_type == "topk":
        if config.num_experts_per_tok == 1 and config.norm_topk_prob:
            warnings.warn(
                "router_type='topk' with one expert per token and norm_topk_prob=True: every weight is 1, so that the "
                "language model's loss gives the router no gradient; set norm_topk_prob=False to train it",
                stacklevel=2,
            )
        return TopKSoftmaxRouter(
            config.hidden_size,
            config.num_local_experts,
            top_k=config.num_experts_per_tok,
            renormalize=config.norm_topk_prob,
            initializer_range=config.initializer_range,
        )
    raise ValueError(f"router_type must be one of {ROUTER_TYPES}, got {config.router_type!r}")


def sparsemixer(
    scores: torch.Tensor, jitter_eps: float, training: bool, selection_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseMixer-v2 on scores (the published function of the same name).

    Args:
        scores: (N, E) float32 or float64.
        jitter_eps: half the relative distance to the best score beyond which an expert is dropped.
        training: sample the experts and apply the midpoint factor, instead of taking the best.
        selection_bias: (E,) added to the scores for the choice alone.

    Returns:
        (N, 2) int64 experts and (N, 2) weights, in the order of choice.
    """
    indices, weights, _ = _sparsemixer(scores, jitter_eps, training, selection_bias)
    return indices, weights


def check_routing(routing: RouterOutput, num_tokens: int, num_experts: int, top_k: int) -> None:
    """Check that a routing to be replayed fits the tokens and experts at hand.

    Raises:
        ValueError: for a wrong shape or an expert number out of range.
    """
    for name, expected in (
        ("logits", (num_tokens, num_experts)),
        ("expert_indices", (num_tokens, top_k)),
        ("expert_weights", (num_tokens, top_k)),
    ):
        shape = tuple(getattr(routing, name).shape)
        if shape != expected:
            raise ValueError(
                f"routing.{name} must have shape {expected} for these {num_tokens} tokens, got {shape}; replay a "
                "routing only on the tokens it was recorded on"
            )
    indices = routing.expert_indices
    if num_tokens and not (0 <= int(indices.min()) and int(indices.max()) < num_experts):
        raise ValueError(
            f"routing.expert_indices must lie in [0, {num_experts}), got values from {int(indices.min())} to "
            f"{int(indices.max())}"
        )


class _MixerWeight(torch.autograd.Function):
    """p c forward; (G p) (onehot(D) - g) to the scores backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, scores: torch.Tensor, gates: torch.Tensor, chosen: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        weight = gates.gather(1, chosen)
        ctx.save_for_backward(gates, chosen, weight)
        return weight * factor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gates, chosen, weight = ctx.saved_tensors
        direction = torch.zeros_like(gates).scatter_(1, chosen, 1.0) - gates
        return grad_outputs[0] * weight * direction, None, None, None


class _FusedChoice(torch.autograd.Function):
    """``_sparsemixer`` in training without a selection bias, by two kernels, from the same noise."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, jitter_eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        exponentials, coins = [], []
        for choice in range(2):
            exponentials.append(torch.empty_like(scores).exponential_())
            coins.append(torch.rand_like(scores[:, :1]))
            if choice == 1:  # as in ``_choose``
                coins[1].uniform_()
        factors = MIDPOINT_LOW, MIDPOINT_LOW + MIDPOINT_SPAN
        choose = resolve("moe.kernels.mixer:choose")
        found = choose(scores, tuple(exponentials), tuple(coins), jitter_eps, MIDPOINT_THRESHOLD, factors)
        indices, weights, chances = found
        ctx.save_for_backward(scores, indices)
        ctx.jitter_eps = jitter_eps
        ctx.mark_non_differentiable(indices, chances)
        return indices, weights, chances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        scores, indices = ctx.saved_tensors
        return resolve("moe.kernels.mixer:choose_backward")(grad_outputs[1], scores, indices, ctx.jitter_eps), None


class _Bfloat16Scores(torch.autograd.Function):
    """float32 scores of bfloat16 tokens without a float32 copy of these.

    A product of two bfloat16 numbers is exact in float32, so that only the order of the sums differs from a product of
    copies. The scores' gradient is taken as the sum of two bfloat16 tensors, which hold 16 of its 24 bits.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_states, weight)
        return wide_product(hidden_states, weight.T)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, weight = ctx.saved_tensors
        high = grad_outputs[0].to(torch.bfloat16)
        parts = torch.cat((high, (grad_outputs[0] - high.float()).to(torch.bfloat16)), dim=1)  # (N, 2E)
        grad_weight = wide_product(parts.T, hidden_states).view(2, *weight.shape).sum(dim=0)
        return parts @ torch.cat((weight, weight)), grad_weight.to(weight.dtype)


def _sparsemixer(
    scores: torch.Tensor, jitter_eps: float, training: bool, selection_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, 2) experts, their weights p c, and p without gradient."""
    if training and selection_bias is None and _is_fused(scores):
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _FusedChoice.apply(scores.contiguous(), jitter_eps)
        return found
    first, first_weight, first_chance = _choose(scores, scores, jitter_eps, training, selection_bias)
    without_first = scores.scatter(1, first, float("-inf"))
    second, second_weight, second_chance = _choose(
        scores, without_first, jitter_eps, training, selection_bias, second=True
    )
    return (
        torch.cat((first, second), dim=1),
        torch.cat((first_weight, second_weight), dim=1),
        torch.cat((first_chance, second_chance), dim=1),
    )


def _is_fused(scores: torch.Tensor) -> bool:
    """Whether the kernels take the scores."""
    plain = scores.dtype != torch.float32 or scores.shape[1] > 128 or torch.compiler.is_compiling()
    return not plain and uses_kernels(scores)


def _choose(
    scores: torch.Tensor,
    candidates: torch.Tensor,
    jitter_eps: float,
    training: bool,
    selection_bias: torch.Tensor | None,
    second: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One of the two choices: (N, 1) expert, its (N, 1) weight, and its (N, 1) p."""
    bias = 0.0 if selection_bias is None else selection_bias.to(scores.dtype)
    if not training:
        chosen = (candidates if selection_bias is None else candidates + bias).argmax(dim=-1, keepdim=True)
        kept_scores = _drop_far(scores, candidates, jitter_eps, keep=None if selection_bias is None else chosen)
        # The softmax's own derivative p (onehot(D) - g) is the router's gradient here, c being 1.
        weight = kept_scores.softmax(dim=-1).gather(1, chosen)
        return chosen, weight, weight.detach()
    with torch.no_grad():
        if selection_bias is None:
            kept_scores = _drop_far(scores, candidates, jitter_eps)
        else:
            kept_scores = _drop_far(scores + bias, candidates + bias, jitter_eps)
        gates = kept_scores.softmax(dim=-1)
        exponential = torch.empty_like(kept_scores, memory_format=torch.contiguous_format).exponential_()
        chosen = (kept_scores - exponential.log()).argmax(dim=-1, keepdim=True)
        coin = torch.rand_like(gates[:, :1])
        if second:
            # The published code draws the second choice's coin twice and uses the later draw: one seed gives the
            # same routing in the layers that follow only if the generator moves as far.
            coin.uniform_()
        kept = (chosen == gates.argmax(dim=-1, keepdim=True)) | (coin > MIDPOINT_THRESHOLD)
        factor = _midpoint_factor(kept, scores.dtype)
        if selection_bias is not None:
            gates = _drop_far(scores, candidates, jitter_eps, keep=chosen).softmax(dim=-1)
    return chosen, _MixerWeight.apply(scores, gates, chosen, factor), gates.gather(1, chosen)


def _replayed_gates(
    scores: torch.Tensor, expert_indices: torch.Tensor, jitter_eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, E) gates of both choices for given experts; an expert that is replayed is never dropped."""
    first, second = expert_indices[:, :1], expert_indices[:, 1:]
    without_first = scores.scatter(1, first, float("-inf"))
    first_gates = _drop_far(scores, scores, jitter_eps, keep=first).softmax(dim=-1)
    second_gates = _drop_far(scores, without_first, jitter_eps, keep=second).softmax(dim=-1)
    return first_gates, second_gates


def _drop_far(
    scores: torch.Tensor, candidates: torch.Tensor, jitter_eps: float, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Candidates with those far below the best at minus infinity; the distance uses the original scores."""
    with torch.no_grad():
        best = candidates.amax(dim=-1, keepdim=True)
        far = (best - scores) / scores.abs().clamp(min=best) > 2 * jitter_eps
        if keep is not None:
            far = far.scatter(1, keep, False)
    return candidates.masked_fill(far, float("-inf"))


def _midpoint_factor(kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (MIDPOINT_LOW + MIDPOINT_SPAN * kept.to(torch.float32)).to(dtype)


def _router_scores(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(N, E) scores in float32, or float64 where the tokens are."""
    both = (hidden_states.dtype, weight.dtype)
    device_type = hidden_states.device.type
    if device_type in ("cuda", "meta") and both == (torch.bfloat16,) * 2 and not torch.compiler.is_compiling():
        return _Bfloat16Scores.apply(hidden_states, weight)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    with torch.autocast("cpu" if device_type == "meta" else device_type, enabled=False):
        return F.linear(hidden_states.to(dtype), weight.to(dtype))
