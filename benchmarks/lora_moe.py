"""LoRA and QLoRA of Phi-3.5-MoE whole, 41.9 B parameters, on one GPU, through the training engine.

    python benchmarks/lora_moe.py                       # LoRA beside bfloat16 weights: one GPU with 120 GiB or more
    python benchmarks/lora_moe.py --bits 4              # QLoRA: experts and attention in int4, one GPU with 80 GiB
    python benchmarks/lora_moe.py --rows 1 4 --targets attention experts

Random weights, drawn on the device; an adapter of rank 16 on attention and on every expert; bfloat16 with float32
masters of the adapter; each layer recomputed (with --keep also none); SparseMixer's sampling on. First one layer's
experts are compared with the whole matrices W + s B A on the device. Rates count what is needed: forward, the
gradients of the inputs, the adapter's own; not what is recomputed, and no gradient of a frozen weight. On a CPU a tiny
model takes the same way.
Prints a table and, last, one JSON line.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import train_step  # noqa: E402
from full_moe import peak, reset, show, wait  # noqa: E402
from train_step_cases import Case, draw_batch, small  # noqa: E402

import phi35  # noqa: E402
from moe import low_rank  # noqa: E402
from phi35.adapters.config import AdapterConfig  # noqa: E402
from phi35.adapters.inject import active_parameters, add_adapter, is_adapter  # noqa: E402
from phi35.quantization.config import QuantizationConfig, WeightFormat  # noqa: E402
from phi35.training import environment  # noqa: E402
from phi35.training.config import TrainingConfig  # noqa: E402
from phi35.training.engine import Engine  # noqa: E402
from phi35.training.flops import TrainingFlops, Work, visible_pairs  # noqa: E402

PEAK = 989.4e12


def main() -> None:
    """Parse, check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="samples of a step; a measurement for each")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default=["attention", "experts"])
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=16, help="of attention's and experts' weights")
    parser.add_argument("--keep", action="store_true", help="also time the fewest rows with no layer recomputed")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take most of a step")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    case = Case(group="moe-32", preset="phi-3.5-moe", rows=1, length=arguments.length)
    if not gpu:
        case = small(case)
    elif (free := torch.cuda.mem_get_info()[0] / 2**30) < (needed := {16: 105, 8: 60, 4: 40}[arguments.bits]):
        raise SystemExit(f"needs about {needed} GiB of GPU memory, {free:.0f} are free")
    record: dict[str, Any] = {"environment": train_step.environment(arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/lora_moe.py", *sys.argv[1:]])
    place = environment.start(device.type)
    started = time.perf_counter()
    quantization = None
    if arguments.bits < 16:
        one = WeightFormat(bits=arguments.bits, group_size=128 if gpu else 32)
        quantization = QuantizationConfig(linear=one)
    dtype = "bfloat16" if gpu else "float32"
    model = phi35.create(case.model_config, device=device, dtype=dtype, seed=0, quantization=quantization)
    adapter = AdapterConfig(rank=arguments.rank, alpha=2.0 * arguments.rank, targets=tuple(arguments.targets))
    add_adapter(model, adapter, seed=0)
    wait(device)
    trained = sum(parameter.numel() for name, parameter in model.named_parameters() if is_adapter(name))
    record["build"] = {"seconds": time.perf_counter() - started, "trained_parameters": trained, "gib": peak(device)}
    if "experts" in arguments.targets:
        record["check"] = check_experts(model, device)
        record["experts"] = time_experts(model, case, device)
    engine = None
    for rows in arguments.rows:
        if engine is None:
            engine = build_engine(model, case, place, dtype)
        name = f"rows {rows}"
        record[name] = time_training(engine, case, rows, arguments.steps)
        print_row(name, record[name])
    if arguments.keep and engine is not None:
        model.gradient_checkpointing, rows = False, min(arguments.rows)
        name = f"rows {rows}, nothing recomputed"
        record[name] = time_training(engine, case, rows, arguments.steps)
        print_row(name, record[name])
        model.gradient_checkpointing = True
    if arguments.profile and engine is not None:
        profile(engine, case, arguments.rows[-1])
    for name in ("build", "check", "experts"):
        if name in record:
            print_row(name, record[name])
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    environment.stop()


@torch.no_grad()
def check_experts(model: Any, device: torch.device) -> dict[str, Any]:
    """Largest difference, relative to the largest value, of a layer's experts from the whole matrices W + s B A.

    64 tokens, B drawn for the check and set back to zero.
    """
    wrapper = model.model.layers[0].mlp.experts
    outer, inner = wrapper, wrapper.base_layer
    draw = torch.Generator(device).manual_seed(5)
    second = [layer.lora_B["default"].weight for layer in (inner, outer)]
    for weight in second:
        weight.normal_(0.0, 0.02, generator=draw)
    experts = inner.base_layer
    dtype = model.dtype
    hidden_size, num_experts = model.config.hidden_size, model.config.num_local_experts
    hidden = torch.randn(64, hidden_size, generator=draw, device=device, dtype=dtype)
    indices = torch.rand(64, num_experts, generator=draw, device=device).topk(2, dim=1).indices
    weights = torch.rand(64, 2, generator=draw, device=device)
    got = wrapper(hidden, indices, weights).float()
    total = torch.zeros_like(got)
    for expert in range(num_experts):
        whole = []
        for layer in (inner, outer):
            plain = held(experts, layer.parameter_name, expert)
            a = layer.lora_A["default"].weight.view(num_experts, -1, plain.shape[1])[expert]
            b = layer.lora_B["default"].weight.view(plain.shape[0], -1, num_experts)[..., expert]
            whole.append(plain.float() + layer.scaling["default"] * b.float() @ a.float())
        gate, up = (hidden.float() @ whole[0].T).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up) @ whole[1].T
        total += out * (weights * (indices == expert)).sum(dim=1, keepdim=True)
    for weight in second:
        weight.zero_()
    return {"relative_error": float((got - total).abs().max() / total.abs().max())}


def time_experts(model: Any, case: Case, device: torch.device) -> dict[str, Any]:
    """Milliseconds of one layer's adapted experts, forward and backward: as they run, and by torch's products."""
    wrapper = model.model.layers[0].mlp.experts
    num_experts, hidden_size = model.config.num_local_experts, model.config.hidden_size
    draw = torch.Generator(device).manual_seed(6)
    tokens = case.rows * case.length
    hidden = torch.randn(tokens, hidden_size, generator=draw, device=device, dtype=model.dtype).requires_grad_()
    indices = torch.rand(tokens, num_experts, generator=draw, device=device).topk(2, dim=1).indices
    weights = torch.rand(tokens, 2, generator=draw, device=device).requires_grad_()
    kernels, result = low_rank.adapted_experts, {}
    for name, run in (("milliseconds", kernels), ("torch_milliseconds", low_rank.with_torch)):
        low_rank.adapted_experts = run  # the wrapper looks it up at each call
        seconds = []
        for _ in range(8):
            wait(device)
            started = time.perf_counter()
            wrapper(hidden, indices, weights).sum().backward()
            wait(device)
            seconds.append(time.perf_counter() - started)
        result[name] = 1e3 * sorted(seconds[2:])[3]
    low_rank.adapted_experts = kernels
    model.zero_grad(set_to_none=True)
    return {"tokens": tokens, **result}


def held(experts: Any, name: str, expert: int) -> torch.Tensor:
    """One expert's weight, restored where it is in few bits."""
    if not hasattr(experts, "held"):
        return getattr(experts, name)[expert]
    from phi35.quantization.linear import restored

    return restored(
        experts.held(name).part(expert), torch.bfloat16 if experts.held(name).codes.is_cuda else torch.float32
    )


def build_engine(model: Any, case: Case, place: Any, dtype: str) -> Engine:
    """The engine around the adapted model."""
    config = TrainingConfig(
        model=case.preset,
        dtype=dtype,
        gradient_checkpointing=True,
        sequence_length=case.length,
        global_batch_size=1,
        learning_rate=2e-4,
        weight_decay=0.0,
        max_steps=1000,
    ).resolve(world_size=1, num_experts=case.model_config.num_local_experts, router_aux_loss_coef=0.001)
    return Engine(model, config, place)


def time_training(engine: Engine, case: Case, rows: int, steps: int) -> dict[str, Any]:
    """Optimizer steps of ``rows`` samples; the loss over them."""
    device, model = engine.environment.device, engine.model
    many = Case(**{**vars(case), "rows": rows})
    batch, labels = draw_batch(many, device, torch.Generator().manual_seed(3))
    tokens = batch["input_ids"].numel()
    losses: list[torch.Tensor] = []

    def run() -> None:
        engine.set_learning_rate(len(losses) + 10)
        losses.append(engine.step([batch], [labels], labels).loss)

    reset(device)
    for _ in range(2):
        run()
    wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        run()
    wait(device)
    seconds = (time.perf_counter() - started) / steps
    flops = TrainingFlops(case.model_config, adapters=active_parameters(model, case.model_config))
    needed = flops(Work(tokens, rows * visible_pairs(case.length, case.model_config.sliding_window)))
    return {
        "tokens": tokens,
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "tflops": needed / seconds / 1e12,
        "mfu": needed / seconds / PEAK,
        "gib": peak(device),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
    }


def profile(engine: Engine, case: Case, rows: int) -> None:
    """The kernels that take most of a step, and the functions in which the host spends its time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    device = engine.environment.device
    batch, labels = draw_batch(Case(**{**vars(case), "rows": rows}), device, torch.Generator().manual_seed(3))
    kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with record(activities=kinds) as recorded:
        engine.step([batch], [labels], labels)
        wait(device)
    order = "cuda_time_total" if device.type == "cuda" else "cpu_time_total"
    print(recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=90))
    # The profiler sees one thread: the backward pass must not run in another.
    host = cProfile.Profile()
    started = time.perf_counter()
    with torch.autograd.set_multithreading_enabled(False):
        host.runcall(engine.step, [batch], [labels], labels)
    print(f"the host was done after {1e3 * (time.perf_counter() - started):.1f} ms", end=", ")
    wait(device)
    print(f"the device after {1e3 * (time.perf_counter() - started):.1f} ms, both under the profiler")
    for order in ("tottime", "cumtime"):
        pstats.Stats(host).sort_stats(order).print_stats(35)


def print_row(name: str, row: dict[str, Any]) -> None:
    print(f"{name:10s}", "  ".join(f"{key} {show(value)}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
