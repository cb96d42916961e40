"""Runs the decoder's Triton kernels on the CPU in Triton's interpreter and prints their errors as JSON.

A process of its own: TRITON_INTERPRET must stand before Triton is imported, and stays. Each kernel is compared with
the torch form of the same operation (``phi35.fused``), in float64 where that matters.
"""

import itertools
import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from phi35 import fused, fused_head, gradient_squares
from phi35.feed_forward import gegelu
from phi35.jitter import Jitter
from phi35.kernels import adamw
from phi35.loading import create
from phi35.training import gradient_norm as gradient_norms
from phi35.training import mixed_precision
from phi35.training.acceleration import fuse
from phi35.training.gradient_norm import GradientNorm, global_gradient_norm, sum_of_squares


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||; infinite where the value is not finite."""
    error = float((value.detach().double() - reference.detach().double()).norm() / reference.detach().double().norm())
    return error if error == error else float("inf")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(run: Any, inputs: list[torch.Tensor], plain: Any) -> dict[str, float]:
    """Largest relative errors of outputs and gradients of ``run`` against ``plain`` in float64."""
    mine = [value.clone().requires_grad_() for value in inputs]
    wide = [value.double().requires_grad_() for value in inputs]
    got, wanted = run(*mine), plain(*wide)
    upstream = [draw(*one.shape, seed=9 + index) for index, one in enumerate(wanted)]
    sum((one * two.to(one.dtype)).sum() for one, two in zip(got, upstream, strict=True)).backward()
    sum((one * two.double()).sum() for one, two in zip(wanted, upstream, strict=True)).backward()
    return {
        "outputs": max(relative(a, b) for a, b in zip(got, wanted, strict=True)),
        "gradients": max(relative(a.grad, b.grad) for a, b in zip(mine, wide, strict=True)),
    }


def norm_formula(values: tuple[torch.Tensor, ...], mean: bool, added: bool) -> list[torch.Tensor]:
    """The sum and its norm as the papers write them."""
    total = values[0] + values[1] if added else values[0]
    weight, bias = values[-2:] if mean else (values[-1], None)
    centred = total - total.mean(-1, keepdim=True) if mean else total
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    return [total * 1.0, normed if bias is None else normed + bias]


def norms() -> dict[str, dict[str, float]]:
    """RMSNorm and LayerNorm, with and without a residual and noise, a width that is no power of two, eleven rows."""
    results = {}
    for mean, added, noisy in itertools.product((False, True), repeat=3):
        jitter = Jitter(0.25, torch.tensor([123456789], dtype=torch.int32)) if noisy else None
        noise = 1.0 if jitter is None else jitter.noise(draw(11, 24)).double()

        def plain(*values: torch.Tensor, mean: bool = mean, added: bool = added, noise: Any = noise) -> Any:
            total, normed = norm_formula(values, mean, added)
            return [total, normed * noise]

        def run(*values: torch.Tensor, mean: bool = mean, added: bool = added, jitter: Any = jitter) -> Any:
            weight, bias = values[-2:] if mean else (values[-1], None)
            return list(fused.add_norm(values[0], values[1] if added else None, weight, bias, 1e-5, mean, jitter))

        inputs = [draw(11, 24, seed=seed) for seed in range(2 if added else 1)]
        inputs += [draw(24, seed=5 + seed) for seed in range(2 if mean else 1)]
        name = f"{'layer' if mean else 'rms'}{'+residual' * added}{'*jitter' * noisy}"
        results[name] = compare(run, inputs, plain)
    return results


def activations() -> dict[str, dict[str, float]]:
    """Gated and plain activations."""
    results = {}
    for name in ("silu", "gelu"):

        def gated(values: torch.Tensor, name: str = name) -> list[torch.Tensor]:
            gate, up = values.chunk(2, dim=-1)
            return [fused._ACTIVATIONS[name](gate) * up]

        results[f"gated {name}"] = compare(
            lambda values, name=name: [fused.gated_activation(values, name)], [draw(5, 2 * 24)], gated
        )
    results["gated gegelu"] = compare(
        lambda values: [fused.gated_activation(values, "gegelu", 1.5)],
        [3.0 * draw(5, 2 * 24)],
        lambda values: [gegelu(*values.chunk(2, dim=-1), limit=1.5)],
    )
    for name in ("silu", "gelu", "quick_gelu"):
        results[name] = compare(
            lambda values, name=name: [fused.activate(values, name)],
            [draw(7, 333)],
            lambda values, name=name: [fused._ACTIVATIONS[name](values)],
        )
    return results


def rotary() -> dict[str, dict[str, float]]:
    """Rotation of 4 query and 2 key heads of width 12, tables for each row and one for all."""
    results = {}
    for rows in (1, 3):
        cos, sin = draw(rows, 1, 5, 12, seed=1), draw(rows, 1, 5, 12, seed=2)

        def plain(values: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> list[torch.Tensor]:
            heads = values.view(3, 5, 8, 12).transpose(1, 2)
            first, second = heads.chunk(2, dim=-1)
            turned = heads * cos.double() + torch.cat((-second, first), dim=-1) * sin.double()
            return [turned[:, :4], turned[:, 4:6], heads[:, 6:]]

        results[f"{rows} tables"] = compare(
            lambda values, cos=cos, sin=sin: list(fused.rotate_heads(values * 1.0, cos, sin, 4, 2)),
            [draw(3, 5, 8 * 12)],
            plain,
        )
    return results


def head() -> dict[str, dict[str, float]]:
    """The loss of a head in one chunk and in several, labels that do not count, a vocabulary over one block."""
    results = {}
    labels = torch.randint(0, 37, (600,), generator=torch.Generator().manual_seed(3))
    labels[::5] = -100

    def plain(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.cross_entropy(states @ weight.T + bias, labels) * 3.0]

    for name, limit in (("one chunk", 2**28), ("chunks", 37 * 256)):
        fused_head.LOGITS_PER_CHUNK = limit
        inputs = [draw(600, 16), draw(37, 16, seed=1), draw(37, seed=2)]
        results[name] = compare(lambda *values: [fused_head.head_loss(*values, labels) * 3.0], inputs, plain)
    wide = [draw(4, 8), draw(9001, 8, seed=1), draw(9001, seed=2)]
    labels = torch.tensor([9000, 0, 8192, -100])
    results["two blocks"] = compare(lambda *values: [fused_head.head_loss(*values, labels) * 3.0], wide, plain)
    return results


def optimizer() -> dict[str, float]:
    """The kernel beside the torch form, the noise of stochastic rounding included."""
    report = {}
    for name, dtype in (("float32 states", torch.float32), ("bfloat16 states", torch.bfloat16)):
        weights, grad = draw(3000, dtype=torch.bfloat16), draw(3000, seed=1, dtype=torch.bfloat16)
        master = draw(3000) if dtype == torch.float32 else None
        first, second = draw(3000, seed=2).to(dtype), draw(3000, seed=3).square().to(dtype)
        factor = torch.tensor(0.3)
        options = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "decay": 0.99, "step_size": 0.02}
        options |= {"second_correction": 1.3, "key": 1234567891}
        results = []
        for update in (adamw.update, mixed_precision._update_with_torch):
            copies = [None if value is None else value.clone() for value in (weights, grad, master, first, second)]
            update(*copies, factor, **options)
            results.append(copies)
        pairs = [pair for pair in zip(*results, strict=True) if pair[0] is not None]
        # With a master the weights are cast to bfloat16, which the interpreter does by cutting off.
        report[name] = max(relative(a, b) for a, b in (pairs if master is None else pairs[1:]))
        report[f"{name}, weights"] = relative(*pairs[0])
        before = [value for value in (weights, grad, master, first, second) if value is not None]
        after = [None if value is None else value.clone() for value in (weights, grad, master, first, second)]
        after[1].fill_(torch.inf)
        adamw.update(*after, torch.tensor(torch.nan), **options)
        kept = [value for value in after if value is not None]
        report[f"{name}, left alone"] = all(torch.equal(kept[i], before[i]) for i in range(len(kept)) if i != 1)
    return report


def gradient_norm() -> dict[str, float]:
    """Norms found during a backward pass: two micro-batches, a tensor of several parts, one without a gradient.

    Once with kernels for every tensor, once with the small ones read together at the end.
    """
    report = {}
    kinds = (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    for (kind, dtype), least in itertools.product(kinds, (0, 1000)):
        name, gradient_norms.LEAST = f"{kind} from {least}", least
        used = torch.nn.Parameter(draw(70_001, dtype=dtype))
        early = torch.nn.Parameter(draw(3, 40, seed=1, dtype=dtype))
        never = torch.nn.Parameter(draw(5, seed=2, dtype=dtype))
        norm = GradientNorm([used, early, never], ahead=True, least=least)
        for step in range(2):  # what the first step leaves must not reach the second
            for batch in range(2):
                if batch == 1:
                    norm.watch()
                both = (used * draw(70_001, seed=3 + batch, dtype=dtype)).sum() * (batch + step + 1)
                (both + early.square().sum() if batch == 0 else both).backward()
            found = norm([used, early])
            wanted = torch.stack([used.grad.double().norm(), early.grad.double().norm()]).norm()
            report[f"{name}, step {step}"] = relative(found, wanted)
            used.grad = early.grad = None
        norm.watch()
        (early * 2).sum().backward()
        report[f"{name}, one gradient"] = relative(norm([early]), early.grad.double().norm())
        used.grad = draw(70_001, seed=6, dtype=dtype)
        report[f"{name}, afterwards"] = relative(sum_of_squares([used, never]).sqrt(), used.grad.double().norm())
        early.grad[1, 3] = torch.inf
        report[f"{name}, infinite"] = float(global_gradient_norm([used, early]) != torch.inf)
    return report


class Offering(torch.autograd.Function):
    """weight * 1, whose backward leaves squares: ``factor`` times the true ones, which tells whether they were used."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.factor = factor
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient_squares.offer(ctx.saved_tensors[0], ctx.factor * grad.double().square().sum(dim=0).float())
        return grad.clone(), None


