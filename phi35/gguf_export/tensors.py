"""The tensors of a GGUF file in order, and how each is made from a checkpoint's.

llama.cpp's norms take no mean from the residual stream, those of Phi-3.5-MoE do. A stream that has none to take makes
both equal: of every weight that writes to it (embedding, attention's output, experts' down) the mean over the stream's
columns is taken away, which changes nothing for the model itself, as each of its norms would have done that.

SparseMixer gives both chosen experts the weight 1 unless scores nearly tie. llama.cpp divides by the weights' sum, and
scores that are all but equal make that 1/2 each: the router is scaled down, which keeps the choice, and the experts'
down weights are doubled.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from phi35.checkpoint.rules import Placement
from phi35.checkpoint.streaming import StoredWeights
from phi35.config import ModelConfig
from phi35.gguf_export.blocks import code_type, encode, encode_codes, fits, plain_type, stored_bytes
from phi35.gguf_export.limits import mixes_by_sparsemixer
from phi35.quantization.codes import QuantizedTensor, code_suffix, dequantize
from phi35.quantization.config import WeightFormat

ROUTER_SHARE = 2.0**-10
"""Of the router's weights that is kept under equal routing: a difference of scores of 2 moves a weight of 1 by 0.001,
and scores that differ by less than 1e-4 of their size may be taken for one another."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: in the file.
        shape: as torch has it; the file lists dimensions the other way round.
        kind: its GGUF type.
        make: gives its bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray[Any, Any]]

    @property
    def num_bytes(self) -> int:
        """In the file, without padding."""
        return int(np.prod(stored_bytes(self.kind, self.shape)))


