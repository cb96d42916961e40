"""What goes into the batcher and what comes out of it."""

import dataclasses

import torch

from phi35.generation.decoding import DecodingOptions
from phi35.generation.rows import Row


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and its continuation on the way.

    Attributes:
        number: what ``submit`` returned.
        row: its ids and generator.
        options: how it is continued.
        stop_ids: tokens that end it.
        slot: its row of the batch; None while it waits.
        num_read: ids whose keys are in the cache.
        pending: tokens queued on the device and not read yet.
        running: whether steps serve it.
        finished: why it has ended; None before.
        drawn: uniform numbers drawn so far; None for none.
    """

    number: int
    row: Row
    options: DecodingOptions
    stop_ids: frozenset[int]
    slot: int | None = None
    num_read: int = 0
    pending: int = 0
    running: bool = False
    finished: str | None = None
    drawn: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens, those queued on the device among them."""
        return len(self.row.ids) + self.pending


@dataclasses.dataclass(frozen=True)
class Emitted:
    """A new token of a request.

    Attributes:
        request: its number.
        token_id: the token; -1 where a request ends without one ("cancelled").
        logprob: of the token under the model itself.
        finish_reason: "stop", "length" or "cancelled" with the last token, else None.
    """

    request: int
    token_id: int
    logprob: float
    finish_reason: str | None
