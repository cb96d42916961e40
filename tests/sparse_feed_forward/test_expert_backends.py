"""Every backend against a loop over tokens, values and gradients; what "auto" and the report say."""

import logging
import re

import pytest
import torch
from torch.nn import functional as F

from moe.experts import BACKENDS, Experts, backend_report

RUNNING = ["grouped_mm", "loop"]
"""Backends that run on any machine."""
UNAVAILABLE = [name for name, reason in backend_report().items() if reason is not None]


def naive(hidden_states, expert_indices, expert_weights, gate_up_proj, down_proj, activation):
    """Token by token, choice by choice."""
    rows = []
    for token, experts, weights in zip(hidden_states, expert_indices.tolist(), expert_weights, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (gate_up_proj[expert] @ token).chunk(2)
            row = row + weight * (down_proj[expert] @ (activation(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def problem(num_tokens, top_k, num_experts=4, hidden=16, ffn=24, used=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    used = used or list(range(num_experts))
    picks = [torch.randperm(len(used), generator=generator)[:top_k] for _ in range(num_tokens)]
    indices = torch.tensor(used)[torch.stack(picks)]
    tensors = [
        torch.randn(num_tokens, hidden, generator=generator),
        torch.rand(num_tokens, top_k, generator=generator),
        0.3 * torch.randn(num_experts, 2 * ffn, hidden, generator=generator),
        0.3 * torch.randn(num_experts, hidden, ffn, generator=generator),
    ]
    return indices, [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "used"),
    [(1, 1, None), (1, 2, None), (33, 1, None), (33, 2, None), (33, 4, None), (7, 2, [1, 3]), (5, 1, [2]), (2, 1, [0])],
)
@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
def test_values_and_gradients_equal_the_naive_loop(backend, num_tokens, top_k, used, hidden_act):
    indices, tensors = problem(num_tokens, top_k, used=used)
    upstream = torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (
        lambda: BACKENDS[backend].run(tensors[0], indices, *tensors[1:], hidden_act),
        lambda: naive(tensors[0], indices, *tensors[1:], getattr(F, hidden_act)),
    ):
        output = function()
        results.append((output, *torch.autograd.grad(output, tensors, upstream)))
    for name, ours, expected in zip(
        ("output", "tokens", "weights", "gate_up_proj", "down_proj"), *results, strict=True
    ):
        # measured 8e-6 on gradients of size 16, 4e-7 on outputs
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("backend", RUNNING)
def test_unused_experts_get_zero_gradients(backend):
    indices, tensors = problem(6, 1, used=[2])
    BACKENDS[backend].run(tensors[0], indices, *tensors[1:], "silu").sum().backward()
    for weight in tensors[2:]:
        assert weight.grad[2].abs().sum() > 0
        assert weight.grad[[0, 1, 3]].abs().sum() == 0


@pytest.mark.parametrize("backend", RUNNING)
def test_no_tokens_at_all_still_reach_the_weights(backend):
    _, tensors = problem(1, 2)
    tokens, weights = torch.zeros(0, 16, requires_grad=True), torch.zeros(0, 2, requires_grad=True)
    output = BACKENDS[backend].run(tokens, torch.zeros(0, 2, dtype=torch.long), weights, *tensors[2:], "silu")
    assert output.shape == (0, 16)
    output.sum().backward()
    assert tokens.grad.shape == (0, 16) and weights.grad.shape == (0, 2)
    assert all(weight.grad.abs().sum() == 0 for weight in tensors[2:])


@pytest.mark.parametrize("backend", RUNNING)
def test_bfloat16_sums_over_experts_in_float32(backend):
    indices, tensors = problem(40, 2)
    tokens, weights, gate_up, down = (tensor.detach() for tensor in tensors)
    tokens, gate_up, down = tokens.bfloat16(), gate_up.bfloat16(), down.bfloat16()
    output = BACKENDS[backend].run(tokens, indices, weights, gate_up, down, "silu")
    assert output.dtype == torch.bfloat16
    ones = torch.ones(40, 1)
    rows = [
        BACKENDS[backend].run(tokens, indices[:, choice : choice + 1], ones, gate_up, down, "silu").float()
        for choice in range(2)
    ]
    expected = (rows[0] * weights[:, :1] + rows[1] * weights[:, 1:]).bfloat16()
    assert torch.equal(output, expected)
    exact = naive(tokens.float(), indices, weights, gate_up.float(), down.float(), F.silu)
    # measured 0.0039: intermediate results rounded to 8 bits
    assert (output.float() - exact).norm() < 1e-2 * exact.norm()


def test_loop_and_grouped_mm_repeat_to_the_bit():
    indices, tensors = problem(64, 2)
    for name in RUNNING:
        runs = []
        for _ in range(2):
            output = BACKENDS[name].run(tensors[0], indices, *tensors[1:], "silu")
            runs.append((output, *torch.autograd.grad(output.square().sum(), tensors)))
        assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_gradcheck_of_the_loop_in_float64():
    indices, tensors = problem(5, 2, hidden=4, ffn=3)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *args: BACKENDS["loop"].run(args[0], indices, *args[1:], "silu"), wide)


def test_auto_picks_what_runs_and_says_so_once(caplog):
    from moe.experts import _say_once

    _say_once.cache_clear()
    indices, tensors = problem(8, 2)
    experts = Experts(4, 16, 24, backend="auto")
    with caplog.at_level(logging.INFO, logger="moe.experts"):
        experts(tensors[0], indices, tensors[1])
        experts(tensors[0], indices, tensors[1])
        experts.double()(tensors[0].double(), indices, tensors[1])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "experts backend 'auto' picked 'grouped_mm' (cpu, torch.float32)",
        "experts backend 'auto' picked 'loop' (cpu, torch.float64)",
    ]


def test_auto_takes_the_loop_where_rows_are_not_16_byte_multiples():
    torch.manual_seed(0)
    auto, loop = Experts(4, 18, 7, backend="auto"), Experts(4, 18, 7, backend="loop")
    loop.load_state_dict(auto.state_dict())
    tokens, indices, weights = torch.randn(5, 18), torch.randint(4, (5, 2)), torch.rand(5, 2)
    assert torch.equal(auto(tokens, indices, weights), loop(tokens, indices, weights))


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_a_backend_that_cannot_run_says_what_is_missing(name):
    reason = backend_report()[name]
    with pytest.raises(ValueError, match=re.escape(f"experts backend '{name}' cannot run: {reason}; use 'auto'")):
        Experts(4, 16, 24, backend=name)


def test_the_report_names_every_backend():
    report = backend_report()
    assert set(report) == {"megablocks", "grouped_mm", "triton", "loop"}
    assert report["grouped_mm"] is None and report["loop"] is None


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="experts_backend must be one of .*'grouped_mm'.*got 'groupedmm'"):
        Experts(4, 16, 24, backend="groupedmm")
    with pytest.raises(ValueError, match="hidden_act must be one of"):
        Experts(4, 16, 24, hidden_act="relu")
    experts = Experts(4, 16, 24, backend="grouped_mm")
    indices, weights = torch.zeros(3, 2, dtype=torch.long), torch.rand(3, 2)
    with pytest.raises(ValueError, match="grouped_mm takes bfloat16, float16, float32 on cpu, got float64; use 'loop'"):
        experts.double()(torch.randn(3, 16).double(), indices, weights)
    with pytest.raises(ValueError, match=r"hidden_size \(18\) times 4 bytes is no multiple of 16"):
        Experts(4, 18, 24, backend="grouped_mm")(torch.randn(3, 18), indices, weights)
    with pytest.raises(ValueError, match="tokens are torch.float32, expert weights torch.float64"):
        experts(torch.randn(3, 16), indices, weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("num_tokens", "top_k", "used"), [(1, 2, None), (33, 2, None), (7, 2, [1, 3]), (300, 1, [2])])
def test_grouped_mm_on_cuda_equals_the_loop_without_a_host_synchronisation(num_tokens, top_k, used):
    indices, tensors = problem(num_tokens, top_k, hidden=64, ffn=96, used=used)
    indices = indices.cuda()
    upstream = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
    results = []
    for name in ("grouped_mm", "loop"):
        placed = [tensor.detach().cuda() for tensor in tensors]
        placed = [placed[0].bfloat16(), placed[1], placed[2].bfloat16(), placed[3].bfloat16()]
        placed = [tensor.requires_grad_() for tensor in placed]
        torch.cuda.set_sync_debug_mode("error" if name == "grouped_mm" else "default")
        try:
            output = BACKENDS[name].run(placed[0], indices, *placed[1:], "silu")
            gradients = torch.autograd.grad(output, placed, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((output, *gradients))
    for ours, expected in zip(*results, strict=True):
        assert (ours.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()
