"""The C kernel of ``product.c``: compiled with the machine's C compiler at its first use, then kept in a cache folder.

The kernel runs on torch's own OpenMP threads. Where there is no compiler the plain way of
``phi35.quantization.linear`` takes over, and says so once.
"""

import array
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from phi35.quantization.codes import QuantizedTensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("product.c")
PARTS = (SOURCE, SOURCE.with_name("product_avx512.h"), SOURCE.with_name("step_avx512.h"))
FLAGS = ("-O3", "-fno-tree-slp-vectorize", "-fPIC", "-shared", "-fopenmp")
MAX_TOKENS = 32
"""Rows of activations up to which the kernel is taken: beyond, restoring blocks for torch's product is faster."""

FEW_TOKENS = 4
"""Rows up to which a bfloat16 weight is multiplied here: one after the other, as memory allows."""

VARIANTS = ("portable", "avx2", "avx512")
KINDS = {torch.float32: 0, torch.bfloat16: 1}
SCALE_KINDS = {torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


def missing() -> str | None:
    """Why the kernel cannot run on this machine, or None; the first call compiles it."""
    return _load()[1]


def takes(dtype: torch.dtype, weight: QuantizedTensor) -> bool:
    """Whether the library knows activations of this dtype and these codes, and can run."""
    known = weight.format.type == "int" and weight.codes.device.type == "cpu" and dtype in KINDS
    return known and not torch.compiler.is_compiling() and missing() is None


def product(
    hidden_states: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, variant: str | None = None
) -> torch.Tensor:
    """(N, columns) times a weight (rows, columns) plus bias: (N, rows) in the activations' dtype.

    Args:
        hidden_states: float32 or bfloat16, on the CPU.
        weight: integer codes.
        bias: (rows,) or None.
        variant: instructions to use; None takes the best of this processor.
    """
    rows, columns = weight.shape
    hidden_states, held = hidden_states.contiguous(), _Held(weight)
    out = hidden_states.new_empty((hidden_states.shape[0], rows))
    bias = None if bias is None else bias.to(hidden_states.dtype).contiguous()
    failed = _library().phi35_product(
        hidden_states.data_ptr(),
        *held.pointers,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        hidden_states.shape[0],
        rows,
        columns,
        *held.numbers,
        KINDS[hidden_states.dtype],
        torch.get_num_threads(),
        _variant(variant),
    )
    return _checked(out, failed)


def takes_bfloat16(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``bfloat16_product`` runs these, faster than torch: a few rows of bfloat16, with AVX-512."""
    tensors = (hidden_states, weight)
    known = all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
    few = known and weight.is_contiguous() and 0 < hidden_states.numel() <= FEW_TOKENS * weight.shape[1]
    graded = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    return few and not graded and not torch.compiler.is_compiling() and best_variant() == "avx512"


def bfloat16_product(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(..., columns) times a bfloat16 weight (rows, columns) plus bias, sums in float32: (..., rows)."""
    rows, columns = weight.shape
    flat = hidden_states.reshape(-1, columns).contiguous()
    out = flat.new_empty((flat.shape[0], rows))
    bias = None if bias is None else bias.bfloat16().contiguous()
    failed = _library().phi35_bfloat16_product(
        flat.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        flat.shape[0],
        rows,
        columns,
        torch.get_num_threads(),
    )
    return _checked(out, failed).view(*hidden_states.shape[:-1], rows)


def restore(
    weight: QuantizedTensor, start: int, stop: int, dtype: torch.dtype, variant: str | None = None
) -> torch.Tensor:
    """Rows start to stop of an integer weight as float32 or bfloat16: (stop - start, columns)."""
    columns, held = weight.shape[1], _Held(weight)
    out = torch.empty((stop - start, columns), dtype=dtype)
    failed = _library().phi35_restore(
        *held.pointers,
        out.data_ptr(),
        start,
        stop - start,
        columns,
        *held.numbers,
        KINDS[dtype],
        torch.get_num_threads(),
        _variant(variant),
    )
    return _checked(out, failed)


class _Held:
    """A weight's tensors as the library takes them; they live as long as this object."""

    def __init__(self, weight: QuantizedTensor) -> None:
        names = ("codes", "scale", "row_scale", "zero_point")
        self._tensors = [None if (held := getattr(weight, name)) is None else held.contiguous() for name in names]
        self.pointers = [None if tensor is None else tensor.data_ptr() for tensor in self._tensors]
        self.numbers = (weight.scale.shape[-1], weight.format.bits, SCALE_KINDS[weight.scale.dtype])


def step(numbers: "array.array[int]", eps: float, scale: float) -> None:
    """A decoding step by its numbers and addresses, in the order of ``Step`` in ``step_avx512.h``."""
    if _library().phi35_step(numbers.buffer_info()[0], eps, scale):
        raise MemoryError("no memory for the buffers of a decoding step")


def _checked(out: torch.Tensor, failed: int) -> torch.Tensor:
    if failed:
        raise MemoryError("no memory for the buffers of a quantized product")
    return out


def _library() -> ctypes.CDLL:
    library = _load()[0]
    assert library is not None, "missing() comes first"
    return library


def _variant(name: str | None) -> int:
    return _library().phi35_variant() if name is None else VARIANTS.index(name)


def best_variant() -> str:
    """The instructions that this processor has."""
    library = _load()[0]
    return "none" if library is None else VARIANTS[library.phi35_variant()]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        reason = "no C compiler (cc, gcc or clang) is on the PATH"
    else:
        try:
            return _declared(ctypes.CDLL(str(_built(compiler)))), None
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            reason = f"{compiler} cannot build the kernel: {output.strip()[-500:]}"
    logger.warning("quantized weights run without their CPU kernel, several times slower: %s", reason)
    return None, reason


def _built(compiler: str) -> Path:
    """The shared library, compiled where the cache lacks it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (*(part.read_text() for part in PARTS), version, *FLAGS)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (base / "phi35", Path(tempfile.gettempdir()) / f"phi35-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        # A library from a folder that others may write to would be their code.
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
            continue
        target = folder / f"product-{key}.so"
        if not target.exists():
            part = target.with_name(f".{target.name}.{os.getpid()}")
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(part), "-lm"], capture_output=True, text=True, check=True
            )
            os.replace(part, target)
        return target
    raise OSError(f"no folder of our own to keep it in: tried {base / 'phi35'} and {tempfile.gettempdir()}")


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.phi35_product.argtypes = [pointer] * 7 + [size] * 4 + [number] * 5
    library.phi35_restore.argtypes = [pointer] * 5 + [size] * 4 + [number] * 5
    library.phi35_bfloat16_product.argtypes = [pointer] * 4 + [size] * 3 + [number]
    library.phi35_product.restype = library.phi35_restore.restype = library.phi35_bfloat16_product.restype = number
    library.phi35_step.argtypes, library.phi35_step.restype = [pointer, ctypes.c_float, ctypes.c_float], number
    library.phi35_variant.argtypes, library.phi35_variant.restype = [], number
    return library
