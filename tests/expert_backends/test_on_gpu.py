"""The CUDA backends in bfloat16 against the float32 loop: balanced, skewed, empty experts, few tokens; capture."""

import pytest
import torch

from moe import experts, megablocks_backend
from moe.kernels import backend
from moe.layer import SparseMoE
from phi35 import presets
from phi35.training.gradient_norm import GradientNorm

pytestmark = pytest.mark.gpu

HIDDEN, FFN, EXPERTS = 512, 640, 8


def need(name: str) -> experts.BackendFunction:
    """The backend's function; skips where it cannot run."""
    reason = experts.BACKENDS[name].missing()
    if reason is not None:
        pytest.skip(reason)
    run = experts.BACKENDS[name].run
    assert run is not None
    return run


def draw(tokens: int, routing: str, dtype: torch.dtype, hidden: int = HIDDEN, ffn: int = FFN) -> list[torch.Tensor]:
    """Tokens, routing weights, gate_up_proj, down_proj, and the experts' numbers last."""
    device = "cuda"
    scores = torch.rand(tokens, EXPERTS, device=device)
    if routing == "skewed":
        scores[: 4 * tokens // 5, 3] += 1.0
    if routing == "empty":
        scores[:, ::2] = -1.0
    return [
        torch.randn(tokens, hidden, device=device, dtype=dtype),
        torch.rand(tokens, 2, device=device),
        (torch.randn(EXPERTS, 2 * ffn, hidden, device=device) * 0.05).to(dtype),
        (torch.randn(EXPERTS, hidden, ffn, device=device) * 0.05).to(dtype),
        scores.topk(2, dim=1).indices,
    ]


def relative_errors(run: experts.BackendFunction, values: list[torch.Tensor], act: str = "silu") -> list[float]:
    """Output, the four gradients, and the forward-only output, against the loop in float32."""
    *values, indices = values
    wide = [value.detach().clone().float().requires_grad_() for value in values]
    mine = [value.clone().requires_grad_() for value in values]
    expected, out = experts.loop(wide[0], indices, *wide[1:], act), run(mine[0], indices, *mine[1:], act)
    upstream = torch.randn_like(out)
    expected.backward(upstream.float())
    out.backward(upstream)
    with torch.no_grad():
        only = run(values[0], indices, *values[1:], act)
    pairs = [(out, expected), (only, expected), *((a.grad, b.grad) for a, b in zip(mine, wide, strict=True))]
    return [float((a.detach().float() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]


@pytest.mark.parametrize("routing", ["balanced", "skewed", "empty"])
@pytest.mark.parametrize("tokens", [1, 40, 777])
@pytest.mark.parametrize("name", ["triton", "megablocks", "grouped_mm"])
def test_output_and_gradients_equal_the_float32_loop(name: str, tokens: int, routing: str) -> None:
    # Measured on the full-size layer (benchmarks/results): at most 5.1e-3; bfloat16's half spacing is 3.9e-3.
    assert max(relative_errors(need(name), draw(tokens, routing, torch.bfloat16))) < 1.5e-2


@pytest.mark.parametrize(
    ("dtype", "hidden", "ffn", "act"),
    [(torch.float16, HIDDEN, FFN, "silu"), (torch.bfloat16, HIDDEN, FFN, "gelu"), (torch.bfloat16, 488, 712, "silu")],
)
def test_portable_kernels_take_what_the_hopper_kernels_do_not(
    dtype: torch.dtype, hidden: int, ffn: int, act: str
) -> None:
    assert max(relative_errors(need("triton"), draw(300, "skewed", dtype, hidden, ffn), act)) < 1.5e-2


def test_triton_asks_the_host_for_nothing_and_replays_with_other_routings() -> None:
    run = need("triton")
    *values, indices = draw(300, "balanced", torch.bfloat16)
    values = [value.requires_grad_() for value in values]
    upstream = torch.randn_like(values[0])

    def step() -> tuple[torch.Tensor, ...]:
        out = run(values[0], indices, *values[1:], "silu")
        return out.detach(), *torch.autograd.grad(out, values, upstream)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    indices.copy_(draw(300, "skewed", torch.bfloat16)[-1])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_compiled_layer_has_the_same_bits() -> None:
    run = need("triton")
    *values, indices = draw(300, "balanced", torch.bfloat16)
    values = [value.requires_grad_() for value in values]
    compiled = torch.compile(run, fullgraph=True)
    outs = [one(values[0], indices, *values[1:], "silu") for one in (run, compiled)]
    grads = [torch.autograd.grad(out.float().square().sum(), values) for out in outs]
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_auto_takes_triton_where_it_runs() -> None:
    need("triton")
    values = draw(4, "balanced", torch.bfloat16)
    assert experts.automatic_backend(values[0], values[2], values[3]) == "triton"
    assert backend.limit(values[0].double(), values[2].double(), values[3].double()) is not None
    assert megablocks_backend.limit(values[0].float(), values[2].float(), values[3].float()) is not None


@pytest.mark.parametrize("tokens", [300, 6000])
def test_the_kernels_leave_the_squares_of_the_gradients_they_make(tokens: int) -> None:
    """One strip and several; an expert without tokens."""
    config = presets.get("phi-3.5-moe").replace(num_hidden_layers=1, intermediate_size=640, num_local_experts=4)
    layer = SparseMoE(config).to("cuda", torch.bfloat16).train()
    with torch.no_grad():
        layer.router.weight[3] -= 10 * layer.router.weight.abs().mean()
    norm = GradientNorm(list(layer.parameters()), ahead=True)
    hidden_states = torch.randn(1, tokens, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        norm.watch()
        mixed, _ = layer(hidden_states)
        (mixed.float().square().mean() * 100).backward()
        assert len(layer.experts.gate_up_proj.squares_of_gradient or ()) == 0  # taken
        grads = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        expected = torch.stack([grad.double().norm() for grad in grads]).norm()
        found = norm([parameter for parameter in layer.parameters() if parameter.grad is not None])
        # The kernel squares sums in float32, which the gradient holds rounded to bfloat16.
        assert abs(float(found / expected) - 1) < 1e-4
        layer.zero_grad(set_to_none=True)
