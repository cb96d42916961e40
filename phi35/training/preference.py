"""Learning from pairs of replies: DPO (arXiv 2305.18290) and IPO (arXiv 2310.12036), on packed rows.

With d the difference of the log-ratios log(policy / reference) of the chosen and the rejected reply:

- "sigmoid": -log sigmoid(beta d), over sums of the replies' tokens (eq. 7 of the former);
- "ipo": (d - 1 / (2 beta))^2, over means, as TRL takes it (eq. 17 of the latter has sums).

The reference is the model itself with its adapter switched off, log-probabilities that were computed before the first
step, or none. Routers choose without noise, unless it is asked for: sampled experts would part policy and reference
before anything is learned.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from phi35.adapters.inject import disabled
from phi35.outputs import CausalLMOutput
from phi35.packed_attention import ignore_first_tokens
from phi35.training.preference_config import PreferenceConfig


def preference_losses(
    policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, config: PreferenceConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair, and its rewards.

    Args:
        policy: (..., 2) float32 log-probabilities of the chosen and the rejected reply, summed over their tokens.
        reference: (..., 2), the same of the reference; zeros without one.
        lengths: (..., 2) tokens of the replies.
        config: which loss.

    Returns:
        (...) losses, and (..., 2) rewards beta * (policy - reference), without gradient.
    """
    ratios = policy - reference
    rewards = config.beta * ratios.detach()
    if config.loss == "ipo":
        ratios = ratios / lengths.clamp(min=1)
    difference = ratios[..., 0] - ratios[..., 1]
    if config.loss == "ipo":
        return (difference - 1 / (2 * config.beta)) ** 2, rewards
    smooth = config.label_smoothing
    losses = -(1 - smooth) * F.logsigmoid(config.beta * difference)
    if smooth:
        losses = losses - smooth * F.logsigmoid(-config.beta * difference)
    return losses, rewards


def reply_log_probs(
    token_losses: torch.Tensor, labels: torch.Tensor, sequence_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over packed samples.

    Args:
        token_losses: (B, T) cross-entropy at each position that predicts a label, 0 elsewhere.
        labels: (B, T) int64, negative where nothing is predicted.
        sequence_lengths: (B, S) int64 lengths of the samples, 0 for none.

    Returns:
        (B, S) float32 log-probabilities, and (B, S) tokens that they are of; zeros where there is no sample.
    """
    device = token_losses.device
    ends = sequence_lengths.to(device).cumsum(dim=1)
    counted = (ignore_first_tokens(labels, sequence_lengths).to(device)[:, 1:] >= 0).float()
    totals = []
    for values in (-token_losses[:, :-1].float(), counted):
        running = F.pad(values, (1, 1)).cumsum(dim=1, dtype=torch.float64)  # (B, T + 1): sum of what stands before
        upto = running.gather(1, ends)
        totals.append(torch.cat([upto[:, :1], upto.diff(dim=1)], dim=1).float())
    return totals[0], totals[1]


class PreferenceObjective:
    """What an engine minimises: the mean loss of the pairs of a global batch.

    Args:
        config: the loss.
        reference: "adapter", "precomputed" or "none".
    """

    def __init__(self, config: PreferenceConfig, reference: str) -> None:
        self.config, self.reference = config, reference

    def count(self, batch: dict[str, torch.Tensor]) -> int:
        """Pairs of a micro-batch, on the host."""
        return int((batch["pairs"] >= 0).sum())

    def start(self, model: nn.Module) -> None:
        """Before a pass in training mode: routers as the config wants them."""
        if not self.config.routing_noise:
            for module in model.modules():
                if hasattr(module, "input_jitter_noise") or hasattr(module, "selection_bias"):
                    module.training = False  # the module's own switch: adapters within keep theirs

    def prepare(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with the reference's log-probabilities (B, S)."""
        if self.reference == "none":
            return {**batch, "reference_log_probs": torch.zeros(batch["sequence_lengths"].shape)}
        if self.reference == "precomputed":
            return batch
        with disabled(model):
            return {**batch, "reference_log_probs": self.log_probs(model, batch)}

    @torch.no_grad()
    def log_probs(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, S) log-probabilities of a batch's replies in evaluation mode."""
        training = model.training
        model.eval()
        try:
            output = model(**self.inputs(batch))
        finally:
            model.train(training)
        return reply_log_probs(output.loss, batch["labels"], batch["sequence_lengths"])[0]

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the model takes of a batch."""
        rest = {name: value for name, value in batch.items() if name not in ("pairs", "reference_log_probs")}
        return {**rest, "return_logits": False, "loss_per_token": True}

    def loss(
        self, output: CausalLMOutput, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean loss of the micro-batch's pairs, and numbers to show: means over its pairs."""
        assert output.loss is not None
        policy, lengths = reply_log_probs(output.loss, batch["labels"], batch["sequence_lengths"])
        reference = batch["reference_log_probs"].to(policy)
        policy, reference, lengths = (one.unflatten(1, (-1, 2)) for one in (policy, reference, lengths))
        losses, rewards = preference_losses(policy, reference, lengths, self.config)
        real = (batch["pairs"].to(losses.device) >= 0).float()
        total = real.sum().clamp(min=1)
        margins = rewards[..., 0] - rewards[..., 1]
        numbers = {
            "reward_accuracy": (margins > 0).float(),
            "reward_margin": margins,
            "chosen_reward": rewards[..., 0],
            "rejected_reward": rewards[..., 1],
        }
        return (losses * real).sum() / total, {name: (one * real).sum() / total for name, one in numbers.items()}
