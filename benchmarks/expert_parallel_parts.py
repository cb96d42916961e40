"""What ``expert_parallel.py`` measures in one process of its own: steps, exchanges, errors."""

import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import phi35  # noqa: E402
from moe import deepspeed_adapter, expert_parallel  # noqa: E402
from moe.exchange_plan import CountExchange, ExchangePlan  # noqa: E402
from moe.expert_exchange import ExchangeClock, RowExchange  # noqa: E402
from moe.kernels import expert_rows  # noqa: E402
from moe.kernels.grouped_gemm import HALF_ROWS  # noqa: E402
from moe.layer import SparseMoE  # noqa: E402
from phi35.meta_model import meta_model  # noqa: E402
from phi35.training.build import build_model, read_model_config  # noqa: E402
from phi35.training.config import TrainingConfig  # noqa: E402
from phi35.training.engine import Engine  # noqa: E402
from phi35.training.environment import Environment  # noqa: E402
from phi35.training.flops import TrainingFlops, Work  # noqa: E402

PEAK = 989.4e12
"""Operations a second of an H100 or H200 in bfloat16, by the data sheet."""


class Marks:
    """Named moments of steps, as events on the device, which the host does not wait for, or a CPU's clock."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.steps: list[list[tuple[str, Any]]] = []

    def begin(self) -> None:
        """A step begins here."""
        self.steps.append([])
        self.add("start")

    def add(self, name: str) -> None:
        """The phase called ``name`` ends here."""
        if self.gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.steps[-1].append((name, event))
        else:
            self.steps[-1].append((name, time.perf_counter()))

    def after(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, with the phase called ``name`` ending where it returns."""

        def run(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            self.add(name)
            return result

        return run

    def spans(self) -> list[dict[str, float]]:
        """Milliseconds of each phase of each step, and "total"; waits for the device."""
        if self.gpu:
            torch.cuda.synchronize()
        found = []
        for moments in self.steps:
            spans: dict[str, float] = {}
            for (_, before), (name, after) in zip(moments, moments[1:], strict=False):
                spans[name] = spans.get(name, 0.0) + (
                    before.elapsed_time(after) if self.gpu else (after - before) * 1000
                )
            found.append(spans | {"total": sum(spans.values())})
        return found


def training_config(options: Any, world_size: int, gpu: bool) -> TrainingConfig:
    """The run's config: the same for one GPU and for several, but for the experts' share."""
    frozen = ("experts",) if options.full else ()
    settings: dict[str, Any] = {
        "model": "tiny-phi-3.5-moe" if options.tiny else "phi-3.5-moe",
        "model_overrides": {} if options.full and not options.tiny else {"num_hidden_layers": options.layers},
        "freeze": frozen,
        "gradient_checkpointing": options.full,
        "dtype": "bfloat16" if gpu else "float32",
        "optimizer_dtype": "bfloat16" if gpu and options.zero_stage == 0 and not options.full else "float32",
        "zero_stage": options.zero_stage,
        "init_device": "cuda" if gpu else "cpu",
        "global_batch_size": options.rows * world_size,
        "micro_batch_size": options.rows,
        "sequence_length": options.length,
        "max_steps": 10_000,
        "learning_rate": 1e-5,
        "schedule": "constant",
        "warmup_steps": 0,
        "ep_size": world_size,
    }
    settings |= options.settings
    model_config = read_model_config(TrainingConfig(**settings))
    return TrainingConfig(**settings).resolve(
        world_size=world_size,
        num_experts=model_config.num_local_experts,
        router_aux_loss_coef=model_config.router_aux_loss_coef,
    )


class Run:
    """A model under the training engine, stepped on random tokens.

    Args:
        options: of the command line.
        place: this process's.
    """

    def __init__(self, options: Any, place: Environment) -> None:
        self.options, self.place = options, place
        self.gpu = place.device.type == "cuda"
        self.config = training_config(options, place.world_size, self.gpu)
        self.model_config = read_model_config(self.config)
        began = time.perf_counter()
        model = build_model(self.config, self.model_config, None, place.device)
        if self.gpu:
            torch.cuda.synchronize()
        self.build_seconds = time.perf_counter() - began
        self.engine = Engine(model, self.config, place)
        self.marks = Marks(self.gpu)
        for name, phase in (("forward", "forward"), ("backward", "backward"), ("step", "update")):
            setattr(self.engine.deepspeed, name, self.marks.after(getattr(self.engine.deepspeed, name), phase))
        self.layers = [module for module in model.modules() if isinstance(module, SparseMoE)]
        self.generator = torch.Generator(place.device).manual_seed(100 + place.rank)
        self.num_steps = 0

    def step(self) -> Any:
        """One optimizer step on fresh tokens."""
        size = (self.options.rows, self.options.length)
        ids = torch.randint(3, self.model_config.vocab_size, size, device=self.place.device, generator=self.generator)
        count = size[0] * (size[1] - 1)
        self.engine.set_learning_rate(self.num_steps)
        self.num_steps += 1
        batch = {"input_ids": ids, "labels": ids}
        return self.engine.step([batch], [count], count * self.place.world_size)

    def time(self, warmup: int, steps: int) -> dict[str, Any]:
        """Medians over steps."""
        self.marks.steps, result = [], None
        for index in range(warmup + steps):
            if index == warmup and self.gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.marks.begin()
            result = self.step()
            self.marks.add("other")
        assert result is not None
        spans = self.marks.spans()[warmup:]
        numbers = {key: statistics.median(one[key] for one in spans) for key in spans[0]}
        loads = torch.stack([routing.expert_indices.flatten().bincount(minlength=self.model_config.num_local_experts)
                             for routing in result.outputs[0].router_outputs]).float()  # fmt: skip
        tokens = self.options.rows * self.options.length
        return {
            "ms": {key: round(value, 2) for key, value in numbers.items()},
            "spread_ms": round(max(one["total"] for one in spans) - min(one["total"] for one in spans), 2),
            "tokens_per_second_per_gpu": round(tokens / numbers["total"] * 1000),
            "mfu": round(self.flops() / numbers["total"] * 1000 / PEAK, 4) if self.gpu else None,
            "loss": round(float(result.loss) * self.place.world_size, 4),
            "load_max_over_mean": round(float((loads.amax(1) / loads.mean(1)).max()), 2),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.gpu else None,
        }

    def flops(self) -> float:
        """Operations of this rank's batch."""
        work = Work(
            tokens=self.options.rows * self.options.length,
            attention_pairs=self.options.rows * self.options.length * (self.options.length + 1) // 2,
        )
        return TrainingFlops(self.model_config, self.config.freeze)(work)

    def time_exchanges(self, num_chunks: int, waves: int, warmup: int, steps: int) -> dict[str, Any]:
        """The step with this many chunks and waves, and how long its products waited for rows."""
        expert_rows.OVERLAPPED_WAVES = waves
        for layer in self.layers:
            layer.num_chunks = num_chunks  # type: ignore[attr-defined, assignment]
        result = self.time(warmup, steps)
        result |= {"chunks": num_chunks, "waves": waves}
        if not self.gpu:
            return result
        clocks = [ExchangeClock() for _ in self.layers]
        for layer, clock in zip(self.layers, clocks, strict=True):
            layer.clock = clock  # type: ignore[attr-defined, assignment]
        self.marks.begin()
        self.step()
        torch.cuda.synchronize()
        waited = sum(before.elapsed_time(after) for clock in clocks for before, after in clock.waits)
        for layer in self.layers:
            layer.clock = None  # type: ignore[attr-defined, assignment]
        return result | {"waited_ms": round(waited, 2), "waited_share": round(waited / result["ms"]["total"], 4)}

    def time_exchange_alone(self, rounds: int = 10) -> dict[str, Any]:
        """All messages of one step's layers, forward and backward, with no product beside them."""
        layer: Any = self.layers[0]
        group, device = deepspeed_adapter.expert_group(layer.expert_group_name), self.place.device
        tokens = self.options.rows * self.options.length
        generator = torch.Generator(device).manual_seed(self.place.rank)
        scores = torch.rand(tokens, layer.num_experts, device=device, generator=generator)
        counts = scores.topk(2, dim=1).indices.flatten().bincount(minlength=layer.num_experts)
        sent, received = CountExchange(counts, group).wait()
        plan = ExchangePlan.build(sent, received, rank=distributed.get_rank(group), num_chunks=1, align=HALF_ROWS)
        shape = (self.model_config.hidden_size,)
        dtype = torch.bfloat16 if self.gpu else torch.float32
        arrived = torch.zeros(plan.num_arrived, *shape, dtype=dtype, device=device)
        away = torch.zeros(plan.num_away, *shape, dtype=dtype, device=device)
        weights = torch.zeros(plan.num_away, device=device), torch.zeros(plan.num_arrived, device=device)
        exchange = RowExchange(group, None)

        def layer_messages() -> None:
            for chunk in plan.chunks:
                exchange.out(chunk, (away, arrived))()
                exchange.home(chunk, (arrived, away))()
                exchange.out(chunk, (away, arrived), weights)()
                exchange.home(chunk, (arrived, away), weights[::-1])()

        marks = Marks(self.gpu)
        for _ in range(rounds + 3):
            distributed.barrier()
            marks.begin()
            layer_messages()
            marks.add("messages")
        per_layer = statistics.median(one["total"] for one in marks.spans()[3:])
        crossed = 4 * plan.num_away * shape[0] * dtype.itemsize
        return {
            "ms_per_layer": round(per_layer, 3),
            "ms_per_step": round(per_layer * len(self.layers), 2),
            "gb_per_second": round(crossed / per_layer / 1e6, 1),
            "rows_sent": plan.num_away,
        }


def check(options: Any, place: Environment) -> dict[str, dict[str, float]]:
    """Errors of loss, output and gradients with experts spread and on one GPU, both against float32 and a loop.

    All three use the routing that the model on one GPU drew.

    Raises:
        RuntimeError: if spread experts are further from float32 than one GPU by more than rounding explains.
    """
    gpu = place.device.type == "cuda"
    preset, dtype = ("tiny-phi-3.5-moe", "float32") if options.tiny else ("phi-3.5-moe", "bfloat16")
    changes = {"num_hidden_layers": 1 if gpu else 2, "input_jitter_noise": 0.0}
    whole = phi35.create(preset, device=place.device, dtype=dtype, seed=0, **changes).train()
    generator = torch.Generator().manual_seed(place.rank)
    ids = torch.randint(3, 1000, (1, 2048 if gpu else 24), generator=generator).to(place.device)
    torch.manual_seed(place.rank)
    with torch.no_grad():
        routings = whole(ids).router_outputs
    found = {}
    for name in ("one GPU", "spread, 1 chunk", "spread, 2 chunks", "float32 loop"):
        model = copy.deepcopy(whole)
        if name.startswith("spread"):
            expert_parallel.shard(model, place.world_size, int(name[8]))
        elif name == "float32 loop":
            model.to(torch.float32)
            for layer in model.model.layers:
                layer.mlp.experts.backend = "loop"
        found[name] = loss_and_gradients(model, ids, routings)
        del model
    wanted = found.pop("float32 loop")
    report = {name: {key: relative(value, wanted[key]) for key, value in one.items()} for name, one in found.items()}
    for name, errors in report.items():
        for key, error in errors.items():
            errors[key] = max(place.gather(error))
            limit = 1.5 * report["one GPU"][key] + (1e-3 if gpu else 2e-6)
            if not errors[key] <= limit:
                raise RuntimeError(
                    f"{name}: {key} is off by {errors[key]:.2e}, one GPU by {report['one GPU'][key]:.2e}"
                )
    return report


def loss_and_gradients(model: Any, ids: torch.Tensor, routings: Any) -> dict[str, torch.Tensor]:
    """Loss, output and gradients; of this rank's experts those of all ranks' tokens."""
    for layer, routing in zip(model.model.layers, routings, strict=True):
        layer.mlp.forward = functools.partial(layer.mlp.forward, routing=routing)
    output = model(ids, labels=ids)
    output.loss.backward()
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    found = {"loss": output.loss.detach().float(), "output": output.hidden_states.detach().float()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.float()
        key = name.removeprefix("model.layers.").split(".", 1)[-1] if ".layers." in name else name
        if ".mlp.experts." in name and not hasattr(parameter, "expert_shard"):
            distributed.all_reduce(grad)
            size = grad.shape[0] // world_size
            grad = grad[rank * size : (rank + 1) * size].clone()
        if key not in found:
            found[key] = grad
    return found


def relative(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """||value - wanted|| / ||wanted||."""
    return float((value - wanted).norm() / wanted.norm().clamp(min=1e-30))


def needed_gib(options: Any, world_size: int, gpu: bool) -> float:
    """GiB that a run takes on each GPU, by count: weights, gradients, masters and moments, and rows of activations."""
    config = training_config(options, world_size, gpu)
    model_config = read_model_config(config)
    total = 0.0
    for name, parameter in meta_model(model_config).named_parameters():
        spread = ".mlp.experts." in name
        count = parameter.numel() / (world_size if spread else 1)
        trained = not (spread and options.full)
        state = 4 if config.optimizer_dtype == "bfloat16" else 12
        copies = world_size if config.zero_stage and not spread else 1
        accumulated = 4 if config.zero_stage else 0  # DeepSpeed adds gradients up in float32
        total += count * (2 + trained * (2 + accumulated + state / copies))
    tokens = options.rows * options.length
    width, ffn, top_k = model_config.hidden_size, model_config.intermediate_size, model_config.num_experts_per_tok
    kept = 2 * tokens * (12 * width + top_k * (2 * width + 2 * ffn))  # one layer's tensors for its backward pass
    layers = 1 if config.gradient_checkpointing else model_config.num_hidden_layers
    total += layers * kept + model_config.num_hidden_layers * 2 * tokens * width + 4e9
    return total / 2**30