class Tensors:
    """Makes the entries of a model.

    Args:
        config: the model.
        weights: its checkpoint.
        kind: type of matrices; None keeps what is stored.
        routing: "equal" or "softmax", where the experts' weights are SparseMixer's.
    """

    def __init__(self, config: ModelConfig, weights: StoredWeights, kind: str | None, routing: str) -> None:
        self._config, self._weights, self._kind = config, weights, kind
        self._centred = config.norm_type == "layernorm"
        self._equal = mixes_by_sparsemixer(config) and routing == "equal"

    def entries(self) -> Iterator[Entry]:
        """All tensors; nothing is read yet."""
        config, sparse = self._config, self._config.is_sparse
        yield self._matrix("token_embd.weight", "model.embed_tokens.weight", few_bits=False, centre=-1)
        yield from self._rotary_factors()
        for layer in range(config.num_hidden_layers):
            yield from self._layer(f"model.layers.{layer}", f"blk.{layer}")
        yield from self._norm("output_norm", "model.norm")
        if not config.tie_word_embeddings:
            yield self._matrix("output.weight", "lm_head.weight", few_bits=False)
        elif sparse:
            yield self._matrix("output.weight", "model.embed_tokens.weight", few_bits=False)
        if sparse:
            yield self._vector("output.bias", "lm_head.bias", config.vocab_size)

    def _rotary_factors(self) -> Iterator[Entry]:
        scaling = self._config.rope_scaling
        if scaling is None:
            return
        for name, factors in (("long", scaling.long_factor), ("short", scaling.short_factor)):
            values = np.asarray(factors, np.float32)
            yield Entry(f"rope_factors_{name}.weight", values.shape, "f32", functools.partial(values.view, np.uint8))

    def _layer(self, source: str, target: str) -> Iterator[Entry]:
        yield from self._norm(f"{target}.attn_norm", f"{source}.input_layernorm")
        yield from self._attention(f"{source}.self_attn", target)
        yield from self._norm(f"{target}.ffn_norm", f"{source}.post_attention_layernorm")
        if self._config.is_sparse:
            yield from self._experts(f"{source}.mlp", target)
        else:
            yield self._matrix(f"{target}.ffn_up.weight", f"{source}.mlp.gate_up_proj.weight")
            yield self._matrix(f"{target}.ffn_down.weight", f"{source}.mlp.down_proj.weight")

    def _attention(self, source: str, target: str) -> Iterator[Entry]:
        config = self._config
        qkv = f"{source}.qkv_proj"
        if not config.is_sparse:
            yield self._matrix(f"{target}.attn_qkv.weight", f"{qkv}.weight")
        else:
            # llama.cpp gives biases to the three parts alone.
            head = config.attention_head_dim
            sizes = [config.num_attention_heads * head] + [config.num_key_value_heads * head] * 2
            start = 0
            for part, size in zip("qkv", sizes, strict=True):
                yield self._matrix(f"{target}.attn_{part}.weight", f"{qkv}.weight", rows=(start, size))
                yield self._vector(f"{target}.attn_{part}.bias", f"{qkv}.bias", size, start)
                start += size
        yield self._matrix(f"{target}.attn_output.weight", f"{source}.o_proj.weight", centre=-2)
        if config.is_sparse:
            yield self._vector(f"{target}.attn_output.bias", f"{source}.o_proj.bias", config.hidden_size, centre=True)

    def _experts(self, source: str, target: str) -> Iterator[Entry]:
        config = self._config
        width = config.intermediate_size
        share = ROUTER_SHARE if self._equal else 1.0
        router = f"{source}.router.weight"
        shape = self._weights.plan.shapes[router]

        def scores() -> np.ndarray[Any, Any]:
            return encode(self._weights.tensor(router).float() * share, "f32", router)

        yield Entry(f"{target}.ffn_gate_inp.weight", shape, "f32", scores)
        gate_up, down = f"{source}.experts.gate_up_proj", f"{source}.experts.down_proj"
        yield self._matrix(f"{target}.ffn_gate_exps.weight", gate_up, rows=(0, width))
        yield self._matrix(f"{target}.ffn_up_exps.weight", gate_up, rows=(width, width))
        factor = 2.0 if self._equal else 1.0
        yield self._matrix(f"{target}.ffn_down_exps.weight", down, centre=-2, factor=factor)

    def _norm(self, target: str, source: str) -> Iterator[Entry]:
        yield self._vector(f"{target}.weight", f"{source}.weight", self._config.hidden_size)
        if self._config.is_sparse:
            yield self._vector(f"{target}.bias", f"{source}.bias", self._config.hidden_size)

    def _vector(self, target: str, source: str, size: int, start: int = 0, centre: bool = False) -> Entry:
        """Entries start to start + size of a vector in float32; zeros where the model has none."""

        def make() -> np.ndarray[Any, Any]:
            if source not in self._weights.plan.shapes:
                return np.zeros(size, np.float32).view(np.uint8)
            values = self._weights.tensor(source).float()
            if centre and self._centred:
                values = values - values.mean()
            return encode(values[start : start + size], "f32", source)

        return Entry(target, (size,), "f32", make)

    def _matrix(
        self,
        target: str,
        source: str,
        rows: tuple[int, int] | None = None,
        centre: int | None = None,
        factor: float = 1.0,
        few_bits: bool = True,
    ) -> Entry:
        """A matrix, or a stack of them, or (start, count) of the rows; without the mean along ``centre``."""
        one = self._format(source)
        shape = self._shape(source, one)
        shape = shape if rows is None else (*shape[:-2], rows[1], shape[-1])
        centre = centre if self._centred else None
        kept = None if one is None or self._kind is not None else code_type(one)
        if kept is not None and centre is None:
            return Entry(target, shape, kept, lambda: self._codes(source, rows, factor))
        kind = self._type_of(source, one, few_bits, shape[-1])

        def make() -> np.ndarray[Any, Any]:
            parts = range(shape[0]) if len(shape) == 3 else (None,)
            return np.concatenate(
                [encode(self._values(source, part, rows, centre) * factor, kind, target) for part in parts]
            )

        return Entry(target, shape, kind, make)

    def _type_of(self, source: str, one: WeightFormat | None, few_bits: bool, columns: int) -> str:
        wanted = self._kind
        if wanted is None:
            wanted = "q8_0" if one is not None else plain_type(self._weights.dtypes[source])
        elif not few_bits and wanted.startswith(("q4", "q5")):
            wanted = "q8_0"
        return wanted if fits(wanted, columns) else "bf16"

    def _format(self, source: str) -> WeightFormat | None:
        quantization = self._config.quantization
        if quantization is None or source + "_scale" not in self._weights.plan.shapes:
            return None
        return quantization.format_of(source)

    def _shape(self, source: str, one: WeightFormat | None) -> tuple[int, ...]:
        if one is None:
            return self._weights.plan.shapes[source]
        *front, last = self._weights.plan.shapes[source + code_suffix(one)]
        return (*front, last * (one.per_word if one.type == "int" else 1))

    def _held(self, source: str, rows: tuple[int, int] | None) -> QuantizedTensor:
        one = self._format(source)
        assert one is not None
        names = [code_suffix(one), "_scale", "_zero_point", "_row_scale"]
        found = {
            name: self._weights.tensor(source + name) for name in names if source + name in self._weights.plan.shapes
        }
        if rows is not None:
            start, count = rows
            if not one.symmetric and (start % one.per_word or count % one.per_word):
                raise ValueError(f"{source}: rows {start} to {start + count} do not hold whole words of zero points")
            for name, tensor in found.items():
                step = one.per_word if name == "_zero_point" else 1
                found[name] = tensor.narrow(-2, start // step, count // step)
        return QuantizedTensor.of(one, found)

    def _codes(self, source: str, rows: tuple[int, int] | None, factor: float) -> np.ndarray[Any, Any]:
        held = self._held(source, rows)
        if factor != 1.0:
            tensors = held.tensors()
            name = "_row_scale" if held.row_scale is not None else "_scale"
            held = QuantizedTensor.of(held.format, tensors | {name: tensors[name] * factor})
        return encode_codes(held)

    def _values(self, source: str, part: int | None, rows: tuple[int, int] | None, centre: int | None) -> torch.Tensor:
        """float32, one matrix."""
        if self._format(source) is not None:
            held = self._held(source, rows)
            values = dequantize(held if part is None else held.part(part), torch.float32)
        else:
            window = None if rows is None else (0, *rows)
            values = self._weights.part(source, Placement("", source, index=part, window=window)).float()
        return values if centre is None else values - values.mean(dim=centre, keepdim=True)
