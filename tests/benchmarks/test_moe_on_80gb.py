"""The benchmark of the large sparse model on a small device runs on a tiny one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import phi35

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "moe_on_80gb.py"


def test_generates_from_host_memory_what_experts_in_place_give() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--small", "--parts", "bf16", "check", "--budgets", "small"]
    command += ["--prompt", "24", "--new-tokens", "8"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    ahead, not_ahead, check = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert ahead["copied_ahead"] > 0 and not_ahead["copied_ahead"] == 0
    assert 0 < ahead["copied_when_needed"] < not_ahead["copied_when_needed"] <= 1
    assert check["layers_differ_1"] == check["layers_differ_500"] == check["experts_differ"] == 0
    assert check["prompt_difference"] == check["step_difference"] == 0 and check["same_greedy_tokens"] == 1
    for name in ("first_difference", "plain_again", "offloaded_again", "places_wrong", "places_wrong_after"):
        assert check[name] == "none"
    assert check["replay"].startswith("0 of ")
    assert "building: done" in result.stderr


def test_check_says_which_layer_and_expert_are_wrong() -> None:
    """One expert of one layer differs on the host, then one place on the device."""
    sys.path.insert(0, str(SCRIPT.parent))
    import offload_check

    plain = phi35.create("tiny-phi-3.5-moe", seed=0)
    experts = plain.model.layers[0].mlp.experts
    budget = 3 * plain.config.num_hidden_layers * sum(tensor[0].nbytes for tensor in experts.parameters())
    model = phi35.create("tiny-phi-3.5-moe", seed=0, expert_memory=budget)
    offloaded = model.model.layers[1].mlp.experts
    offloaded.down_proj[2, 5] *= 1.5
    found = offload_check.check(plain, model, 40, 4, 4)
    assert found["places_wrong"] == "none"
    assert "layer 1: experts gave other numbers" in found["layers_differ_1_where"]
    assert found["first_difference"].startswith("prompt of 36 tokens, layer 1: experts gave other numbers")
    assert "that all of them chose [2]" in found["first_difference"] and found["experts_differ"] >= 1
    assert found["plain_again"] == found["offloaded_again"] == "none"
    # What follows from it is told apart: the experts of the last layer are right.
    last = plain.config.num_hidden_layers
    assert found["experts_differ"] < 5 * last and 0 < int(found["replay"].split()[0]) <= 5
    place = offloaded._place_of.index(max(offloaded._place_of))
    offloaded._pool[0].gate_up_proj.data[offloaded._place_of[place], 0, 0] += 1
    assert offload_check.places_wrong(model).startswith("1: layer 1 place")
