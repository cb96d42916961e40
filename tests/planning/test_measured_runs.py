"""The planner against training steps that were measured on a GPU (``benchmarks/results``)."""

import json
from pathlib import Path

import pytest

from phi35.planning.memory import plan_memory
from phi35.planning.plan import FRAGMENTATION
from phi35.planning.speed import expected_speed, measurements
from phi35.training.config import TrainingConfig
from phi35.training.flops import peak_flops

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "train_step_h200.json"
RUNS = ("mini", "moe-8", "moe-8 x2", "moe-5", "vision")


def case_and_result(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from train_step_cases import CASES

    results = {result["case"]: result for result in json.loads(RESULTS.read_text())["cases"]}
    return CASES[name], results[name]


@pytest.mark.parametrize("name", RUNS)
def test_peaks_are_planned_within_two_percent(name, monkeypatch):
    case, result = case_and_result(name, monkeypatch)
    config = TrainingConfig(
        model=case.preset,
        dtype="bfloat16",
        sequence_length=case.length,
        global_batch_size=case.rows * case.micro_batches,
        micro_batch_size=case.rows,
        **case.settings,
    ).resolve(world_size=1, num_experts=case.model_config.num_local_experts)
    crops = 5 * case.images * case.rows
    planned = plan_memory(case.model_config, config, 1, crops=crops).peak
    measured, reserved = (result[key] * 2**30 for key in ("peak_gib", "reserved_gib"))
    assert planned == pytest.approx(measured, rel=0.02)  # 1.002 to 1.004
    assert reserved <= FRAGMENTATION * planned
    speed = expected_speed(case.model_config, config, 1, peak_flops("H200", "bfloat16"), crops=crops)
    if any(one.case == name for one in measurements()):
        assert speed.tokens_per_second == pytest.approx(result["tokens_per_second"], rel=0.01)


def test_the_table_of_mfu_holds_what_was_measured():
    for one in measurements():
        results = {result["case"]: result for result in json.loads((ROOT / one.source).read_text())["cases"]}
        assert one.mfu == pytest.approx(results[one.case]["mfu"], abs=5e-4)
        assert one.device == json.loads((ROOT / one.source).read_text())["environment"]["device"]
