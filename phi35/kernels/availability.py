"""Whether the decoding kernels can run; importing this needs no Triton."""

import functools
import importlib.util

import torch


def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    if device.type != "cuda":
        return f"the kernels run on CUDA, the model is on {device.type}"
    if not _triton_installed():
        return "Triton is not installed (torch's CUDA builds bring it)"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0 or newer, this device has {major}.{minor}"
    return None


def has_programmatic_launch(device: torch.device) -> bool:
    """Whether a kernel can be launched while its predecessor still runs (compute capability 9.0 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
