"""Multiplicative noise that is made again from a seed wherever it is needed, instead of being kept."""

from dataclasses import dataclass

import torch

WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Jitter:
    """Uniform noise in [1 - amount, 1 + amount], one number for each element of a tensor.

    An element's noise hangs on the seed and on its place in the contiguous tensor alone: a 32-bit finalizer
    (MurmurHash3's) of both.

    Attributes:
        amount: half the width of the interval.
        seed: (1,) int32, not negative, on the tensor's device.
    """

    amount: float
    seed: torch.Tensor

    @classmethod
    def draw(cls, amount: float, device: torch.device) -> "Jitter":
        """A jitter with a seed from the device's generator; nothing waits for the device."""
        return cls(amount, torch.randint(0, 2**31 - 1, (1,), dtype=torch.int32, device=device))

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        """The noise of a tensor's elements, in its shape and dtype, by torch's operations.

        ``phi35.kernels.norm`` makes the same within a kernel.
        """
        bits = noise_bits(like.numel(), self.seed.to(torch.int64), like.device)
        return (bits.float() * (2 * self.amount / 2**32) + (1.0 - self.amount)).to(like.dtype).view(like.shape)


def noise_bits(count: int, key: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """(count,) int64 numbers in [0, 2^32), a function of place and key."""
    places = torch.arange(count, device=device) & WORD
    return mix(places ^ (key * 2654435769 & WORD))


def mix(bits: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finalizer of 32-bit numbers held as int64: every bit of the result hangs on every bit."""
    # A product of two 32-bit numbers may pass 2^63; int64 wraps, and its lower half is right all the same.
    bits = (bits ^ (bits >> 16)) * 2246822507 & WORD
    bits = (bits ^ (bits >> 13)) * 3266489909 & WORD
    return bits ^ (bits >> 16)
