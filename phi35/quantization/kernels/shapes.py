"""Shapes of the programs of the one-token kernels for weights in few bits; importing them needs no Triton."""

from dataclasses import dataclass

from phi35.quantization.codes import QuantizedTensor


@dataclass(frozen=True)
class WordConfig:
    """Shape of a program.

    Attributes:
        rows: weight rows per program, shared out to its groups: 1, 2, 4, 8 or 16 each.
        num_warps: warps of a program.
        groups: of warps; those of a group share each row, 16 columns a lane and load. More than one only where the
            vector comes prepared: each group takes all of it.
    """

    rows: int = 4
    num_warps: int = 4
    groups: int = 1

    def __post_init__(self) -> None:
        assert self.rows // self.groups in (1, 2, 4, 8, 16), "sums of rows are joined pair by pair"
        assert self.num_warps % self.groups == 0

    @property
    def lanes(self) -> int:
        """Lanes that share a row."""
        return 32 * self.num_warps // self.groups


@dataclass(frozen=True)
class FewBitShapes:
    """How the kernels of a step run; None for what ``choose`` finds.

    Attributes:
        qkv: query-key-value product.
        short_add: residual products over vectors of at most 4,096 (o_proj).
        long_add: the others (down_proj).
        gate_up: gate and up product.
        prepares: whether a kernel leaves its result as integers for the next one in 4 bits, where that can read them.
        prepares_bytes: the same for the next one in 8 bits.
    """

    qkv: WordConfig | None = None
    short_add: WordConfig | None = None
    long_add: WordConfig | None = None
    gate_up: WordConfig | None = None
    prepares: bool = True
    prepares_bytes: bool = False


HELD_WORDS = 144
"""32-bit registers of a lane that may wait for codes and scales, so that nothing is spilled."""

PROGRAMS = 264
"""Programs that a product should have at least: two for each multiprocessor of an H100 or H200."""

SPAN = 8
"""Values of a vector left by a kernel that share a scale; rows of a program that leaves one are a multiple of it."""


def choose(weight: QuantizedTensor, prepared: bool = False, leaves: bool = False) -> WordConfig:
    """The shape of a program for a weight: the fewest instructions a weight, among those with programs enough.

    Measured instead, in whole steps of phi-3.5-mini on an H200: shapes for a ``prepared`` vector, of which little is
    worth sharing, so that more warps with fewer rows hide each other's latency; and for a short vector of which a
    product makes integers once more and ``leaves`` its own.
    """
    num_rows, width = weight.shape[-2:]
    if prepared or (leaves and width <= 4096):
        shapes = LEAVING_NARROW if not prepared else PREPARED_NARROW if width <= 4096 else PREPARED_WIDE
        for config in shapes:
            if held_words(config, weight) <= HELD_WORDS:
                return config
    fitting = [config for config in SHAPES if held_words(config, weight) <= HELD_WORDS]
    many = [config for config in fitting if num_rows >= PROGRAMS * config.rows]
    return min(many or fitting, key=lambda config: _instructions(config, width))


def held_words(config: WordConfig, weight: QuantizedTensor) -> int:
    """Registers of a lane that wait for codes and scales."""
    return (
        config.rows // config.groups * _chunks(config, weight.shape[-1]) * ((2 if weight.format.bits == 4 else 4) + 1)
    )


def _chunks(config: WordConfig, width: int) -> int:
    """How many times a lane's 16 columns make a row."""
    return -(-width // (16 * config.lanes))


def _instructions(config: WordConfig, width: int) -> float:
    """Instructions a weight, as counted in compiled kernels.

    220 to prepare a lane's 16 columns, 21 to multiply them with a row's codes, 20 to add up a row over the lanes.
    """
    chunks = _chunks(config, width)
    return (220 * chunks + config.rows * (21 * chunks + 20)) * config.lanes / (config.rows * width)


SHAPES = tuple(WordConfig(rows, num_warps) for num_warps in (2, 4, 8) for rows in (1, 2, 4, 8, 16))
"""Shapes that are thought of where programs prepare the vector."""

LEAVING_NARROW = (WordConfig(16, 2),)
PREPARED_NARROW = WordConfig(16, 4, 2), WordConfig(16, 4, 4)
PREPARED_WIDE = WordConfig(8, 4, 1), WordConfig(8, 8, 2)
"""Measured shapes, of which the first that fits is taken: for vectors of at most 4,096 values, and of more."""
