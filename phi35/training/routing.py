"""Routing in a training run: its telemetry, its heat map, and the bias that balances experts without a loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from phi35.outputs import CausalLMOutput
from phi35.registry import resolve
from phi35.training.loss import expert_counts

NUM_EXTRA_COLUMNS = 3
HEAT_MAP_STEPS = 50
"""Steps that the heat map adds up."""


class BiasBalancer:
    """Moves each layer's selection bias after every step, by the tokens that all ranks sent to each expert.

    The bias is float32 whatever the model's dtype, and equal on all ranks.

    Args:
        model: with sparse layers, whole or sharded, on its device.
        rate: of an update; 0 keeps the bias as it is.
        world_size: number of ranks that hold data of their own.
    """

    def __init__(self, model: nn.Module, rate: float, world_size: int) -> None:
        self.model, self.rate, self.world_size = model, rate, world_size
        self.selection_bias: torch.Tensor | None = None

    def update(
        self,
        outputs: Sequence[CausalLMOutput],
        attention_masks: Sequence[torch.Tensor | None],
        applied: torch.Tensor | bool = True,
    ) -> None:
        """Takes the outputs of a step's micro-batches on this rank; all ranks call it alike.

        Args:
            outputs: one per micro-batch.
            attention_masks: likewise.
            applied: whether the step changed the weights; if not, the bias stays too.
        """
        if not self.rate:
            return
        counts = [expert_counts(one, mask) for one, mask in zip(outputs, attention_masks, strict=True)]
        summed = torch.stack(counts).sum(dim=0)
        if self.world_size > 1:
            distributed.all_reduce(summed)
        bias = torch.zeros_like(summed) if self.selection_bias is None else self.selection_bias
        updated = resolve("moe.balancing:updated_selection_bias")(bias, summed, self.rate)
        self._apply(torch.where(torch.as_tensor(applied, device=bias.device), updated, bias))

    def state(self) -> list[list[float]] | None:
        """The bias as plain numbers, exact to the bit; None where there is none."""
        return None if self.selection_bias is None else self.selection_bias.tolist()

    def load_state(self, state: list[list[float]] | None, device: torch.device) -> None:
        """Puts a saved bias in place, also where ``rate`` is 0 and it stays as it is."""
        if state is not None:
            self._apply(torch.tensor(state, dtype=torch.float32, device=device))

    def _apply(self, selection_bias: torch.Tensor) -> None:
        self.selection_bias = selection_bias
        resolve("moe.balancing:set_selection_bias")(self.model, selection_bias)


def routing_totals(outputs: Sequence[CausalLMOutput], attention_masks: Sequence[torch.Tensor | None]) -> Any:
    """(layers, E + 3) sums over this rank's micro-batches (``moe.telemetry``); None for dense models."""
    if not outputs or not outputs[0].router_outputs:
        return None
    totals = resolve("moe.telemetry:routing_totals")
    pairs = zip(outputs, attention_masks, strict=True)
    return torch.stack([totals(one.router_outputs, mask) for one, mask in pairs]).sum(dim=0)


def describe_routing(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The metrics of a step from its totals over all ranks.

    Args:
        rows: per layer E counts, then sum of entropies, sum of weights and number of tokens.

    Returns:
        Per layer: ``expert_tokens`` (each expert's tokens; a layer's sum is k times ``routed_tokens``),
        ``expert_load`` (their shares), ``load_max_over_mean``, ``routing_entropy`` (mean entropy of a token's
        softmax, in nats) and ``expert_weight_sum`` (mean sum of a token's weights).
    """
    counts = [[round(count) for count in row[:-NUM_EXTRA_COLUMNS]] for row in rows]
    entropies, weights, tokens = zip(*(row[-NUM_EXTRA_COLUMNS:] for row in rows), strict=True)
    return {
        "routed_tokens": round(tokens[0]),
        "expert_tokens": counts,
        "expert_load": [[round(count / max(1, sum(row)), 4) for count in row] for row in counts],
        "load_max_over_mean": [round(max(row) * len(row) / max(1, sum(row)), 4) for row in counts],
        "routing_entropy": [round(value / max(1.0, tokens[0]), 5) for value in entropies],
        "expert_weight_sum": [round(value / max(1.0, tokens[0]), 5) for value in weights],
    }


def plot_expert_load(history: list[dict[str, Any]], path: Path, num_steps: int = HEAT_MAP_STEPS) -> None:
    """Draws the load of each expert of each layer over the last steps, relative to the layer's mean.

    Args:
        history: lines of ``metrics.jsonl`` with ``expert_tokens``.
        path: PNG file to write.
        num_steps: lines to add up, from the end.
    """
    from matplotlib.figure import Figure

    last = [line for line in history if "expert_tokens" in line][-num_steps:]
    counts = torch.tensor([line["expert_tokens"] for line in last], dtype=torch.float64).sum(dim=0)
    load = (counts / counts.mean(dim=1, keepdim=True).clamp(min=1e-9)).numpy()
    num_layers, num_experts = load.shape
    figure = Figure(figsize=(2.6 + 0.42 * num_experts, 1.7 + 0.3 * num_layers), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(load, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto")
    if load.size <= 1024:
        for layer in range(num_layers):
            for expert in range(num_experts):
                value = load[layer, expert]
                dark = abs(value - 1) > 0.6
                text = f"{value:.2f}"
                axis.text(expert, layer, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axis.set_xticks(range(num_experts))
    axis.set_yticks(range(num_layers))
    axis.set_xlabel("expert")
    axis.set_ylabel("sparse layer, in order")
    axis.set_title(f"tokens per expert / mean, steps {last[0]['step']} to {last[-1]['step']}", fontsize=9)
    figure.colorbar(image, ax=axis, extend="max")
    figure.savefig(path, dpi=120)
