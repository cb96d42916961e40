"""What is stored in few bits, and how: the part of a model's config that says so.

The tensors and the ``quantization_config`` entry of ``config.json`` are those of the compressed-tensors format
(https://github.com/vllm-project/compressed-tensors), "pack-quantized" for integers and "float-quantized" for fp8,
which vLLM and transformers read. Eight-bit scales (after QLoRA's double quantization, arXiv 2305.14314), which that
format lacks, are stored under a ``quant_method`` of our own.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

GROUP_SIZES = (32, 64, 128)
KINDS = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}
METHODS = ("rtn", "gptq")
SCALE_DTYPES = ("bfloat16", "float16")
OWN_METHOD = "phi35"
COMMON_METHOD = "compressed-tensors"


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How one kind of weight is stored.

    Attributes:
        bits: 4 or 8.
        type: "int", or "float" (e4m3, 8 bits).
        group_size: neighbours along a row that share a scale: 32, 64 or 128; None for one scale a row.
        symmetric: codes lie around zero; else each group has a zero point, too (integers alone).
        scale_bits: 16, or 8: scales are then unsigned bytes times a float32 for each row.
    """

    bits: int = 4
    type: str = "int"
    group_size: int | None = 128
    symmetric: bool = True
    scale_bits: int = 16

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("weight format: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        if (self.type, self.bits) not in KINDS:
            yield f"type {self.type!r} with {self.bits!r} bits is unknown: int takes 4 or 8, float (e4m3) takes 8"
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            yield f"group_size must be one of {GROUP_SIZES}, or None for one scale a row, got {self.group_size!r}"
        if self.type == "float" and not self.symmetric:
            yield "fp8 has no zero points: leave symmetric=True"
        if self.scale_bits not in (8, 16):
            yield f"scale_bits must be 8 or 16, got {self.scale_bits!r}"
        elif self.scale_bits == 8 and (self.group_size is None or self.type == "float"):
            yield "scale_bits=8 is for integer weights in groups: take scale_bits=16"

    @property
    def kind(self) -> str:
        """ "int4", "int8" or "fp8"."""
        return KINDS[self.type, self.bits]

    @property
    def label(self) -> str:
        """A short name for tables, such as "int4 g128"."""
        group = "row" if self.group_size is None else f"g{self.group_size}"
        marks = ("zero points" * (not self.symmetric), "byte scales" * (self.scale_bits == 8))
        return " ".join((self.kind, group, *filter(None, marks)))

    @property
    def per_word(self) -> int:
        """Codes per int32."""
        return 32 // self.bits

    @property
    def middle(self) -> int:
        """The stored code of zero in a symmetric integer format."""
        return 1 << (self.bits - 1)

    def num_groups(self, columns: int) -> int:
        """Scales per row."""
        return 1 if self.group_size is None else columns // self.group_size

    def problems_with(self, name: str, rows: int, columns: int) -> Iterator[str]:
        """Why a weight (rows, columns) cannot be stored so, one message each."""
        if self.group_size is not None and columns % self.group_size:
            yield f"{name} has rows of {columns}, no multiple of group_size {self.group_size}"
        if self.type == "int" and columns % self.per_word:
            yield f"{name} has rows of {columns}, no multiple of the {self.per_word} codes of an int32"
        if not self.symmetric and rows % self.per_word:
            yield f"{name} has {rows} rows, no multiple of the {self.per_word} zero points of an int32"


_PREFIXES = {"model.embed_tokens": "embedding", "lm_head": "head", "model.vision_embed_tokens": "tower"}


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Which weights of a model are quantized; router, norms, biases, separators and position tables never are.

    Attributes:
        linear: attention, dense feed-forwards and experts.
        embedding: the token embedding; None keeps it.
        head: the output head; None keeps it.
        tower: the blocks of the image tower and its projector; None keeps them.
        method: "rtn" (round to nearest) or "gptq": how the codes were found.
        scale_dtype: of 16-bit scales.
    """

    linear: WeightFormat | None = WeightFormat()
    embedding: WeightFormat | None = None
    head: WeightFormat | None = None
    tower: WeightFormat | None = None
    method: str = "rtn"
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"quantization method must be one of {METHODS}, got {self.method!r}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be one of {SCALE_DTYPES}, got {self.scale_dtype!r}")
        if not self.formats:
            raise ValueError("nothing is to be quantized: give a format for linear, embedding, head or tower")

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """The quantized kinds of weight and their formats."""
        found = {name: getattr(self, name) for name in ("linear", "embedding", "head", "tower")}
        return {name: given for name, given in found.items() if given is not None}

    def format_of(self, name: str) -> WeightFormat | None:
        """The format of the weights of a module or tensor by its memory name, if it is quantized at all."""
        for prefix, kind in _PREFIXES.items():
            if name == prefix or name.startswith(prefix + "."):
                return getattr(self, kind)
        return self.linear

    @property
    def label(self) -> str:
        """A short name for tables, such as "int4 g128"."""
        return next(iter(self.formats.values())).label


_TARGETS = {
    "linear": ["Linear"],
    "embedding": [r"re:^model\.embed_tokens$"],
    "head": [r"re:^lm_head$"],
    "tower": [r"re:^model\.vision_embed_tokens\.(img_processor\..*\.layers\.\d+\.|img_projection\.)"],
}
"""Published module names of each kind, as patterns of compressed-tensors; patterns of names go before classes."""

_ROUTER = r"re:.*block_sparse_moe\.gate$"
_TOWER = r"re:^model\.vision_embed_tokens\."


def to_entry(quantization: QuantizationConfig) -> dict[str, Any]:
    """The ``quantization_config`` entry of ``config.json``."""
    formats = quantization.formats
    groups = {name: _to_group(name, one) for name, one in formats.items()}
    kinds = {group["format"] for group in groups.values()}
    ignore = [_ROUTER]
    if quantization.head is None:
        ignore.append("lm_head")
    if quantization.tower is None:
        ignore.append(_TOWER)
    own = any(one.scale_bits != 16 for one in formats.values())
    return {
        "quant_method": OWN_METHOD if own else COMMON_METHOD,
        "quantization_status": "compressed",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": ignore,
        "phi35": {
            "method": quantization.method,
            "scale_dtype": quantization.scale_dtype,
            "formats": {name: dataclasses.asdict(one) for name, one in formats.items()},
        },
    }


def from_entry(entry: Any) -> QuantizationConfig:
    """What a ``quantization_config`` entry says.

    Raises:
        ValueError: for an entry that this program did not write, or one that is damaged.
    """
    own = entry.get("phi35") if isinstance(entry, Mapping) else None
    if not isinstance(own, Mapping) or not isinstance(own.get("formats"), Mapping):
        method = entry.get("quant_method") if isinstance(entry, Mapping) else entry
        raise ValueError(
            f"config.json has a quantization_config of method {method!r} that phi35 did not write: only checkpoints of "
            "`phi35 quantize` are read; quantize the original with it"
        )
    try:
        formats = {name: WeightFormat(**values) for name, values in own["formats"].items()}
        return QuantizationConfig(**({"linear": None} | formats), method=own["method"], scale_dtype=own["scale_dtype"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"quantization_config in config.json is damaged: {error}") from error


def _to_group(name: str, one: WeightFormat) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": one.bits, "type": one.type, "symmetric": one.symmetric, "dynamic": False}
    weights |= {"strategy": "channel" if one.group_size is None else "group", "group_size": one.group_size}
    return {
        "targets": _TARGETS[name],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized" if one.type == "int" else "float-quantized",
    }
