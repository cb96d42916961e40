"""Dense checkpoints turned into sparse ones: function kept, sizes, options, streaming, the command."""

import dataclasses
import functools
import json
import shutil
import weakref

import pytest
import torch
import typer
from published import published_file
from safetensors import safe_open
from typer.testing import CliRunner

import phi35
from moe.upcycling import UpcyclingOptions, _SparseWeights, upcycle, upcycled_config
from phi35 import presets
from phi35.api import SMALL_MODEL
from phi35.checkpoint.rules import CheckpointPlan
from phi35.checkpoint.streaming import StoredWeights
from phi35.checkpoint.writer import write_weights
from phi35.config_io import from_hf_dict, to_hf_dict
from phi35.loading import load_config, load_processor
from phi35.meta_model import meta_model
from phi35.parameter_count import count_parameters

DENSE_PARAMETERS = 3_821_079_552
"""Of phi-3.5-mini."""
FEED_FORWARD = 3 * 3072 * 8192


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with a dense checkpoint, its model, and ids of two rows."""
    model = phi35.create("tiny-phi-3.5-mini", seed=3, initializer_range=0.1)
    folder = tmp_path_factory.mktemp("dense")
    phi35.save(model, load_processor(SMALL_MODEL, model.config), folder, max_shard_size="150KB")
    ids = torch.randint(1000, (2, 12), generator=torch.Generator().manual_seed(0))
    return folder, model, ids


def largest_difference(left, right):
    return (left - right).abs().max().item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1, "num_experts": 8},
        {"top_k": 8, "num_experts": 64, "router_std": 1.0},
        {"router_init": "zeros"},
        {"router_init": "zeros", "norm_topk_prob": False},
        {"every": 2, "num_experts": 4},
        {"shared_expert": True, "num_experts": 4},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
@pytest.mark.filterwarnings("ignore:router_type='topk' with one expert")
@torch.no_grad()
def test_equal_experts_with_normalised_weights_compute_what_the_dense_model_does(dense, options, tmp_path):
    folder, model, ids = dense
    config = upcycle(folder, tmp_path, UpcyclingOptions(**options), max_shard_size="1MB")
    sparse, processor = phi35.load(tmp_path, device="cpu")
    assert sparse.config == config and config.model_type == "phimoe" and processor is not None
    assert config.num_local_experts == options.get("num_experts", 16)
    expected = model(ids).logits
    # Logits have a standard deviation of 0.8; measured: at most 1.5e-6.
    assert expected.std() > 0.5
    assert largest_difference(sparse(ids).logits, expected) < 1e-5


@torch.no_grad()
def test_a_vision_model_becomes_sparse_and_keeps_its_images(tmp_path):
    model = phi35.create("tiny-phi-3.5-vision", seed=3, initializer_range=0.1)
    phi35.save(model, load_processor(SMALL_MODEL, model.config), tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "sparse", UpcyclingOptions(num_experts=4))
    sparse, processor = phi35.load(tmp_path / "sparse", device="cpu")
    assert sparse.config.vision == load_config(tmp_path / "dense").vision and sparse.config.is_sparse
    image = torch.randint(256, (70, 90, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).numpy()
    batch = processor(["What is in <|image_1|>?", "No picture."], images=[[image], []])
    # Measured 1.2e-6.
    assert largest_difference(sparse(**batch).logits, model(**batch).logits) < 1e-5


@torch.no_grad()
def test_half_the_output_takes_away_most_of_what_sparsemixer_adds(dense, tmp_path):
    folder, model, ids = dense
    upcycle(folder, tmp_path / "half", UpcyclingOptions(router_type="sparsemixer", router_std=1.0))
    upcycle(folder, tmp_path / "whole", UpcyclingOptions(router_type="sparsemixer", router_std=1.0, scale=1.0))
    expected = model(ids).logits
    half, whole = (phi35.load(tmp_path / name, device="cpu")[0](ids) for name in ("half", "whole"))
    sums = torch.cat([routing.expert_weights.sum(dim=-1) for routing in whole.router_outputs])
    assert 1.8 < sums.mean() <= 2  # what makes a factor necessary
    # Measured 0.70 and 2.41.
    assert largest_difference(half.logits, expected) < 0.4 * largest_difference(whole.logits, expected)
    with pytest.raises(ValueError, match="sum to 1/E"):
        UpcyclingOptions(router_type="sparsemixer", router_init="zeros")


def test_noise_and_new_units_differ_from_expert_to_expert_and_follow_the_seed(dense, tmp_path):
    folder, model, _ = dense
    for name, options in {
        "noise": {"noise": 0.1},
        "again": {"noise": 0.1},
        "other": {"noise": 0.1, "seed": 1},
        "units": {"reinit": 0.25},
    }.items():
        upcycle(folder, tmp_path / name, UpcyclingOptions(num_experts=4, **options), max_shard_size="200KB")
    state = {
        name: phi35.load(tmp_path / name, device="cpu")[0].state_dict() for name in ("noise", "again", "other", "units")
    }
    for tensor in ("gate_up_proj", "down_proj"):
        copies = model.state_dict()[f"model.layers.1.mlp.{tensor}.weight"]
        noisy = state["noise"][f"model.layers.1.mlp.experts.{tensor}"]
        difference = noisy - copies
        assert difference.std().item() == pytest.approx(0.1 * copies.std().item(), rel=0.02)
        assert torch.corrcoef(difference.flatten(1)).fill_diagonal_(0).abs().max() < 0.05
    assert all(torch.equal(state["noise"][name], state["again"][name]) for name in state["noise"])
    different = {name for name in state["noise"] if not torch.equal(state["noise"][name], state["other"][name])}
    assert different == {name for name in state["noise"] if ".mlp." in name}

    # New units: 32 of 128, the same in gate, up and down, others in each expert.
    gate_up, down = (model.state_dict()[f"model.layers.0.mlp.{name}.weight"] for name in ("gate_up_proj", "down_proj"))
    experts = (state["units"][f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    changed = []
    for its_gate_up, its_down in zip(*experts, strict=True):
        gate, up = (its_gate_up != gate_up).any(dim=1).chunk(2)
        assert torch.equal(gate, up) and torch.equal(gate, (its_down != down).any(dim=0)) and gate.sum() == 32
        assert its_down[:, gate].std().item() == pytest.approx(down.std().item(), rel=0.1)
        changed.append(gate)
    assert len({tuple(one.tolist()) for one in changed}) == 4


def test_phi_3_5_mini_at_full_size_has_the_expected_counts_and_shapes():
    dense = presets.get("phi-3.5-mini")
    config = upcycled_config(dense, UpcyclingOptions())
    model = meta_model(config)
    routers, layers = 32 * 16 * 3072, 32
    count = count_parameters(model)
    assert count_parameters(dense).total == DENSE_PARAMETERS
    assert count.total == DENSE_PARAMETERS + 15 * layers * FEED_FORWARD + routers
    assert count.active == DENSE_PARAMETERS + layers * FEED_FORWARD + routers
    state = model.state_dict()
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp."
        assert {name.removeprefix(mlp): tuple(t.shape) for name, t in state.items() if name.startswith(mlp)} == {
            "router.weight": (16, 3072),
            "experts.gate_up_proj": (16, 16384, 3072),
            "experts.down_proj": (16, 3072, 8192),
        }
    assert state["model.layers.0.self_attn.qkv_proj.weight"].shape == (9216, 3072)
    # Every tensor has one place on disk: 9 of attention, norms and router and 48 of experts in each layer.
    assert len(CheckpointPlan(config).written()) == 3 + layers * (4 + 2 + 1 + 48)
    assert from_hf_dict(to_hf_dict(config)) == config


def test_the_published_mini_keeps_its_function_fields():
    published = json.loads(published_file("configs/phi-3.5-mini-instruct.json").read_text())
    dense = from_hf_dict(published)
    sparse = upcycled_config(dense, UpcyclingOptions())
    assert (sparse.norm_type, sparse.attention_bias, sparse.lm_head_bias) == ("rmsnorm", False, False)
    assert sparse.rope_attention_scaling == dense.rope_attention_scaling
    assert sparse.rope_scaling.long_factor == dense.rope_scaling.long_factor


def test_weights_pass_through_memory_one_tensor_at_a_time(dense, tmp_path):
    folder, _, _ = dense
    weights = StoredWeights(folder, load_config(folder))
    config = upcycled_config(load_config(folder), UpcyclingOptions(num_experts=4))
    tensors = _SparseWeights(config, UpcyclingOptions(num_experts=4, noise=0.1), weights.tensor).deferred(
        weights.dtypes
    )
    alive, most = set(), 0

    def watched(name, make):
        nonlocal most
        tensor = make().clone()
        alive.add(name)
        weakref.finalize(tensor, alive.discard, name)
        most = max(most, len(alive))
        return tensor

    write_weights(
        tmp_path,
        {
            name: dataclasses.replace(tensor, make=functools.partial(watched, name, tensor.make))
            for name, tensor in tensors.items()
        },
    )
    assert most == 1 and not alive  # of 41 tensors, written to one file
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors)


def run_command(*arguments):
    from phi35.cli.upcycle import upcycle as command

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_command_writes_a_folder_that_generates(dense, tmp_path):
    folder, model, _ = dense
    target = tmp_path / "sparse"
    result = run_command(folder, target, "--experts", 4, "--every", 2, "--max-shard-size", "200KB")
    assert result.exit_code == 0 and "4 experts, 1 of 2 layers sparse" in result.output
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert (target / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    written = json.loads((target / "config.json").read_text())
    assert (written["model_type"], written["decoder_sparse_step"], written["torch_dtype"]) == ("phimoe", 2, "float32")
    # The same greedy continuation as the dense model's.
    prompts = ["def", "A red circle"]
    assert phi35.generate(prompt=prompts, model=str(target), max_new_tokens=8, device="cpu") == phi35.generate(
        prompt=prompts, model=str(folder), max_new_tokens=8, device="cpu"
    )


def test_bfloat16_stays_bfloat16(tmp_path):
    phi35.save(phi35.create("tiny-phi-3.5-mini", seed=3, dtype="bfloat16"), None, tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "sparse", UpcyclingOptions(num_experts=4, scale=0.3, reinit=0.1, noise=0.1))
    with safe_open(tmp_path / "sparse" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_sparse_source_a_damaged_one_and_bad_targets_are_refused_before_writing(dense, tmp_path):
    folder, _, _ = dense
    with pytest.raises(ValueError, match="is the source itself"):
        upcycle(folder, folder, UpcyclingOptions())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file: give another folder"):
        upcycle(folder, tmp_path / "file", UpcyclingOptions())
    upcycle(folder, tmp_path / "sparse", UpcyclingOptions(num_experts=4))
    with pytest.raises(ValueError, match="starts from a dense model; this one has 4 experts"):
        upcycle(tmp_path / "sparse", tmp_path / "again", UpcyclingOptions())
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors.index.json").unlink()
    next((tmp_path / "damaged").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="not one complete set"):
        upcycle(tmp_path / "damaged", tmp_path / "again", UpcyclingOptions())
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        upcycle(folder, tmp_path / "again", UpcyclingOptions(num_experts=4, top_k=5))
    assert not (tmp_path / "again").exists()


def test_all_bad_options_are_named_at_once():
    with pytest.raises(ValueError) as raised:
        UpcyclingOptions(num_experts=1, router_init="ones", noise=-1, reinit=2, scale=0)
    for name in ("num_experts", "router_init", "noise", "reinit", "scale"):
        assert name in str(raised.value)
