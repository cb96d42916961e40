"""The image path from crops to embeddings, against a loop that builds every position by itself."""

import pytest
import torch
from images import IMAGE_TOKEN, random_crops, randomise, small_config, with_vision
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vision.embedding import VisionEmbedding
from vision.image_transform import num_image_tokens
from vision.projector import end_rows, join_tiles, merge_patches

CONFIG = small_config()
GRIDS = [(1, 2), (2, 2), (1, 2), (1, 1), (3, 1)]


@pytest.fixture(scope="module")
def embedding() -> VisionEmbedding:
    embedding = VisionEmbedding(CONFIG).eval()
    randomise(embedding)
    return embedding


def naive_features(embedding: VisionEmbedding, crops: Tensor, grid: tuple[int, int]) -> Tensor:
    """(tokens, D) of one picture, position by position."""
    patches = CONFIG.vision.grid_size
    tower_output = embedding.img_processor(crops)

    def merged_vector(crop: int, row: int, column: int) -> Tensor:
        parts = []
        for down in (0, 1):
            for right in (0, 1):
                parts.append(tower_output[crop, (2 * row + down) * patches + 2 * column + right])
        return torch.cat(parts)

    side = patches // 2
    vectors = []
    for row in range(grid[0] * side):
        for column in range(grid[1] * side):
            tile = 1 + (row // side) * grid[1] + column // side
            vectors.append(merged_vector(tile, row % side, column % side))
        vectors.append(embedding.sub_GN.flatten())
    vectors.append(embedding.glb_GN.flatten())
    for row in range(side):
        vectors += [merged_vector(0, row, column) for column in range(side)]
        vectors.append(embedding.sub_GN.flatten())
    first, _, second = embedding.img_projection
    hidden = F.gelu(torch.stack(vectors) @ first.weight.T + first.bias, approximate="none")
    return hidden @ second.weight.T + second.bias


def test_features_equal_a_loop_over_positions(embedding):
    pixel_values, image_sizes = random_crops(CONFIG, GRIDS)
    with torch.no_grad():
        features = embedding.features(pixel_values, image_sizes)
        start, deviation, worst = 0, 0.0, 0.0
        for grid, size, result in zip(GRIDS, image_sizes.tolist(), features, strict=True):
            crops = pixel_values[start : start + 1 + grid[0] * grid[1]]
            start += len(crops)
            expected = naive_features(embedding, crops, grid)
            assert result.shape == expected.shape == (num_image_tokens(*size, CONFIG.vision), CONFIG.hidden_size)
            worst = max(worst, (result - expected).abs().max().item())
            deviation = expected.std().item()
    assert deviation > 0.02
    assert worst < 1e-5 * max(1.0, deviation), worst  # measured: 1.2e-7 at a deviation of 0.19


def test_a_forgotten_permute_of_the_tiles_would_show(embedding, monkeypatch):
    pixel_values, image_sizes = random_crops(CONFIG, [(2, 2)])

    def joined_wrongly(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
        return tiles.reshape(-1, grid[0] * tiles.shape[1], grid[1] * tiles.shape[2], tiles.shape[3])

    with torch.no_grad():
        (right,) = embedding.features(pixel_values, image_sizes)
        monkeypatch.setattr("vision.embedding.join_tiles", joined_wrongly)
        (wrong,) = embedding.features(pixel_values, image_sizes)
    assert (right - wrong).abs().max() > 0.01  # a thousandfold of the tolerance above; measured: 1.0


def test_features_of_a_batch_equal_those_of_each_picture_alone(embedding):
    pixel_values, image_sizes = random_crops(CONFIG, GRIDS)
    with torch.no_grad():
        together = embedding.features(pixel_values, image_sizes)
        start = 0
        for (rows, columns), size, result in zip(GRIDS, image_sizes, together, strict=True):
            crops = pixel_values[start : start + 1 + rows * columns]
            start += len(crops)
            (alone,) = embedding.features(crops, size[None])
            torch.testing.assert_close(result, alone, atol=1e-6, rtol=0)  # measured: 0
        listed = embedding.features(pixel_values, image_sizes.tolist())
        assert all(torch.equal(a, b) for a, b in zip(together, listed, strict=True))


def test_merge_join_and_row_ends_by_hand():
    # one crop of 4 x 4 patches with values 0..15
    merged = merge_patches(torch.arange(16.0).view(1, 16, 1))
    assert merged.tolist() == [[[[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 12, 13], [10, 11, 14, 15]]]]
    # two tiles of 2 x 2 side by side, then one above the other
    tiles = torch.arange(8.0).view(2, 2, 2, 1)
    assert join_tiles(tiles, (1, 2)).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert join_tiles(tiles, (2, 1)).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    rows = end_rows(join_tiles(tiles, (1, 2)), torch.full((1, 1, 1, 1), -1.0))
    assert rows.flatten().tolist() == [0, 1, 4, 5, -1, 2, 3, 6, 7, -1]


def naive_scatter(input_ids: Tensor, inputs_embeds: Tensor, per_row: list[list[Tensor]]) -> Tensor:
    """Puts features in place one position at a time, counting each tag's occurrences."""
    result = inputs_embeds.clone()
    for row, features in enumerate(per_row):
        used = [0] * len(features)
        for column, token in enumerate(input_ids[row].tolist()):
            if token < 0:
                image = -token - 1
                result[row, column] = features[image][used[image] % len(features[image])]
                used[image] += 1
    return result


def test_features_stand_where_their_tags_are(embedding):
    pixel_values, image_sizes = random_crops(CONFIG, [(1, 2), (1, 1), (2, 1)])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        first, second, third = embedding.features(pixel_values, image_sizes)
        a, b, c = len(first), len(second), len(third)
        rows = [
            [5] * 2 + [-2] * b + [7] + [-1] * a + [8],  # swapped
            [9] * 4,  # no image
            [-1] * c + [4] + [-1] * c,  # repeated
        ]
        length = max(map(len, rows))
        input_ids = torch.tensor([[1000] * (length - len(ids)) + ids for ids in rows])
        inputs_embeds = torch.randn(3, length, CONFIG.hidden_size, generator=generator)
        before = inputs_embeds.clone()
        result = embedding(input_ids, inputs_embeds, pixel_values, image_sizes)
        assert torch.equal(inputs_embeds, before)
        assert torch.equal(result, naive_scatter(input_ids, inputs_embeds, [[first, second], [], [third]]))
        given = embedding(input_ids, inputs_embeds, image_features=[first, second, third])
        assert torch.equal(result, given)
        counted = embedding(input_ids, inputs_embeds, pixel_values, image_sizes, num_images=[2, 0, 1])
        assert torch.equal(result, counted)


def test_image_token_ids_give_what_tags_in_order_give(embedding):
    pixel_values, image_sizes = random_crops(CONFIG, [(1, 2), (1, 1)])
    a, b = (num_image_tokens(*size, CONFIG.vision) for size in image_sizes.tolist())
    tagged = torch.tensor([[5] + [-1] * a + [-2] * b + [6], [7] * (a + b + 2)])
    in_order = tagged.masked_fill(tagged < 0, IMAGE_TOKEN)
    inputs_embeds = torch.randn(*tagged.shape, CONFIG.hidden_size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = embedding(tagged, inputs_embeds, pixel_values, image_sizes)
        assert torch.equal(embedding(in_order, inputs_embeds, pixel_values, image_sizes), expected)


def test_without_images_nothing_changes(embedding):
    # a stray image token id, as a model may write it, is text
    input_ids = torch.tensor([[1, 5, IMAGE_TOKEN], [7, 8, 9]])
    inputs_embeds = torch.randn(2, 3, CONFIG.hidden_size)
    none, no_sizes = torch.zeros(0, 3, 64, 64), torch.zeros(0, 2, dtype=torch.int64)
    assert embedding(input_ids, inputs_embeds) is inputs_embeds
    assert torch.equal(embedding(input_ids, inputs_embeds, none, no_sizes), inputs_embeds)
    one_token = embedding(torch.tensor([[IMAGE_TOKEN]]), inputs_embeds[:1, :1])
    assert torch.equal(one_token, inputs_embeds[:1, :1])


def test_training_without_images_runs_the_tower_and_changes_nothing():
    embedding = VisionEmbedding(CONFIG)
    randomise(embedding)
    calls: list[tuple[int, ...]] = []
    embedding.img_processor.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    inputs_embeds = torch.randn(2, 3, CONFIG.hidden_size, requires_grad=True)
    result = embedding(torch.ones(2, 3, dtype=torch.int64), inputs_embeds)
    assert torch.equal(result, inputs_embeds) and calls == [(1, 3, 64, 64)]
    result.sum().backward()
    for name, parameter in embedding.named_parameters():
        used = name not in embedding.unused_parameter_names
        assert (parameter.grad is not None) == used == parameter.requires_grad, name
        assert not used or not parameter.grad.any(), name
    assert torch.equal(inputs_embeds.grad, torch.ones_like(inputs_embeds))
    embedding.eval()(torch.ones(2, 3, dtype=torch.int64), inputs_embeds)
    assert len(calls) == 1
    embedding.run_tower_always = True
    embedding(torch.ones(2, 3, dtype=torch.int64), inputs_embeds)
    assert len(calls) == 2


def test_gradients_reach_every_used_part_and_only_the_tokens_that_stay():
    embedding = VisionEmbedding(CONFIG)
    randomise(embedding)
    pixel_values, image_sizes = random_crops(CONFIG, [(1, 2)])
    tokens = num_image_tokens(*image_sizes[0].tolist(), CONFIG.vision)
    input_ids = torch.tensor([[5] + [-1] * tokens + [6]])
    inputs_embeds = torch.randn(1, tokens + 2, CONFIG.hidden_size, requires_grad=True)
    embedding(input_ids, inputs_embeds, pixel_values, image_sizes).square().sum().backward()
    for name, parameter in embedding.named_parameters():
        if name in embedding.unused_parameter_names:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().sum() > 0, name
    assert inputs_embeds.grad[0, [0, -1]].all() and not inputs_embeds.grad[0, 1:-1].any()


def test_gradients_equal_finite_differences():
    narrow = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = small_config(**narrow, rope_scaling=None, max_position_embeddings=4096)
    config = with_vision(text, image_size=8, patch_size=2, hidden_size=4, intermediate_size=8, num_attention_heads=2)
    embedding = VisionEmbedding(config).double()
    randomise(embedding, scale=0.3)
    pixel_values, image_sizes = random_crops(config, [(1, 2), (1, 1)])
    features = [num_image_tokens(*size, config.vision) for size in image_sizes.tolist()]
    input_ids = torch.tensor([[-2] * features[1] + [3] + [-1] * features[0] + [-2] * features[1]])
    embeds = torch.randn(1, input_ids.shape[1], 8, dtype=torch.float64, requires_grad=True)
    used = [parameter for parameter in embedding.parameters() if parameter.requires_grad]

    def loss(embeds: Tensor, *_: Tensor) -> Tensor:
        return embedding(input_ids, embeds, pixel_values.double(), image_sizes).sin().sum()

    assert torch.autograd.gradcheck(loss, (embeds, *used), eps=1e-6, atol=1e-6, fast_mode=True)


def test_a_loss_over_a_batch_gives_the_sum_of_the_gradients_of_its_rows():
    embedding = VisionEmbedding(CONFIG).double()
    randomise(embedding)
    grids = [(1, 2), (1, 1)]
    pixel_values, image_sizes = random_crops(CONFIG, grids)
    a, b = (num_image_tokens(*size, CONFIG.vision) for size in image_sizes.tolist())
    rows = [[5] + [-1] * a, [6] * (1 + a - b) + [-1] * b]
    embeds = torch.randn(2, a + 1, CONFIG.hidden_size, dtype=torch.float64)

    def gradients(chosen: list[int], which: slice) -> list[Tensor]:
        embedding.zero_grad()
        ids, crops = torch.tensor([rows[row] for row in chosen]), pixel_values[which].double()
        out = embedding(ids, embeds[chosen], crops, image_sizes[chosen])
        out.square().sum().backward()
        return [parameter.grad.clone() for parameter in embedding.parameters() if parameter.requires_grad]

    both = gradients([0, 1], slice(None))
    for together, first, second in zip(both, gradients([0], slice(0, 3)), gradients([1], slice(3, 5)), strict=True):
        torch.testing.assert_close(together, first + second, atol=1e-10, rtol=1e-10)  # measured: 1.4e-14


def test_half_precision_keeps_the_dtype_of_the_embeddings(embedding):
    half = VisionEmbedding(CONFIG).bfloat16().eval()
    half.load_state_dict(embedding.state_dict())
    pixel_values, image_sizes = random_crops(CONFIG, [(1, 1)])
    tokens = num_image_tokens(*image_sizes[0].tolist(), CONFIG.vision)
    input_ids = torch.full((1, tokens), -1)
    with torch.no_grad():
        expected = embedding(input_ids, torch.zeros(1, tokens, CONFIG.hidden_size), pixel_values, image_sizes)
        zeros = torch.zeros(1, tokens, CONFIG.hidden_size, dtype=torch.bfloat16)
        result = half(input_ids, zeros, pixel_values, image_sizes)
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).abs().max() < 0.1 * expected.std()  # measured: 0.03 of it


def test_mismatches_name_both_counts(embedding):
    pixel_values, image_sizes = random_crops(CONFIG, [(1, 2), (1, 1)])
    a, b = (num_image_tokens(*size, CONFIG.vision) for size in image_sizes.tolist())
    input_ids = torch.tensor([[-1] * a + [-2] * b])
    embeds = torch.zeros(1, a + b, CONFIG.hidden_size)
    cases = [
        ((input_ids, embeds, pixel_values[:-1], image_sizes), r"2 images need 5 crops.*\(4, 3, 64, 64\)"),
        ((input_ids, embeds, pixel_values, image_sizes[:1]), "1 images need 3 crops"),
        ((input_ids, embeds, pixel_values, None), "image_sizes"),
        ((input_ids, embeds, pixel_values, image_sizes[0]), "image_sizes"),
        ((input_ids, embeds, pixel_values, image_sizes + 1), "multiples of the tile side 64"),
        ((input_ids, embeds, None, image_sizes), "image_sizes of 2 images came without pixel_values"),
        ((input_ids, embeds, pixel_values[:, :, :32], image_sizes), r"expected pixel_values \(C, 3, 64, 64\)"),
        ((input_ids, embeds), f"{a + b} image placeholders, but 0 images"),
        ((torch.full((1, 60), IMAGE_TOKEN), embeds[:, :60]), "60 image placeholders, but 0 images"),
        ((torch.full_like(input_ids, -1), embeds, pixel_values, image_sizes), "ask for 1 images.*2 came"),
        ((input_ids[:, 1:], embeds[:, 1:], pixel_values, image_sizes), f"{a - 1} placeholders.*{a} features"),
        ((input_ids, embeds, pixel_values, image_sizes, [embeds[0]]), "not both"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            embedding(*arguments)


def test_a_text_config_is_refused():
    with pytest.raises(ValueError, match="phi-3.5-vision"):
        VisionEmbedding(CONFIG.replace(vision=None))


class ReadsOfValues(TorchDispatchMode):
    """Names of the operations that ask for values, or copy from the host, after the tower has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.tower_runs = False
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = str(operation)
        self.tower_runs |= "convolution" in name
        if self.tower_runs and any(part in name for part in ("local_scalar", "nonzero", "lift_fresh")):
            self.names.append(name)
        return operation(*arguments, **(keywords or {}))


def test_nothing_waits_for_the_towers_work(embedding):
    """On a GPU a read of values between tower and decoder would keep the host from queueing the decoder."""
    pixel_values, image_sizes = random_crops(CONFIG, [(1, 2), (1, 1), (1, 2)])
    rows = [[-1] * num_image_tokens(*size, CONFIG.vision) for size in image_sizes.tolist()]
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [7] * (length + 1 - len(row)) for row in rows])
    with torch.no_grad(), ReadsOfValues() as reads:
        embedding(input_ids, torch.zeros(3, length + 1, CONFIG.hidden_size), pixel_values, image_sizes)
    assert reads.tower_runs and reads.names == []
