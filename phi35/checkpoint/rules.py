"""Names and shapes of tensors on disk and in memory, as a table.

In memory every family has the names of the published phi3 models (fused ``qkv_proj`` and ``gate_up_proj``) and
stacked experts; on disk each family keeps its published names. A ``Rule`` states how one memory tensor is put
together from disk tensors. From it follows, for every disk tensor, the *view* of the memory tensor where it
lies. Loading copies into that view and saving reads from it, so that no second table of inverses exists and a
part may be filled in place without a copy of the whole.

Several rules may match one memory tensor: the first is written, all are read. A last rule that keeps the name
always stands at the end, so that memory names are accepted on disk as well.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from phi35.config import ModelConfig
from phi35.config_io import published_model_type
from phi35.meta_model import meta_model
from phi35.registry import resolve

FIELDS = {"layer": r"\d+", "expert": r"\d+", "kind": r"[^.]+", "rest": r".+"}
"""Placeholders of name patterns: numbers, one component of a name, any end of a name."""

Sizes = Callable[[ModelConfig], tuple[int, ...]]


@dataclass(frozen=True)
class RowGroups:
    """Rows that disk keeps group by group and memory kind by kind.

    Attributes:
        count: number of groups.
        sizes: rows that a group has of each kind. Memory holds the first kind's rows of all groups, then the second's.
    """

    count: int
    sizes: tuple[int, ...]

    def parts(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Each kind's rows (count, size, ...) as views of a memory tensor.

        Raises:
            ValueError: if it has another number of rows, as packed zero points have.
        """
        rows = self.count * sum(self.sizes)
        if memory.shape[0] != rows:
            raise ValueError(
                f"a tensor has {memory.shape[0]} rows where disk keeps {rows} in another order: zero points of "
                "asymmetric codes are packed along these rows; quantize this model symmetrically"
            )
        kinds = memory.split([self.count * size for size in self.sizes])
        return [kind.unflatten(0, (self.count, size)) for kind, size in zip(kinds, self.sizes, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One memory tensor from one or more disk tensors.

    The steps from memory to disk are taken in this order: ``stack``, ``leading_ones``, concat, ``transpose``.

    Attributes:
        memory: pattern of the memory name, e.g. ``model.layers.{layer}.self_attn.qkv_proj.{kind}``.
        disk: patterns of the disk names, in the order in which they are concatenated.
        concat_dim: dimension along which they are concatenated.
        sizes: their sizes along that dimension, from the config; None takes equal parts.
        stack: placeholder that stands in the disk patterns alone: memory stacks these tensors along a new
            first dimension.
        leading_ones: dimensions of size 1 that memory has in front and disk lacks.
        transpose: disk holds the last two dimensions exchanged.
        groups: the rows' order on disk, where it is another; for a rule of one disk tensor without other steps.
    """

    memory: str
    disk: tuple[str, ...]
    concat_dim: int = 0
    sizes: Sizes | None = None
    stack: str | None = None
    leading_ones: int = 0
    transpose: bool = False
    groups: Callable[[ModelConfig], RowGroups] | None = None


@dataclass(frozen=True, kw_only=True)
class Ignore:
    """Disk tensors that hold nothing the model needs.

    Attributes:
        disk: pattern of the disk name.
        reason: why it may be dropped.
    """

    disk: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """Where one disk tensor lies inside a memory tensor.

    Attributes:
        disk_name: name on disk.
        memory_name: name in memory.
        index: position along the stacked dimension, or None.
        leading_ones: leading dimensions of size 1 to drop.
        window: (dim, start, length) of the part, or None for the whole.
        transpose: whether disk holds the last two dimensions exchanged.
        groups: the rows' order on disk, or None for the same.
    """

    disk_name: str
    memory_name: str
    index: int | None = None
    leading_ones: int = 0
    window: tuple[int, int, int] | None = None
    transpose: bool = False
    groups: RowGroups | None = None

    def take(self, memory: torch.Tensor) -> torch.Tensor:
        """What the disk tensor holds: a view of ``memory``, or a copy where disk has the rows in another order."""
        if self.groups is None:
            return self._view(memory)
        return torch.cat(self.groups.parts(memory), dim=1).flatten(0, 1)

    def put(self, memory: torch.Tensor, disk: torch.Tensor) -> None:
        """Copy a disk tensor to its place in ``memory``."""
        if self.groups is None:
            self._view(memory).copy_(disk)
            return
        grouped = disk.unflatten(0, (self.groups.count, sum(self.groups.sizes))).split(self.groups.sizes, dim=1)
        for part, values in zip(self.groups.parts(memory), grouped, strict=True):
            part.copy_(values)

    def _view(self, memory: torch.Tensor) -> torch.Tensor:
        part = memory if self.index is None else memory[self.index]
        for _ in range(self.leading_ones):
            part = part[0]
        if self.window is not None:
            part = part.narrow(*self.window)
        return part.transpose(-1, -2) if self.transpose else part


@dataclass(frozen=True)
class Match:
    """What a checkpoint's names mean.

    Attributes:
        load: one placement per disk tensor to copy.
        verify: placements of disk tensors that repeat a tensor already loaded and must equal it.
        ignored: disk names dropped by an ``Ignore`` rule.
    """

    load: list[Placement] = field(default_factory=list)
    verify: list[Placement] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


BASE_RULES: tuple[Rule | Ignore, ...] = (
    Ignore(disk="model.layers.{layer}.self_attn.rotary_emb.inv_freq", reason="rotary tables follow from the config"),
    Ignore(disk="{rest}.weight_shape", reason="the shape of a packed weight follows from the config"),
)
TIED_RULES: tuple[Rule | Ignore, ...] = (
    Rule(memory="model.embed_tokens.weight", disk=("model.embed_tokens.weight",)),
    Rule(memory="model.embed_tokens.weight", disk=("lm_head.weight",)),
)
SAME_NAME = Rule(memory="{rest}", disk=("{rest}",))


def rules_for(config: ModelConfig) -> tuple[Rule | Ignore, ...]:
    """The rules of a model, most specific first; a model with image path and experts takes both tables."""
    rules = BASE_RULES
    if published_model_type(config) == "phi3small":
        rules += tuple(resolve("phi35.checkpoint.small_rules:RULES"))
    if config.vision is not None:
        rules += tuple(resolve("checkpoint_rules.vision"))
    if config.is_sparse:
        rules += tuple(resolve("checkpoint_rules.sparse"))
    if config.tie_word_embeddings:
        rules += TIED_RULES
    return (*rules, SAME_NAME)


def memory_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's own tensors, without the head that is tied to the embedding.

    Nothing is allocated.
    """
    return state_shapes(config, meta_model(config).state_dict())


def state_shapes(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a memory state, without the head that is tied to the embedding."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }


class CheckpointPlan:
    """All spellings of a model's tensors.

    Args:
        config: the model.
        shapes: memory names and shapes; None asks the model itself.
        rules: the table; None takes that of the model's family.
    """

    def __init__(
        self,
        config: ModelConfig,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        rules: Sequence[Rule | Ignore] | None = None,
    ) -> None:
        self.config = config
        self.shapes = dict(memory_shapes(config) if shapes is None else shapes)
        rules = rules_for(config) if rules is None else rules
        self._ignored = [_pattern(rule.disk) for rule in rules if isinstance(rule, Ignore)]
        spellings = [(_pattern(rule.memory), rule) for rule in rules if isinstance(rule, Rule)]
        self.spellings: dict[str, list[list[Placement]]] = {}
        for name, shape in self.shapes.items():
            found = ((pattern.fullmatch(name), rule) for pattern, rule in spellings)
            placements = [_placements(rule, match, shape, config) for match, rule in found if match]
            self.spellings[name] = [item for i, item in enumerate(placements) if item not in placements[:i]]

    def written(self) -> list[Placement]:
        """Placements of the published names, in the model's order: what a saved checkpoint holds."""
        return [placement for spellings in self.spellings.values() for placement in spellings[0]]

    def disk_shape(self, placement: Placement) -> tuple[int, ...]:
        """Shape of the disk tensor of a placement."""
        return tuple(placement.take(torch.empty(self.shapes[placement.memory_name], device="meta")).shape)

    def match(self, disk: Mapping[str, tuple[int, ...]], source: str = "checkpoint") -> Match:
        """Says for each disk tensor where it goes.

        Args:
            disk: names and shapes on disk.
            source: what to call the checkpoint in an error.

        Raises:
            ValueError: if tensors are missing, unknown or have another shape; all of them are listed.
        """
        result = Match()
        missing: list[str] = []
        for spellings in self.spellings.values():
            complete = [spelling for spelling in spellings if all(p.disk_name in disk for p in spelling)]
            if complete:
                result.load.extend(complete[0])
                result.verify.extend(p for spelling in complete[1:] for p in spelling)
            else:
                nearest = max(spellings, key=lambda spelling: sum(p.disk_name in disk for p in spelling))
                missing.extend(p.disk_name for p in nearest if p.disk_name not in disk)
                result.load.extend(p for p in nearest if p.disk_name in disk)
        known = {p.disk_name for p in (*result.load, *result.verify)}
        rest = [name for name in disk if name not in known]
        result.ignored.extend(name for name in rest if any(pattern.fullmatch(name) for pattern in self._ignored))
        unknown = [name for name in rest if name not in set(result.ignored)]
        misshapen = [
            f"{p.disk_name} has shape {list(disk[p.disk_name])}, expected {list(self.disk_shape(p))}"
            for p in (*result.load, *result.verify)
            if tuple(disk[p.disk_name]) != self.disk_shape(p)
        ]
        problems = [
            f"{len(names)} {kind}: {listed(names)}"
            for kind, names in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
            if names
        ]
        if problems:
            raise ValueError(f"{source} does not fit the config: " + "; ".join(problems))
        return result


def to_memory(
    config: ModelConfig,
    disk_state: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, torch.Tensor]:
    """A state under the model's own names from one under the published names.

    Args:
        config: the model.
        disk_state: tensors under any spelling the rules know.
        shapes: memory names and shapes; None asks the model itself.

    Returns:
        memory name -> tensor, in the model's order; a tensor that is only renamed is not copied. With
        ``tie_word_embeddings`` the head's name is there too and is the embedding's tensor.

    Raises:
        ValueError: if tensors are missing, unknown or misshapen (all listed), or repeat another with other values.
    """
    plan = CheckpointPlan(config, shapes)
    match = plan.match({name: tuple(tensor.shape) for name, tensor in disk_state.items()})
    memory: dict[str, torch.Tensor] = {}
    whole = {name: spellings[0] for name, spellings in plan.spellings.items()}
    for placement in match.load:
        tensor, name = disk_state[placement.disk_name], placement.memory_name
        if placement == Placement(placement.disk_name, name):
            memory[name] = tensor
            continue
        if name not in memory:
            memory[name] = tensor.new_empty(plan.shapes[name])
        placement.put(memory[name], tensor)
    different = [
        p.disk_name for p in match.verify if not torch.equal(p.take(memory[p.memory_name]), disk_state[p.disk_name])
    ]
    check_repeats(different)
    ordered = {name: memory[name] for name in whole}
    if config.tie_word_embeddings:
        ordered["lm_head.weight"] = ordered["model.embed_tokens.weight"]
    return ordered


def to_disk(config: ModelConfig, memory_state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state under the published names from one under the model's own names.

    Args:
        config: the model.
        memory_state: a full state dict of the model.

    Returns:
        disk name -> view of the memory tensor, or a copy where disk has the rows in another order; a tied head is
        left out. Packed weights have their shapes beside them.

    Raises:
        ValueError: if tensors are missing, unknown or misshapen (all listed).
    """
    expected = memory_shapes(config)
    shapes = state_shapes(config, memory_state)
    problems = [f"missing {name}" for name in expected if name not in shapes]
    problems += [f"unknown {name}" for name in shapes if name not in expected]
    problems += [
        f"{name} has shape {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        raise ValueError(f"the state does not fit the config: {listed(problems)}")
    plan = CheckpointPlan(config, shapes)
    state = {p.disk_name: p.take(memory_state[p.memory_name]) for p in plan.written()}
    return state if config.quantization is None else state | resolve("phi35.quantization.names:packed_shapes")(plan)


def check_repeats(different: Iterable[str]) -> None:
    """Raises ValueError where a tensor that stands twice in a checkpoint has two values."""
    names = list(different)
    if names:
        raise ValueError(
            f"the checkpoint holds a tensor twice with different values: {listed(names)}; with "
            "tie_word_embeddings=true the head must equal the embedding: set it to false to keep both"
        )


def _pattern(text: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", text)
    return re.compile(
        "".join(
            f"(?P<{piece}>{FIELDS[piece]})" if position % 2 else re.escape(piece)
            for position, piece in enumerate(pieces)
        )
    )


def _placements(rule: Rule, match: re.Match[str], shape: tuple[int, ...], config: ModelConfig) -> list[Placement]:
    """Placements of one rule's disk tensors inside a memory tensor of the given shape."""
    inner = shape[1:] if rule.stack else shape
    inner = inner[rule.leading_ones :]
    dim = rule.concat_dim
    if len(rule.disk) == 1:
        windows: list[tuple[int, int, int] | None] = [None]
    else:
        count = len(rule.disk)
        sizes = rule.sizes(config) if rule.sizes else (inner[dim] // count,) * count
        words = sum(sizes) // inner[dim]
        if match.string.endswith("_zero_point") and not any(size % words for size in sizes):
            # Zero points of quantized weights are packed along the rows, several to a word.
            sizes = tuple(size // words for size in sizes)
        if sum(sizes) != inner[dim]:
            raise ValueError(f"{match.string} has size {inner[dim]} along dim {dim}, its parts add up to {sum(sizes)}")
        windows = [(dim, sum(sizes[:part]), sizes[part]) for part in range(count)]
    placements = []
    for index in range(shape[0]) if rule.stack else (None,):
        fields = match.groupdict() | ({rule.stack: str(index)} if rule.stack else {})
        placements += [
            Placement(
                name.format(**fields),
                match.string,
                index,
                rule.leading_ones,
                window,
                rule.transpose,
                None if rule.groups is None else rule.groups(config),
            )
            for name, window in zip(rule.disk, windows, strict=True)
        ]
    return placements


def listed(names: list[str], limit: int = 40) -> str:
    """Names for a message, the first of them where there are many."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … and {len(names) - limit} more"
