"""What a generation asks of its model before the first token: the answers of torch's own, slower walks."""

import pytest
import torch
from torch import nn

import phi35
from phi35.generation.decoding import Decoding
from phi35.generation.fast_step import fingerprint, model_limit
from phi35.model import CausalLM
from phi35.module_walk import set_evaluation, stored_tensors, walk

PRESETS = ("tiny-phi-3.5-mini", "tiny-phi-3.5-moe", "tiny-phi-3.5-vision")


class Waiting(nn.Linear):
    waits_for_host = True


@pytest.mark.parametrize("name", PRESETS)
def test_a_walk_meets_all_modules_and_all_that_is_stored(name: str) -> None:
    model = phi35.create(name, seed=0)
    model.model.norm.register_buffer("kept", torch.zeros(1))
    model.model.norm.register_buffer("passing", torch.zeros(1), persistent=False)
    model.model.norm.register_buffer("empty", None)
    met = walk(model)
    assert len(met) == len(set(met)) and set(met) == set(model.modules())
    stored = {id(tensor) for tensor in stored_tensors(model)}
    assert stored == {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}


def test_what_is_left_out_is_left_out_with_all_below_it() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), Waiting(2, 2))
    inner[1].below = nn.Linear(2, 2)
    found = walk(inner, stop=lambda module: isinstance(module, Waiting))
    assert found == [inner, inner[0]]
    kept = stored_tensors(inner, stop=lambda module: isinstance(module, Waiting))
    assert {id(tensor) for tensor in kept} == {id(inner[0].weight), id(inner[0].bias)}


def test_a_moved_weight_changes_the_fingerprint_and_weights_on_two_devices_are_named() -> None:
    model = phi35.create("tiny-phi-3.5-vision", seed=0).eval()
    before = fingerprint(model)
    assert before == fingerprint(model) and model_limit(model) is None
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert fingerprint(model) != before
    layer.to("meta")
    assert "cpu" in str(model_limit(model)) and "meta" in str(model_limit(model))
    waiting = Waiting(2, 2)
    waiting.below = layer
    model.model.layers[1].mlp.down_proj = waiting.to("meta")
    assert model_limit(model) is None


def test_a_part_left_in_training_mode_is_put_right() -> None:
    model = phi35.create("tiny-phi-3.5-mini", seed=0).eval()
    model.model.layers[1].mlp.train()
    set_evaluation(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("side", ["left", "right", "within"])
def test_rows_with_pictures_keep_the_embeddings_of_their_real_tokens(side: str) -> None:
    """Padding left, right and, as no processor makes it, between: the texts are those of the prompt alone."""
    model: CausalLM = phi35.create("tiny-phi-3.5-vision", seed=0).eval()
    side_length = model.config.vision.image_size
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, side_length, side_length, generator=generator)
    sizes = torch.tensor([[side_length, side_length]])
    features = len(model.image_features(pixels, sizes)[0])
    alone = torch.tensor([[1, *[-1] * features, 7, 8, 9]])
    padding = {"left": [0], "right": [alone.shape[1]], "within": [alone.shape[1] - 2]}[side] * 3
    ids, mask = alone[0].tolist(), [1] * alone.shape[1]
    for place in padding:
        ids.insert(place, 0)
        mask.insert(place, 0)
    texts = []
    for row, kept in ((alone, torch.ones_like(alone)), (torch.tensor([ids]), torch.tensor([mask]))):
        decoding = Decoding(model, row, kept, pixels, sizes, max_new_tokens=6, stop_token_ids=())
        assert len(decoding.rows[0].embeds) == alone.shape[1]
        while not decoding.done:
            decoding.step()
        texts.append((decoding.new_ids(0), decoding.rows[0].embeds))
    assert texts[0][0] == texts[1][0] and torch.equal(texts[0][1], texts[1][1])
