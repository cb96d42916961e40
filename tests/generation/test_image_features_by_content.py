"""Features of pictures seen before: the same values, no second run of the tower, and never a wrong picture."""

import copy

import pytest
import torch

import phi35
from phi35.image_cache import ImageFeatureCache
from phi35.model import CausalLM


@pytest.fixture
def model() -> CausalLM:
    return phi35.create("tiny-phi-3.5-vision", seed=0).eval()


def pictures(model: CausalLM, *grids: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random crops of pictures with these rows and columns of tiles."""
    side = model.config.vision.image_size
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randn(sum(1 + rows * columns for rows, columns in grids), 3, side, side, generator=generator)
    return crops, torch.tensor([[rows * side, columns * side] for rows, columns in grids])


class Counted:
    """Passes calls on to a model's embedding and counts the crops that run."""

    def __init__(self, embedding: torch.nn.Module) -> None:
        self.embedding, self.num_crops = embedding, 0

    def features(self, pixel_values: torch.Tensor, image_sizes: object) -> list[torch.Tensor]:
        self.num_crops += len(pixel_values)
        return self.embedding.features(pixel_values, image_sizes)

    def __getattr__(self, name: str) -> object:
        return getattr(self.embedding, name)


def test_only_new_pictures_run_and_all_features_are_those_of_a_fresh_run(model: CausalLM) -> None:
    """Seven pictures of several shapes, two of them equal, in two calls: each distinct one runs once."""
    cache, counted = ImageFeatureCache(), Counted(model.model.vision_embed_tokens)
    crops, sizes = pictures(model, (1, 1), (2, 1), (1, 2), (2, 2))
    parts = crops.split([2, 3, 3, 5])
    first, first_digests = cache.features(counted, torch.cat([parts[0], parts[1], parts[0]]), sizes[[0, 1, 0]])
    assert counted.num_crops == 5 and first_digests[0] == first_digests[2] != first_digests[1]
    order = [2, 1, 3, 0]
    second, _ = cache.features(counted, torch.cat([parts[place] for place in order]), sizes[order])
    assert counted.num_crops == 13 and (cache.hits, cache.misses) == (3, 4)
    expected = model.image_features(crops, sizes)
    for place, found in [(0, first[0]), (1, first[1]), (0, first[2]), *zip(order, second, strict=True)]:
        # Measured: 0; other machines may round a batch of other crops otherwise (features reach 0.1).
        torch.testing.assert_close(found, expected[place], atol=1e-6, rtol=0)


def test_shape_and_every_pixel_count(model: CausalLM) -> None:
    cache = ImageFeatureCache()
    embedding = model.model.vision_embed_tokens
    crops, sizes = pictures(model, (2, 1))
    changed = crops.clone()
    changed[-1, -1, -1, -1] += 1e-3
    found = [cache.features(embedding, pixels, size)[1] for pixels, size in ((crops, sizes), (changed, sizes))]
    found.append(cache.features(embedding, crops, sizes.flip(1))[1])
    assert len({digest for digests in found for digest in digests}) == 3 and cache.hits == 0


def test_the_sums_of_a_gpu_tell_crops_apart(model: CausalLM) -> None:
    """The hash that runs on a GPU, here on the CPU: equal crops agree, one changed bit or two swapped words do not."""
    cache, dtype = ImageFeatureCache(), torch.bfloat16
    crops = pictures(model, (2, 2))[0].to(dtype)
    flipped, swapped = crops.clone(), crops.clone()
    flipped.view(torch.int16)[3, 1, 0, 0] ^= 1
    swapped[3, 0, 0, :2], swapped[3, 0, 0, 2:4] = crops[3, 0, 0, 2:4], crops[3, 0, 0, :2]
    sums = [cache._sums(one) for one in (crops, crops.clone(), flipped, swapped)]
    assert torch.equal(sums[0], sums[1]) and sums[0].shape == (5, 4)
    for other in sums[2:]:
        same = (sums[0] == other).all(dim=1)
        assert same.tolist() == [True, True, True, False, True]
    assert not torch.equal(ImageFeatureCache()._sums(crops), sums[0]), "factors must be secret, drawn anew"


def test_the_bound_holds_and_the_longest_unused_goes_first(model: CausalLM) -> None:
    embedding = model.model.vision_embed_tokens
    crops, sizes = pictures(model, *[(1, 1)] * 4)
    (one,) = model.image_features(crops[:2], sizes[:1])
    cache = ImageFeatureCache(3 * one.nbytes)
    for place in (0, 1, 2, 0, 3):
        cache.features(embedding, crops[2 * place : 2 * place + 2], sizes[:1])
    assert len(cache) == 3 and cache.num_bytes == 3 * one.nbytes and cache.hits == 1
    cache.features(embedding, crops[:2], sizes[:1])
    assert cache.hits == 2, "used again before the fourth came"
    cache.features(embedding, crops[2:4], sizes[:1])
    assert cache.hits == 2, "the second was the longest unused"
    none = ImageFeatureCache(0)
    none.features(embedding, crops, sizes)
    assert len(none) == 0 and none.num_bytes == 0


def test_changed_weights_empty_the_cache(model: CausalLM) -> None:
    cache, embedding = ImageFeatureCache(), model.model.vision_embed_tokens
    crops, sizes = pictures(model, (1, 1))
    before = cache.features(embedding, crops, sizes)[0][0]
    with torch.no_grad():
        embedding.img_processor.patch_embed.proj.weight.mul_(2)
    after = cache.features(embedding, crops, sizes)[0][0]
    assert cache.hits == 0 and not torch.allclose(before, after)


def test_generation_uses_it_and_copies_of_the_model_start_empty(model: CausalLM) -> None:
    model.image_feature_cache = ImageFeatureCache()
    crops, sizes = pictures(model, (1, 1))
    count = len(model.image_features(crops, sizes)[0])
    ids = torch.tensor([[5, *[-1] * count, 6, 7]])
    batch = {"pixel_values": crops, "image_sizes": sizes, "max_new_tokens": 6, "stop_token_ids": ()}
    first, second = (model.generate(ids, **batch) for _ in range(2))
    assert torch.equal(first, second) and (model.image_feature_cache.hits, model.image_feature_cache.misses) == (1, 1)
    twin = copy.deepcopy(model)
    assert len(twin.image_feature_cache) == 0 and len(model.image_feature_cache) == 1
    model.image_feature_cache = None
    assert torch.equal(model.generate(ids, **batch), first)
    # In training weights may change by ways that leave no trace.
    twin.train().generate(ids, **batch)
    assert twin.image_feature_cache.misses == 0


def test_bad_arguments_are_named(model: CausalLM) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        ImageFeatureCache(-1)
    crops, sizes = pictures(model, (1, 1))
    with pytest.raises(ValueError, match="need 2 crops"):
        ImageFeatureCache().features(model.model.vision_embed_tokens, crops[:1], sizes)
