"""A server's limits on pictures hold for those that the process has cut without them."""

import dataclasses
import io

import pytest
import torch
from PIL import Image

from phi35.config import VisionConfig
from phi35.serving.errors import ApiError
from phi35.serving.prompts import _limited
from vision.crop_cache import CropCache
from vision.image_transform import ImageTransform

LEAN = dataclasses.replace(VisionConfig(), image_size=28)


def test_a_transform_with_another_opening_shares_no_pictures() -> None:
    file = io.BytesIO()
    Image.effect_noise((60, 60), 90).save(file, "PNG")
    transform, content = ImageTransform(LEAN), file.getvalue()
    transform.cache = CropCache()
    crops = transform(content, 4)
    limited = _limited(transform, max_pixels=3599)
    with pytest.raises(ApiError, match="more than 3599"):
        limited(content, 4)
    wider = _limited(transform, max_pixels=3600)
    for _ in range(2):
        assert torch.equal(wider(content, 4).pixel_values, crops.pixel_values)
    assert (wider.cache.hits, wider.cache.misses, len(transform.cache)) == (1, 1, 1)
    with pytest.raises(ValueError, match="opens its own"):
        _limited(lambda image, num_crops: crops, 10)
