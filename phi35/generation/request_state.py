"""Keeps the device's part of a batch of requests: filters, random numbers, last tokens, lengths."""

import torch

from phi35.generation.requests import Request
from phi35.kernels.operands import StepState

DRAWN_AT_ONCE = 128
"""Uniform numbers drawn for a request at a time; half of the state's ring."""


class RequestState:
    """Writes requests into rows of a state.

    Args:
        state: of all rows.
    """

    def __init__(self, state: StepState) -> None:
        self.state = state

    def enter(
        self, requests: list[Request], slots: list[int], logits: torch.Tensor, tokens: list[tuple[int, float]] | None
    ) -> StepState:
        """Choose first tokens (unless the host did) and fill the rows.

        Args:
            requests: their whole ids have been read.
            slots: their rows.
            logits: (n, V) float32 after their ids.
            tokens: what the host chose, with log-probabilities; None leaves it to the device.

        Returns:
            A state of these rows alone, whose histories hold the chosen tokens.
        """
        device, vocab = logits.device, logits.shape[1]
        apart = StepState.new(len(requests), vocab, device)
        columns: dict[str, list[float]] = {name: [] for name in ("temperature", "top_k", "top_p", "min_p", "penalty")}
        for place, request in enumerate(requests):
            options = request.options
            columns["temperature"].append(options.temperature)
            columns["top_k"].append(vocab if options.top_k is None else min(options.top_k, vocab))
            columns["top_p"].append(1.0 if options.top_p is None else options.top_p)
            columns["min_p"].append(options.min_p or 0.0)
            columns["penalty"].append(options.repetition_penalty)
            if options.repetition_penalty != 1:
                apart.seen[place, torch.tensor(sorted(request.row.seen), dtype=torch.int64, device=device)] = 1
        self._mask(apart, requests, list(range(len(requests))))
        for name, values in columns.items():
            kept = getattr(apart, name)
            kept.copy_(torch.tensor(values, dtype=kept.dtype))
        made = [len(request.row.ids) - request.row.prompt_length for request in requests]
        apart.steps.copy_(torch.tensor(made))
        if tokens is not None:
            apart.tokens.copy_(torch.tensor([token for token, _ in tokens]))
            apart.steps.add_(1)
        else:
            self.draw(requests, slots, fresh=True)
            apart.draws.copy_(self.state.draws[:, slots])
            from phi35.kernels import sampling

            sampling.choose(logits, apart, False)
        apart.lengths.copy_(torch.tensor([len(request.row.ids) for request in requests]))
        apart.rope_long.copy_(torch.tensor([request.row.rope_long for request in requests]))
        self.state.write(torch.tensor(slots, device=device), apart)
        return apart

    def constrain(self, requests: list[Request], slots: list[int]) -> None:
        """Tell rows which tokens their next step may choose."""
        self._mask(self.state, requests, slots)

    @staticmethod
    def _mask(state: StepState, requests: list[Request], places: list[int]) -> None:
        """Write the masks of constrained requests into their places of a state."""
        pairs = [(one.mask, place) for one, place in zip(requests, places, strict=True) if one.mask is not None]
        if pairs:
            rows = torch.tensor([place for _, place in pairs], device=state.allowed.device)
            state.allowed[rows] = torch.stack([mask for mask, _ in pairs]).to(rows.device)
            state.masked[rows] = 1

    def advance(self, slots: list[int], tokens: list[tuple[int, float]]) -> None:
        """Move rows on by tokens that the host chose."""
        places = torch.tensor(slots, device=self.state.tokens.device)
        self.state.tokens[places] = torch.tensor([token for token, _ in tokens], device=places.device)
        self.state.lengths[places] += 1
        self.state.steps[places] += 1

    def draw(self, requests: list[Request], slots: list[int], fresh: bool = False) -> None:
        """Make sure of the uniform numbers of the next step of each request; ``fresh`` for rows just taken.

        The numbers come from each request's generator in order, whatever row it has at the time.
        """
        ring = self.state.draws.shape[0]
        for request, slot in zip(requests, slots, strict=True):
            made = request.length - request.row.prompt_length
            block = made // DRAWN_AT_ONCE
            if request.options.temperature == 0 or not (fresh or made % DRAWN_AT_ONCE == 0):
                continue
            numbers = self._numbers(request, block)
            start = block * DRAWN_AT_ONCE % ring
            self.state.draws[start : start + DRAWN_AT_ONCE, slot] = numbers.to(self.state.draws.device)

    def _numbers(self, request: Request, block: int) -> torch.Tensor:
        """Numbers [128 block, 128 (block + 1)) of a request; drawn once."""
        if request.drawn is None:
            request.drawn = torch.empty(0, dtype=torch.float64)
        while len(request.drawn) < (block + 1) * DRAWN_AT_ONCE:
            more = torch.rand(DRAWN_AT_ONCE, generator=request.row.generator, dtype=torch.float64)
            request.drawn = torch.cat((request.drawn, more))
        return request.drawn[block * DRAWN_AT_ONCE : (block + 1) * DRAWN_AT_ONCE]
