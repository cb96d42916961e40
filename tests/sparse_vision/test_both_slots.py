"""A model that fills both slots: preset, upcycling, images through sparse layers, saving, generating, training."""

import pytest
import torch
from distributed import run_distributed
from vision_steps import losses_and_weights

import phi35
from moe.upcycling import UpcyclingOptions, upcycle, upcycled_config
from phi35 import presets
from phi35.parameter_count import count_parameters

TINY = "tiny-phi-3.5-vision-moe"


def pictures_and_text(config, seed=0):
    """Two rows, one with two pictures among its text and one with text alone, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    side, grid = config.vision.image_size, config.vision.merged_grid_size
    tokens = 2 * (grid * grid + grid) + 1
    row = [torch.tensor([5, 6]), torch.full((tokens,), -1), torch.tensor([7, 8, 9]), torch.full((tokens,), -2)]
    ids = torch.zeros(2, 2 * tokens + 5, dtype=torch.int64)
    ids[0] = torch.cat(row)
    ids[1, :9] = torch.randint(3, 900, (9,), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(4, 3, side, side, generator=generator),
        "image_sizes": torch.tensor([[side, side], [side, side]]),
    }


def test_the_preset_is_what_upcycling_makes_of_phi_3_5_vision():
    config = presets.get("phi-3.5-vision-moe")
    assert config == upcycled_config(presets.get("phi-3.5-vision"), UpcyclingOptions())
    assert config.is_sparse and config.vision == presets.get("phi-3.5-vision").vision
    count = count_parameters(config)
    # By hand: 15 further copies of 3 matrices of 3,072 x 8,192 in 32 layers, and a router of 16 rows in each.
    experts, routers = 32 * 3 * 3072 * 8192, 32 * 16 * 3072
    assert count.total == 4_146_621_440 + 15 * experts + routers == 40_386_980_864
    assert count.active == 4_146_621_440 + experts + routers == 6_564_113_408


def test_the_small_sparse_model_has_no_more_active_parameters_than_the_packages():
    sparse, dense = (count_parameters(presets.get(name)) for name in ("small-vision-moe", "small-vision"))
    assert 0.97 * dense.active < sparse.active <= dense.active < 0.5 * sparse.total


def test_sparse_kernels_and_a_loop_over_experts_see_the_same_pictures():
    outputs = {}
    for backend in ("loop", "grouped_mm"):
        model = phi35.create(TINY, seed=0, initializer_range=0.1, experts_backend=backend)
        batch = pictures_and_text(model.config)
        with torch.no_grad():
            outputs[backend] = model(**batch)
    assert len(outputs["loop"].router_outputs) == 2
    for layer in outputs["loop"].router_outputs:
        assert layer.expert_indices.shape[1] == 2  # of 4 experts a token passes 2
    # 1e-6 measured at a deviation of 0.8.
    torch.testing.assert_close(outputs["grouped_mm"].logits, outputs["loop"].logits, atol=2e-5, rtol=0)
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    with torch.no_grad():
        assert (model(**other).logits[0] - outputs["loop"].logits[0]).abs().max() > 0.01


def test_saved_under_published_names_of_both_and_loaded_again(tmp_path):
    model = phi35.create(TINY, seed=0, initializer_range=0.1)
    phi35.save(model, None, tmp_path)
    from phi35.checkpoint.reader import read_headers

    names = set(read_headers(tmp_path))
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    assert "model.vision_embed_tokens.img_processor.vision_model.pre_layrnorm.weight" in names
    with pytest.warns(UserWarning, match="no tokenizer.json"):
        loaded, _ = phi35.load(tmp_path, device="cpu", dtype="float32")
    assert loaded.config == model.config
    batch = pictures_and_text(model.config)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    ids = loaded.generate(**batch, max_new_tokens=4, stop_token_ids=())
    assert ids.shape == (2, batch["input_ids"].shape[1] + 4)


@pytest.mark.filterwarnings("ignore:.*with one expert per token and norm_topk_prob")
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_upcycled_vision_model_says_what_the_dense_one_says(tmp_path, top_k):
    dense = phi35.create("tiny-phi-3.5-vision", seed=3, initializer_range=0.1)
    phi35.save(dense, None, tmp_path / "dense")
    options = UpcyclingOptions(num_experts=4, top_k=top_k)
    upcycle(tmp_path / "dense", tmp_path / "sparse", options)
    with pytest.warns(UserWarning, match="no tokenizer.json"):
        sparse, _ = phi35.load(tmp_path / "sparse", device="cpu", dtype="float32")
    batch = pictures_and_text(dense.config)
    with torch.no_grad():
        # 1e-6 measured: other products of the same numbers.
        torch.testing.assert_close(sparse(**batch).logits, dense(**batch).logits, atol=2e-5, rtol=0)


def steps(world_size, **changes):
    """Losses and weights of each rank; without noise, which ranks would draw differently."""
    overrides = {"experts_backend": "loop"}
    return run_distributed(losses_and_weights, world_size, {"model": TINY, "model_overrides": overrides, **changes})


def assert_equal_training(one, ranks, ep_size):
    losses, weights, trained = one
    assert any(".mlp.experts." in name for name in trained) and losses[-1] < losses[0]
    for rank, (got, values, _) in enumerate(ranks):
        assert got == pytest.approx(losses, rel=1e-5)
        for name, value in weights.items():
            if ".mlp.experts." in name and ep_size == 2:
                value = value.chunk(2)[rank]
            # 2e-7 measured.
            torch.testing.assert_close(values[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: name + text)


def test_a_rank_with_pictures_and_one_without_share_experts_and_train_as_one_process():
    (alone,) = steps(1, zero_stage=0)
    assert_equal_training(alone, steps(2, zero_stage=1, ep_size=2), ep_size=2)


def test_the_balance_loss_of_shared_experts_is_that_of_whole_ones():
    """It counts the choices of all ranks, so that it is compared on as many."""
    whole, _ = steps(2, zero_stage=1, ep_size=1, router_aux_loss_coef=0.1)
    assert_equal_training(whole, steps(2, zero_stage=1, ep_size=2, router_aux_loss_coef=0.1), ep_size=2)
