"""A shuffle without memory: which of n documents stands at place i, by a keyed permutation."""

import hashlib


class Shuffle:
    """A permutation of range(n), computed place by place.

    A Feistel network of four rounds over the least even number of bits that holds n, applied again while its result
    lies outside (cycle walking): n = 10^9 documents take no more memory than ten.

    Args:
        size: n.
        *seeds: numbers that choose the permutation.
    """

    def __init__(self, size: int, *seeds: int) -> None:
        self.size = size
        self._half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(repr(seeds).encode(), digest_size=32).digest()
        self._keys = [int.from_bytes(digest[first : first + 8], "little") for first in range(0, 32, 8)]

    def __call__(self, place: int) -> int:
        """The document at a place.

        Args:
            place: in range(n).
        """
        assert 0 <= place < self.size
        half, mask = self._half, (1 << self._half) - 1
        value = place
        while True:
            left, right = value >> half, value & mask
            for key in self._keys:
                # The multiplier and shifts of splitmix64: every bit of the input moves every bit kept.
                mixed = ((right ^ key) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
                mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
                left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
            value = left << half | right
            if value < self.size:
                return value
