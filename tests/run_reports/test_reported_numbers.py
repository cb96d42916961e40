"""What a run reports each step, and where it arrives: JSON lines, TensorBoard, Weights & Biases, the terminal."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from distributed import run_distributed
from text_data import numbered_tokens, packed_source

from phi35 import presets
from phi35.training.config import TrainingConfig
from phi35.training.flops import TrainingFlops, Work, visible_pairs
from phi35.training.schedule import learning_rate_factor
from phi35.training.trackers import ProgressBar, WeightsAndBiases, choose_trackers, scalars


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        lines = [f"value_{number}_{line} = compute({line * 7 % 13})" for line in range(40)]
        (folder / f"file_{number}.py").write_text("\n".join(lines))
    return str(folder)


def settings(text_folder, output, **changes):
    base = {
        "model": "tiny-phi-3.5-moe",
        "data": text_folder,
        "sequence_length": 16,
        "global_batch_size": 4,
        "max_steps": 4,
        "warmup_steps": 2,
        "output_dir": str(output),
        "export": False,
        "learning_rates": {"router": 1e-3},
        "freeze": ["embeddings"],
        "peak_flops": 1e12,
        "router_aux_loss_coef": 1e-2,
        "router_z_loss_coef": 1e-3,
        "trackers": [],
    }
    return {**base, **changes}


def train_in_process(rank, world_size, values):
    """History and evaluations of a run."""
    from phi35.training.config import TrainingConfig
    from phi35.training.run import train

    summary = train(TrainingConfig(**values), device="cpu")
    return None if summary is None else summary.history


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_step_reports_all_that_is_promised(text_folder, tmp_path, world_size):
    history = run_distributed(train_in_process, world_size, settings(text_folder, tmp_path))[0]
    config = presets.get("tiny-phi-3.5-moe")
    flops = TrainingFlops(config, ("embeddings",))(Work(4 * 16, 4 * visible_pairs(16, config.sliding_window)))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history
    for step, line in enumerate(history):
        assert line["step"] == step + 1 and line["samples"] == 4
        assert (line["tokens"], line["input_tokens"]) == (4 * 15, 4 * 16)
        factor = learning_rate_factor(step, schedule="cosine", total_steps=4, warmup_steps=2, floor=0.1)
        assert line["learning_rates"] == {"decoder": 3e-3 * factor, "router": 1e-3 * factor, "experts": 3e-3 * factor}
        assert line["model_flops"] == pytest.approx(flops, rel=1e-6)  # summed in float32
        assert line["mfu"] == pytest.approx(line["model_flops"] / (line["seconds"] * world_size * 1e12), rel=1e-12)
        assert line["tokens_per_second"] == pytest.approx(64 / line["seconds"])
        assert line["samples_per_second"] == pytest.approx(4 / line["seconds"])
        assert {"loss", "balance_loss", "z_loss", "gradient_norm", "expert_load", "memory_peak"} <= set(line)
        assert 50e6 < line["memory_peak"] < 20e9  # this process's, in bytes
        assert line["data_skips"] == {}  # nothing to leave out


class SkippingSource:
    """A text source that reports skips, as sources of hostile data do."""

    def __init__(self, inner, rank):
        self.inner, self.rank, self.taken = inner, rank, 0

    def __iter__(self):
        for batch in self.inner:
            self.taken += 1
            yield batch

    def skips(self):
        """Rank 0 meets one kind of damage, rank 1 two."""
        return {"broken": self.taken, **({"too long": 2 * self.taken} if self.rank else {})}

    def state_dict(self):
        """The inner source's."""
        return self.inner.state_dict()

    def load_state_dict(self, state):
        """The inner source's."""
        self.inner.load_state_dict(state)


def train_with_skips(rank, world_size, values):
    from pathlib import Path

    from phi35.training import environment
    from phi35.training.build import build_model, read_model_config
    from phi35.training.engine import Engine
    from phi35.training.loop import run_steps
    from phi35.training.reporting import open_metrics
    from phi35.training.watchdog import Watchdog

    config = TrainingConfig(**values)
    model_config = read_model_config(config)
    place = environment.start("cpu")
    config = config.resolve(world_size=world_size, num_experts=4)
    engine = Engine(build_model(config, model_config, None), config, place)
    text = packed_source(
        numbered_tokens([20] * 30),
        sequence_length=16,
        micro_batch_size=2,
        rank=rank,
        world_size=world_size,
        pad_token_id=0,
    )
    source, folder = SkippingSource(text, rank), Path(config.output_dir)
    metrics = open_metrics(engine, model_config, source, folder, 0)
    with Watchdog(place, folder, timeout_seconds=0) as watchdog:
        run_steps(engine, source, metrics, 0, folder / "checkpoints", {}, watchdog)
    metrics.close()
    return metrics.history


