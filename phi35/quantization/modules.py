"""Layers whose weights are held in few bits; they take the places of the plain ones.

Codes and scales are buffers that keep their dtype whatever ``model.to(dtype)`` asks for; the dtype of activations is
that of the norms and biases. Gradients pass through to the inputs, so that adapters can be trained beside them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from phi35.checkpoint.rules import listed
from phi35.config import ModelConfig
from phi35.language_model_head import LanguageModelHead, loss_from_logits, losses_from_logits
from phi35.quantization.codes import QuantizedTensor, code_suffix, tensor_specs
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.linear import quantized_embedding, quantized_linear


class FewBitModule(nn.Module):
    """A module that holds quantized weights under the names base + suffix (see ``QuantizedTensor.tensors``)."""

    def __init__(self) -> None:
        super().__init__()
        self._formats: dict[str, WeightFormat] = {}

    def hold(self, base: str, one: WeightFormat, shape: tuple[int, ...], scale_dtype: torch.dtype) -> None:
        """Make the buffers, unset, of a weight (..., rows, columns)."""
        self._formats[base] = one
        for suffix, (size, dtype) in tensor_specs(one, shape, scale_dtype).items():
            self.register_buffer(base + suffix, torch.empty(size, dtype=dtype))

    def held(self, base: str = "weight") -> QuantizedTensor:
        """The quantized weight called ``base``."""
        one = self._formats[base]
        names = (code_suffix(one), "_scale", "_zero_point", "_row_scale")
        found = {suffix: self._buffers.get(base + suffix) for suffix in names}
        return QuantizedTensor.of(one, {suffix: tensor for suffix, tensor in found.items() if tensor is not None})

    def held_weights(self) -> Iterator[tuple[str, QuantizedTensor]]:
        """Every quantized weight of this module, with its name."""
        for base in self._formats:
            yield base, self.held(base)

    @torch.no_grad()
    def draw_codes(self, std: float, generator: torch.Generator | None = None) -> None:
        """Random codes, with scales that give the weights about the standard deviation ``std``."""
        for _, weight in self.held_weights():
            one = weight.format
            # Evenly spread codes deviate by the number of codes / sqrt(12); e4m3 values drawn here by about 1.
            spread = 1.0 if one.type == "float" else (1 << one.bits) / 12**0.5
            if one.type == "float":
                for row in weight.codes.flatten(0, -2).split(4096):
                    drawn = torch.empty(row.shape, device=row.device)
                    row.copy_(drawn.normal_(generator=generator))
            else:
                weight.codes.random_(-(2**31), 2**31 - 1, generator=generator)
            weight.scale.fill_(std / spread if one.scale_bits == 16 else 255)
            if weight.row_scale is not None:
                weight.row_scale.fill_(std / spread / 255)
            if weight.zero_point is not None:
                weight.zero_point.view(torch.uint8).fill_(136 if one.bits == 4 else 128)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FewBitModule":
        held = {id(tensor) for _, weight in self.held_weights() for tensor in weight.tensors().values()}

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if id(tensor) in held and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """Shapes and formats, for the printed model."""
        return ", ".join(f"{name}={weight.shape} {weight.format.kind}" for name, weight in self.held_weights())


class QuantizedLinear(FewBitModule):
    """``torch.nn.Linear`` with a weight (out_features, in_features) in few bits; the bias stays as it was."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, one: WeightFormat, scale_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.hold("weight", one, (out_features, in_features), scale_dtype)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, by the name under which PEFT looks for a quantized layer's device."""
        return self.held().codes

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return quantized_linear(hidden_states, self.held(), self.bias)


class QuantizedHead(QuantizedLinear):
    """The output head in few bits; with labels it gives the mean cross-entropy, as the plain head does."""

    def forward(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None = None, per_token: bool = False
    ) -> torch.Tensor:
        """Logits (..., V), or with labels (...) the float32 loss, or each label's (...) with ``per_token``."""
        logits = super().forward(hidden_states)
        if labels is not None and per_token:
            return losses_from_logits(logits, labels)
        return logits if labels is None else loss_from_logits(logits, labels)


class QuantizedEmbedding(FewBitModule):
    """Token embedding in few bits: the rows of a batch's tokens alone are restored."""

    like: torch.Tensor

    def __init__(self, num_embeddings: int, width: int, one: WeightFormat, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.hold("weight", one, (num_embeddings, width), scale_dtype)
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., D) of ids (...), in the model's dtype."""
        return quantized_embedding(input_ids, self.held(), self.like.dtype)


def quantize_structure(model: nn.Module, config: ModelConfig) -> None:
    """Put quantized modules, their values unset, in the places of the plain ones.

    A module may bring its own twin by a method ``quantized_twin(format, scale_dtype)``, as the experts do.

    Args:
        model: a ``phi35.model.CausalLM``, best on the meta device.
        config: of the model, with ``quantization``.

    Raises:
        ValueError: if a weight cannot be stored as asked; all such weights are named.
    """
    quantization = config.quantization
    assert quantization is not None
    scale_dtype = getattr(torch, quantization.scale_dtype)
    chosen = [
        (name, module, one)
        for name, module in model.named_modules()
        if (one := format_of(name, module, quantization)) is not None
    ]
    problems = [problem for name, module, one in chosen for problem in _problems(name, module, one)]
    if config.tie_word_embeddings and (quantization.embedding or quantization.head):
        problems.append("embedding and head are one tensor (tie_word_embeddings): leave both unquantized")
    if quantization.embedding and config.mup_embedding_multiplier != 1:
        problems.append("the embedding has a factor (mup_embedding_multiplier), which its quantized form lacks")
    if quantization.head and (config.mup_width_multiplier != 1 or config.dummy_token_indices):
        problems.append("the head divides or masks its logits (mup_width_multiplier, dummy_token_indices): leave it")
    if quantization.tower is not None and config.vision is None:
        problems.append("a tower format is given and the model reads text only")
    if problems:
        raise ValueError("the model cannot be quantized so: " + listed(problems))
    for name, module, one in chosen:
        twin = _twin(module, one, scale_dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, twin.train(module.training))
    for module in model.modules():
        if isinstance(module, LanguageModelHead):
            module.in_c = True


def format_of(name: str, module: nn.Module, quantization: QuantizationConfig) -> WeightFormat | None:
    """How the weights of a module are to be stored; None where they stay as they are."""
    fits = isinstance(module, nn.Linear | nn.Embedding) or hasattr(module, "quantized_twin")
    return quantization.format_of(name) if fits else None


def _problems(name: str, module: nn.Module, one: WeightFormat) -> Iterator[str]:
    for child, weight in module.named_parameters(recurse=False):
        if weight.dim() > 1:
            yield from one.problems_with(f"{name}.{child}", *weight.shape[-2:])


def _twin(module: nn.Module, one: WeightFormat, scale_dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        with module.weight.device:
            return QuantizedEmbedding(module.num_embeddings, module.embedding_dim, one, scale_dtype)
    if isinstance(module, nn.Linear):
        kind = QuantizedHead if isinstance(module, LanguageModelHead) else QuantizedLinear
        with module.weight.device:
            return kind(module.in_features, module.out_features, module.bias is not None, one, scale_dtype)
    return module.quantized_twin(one, scale_dtype)  # type: ignore[operator]
