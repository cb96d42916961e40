"""The picture of a run's curves."""

import json

import numpy as np
import pytest
from PIL import Image

from phi35.training.curves import plot, read_lines


def lines(count=20):
    return [
        {
            "step": step,
            "loss": 7.0 - step / 10,
            "balance_loss": 2.0,
            "learning_rate": 1e-3,
            "learning_rates": {"decoder": 1e-3, "router": 1e-4, "embeddings": 1e-3},
            "gradient_norm": 1.0,
            "tokens_per_second": 100.0 * step,
            "mfu": 0.5,
            "memory_allocated": 3_000_000_000,
            "memory_reserved": 5_000_000_000,
            "memory_peak": 4_000_000_000,
            "load_max_over_mean": [1.1, 1.3],
            "data_skips": {"broken": step} if step > 3 else {},
        }
        for step in range(1, count + 1)
    ]


def test_every_kind_of_number_has_its_panel(tmp_path):
    target = tmp_path / "curves.png"
    evaluations = [{"step": 10, "loss": 6.5, "accuracy": 0.25}, {"step": 20, "loss": 6.0, "accuracy": 0.5}]
    titles = plot(lines(), target, evaluations)
    assert titles == [
        "loss",
        "router losses",
        "held-out accuracy",
        "learning rate",
        "gradient norm",
        "tokens per second",
        "MFU",
        "memory per device",
        "busiest expert",
        "skipped samples",
    ]
    picture = np.asarray(Image.open(target).convert("RGB"))
    height = picture.shape[0] // 4
    for row in range(4):  # four rows of panels: a line's blue is in each
        band = picture[row * height : (row + 1) * height].astype(int)
        assert ((band[..., 2] - band[..., 0]) > 100).sum() > 20


def test_a_dense_run_on_a_cpu_has_only_what_it_measured(tmp_path):
    few = [{key: line[key] for key in ("step", "loss", "learning_rate", "gradient_norm")} for line in lines(2)]
    assert plot(few, tmp_path / "curves.svg") == ["loss", "learning rate", "gradient norm"]
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_an_unfinished_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines(3)) + '{"step": 4, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]


def test_plot_command_draws_a_running_run_and_names_an_empty_one(tmp_path, capsys):
    from phi35.cli.plot import plot as command

    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(3)))
    command(tmp_path)
    assert "steps 1 to 3; loss, router losses" in capsys.readouterr().out
    assert (tmp_path / "curves.png").is_file()
    with pytest.raises(ValueError, match="no finished step"):
        command(tmp_path / "nowhere")
