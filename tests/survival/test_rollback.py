"""Runs that are not well: too many updates left out, losses that jump; going back with the data left out."""

import json
import math

import pytest
import torch
from distributed import RankError, run_distributed
from stepped_engines import build_engine, make_steps, state_of

from phi35.training.config import TrainingConfig
from phi35.training.health import Health, Outcome


def observe(health, losses, first=1):
    return health.observe([Outcome(first + place, loss, 1.0) for place, loss in enumerate(losses)])


def test_a_jump_is_measured_in_deviations_of_the_last_losses():
    health = Health(TrainingConfig(spike_threshold=4.0, spike_window=10, save_interval=1))
    losses = [3.0, 3.2] * 5  # mean 3.1, deviation 0.1
    assert observe(health, losses) is None
    assert observe(health, [3.49], first=11) is None  # 3.9 deviations
    health = Health(TrainingConfig(spike_threshold=4.0, spike_window=10, save_interval=1))
    trouble = observe(health, [*losses, 3.51, 3.1])
    assert trouble is not None and (trouble.step, trouble.action) == (11, "rollback")
    assert "4.1 standard deviations" in trouble.reason
    assert observe(health, [3.1, 3.45], first=11) is None  # the jump itself has not become the measure


def test_few_or_steady_losses_make_no_jump():
    health = Health(TrainingConfig(spike_threshold=3.0, save_interval=1))
    assert observe(health, [7.0, 5.0, 9.0, 20.0]) is None  # too few to judge
    health = Health(TrainingConfig(spike_threshold=3.0, save_interval=1))
    assert observe(health, [2.0] * 20 + [2.02]) is None  # 0.5 % of the mean is the least deviation
    assert observe(health, [2.04], first=22) is not None
    health = Health(TrainingConfig(save_interval=1))
    assert observe(health, [2.0] * 20 + [1000.0]) is None  # by default nothing is judged


def test_left_out_updates_count_and_in_a_row_they_stop_the_run():
    health = Health(TrainingConfig(max_skipped_steps=3))
    bad = [Outcome(2, 5.0, math.inf), Outcome(3, math.nan, math.nan)]
    assert health.observe([Outcome(1, 5.0, 1.0), *bad, Outcome(4, 5.0, 1.0), *bad]) is None
    assert health.num_skipped == 4
    trouble = health.observe([Outcome(7, math.nan, None)])
    assert trouble is not None and (trouble.step, trouble.action) == (5, "stop")
    again = Health(TrainingConfig(max_skipped_steps=3))
    again.load_state(json.loads(json.dumps(health.state())))
    assert again.num_skipped == 5 and again.state() == health.state()
    never = Health(TrainingConfig(max_skipped_steps=0))
    assert never.observe([Outcome(step, math.nan, math.nan) for step in range(100)]) is None


@pytest.mark.parametrize("changes", [{"spike_threshold": 5.0}, {"on_skipped_steps": "rollback"}])
def test_going_back_without_checkpoints_is_refused(changes):
    with pytest.raises(ValueError, match="save_interval"):
        TrainingConfig(**changes)


def put_back(rank, world_size, changes, root):
    """A running engine put back to a checkpoint, beside one that was built from it: state and next losses."""
    from phi35.training import checkpoint
    from phi35.training.checkpoint_files import CheckpointReader
    from phi35.training.saving import save

    engine = build_engine(changes)
    make_steps(rank, engine, left_out=(2, 3))
    saved = state_of(engine)
    folder = save(root, 2, engine, {"data": {}, "selection_bias": engine.balancer.state()})
    make_steps(rank, engine, left_out=(0, 1))
    moved = state_of(engine)
    checkpoint.restore(engine, CheckpointReader(folder))
    back = state_of(engine)
    other = build_engine(changes)
    checkpoint.restore(other, CheckpointReader(folder))  # from other weights: those of a fresh model
    losses = []
    for one in (engine, other):
        results = make_steps(rank, one, left_out=(0, 1))
        losses.append([result.loss.item().hex() for result in results])
    same = [torch.equal(saved[name], back[name]) for name in saved]
    return all(same), sum(not torch.equal(saved[name], moved[name]) for name in saved), losses


MOE = {"model": "tiny-phi-3.5-moe", "router_aux_loss_coef": 0.01, "router_bias_update_rate": 0.01}


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 0, "dtype": "bfloat16"},
        {"zero_stage": 0, "dtype": "bfloat16", "optimizer_dtype": "bfloat16"},
        {"zero_stage": 1},
        {"zero_stage": 2, **MOE, "ep_size": 2, "dtype": "bfloat16"},
        {"zero_stage": 3, "dtype": "bfloat16"},
    ],
    ids=["zero0-bf16", "zero0-bf16-state", "zero1", "zero2-ep2-bf16", "zero3-bf16"],
)
def test_a_running_engine_goes_back_to_the_bit(changes, tmp_path):
    for same, num_moved, (one, other) in run_distributed(put_back, 2, changes, str(tmp_path)):
        assert same and num_moved > 20
        assert one == other


