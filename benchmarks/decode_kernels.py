"""Each kernel of a decoding step alone: error, time and bandwidth of every candidate shape of its programs.

    python benchmarks/decode.py --kernels                     # both models' sizes, needs a CUDA GPU
    python benchmarks/decode.py --kernels --models mini --step

A kernel runs many times in one CUDA graph over weights that together are larger than the caches, programmatic launch
included, as in a step. Bandwidth counts the weights (or keys and values) once. Errors are relative, against torch in
float32 on the same inputs. What phi35/kernels/tuning.py holds is read off this table.
"""

import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe.kernels import decode_step
from moe.kernels.decode_step import Routing, SparseScratch
from phi35 import presets
from phi35.config import ModelConfig
from phi35.kernels import attention, reference, sampling, vector
from phi35.kernels.attention import AttentionScratch
from phi35.kernels.configs import AttentionConfig, VectorConfig
from phi35.kernels.operands import LayerCache, Norm, Rope, StepState

ROTATED_BYTES = 768 * 2**20
PRESETS = {"mini": "phi-3.5-mini", "moe": "phi-3.5-moe"}


@dataclass
class Case:
    """A kernel at one size.

    Attributes:
        name: what it is.
        num_bytes: read per launch, from the memory the copies rotate through.
        configs: candidate shapes of its programs.
        launch: called with (copy, config, pdl).
        error: relative error of copy 0, called after a launch.
        copies: how many sets of weights there are.
    """

    name: str
    num_bytes: int
    configs: list[Any]
    launch: Callable[[int, Any, bool], None]
    error: Callable[[], float]
    copies: int
    results: list[dict[str, Any]] = field(default_factory=list)


def measure(models: list[str], copy_rate: float) -> list[dict[str, Any]]:
    """Check and time all kernels of the models; prints a table."""
    names = [(model, name) for model in models for name in BUILDERS[model]]
    compile_all(names)
    rows = []
    for model, name in names:
        try:
            rows += time_case(model, build(model, name), copy_rate)
        except (RuntimeError, ValueError) as error:
            print(f"{model} {name}: {error}", flush=True)
            rows.append({"model": model, "kernel": name, "error_text": str(error)})
        torch.cuda.empty_cache()
    return rows


def time_case(model: str, case: Case, copy_rate: float) -> list[dict[str, Any]]:
    """All configs of one kernel, and the first also without programmatic launch."""
    rows = []
    for config, pdl in [*((config, True) for config in case.configs), (case.configs[0], False)]:
        for number in range(case.copies):
            case.launch(number, config, pdl)
        case.launch(0, config, pdl)
        error = case.error()
        spent = replayed(lambda config=config, pdl=pdl: [case.launch(i, config, pdl) for i in range(case.copies)])  # type: ignore[misc]
        micros = 1e3 * spent / case.copies
        rate = case.num_bytes / micros / 1e6
        shown = "" if config is None else " ".join(str(value) for value in vars(config).values())
        row = {"model": model, "kernel": case.name, "config": shown, "pdl": pdl, "us": micros, "tb_per_s": rate}
        rows.append(row | {"of_copy": rate / copy_rate, "error": error})
        flag = "" if error < 0.02 else "  WRONG"
        print(
            f"{model:5s}{case.name:16s}{shown:14s}{'pdl' if pdl else '   '}{micros:9.2f} us{rate:7.3f} TB/s"
            f"{100 * rate / copy_rate:6.1f} %  error {error:.1e}{flag}",
            flush=True,
        )
    return rows


def replayed(call: Callable[[], object], rounds: int = 7) -> float:
    """Median milliseconds of a captured call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for turn in range(rounds + 2):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        if turn >= 2:
            times.append(first.elapsed_time(last))
    return statistics.median(times)


def compile_all(names: list[tuple[str, str]], compile_one: Callable[[tuple[str, str]], str] | None = None) -> None:
    """Compile in processes of their own, side by side; the results lie in Triton's cache then."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(12, len(names))) as pool:
        for problem in pool.imap_unordered(compile_one or compile_case, names):
            if problem:
                print(problem, flush=True)


def compile_case(name: tuple[str, str]) -> str:
    """Launch each config of one case once."""
    try:
        case = build(*name, copies=1)
        for config, pdl in [*((config, True) for config in case.configs), (case.configs[0], False)]:
            case.launch(0, config, pdl)
        torch.cuda.synchronize()
    except Exception as error:  # the parent meets it again, with its own report
        return f"{name}: {error}"
    return ""


