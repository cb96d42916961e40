"""Which device and dtype a model is put on, and the checks of what the caller asked for."""

import warnings
from dataclasses import dataclass

import torch

HALVES = (torch.bfloat16, torch.float16)
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Spread:
    """Where a model computes whose parts lie on several devices, or wait in host memory or on disk for their turn.

    Attributes:
        inputs: of the embedding, where a pass begins; masks, positions and row lengths live there.
        layers: of each decoder layer, where its keys and values live.
        num_waiting: tensors that are on the meta device between passes.
    """

    inputs: torch.device
    layers: tuple[torch.device, ...]
    num_waiting: int = 0

    def check(self, model: torch.nn.Module) -> None:
        """Check that nothing but what waits is on the meta device.

        Raises:
            ValueError: if more is: PEFT 0.21 takes adapters to where a waiting weight seems to be, and they are lost.
        """
        waiting = num_meta(model)
        if waiting > self.num_waiting:
            raise ValueError(
                f"{waiting - self.num_waiting} tensors without values were added beside weights that wait on 'cpu' or "
                "'disk', as PEFT does: load the model on GPUs, or the CPU, alone to put adapters on it"
            )


def num_meta(model: torch.nn.Module) -> int:
    """Parameters and buffers on the meta device, each name counted."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return sum(tensor.is_meta for _, tensor in named)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or by default the first CUDA device, else Apple's (MPS), else the CPU.

    Raises:
        ValueError: for a name torch does not know or a device this machine lacks.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {device!r}: expected 'cpu', 'cuda', 'cuda:1', 'mps' or 'meta'") from error
    if picked.type not in ("cpu", "cuda", "mps", "meta"):
        raise ValueError(f"device {device!r} is not supported: expected 'cpu', 'cuda', 'cuda:1', 'mps' or 'meta'")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices: use device='cpu', or install a CUDA build of torch and its driver"
        )
    if picked.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {device!r} asked for, but torch {torch.__version__} finds no MPS device: use 'cpu'")
    return picked


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or by default float32 on the CPU and 16 bits elsewhere; what the device cannot do, another.

    Returns:
        bfloat16 where it was asked for, or is the default, and the device computes in it; else float16 in its place,
        and float32 where there is no float16 either, with a warning. float64 on MPS, which has none, is an error.

    Raises:
        ValueError: for anything but float32, bfloat16, float16 or float64, or a float64 that the device lacks.
    """
    if dtype is None:
        picked = torch.float32 if device.type in ("cpu", "meta") else torch.bfloat16
    else:
        found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        if found is None or found not in DTYPES.values():
            raise ValueError(f"unknown dtype {dtype!r}: expected one of {sorted(DTYPES)} or the torch dtype")
        picked = found
    if picked == torch.float64 and device.type == "mps":
        raise ValueError("MPS devices have no float64: use dtype='float32' or device='cpu'")
    if device.type in ("cpu", "meta") or picked not in (torch.bfloat16, torch.float16):
        return picked
    return computed_dtype(picked, device.type, tuple(kind for kind in HALVES if _computes_in(device, kind)))


def computed_dtype(wanted: torch.dtype, device_type: str, available: tuple[torch.dtype, ...]) -> torch.dtype:
    """The dtype wanted if the device computes in it, else the best that it does, with a warning.

    Args:
        wanted: a 16-bit dtype.
        device_type: for the message.
        available: 16-bit dtypes that the device computes in.
    """
    if wanted in available:
        return wanted
    picked = torch.float16 if torch.float16 in available and wanted == torch.bfloat16 else torch.float32
    names = [str(kind).removeprefix("torch.") for kind in (wanted, picked)]
    warnings.warn(f"this {device_type} device does not compute in {names[0]}: taking {names[1]} instead", stacklevel=3)
    return picked


def _computes_in(device: torch.device, kind: torch.dtype) -> bool:
    """Whether a device has a 16-bit dtype of its own, not by emulation."""
    if device.type == "cuda":
        return kind == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        values = torch.ones(2, 2, dtype=kind, device=device)
        return bool((values @ values == 2).all())
    except (RuntimeError, TypeError):
        return False
