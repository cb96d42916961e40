"""Prefix caching: full pages of keys and values are found again by what they were computed from.

The keys of a token depend on all tokens before it, on the pictures among them and on the LongRoPE factors of its row,
so that a page goes by a chain of digests: its own tokens and pictures, the page before it, and at the root the factor
set. Pages under the short factors are never found for a row under the long ones, nor the other way round. Shared
prefixes are those of PagedAttention (arXiv 2309.06180, section 4.4), found automatically as vLLM's hash chain does.
Digests have 128 bits, since a collision would show one request another's text.
"""

import collections
import dataclasses
import hashlib
from array import array
from collections.abc import Sequence

DIGEST_BYTES = 16


@dataclasses.dataclass
class PrefixStatistics:
    """Counts since the cache was made.

    Attributes:
        prompt_tokens: tokens whose keys were asked for.
        hit_tokens: those of them whose keys were there.
        evicted_pages: pages that were given to others while their contents could still be found.
    """

    prompt_tokens: int = 0
    hit_tokens: int = 0
    evicted_pages: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the tokens that were not computed; 0 before the first."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class PageKeys:
    """The digests of one row's full pages, worked out as they are asked for.

    Args:
        page_size: tokens of a page.
        use_long: whether the row stands under the long factors.
        images: digest of each picture of the row, in the order of its tags' numbers.
        image_token_id: the id that stands for the row's pictures in their order; None for none.
    """

    def __init__(
        self, page_size: int, use_long: bool, images: Sequence[bytes] = (), image_token_id: int | None = None
    ) -> None:
        self.page_size, self.images, self.image_token_id = page_size, tuple(images), image_token_id
        self.use_long = use_long
        self._keys: list[bytes] = []

    def first(self, ids: Sequence[int], count: int) -> list[bytes]:
        """The keys of the first ``count`` pages of a row whose ids begin as they did at the last call."""
        assert count * self.page_size <= len(ids)
        for page in range(len(self._keys), count):
            tokens = ids[page * self.page_size : (page + 1) * self.page_size]
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            digest.update(self._keys[-1] if self._keys else b"long" if self.use_long else b"short")
            digest.update(array("q", tokens).tobytes())
            for image in self._shown(tokens):
                digest.update(image)
            self._keys.append(digest.digest())
        return self._keys[:count]

    def _shown(self, tokens: Sequence[int]) -> list[bytes]:
        """Digests of the pictures that a page may show: which feature stands where follows from the ids before."""
        if not self.images:
            return []
        if self.image_token_id in tokens:
            return list(self.images)
        return [self.images[-token - 1] for token in dict.fromkeys(tokens) if token < 0]


class PageIndex:
    """Which page holds which key's contents, and which of these pages nobody uses, the longest unused first."""

    def __init__(self) -> None:
        self.statistics = PrefixStatistics()
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def num_idle(self) -> int:
        """Pages that could be found and that nobody uses."""
        return len(self._idle)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning of these keys."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def add(self, key: bytes, page: int) -> None:
        """Let a page in use be found; nothing where the key has a page, or the page a key, already."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def is_idle(self, page: int) -> bool:
        """Whether nobody uses a page that could be found."""
        return page in self._idle

    def use(self, page: int) -> None:
        """A page that was found has a user."""
        self._idle.pop(page, None)

    def leave(self, page: int) -> bool:
        """A page has lost its last user; False if it cannot be found, so that it is free."""
        if page not in self._key_of:
            return False
        self._idle[page] = None
        return True

    def evict(self) -> int:
        """Give up the contents of the longest unused page."""
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        self.statistics.evicted_pages += 1
        return page

    def clear(self) -> list[int]:
        """Forget all keys; returns the pages that nobody uses."""
        idle = list(self._idle)
        self._page_of.clear()
        self._key_of.clear()
        self._idle.clear()
        return idle
