"""Answers to prompts that mostly begin as the one before, as the turns of a chat do: only what is new is read.

One request at a time goes through a batcher whose pages stay (``phi35.prefix_cache``), so that pictures count by
content and keys of one LongRoPE factor set never serve the other. The cache is made anew, twice as large, when a prompt
and its answer do not fit.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from phi35.generation.batcher import Batcher
from phi35.generation.streaming import TextStream
from phi35.processor import Processor

FIRST_TOKENS = 1024
"""Tokens that the cache holds at first, at least."""


class GrowingPrompts:
    """A model that keeps what it has read.

    Args:
        model: a ``phi35.model.CausalLM``, put into evaluation mode.
        processor: of the model.
        kv_cache_dtype: "int8", "fp8" or None, as of the batcher.
    """

    def __init__(self, model: Any, processor: Processor, kv_cache_dtype: str | None = None) -> None:
        self.model, self.processor, self.kv_cache_dtype = model, processor, kv_cache_dtype
        self.batcher: Batcher | None = None
        self._room = 0

    def answer(self, batch: dict[str, Any], stop: Sequence[str] = (), **options: Any) -> Iterator[str]:
        """Pieces of the answer to one prompt.

        Args:
            batch: what the processor made of it.
            stop: strings that end the answer and are cut off.
            **options: fields of ``DecodingOptions``.

        Raises:
            ValueError: for bad arguments.
        """
        ids, most = batch["input_ids"], options.get("max_new_tokens", 256)
        batcher = self._batcher(ids.shape[1] + (most if isinstance(most, int) else 0))
        pixels, sizes = batch.get("pixel_values"), batch.get("image_sizes")
        number = batcher.submit(ids, pixels, sizes, stop=tuple(stop), **options)
        text = TextStream(self.processor.tokenizer, stop)
        try:
            for emitted in batcher.run():
                if emitted.error is not None:
                    raise RuntimeError(emitted.error)
                if emitted.token_id >= 0 and (piece := text.feed(emitted.token_id)):
                    yield piece
            if piece := text.finish():
                yield piece
        finally:
            # A reader may leave in the middle of an answer.
            if batcher.cancel(number):
                for _ in batcher.run():
                    pass

    def _batcher(self, num_tokens: int) -> Batcher:
        """A batcher with room for so many tokens."""
        if self.batcher is None or num_tokens > self._room:
            longest = self.model.config.max_position_embeddings
            self._room = min(longest, max(FIRST_TOKENS, 2 * num_tokens))
            self.batcher = None  # before the new one takes its memory
            self.batcher = Batcher(
                self.model,
                max_rows=1,
                max_tokens=self._room,
                tokenizer=self.processor.tokenizer,
                kv_cache_dtype=self.kv_cache_dtype,
            )
        return self.batcher
