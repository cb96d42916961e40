"""Sparse upcycling: a dense checkpoint becomes a sparse one (arXiv 2212.05055).

Every expert starts as a copy of the layer's dense feed-forward; attention, norms, embeddings and the image path are
kept as they are; routers are new. Options follow the literature: Gaussian noise on the copies (arXiv 2212.05055,
appendix), a part of every expert's inner units drawn anew (Drop-Upcycling, arXiv 2502.19261), sparse layers among
dense ones, a shared expert (arXiv 2401.06066) and a scale on the experts' output (arXiv 2410.07524).

With equal experts the result computes what the dense model does exactly where a token's weights sum to one, as those
of the "topk" router with ``norm_topk_prob`` do, whatever the router's weights. SparseMixer's two weights are not
normalised: each is a softmax over near ties, so that they sum to nearly 2 where scores differ and to
1/E + 1/(E-1) where all are equal. No constant factor undoes that; the default scale of 1/2 brings the sum near one.

The source is read and the target written tensor by tensor: host memory holds a few tensors of one layer, never a
model.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from phi35.checkpoint.rules import CheckpointPlan, Placement
from phi35.checkpoint.streaming import StoredWeights, check_space, check_target, copy_companions
from phi35.checkpoint.writer import DeferredTensor, parse_size, write_json, write_weights
from phi35.config import ModelConfig
from phi35.config_io import published_model_type, to_generation_dict, to_hf_dict
from phi35.loading import COMPANION_FILES, find_folder, load_config

ROUTER_INITS = ("normal", "zeros")
SPARSEMIXER_SCALE = 0.5
"""Default output scale under SparseMixer, whose two weights sum to nearly 2 (measured 1.95 on random scores)."""

_ROUTER = ".mlp.router.weight"
_EXPERTS = ".mlp.experts."
_SHARED = ".mlp.shared_expert."


@dataclass(frozen=True, kw_only=True)
class UpcyclingOptions:
    """What kind of sparse model to make.

    Attributes:
        num_experts: E, copies per sparse layer.
        top_k: k, experts per token (2 under SparseMixer).
        router_type: as in the config, "topk" or a form of SparseMixer.
        norm_topk_prob: normalise the "topk" router's weights, which keeps the dense model's function.
        router_init: "normal" or "zeros". Under zeros every token chooses the same experts until noise or a balance
            loss parts the scores.
        router_std: standard deviation of the "normal" routers.
        noise: standard deviation of Gaussian noise on every copy, relative to the tensor's own; 0 for none.
        reinit: share of every expert's inner units that is drawn anew from a normal distribution with the dense
            tensor's mean and deviation, other units in each expert; 0 for none.
        scale: factor on the experts' output, put into their down projections; None takes what keeps a token's
            weights near one: 1 where they are normalised, E / k for "topk" without normalisation, 1/2 for
            SparseMixer. E / k is exact under "zeros" alone.
        every: layer i (from 0) becomes sparse where i + 1 is a multiple of it.
        shared_expert: keep the dense feed-forward as a shared expert; it and the routed experts then count half.
        seed: of routers, noise and new units.
    """

    num_experts: int = 16
    top_k: int = 2
    router_type: str = "topk"
    norm_topk_prob: bool = True
    router_init: str = "normal"
    router_std: float = 0.02
    noise: float = 0.0
    reinit: float = 0.0
    scale: float | None = None
    every: int = 1
    shared_expert: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.num_experts < 2:
            problems.append(f"num_experts must be at least 2, got {self.num_experts}")
        if self.router_init not in ROUTER_INITS:
            problems.append(f"router_init must be one of {ROUTER_INITS}, got {self.router_init!r}")
        for name in ("router_std", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if not 0 <= self.reinit <= 1:
            problems.append(f"reinit is a share between 0 and 1, got {self.reinit}")
        if self.scale is not None and not 0 < self.scale < math.inf:
            problems.append(f"scale must be positive, got {self.scale}")
        if self.router_type != "topk" and self.router_init == "zeros" and self.scale is None:
            problems.append(
                "SparseMixer's weights sum to 1/E + 1/(E-1) under equal scores and to nearly 2 once scores differ: "
                "take router_init 'normal', or give the scale"
            )
        if problems:
            raise ValueError("upcycling: " + "; ".join(problems))

    @property
    def output_scale(self) -> float:
        """The factor on the routed experts' output, without the half of a shared expert."""
        if self.scale is not None:
            return self.scale
        if self.router_type != "topk":
            return SPARSEMIXER_SCALE
        return 1.0 if self.norm_topk_prob else self.num_experts / self.top_k


