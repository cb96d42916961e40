"""Experts counted for image tokens and text tokens."""

import pytest
import torch

import phi35
from moe.token_kinds import KindCounts, count_by_kind, plot_by_kind


def test_counts_are_those_of_a_loop_over_tokens():
    model = phi35.create("tiny-phi-3.5-vision-moe", seed=0, initializer_range=0.3)
    ids = torch.tensor([[5, *[-1] * 41, 7, 8], [9] * 30 + [0] * 14])
    side = model.config.vision.image_size
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    ids = torch.cat((ids[:, :1], torch.full((2, 0), 1), ids[:, 1:]), dim=1)
    grid = model.config.vision.merged_grid_size
    tokens = 2 * (grid * grid + grid) + 1
    assert tokens == 41
    with torch.no_grad():
        output = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)),
            image_sizes=torch.tensor([[side, side]]),
        )
    counts = count_by_kind(output.router_outputs, ids, mask)
    for layer, routing in enumerate(output.router_outputs):
        image, text = torch.zeros(4), torch.zeros(4)
        for row in range(2):
            for place in range(ids.shape[1]):
                if mask[row, place]:
                    for expert in routing.expert_indices[row * ids.shape[1] + place].tolist():
                        (image if ids[row, place] < 0 else text)[expert] += 1
        assert torch.equal(counts.image[layer], image) and torch.equal(counts.text[layer], text)
    assert (counts.image.sum(1) == 2 * 41).all() and (counts.text.sum(1) == 2 * 33).all()
    twice = counts + counts
    assert torch.equal(twice.image, 2 * counts.image) and torch.equal(twice.separation(), counts.separation())


def test_separation_is_none_where_kinds_agree_and_full_where_they_share_nothing():
    counts = KindCounts(torch.tensor([[2.0, 6.0], [5.0, 0.0]]), torch.tensor([[1.0, 3.0], [0.0, 7.0]]))
    assert counts.separation().tolist() == [0.0, 1.0]
    image, text = counts.shares()
    assert image.tolist() == [[0.25, 0.75], [1.0, 0.0]] and text.tolist() == [[0.25, 0.75], [0.0, 1.0]]
    with pytest.raises(ValueError, match="no image token was counted"):
        KindCounts(torch.zeros(1, 2), torch.ones(1, 2)).shares()


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    counts = KindCounts(torch.rand(3, 8) + 0.1, torch.rand(3, 8) + 0.1)
    plot_by_kind(counts, tmp_path / "made" / "experts.png", "a title")
    assert (tmp_path / "made" / "experts.png").read_bytes().startswith(b"\x89PNG")
