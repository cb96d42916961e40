"""What an engine minimises by default: the mean cross-entropy of the label tokens of a global batch."""

from typing import Any

import torch
from torch import nn

from phi35.outputs import CausalLMOutput
from phi35.training.loss import count_tokens


class TokenObjective:
    """The model's own loss; ``phi35.training.preference.PreferenceObjective`` has the same methods."""

    def count(self, batch: dict[str, torch.Tensor]) -> int:
        """How much a micro-batch weighs in the global mean: its label tokens, counted on the host."""
        return count_tokens(batch)

    def start(self, model: nn.Module) -> None:
        """Before a pass in training mode."""

    def prepare(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on the device with all that ``loss`` needs."""
        return batch

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the model takes of a batch."""
        return batch

    def loss(
        self, output: CausalLMOutput, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The mean that counts ``count`` times, and numbers to show."""
        assert output.loss is not None
        return output.loss, {}
