"""The expert-parallel benchmark: it measures a tiny model on two processes, compares it, and refuses what cannot be."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import run_distributed

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def options(**changes):
    defaults = {"tiny": True, "full": False, "layers": 2, "rows": 2, "length": 16, "zero_stage": 0, "settings": {}}
    return argparse.Namespace(**{**defaults, **changes})


def measure(rank, world_size, changes):
    sys.path.insert(0, str(BENCHMARKS))
    import expert_parallel_parts as parts

    from phi35.training import environment

    place = environment.start("cpu")
    run = parts.Run(options(**changes), place)
    assert [layer.ep_size for layer in run.layers] == [world_size] * 2
    timed = run.time_exchanges(2, 4, 1, 2)
    return timed, run.time_exchange_alone(2), parts.check(options(**changes), place)


@pytest.mark.parametrize("changes", [{}, {"full": True, "zero_stage": 1}])
def test_two_processes_are_timed_and_equal_one(changes):
    for timed, alone, errors in run_distributed(measure, 2, changes):
        assert timed["loss"] == pytest.approx(7.0, abs=0.2) and timed["chunks"] == 2
        assert {"forward", "backward", "update", "total"} <= set(timed["ms"])
        assert timed["tokens_per_second_per_gpu"] > 0 and 0 < alone["rows_sent"] < 64 and alone["ms_per_step"] > 0
        for name in ("spread, 1 chunk", "spread, 2 chunks"):
            assert {"loss", "output", "mlp.experts.gate_up_proj", "mlp.router.weight"} <= set(errors[name])
            assert max(errors[name].values()) < 2e-6  # measured 2.9e-7


def test_memory_is_counted_before_anything_is_built(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from expert_parallel_parts import needed_gib

    sizes = {"tiny": False, "rows": 4, "length": 4096, "layers": 4}
    # 5.5 B parameters of 8 bytes are 41 GiB; half of the experts elsewhere take 19 off.
    assert 50 < needed_gib(options(**sizes), 1, True) < 62
    assert 31 < needed_gib(options(**sizes), 2, True) < 43
    # 41.9 B: half of the frozen experts, 37.5 GiB, and 1.6 B trained parameters of 16 bytes, 23.6.
    full = {**sizes, "full": True, "rows": 1}
    assert 64 < needed_gib(options(**full), 2, True) < 72
    assert needed_gib(options(**full), 1, True) > 100


def test_without_a_launcher_it_says_what_to_run():
    command = [sys.executable, BENCHMARKS / "expert_parallel.py"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
    assert result.returncode == 1
    assert "torchrun --nproc_per_node 2 benchmarks/expert_parallel.py" in result.stderr
