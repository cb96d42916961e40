"""Sharded sparse layers against whole ones, on gloo processes: values, gradients, empty experts and empty ranks."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import run_distributed

from moe import expert_parallel
from moe.experts import Experts, loop
from moe.layer import SparseMoE
from phi35 import presets
from phi35.outputs import RouterOutput
from phi35.quantization.config import WeightFormat

CONFIG = presets.get("tiny-phi-3.5-moe").replace(initializer_range=0.1, router_jitter_noise=0.2)
WIDE = {"num_local_experts": 8}


def forced_routing(expert_indices, num_experts):
    num_tokens = len(expert_indices)
    return RouterOutput(
        torch.zeros(num_tokens, num_experts),
        torch.tensor(expert_indices, dtype=torch.long).reshape(-1, 2),
        torch.ones(num_tokens, 2),
    )


def tokens_of(rank, num_tokens):
    return torch.randn(1, num_tokens, CONFIG.hidden_size, generator=torch.Generator().manual_seed(100 + rank))


def run_layer(layer, rank, num_tokens, routing):
    """One training pass of a rank's tokens, with its own routing noise: (output, gradient of the tokens)."""
    tokens = tokens_of(rank, num_tokens).requires_grad_()
    torch.manual_seed(rank)
    output, used = layer(tokens, routing)
    output.square().sum().backward()
    return output.detach(), tokens.grad, used.expert_indices


def relative_error(actual, expected):
    """Largest difference, over the largest expected value where that exceeds 1."""
    if expected.numel() == 0:
        return 0.0
    return (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())


class OwnForward(Experts):
    """A container that is not run through ``Experts.forward``, as a quantized one would be."""

    def forward(self, hidden_states, expert_indices, expert_weights):
        return loop(hidden_states, expert_indices, expert_weights, self.gate_up_proj, self.down_proj, self.hidden_act)


def compare_with_whole_layer(rank, world_size, cases):
    """For each case the errors of every quantity, and the experts used."""
    results = {}
    for name, case in cases.items():
        config = CONFIG.replace(**{"experts_backend": "grouped_mm", **case.get("config", {})})
        num_tokens, forced = case["tokens"], case.get("forced")
        torch.manual_seed(0)
        whole = SparseMoE(config).train()
        if case.get("own_forward"):
            whole.experts.__class__ = OwnForward
        if case.get("quantized"):
            twin = whole.experts.quantized_twin(WeightFormat(bits=4, group_size=None), torch.bfloat16)
            twin.draw_codes(0.1, torch.Generator().manual_seed(1))
            whole.experts = twin
        if case.get("frozen"):
            whole.experts.requires_grad_(False)
        layer = expert_parallel.shard(copy.deepcopy(whole), case["ep"], case.get("chunks"))
        routings = [forced_routing(forced[r], config.num_local_experts) if forced else None for r in range(world_size)]
        output, token_grad, used = run_layer(layer, rank, num_tokens[rank], routings[rank])
        expected = [run_layer(whole, r, num_tokens[r], routings[r]) for r in range(world_size)]
        errors = {
            "output": relative_error(output, expected[rank][0]),
            "tokens": relative_error(token_grad, expected[rank][1]),
        }
        torch.distributed.all_reduce(layer.router.weight.grad)
        errors["router"] = relative_error(layer.router.weight.grad, whole.router.weight.grad)
        for weight in () if {"frozen", "quantized"} & set(case) else ("gate_up_proj", "down_proj"):
            errors[weight] = relative_error(*summed_and_expected(layer, whole, weight))
        results[name] = (errors, used)
    return results


def summed_and_expected(layer, whole, name):
    """An expert tensor's gradient summed over its copies, as data parallelism does, and the whole layer's."""
    local, full = getattr(layer.experts, name), getattr(whole.experts, name)
    first, num_experts = local.expert_shard
    last = first + num_experts // layer.ep_size
    assert torch.equal(local, full[first:last])
    total = torch.zeros_like(full)
    total[first:last] = local.grad
    torch.distributed.all_reduce(total)
    return total, full.grad


