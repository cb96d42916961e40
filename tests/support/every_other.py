"""A constraint without a grammar, for tests of the batcher's masks."""

import torch

from phi35.generation.constraints import ConstraintError, as_mask


class EveryOther:
    """Allows even ids after an even number of tokens and odd ones after an odd number.

    Args:
        vocab_size: of the model.
        length: tokens after which nothing can follow; None for no end.
        fails_at: number of tokens at which it cannot go on.
    """

    def __init__(self, vocab_size: int, length: int | None = None, fails_at: int | None = None) -> None:
        self.vocab_size, self.length, self.fails_at = vocab_size, length, fails_at
        self.taken: list[int] = []

    def allowed(self) -> torch.Tensor:
        """The mask of the next token."""
        if self.fails_at == len(self.taken):
            raise ConstraintError("no way to go on")
        return as_mask(torch.arange(self.vocab_size) % 2 == len(self.taken) % 2)

    def advance(self, token_id: int) -> bool:
        """Take a token, which must be one that was allowed."""
        assert token_id % 2 == len(self.taken) % 2
        self.taken.append(token_id)
        return len(self.taken) == self.length
