"""Runs that train an adapter alone: what they save, how they resume, what they export."""

import shutil

import pytest
import torch
from distributed import run_distributed
from picture_shards import write_picture_shards
from training_runs import settings, tensors_of, text_files, train_and_read

import phi35
from phi35.adapters.files import load_adapter
from phi35.adapters.inject import is_adapter
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.convert import quantize
from phi35.training.config import TrainingConfig
from phi35.training.export import export
from phi35.training.run import train

ADAPTER = {"rank": 4, "alpha": 8, "dropout": 0.1}
IDS = torch.randint(0, 1000, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return text_files(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("world_size", "model", "changes"),
    [
        (1, "tiny-phi-3.5-moe", {"dtype": "bfloat16"}),
        (2, "tiny-phi-3.5-mini", {"zero_stage": 3, "adapter": {**ADAPTER, "dora": True}}),
    ],
    ids=["moe-bf16", "mini-dora-zero3"],
)
def test_three_steps_and_three_more_equal_six_to_the_bit(text_folder, tmp_path, world_size, model, changes):
    values = settings(text_folder, tmp_path / "straight", model=model, **{"adapter": ADAPTER, **changes})
    (expected, *_) = run_distributed(train_and_read, world_size, values)
    parted = tmp_path / "parted"
    (parted / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "straight" / "checkpoints" / "step-00000003", parted / "checkpoints" / "step-00000003")
    (resumed, *_) = run_distributed(train_and_read, world_size, {**values, "output_dir": str(parted)})
    assert {step: loss for step, loss in resumed.items() if step > 3} == {
        step: loss for step, loss in expected.items() if step > 3
    }
    first, second = (tensors_of(folder / "checkpoints" / "step-00000006") for folder in (tmp_path / "straight", parted))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(is_adapter(name) for _, name in first), "beside an adapter nothing else is saved"
    changed = tensors_of(parted / "checkpoints" / "step-00000003")
    assert any(not torch.equal(first[key], changed[key]) for key in first if key[0] == "parameter")


def test_two_processes_make_the_steps_of_one(text_folder, tmp_path):
    """Router's sampling off, so that the noise of a rank's own rows does not part them."""
    still = {"router_type": "topk", "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
    common = {"model": "tiny-phi-3.5-moe", "model_overrides": still, "adapter": {"rank": 4, "alpha": 8}}
    common |= {"router_aux_loss_coef": 0.01, "save_interval": 0}
    one = settings(text_folder, tmp_path / "one", **common, zero_stage=0)
    two = settings(text_folder, tmp_path / "two", **common, zero_stage=2)
    (expected,), (got, _) = run_distributed(train_and_read, 1, one), run_distributed(train_and_read, 2, two)
    for step in expected:
        # Measured: 5e-7.
        assert abs(float.fromhex(expected[step]) - float.fromhex(got[step])) < 5e-6
    weights = [tensors_of(tmp_path / run / "checkpoints" / "step-00000006") for run in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], atol=2e-5, rtol=1e-3)


def test_dora_in_few_bits_is_the_same_where_zero3_parts_it(text_folder, tmp_path):
    phi35.save(phi35.create("tiny-phi-3.5-mini", seed=0), None, tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "few", QuantizationConfig(linear=WeightFormat(group_size=32)))
    common = {"model": str(tmp_path / "few"), "adapter": {"rank": 4, "alpha": 8, "dora": True}, "learning_rate": 1e-2}
    one = settings(text_folder, tmp_path / "one", **common, zero_stage=0)
    two = settings(text_folder, tmp_path / "two", **common, zero_stage=3)
    (expected,), (got, _) = run_distributed(train_and_read, 1, one), run_distributed(train_and_read, 2, two)
    losses = [float.fromhex(loss) for loss in expected.values()]
    assert losses[-1] < losses[0] - 0.05
    for step in expected:
        # Measured: 1e-6.
        assert abs(float.fromhex(expected[step]) - float.fromhex(got[step])) < 5e-6
    weights = tensors_of(tmp_path / "two" / "checkpoints" / "step-00000006")
    assert any("magnitude" in name for _, name in weights)


@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe", "tiny-phi-3.5-vision"])
def test_the_exported_adapter_and_the_merged_model_agree(name, text_folder, tmp_path):
    data, options = text_folder, {}
    if "vision" in name:
        data = write_picture_shards(tmp_path / "shards")
        options = {"adapter": {"rank": 4, "targets": ["attention", "feed_forward", "projector", "tower"]}}
    values = settings(data, tmp_path / "run", **{"model": name, "adapter": ADAPTER, **options})
    summary = train(
        TrainingConfig(**{**values, "export": True, "export_merged": True, "learning_rate": 1e-2}), device="cpu"
    )
    assert summary is not None and set(summary.written) >= {"adapter", "model"}
    base = phi35.create(name, seed=0)  # as the run drew it
    with torch.no_grad():
        plain = base(IDS).logits
        load_adapter(base, tmp_path / "run" / "adapter")
        adapted = base(IDS).logits
        merged = phi35.load(tmp_path / "run" / "model", device="cpu", dtype="float32")[0](IDS).logits
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, atol=2e-6, rtol=0)  # measured 4e-7
    assert set(summary.history[0]["learning_rates"]) <= {"decoder", "experts", "router", "projector", "tower"}


