"""Phi-3.5-MoE whole, 41.9 B parameters, on one GPU: build, forward, generate, train with the experts frozen.

    python benchmarks/full_moe.py                 # one GPU with 120 GiB or more; a tiny model on a CPU
    python benchmarks/full_moe.py --output benchmarks/results/full_moe.json

Random weights in bfloat16, drawn on the device. The training step goes through the training engine: bfloat16 with
float32 masters of what is trained (attention, routers, norms, embeddings: 1.6 B), each layer recomputed, SparseMixer's
sampling on. Rates count what is needed: no looked-up embeddings, no gradients of the frozen experts' weights, but
causal attention. Prints a table and, last, one JSON line.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import train_step  # noqa: E402
from train_step_cases import Case, draw_batch, flops_per_step, small  # noqa: E402

import phi35  # noqa: E402
from phi35.parameter_count import count_parameters  # noqa: E402
from phi35.training import environment  # noqa: E402
from phi35.training.config import TrainingConfig  # noqa: E402
from phi35.training.engine import Engine  # noqa: E402
from phi35.training.parameter_groups import freeze_parameters  # noqa: E402


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens of the forward pass and of a training step")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4, help="timed training steps")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    case = Case(
        group="moe-32", preset="phi-3.5-moe", rows=1, length=arguments.length, settings={"freeze": ("experts",)}
    )
    if gpu:
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < 115:
            raise SystemExit(f"needs about 115 GiB of GPU memory for weights and optimizer, {free:.0f} are free")
    else:
        case = small(case)
    record: dict[str, Any] = {"environment": train_step.environment(arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/full_moe.py", *sys.argv[1:]])
    place = environment.start(device.type)

    started = time.perf_counter()
    model = phi35.create(case.model_config, device=device, dtype="bfloat16", seed=0)
    wait(device)
    counted = count_parameters(case.model_config)
    record["build"] = {"seconds": time.perf_counter() - started, "parameters": counted.total, "active": counted.active}
    record["build"]["gib"] = peak(device)
    record["forward"] = time_forward(model, case, device)
    record["generate"] = time_generate(model, case, device, arguments.new_tokens)
    record["training"] = time_training(model, case, device, place, arguments.steps)
    for name, row in record.items():
        if name != "environment":
            print(f"{name:10s}", "  ".join(f"{key} {show(value)}" for key, value in row.items()))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    environment.stop()


def time_forward(model: Any, case: Case, device: torch.device) -> dict[str, Any]:
    """A prompt's logits of the last position."""
    batch, _ = draw_batch(case, device, torch.Generator().manual_seed(1))
    reset(device)

    def run() -> object:
        with torch.no_grad():
            return model(batch["input_ids"], logits_to_keep=1).logits

    run()
    seconds = timed(run, device, 3)
    tokens = batch["input_ids"].numel()
    # A training step's counted operations are three forward passes', with the experts trained.
    flops = flops_per_step(Case(**{**vars(case), "settings": {}}))["needed"] / 3
    rates = {"tokens": tokens, "milliseconds": 1e3 * seconds, "tflops": flops / seconds / 1e12}
    return rates | {"gib": peak(device)}


def time_generate(model: Any, case: Case, device: torch.device, new_tokens: int) -> dict[str, Any]:
    """Greedy tokens after a prompt of 128."""
    prompt = torch.randint(3, case.model_config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(2))
    prompt = prompt.to(device)
    reset(device)
    model.generate(prompt, max_new_tokens=new_tokens, stop_token_ids=[])
    seconds = timed(lambda: model.generate(prompt, max_new_tokens=new_tokens, stop_token_ids=[]), device, 1)
    rates = {"prompt": 128, "new_tokens": new_tokens, "seconds": seconds, "tokens_per_second": new_tokens / seconds}
    return rates | {"gib": peak(device)}


def time_training(model: Any, case: Case, device: torch.device, place: Any, steps: int) -> dict[str, Any]:
    """Optimizer steps with the experts frozen, through the engine; the loss over them."""
    config = TrainingConfig(
        model=case.preset,
        freeze=("experts",),
        dtype="bfloat16",
        gradient_checkpointing=True,
        sequence_length=case.length,
        global_batch_size=case.rows,
        learning_rate=1e-4,
        max_steps=100,
    ).resolve(world_size=1, num_experts=case.model_config.num_local_experts, router_aux_loss_coef=0.0)
    reset(device)
    frozen = freeze_parameters(model, config)
    engine = Engine(model, config, place)
    batch, labels = draw_batch(case, device, torch.Generator().manual_seed(3))
    tokens = batch["input_ids"].numel()
    losses = []

    def run() -> None:
        engine.set_learning_rate(len(losses) + 10)
        losses.append(engine.step([batch], [labels], labels).loss)

    run()
    seconds = timed(run, device, steps)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    flops = flops_per_step(case)["needed"]
    return {
        "tokens": tokens,
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "trained_parameters": trained,
        "frozen_tensors": len(frozen),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "gib": peak(device),
    }


def timed(call: Callable[[], object], device: torch.device, times: int) -> float:
    """Mean seconds of a call."""
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    wait(device)
    return (time.perf_counter() - started) / times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> float | None:
    """GiB allocated at most since ``reset``; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def show(value: object) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
