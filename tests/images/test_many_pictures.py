"""Pictures of a call side by side and pictures seen before: the bits of one picture alone, never a wrong one."""

import copy
import dataclasses
import io
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phi35.config import VisionConfig
from vision.crop_cache import CropCache, file_digest
from vision.image_transform import ImageTransform

LEAN = dataclasses.replace(VisionConfig(), image_size=28)
SIZES = [(640, 480), (28, 28), (90, 200), (1, 2), (300, 40), (56, 56)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def equal(found: object, expected: object) -> bool:
    same = torch.equal(found.pixel_values, expected.pixel_values)
    return same and (found.image_size, found.num_tokens) == (expected.image_size, expected.num_tokens)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_pictures_by_threads_are_those_one_after_the_other(threads: int) -> None:
    """Several shapes, limits and kinds of source at once; no filter of warnings is left behind."""
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    sources = [image if number % 2 else encoded(image) for number, image in enumerate(images)]
    limits = [4, 16, 16, None, 8, 1]
    filters = list(warnings.filters)
    found = ImageTransform(LEAN, threads).many(sources * 3, limits * 3)
    assert warnings.filters == filters
    alone = ImageTransform(LEAN, threads=1)
    for number, crops in enumerate(found):
        place = number % len(images)
        assert equal(crops, alone(images[place], limits[place]))


def test_the_first_bad_picture_is_named() -> None:
    good = picture(30, 30)
    with pytest.raises(ValueError, match="the given 3 bytes"):
        ImageTransform(LEAN, 3).many([good, b"abc", b"abcdef"], [4, 4, 4])
    with pytest.raises(ValueError, match="num_crops must be"):
        ImageTransform(LEAN, 3).many([good, good], [4, 0])


def test_pictures_seen_before_are_found_by_what_they_are(tmp_path: Path) -> None:
    """By a file's bytes under any name, by pixels in memory, for each limit of tiles; a changed file is another."""
    transform, image = ImageTransform(LEAN), picture(90, 60)
    expected = {limit: transform(image, limit) for limit in (1, 4)}
    transform.cache = cache = CropCache()
    path = tmp_path / "one.png"
    path.write_bytes(encoded(image))
    for source in (image, np.asarray(image), image.copy(), path, str(path), encoded(image)):
        assert equal(transform(source, 4), expected[4])
    assert (cache.hits, cache.misses, len(cache)) == (4, 2, 2)  # pixels and file
    assert equal(transform(image, 1), expected[1]) and cache.misses == 3
    other = picture(90, 60, seed=1)
    path.write_bytes(encoded(other))
    assert equal(transform(path, 4), ImageTransform(LEAN)(other, 4)) and cache.misses == 4
    image.putpixel((3, 3), (0, 0, 0))
    assert not equal(transform(image, 4), expected[4])
    turned = picture(90, 60)
    assert equal(transform(turned, 4), expected[4])
    turned.getexif()[0x0112] = 6
    assert transform(turned, 4).image_size == expected[4].image_size[::-1]
    flat = Image.frombytes("RGB", (60, 90), picture(90, 60).tobytes())
    assert transform(flat, 4).image_size == expected[4].image_size[::-1]


def test_what_was_used_longest_ago_goes_first() -> None:
    transform = ImageTransform(LEAN)
    one = transform(picture(56, 56), 4).pixel_values.nbytes
    transform.cache = cache = CropCache(2 * one)
    for seed in (0, 1, 0, 2, 0, 1):
        transform(picture(56, 56, seed), 4)
    assert (cache.hits, cache.misses, len(cache), cache.num_bytes) == (2, 4, 2, 2 * one)
    transform.cache = none = CropCache(one - 1)
    transform(picture(56, 56), 4)
    assert len(none) == 0 == none.num_bytes
    with pytest.raises(ValueError, match="max_bytes must be"):
        CropCache(-1)


def test_copies_and_pickles_of_a_cache_are_empty_and_bad_files_have_no_digest(tmp_path: Path) -> None:
    transform = ImageTransform(LEAN)
    transform.cache = CropCache(10**6)
    transform(picture(56, 56), 4)
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert len(twin.cache) == 0 and twin.cache.max_bytes == 10**6
        assert equal(twin(picture(56, 56), 4), transform(picture(56, 56), 4))
    assert all(file_digest(source) is None for source in (tmp_path, tmp_path / "none", "a\0b", picture(2, 2)))