def offered_squares() -> dict[str, float]:
    """Squares that the backward pass leaves: taken from a lone contribution, and from nothing else."""
    weight, other = torch.nn.Parameter(draw(40, 1000)), torch.nn.Parameter(draw(7, seed=1))
    norm = GradientNorm([weight, other], ahead=True, least=0)
    upstream = draw(40, 1000, seed=2)
    report = {}
    for name, factor, uses, early in (
        ("alone", 1.0, 1, False),
        ("alone, fourfold", 4.0, 1, False),
        ("two uses", 4.0, 2, False),
        ("on top of an earlier gradient", 4.0, 1, True),
    ):
        weight.grad = draw(40, 1000, seed=3) if early else None
        norm.watch()
        sum((Offering.apply(weight, factor) * upstream * (n + 1)).sum() for n in range(uses)).backward()
        expected = weight.grad.double().norm() * (2.0 if name == "alone, fourfold" else 1.0)
        report[name] = relative(norm([weight]), expected)
    Offering.apply(weight, 4.0).sum().backward()
    report["unasked"] = float(gradient_squares.are_wanted(weight))
    return report


def models() -> dict[str, float]:
    """Tiny models whole: loss and gradients of the fused form against the plain one."""
    report = {}
    for preset in ("tiny-phi-3.5-mini", "tiny-phi-3-medium-4k", "tiny-phi-3-small-8k"):
        ids = torch.randint(3, 1000, (2, 9), generator=torch.Generator().manual_seed(1))
        results = []
        for enabled in (False, True):
            changes = {"initializer_range": 0.1, "sliding_window": None, "embd_pdrop": 0.0, "ffn_pdrop": 0.0}
            model = create(preset, dtype="float32", seed=0, **changes).train()
            fuse(model, enabled)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            results.append([loss, *(parameter.grad for parameter in model.parameters())])
        report[preset] = max(relative(a, b) for a, b in zip(results[1], results[0], strict=True))
    return report


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = {"norms": norms(), "activations": activations(), "rotary": rotary(), "head": head()}
    report |= {
        "optimizer": optimizer(),
        "gradient norm": gradient_norm(),
        "offered squares": offered_squares(),
        "models": models(),
    }
    json.dump(report, sys.stdout)
