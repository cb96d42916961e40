"""A key-value cache in pages that rows share: a row takes pages as it grows and gives them back when it ends.

After PagedAttention (arXiv 2309.06180). Page 0 belongs to nobody: what rows outside the batch still write goes there.
The bookkeeping is the host's; the device reads two tables, one of the pages that a row owns, and one for decoding
steps, in which rows that are not to be stepped own page 0 alone.

Full pages may be shared: a page that was registered under the key of its contents (``phi35.prefix_cache``) is adopted
by rows that begin alike, and stays when its last row ends until the room is needed.
"""

import dataclasses
from collections.abc import Sequence

import torch

from phi35.cache import layer_of, new_tensors
from phi35.cache_codes import check_kind
from phi35.config import ModelConfig
from phi35.kernels.operands import LayerCache
from phi35.prefix_cache import PageIndex

PAGE_SIZE = 64
"""Slots of a page: a multiple of the keys that a kernel takes per step."""


class PagedCache:
    """Keys and values of every layer.

    Args:
        config: the model's config.
        num_rows: most rows at a time.
        num_pages: pages in all, page 0 included.
        max_length: most tokens of a row.
        device: where the tensors lie.
        dtype: of keys and values.
        kv_cache_dtype: "int8" or "fp8" stores them in eight bits; None in ``dtype``.

    Attributes:
        lengths: (rows,) int64 tokens of each row, the steps' own.
        rope_long: (rows,) bool, rows under the long factors.
        table: (rows, n) int32 pages that each row owns, 0 past them.
        step_table: (rows, n) int32, the same for rows that are stepped, else 0.
        index: pages that can be found by their contents.

    Raises:
        ValueError: for fewer rows, pages or tokens than one row of one page needs, or an unknown ``kv_cache_dtype``.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_rows: int,
        num_pages: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_cache_dtype: str | None = None,
    ) -> None:
        check_kind(kv_cache_dtype)
        if num_rows < 1 or num_pages < 2 or max_length < 1:
            raise ValueError(
                "a paged cache needs at least 1 row, 2 pages (one is nobody's) and 1 token a row, got "
                f"num_rows={num_rows}, num_pages={num_pages}, max_length={max_length}"
            )
        self.config, self.max_length = config, max_length
        self.dtype, self.kind = dtype, kv_cache_dtype
        shape = (num_pages, config.num_key_value_heads, PAGE_SIZE, config.attention_head_dim)
        self.keys, self.values, self.key_scales, self.value_scales = new_tensors(
            config, shape, device, dtype, self.kind
        )
        # One column more than any row needs: a row that runs over writes to page 0.
        columns = -(-max_length // PAGE_SIZE) + 1
        self.table = torch.zeros(num_rows, columns, dtype=torch.int32, device=device)
        self.step_table = torch.zeros_like(self.table)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.rope_long = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._free = list(range(num_pages - 1, 0, -1))
        self._owned: list[list[int]] = [[] for _ in range(num_rows)]
        self._stepped = [False] * num_rows
        self._num_owners = [0] * num_pages
        self.index = PageIndex()

    @property
    def num_free(self) -> int:
        """Pages that nobody owns, those among them whose contents could still be found."""
        return len(self._free) + self.index.num_idle

    @property
    def num_pages(self) -> int:
        """Pages that rows can own."""
        return self.keys[0].shape[0] - 1

    def add_pages(self, count: int) -> None:
        """More pages, in new tensors: what was captured over the old ones must not run any more."""
        first = self.keys[0].shape[0]
        for tensors in (self.keys, self.values, self.key_scales, self.value_scales):
            for layer, old in enumerate(tensors):
                tensors[layer] = torch.cat((old, old.new_zeros(count, *old.shape[1:])))
        self._free += range(first + count - 1, first - 1, -1)
        self._num_owners += [0] * count

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        stored = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(tensor.nbytes for tensors in stored for tensor in tensors)

    @property
    def num_rows(self) -> int:
        """Rows that there can be at a time."""
        return self.table.shape[0]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, in new tables; the others must have been released."""
        assert not any(owned for row, owned in enumerate(self._owned) if row not in rows)
        places = torch.tensor(rows, device=self.table.device)
        for name in ("table", "step_table", "lengths", "rope_long"):
            setattr(self, name, getattr(self, name)[places])
        self._owned = [self._owned[row] for row in rows]
        self._stepped = [self._stepped[row] for row in rows]

    def num_owned(self, row: int) -> int:
        """Pages that a row has."""
        return len(self._owned[row])

    def missing(self, row: int, num_slots: int) -> int:
        """Pages that a row lacks for so many tokens."""
        return max(0, -(-num_slots // PAGE_SIZE) - len(self._owned[row]))

    def reserve(self, row: int, num_slots: int) -> bool:
        """Give a row pages for so many tokens; False, and nothing done, where there are too few."""
        count = self.missing(row, num_slots)
        if count > self.num_free:
            return False
        if count:
            self._give(row, [self._free.pop() if self._free else self.index.evict() for _ in range(count)])
        return True

    def adopt(self, row: int, keys: Sequence[bytes]) -> int:
        """Give a row without pages those whose contents go by these keys, up to the first that is not there.

        Returns:
            How many; the row only reads them.
        """
        assert not self._owned[row]
        pages = self.index.find(keys)
        for page in pages:
            self.index.use(page)
        if pages:
            self._give(row, pages)
        return len(pages)

    def num_shared(self, keys: Sequence[bytes]) -> int:
        """Pages that ``adopt`` would give and that other rows use at present."""
        return sum(not self.index.is_idle(page) for page in self.index.find(keys))

    def register(self, row: int, keys: Sequence[bytes]) -> None:
        """Let a row's first pages be found by these keys; nobody may write to them from now on."""
        for key, page in zip(keys, self._owned[row][: len(keys)], strict=True):
            self.index.add(key, page)

    def _give(self, row: int, pages: list[int]) -> None:
        owned = self._owned[row]
        places = slice(len(owned), len(owned) + len(pages))
        written = torch.tensor(pages, dtype=torch.int32).to(self.table.device)
        self.table[row, places] = written
        if self._stepped[row]:
            self.step_table[row, places] = written
        owned += pages
        for page in pages:
            self._num_owners[page] += 1

    def set_stepped(self, row: int, stepped: bool) -> None:
        """Whether decoding steps work on a row, or write its part to page 0."""
        self._stepped[row] = stepped
        if stepped:
            self.step_table[row] = self.table[row]
        else:
            self.step_table[row] = 0
            self.lengths[row] = 0

    def release(self, row: int) -> None:
        """Take a row's pages back. Steps that were queued before may still write to them."""
        self.set_stepped(row, False)
        self.table[row] = 0
        # The last page first: without the pages before it, it could not be found, so that it must go before them.
        for page in reversed(self._owned[row]):
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0 and not self.index.leave(page):
                self._free.append(page)
        self._owned[row] = []

    def forget(self) -> None:
        """Let no page be found any more, as after a change of the model's weights."""
        self._free += self.index.clear()

    def layer(self, number: int) -> LayerCache:
        """One layer of all rows, as prompts are read into it."""
        return layer_of(self, number, self.table)


class RepeatedRows:
    """The first rows of a paged cache, each several times side by side: a step then takes as many tokens of each.

    Keys and values of all tokens of a step are stored before any of them attends, and each attends up to its own
    position, so that the tokens of a row see those before them.

    Args:
        cache: the cache; all rows that it has for now must keep their pages until ``refresh``.
        count: how many rows.
        width: how many times each.
    """

    def __init__(self, cache: PagedCache, count: int, width: int) -> None:
        self.cache, self.count, self.width = cache, count, width
        self.batch_size = count * width
        self.table = cache.table[:count].repeat_interleave(width, dim=0)

    def refresh(self) -> None:
        """Follow the rows' pages."""
        self.table.copy_(self.cache.table[: self.count].repeat_interleave(self.width, dim=0))

    def layer(self, number: int) -> LayerCache:
        """One layer of these rows."""
        return dataclasses.replace(layer_of(self.cache, number, self.table), repeats=self.width)


class PagedRows:
    """The first rows of a paged cache, as a decoding step takes them.

    Args:
        cache: the cache.
        count: how many rows.

    Attributes:
        columns: how many pages of each row are looked at; set it lower only where no graph was captured.
    """

    def __init__(self, cache: PagedCache, count: int) -> None:
        self.cache, self.batch_size = cache, count
        self.columns = cache.table.shape[1]

    @property
    def lengths(self) -> torch.Tensor:
        """(n,) int64."""
        return self.cache.lengths[: self.batch_size]

    @property
    def rope_long(self) -> torch.Tensor:
        """(n,) bool."""
        return self.cache.rope_long[: self.batch_size]

    def layer(self, number: int) -> LayerCache:
        """One layer of these rows."""
        table = self.cache.step_table[: self.batch_size, : self.columns]
        return layer_of(self.cache, number, table)
