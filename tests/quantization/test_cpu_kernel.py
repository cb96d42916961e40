"""The C kernel against float64 products of the restored weights, in every variant that this processor runs."""

import itertools
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

import phi35
from phi35.quantization import linear
from phi35.quantization.codes import QuantizedTensor, dequantize, round_to_nearest
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.cpu import native

FORMATS = [
    WeightFormat(bits=bits, group_size=group, symmetric=symmetric, scale_bits=scale_bits)
    for bits, group, symmetric, scale_bits in itertools.product((4, 8), (32, 64, 128, None), (True, False), (16, 8))
    if not (scale_bits == 8 and group is None)
]
needs_compiler = pytest.mark.skipif(native.missing() is not None, reason=f"no CPU kernel: {native.missing()}")


def variants() -> list[str]:
    """What this processor can run."""
    return list(native.VARIANTS[: native.VARIANTS.index(native.best_variant()) + 1]) if not native.missing() else []


def drawn(one: WeightFormat, rows: int, columns: int, scale_dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    """Quantized normal weights."""
    return round_to_nearest(torch.randn(rows, columns) * 0.02, one, scale_dtype)


def test_the_kernel_is_there_where_a_compiler_is() -> None:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler is on the PATH")
    assert native.missing() is None, "or all tests of the kernel would be skipped"


def test_the_package_carries_all_parts_of_the_kernel() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    carried = project["tool"]["setuptools"]["package-data"]["phi35.quantization.cpu"]
    folder = native.SOURCE.parent
    assert sorted(carried) == sorted(part.name for part in native.PARTS)
    assert sorted(carried) == sorted(path.name for path in folder.iterdir() if path.suffix in (".c", ".h"))


@needs_compiler
@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.label)
def test_products_equal_those_of_the_restored_weight(one: WeightFormat) -> None:
    # 384 columns are three groups of 128; 1,248 end inside a step and a block; 24 and 40 rows end inside a task.
    worst = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for (rows, columns), scale_dtype in itertools.product(((24, 384), (40, 1248)), (torch.bfloat16, torch.float16)):
        if one.group_size is not None and columns % one.group_size:
            continue
        weight = drawn(one, rows, columns, scale_dtype)
        hidden = torch.randn(5, columns) * torch.tensor([[1.0], [100.0], [1e-3], [0.0], [3.0]])
        bias = torch.randn(rows) * 0.1
        for dtype, variant in itertools.product(worst, variants()):
            values, added = hidden.to(dtype), bias.to(dtype)
            out = native.product(values, weight, added, variant)
            expected = values.double() @ dequantize(weight, torch.float64).T + added.double()
            assert out.dtype == dtype
            error = (out.double() - expected).norm(dim=1) / expected.norm(dim=1)
            worst[dtype] = max(worst[dtype], float(error.max()))
    print(f"{one.label}: float32 {worst[torch.float32]:.1e}, bfloat16 {worst[torch.bfloat16]:.1e}")
    # Measured: at most 4.5e-5 (activations are rounded to 16 bits) and 2.2e-3 (the output's rounding alone: 1.7e-3).
    assert worst[torch.float32] < 8e-5 and worst[torch.bfloat16] < 4e-3


@needs_compiler
@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.label)
def test_restored_rows_are_those_of_torch_to_the_bit(one: WeightFormat) -> None:
    weight = drawn(one, 40, 384)
    for dtype, variant in itertools.product((torch.float32, torch.bfloat16), variants()):
        assert torch.equal(native.restore(weight, 8, 32, dtype, variant), dequantize(weight, dtype)[8:32])


@pytest.mark.skipif(native.best_variant() != "avx512", reason="the kernel for bfloat16 weights is AVX-512's")
@torch.no_grad()
def test_products_with_bfloat16_weights() -> None:
    worst = 0.0
    for rows, columns, tokens in ((8, 384, 1), (37, 1250, 3), (5, 7, 4), (3, 33, 1)):
        weight, bias = torch.randn(rows, columns).bfloat16(), torch.randn(rows)
        hidden = torch.randn(1, tokens, columns).bfloat16()
        out = native.bfloat16_product(hidden, weight, bias)
        expected = hidden.double() @ weight.double().T + bias.bfloat16().double()
        assert native.takes_bfloat16(hidden, weight) and out.shape == (1, tokens, rows)
        worst = max(worst, float((out.double() - expected).norm() / expected.norm()))
    print(f"{worst:.1e}")
    # Measured: 1.9e-3, the output's rounding.
    assert worst < 4e-3
    with torch.enable_grad():
        assert not native.takes_bfloat16(hidden, weight.requires_grad_()), "the kernel has no gradient"


