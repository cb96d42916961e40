"""Shapes of the decoding kernels' programs: a table from measurements (docs/inference.md), not a search at run time."""

import math
from dataclasses import dataclass, field, replace

from phi35.kernels.configs import AttentionConfig, VectorConfig


@dataclass(frozen=True)
class StepTuning:
    """How each kernel of a step runs.

    Attributes:
        qkv: query-key-value product.
        short_add: residual products over vectors of at most 4,096 (o_proj).
        long_add: the others (down_proj).
        gate_up: gate and up product.
        logits: the head.
        expert_gate_up: gate and up product of chosen experts.
        expert_down: their down product.
        programs: of attention, over all heads and rows: two for each multiprocessor of an H100 or H200.
        ahead_bytes: weights that attention brings into the second-level cache for the kernels to come.
        one: attention with one query a head of keys; splits are chosen by ``attention``.
        grouped: attention with several.
        coded_programs: of attention with one query a head over eight-bit keys, which computes more for a byte.
        coded: that attention.
    """

    qkv: VectorConfig = VectorConfig(4, 4)
    short_add: VectorConfig = VectorConfig(4, 4)
    long_add: VectorConfig = VectorConfig(4, 8)
    gate_up: VectorConfig = VectorConfig(4, 4)
    logits: VectorConfig = VectorConfig(4, 4)
    expert_gate_up: VectorConfig = VectorConfig(4, 2)
    expert_down: VectorConfig = VectorConfig(2, 4)
    programs: int = 264
    ahead_bytes: int = 0
    one: AttentionConfig = field(default_factory=lambda: AttentionConfig(block=32, num_stages=3))
    grouped: AttentionConfig = field(default_factory=lambda: AttentionConfig(block=64, num_stages=3))
    coded_programs: int = 1056
    coded: AttentionConfig = field(default_factory=lambda: AttentionConfig(block=32, num_stages=3))

    def add(self, width: int) -> VectorConfig:
        """Configuration of a residual product over vectors of this width."""
        return self.short_add if width <= 4096 else self.long_add

    def attention(self, batch: int, num_kv: int, group: int, slots: int, coded: bool = False) -> AttentionConfig:
        """Configuration of attention: splits that fill the device, none of them shorter than two steps."""
        config, programs = self.one if group == 1 else self.grouped, self.programs
        if coded and group == 1:
            config, programs = self.coded, self.coded_programs
        wanted = 2 ** round(math.log2(max(1.0, programs / (batch * num_kv))))
        longest = max(1, slots // (2 * config.block))
        return replace(config, splits=min(wanted, 2 ** int(math.log2(longest))))


DEFAULT = StepTuning()