CASES = {
    2: {
        "all work": {"ep": 2, "tokens": (12, 7)},
        "all work, loop": {"ep": 2, "tokens": (12, 7), "config": {"experts_backend": "loop"}},
        "gelu": {"ep": 2, "tokens": (12, 7), "chunks": 2, "config": {"hidden_act": "gelu"}},
        "two chunks": {"ep": 2, "tokens": (12, 7), "chunks": 2},
        "three chunks of four experts": {"ep": 2, "tokens": (21, 34), "chunks": 3, "config": WIDE},
        "more chunks than experts": {"ep": 2, "tokens": (21, 34), "chunks": 9, "config": WIDE},
        "idle rank": {"ep": 2, "tokens": (5, 3), "forced": [[[0, 1]] * 5, [[0, 1]] * 3]},
        "idle rank, two chunks, loop": {
            "ep": 2,
            "tokens": (5, 3),
            "chunks": 2,
            "forced": [[[0, 1]] * 5, [[0, 1]] * 3],
            "config": {"experts_backend": "loop"},
        },
        "an idle expert on each rank": {
            "ep": 2,
            "tokens": (5, 3),
            "chunks": 2,
            "forced": [[[3, 0]] * 5, [[0, 3]] * 3],
        },
        "tokens on rank 0 only": {"ep": 2, "tokens": (5, 0), "chunks": 2, "forced": [[[2, 3]] * 5, []]},
        "tokens on rank 1 only, loop": {
            "ep": 2,
            "tokens": (0, 3),
            "forced": [[], [[2, 1]] * 3],
            "config": {"experts_backend": "loop"},
        },
        "no tokens at all": {"ep": 2, "tokens": (0, 0), "chunks": 2, "forced": [[], []]},
        "frozen experts": {"ep": 2, "tokens": (12, 7), "chunks": 2, "frozen": True},
        "quantized experts": {"ep": 2, "tokens": (12, 7), "quantized": True},
        "another container": {"ep": 2, "tokens": (12, 7), "own_forward": True},
        "another container, idle rank": {
            "ep": 2,
            "tokens": (5, 3),
            "own_forward": True,
            "forced": [[[2, 3]] * 5, [[2, 3]] * 3],
        },
        "the paper's expert gradient": {
            "ep": 2,
            "tokens": (12, 7),
            "chunks": 2,
            "config": {"router_type": "sparsemixer-paper"},
        },
    },
    4: {
        "two copies": {"ep": 2, "tokens": (12, 7, 1, 9), "chunks": 2},
        "one expert a rank": {"ep": 4, "tokens": (12, 7, 1, 9)},
        "two experts a rank, two chunks": {"ep": 4, "tokens": (12, 7, 1, 9), "chunks": 2, "config": WIDE},
        "three idle ranks": {
            "ep": 4,
            "tokens": (5, 3, 0, 2),
            "chunks": 2,
            "forced": [[[2, 3]] * 5, [[3, 2]] * 3, [], [[2, 3]] * 2],
            "config": WIDE,
        },
    },
}


@pytest.mark.parametrize("world_size", CASES)
def test_values_and_gradients_equal_a_whole_layer(world_size):
    ranks = run_distributed(compare_with_whole_layer, world_size, CASES[world_size])
    for name, case in CASES[world_size].items():
        results = [rank[name] for rank in ranks]
        worst = {quantity: max(errors[quantity] for errors, _ in results) for quantity in results[0][0]}
        print(f"{name}: {worst}")
        assert max(worst.values()) <= 1e-6, (name, worst)  # measured 5.6e-7
        if "forced" not in case:
            used = torch.cat([used for _, used in results]).unique()
            assert len(used) == case.get("config", {}).get("num_local_experts", CONFIG.num_local_experts)


def log_order(rank, world_size):
    """What a pass over two chunks does, in order."""
    from moe.expert_exchange import RowExchange
    from moe.row_products import TorchRows

    events = []

    def logged(owner, name):
        function = getattr(owner, name)

        def run(*arguments):
            events.append(name)
            return function(*arguments)

        setattr(owner, name, run)

    for owner, names in {
        RowExchange: ("out", "home"),
        TorchRows: ("forward", "rows_backward", "weights_backward"),
    }.items():
        for name in names:
            logged(owner, name)
    torch.manual_seed(0)
    layer = expert_parallel.shard(SparseMoE(CONFIG).train(), 2, 2)
    run_layer(layer, rank, 12, None)
    return events


