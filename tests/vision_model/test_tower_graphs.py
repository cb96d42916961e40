"""The tower from CUDA graphs: the modules' own bits, and none where a graph could not know what they do."""

import copy
import pickle

import pytest
import torch
from images import random_crops, randomise, small_config
from torch import nn

from phi35.model import CausalLM
from vision.tower_graphs import MOST_CROPS, TowerGraphs, module_problem, problem

CONFIG = small_config()


def small_model() -> CausalLM:
    model = CausalLM(CONFIG)
    randomise(model)
    return model.eval()


def crops(count: int, seed: int = 0) -> torch.Tensor:
    side = CONFIG.vision.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_what_no_graph_holds_is_named_and_runs_as_it_is() -> None:
    tower = small_model().model.vision_embed_tokens.img_processor
    graphs = TowerGraphs()
    assert module_problem(tower) is None and "cpu" in str(problem(tower, crops(1)))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(graphs(tower, crops(2)), tower(crops(2)))
    assert len(graphs) == 0 and graphs.num_replays == 0
    handle = tower.blocks[1].register_forward_hook(lambda *_: None)
    assert "hooks" in str(module_problem(tower))
    handle.remove()
    tower.blocks[0].train()
    assert "training" in str(module_problem(tower))
    tower.eval()

    class Switched(nn.Linear):
        pass

    Switched.__module__ = "peft.tuners.lora.layer"
    tower.blocks[0].mlp.fc1 = Switched(2, 2).eval()
    assert "Switched of peft" in str(module_problem(tower))


def test_graphs_are_wanted_within_the_context_alone() -> None:
    embedding = small_model().model.vision_embed_tokens
    assert not embedding._from_graphs
    with pytest.raises(RuntimeError, match="stop"), embedding.tower_from_graphs():
        assert embedding._from_graphs
        with embedding.tower_from_graphs(False):
            assert not embedding._from_graphs
        assert embedding._from_graphs
        raise RuntimeError("stop")
    assert not embedding._from_graphs


def test_copies_and_pickles_hold_no_graphs() -> None:
    graphs = TowerGraphs()
    graphs.num_replays = 3
    assert copy.deepcopy(graphs).num_replays == 0 and pickle.loads(pickle.dumps(graphs)).num_replays == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_graphs_give_the_bits_of_the_modules(dtype: torch.dtype) -> None:
    """Many numbers of crops in turn; then moved weights, and weights written in place."""
    model = small_model().to("cuda", dtype)
    tower, graphs = model.model.vision_embed_tokens.img_processor, TowerGraphs()
    expected = {count: tower(crops(count, count).to("cuda", dtype)) for count in range(1, MOST_CROPS + 2)}
    for turn in range(3):
        for count, features in expected.items():
            assert torch.equal(graphs(tower, crops(count, count).to("cuda", dtype)), features), (turn, count)
    assert len(graphs) == MOST_CROPS and graphs.num_replays == 2 * MOST_CROPS
    tower.norm_pre.weight.mul_(1.5)
    changed = tower(crops(MOST_CROPS).to("cuda", dtype))
    assert torch.equal(graphs(tower, crops(MOST_CROPS).to("cuda", dtype)), changed)
    assert graphs.num_replays == 2 * MOST_CROPS + 1
    tower.norm_pre.weight = nn.Parameter(2 * tower.norm_pre.weight)
    moved = tower(crops(MOST_CROPS).to("cuda", dtype))
    assert torch.equal(graphs(tower, crops(MOST_CROPS).to("cuda", dtype)), moved)
    assert graphs.num_replays == 2 * MOST_CROPS + 1 and len(graphs) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generations_take_the_tower_from_graphs_and_keep_their_text() -> None:
    model = small_model().to("cuda", torch.bfloat16)
    pixels, sizes = random_crops(CONFIG, [(1, 2)])
    features = len(model.image_features(pixels.cuda(), sizes)[0])
    ids = torch.tensor([[1, *[-1] * features, 7, 8]])
    options = {"pixel_values": pixels, "image_sizes": sizes, "max_new_tokens": 8, "stop_token_ids": ()}
    graphs = model.model.vision_embed_tokens._graphs
    texts = [model.generate(ids, **options).tolist() for _ in range(4)]
    assert all(text == texts[0] for text in texts) and graphs.num_replays == 3
    model.generate(ids, fast=False, **options)
    assert graphs.num_replays == 3
