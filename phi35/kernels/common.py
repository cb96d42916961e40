"""What the kernels of a decoding step share: programmatic launch, weight tiles, norms.

A step is bound by the bandwidth of its weights, so that what lies between two kernels decides: each kernel is launched
while its predecessor still runs (programmatic dependent launch), asks for its weights, which nothing in the step
writes, and only then waits for the predecessor's memory. The order in every kernel: ask for weights, release the
successor, wait, read activations. What a step writes may be touched after the wait alone.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra import cuda

LINE = tl.constexpr(128)
"""Bytes of a cache line."""


def launch_options(num_warps: int, pdl: bool) -> dict[str, Any]:
    """Keywords of a launch; the interpreter knows no programmatic launch."""
    return {"num_warps": num_warps, "PDL": pdl} | ({"launch_pdl": True} if pdl else {})


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Release the successor's launch, then wait until all that the predecessors wrote can be read."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def wait_then_release(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same the other way about: the successor may read at once what stood before this kernel's predecessor ran."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch(start, num_bytes, part, PARTS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ask for one of PARTS parts of memory from ``start`` on; it goes to the second-level cache.

    ``num_bytes`` is a multiple of 16; LANES is the program's number of threads, of which one a warp makes a request
    (the instruction takes a warp's requests one by one). Compute capability 9.0.
    """
    warps: tl.constexpr = LANES // 32
    lane = tl.arange(0, LANES)
    slice_bytes = tl.cdiv(tl.cdiv(num_bytes, PARTS * warps), LINE) * LINE
    first = (part * warps + lane // 32) * slice_bytes
    size = tl.where(lane % 32 == 0, tl.minimum(tl.maximum(num_bytes - first, 0), slice_bytes), 0)
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}",
        "=r,l,r",
        [start.to(tl.int64) + first, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_rows(weight, first_row, num_rows, WIDTH: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first PARTS programs ask for rows that later ones will read, so that the memory is busy while they wait."""
    if tl.program_id(0) < PARTS:
        itemsize: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
        start = weight + tl.cast(first_row, tl.int64) * WIDTH
        prefetch(start, num_rows * WIDTH * itemsize, tl.program_id(0), PARTS, LANES)


@triton.jit
def slot_offset(table, row, head, slot, capacity, NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the keys of a head in a row's slot begin, counted in numbers; PAGE 0 for rows that lie whole."""
    if PAGE == 0:
        place = tl.cast(row, tl.int64) * NUM_KV + head
        return (place * (capacity + 1) + slot) * HEAD_DIM
    page = tl.load(table + row * ((capacity + 1) // PAGE) + slot // PAGE).to(tl.int64)
    return ((page * NUM_KV + head) * PAGE + slot % PAGE) * HEAD_DIM


@triton.jit
def load_tiles(weight, rows, num_rows, WIDTH: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (R,) of a row-major (num_rows, WIDTH) matrix as a tuple of (R, CHUNK) tiles, all loads in flight at once."""
    tiles = ()
    start = weight + rows.to(tl.int64)[:, None] * WIDTH
    for chunk in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        if EVEN and (chunk + 1) * CHUNK <= WIDTH:
            tile = tl.load(start + columns[None, :], eviction_policy="evict_first")
        else:
            mask = (columns < WIDTH)[None, :] & (rows < (2147483647 if EVEN else num_rows))[:, None]
            tile = tl.load(start + columns[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def load_vector(vector, WIDTH: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector (WIDTH,) as a tuple of chunks in its own dtype; zeros past its end."""
    chunks = ()
    for chunk in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        if (chunk + 1) * CHUNK <= WIDTH:
            values = tl.load(vector + columns)
        else:
            values = tl.load(vector + columns, mask=columns < WIDTH, other=0.0)
        chunks = chunks + (values,)  # type: ignore[assignment]
    return chunks


@triton.jit
def load_norm(weight, bias, NORM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A norm's weight and bias in chunks; both empty where there is no norm, the bias but for "layernorm"."""
    weights = ()
    biases = ()
    if NORM != "none":
        weights = load_vector(weight, WIDTH, CHUNK)
    if NORM == "layernorm":
        biases = load_vector(bias, WIDTH, CHUNK)
    return weights, biases


@triton.jit
def normalise(chunks, weights, biases, eps, NORM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """RMSNorm or LayerNorm of a vector in chunks, in float32; zeros stay past its end. "none" only widens it."""
    count: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    mean = 0.0
    if NORM == "layernorm":
        total = chunks[0].to(tl.float32)
        for chunk in tl.static_range(1, count):
            total += chunks[chunk].to(tl.float32)
        mean = tl.sum(total, axis=0) / WIDTH
    scale = 1.0
    if NORM != "none":
        squares = tl.zeros((CHUNK,), tl.float32)
        for chunk in tl.static_range(count):
            centred = chunks[chunk].to(tl.float32) - mean
            if (chunk + 1) * CHUNK > WIDTH:
                centred = tl.where(chunk * CHUNK + tl.arange(0, CHUNK) < WIDTH, centred, 0.0)
            squares += centred * centred
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / WIDTH + eps)
    result = ()
    for chunk in tl.static_range(count):
        value = chunks[chunk].to(tl.float32)
        if NORM != "none":
            value = (value - mean) * scale * weights[chunk].to(tl.float32)
        if NORM == "layernorm":
            value += biases[chunk].to(tl.float32)
        result = result + (value,)  # type: ignore[assignment]
    return result


@triton.jit
def dot_tiles(tiles, chunks, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products (R,) of R rows in COUNT tiles with a vector in chunks, summed in float32."""
    total = tiles[0].to(tl.float32) * chunks[0].to(tl.float32)[None, :]
    for chunk in tl.static_range(1, COUNT):
        total += tiles[chunk].to(tl.float32) * chunks[chunk].to(tl.float32)[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def activate(gate, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu, or gelu in its exact form, of float32 values."""
    if ACT == "silu":
        return gate / (1.0 + tl.exp(-gate))
    return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
