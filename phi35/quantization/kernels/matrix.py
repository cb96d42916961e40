"""Several tokens with weights in few bits: a product in tiles for a few, and the weight itself for many.

Up to ``MAX_TOKENS`` rows the codes of a tile become whole numbers of the activations' dtype, exact in it, the matrix
units multiply them, and each group's part is scaled in float32. Where the tiles are fewer than the multiprocessors the
depth is split, too; the parts are added in a fixed order. Beyond, restoring blocks of the weight for torch's own
product costs less than unpacking them for each tile of tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from phi35.quantization.codes import QuantizedTensor
from phi35.quantization.kernels.tiles import constants, load_codes, load_scale, operands

MAX_TOKENS = 64
PROGRAMS = 264
"""Programs that a product of few tokens aims at: two for each multiprocessor of an H100 or H200."""


@dataclass(frozen=True)
class TileConfig:
    """Shape of a program.

    Attributes:
        rows: weight rows per program.
        depth: columns per step, cut to a group.
        num_warps: warps per program.
        num_stages: steps in flight.
    """

    rows: int = 32
    depth: int = 128
    num_warps: int = 4
    num_stages: int = 4


def product(
    hidden_states: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    config: TileConfig | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """(M, columns) times a weight (N, columns), plus bias (N,): (M, N) in the activations' dtype; M <= MAX_TOKENS."""
    num_tokens, (num_rows, width) = hidden_states.shape[0], weight.shape
    config = TileConfig() if config is None else config
    tiles = triton.cdiv(num_rows, config.rows)
    known = constants(weight, config.depth)
    steps = triton.cdiv(width, known["DEPTH"])
    splits = max(1, min(PROGRAMS // tiles, steps // 4)) if splits is None else splits
    out = hidden_states.new_empty((num_tokens, num_rows))
    parts = out if splits == 1 else out.new_empty((splits, num_tokens, num_rows), dtype=torch.float32)
    _product_kernel[(tiles, splits)](
        hidden_states.contiguous(),
        *operands(weight),
        weight.scale if bias is None else bias,
        parts,
        num_tokens,
        num_rows,
        triton.cdiv(steps, splits) * known["DEPTH"],
        BIAS=bias is not None,
        SPLIT=splits > 1,
        TOKENS=max(16, triton.next_power_of_2(num_tokens)),
        ROWS=config.rows,
        **known,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        chunk = 256
        _add_kernel[(num_tokens, triton.cdiv(num_rows, chunk))](
            parts,
            weight.scale if bias is None else bias,
            out,
            num_tokens,
            num_rows,
            BIAS=bias is not None,
            SPLITS=splits,
            CHUNK=chunk,
            num_warps=2,
        )
    return out


def restore(weight: QuantizedTensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows start to stop of a weight (rows, columns) in ``dtype``."""
    width = weight.shape[1]
    out = torch.empty((stop - start, width), dtype=dtype, device=weight.codes.device)
    known = constants(weight, 128)
    rows = 32
    _restore_kernel[(triton.cdiv(stop - start, rows), triton.cdiv(width, known["DEPTH"]))](
        *operands(weight), out, start, stop, ROWS=rows, **known, num_warps=4
    )
    return out


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]
    hidden,
    codes,
    scale,
    zeros,
    row_scale,
    exponent,
    bias,
    out,
    num_tokens,
    num_rows,
    share,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < num_rows
    wide_rows = rows.to(tl.int64)
    tokens = tl.arange(0, TOKENS)
    present = tokens < num_tokens
    kind: tl.constexpr = hidden.dtype.element_ty
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    start = tl.program_id(1) * share
    for first in range(start, tl.minimum(start + share, WIDTH), DEPTH):
        columns = first + tl.arange(0, DEPTH)
        mask = present[:, None] & (columns < WIDTH)[None, :]
        token = tl.load(hidden + tokens[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
        code = load_codes(codes, zeros, exponent, wide_rows, real, first, kind, WIDTH, DEPTH, KIND, GROUP, ZEROS)
        factor = load_scale(scale, row_scale, wide_rows, real, first, WIDTH, GROUP, BYTES)
        total += tl.dot(token, tl.trans(code)) * factor[None, :]
    at = tokens[:, None] * num_rows + rows[None, :]
    mask = present[:, None] & real[None, :]
    if SPLIT:
        tl.store(out + tl.program_id(1) * num_tokens * num_rows + at, total, mask=mask)
    else:
        if BIAS:
            total += tl.load(bias + rows, mask=real, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, total.to(kind), mask=mask)


@triton.jit
def _add_kernel(  # type: ignore[no-untyped-def]
    parts, bias, out, num_tokens, num_rows, BIAS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr
):
    token = tl.program_id(0)
    rows = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    real = rows < num_rows
    total = tl.zeros((CHUNK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * num_tokens + token) * num_rows + rows, mask=real, other=0.0)
    if BIAS:
        total += tl.load(bias + rows, mask=real, other=0.0).to(tl.float32)
    tl.store(out + token * num_rows + rows, total.to(out.dtype.element_ty), mask=real)


@triton.jit
def _restore_kernel(  # type: ignore[no-untyped-def]
    codes,
    scale,
    zeros,
    row_scale,
    exponent,
    out,
    start,
    stop,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BYTES: tl.constexpr,
):
    rows = (start + tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = rows < stop
    first = tl.program_id(1) * DEPTH
    code = load_codes(codes, zeros, exponent, rows, real, first, tl.float32, WIDTH, DEPTH, KIND, GROUP, ZEROS)
    factor = load_scale(scale, row_scale, rows, real, first, WIDTH, GROUP, BYTES)
    columns = first + tl.arange(0, DEPTH)
    mask = real[:, None] & (columns < WIDTH)[None, :]
    at = out + (rows - start)[:, None] * WIDTH + columns[None, :]
    tl.store(at, (code * factor[:, None]).to(out.dtype.element_ty), mask=mask)
