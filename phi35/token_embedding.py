"""The token embedding, and its form with a factor (muP, arXiv 2203.03466)."""

import torch
from torch import nn

from phi35.config import ModelConfig


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by a factor as they are looked up; a head tied to it reads them plain."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, factor: float, device: torch.device | str | None = None
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device)
        self.factor = factor

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(...) int64 ids to (..., D)."""
        return super().forward(input_ids) * self.factor

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, factor={self.factor}"


def build_token_embedding(config: ModelConfig) -> nn.Embedding:
    """The embedding that a config asks for."""
    if config.mup_embedding_multiplier == 1:
        return nn.Embedding(config.vocab_size, config.hidden_size)
    return ScaledEmbedding(config.vocab_size, config.hidden_size, config.mup_embedding_multiplier)


def with_factor_of(new: nn.Module, old: nn.Module) -> nn.Module:
    """A plain embedding as one with another's factor, with its own weight; anything else as it is."""
    if type(new) is not nn.Embedding or not isinstance(old, ScaledEmbedding):
        return new
    scaled = ScaledEmbedding(new.num_embeddings, new.embedding_dim, old.factor, device="meta")
    scaled.weight = new.weight
    return scaled.train(new.training)
