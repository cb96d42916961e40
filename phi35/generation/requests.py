"""What goes into the batcher and what comes out of it."""

import dataclasses

import torch

from phi35.generation.constraints import TokenConstraint
from phi35.generation.decoding import DecodingOptions
from phi35.generation.rows import Row
from phi35.kernels.operands import StepState
from phi35.prefix_cache import PageKeys


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
        constraint: says which tokens may come next; None leaves all.
        mask: what it said last, for the choice at hand.
        num_alternatives: how many of the most likely tokens are told beside each token.
        images: digest of each of its pictures.
        page_keys: keys of its full pages under its present factor set; None without prefix caching or before.
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
    constraint: TokenConstraint | None = None
    mask: torch.Tensor | None = None
    num_alternatives: int = 0
    images: tuple[bytes, ...] = ()
    page_keys: PageKeys | None = None

    @property
    def num_cached(self) -> int:
        """Ids whose keys are in the cache and that the host knows."""
        return max(0, len(self.row.ids) - 1) if self.running else self.num_read

    @property
    def length(self) -> int:
        """Tokens, those queued on the device among them."""
        return len(self.row.ids) + self.pending


@dataclasses.dataclass(frozen=True)
class Emitted:
    """A new token of a request.

    Attributes:
        request: its number.
        token_id: the token; -1 where a request ends without one ("cancelled", "error").
        logprob: of the token under the model itself.
        finish_reason: "stop", "length", "cancelled" or "error" with the last token, else None.
        alternatives: the most likely tokens in its place and their log-probabilities, the best first, as many as the
            request asked for.
        error: what made the request end, with "error".
    """

    request: int
    token_id: int
    logprob: float
    finish_reason: str | None
    alternatives: tuple[tuple[int, float], ...] = ()
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """The most likely tokens of each row under the model itself, in host memory once the device is there.

    Attributes:
        ids: (n, k) int64, the best first.
        logprobs: (n, k) float32.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor

    def of(self, place: int, count: int) -> tuple[tuple[int, float], ...]:
        """The best ``count`` of a row."""
        return tuple(zip(self.ids[place, :count].tolist(), self.logprobs[place, :count].tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Queued:
    """A step that the device was given.

    Attributes:
        rows: requests, with the mark and the place of their token in the histories of a state.
        state: whose histories they are.
        event: recorded behind the step; None where there is nothing to wait for.
        tokens: what the host chose, with log-probabilities; None where the device chooses.
        alternatives: of the rows in order, where a request asks for them.
    """

    rows: list[tuple[Request, int, int]]
    state: StepState
    event: torch.cuda.Event | None
    tokens: list[tuple[int, float]] | None
    alternatives: Alternatives | None