def build(model: str, name: str, copies: int | None = None) -> Case:
    """A case with random operands."""
    torch.manual_seed(0)
    return BUILDERS[model][name](presets.get(PRESETS[model]), copies)


def draw(*shape: int, scale: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=dtype) * scale


def count(num_bytes: int, copies: int | None) -> int:
    """Sets of weights that pass the caches."""
    return copies or max(4, min(256, ROTATED_BYTES // num_bytes))


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """||value - expected|| / ||expected||; nan counts as wrong."""
    return float((value.float() - expected.float()).norm() / expected.float().norm())


def norm_for(config: ModelConfig) -> Norm:
    """The model's norm."""
    width = config.hidden_size
    return Norm(config.norm_type, 1 + draw(width), draw(width), config.rms_norm_eps)


def wide(norm: Norm) -> Norm:
    """The same in float32."""
    return replace(norm, weight=norm.weight.float(), bias=norm.bias.float())


def vector_configs(*shapes: tuple[int, int]) -> list[VectorConfig]:
    """Configs from (rows, warps)."""
    return [VectorConfig(rows, warps) for rows, warps in shapes]


def qkv_case(config: ModelConfig, copies: int | None) -> Case:
    """Norm, product, rotation, cache store."""
    heads, num_kv, dim = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
    width, rows = config.hidden_size, (heads + 2 * num_kv) * dim
    num_bytes = 2 * rows * width
    total = count(num_bytes, copies)
    weights = [draw(rows, width) for _ in range(total)]
    bias = draw(rows) if config.attention_bias else None
    hidden, norm = draw(1, width, scale=1.0), norm_for(config)
    rope = Rope(torch.rand(2, dim // 2, device="cuda"), torch.ones(2, device="cuda"))
    lengths, long = torch.tensor([37], device="cuda"), torch.tensor([True], device="cuda")
    query, keys, values = draw(1, heads * dim), draw(1, num_kv, 65, dim), draw(1, num_kv, 65, dim)
    cache = LayerCache(keys, values)

    def launch(number: int, shape: VectorConfig, pdl: bool) -> None:
        operands = (hidden, norm, weights[number], bias, rope, lengths, long, query, cache)
        vector.project_qkv(*operands, shape, pdl)

    def error() -> float:
        plain = [value.float() for value in (query, keys, values)]
        wide_bias = None if bias is None else bias.float()
        reference.project_qkv(
            hidden.float(),
            wide(norm),
            weights[0].float(),
            wide_bias,
            rope,
            lengths,
            long,
            plain[0],
            LayerCache(*plain[1:]),
        )
        mine = [query, keys[:, :, 37], values[:, :, 37]]
        return max(map(relative, mine, [plain[0], plain[1][:, :, 37], plain[2][:, :, 37]]))

    shapes = vector_configs((4, 4), (2, 4), (8, 4), (4, 2), (2, 2))
    return Case("qkv", num_bytes, shapes, launch, error, total)


def add_case(name: str, rows: int, width: int, biased: bool, copies: int | None, *shapes: tuple[int, int]) -> Case:
    """A residual product."""
    num_bytes = 2 * rows * width
    total = count(num_bytes, copies)
    weights = [draw(rows, width) for _ in range(total)]
    bias, token, start, hidden = draw(rows) if biased else None, draw(1, width, scale=1.0), draw(1, rows), draw(1, rows)

    def launch(number: int, shape: VectorConfig, pdl: bool) -> None:
        vector.project_add(token, weights[number], bias, hidden, shape, pdl)

    def error() -> float:
        mine, plain = start.clone(), start.float()
        vector.project_add(token, weights[0], bias, mine, error_shape[0], False)
        reference.project_add(token.float(), weights[0].float(), None if bias is None else bias.float(), plain)
        return relative(mine, plain)

    configs = vector_configs(*shapes)
    error_shape = [configs[0]]

    def launch_and_note(number: int, shape: VectorConfig, pdl: bool) -> None:
        error_shape[0] = shape
        launch(number, shape, pdl)

    return Case(name, num_bytes, configs, launch_and_note, error, total)


def gate_up_case(config: ModelConfig, copies: int | None) -> Case:
    """Norm, gate and up product, activation."""
    width, ffn = config.hidden_size, config.intermediate_size
    num_bytes = 4 * ffn * width
    total = count(num_bytes, copies)
    weights = [draw(2 * ffn, width) for _ in range(total)]
    hidden, norm, acted = draw(1, width, scale=1.0), norm_for(config), draw(1, ffn)

    def launch(number: int, shape: VectorConfig, pdl: bool) -> None:
        vector.project_gate_up(hidden, norm, weights[number], acted, "silu", shape, pdl)

    def error() -> float:
        plain = acted.float()
        reference.project_gate_up(hidden.float(), wide(norm), weights[0].float(), plain, "silu")
        return relative(acted, plain)

    return Case("gate_up", num_bytes, vector_configs((4, 4), (2, 4), (8, 4), (4, 2), (2, 2)), launch, error, total)


def logits_case(config: ModelConfig, copies: int | None) -> Case:
    """Norm and head."""
    width, vocab = config.hidden_size, config.vocab_size
    num_bytes = 2 * vocab * width
    total = count(num_bytes, copies)
    weights = [draw(vocab, width) for _ in range(total)]
    hidden, norm = draw(1, width, scale=1.0), norm_for(config)
    logits = torch.empty(1, vocab, device="cuda")

    def launch(number: int, shape: VectorConfig, pdl: bool) -> None:
        vector.project_logits(hidden, norm, weights[number], None, logits, shape, pdl)

    def error() -> float:
        plain = torch.empty_like(logits)
        reference.project_logits(hidden.float(), wide(norm), weights[0].float(), None, plain)
        return relative(logits, plain)

    return Case("logits", num_bytes, vector_configs((4, 4), (2, 4), (8, 4), (4, 2)), launch, error, total)


def attention_case(
    name: str, config: ModelConfig, batch: int, length: int, copies: int | None, *shapes: tuple[int, int, int, int]
) -> Case:
    """Split attention; shapes are (splits, block, warps, stages)."""
    heads, num_kv, dim = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
    num_bytes = 4 * batch * num_kv * length * dim
    # As many caches as a model has layers: what a device's address caches hold counts, too.
    total = copies or 32
    keys = [draw(batch, num_kv, length + 9, dim, scale=1.0) for _ in range(total)]
    values = [draw(batch, num_kv, length + 9, dim, scale=1.0) for _ in range(total)]
    query, out = draw(batch, heads * dim, scale=1.0), draw(batch, heads * dim)
    lengths = torch.full((batch,), length - 1, device="cuda")
    scratches: dict[int, AttentionScratch] = {}

    def launch(number: int, shape: AttentionConfig, pdl: bool) -> None:
        if shape.splits not in scratches:
            scratches[shape.splits] = AttentionScratch(batch, num_kv, heads // num_kv, dim, shape.splits, query.device)
        operands = (query, LayerCache(keys[number], values[number]), lengths, out, scratches[shape.splits])
        attention.attend(*operands, None, shape, pdl)

    def error() -> float:
        plain = out[:1].float()
        cache = LayerCache(keys[0][:1].float(), values[0][:1].float())
        reference.attend(query[:1].float(), cache, lengths[:1], plain, None)
        return relative(out[:1], plain)

    return Case(name, num_bytes, [AttentionConfig(*shape) for shape in shapes], launch, error, total)


def expert_cases(name: str, config: ModelConfig, copies: int | None) -> Case:
    """Router, experts' gate and up, or experts' down."""
    num_experts, width, ffn = config.num_local_experts, config.hidden_size, config.intermediate_size
    hidden, norm = draw(1, width, scale=1.0), norm_for(config)
    scratch = SparseScratch(hidden, num_experts, 2, ffn)
    total = count({"route": 2**17, "expert_gate_up": 8 * ffn * width, "expert_down": 4 * ffn * width}[name], copies)
    indices = [torch.randperm(num_experts)[:2].to("cuda", torch.int32) for _ in range(total)]
    routing = Routing("sparsemixer", 2, jitter_eps=config.router_jitter_noise)
    if name == "route":
        routers = [draw(num_experts, width) for _ in range(total)]

        def route_error() -> float:
            token = reference.normed(hidden.float(), wide(norm)).to(hidden.dtype)
            return relative(scratch.scores, token.float() @ routers[0].float().t())

        return Case(
            name,
            2 * num_experts * width,
            [None],
            lambda number, _, pdl: decode_step.route(hidden, norm, routers[number], routing, scratch, pdl),
            route_error,
            total,
        )
    scratch.normed.copy_(hidden)
    scratch.acted.copy_(draw(2, ffn, scale=1.0))
    scratch.weights.copy_(torch.tensor([0.6, 0.7]))
    up = name == "expert_gate_up"
    weight = draw(num_experts, *((2 * ffn, width) if up else (width, ffn)))
    out = draw(1, width)
    last: list[Any] = []

    def launch(number: int, shape: VectorConfig, pdl: bool) -> None:
        scratch.indices = indices[number]
        last[:] = [shape, number]
        if up:
            decode_step.expert_gate_up(weight, "silu", scratch, shape, pdl)
        else:
            decode_step.expert_down_add(weight, out, scratch, shape, pdl)

    def error() -> float:
        chosen = indices[last[1]].long()
        if up:
            gate, lift = (weight[chosen].float() @ hidden[0].float()).chunk(2, dim=-1)
            return relative(scratch.acted, torch.nn.functional.silu(gate) * lift)
        mine = torch.zeros_like(out)
        decode_step.expert_down_add(weight, mine, scratch, last[0], False)
        products = torch.einsum("kdf,kf->kd", weight[chosen].float(), scratch.acted.float())
        return relative(mine[0], scratch.weights @ products)

    shapes = [(4, 4), (2, 4), (8, 4), (4, 2)] if up else [(2, 8), (1, 4), (2, 4), (1, 8), (4, 8)]
    num_bytes = (8 if up else 4) * ffn * width
    return Case(name, num_bytes, vector_configs(*shapes), launch, error, total)


def choose_case(config: ModelConfig, copies: int | None, sampled: bool) -> Case:
    """The sampler; its bytes are the logits'."""
    vocab = config.vocab_size
    logits = [torch.randn(1, vocab, device="cuda") * 3 for _ in range(copies or 16)]
    state = StepState.new(1, vocab, torch.device("cuda"))
    if sampled:
        for name, value in (("temperature", 0.8), ("top_k", 50), ("top_p", 0.9)):
            getattr(state, name).fill_(value)
        state.draws.uniform_()

    def error() -> float:
        torch.cuda.synchronize()
        expected = logits[0].log_softmax(dim=-1)[0, state.tokens[0]]
        place = (int(state.steps[0]) - 1) % state.logprobs.shape[0]
        wrong = not sampled and int(state.tokens[0]) != int(logits[0].argmax())
        return abs(float(state.logprobs[place, 0] - expected.cpu())) + wrong

    name = "sample" if sampled else "greedy"
    return Case(name, 4 * vocab, [None], lambda i, _, pdl: sampling.choose(logits[i], state, pdl), error, len(logits))


BUILDERS: dict[str, dict[str, Callable[[ModelConfig, int | None], Case]]] = {
    "mini": {
        "qkv": qkv_case,
        "o_proj": lambda c, n: add_case("o_proj", 3072, 3072, False, n, (4, 4), (2, 4), (8, 4), (2, 2), (4, 2)),
        "gate_up": gate_up_case,
        "down": lambda c, n: add_case("down", 3072, 8192, False, n, (2, 8), (2, 4), (1, 4), (4, 8), (1, 8)),
        "logits": logits_case,
        "attend 640": lambda c, n: attention_case(
            "attend 640", c, 1, 640, n, (8, 32, 4, 3), (8, 32, 4, 2), (8, 32, 2, 3), (4, 32, 4, 3), (4, 64, 8, 2)
        ),
        "attend 32k": lambda c, n: attention_case(
            "attend 32k", c, 1, 32768, n, (8, 32, 4, 3), (8, 32, 4, 4), (16, 32, 4, 3), (8, 16, 4, 4), (8, 64, 8, 3)
        ),
        "attend 32x640": lambda c, n: attention_case("attend 32x640", c, 32, 640, n, (1, 32, 4, 3), (2, 32, 4, 3)),
        "greedy": lambda c, n: choose_case(c, n, False),
        "sample": lambda c, n: choose_case(c, n, True),
    },
    "moe": {
        "qkv": qkv_case,
        "o_proj": lambda c, n: add_case("o_proj", 4096, 4096, True, n, (4, 4), (2, 4), (8, 4), (2, 2)),
        "route": lambda c, n: expert_cases("route", c, n),
        "expert_gate_up": lambda c, n: expert_cases("expert_gate_up", c, n),
        "expert_down": lambda c, n: expert_cases("expert_down", c, n),
        "logits": logits_case,
        "attend 640": lambda c, n: attention_case(
            "attend 640", c, 1, 640, n, (8, 64, 4, 3), (8, 64, 4, 2), (4, 64, 4, 3), (16, 32, 4, 3)
        ),
        "attend 32k": lambda c, n: attention_case(
            "attend 32k", c, 1, 32768, n, (32, 64, 4, 3), (32, 64, 4, 4), (16, 128, 8, 3), (32, 64, 8, 3)
        ),
    },
}