def test_weights_in_few_bits_are_trained_through_an_adapter_alone(text_folder, tmp_path):
    phi35.save(phi35.create("tiny-phi-3.5-moe", seed=0), None, tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "few", QuantizationConfig(linear=WeightFormat(group_size=32)))
    values = settings(text_folder, tmp_path / "run", model=str(tmp_path / "few"), max_steps=12, learning_rate=1e-2)
    with pytest.raises(ValueError, match="few bits.*set adapter"):
        train(TrainingConfig(**values), device="cpu")
    values["adapter"] = {"rank": 8, "alpha": 16, "targets": ["attention", "experts", "router"]}
    with pytest.raises(ValueError, match="cannot be merged into weights in few bits"):
        train(TrainingConfig(**values, export_merged=True), device="cpu")
    summary = train(TrainingConfig(**{**values, "export": True}), device="cpu")
    assert summary is not None and summary.last_loss < summary.first_loss - 0.1
    with pytest.raises(ValueError, match="few bits"):
        export(tmp_path / "run", tmp_path / "merged", merged=True)
    model = phi35.load(tmp_path / "few", device="cpu", dtype="float32")[0]
    load_adapter(model, tmp_path / "run" / "adapter")
    assert sum(parameter.numel() for name, parameter in model.named_parameters() if is_adapter(name)) > 10_000


def test_settings_that_contradict_an_adapter_are_named(text_folder, tmp_path):
    with pytest.raises(ValueError, match="unknown keys.*freeze=.*no effect.*muon"):
        TrainingConfig(adapter={"r": 8}, freeze=("tower",), optimizer="muon")
    with pytest.raises(ValueError, match="export_merged is about an adapter"):
        TrainingConfig(export_merged=True)
    config = TrainingConfig(**settings(text_folder, tmp_path / "run", model="tiny-phi-3.5-moe", adapter=ADAPTER))
    assert config.resolve(world_size=2, num_experts=4).ep_size == 1
    with pytest.raises(ValueError, match="whole experts"):
        config.replace(ep_size=2).resolve(world_size=2, num_experts=4)
    with pytest.raises(ValueError, match="no projector"):
        train(config.replace(adapter={"targets": ["projector"]}), device="cpu")
    with pytest.raises(ValueError, match="router needs whole weights"):
        train(config.replace(adapter={"targets": ["router"]}, zero_stage=3), device="cpu")
    train(config.replace(max_steps=3), device="cpu")
    with pytest.raises(ValueError, match="holds adapter="):
        train(config.replace(adapter={**ADAPTER, "rank": 8}), device="cpu")
    with pytest.raises(ValueError, match="without an adapter|nothing to merge"):
        plain = settings(text_folder, tmp_path / "plain", max_steps=3)
        train(TrainingConfig(**plain), device="cpu")
        export(tmp_path / "plain", tmp_path / "model", merged=True)
