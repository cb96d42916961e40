"""Which device and dtype a model is put on, and the checks of what the caller asked for."""

import torch

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


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
    """The dtype asked for, or by default bfloat16 on CUDA devices that compute in it and float32 elsewhere.

    Raises:
        ValueError: for anything but float32, bfloat16, float16 or float64.
    """
    if dtype is None:
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float32
    picked = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if picked is None or picked not in DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}: expected one of {sorted(DTYPES)} or the torch dtype")
    return picked