def upcycle(
    source: str | Path, target: str | Path, options: UpcyclingOptions, max_shard_size: int | str = "5GB"
) -> ModelConfig:
    """Write the sparse form of a dense checkpoint; tokenizer and image settings are copied.

    Args:
        source: folder or hub id of a dense checkpoint, with or without the image path.
        target: folder to write; an earlier checkpoint's weights in it are replaced.
        options: what to make.
        max_shard_size: bytes per weight file, e.g. "5GB".

    Returns:
        The config of the sparse model.

    Raises:
        ValueError: before anything is written, if the source is sparse or damaged, the options do not fit it, the
            target is the source or a file, or the disk lacks the space.
    """
    shard_bytes = parse_size(max_shard_size)
    folder, target = find_folder(source), Path(target).expanduser()
    check_target(folder, target)
    dense = load_config(folder)
    sparse = upcycled_config(dense, options)
    weights = StoredWeights(folder, dense)
    tensors = _SparseWeights(sparse, options, weights.tensor).deferred(weights.dtypes)
    check_space(target, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    write_weights(target, tensors, shard_bytes)
    write_json(target / "config.json", to_hf_dict(sparse, weights.main_dtype))
    write_json(target / "generation_config.json", to_generation_dict(sparse))
    copy_companions(folder, target, COMPANION_FILES)
    return sparse


def upcycled_config(dense: ModelConfig, options: UpcyclingOptions) -> ModelConfig:
    """The sparse model's config.

    Raises:
        ValueError: if the model is sparse already, or the options do not fit it.
    """
    if dense.is_sparse:
        raise ValueError(
            f"upcycling starts from a dense model; this one has {dense.num_local_experts} experts in layers "
            f"{list(dense.sparse_layers)[:5]}…"
        )
    sparse = dense.replace(
        num_local_experts=options.num_experts,
        num_experts_per_tok=options.top_k,
        router_type=options.router_type,
        norm_topk_prob=options.norm_topk_prob,
        decoder_sparse_step=options.every,
        shared_expert_intermediate_size=dense.intermediate_size if options.shared_expert else 0,
    )
    scaling = sparse.rope_scaling
    if scaling is not None and published_model_type(sparse) == "phimoe":
        # phimoe's config.json always gives the two multipliers; phi3's leaves them to the formula.
        short, long = sparse.rope_attention_scaling
        scaling = dataclasses.replace(scaling, short_mscale=short, long_mscale=long)
    return sparse.replace(model_type=published_model_type(sparse), rope_scaling=scaling)


class _SparseWeights:
    """The target's tensors, each made from the dense ones when asked for."""

    def __init__(self, config: ModelConfig, options: UpcyclingOptions, dense: Callable[[str], torch.Tensor]) -> None:
        self.plan = CheckpointPlan(config)
        self.options = options
        self._dense = dense
        self._kept: dict[str, tuple[str, torch.Tensor]] = {}

    def deferred(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, DeferredTensor]:
        """Disk name -> tensor to be made, in the model's order.

        Args:
            dtypes: memory name -> dtype of the dense tensors.
        """
        result = {}
        for placement in self.plan.written():
            dtype = dtypes[self._source_name(placement.memory_name)]
            result[placement.disk_name] = DeferredTensor(
                self.plan.disk_shape(placement), dtype, functools.partial(self.tensor, placement)
            )
        return result

    def tensor(self, placement: Placement) -> torch.Tensor:
        """What the target's disk tensor holds."""
        name = placement.memory_name
        if name.endswith(_ROUTER):
            return self._router(name)
        if _EXPERTS not in name:
            return placement.take(self._dense_part(name))
        assert placement.index is not None, "every expert has its own tensors on disk"
        expert = self._cached("expert", f"{name} {placement.index}", lambda: self._expert(name, placement.index or 0))
        return dataclasses.replace(placement, index=None).take(expert)

    def _source_name(self, name: str) -> str:
        """The dense tensor that a sparse model's tensor comes from; a router takes the down projection's dtype."""
        layer, router, _ = name.partition(_ROUTER)
        if router:
            return f"{layer}.mlp.down_proj.weight"
        if _EXPERTS in name:
            return name.replace(_EXPERTS, ".mlp.") + ".weight"
        return name.replace(_SHARED, ".mlp.")

    def _dense_part(self, name: str) -> torch.Tensor:
        source = self._source_name(name)
        tensor = self._cached("dense", source, lambda: self._dense(source))
        return tensor * 0.5 if _SHARED in name and "down_proj" in name else tensor

    def _router(self, name: str) -> torch.Tensor:
        dtype = self._dense_part(self._source_name(name)).dtype
        weight = torch.zeros(self.plan.shapes[name])
        if self.options.router_init == "normal":
            weight.normal_(0.0, self.options.router_std, generator=self._generator(name))
        return weight.to(dtype)

    def _expert(self, name: str, expert: int) -> torch.Tensor:
        """One expert's gate_up_proj (2F, D) or down_proj (D, F)."""
        options, dense = self.options, self._dense_part(name)
        down = name.endswith("down_proj")
        factor = options.output_scale * (0.5 if options.shared_expert else 1.0) if down else 1.0
        if not options.noise and not options.reinit:
            return dense if factor == 1.0 else (dense.float() * factor).to(dense.dtype)
        weight = dense.to(torch.float32, copy=True)
        mean, deviation = weight.mean(), weight.std()
        generator = self._generator(f"{name} {expert}")
        if options.reinit:
            units = self._new_units(name, expert, num_units=weight.shape[1 if down else 0] // (1 if down else 2))
            for part in (weight,) if down else weight.chunk(2):
                shape = (part.shape[0], len(units)) if down else (len(units), part.shape[1])
                drawn = torch.randn(shape, generator=generator) * deviation + mean
                part.index_copy_(1 if down else 0, units, drawn)
        if options.noise:
            weight += torch.randn(weight.shape, generator=generator) * (options.noise * deviation)
        return (weight * factor).to(dense.dtype)

    def _new_units(self, name: str, expert: int, num_units: int) -> torch.Tensor:
        """Inner units that an expert draws anew: the same ones in both of its tensors."""
        layer = name.partition(_EXPERTS)[0]
        order = torch.randperm(num_units, generator=self._generator(f"{layer} units {expert}"))
        return order[: round(self.options.reinit * num_units)]

    def _generator(self, text: str) -> torch.Generator:
        """Random numbers that depend on the seed and the tensor alone, not on what was made before."""
        digest = hashlib.sha256(f"{self.options.seed} {text}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _cached(self, kind: str, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The last tensor of a kind, or a new one in its place: neighbours on disk share their source."""
        kept = self._kept.get(kind)
        if kept is None or kept[0] != key:
            self._kept.pop(kind, None)
            self._kept[kind] = (key, make())
        return self._kept[kind][1]