def test_skips_of_all_ranks_are_summed_by_reason(text_folder, tmp_path):
    history = run_distributed(train_with_skips, 2, settings(text_folder, tmp_path, max_steps=3))[0]
    assert [line["data_skips"] for line in history] == [{"broken": 2 * n, "too long": 2 * n} for n in (1, 2, 3)]


def test_tensorboard_holds_the_numbers_of_the_lines(text_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = run_distributed(train_in_process, 1, settings(text_folder, tmp_path, trackers=["tensorboard"]))[0]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = scalars(history[0])
    assert set(events.Tags()["scalars"]) == set(expected)
    assert {"training/balance_loss", "speed/mfu", "learning_rate/router", "memory_gb/peak"} <= set(expected)
    assert "experts/load_max_over_mean/layer_01" in expected
    for name in expected:
        points = events.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3, 4]
        values = [scalars(line)[name] for line in history]
        assert [point.value for point in points] == pytest.approx(values, rel=1e-6)  # stored as float32


def test_wandb_offline_holds_the_numbers_and_disturbs_no_random_state(tmp_path):
    pytest.importorskip("wandb", reason="wandb is an optional extra")
    script = """
import random, sys
from pathlib import Path
import numpy, torch
from phi35.training.trackers import WeightsAndBiases
folder = Path(sys.argv[1])
random.seed(1); numpy.random.seed(1); torch.manual_seed(1)
for attempt in range(2):
    tracker = WeightsAndBiases(folder, {"max_steps": 3}, {"mode": "offline"})
    line = {"step": attempt + 1, "loss": 1.25 + attempt, "learning_rate": 0.125, "tokens_per_second": 7.0, "seconds": 1}
    tracker.log([line])
    tracker.log_evaluation({"step": attempt + 1, "loss": 2.75, "best": True})
    tracker.close()
print(random.random(), numpy.random.rand(), float(torch.rand(())))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = f"{random.random()} {np.random.rand()} {float(torch.rand(()))}"
    assert done.stdout.splitlines()[-1] == expected
    stored = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    content = b"".join(path.read_bytes() for path in stored)
    for text in (b"training/loss", b"1.25", b"2.25", b"evaluation/loss", b"2.75", b"learning_rate/all"):
        assert text in content, text
    identity = json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    assert stored and all(identity in path.name for path in stored)  # the second attempt went on with the first


def test_wandb_options_that_it_does_not_know_are_named(tmp_path):
    pytest.importorskip("wandb", reason="wandb is an optional extra")
    with pytest.raises(ValueError, match="no_such_option"):
        WeightsAndBiases(tmp_path, {}, {"mode": "offline", "no_such_option": 1})


def test_trackers_are_checked_before_anything_else(monkeypatch):
    with pytest.raises(ValueError, match="'mlflow'.*tensorboard"):
        TrainingConfig(trackers=["mlflow"])
    with pytest.raises(ValueError, match="wandb_options"):
        TrainingConfig(wandb_options={"mode": "offline"})
    with pytest.raises(ValueError, match="peak_flops"):
        TrainingConfig(peak_flops=0.0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_trackers(None) == ()
    with pytest.raises(ValueError, match="pip install wandb"):
        choose_trackers(["wandb"])


def test_the_bar_shows_time_left_and_the_last_numbers(capsys):
    bar = ProgressBar(10)
    line = {"loss": 2.5, "tokens_per_second": 1234.5, "mfu": 0.5125, "learning_rate": 1e-4, "gradient_norm": 0.75}
    bar.log([{**line, "step": 1}, {**line, "step": 2, "memory_peak": 61_200_000_000, "data_skips": {"broken": 3}}])
    bar._bar.refresh()
    bar.log_evaluation({"step": 2, "loss": 3.0, "best": True})
    bar.close()
    printed = capsys.readouterr()
    shown = printed.err.split("\r")[-2] if "2/10" not in printed.err.split("\r")[-1] else printed.err.split("\r")[-1]
    for text in ("2/10", "<", "loss=2.5000", "MFU=51.2%", "lr=1.00e-04", "norm=0.75", "GB=61.2", "skipped=3"):
        assert text in shown, shown
    assert "held-out loss 3.0000 (best so far)" in printed.out