def spoilt_run(rank, world_size, values, calls_to_spoil, how):
    """A training of which some steps, counted as they are made, have a loss five times too high, or an infinite one
    on the last rank."""
    import dataclasses

    from phi35.training.engine import Engine
    from phi35.training.run import train

    calls, step = [], Engine.step

    def spoilt(module, inputs, result):
        loss, output = result
        return loss, dataclasses.replace(output, loss=output.loss * {"jump": 5.0, "infinite": torch.inf}[how])

    def spoilt_step(self, *arguments):
        calls.append(1)
        concerned = how == "jump" or rank == world_size - 1
        hook = self.model.register_forward_hook(spoilt) if len(calls) in calls_to_spoil and concerned else None
        result = step(self, *arguments)
        if hook is not None:
            hook.remove()
        return result

    Engine.step = spoilt_step
    summary = train(TrainingConfig(**values), device="cpu")
    return None if summary is None else summary.history


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.py").write_text("\n".join(f"value_{line} = compute({line * 7 % 13})" for line in range(160)))
    return str(folder)


def settings(text_folder, output, **changes):
    base = {
        "data": text_folder,
        "sequence_length": 16,
        "global_batch_size": 4,
        "max_steps": 16,
        "warmup_steps": 4,
        "save_interval": 4,
        "spike_window": 8,
        "output_dir": str(output),
        "export": False,
        "keep_last": 0,
    }
    return {**base, **changes}


def trainer_state(folder):
    return json.loads((folder / "trainer.json").read_text())


@pytest.mark.parametrize("log_interval", [1, 3])
def test_a_jump_goes_back_and_leaves_the_data_out(text_folder, tmp_path, log_interval):
    values = settings(text_folder, tmp_path, spike_threshold=12.0, zero_stage=1, log_interval=log_interval)
    history = run_distributed(spoilt_run, 2, values, [10], "jump")[0]
    assert [line["step"] for line in history] == list(range(1, 17))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (event,) = events
    made = event["from_step"]  # with log_interval=3, after the checkpoint of step 8, numbers are read every third step
    assert made == {1: 10, 3: 11}[log_interval]
    assert (event["event"], event["step"]) == ("rollback", 8) and "at step 10" in event["reason"]
    last = trainer_state(tmp_path / "checkpoints" / "step-00000016")
    assert last["data"]["samples"] == 4 * (16 + made - 8)  # as many steps more as were made twice
    assert last["health"]["rollbacks"] == 1
    assert max(line["loss"] for line in history[8:]) < history[0]["loss"] + 0.5


def test_a_second_jump_goes_back_further_and_the_run_stops_in_the_end(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, spike_threshold=12.0, max_rollbacks=2, async_save=True)
    with pytest.raises(RankError, match="RunDiverged.*2 rollbacks led to no new checkpoint"):
        run_distributed(spoilt_run, 1, values, [14, 15, 16, 17], "jump")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["from_step"], event["step"]) for event in events] == [(14, 12), (13, 8)]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["rolled-back-step-00000012", "step-00000004", "step-00000008"]


def test_a_jump_before_any_checkpoint_is_told_and_the_run_goes_on(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, spike_threshold=12.0, save_interval=16)
    history = run_distributed(spoilt_run, 1, values, [10], "jump")[0]
    assert len(history) == 16 and not (tmp_path / "events.jsonl").exists()


def test_updates_left_out_are_counted_across_a_resume(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, max_steps=8)
    history = run_distributed(spoilt_run, 2, values, [3, 6], "infinite")[0]
    assert [line["skipped_steps"] for line in history] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert history[2]["loss"] is None and history[2]["gradient_norm"] is None
    assert trainer_state(tmp_path / "checkpoints" / "step-00000008")["optimizer_steps"] == 6
    history = run_distributed(spoilt_run, 2, {**values, "max_steps": 10, "warmup_steps": 4}, [1], "infinite")[0]
    assert [line["skipped_steps"] for line in history[8:]] == [3, 3]


def test_too_many_left_out_in_a_row_stop_the_run(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, max_skipped_steps=3)
    with pytest.raises(RankError, match="RunDiverged.*3 updates in a row.*steps 6 to 8.*step-00000004"):
        run_distributed(spoilt_run, 2, values, [6, 7, 8, 9], "infinite")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_too_many_left_out_in_a_row_go_back_where_asked(text_folder, tmp_path):
    values = settings(text_folder, tmp_path, max_skipped_steps=3, on_skipped_steps="rollback", max_steps=10)
    history = run_distributed(spoilt_run, 2, values, [6, 7, 8], "infinite")[0]
    assert [line["step"] for line in history] == list(range(1, 11))
    assert [line["skipped_steps"] for line in history] == [0] * 4 + [3] * 6
    assert trainer_state(tmp_path / "checkpoints" / "step-00000010")["data"]["samples"] == 4 * (10 + 4)
