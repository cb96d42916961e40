"""How many parameters a rank holds, trains and shards, without allocating any."""

from dataclasses import dataclass

from phi35.config import ModelConfig
from phi35.meta_model import meta_model
from phi35.training.config import TrainingConfig
from phi35.training.gradient_sum import LARGE
from phi35.training.parameter_groups import is_decayed, part_of, uses_muon


@dataclass(frozen=True)
class RankParameters:
    """Parameters of one rank; experts are this rank's share.

    Attributes:
        frozen: without gradients.
        dense: trained, the same on every rank.
        experts: trained, of this rank's experts.
        muon: of ``dense`` and ``experts``, those that Muon updates.
        largest: the largest trained tensor.
        small: trained in tensors that travel between ranks together (``phi35.training.gradient_sum``).
        groups: sizes of the optimizer's groups of dense parameters, in order.
        head: the output head's (or tied embedding's) matrix, if it is trained.
        embedding: the token embedding's, if it is trained.
        total: of the whole model, over all ranks.
        sparse_layer: of the largest layer's experts, whole.
        layer: trained in the largest decoder layer.
    """

    frozen: int
    dense: int
    experts: int
    muon: int
    largest: int
    small: int
    groups: tuple[int, ...]
    head: int
    embedding: int
    total: int
    sparse_layer: int
    layer: int

    @property
    def trained(self) -> int:
        """With gradients on this rank."""
        return self.dense + self.experts

    @property
    def held(self) -> int:
        """All of this rank's."""
        return self.frozen + self.trained


def rank_parameters(model_config: ModelConfig, config: TrainingConfig) -> RankParameters:
    """Counts a rank's parameters.

    Args:
        model_config: of the model.
        config: resolved.
    """
    model, ep_size = meta_model(model_config), config.ep_size or 1
    counts = dict.fromkeys(("frozen", "dense", "experts", "muon", "largest", "small", "head", "embedding", "total"), 0)
    groups: dict[tuple[float, bool, bool], int] = {}
    sparse: dict[str, int] = {}
    layers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        size = parameter.numel() // (ep_size if part == "experts" else 1)
        counts["total"] += parameter.numel()
        layer = name.split(".mlp.")[0]
        if part == "experts":
            sparse[layer] = sparse.get(layer, 0) + parameter.numel()
        if part in config.freeze or not parameter.requires_grad:
            counts["frozen"] += size
            continue
        counts["experts" if part == "experts" else "dense"] += size
        counts["largest"] = max(counts["largest"], size)
        counts["small"] += size if size < LARGE else 0
        if name.startswith("model.layers."):
            number = name.split(".")[2]
            layers[number] = layers.get(number, 0) + size
        muon = uses_muon(name, parameter, config)
        counts["muon"] += size if muon else 0
        if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and model_config.tie_word_embeddings):
            counts["head"] = size
        if name == "model.embed_tokens.weight":
            counts["embedding"] = size
        if part != "experts":
            key = (config.learning_rates.get(part, config.learning_rate), is_decayed(name, parameter, config), muon)
            groups[key] = groups.get(key, 0) + size
    return RankParameters(
        **counts,
        groups=tuple(groups.values()),
        sparse_layer=max(sparse.values(), default=0),
        layer=max(layers.values(), default=0),
    )


def nominal_states(parameters: RankParameters, world_size: int, ep_size: int, zero_stage: int) -> int:
    """Bytes of bfloat16 training's states by the usual arithmetic, 16 to a trained parameter: weights 2, gradients 2,
    masters 4, moments 8; of one GPU.

    Args:
        parameters: of a rank.
        world_size: number of ranks.
        ep_size: ranks that share one set of experts.
        zero_stage: 1: masters and moments sharded; 3: everything (with ``ep_size`` 1).
    """
    if zero_stage == 3:
        return (16 * parameters.trained + 2 * parameters.frozen) // world_size
    shared = 12 if zero_stage == 0 else 12 / world_size
    own = 12 if zero_stage == 0 else 12 / (world_size // ep_size)
    states = parameters.dense * (4 + shared) + parameters.experts * (4 + own)
    return round(states + 2 * parameters.frozen)
