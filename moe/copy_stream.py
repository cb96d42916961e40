"""Copies from host memory to a CUDA device beside its computation; on other devices they are made in their place."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class CopyStream:
    """A stream for copies, and the events by which it and the computing stream wait for each other.

    Attributes:
        device: where copies go; the stream is made with the first.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._stream: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "CopyStream":
        copied = CopyStream()
        copied.device = self.device
        return copied

    @contextmanager
    def copying(self, last_use: Any) -> Iterator[None]:
        """Copies made inside run beside the computation, behind ``last_use`` of the places they write to.

        Without one they run behind all that the current stream has been given: the places' memory may have served
        something else.
        """
        if self.device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_event(self.mark() if last_use is None else last_use)
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Any:
        """An event behind what the current stream (while copying, this one) has been given; None without CUDA."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait_for(self, events: Iterable[Any]) -> None:
        """Let the current stream wait for these events, those that are None left out."""
        for event in events:
            if event is not None and not event.query():
                torch.cuda.current_stream(self.device).wait_event(event)


def pin(tensor: torch.Tensor) -> Callable[[], None]:
    """Lock the memory of a host tensor in place, so that a device copies it without a detour; returns the release.

    Unlike torch's own pinned tensors it takes no more than the tensor's size, which torch rounds to a power of two.

    Raises:
        RuntimeError: if the system refuses; the message names the size.
    """
    runtime, address, size = torch.cuda.cudart(), tensor.data_ptr(), tensor.nbytes
    code = int(runtime.cudaHostRegister(address, size, 0))
    if code != 0:
        raise RuntimeError(f"CUDA error {code}: cannot lock {size:,} bytes of host memory (see ulimit -l)")

    def release() -> None:
        runtime.cudaHostUnregister(address)

    return release
