"""Floating-point operations of training, counted from the model's shapes, and the share of the device's peak (MFU).

A product with a matrix of P parameters costs 2 P operations for a token in the forward pass and 4 P in the backward
pass. So a step costs 6 x active parameters x tokens, where active are the matrices that a token passes through: of
the experts the chosen ones, of the embeddings the output head alone (a look-up costs nothing). Attention adds
12 x layers x heads x head width for every pair of a query and a key that it may see, so that a causal sequence of T
tokens counts T (T + 1) / 2 pairs, not T^2. The image tower counts likewise for its crops, with full attention, and
the projector for its image tokens. A part that is frozen costs 2 or 4 in place of 6: no gradient of its weights, and
none of its input where nothing before it is trained. Padding counts nothing, and what is recomputed for the backward
pass is never counted: it is work that the model does not need.
"""

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from phi35.block_sparse import block_pattern
from phi35.config import ModelConfig
from phi35.meta_model import meta_model
from phi35.registry import resolve
from phi35.training.parameter_groups import TOWER_PREFIX, part_of

PEAK_FLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bfloat16": 2250e12, "float32": 75e12}),
    ("H200", {"bfloat16": 989.4e12, "float32": 66.9e12}),
    ("GH200", {"bfloat16": 989.4e12, "float32": 66.9e12}),
    ("H100 NVL", {"bfloat16": 835.5e12, "float32": 60e12}),
    ("H100 PCIe", {"bfloat16": 756e12, "float32": 51.2e12}),
    ("H100", {"bfloat16": 989.4e12, "float32": 66.9e12}),
    ("A100", {"bfloat16": 311.8e12, "float32": 19.5e12}),
    ("L40S", {"bfloat16": 362e12, "float32": 91.6e12}),
)
"""Dense peaks per second from the makers' data sheets, by a part of the device's name; the first that fits holds.
float32 is that of products in full precision, without TF32, as torch computes them by default."""


@dataclass(frozen=True)
class Work:
    """What the operations of a batch depend on; batches add up.

    Attributes:
        tokens: positions that are no padding.
        attention_pairs: pairs of a real query and a key that it sees.
        crops: pictures' crops that run through the tower.
        image_tokens: positions that the projector fills.
    """

    tokens: int = 0
    attention_pairs: int = 0
    crops: int = 0
    image_tokens: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens,
            self.attention_pairs + other.attention_pairs,
            self.crops + other.crops,
            self.image_tokens + other.image_tokens,
        )


class TrainingFlops:
    """Operations of forward and backward pass.

    Args:
        config: of the model.
        freeze: parts that are not trained (``phi35.training.config_checks.PARTS``).
        adapters: of a run that trains adapters alone, their parameters that one token passes through, by part.

    Attributes:
        per_token: without attention's pairs.
        per_pair: of attention, all layers.
        per_crop: of the image tower.
        per_image_token: of the projector.
    """

    def __init__(
        self, config: ModelConfig, freeze: Collection[str] = (), adapters: Mapping[str, int] | None = None
    ) -> None:
        self.config = config
        sizes, added = matmul_parameters(config), dict(adapters or {})
        trained = {part: part not in freeze and not added for part in sizes}
        passes = _passes(trained, added)
        self.per_token = float(sum(2 * passes[part] * sizes[part] for part in _IN_DECODER if part in sizes))
        self.per_token += sum(6.0 * added.get(part, 0) for part in _IN_DECODER)
        heads = config.num_attention_heads * config.attention_head_dim
        deep = passes["attention"]
        self.per_pair = 4.0 * deep * config.num_hidden_layers * heads
        self.per_crop = self.per_image_token = 0.0
        if config.vision is not None:
            vision, side = config.vision, config.vision.image_size // config.vision.patch_size
            patches, blocks = side * side, vision.num_hidden_layers - 1
            sequence = patches + 1  # the class token
            self.per_crop = (
                2.0 * passes["patches"] * sizes["patches"] * patches
                + (2.0 * passes["tower"] * sizes["tower"] + 6.0 * added.get("tower", 0)) * sequence
                + 4.0 * passes["tower"] * blocks * vision.hidden_size * sequence * sequence
            )
            self.per_image_token = 2.0 * passes["projector"] * sizes["projector"] + 6.0 * added.get("projector", 0)

    def __call__(self, work: Work) -> float:
        """Operations of one batch."""
        text = self.per_token * work.tokens + self.per_pair * work.attention_pairs
        return text + self.per_crop * work.crops + self.per_image_token * work.image_tokens


