"""The moving average of the weights: its formula, its place in checkpoints and exports, and in evaluation."""

import shutil

import pytest
import torch
from distributed import run_distributed
from engine_runs import build, config_of, global_batches
from training_runs import settings, tensors_of, text_files, train_and_read

DECAY = 0.6


def averages(rank, world_size, changes):
    """Average and weights by name after each step, of the engine on this rank, and logits with the average in place."""
    from phi35.training.engine import Engine, shard_experts
    from phi35.training.environment import start
    from phi35.training.loss import count_label_tokens
    from phi35.training.optimizer_state import AVERAGE, PARAMETER, OptimizerState

    place = start("cpu")
    config = config_of(ema_decay=DECAY, **changes).resolve(world_size=world_size)
    torch.manual_seed(0)
    model = build(config)
    shard_experts(model, config)
    engine = Engine(model, config, place)
    state = OptimizerState(engine)
    names = [name for name, parameter in engine.model.named_parameters() if parameter.requires_grad]
    parameters = dict(engine.model.named_parameters())
    start_weights = {name: state.read(parameters[name], PARAMETER).clone() for name in names}
    history = []
    size, rows = config.micro_batch_size, config.global_batch_size
    for step, batch in enumerate(global_batches(config.max_steps, rows, config.sequence_length)):
        first = range(rank * size, rows, size * world_size)
        micro = [{name: value[begin : begin + size] for name, value in batch.items()} for begin in first]
        engine.set_learning_rate(step)
        engine.step(micro, [count_label_tokens(one["labels"]) for one in micro], count_label_tokens(batch["labels"]))
        state = OptimizerState(engine)
        history.append(
            {
                name: (state.read(parameters[name], PARAMETER).clone(), state.read(parameters[name], AVERAGE).clone())
                for name in names
            }  # fmt: skip
        )
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        before = engine.model(ids)[1].logits.clone()
        with engine.average.in_place_of_weights():
            within = engine.model(ids)[1].logits.clone()
        after = engine.model(ids)[1].logits.clone()
    return start_weights, history, (before, within, after)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"zero_stage": 0}),
        (1, {"zero_stage": 0, "dtype": "bfloat16"}),
        (1, {"zero_stage": 0, "dtype": "bfloat16", "optimizer_dtype": "bfloat16"}),
        (1, {"zero_stage": 0, "dtype": "bfloat16", "optimizer": "muon"}),
        (2, {"zero_stage": 1, "dtype": "bfloat16"}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3, "dtype": "bfloat16"}),
        (1, {"zero_stage": 2, "offload": "optimizer"}),
    ],
    ids=["zero0", "bf16", "bf16-states", "muon", "zero1", "zero2", "zero3", "offload"],
)
def test_formula_and_swap(world_size, changes):
    for start, history, (before, within, after) in run_distributed(averages, world_size, changes):
        expected = {name: value.double() for name, value in start.items()}
        for number, line in enumerate(history, start=1):
            decay = min(DECAY, (1 + number) / (10 + number))
            for name, (weights, average) in line.items():
                expected[name] = decay * expected[name] + (1 - decay) * weights.double()
                torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)
        assert torch.equal(before, after) and not torch.equal(before, within)
        model = build(config_of())
        dtype = torch.bfloat16 if changes.get("dtype") == "bfloat16" else torch.float32
        for name, parameter in model.named_parameters():
            parameter.data = history[-1][name][1].clone()
        model.to(dtype).train()
        with torch.no_grad():
            torch.testing.assert_close(within, model(torch.arange(20)[None] + 5).logits, rtol=0, atol=1e-6)


def test_average_resumes_and_is_exported(tmp_path):
    from phi35.loading import load
    from phi35.training.export import export

    changes = {"ema_decay": 0.9, "zero_stage": 1, "dtype": "bfloat16", "export": True, "export_average": True}
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    values = settings(text_files(tmp_path), straight, **changes)
    losses = run_distributed(train_and_read, 2, values)[0]
    shutil.copytree(straight, parted)
    shutil.rmtree(parted / "checkpoints" / "step-00000006")
    assert run_distributed(train_and_read, 2, {**values, "output_dir": str(parted)})[0] == losses
    one, other = (tensors_of(folder / "checkpoints" / "step-00000006") for folder in (straight, parted))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert ("average", "lm_head.weight") in one
    assert not torch.equal(one["average", "lm_head.weight"], one["parameter", "lm_head.weight"])
    exported = load(straight / "model", device="cpu", dtype="bfloat16")[0]
    weights = load(export(straight, tmp_path / "weights"), device="cpu", dtype="bfloat16")[0]
    for model, kind in ((exported, "average"), (weights, "parameter")):
        assert torch.equal(model.lm_head.weight.detach(), one[kind, "lm_head.weight"].to(torch.bfloat16))


def test_settings_without_an_average_are_refused(tmp_path):
    from phi35.training.export import export

    with pytest.raises(ValueError, match="export_average needs an average"):
        config_of(export_average=True)
    with pytest.raises(ValueError, match="ema_decay"):
        config_of(ema_decay=1.0)
    run_distributed(train_and_read, 1, settings(text_files(tmp_path), tmp_path / "run", max_steps=3))
    with pytest.raises(ValueError, match="ema_decay=0"):
        export(tmp_path / "run", tmp_path / "out", average=True)
