"""Image features by content: a picture that was seen before does not run through the tower again.

A picture goes by a digest of its crops in the model's own dtype and of its size, so that num_crops counts too. The
cache is bounded in bytes, gives up what was used longest ago first, and empties itself when the vision part's weights
move or are written in place.
"""

import collections
import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

import torch

from phi35.module_walk import stored_tensors

DEFAULT_BYTES = 2**28
"""256 MiB: 17 pictures of 16 crops of phi-3.5-vision in bfloat16."""
LANES = 4
"""Sums of 64 bits a crop on a GPU; two crops agree in one of them with a chance of at most 2^-32."""
CROPS_AT_ONCE = 32


class ImageFeatureCache:
    """Features of pictures, for one model.

    Args:
        max_bytes: most bytes of features, on the model's device.

    Attributes:
        hits: pictures whose features were there.
        misses: pictures that ran through the tower.

    Raises:
        ValueError: for a negative bound.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"max_bytes must be a whole number of at least 0, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self.hits, self.misses, self.num_bytes = 0, 0, 0
        self._features: collections.OrderedDict[bytes, torch.Tensor] = collections.OrderedDict()
        self._weights: Any = None
        self._factors: dict[tuple[torch.device, int], torch.Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImageFeatureCache":
        return ImageFeatureCache(self.max_bytes)

    def __reduce__(self) -> tuple[type["ImageFeatureCache"], tuple[int]]:
        return ImageFeatureCache, (self.max_bytes,)

    def __len__(self) -> int:
        """Pictures held."""
        return len(self._features)

    @torch.no_grad()
    def features(
        self, embedding: Any, pixel_values: torch.Tensor, image_sizes: Any
    ) -> tuple[list[torch.Tensor], list[bytes]]:
        """Features of some pictures; the new ones run through the tower together, each once.

        Args:
            embedding: the model's ``VisionEmbedding``, in evaluation mode.
            pixel_values: (C, 3, S, S) crops of all pictures, in the tower's dtype and on its device.
            image_sizes: (N, 2).

        Returns:
            N tensors (tokens_i, D), and the digest of each picture.

        Raises:
            ValueError: if sizes and crops do not match.
        """
        counts = embedding.crops_per_image(image_sizes, pixel_values)
        sizes = torch.as_tensor(image_sizes).tolist()
        self._check_weights(embedding)
        pictures = pixel_values.split(counts)
        digests = self._digests(pixel_values, counts, sizes)
        missing = [place for place, digest in enumerate(digests) if digest not in self._features]
        missing = list({digests[place]: place for place in reversed(missing)}.values())[::-1]
        found = {digest: self._features[digest] for digest in digests if digest in self._features}
        if missing:
            crops = torch.cat([pictures[place] for place in missing])
            new = embedding.features(crops, [sizes[place] for place in missing])
            # Cloned: a view would keep the features of all pictures of its call.
            found |= {digests[place]: one.clone() for place, one in zip(missing, new, strict=True)}
        self.hits, self.misses = self.hits + len(digests) - len(missing), self.misses + len(missing)
        for digest in digests:
            self._keep(digest, found[digest])
        return [found[digest] for digest in digests], digests

    def clear(self) -> None:
        """Forget all pictures."""
        self._features.clear()
        self.num_bytes = 0

    def _keep(self, digest: bytes, features: torch.Tensor) -> None:
        if digest in self._features:
            self._features.move_to_end(digest)
            return
        if features.nbytes > self.max_bytes:
            return
        self._features[digest] = features
        self.num_bytes += features.nbytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._features.popitem(last=False)
            self.num_bytes -= dropped.nbytes

    def _check_weights(self, embedding: Any) -> None:
        """Forget all where the weights are not those that made the features."""
        weights = tuple((one.data_ptr(), one._version) for one in stored_tensors(embedding))
        if weights != self._weights:
            self.clear()
            self._weights = weights

    def _digests(
        self, pixel_values: torch.Tensor, counts: Sequence[int], sizes: Sequence[Sequence[int]]
    ) -> list[bytes]:
        """A digest of each picture's size and crops."""
        parts: Sequence[Any]
        if pixel_values.device.type == "cuda":
            parts = [part.numpy() for part in self._sums(pixel_values).cpu().split(list(counts))]
        else:
            raw = pixel_values.detach().contiguous().cpu().view(torch.uint8)
            parts = [part.numpy() for part in raw.split(list(counts))]
        digests = []
        for part, size in zip(parts, sizes, strict=True):
            digest = hashlib.sha256(f"{pixel_values.dtype} {size}".encode())
            digest.update(part)
            digests.append(digest.digest())
        return digests

    def _sums(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(C, LANES) int64: each crop's bits by secret random factors, summed modulo 2^64 (multilinear hashing).

        Hashing the crops on the host takes about as long as the tower on a large GPU. The bound on collisions is that
        of Lemire and Kaser, "Strongly universal string hashing is fast" (arXiv 1202.4961).
        """
        words = pixel_values.contiguous().view(torch.int32).flatten(1)
        place = (pixel_values.device, words.shape[1])
        if place not in self._factors:
            generator = torch.Generator().manual_seed(secrets.randbits(63))
            drawn = torch.randint(-(2**63), 2**63 - 1, (LANES, words.shape[1]), generator=generator)
            self._factors[place] = drawn.to(pixel_values.device)
        factors = self._factors[place]
        sums = [
            torch.stack([(part.long() * lane).sum(dim=1) for lane in factors], dim=1)
            for part in words.split(CROPS_AT_ONCE)
        ]
        return torch.cat(sums)
