"""The HD transform against a plain reference built from torchvision's operations, and its token counts."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from published import published_file
from torchvision.transforms import functional as TF

from phi35.config import VisionConfig
from vision.image_transform import ImageTransform, num_image_tokens, resized_size, tile_grid

PUBLISHED = VisionConfig()
TINY = VisionConfig(image_size=64, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=3)
LEAN = dataclasses.replace(PUBLISHED, image_size=28)  # the published rules on tiles of 28: small and fast

TOKENS_AT_4 = {457, 469, 601, 625, 745, 757, 781}


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference(image: Image.Image, num_crops: int, config: VisionConfig) -> tuple[torch.Tensor, tuple[int, int]]:
    """The seven steps one after the other, as the published processor takes them."""
    side = config.image_size
    upright = image.width < image.height
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = max(s for s in range(1, num_crops + 1) if s * math.ceil(s / ratio) <= num_crops)
    image = TF.resize(image, [int(scale * side / ratio), scale * side], TF.InterpolationMode.BILINEAR)
    missing = math.ceil(image.height / side) * side - image.height
    image = TF.pad(image, [0, int(missing / 2), 0, missing - int(missing / 2)], fill=(255, 255, 255))
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    plane = TF.normalize(TF.to_tensor(image), config.image_mean, config.image_std)
    crops = [torch.nn.functional.interpolate(plane[None], size=(side, side), mode="bicubic")[0]]
    for top in range(0, image.height, side):
        for left in range(0, image.width, side):
            crops.append(plane[:, top : top + side, left : left + side])
    return torch.stack(crops), (image.height, image.width)


SIZES = [(640, 480), (480, 640), (336, 336), (465, 226), (168, 119), (119, 168), (1, 1), (1, 2), (3, 1), (1000, 90)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("num_crops", [4, 16])
def test_pixels_equal_the_reference_bit_for_bit(size, num_crops):
    image = random_image(*size)
    crops = ImageTransform(PUBLISHED)(image, num_crops)
    expected, image_size = reference(image, num_crops, PUBLISHED)
    assert crops.pixel_values.dtype == torch.float32 and crops.pixel_values.is_contiguous()
    assert crops.image_size == image_size
    assert torch.equal(crops.pixel_values, expected)


@pytest.mark.parametrize("config", [TINY, LEAN], ids=["tiles of 64", "tiles of 28"])
def test_pixels_equal_the_reference_over_many_sizes_and_limits(config):
    generator = np.random.default_rng(1)
    transform = ImageTransform(config)
    for case in range(120):
        width, height = (int(2**exponent) for exponent in generator.uniform(0, 8, 2))
        num_crops = int(generator.integers(1, 20))
        if max(width, height) / min(width, height) > config.image_size:
            continue
        image = random_image(width, height, case)
        crops = transform(image, num_crops)
        expected, image_size = reference(image, num_crops, config)
        assert crops.image_size == image_size, (width, height, num_crops)
        assert torch.equal(crops.pixel_values, expected), (width, height, num_crops)
        assert (
            crops.num_tokens == num_image_tokens(*image_size, config) == transform.num_tokens(width, height, num_crops)
        )
        assert len(crops.pixel_values) - 1 <= num_crops


def test_truncated_rows_of_24_17_pictures_are_kept_as_published():
    # 336 / (24 / 17) is 238 in exact arithmetic and a hair less in floating point
    assert 336 * 17 // 24 == 238
    assert resized_size(168, 119, 1, PUBLISHED) == (336, 237)
    plane = ImageTransform(PUBLISHED)(Image.new("RGB", (168, 119)), 1).pixel_values[1]
    white = (plane.amin(dim=(0, 2)) > 1).nonzero().flatten()
    assert white.tolist() == [*range(49), *range(49 + 237, 336)]


def test_padding_is_white_and_splits_the_odd_row_to_the_bottom():
    transform = ImageTransform(PUBLISHED)
    white = (1 - torch.tensor(PUBLISHED.image_mean)) / torch.tensor(PUBLISHED.image_std)
    lying = transform(Image.new("RGB", (336, 335)), 1).pixel_values[1]
    assert torch.equal(lying[:, 335, 0], white) and (lying[:, :335] < 0).all()
    standing = transform(Image.new("RGB", (335, 336)), 1).pixel_values[1]
    assert torch.equal(standing[:, 0, 335], white) and (standing[:, :, :335] < 0).all()


@pytest.mark.parametrize(
    ("width", "height", "num_crops", "tokens"),
    [
        (640, 480, 16, 1921),
        (480, 640, 16, 1933),
        (336, 336, 4, 757),
        (1, 1, 4, 757),
        (336, 336, 1, 313),
        (465, 226, 4, 457),
        (226, 465, 4, 469),
        (465, 226, 16, 2353),
        (2000, 400, 4, 745),
        (400, 2000, 4, 781),
    ],
)
def test_token_counts_of_published_sizes(width, height, num_crops, tokens):
    crops = ImageTransform(PUBLISHED)(Image.new("RGB", (width, height)), num_crops)
    assert crops.num_tokens == tokens
    assert ImageTransform(PUBLISHED).num_tokens(width, height, num_crops) == tokens


def test_the_range_of_token_counts():
    transform = ImageTransform(PUBLISHED)
    sizes = [(width, height) for width in range(10, 400, 7) for height in range(10, 400, 7)]
    # a ratio in 4..5 or beyond leaves 1 x 4, a square 2 x 2; all in between lies within
    assert {transform.num_tokens(*size, 4) for size in sizes} == TOKENS_AT_4
    at_16 = {transform.num_tokens(*size, 16) for size in sizes}
    assert (min(at_16), max(at_16)) == (1321, 2653)


def test_tiny_tiles_cost_few_tokens():
    assert ImageTransform(TINY)(Image.new("RGB", (64, 64)), 1).num_tokens == 2 * 16 + 1 + 2 * 4
    assert num_image_tokens(128, 64, TINY) == 3 * 16 + 1 + 3 * 4
    assert tile_grid(128, 64, TINY) == (2, 1)


def test_crops_hold_the_global_view_first_then_tiles_row_by_row():
    # each quarter of the picture has its own grey, so that every tile is flat
    greys = np.kron(np.array([[0, 80], [160, 240]], dtype=np.uint8), np.ones((64, 64), dtype=np.uint8))
    crops = ImageTransform(TINY)(greys, 4).pixel_values
    assert crops.shape == (5, 3, 64, 64)
    means = crops[1:, 0].mean(dim=(1, 2)) * TINY.image_std[0] + TINY.image_mean[0]
    torch.testing.assert_close(means * 255, torch.tensor([0.0, 80, 160, 240]), atol=1e-3, rtol=0)  # measured: 5e-5
    corners = crops[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]] * TINY.image_std[0] + TINY.image_mean[0]
    torch.testing.assert_close(corners * 255, torch.tensor([0.0, 80, 160, 240]), atol=1e-3, rtol=0)  # measured: 0


def test_the_configured_number_of_crops_is_the_default():
    image = random_image(100, 100)
    few, many = (ImageTransform(dataclasses.replace(LEAN, num_crops=n)) for n in (4, 16))
    assert len(few(image).pixel_values) == 5 and len(many(image).pixel_values) == 17
    assert len(many(image, 1).pixel_values) == len(many(image, np.int64(1)).pixel_values) == 2


def test_extreme_aspect_ratios_are_refused_with_the_way_out():
    transform = ImageTransform(PUBLISHED)
    assert transform(Image.new("RGB", (336 * 4, 1)), 4).image_size == (336, 1344)
    for width, height in ((336 * 4 + 1, 1), (1, 336 * 4 + 1)):
        with pytest.raises(ValueError, match="1345:1 is too extreme.*num_crops to 5"):
            transform(Image.new("RGB", (width, height)), 4)
        with pytest.raises(ValueError, match="too extreme"):
            transform.num_tokens(width, height, 4)
        assert transform(Image.new("RGB", (width, height)), 5).num_tokens > 0


@pytest.mark.parametrize("num_crops", [0, -1, 1.5, True, "4"])
def test_bad_numbers_of_crops_are_refused(num_crops):
    with pytest.raises(ValueError, match="num_crops must be an integer of at least 1"):
        ImageTransform(TINY)(random_image(8, 8), num_crops)


@pytest.mark.parametrize("size", [(0, 64), (64, 65), (100, 64), (-64, 64)])
def test_sizes_that_are_no_whole_tiles_are_refused(size):
    with pytest.raises(ValueError, match="multiples of the tile side 64"):
        num_image_tokens(*size, TINY)


def test_constants_equal_the_published_preprocessor():
    published = json.loads(published_file("tokenizers/phi-3.5-vision/preprocessor_config.json").read_text())
    assert list(PUBLISHED.image_mean) == published["image_mean"]
    assert list(PUBLISHED.image_std) == published["image_std"]
    assert PUBLISHED.num_crops == published["num_crops"]
    assert PUBLISHED.merged_grid_size**2 == published["num_img_tokens"]
