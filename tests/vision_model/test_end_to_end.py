"""Pictures through the whole model: batches with different numbers of images against each row alone."""

import numpy as np
import pytest
import torch
from images import random_crops, randomise, small_config
from torch import Tensor

from phi35.model import CausalLM
from vision.image_transform import ImageTransform

CONFIG = small_config()


@pytest.fixture(scope="module")
def model() -> CausalLM:
    model = CausalLM(CONFIG).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Rows with 2 (swapped), 0 and 1 images, padded on the left."""
    transform = ImageTransform(CONFIG.vision)
    generator = np.random.default_rng(0)
    sizes = ((40, 90, 3), (64, 64, 3), (120, 50, 3))
    limits = (2, 1, 4)
    crops = [
        transform(generator.integers(0, 256, size, dtype=np.uint8), limit)
        for size, limit in zip(sizes, limits, strict=True)
    ]
    a, b, c = (image.num_tokens for image in crops)
    rows = [
        [1, 1010] + [-2] * b + [70, 71] + [-1] * a + [72, 1007, 1001],
        [1, 1010, 50, 51, 52, 53, 1007, 1001],
        [1, 1010] + [-1] * c + [60, 61, 1007, 1001],
    ]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[1000] * (length - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows]),
        "pixel_values": torch.cat([image.pixel_values for image in crops]),
        "image_sizes": torch.tensor([image.image_size for image in crops]),
        "crops": torch.tensor([len(image.pixel_values) for image in crops]),
    }


def row_alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    real = batch["attention_mask"][row].bool()
    inputs = {"input_ids": batch["input_ids"][row, real][None]}
    first, last = ((0, 2), (2, 2), (2, 3))[row]
    if last > first:
        start, end = batch["crops"][:first].sum(), batch["crops"][:last].sum()
        inputs |= {"pixel_values": batch["pixel_values"][start:end], "image_sizes": batch["image_sizes"][first:last]}
    return inputs


def test_logits_of_a_batch_equal_those_of_each_row_alone(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "crops"}
    with torch.no_grad():
        together = model(**inputs).logits
        for row in range(3):
            alone = model(**row_alone(batch, row)).logits[0]
            deviation = alone.std().item()
            error = (together[row, batch["attention_mask"][row].bool()] - alone).abs().max().item()
            assert error < 1e-5 * max(1.0, deviation), (row, error)  # measured: 6e-7 at a deviation of 0.41


def test_pictures_matter_and_so_does_the_tag(model, batch):
    inputs = row_alone(batch, 0)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        black = model(**inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits[0, -1]
        # the published code splices in the order of the list and would take any tag for any picture
        mirrored = inputs["input_ids"].clone()
        mirrored[inputs["input_ids"] == -1], mirrored[inputs["input_ids"] == -2] = -2, -1
        with pytest.raises(ValueError, match="placeholders"):
            model(**inputs | {"input_ids": mirrored})
    assert (logits - black).abs().max() > 0.01


def test_swapping_tags_and_pictures_together_changes_nothing(model):
    pixel_values, image_sizes = random_crops(CONFIG, [(1, 2), (1, 2)])
    tokens = 3 * 16 + 1 + 2 * 4
    ids = torch.tensor([[1] + [-1] * tokens + [9] + [-2] * tokens + [8, 7]])
    swapped = torch.where(ids == -1, -2, torch.where(ids == -2, -1, ids))
    with torch.no_grad():
        first = model(input_ids=ids, pixel_values=pixel_values, image_sizes=image_sizes).logits
        crossed = pixel_values.view(2, 3, 3, 64, 64).flip(0).flatten(0, 1)
        second = model(input_ids=swapped, pixel_values=crossed, image_sizes=image_sizes.flip(0)).logits
        other = model(input_ids=swapped, pixel_values=pixel_values, image_sizes=image_sizes).logits
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)  # measured: 0
    assert (first - other).abs().max() > 1e-3


def test_cached_steps_equal_the_whole_pass(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "crops"}
    more = torch.tensor([[5, 1044], [6, 20], [7, 21]])  # a written image token id is text
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    with torch.no_grad():
        whole = model(**inputs | {"input_ids": ids, "attention_mask": mask}).logits[:, -2:]
        cache = model(**inputs, use_cache=True).past_key_values
        steps = [model(input_ids=more[:, step : step + 1], past_key_values=cache).logits for step in (0, 1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=0)  # measured: 6e-7


def test_one_training_step_reaches_every_trainable_parameter(batch):
    model = CausalLM(CONFIG).train()
    randomise(model)
    inputs = {name: value for name, value in batch.items() if name != "crops"}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


def test_a_text_batch_trains_with_the_gradients_of_a_text_model(batch):
    model = CausalLM(CONFIG).train()
    randomise(model)
    text_model = CausalLM(CONFIG.replace(vision=None)).train()
    missing, unexpected = text_model.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.startswith("model.vision_embed_tokens.") for name in unexpected)
    ids = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 10, 11, 12]])
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, text_model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, parameter in text_model.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad), name
    for name, parameter in model.model.vision_embed_tokens.named_parameters():
        assert not parameter.requires_grad or not parameter.grad.any(), name


def test_image_features_are_those_the_decoder_reads(model, batch):
    features = model.image_features(batch["pixel_values"], batch["image_sizes"])
    is_first, is_second = batch["input_ids"] == -1, batch["input_ids"] == -2
    assert [len(feature) for feature in features] == [is_first[0].sum(), is_second[0].sum(), is_first[2].sum()]
    with torch.no_grad():
        embeds = model.model.embed_tokens(batch["input_ids"].clamp(min=0))
        inside = model.model.vision_embed_tokens(batch["input_ids"], embeds, image_features=features)
        inputs = {name: value for name, value in batch.items() if name != "crops"}
        expected = model(**inputs).logits
        given = model(inputs_embeds=inside, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)  # measured: 0


def test_checkpointing_the_model_reaches_the_tower_and_changes_no_gradient(batch: dict[str, Tensor]) -> None:
    model = CausalLM(CONFIG).train()
    randomise(model)
    inputs = {key: value for key, value in batch.items() if key != "crops"}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    grads = []
    for enabled in (False, True):
        model.gradient_checkpointing = enabled
        assert model.model.vision_embed_tokens.img_processor.gradient_checkpointing is enabled
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*grads, strict=True))
