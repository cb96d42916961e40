"""The benchmark of the large sparse model on a small device runs on a tiny one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

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
    assert check["layers_differ_1"] == check["layers_differ_500"] == check["any_experts_differ"] == 0
    assert (
        check["any_prompt_difference"] == check["any_step_difference"] == check["any_in_place_repeat_difference"] == 0
    )
    for name in (
        "any_first_difference",
        "any_in_place_again",
        "any_offloaded_again",
        "places_wrong",
        "places_wrong_after",
    ):
        assert check[name] == "none"
    assert check["any_replay"].startswith("0 of ") and check["same_greedy_tokens"] == 1
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
    told: list[str] = []
    found = offload_check.check(plain, model, 40, 4, 4, told.append)
    assert told == ["attention by any"] and found["places_wrong"] == "none"
    assert "layer 1: experts gave other numbers" in found["layers_differ_1_where"]
    first = found["any_first_difference"]
    assert first.startswith(
        f"prompt of 36 tokens, layer 1: {offload_check.PARTS['experts']}; experts gave other numbers"
    )
    assert "that all of them chose [2]" in first and found["any_experts_differ"] >= 1
    assert found["any_in_place_again"] == found["any_offloaded_again"] == "none"
    # What follows from it is told apart: the experts of the last layer are right.
    last = plain.config.num_hidden_layers
    assert found["any_experts_differ"] < 5 * last and 0 < int(found["any_replay"].split()[0]) <= 5
    place = offloaded._place_of.index(max(offloaded._place_of))
    offloaded._pool[0].gate_up_proj.data[offloaded._place_of[place], 0, 0] += 1
    assert offload_check.places_wrong(model).startswith("1: layer 1 place")


def test_check_says_which_part_of_a_layer_is_wrong() -> None:
    """Parts before the experts, too: each is made wrong once."""
    sys.path.insert(0, str(SCRIPT.parent))
    import offload_check

    ids = torch.randint(5, 1000, (1, 12), generator=torch.Generator().manual_seed(0))
    plain = phi35.create("tiny-phi-3.5-moe", seed=0)
    expected = offload_check.trace(plain, ids, 2)
    for part, name in {
        "arrived": "0.input_layernorm",
        "qkv_proj": "1.self_attn.qkv_proj",
        "o_proj": "1.self_attn.o_proj",
        "normed": "1.post_attention_layernorm",
        "choice": "1.mlp.router",
    }.items():
        model = phi35.create("tiny-phi-3.5-moe", seed=0)
        with torch.no_grad():
            model.model.layers.get_submodule(name).weight.mul_(1.25)
        told = offload_check.first_difference(expected, offload_check.trace(model, ids, 2))
        assert told.startswith(f"prompt of 10 tokens, layer {name[0]}: {offload_check.PARTS[part]}; ")
