"""Large pages for weights in host memory: a step reads all of them, and the table of 4 kB pages does not fit.

Memory is asked for in pages of 2 MB before it is first written, as Linux has them for who asks (``madvise``). The
addresses of 4 kB pages cost a tenth of a read at the speed of memory.
"""

import ctypes
import logging
import os
import sys

import torch
from torch import nn

logger = logging.getLogger(__name__)

PAGE = 2**21
MIN_BYTES = 2 * PAGE
_MADV_HUGEPAGE = 14


def ask_for_large_pages(model: nn.Module) -> int:
    """Ask for large pages under the model's large tensors on the CPU, best before they are written.

    Returns:
        Bytes that were asked for; 0 where the system is not Linux or has none to give.
    """
    if not sys.platform.startswith("linux"):
        return 0
    asked = 0
    for tensor in model.state_dict().values():
        if tensor.device.type == "cpu" and tensor.nbytes >= MIN_BYTES:
            asked += ask(tensor)
    return asked


def ask(tensor: torch.Tensor) -> int:
    """The same for one tensor: whole pages within its memory."""
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // PAGE) * PAGE
    length = (storage.data_ptr() + storage.nbytes()) // PAGE * PAGE - start
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if length <= 0 or advise(start, length, _MADV_HUGEPAGE):
        logger.debug("no large pages for %d bytes: %s", length, os.strerror(ctypes.get_errno()))
        return 0
    return length