@pytest.mark.skipif(native.best_variant() != "avx512", reason="the kernel for bfloat16 weights is AVX-512's")
@torch.no_grad()
def test_a_kept_head_of_a_quantized_model_takes_that_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = native.bfloat16_product
    monkeypatch.setattr(native, "bfloat16_product", lambda *a: calls.append(a[0].numel()) or real(*a))
    one = QuantizationConfig(linear=WeightFormat(group_size=32))
    model = phi35.create("tiny-phi-3.5-mini", quantization=one, dtype="bfloat16", seed=0)
    plain = phi35.create("tiny-phi-3.5-mini", dtype="bfloat16", seed=0)
    ids = torch.randint(3, 1000, (1, 9))
    whole = model(ids).logits
    assert not calls and model(ids, logits_to_keep=1).logits.shape == (1, 1, 1088) and calls == [64]
    last = model(ids, logits_to_keep=1).logits
    assert float((last - whole[:, -1:]).norm() / whole[:, -1:].norm()) < 1e-2
    plain(ids, logits_to_keep=1)
    assert len(calls) == 2, "a plain model asks for no compiler"


@needs_compiler
def test_variants_and_threads_agree() -> None:
    weight, hidden = drawn(WeightFormat(symmetric=False), 136, 512), torch.randn(3, 512)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native.product(hidden, weight, None))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)
    for variant in variants():
        # The sums within a group are exact integers; only their float32 sum over groups is taken in another order.
        assert float((native.product(hidden, weight, None, variant) - results[0]).abs().max()) < 1e-6


@needs_compiler
def test_what_is_no_number_stays_none() -> None:
    weight = drawn(WeightFormat(), 16, 256)
    hidden = torch.randn(4, 256)
    hidden[1, 5], hidden[2, 200], hidden[3] = float("nan"), float("inf"), 1e-42
    for variant in variants():
        out = native.product(hidden, weight, None, variant)
        assert out[0].isfinite().all() and not out[1:3].isfinite().any() and out[3].isfinite().all()


@needs_compiler
def test_few_rows_take_the_kernel_and_many_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    weight = drawn(WeightFormat(), 16, 256)
    for name in ("product", "restore"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))
    for count, dtype in ((1, torch.float32), (native.MAX_TOKENS + 1, torch.bfloat16), (1, torch.float64)):
        hidden = torch.randn(count, 256).to(dtype)
        out = linear.quantized_linear(hidden, weight)
        expected = hidden.double() @ dequantize(weight, torch.float64).T
        assert out.dtype == dtype and float((out - expected).norm() / expected.norm()) < 5e-3
    assert calls == ["product", "restore"]


@needs_compiler
def test_compiled_models_take_the_plain_way() -> None:
    weight, hidden = drawn(WeightFormat(), 16, 256), torch.randn(2, 256)
    run = torch.compile(lambda x: linear.quantized_linear(x, weight), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert float((run(hidden) - linear.plain_product(hidden, weight)).abs().max()) < 1e-6


@pytest.mark.parametrize("broken", ["absent", "failing"])
def test_without_a_compiler_the_plain_way_runs_and_says_so(
    broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight, hidden = drawn(WeightFormat(), 16, 256), torch.randn(2, 256)
    native._load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\n[ $1 = --version ] && echo 1 && exit 0\necho 'no such machine' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(fake) if broken == "failing" else None)
    try:
        assert ("no C compiler" if broken == "absent" else "no such machine") in str(native.missing())
        out = linear.quantized_linear(hidden, weight)
        assert native.best_variant() == "none"
    finally:
        native._load.cache_clear()
    expected = hidden @ dequantize(weight, torch.float32).T
    assert float((out - expected).abs().max()) < 1e-5
    assert [record.levelname for record in caplog.records] == ["WARNING"]
