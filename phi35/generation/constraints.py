"""Choosing among allowed tokens alone: what a grammar, or anything else that follows the text, tells the batcher.

A mask has a bit for each token of the vocabulary, in words of 32, the first token in a word's lowest bit; this is how
grammar libraries and the sampling kernel hold it.
"""

from typing import Protocol

import torch

from phi35.kernels.operands import MASK_BITS


class ConstraintError(ValueError):
    """The constraint cannot go on: its own limits are reached, or no token is left."""


class TokenConstraint(Protocol):
    """Follows the tokens of one request and says which may come next."""

    def allowed(self) -> torch.Tensor:
        """(ceil(V / 32),) int32 on the CPU, at least one bit set; called before each choice.

        Raises:
            ConstraintError: if there is no such token, or the constraint's limits are reached.
        """
        ...

    def advance(self, token_id: int) -> bool:
        """Take the token that was chosen; True where nothing can follow it.

        Raises:
            ConstraintError: as ``allowed``.
        """
        ...


def as_bools(mask: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """A mask (..., ceil(V / 32)) int32 as (..., V) bool."""
    places = torch.arange(MASK_BITS, dtype=torch.int32, device=mask.device)
    return ((mask[..., None] >> places) & 1).bool().flatten(-2)[..., :vocab_size]


def as_mask(allowed: torch.Tensor) -> torch.Tensor:
    """(..., V) bool as a mask (..., ceil(V / 32)) int32."""
    missing = -allowed.shape[-1] % MASK_BITS
    padded = torch.nn.functional.pad(allowed, (0, missing)).unflatten(-1, (-1, MASK_BITS))
    words = (padded.long() << torch.arange(MASK_BITS, device=allowed.device)).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()