def test_rows_travel_under_the_products_of_other_rows():
    there = ["out", "out"]
    forward = there + ["forward", "home"] * 2
    backward = there + ["rows_backward", "home"] * 2 + ["weights_backward"] * 2
    assert run_distributed(log_order, 2) == [forward + backward] * 2


def test_deepspeed_is_known_in_one_place():
    folder = Path(expert_parallel.__file__).parent
    sources = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}
    importing = [name for name, text in sources.items() if re.search(r"^\s*(from|import) deepspeed\b", text, re.M)]
    assert importing == ["deepspeed_adapter.py"]
    code = "import sys, moe.expert_parallel, moe.kernels.expert_rows; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder.parent)


def inspect_shards(rank, world_size):
    model = torch.nn.ModuleDict({"mlp": SparseMoE(CONFIG)})
    names = list(model.state_dict())
    model["mlp"].experts.down_proj.requires_grad_(False)
    expert_parallel.shard(model, 2)
    copied = copy.deepcopy(model)
    assert list(model.state_dict()) == names == list(copied.state_dict())
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import is_moe_param

    layer = model["mlp"]
    assert isinstance(layer, SparseMoE) and isinstance(layer, MoE)
    assert (layer.num_experts, layer.num_local_experts, layer.ep_size) == (4, 2, 2)
    assert is_moe_param(layer.experts.gate_up_proj) and not is_moe_param(layer.router.weight)
    assert layer.experts.gate_up_proj.group_name == "ep_size_2"
    assert [p.requires_grad for p in (layer.experts.gate_up_proj, layer.experts.down_proj)] == [True, False]
    assert sorted(expert_parallel.expert_parameters(model)) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    with torch.device("meta"):
        meta = expert_parallel.shard(SparseMoE(CONFIG), 2)
    assert meta.experts.gate_up_proj.is_meta and meta.experts.gate_up_proj.shape[0] == 2
    messages = []
    for arguments in ((model, 2), (SparseMoE(CONFIG), 3), (SparseMoE(CONFIG), 4), (SparseMoE(CONFIG), 2, 0)):
        try:
            expert_parallel.shard(*arguments)
        except ValueError as error:
            messages.append(str(error))
    return layer.experts.gate_up_proj.expert_shard, messages


def test_shards_carry_what_deepspeed_and_checkpoints_need():
    first, second = run_distributed(inspect_shards, 2)
    assert (first[0], second[0]) == ((0, 4), (2, 4))
    assert first[1] == second[1]
    sharded_twice, three, four, no_chunk = first[1]
    assert "num_chunks must be at least 1" in no_chunk
    assert "sharded over experts already" in sharded_twice
    assert "ep_size 3 must divide the 4 experts" in three and "ep_size 3 must divide the 2 processes" in three
    assert "ep_size 4 must divide the 2 processes" in four


def test_what_cannot_be_spread_is_refused_before_anything_is_allocated():
    expert_parallel.validate(1, 3, 0, zero_stage=3)
    expert_parallel.validate(4, 8, 16, zero_stage=2)
    with pytest.raises(ValueError, match="ZeRO-3 .* excludes expert parallelism; use ZeRO 0, 1 or 2"):
        expert_parallel.validate(2, 2, 16, zero_stage=3)
    with pytest.raises(ValueError, match="must divide the 6 experts.*must divide the 6 processes"):
        expert_parallel.validate(4, 6, 6)
    with pytest.raises(ValueError, match="the model is dense"):
        expert_parallel.validate(2, 2, 0)
    with pytest.raises(ValueError, match="at least 1"):
        expert_parallel.validate(0, 2, 4)
    with pytest.raises(ValueError, match="must divide the 1 processes"):
        expert_parallel.shard(SparseMoE(CONFIG), 2)  # no process group
    layer = SparseMoE(CONFIG)
    assert expert_parallel.shard(layer, 1) is layer and type(layer) is SparseMoE
