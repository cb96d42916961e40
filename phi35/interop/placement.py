"""Device maps as transformers' users write them: which part of a model goes where.

Names and meanings are accelerate's (https://huggingface.co/docs/accelerate/concept_guides/big_model_inference): what is
mapped to a GPU computes there; beside one, "cpu" and "disk" are where weights wait until a layer's turn comes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from phi35.device import pick_device

SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
"""Maps that accelerate makes from the memory there is."""

NO_SPLIT = ("DecoderLayer", "VisionEmbedding")
"""Classes whose instances compute on one device: they add up, or read, tensors of several of their modules."""

Place = str | int


@dataclass(frozen=True)
class PlacementMap:
    """Where each part of a model lies and where it computes.

    Attributes:
        places: module or tensor name -> GPU number, "cpu" or "disk"; no name lies within another.
        main: where parts compute that wait on the host or on disk.
    """

    places: Mapping[str, Place]
    main: Place

    @property
    def is_spread(self) -> bool:
        """Whether hooks must move tensors."""
        return len(set(self.places.values())) > 1 or "disk" in self.places.values()

    def place(self, name: str) -> Place:
        """Where the tensor or module ``name`` lies.

        Raises:
            KeyError: for a module of which parts lie apart.
        """
        while name not in self.places:
            if not name:
                raise KeyError(name)
            name = name.rpartition(".")[0]
        return self.places[name]

    def waits(self, name: str) -> bool:
        """Whether its weights are brought to the device at every pass."""
        place = self.place(name)
        return place == "disk" or (place == "cpu" and self.main != "cpu")

    def computes_on(self, name: str) -> torch.device:
        """The device that ``name`` computes on."""
        return device_of(self.main if self.waits(name) else self.place(name))


def device_of(place: Place) -> torch.device:
    """The device of a place that is none of the disk."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def one_place(device_map: Any) -> Place | None:
    """The GPU number or device that a ``device_map`` of one device means; None for other maps.

    Raises:
        ValueError: for a device that is not there.
    """
    if isinstance(device_map, Mapping):
        if list(device_map) != [""] or device_map[""] == "disk":
            return None
        device_map = device_map[""]
    if isinstance(device_map, str) and device_map in (*SPREADING, "disk"):
        return None
    return _checked("cpu" if device_map is None else device_map)


def resolve_map(
    model: nn.Module, device_map: Any, max_memory: Any = None, offload_buffers: bool = False
) -> PlacementMap:
    """The map that a user's ``device_map`` stands for.

    Args:
        model: a wrapped model, best on the meta device, in the dtype that it will have.
        device_map: one of ``SPREADING``, "disk", or a dictionary of module names (with or without the wrapper's
            "causal_lm." before them) and devices.
        max_memory: bytes for each device, of ``SPREADING``; None takes what is free.
        offload_buffers: whether buffers wait with the weights, which leaves more room.

    Raises:
        ValueError: for names or devices that are not there, weights without a place, and parts that must stay together.
    """
    if isinstance(device_map, str) and device_map in SPREADING:
        device_map = _inferred(model, device_map, max_memory, offload_buffers)
    elif not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    places = dict(_flattened(model, _known(model, device_map)))
    gpus = [place for place in places.values() if place not in ("cpu", "disk")]
    embedding = _place_of_embedding(places)
    main = embedding if embedding in gpus else next(iter(gpus), "cpu")
    found = PlacementMap(places, main)
    check_together(model, found)
    return found


def _inferred(model: nn.Module, kind: str, max_memory: Any, offload_buffers: bool) -> dict[str, Any]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if kind != "sequential":
        max_memory = get_balanced_memory(
            model, max_memory, no_split_module_classes=list(NO_SPLIT), low_zero=kind == "balanced_low_0"
        )
    inferred: dict[str, Any] = infer_auto_device_map(
        model, max_memory, no_split_module_classes=list(NO_SPLIT), offload_buffers=offload_buffers
    )
    return inferred


def _known(model: nn.Module, device_map: Mapping[str, Any]) -> dict[str, Place]:
    """The map under the model's own names, with places checked."""
    names = {name for name, _ in model.named_modules()} | set(model.state_dict())
    given: dict[str, Place] = {}
    unknown = []
    for name, place in device_map.items():
        full = next((full for full in (name, f"causal_lm.{name}") if full in names), None)
        if full is None:
            unknown.append(name)
        else:
            given[full] = _checked(place)
    if unknown:
        expected = "names such as 'model.embed_tokens', 'model.layers.0', 'model.norm' and 'lm_head'"
        raise ValueError(f"device_map names modules that the model lacks: {sorted(unknown)[:8]}; it takes {expected}")
    return given


def _checked(place: Any) -> Place:
    if isinstance(place, str) and place in ("cpu", "disk"):
        return place
    device = pick_device(f"cuda:{place}" if isinstance(place, int) else place)
    if device.type == "meta":
        raise ValueError("device_map puts weights on 'meta', which holds none: give a GPU, 'cpu' or 'disk'")
    return (device.index or 0) if device.type == "cuda" else device.type


def _flattened(
    module: nn.Module, given: Mapping[str, Place], name: str = "", inherited: Place | None = None
) -> Iterator[tuple[str, Place]]:
    """The same map where no name lies within another."""
    place = given.get(name, inherited)
    inside = f"{name}." if name else ""
    if not any(other != name and other.startswith(inside) for other in given):
        if place is not None:
            yield name, place
        elif module.state_dict():
            raise ValueError(f"device_map gives no place to {name!r}: name it, or give '' a place for all the rest")
        return
    for child, part in module.named_children():
        yield from _flattened(part, given, inside + child, place)
    for leaf in [*module._parameters, *module._buffers]:
        own = given.get(inside + leaf, place)
        if own is None:
            raise ValueError(f"device_map gives no place to {inside + leaf!r}: name it, or the module it belongs to")
        yield inside + leaf, own


def _place_of_embedding(places: Mapping[str, Place]) -> Place:
    found = PlacementMap(places, "cpu")
    return found.place("causal_lm.model.embed_tokens.weight")


def check_together(model: nn.Module, found: PlacementMap) -> None:
    tensors = list(model.state_dict())
    for name, module in model.named_modules():
        if type(module).__name__ in NO_SPLIT:
            devices = {found.computes_on(tensor) for tensor in tensors if tensor.startswith(f"{name}.")}
            if len(devices) > 1:
                raise ValueError(
                    f"device_map lets parts of {name} compute on {sorted(map(str, devices))}: it must compute on one "
                    "device (beside a GPU its parts may wait on 'cpu' and 'disk')"
                )
    for head, embedding in getattr(model, "all_tied_weights_keys", {}).items():
        if found.place(head) != found.place(embedding):
            raise ValueError(
                f"{head} and {embedding} are one tensor and device_map gives them two places, "
                f"{found.place(head)!r} and {found.place(embedding)!r}: give both the same"
            )
