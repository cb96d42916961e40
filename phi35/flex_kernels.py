"""FlexAttention as kernels of our own: one for each way of calling it, compiled once or twice and never left out.

``torch.compile`` builds a kernel again whenever something changes that it took for fixed: gradients or none, a length,
the pattern. After eight times, counted over every use of a function in the process, it goes on uncompiled, and
FlexAttention then holds all scores: a fifth of dense attention's speed was measured. Here each way of calling it is a
function with code of its own, which torch counts by itself, and lengths are marked as changing before the first use.
Should one run uncompiled all the same, it raises.
"""

import functools
import itertools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

BLOCK_TENSORS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)
"""What a ``BlockMask`` holds; those of "q" serve gradients alone and are None without."""

_numbers = itertools.count()


class Pattern(Protocol):
    """What decides which keys are seen; patterns that are equal share kernels."""

    def sees(self, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Whether a head's query sees a key: bool of the arguments' broadcast shape."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class FlexBlocks:
    """Which blocks of keys each block of queries takes, and what decides within them.

    Attributes:
        mask: torch's ``BlockMask`` of one row; on its own it serves FlexAttention uncompiled.
        pattern: what is seen.
        place: int32 scalar tensor: place of the first query. A number would be built into the kernel.
        head: likewise the number of the first head.
        options: of the kernel, such as its tiles.
        fixed_lengths: build a kernel for these lengths alone.
    """

    mask: Any
    pattern: Pattern
    place: torch.Tensor
    head: torch.Tensor
    options: tuple[tuple[str, Any], ...] = ()
    fixed_lengths: bool = False


def attend_flex(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: FlexBlocks, scale: float | None
) -> torch.Tensor:
    """Attention by FlexAttention's compiled kernel.

    Args:
        queries: (B, H, T, d).
        keys: (B, K, n, d), K a divisor of H.
        values: (B, K, n, d).
        blocks: what is seen.
        scale: factor on the products of queries and keys; None takes 1 / sqrt(d).

    Returns:
        (B, H, T, d).

    Raises:
        RuntimeError: where torch would run it uncompiled.
    """
    held = {name: getattr(blocks.mask, name) for name in BLOCK_TENSORS}
    if torch.compiler.is_compiling():  # within a model that is compiled as a whole
        return _attend(queries, keys, values, held, blocks, blocks.mask.BLOCK_SIZE, scale)
    tensors = queries, keys, values
    if not blocks.fixed_lengths:
        _mark_lengths(tensors, held)
    way = _Way(
        pattern=blocks.pattern,
        sizes=tuple(blocks.mask.BLOCK_SIZE),
        options=blocks.options,
        scale=scale,
        graded=tuple(tensor.requires_grad for tensor in tensors) if torch.is_grad_enabled() else None,
        state=(torch.is_inference_mode_enabled(), torch.is_autocast_enabled(queries.device.type)),
        device=queries.device,
        kinds=tuple((tensor.dtype, tensor.shape[1], tensor.shape[3]) for tensor in tensors),
        layouts=tuple((tensor.is_contiguous(), tensor.stride(2), tensor.is_inference()) for tensor in tensors),
        # Lengths of 1, and lengths that are alike, count as fixed.
        shapes=(
            queries.shape[0] == 1,
            queries.shape[2] == keys.shape[2],
            *(size == 1 for size in held["kv_indices"].shape[2:]),
            *((queries.shape[0], queries.shape[2], keys.shape[2]) if blocks.fixed_lengths else ()),
        ),
    )
    try:
        attended: torch.Tensor = compiled(way)(queries, keys, values, held, blocks.place, blocks.head)
    except Exception as error:
        if type(error).__name__ != "FailOnRecompileLimitHit":
            raise
        raise RuntimeError(
            "torch._dynamo.config.recompile_limit does not let FlexAttention's kernel be compiled for this call "
            f"({way}); raise the limit (torch's own is 8), or see TORCH_LOGS=recompiles for what changes between calls"
        ) from error
    return attended


@dataclass(frozen=True, kw_only=True)
class _Way:
    """All that a kernel is built for."""

    pattern: Pattern
    sizes: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    scale: float | None
    graded: tuple[bool, ...] | None
    state: tuple[bool, ...]
    device: torch.device
    kinds: tuple[tuple[torch.dtype, int, int], ...]
    layouts: tuple[tuple[bool, int, bool], ...]
    shapes: tuple[int, ...]


@functools.cache
def compiled(way: _Way) -> Callable[..., torch.Tensor]:
    """The kernel of a way to call it; torch builds it at its first use."""

    def attend(
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        held: Mapping[str, torch.Tensor | None],
        place: torch.Tensor,
        head: torch.Tensor,
    ) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            raise RuntimeError(
                "FlexAttention would run uncompiled here and hold all scores: something turns torch.compile off "
                "(TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE, torch.compiler.set_stance)"
            )
        blocks = FlexBlocks(mask=None, pattern=way.pattern, place=place, head=head, options=way.options)
        return _attend(queries, keys, values, held, blocks, way.sizes, way.scale)

    # torch keeps and counts kernels by code object, and what it knows of shapes by a code's name and line.
    code = attend.__code__.replace(co_name=f"flex_kernel_{next(_numbers)}")
    function = types.FunctionType(code, attend.__globals__, code.co_name, None, attend.__closure__)
    return torch.compile(function, fullgraph=True)


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    held: Any,
    blocks: FlexBlocks,
    sizes: tuple[int, ...],
    scale: float | None,
) -> torch.Tensor:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    pattern, place, head = blocks.pattern, blocks.place, blocks.head

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return pattern.sees(h + head, q + place, k)

    # Made anew: the lengths of the mask itself are numbers, which would be built into the kernel.
    lengths: Any = {"seq_lengths": (queries.shape[2], keys.shape[2]), "BLOCK_SIZE": sizes}
    mask = BlockMask(mask_mod=mask_mod, **lengths, **held)
    gqa = keys.shape[1] != queries.shape[1]
    options: Any = dict(blocks.options) or None
    attended: torch.Tensor = flex_attention(
        queries, keys, values, block_mask=mask, scale=scale, enable_gqa=gqa, kernel_options=options
    )
    return attended


def _mark_lengths(tensors: tuple[torch.Tensor, ...], held: Mapping[str, torch.Tensor | None]) -> None:
    """Tell the compiler which sizes change from call to call: rows, tokens and blocks."""
    from torch._dynamo import maybe_mark_dynamic

    for tensor in tensors:
        maybe_mark_dynamic(tensor, [0, 2] if tensor.shape[0] > 1 else 2)
    for blocks in held.values():
        if blocks is not None:
            maybe_mark_dynamic(blocks, list(range(2, blocks.dim())))
