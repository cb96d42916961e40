"""The tower over few crops from CUDA graphs: below some 17 crops a GPU is faster than the host launches kernels.

On an H200 the 23 blocks of CLIP ViT-L take 11.7 ms for 5 crops when launched one kernel after the other, and 2.3 ms at
the rate of large products. A number of crops is captured when it comes the second time; the graph reads the weights
where they lie and gives the same bits as the modules that it was captured from.
"""

import threading
from typing import Any

import torch
from torch import nn

from phi35.module_walk import stored_tensors, walk

MOST_CROPS = 17
"""A picture of 16 tiles; with more crops the device is busy longer than the host launches."""
KNOWN = ("torch.nn.", "timm.", "vision.", "phi35.norm", "phi35.quantization.")
"""Where modules come from whose results depend on weights and inputs alone; adapters have switches."""


class TowerGraphs:
    """Graphs of one tower by number of crops; copies and pickles hold none.

    All graphs read and write the same two buffers and share the memory between them, some 250 MiB for phi-3.5-vision.

    Attributes:
        num_replays: runs that came from a graph.
    """

    def __init__(self) -> None:
        self.num_replays = 0
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pixels: torch.Tensor | None = None
        self._features: torch.Tensor | None = None
        self._seen: set[int] = set()
        self._weights: tuple[int, ...] = ()
        self._pool: Any = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TowerGraphs":
        return TowerGraphs()

    def __reduce__(self) -> tuple[type["TowerGraphs"], tuple[()]]:
        return TowerGraphs, ()

    def __len__(self) -> int:
        """Graphs held."""
        return len(self._graphs)

    @torch.no_grad()
    def __call__(self, tower: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """What ``tower(pixel_values)`` returns, from a graph where there is one or it is time for one.

        Args:
            tower: a ``vision.tower.ClipVisionTower``, always the same one.
            pixel_values: (C, 3, S, S) on the tower's device.
        """
        if problem(tower, pixel_values) is not None:
            return tower(pixel_values)
        with self._lock:
            weights = tuple(tensor.data_ptr() for tensor in stored_tensors(tower))
            if weights != self._weights:
                self.clear()
                self._weights = weights
            count = len(pixel_values)
            if count not in self._graphs:
                if count not in self._seen:
                    self._seen.add(count)
                    return tower(pixel_values)
                self._capture(tower, count)
            assert self._pixels is not None and self._features is not None
            self._pixels[:count].copy_(pixel_values)
            self._graphs[count].replay()
            self.num_replays += 1
            # Cloned: the next run writes over it.
            return self._features[:count].clone()

    def clear(self) -> None:
        """Forget all graphs, and which numbers of crops came."""
        self._graphs.clear()
        self._seen.clear()
        self._pool = self._pixels = self._features = None

    def _capture(self, tower: Any, count: int) -> None:
        """Capture one number of crops; its plain run before has chosen and compiled all kernels."""
        if self._pixels is None or self._features is None:
            weight, side = tower.patch_embed.proj.weight, tower.patch_embed.img_size
            self._pixels = weight.new_zeros(MOST_CROPS, 3, *side)
            self._features = weight.new_zeros(MOST_CROPS, tower.patch_embed.num_patches, tower.embed_dim)
        device = self._pixels.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            tower(self._pixels[:count])
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._features[:count].copy_(tower(self._pixels[:count]))
        self._pool = graph.pool()
        self._graphs[count] = graph


def problem(tower: nn.Module, pixel_values: torch.Tensor) -> str | None:
    """Why a run of the tower is not taken from a graph, or None.

    Args:
        tower: whole on one device.
        pixel_values: (C, 3, S, S).
    """
    if pixel_values.device.type != "cuda":
        return f"the crops lie on {pixel_values.device.type}"
    if not 0 < len(pixel_values) <= MOST_CROPS:
        return f"{len(pixel_values)} crops keep the device busy longer than the host launches"
    if torch.cuda.is_current_stream_capturing():
        return "a graph is being captured"
    return module_problem(tower)


def module_problem(tower: nn.Module) -> str | None:
    """Why no graph holds what a tower does, or None."""
    for module in walk(tower):
        if module.training:
            return "the tower is in training mode"
        if not f"{type(module).__module__}.".startswith(KNOWN):
            return f"{type(module).__name__} of {type(module).__module__} may hold switches"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{type(module).__name__} has hooks"
        if "forward" in vars(module):  # as accelerate hooks have it, which may bring the weights at every run
            return f"{type(module).__name__} has a forward of its own"
    return None