def matmul_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of the matrices that one token, crop position or image token passes through, by part.

    The output head stands under "embeddings", the tower's first convolution under "patches"; of the experts only
    the chosen ones count.
    """
    model = meta_model(config)
    unused = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name in unused or not name.endswith(("weight", "_proj")):
            continue
        if name == "model.embed_tokens.weight":
            if config.tie_word_embeddings:
                sizes["embeddings"] = parameter.numel()
            continue
        part = "patches" if name.startswith(f"{TOWER_PREFIX}patch_embed.") else part_of(name)
        count = parameter.numel()
        if part == "experts":
            count = count * config.num_experts_per_tok // config.num_local_experts
        sizes[part] = sizes.get(part, 0) + count
    return sizes


def batch_work(batch: Mapping[str, Any], config: ModelConfig) -> Work:
    """What a batch asks of the model, counted on the host before it leaves for the device.

    Args:
        batch: ``input_ids`` (B, T), and where given ``attention_mask`` (B, T), ``sequence_lengths`` (B, S) of packed
            rows and ``image_sizes`` (N, 2).
        config: of the model.
    """
    input_ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    sequence_lengths = batch.get("sequence_lengths")
    lengths: Iterable[int]
    if sequence_lengths is not None:
        lengths = sequence_lengths.flatten().tolist()
    elif mask is not None:
        lengths = mask.bool().sum(dim=1).tolist()
    else:
        lengths = [input_ids.shape[1]] * input_ids.shape[0]
    lengths = list(lengths)
    pairs = sum(attention_pairs(length, config) for length in lengths)
    crops, image_tokens = 0, 0
    sizes = batch.get("image_sizes")
    if sizes is not None and config.vision is not None:
        num_image_tokens = resolve("vision.image_transform:num_image_tokens")
        side = config.vision.image_size
        for height, width in sizes.tolist():
            crops += 1 + (height // side) * (width // side)
            image_tokens += num_image_tokens(height, width, config.vision)
    return Work(sum(lengths), pairs, crops, image_tokens)


@functools.lru_cache(maxsize=4096)
def attention_pairs(length: int, config: ModelConfig) -> int:
    """Pairs of a query and a key that a head sees in a sequence, on average over heads and layers."""
    dense, pattern = visible_pairs(length, config.sliding_window), block_pattern(config)
    if pattern is None:
        return dense
    layers = config.num_hidden_layers
    some = sum(config.is_block_sparse_layer(layer) for layer in range(layers))
    seen = pattern.num_pairs(length, config.num_attention_heads) / config.num_attention_heads
    return round((seen * some + dense * (layers - some)) / layers)


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that causal attention sees in a sequence, at most ``window`` keys a query."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The dense peak of a device per second; None where the table does not know it.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        dtype: "bfloat16" or "float32".
    """
    for name, peaks in PEAK_FLOPS:
        if name.lower() in device_name.lower():
            return peaks.get(dtype)
    return None


_IN_DECODER = ("decoder", "router", "experts", "embeddings")


def _passes(trained: dict[str, bool], adapted: Collection[str] = ()) -> dict[str, int]:
    """Products per matrix and token: 1 forward, 1 for the gradient of the input, 1 for that of the weights.

    A matrix with an adapter needs the gradient of its input from the second on: counted for all, as a tower has many.
    """
    before = trained.get("tower", False)
    passes = {"patches": 1 + before}  # pixels need no gradient
    before = before or "tower" in adapted
    passes["tower"] = 1 + before + trained.get("tower", False)
    before = before or trained.get("projector", False) or "projector" in adapted
    passes["projector"] = 1 + before + trained.get("projector", False)
    layers = [part for part in ("decoder", "router", "experts") if trained.get(part, False) or part in adapted]
    # The head's part holds the token embeddings too, which stand before the decoder.
    before = before or trained.get("embeddings", False) or bool(layers)
    for part in _IN_DECODER:
        passes[part] = 1 + before + trained.get(part, False)
    passes["attention"] = 1 + 2 * before
    return passes
