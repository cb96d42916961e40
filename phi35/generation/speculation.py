"""Speculative decoding (arXiv 2211.17192): drafted tokens are checked together and taken as far as they are right.

A draft is right as far as it is what the loop without drafts would choose. Greedy text is the same by that; and so is
sampled text, since each choice is made by the uniform number that belongs to its place: the paper's rejection sampling
keeps the distribution, this keeps the text of a seed. A draft model draws by the same numbers, so that two similar
distributions mostly agree. No draft goes over LongRoPE's switch: the row is computed anew there.
"""

import dataclasses
import logging
from typing import Any

import torch

from phi35.generation.captured_feed import CapturedFeed
from phi35.generation.captured_steps import no_graph
from phi35.generation.drafting import Drafter, DraftModel, PromptLookup
from phi35.generation.fast_step import CannotCaptureError, limit
from phi35.generation.feeds import Feed, PlainFeed
from phi35.generation.rows import Row
from phi35.generation.sampling import Draws

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class SpeculationStatistics:
    """Counts of one generation, over all rows.

    Attributes:
        steps: steps of the model.
        tokens: tokens that they gave.
        drafted: tokens that were proposed.
        accepted: those of them that were taken.
    """

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were taken; 0 where none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0


class SpeculativeSteps:
    """One token or more for each unfinished row at a time.

    Args:
        model: a ``phi35.model.CausalLM``.
        options: of the generation, which say where drafts come from.
        rows: all rows.
        draft_embeds: (T, D) embeddings of each row's prompt under the draft model, where it has pictures.
        plain: feeds that capture nothing, on any device; None takes what the options ask for and the device can.
    """

    def __init__(
        self,
        model: Any,
        options: Any,
        rows: list[Row],
        draft_embeds: list[torch.Tensor | None],
        plain: str | None = None,
    ) -> None:
        self.config, self.options, self._rows = model.config, options, list(rows)
        self.statistics = SpeculationStatistics()
        draws = [Draws(row.generator) for row in rows]
        self.feed = feed_for(model, options, rows, draws, options.draft_tokens + 1, plain)
        self._drafter: Drafter
        if options.draft_model is None:
            image_id = (
                frozenset[int]() if self.config.vision is None else frozenset({self.config.vision.image_token_id})
            )
            self._drafter = PromptLookup(rows, image_id)
        else:
            draft = options.draft_model.eval()
            # What a full acceptance leaves to be fed: the last drafted token and the one chosen after it.
            self._drafter = DraftModel(rows, draft_embeds, lambda own: feed_for(draft, options, own, draws, 2, plain))

    def next(self) -> list[list[int]]:
        """The next tokens of each unfinished row; their log-probabilities are added to the rows where asked for."""
        drafts: list[list[int]] = [[] for _ in self._rows]
        if self.statistics.steps:
            drafts = self._drafter.propose([self._room(row) for row in self._rows])
        found = []
        for row, draft, choices in zip(self._rows, drafts, self.feed.choices(drafts), strict=True):
            right = 0
            while right < len(draft) and draft[right] == choices[right].token:
                right += 1
            taken = choices[: right + 1]
            found.append([choice.token for choice in taken])
            if self.options.return_logprobs:
                row.logprobs += [choice.logprob for choice in taken]
            self.statistics.drafted += len(draft)
            self.statistics.accepted += right
            self.statistics.tokens += len(taken)
        self.statistics.steps += 1
        return found

    def keep(self, places: list[int]) -> None:
        """Go on with these of the rows."""
        self._rows = [self._rows[place] for place in places]
        self._drafter.keep(places)
        self.feed.keep(places)

    def _room(self, row: Row) -> int:
        """How many tokens may be drafted for a row: it must neither end nor cross before the last of them."""
        left = self.options.max_new_tokens - (len(row.ids) - row.prompt_length) - 1
        ends = [self.config.max_position_embeddings - len(row.ids) - 1]
        if self.config.rope_scaling is not None and not row.rope_long:
            ends.append(self.config.original_max_position_embeddings - len(row.ids))
        return max(0, min(self.options.draft_tokens, left, *ends))


def feed_for(
    model: Any, options: Any, rows: list[Row], draws: list[Draws], width: int, plain: str | None = None
) -> Feed:
    """The feed that serves a model: captured where it and its device can.

    Args:
        model: a ``phi35.model.CausalLM``.
        options: of the generation.
        rows: its rows.
        draws: of the rows.
        width: tokens of a row in a captured step.
        plain: "forward" for the model's forward pass, "steps" for captured ones without graph or kernels.

    Raises:
        ValueError: if ``options.fast`` asks for a graph and the model cannot be captured.
    """
    if plain == "steps":
        return CapturedFeed(model, options, rows, draws, width, plain=True)
    if plain == "forward" or options.fast is False:
        return PlainFeed(model, options, rows, draws)
    reason = limit(model, options.kv_cache_dtype)
    if reason is None:
        try:
            return CapturedFeed(model, options, rows, draws, width)
        except CannotCaptureError as error:
            reason = str(error)
    if options.fast:
        raise ValueError(no_graph(reason))
    if model.device.type == "cuda":
        logger.warning("speculating without CUDA graphs: %s", reason)
    return PlainFeed(model, options, rows, draws)
