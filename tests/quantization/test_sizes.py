"""Bytes of quantized models at full size, counted on the meta device, and of small ones, as written."""

from pathlib import Path

import pytest
import torch

import phi35
from phi35 import presets
from phi35.parameter_count import count_parameters
from phi35.quantization.codes import dequantize
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.convert import quantize
from phi35.quantization.report import size_report

I4, BYTES = WeightFormat(), WeightFormat(scale_bits=8)
FULL_SIZE = {
    "mini": ("phi-3.5-mini", QuantizationConfig(), 2.3, 2_263_018_168),
    "mini with zero points": ("phi-3.5-mini", QuantizationConfig(linear=WeightFormat(symmetric=False)), 2.3, None),
    "mini, embedding and head too": (
        "phi-3.5-mini",
        QuantizationConfig(linear=BYTES, embedding=BYTES, head=BYTES),
        1.95,
        1_945_079_672,
    ),
    "moe": ("phi-3.5-moe", QuantizationConfig(), 24, 21_985_880_536),
    "moe in groups of 32": ("phi-3.5-moe", QuantizationConfig(linear=WeightFormat(group_size=32)), 24, None),
    "moe in groups of 64 with zero points": (
        "phi-3.5-moe",
        QuantizationConfig(linear=WeightFormat(group_size=64, symmetric=False)),
        24,
        None,
    ),
    "vision": ("phi-3.5-vision", QuantizationConfig(), 2.95, 2_914_167_176),
    "vision, int8 tower": ("phi-3.5-vision", QuantizationConfig(tower=WeightFormat(bits=8)), 2.65, 2_595_270_344),
}


@pytest.mark.parametrize("case", FULL_SIZE)
def test_full_size_models_fit(case: str) -> None:
    preset, quantization, limit, exact = FULL_SIZE[case]
    report = size_report(presets.get(preset).replace(quantization=quantization))
    print(f"{case}: {report.disk:,} bytes on disk, {report.memory:,} in memory")
    assert report.memory < report.disk <= limit * 1e9
    assert exact is None or report.disk == exact
    assert sum(report.kinds.values()) == report.memory


@pytest.mark.parametrize(
    ("preset", "quantization"),
    [
        ("tiny-phi-3.5-mini", QuantizationConfig(linear=WeightFormat(group_size=32))),
        ("tiny-phi-3.5-moe", QuantizationConfig(linear=WeightFormat(group_size=32, symmetric=False))),
        (
            "tiny-phi-3.5-vision",
            QuantizationConfig(
                linear=WeightFormat(group_size=32, scale_bits=8),
                tower=WeightFormat(bits=8, type="float", group_size=64),
            ),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_counts_are_the_bytes_of_files_and_of_the_loaded_model(
    preset: str, quantization: QuantizationConfig, tmp_path: Path
) -> None:
    phi35.save(phi35.create(preset, seed=0, dtype="bfloat16"), None, tmp_path / "plain")
    config = quantize(tmp_path / "plain", tmp_path / "few", quantization)
    report = size_report(config)
    assert report.disk == (tmp_path / "few" / "model.safetensors").stat().st_size
    model, _ = phi35.load(tmp_path / "few", dtype="bfloat16")
    tensors = list(model.parameters()) + list(model.buffers())
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    # Beside the state dict a model holds rotary tables alone.
    tables = sum(tensor.nbytes for name, tensor in model.named_buffers() if ".rope." in f".{name}")
    assert sum(kept.values()) - tables == report.memory
    plain = size_report(config.replace(quantization=None))
    assert plain.disk == (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert report.memory < 0.75 * plain.memory


def test_parameters_are_counted_as_those_they_stand_for() -> None:
    config = presets.get("phi-3.5-moe")
    few = count_parameters(config.replace(quantization=QuantizationConfig()))
    assert (few.total, few.active) == (41_873_153_344, 6_640_999_744)
    assert count_parameters(config).total == few.total and few.trainable < few.total


def test_random_codes_have_the_deviation_asked_for() -> None:
    config = presets.get("tiny-phi-3.5-moe")
    for one in (WeightFormat(group_size=32), WeightFormat(bits=8, type="float"), WeightFormat(bits=8, symmetric=False)):
        if one.group_size == 128:
            config = config.replace(hidden_size=128, intermediate_size=128, head_dim=16, num_attention_heads=8)
        model = phi35.create(config, quantization=QuantizationConfig(linear=one), seed=0)
        weight = dequantize(model.model.layers[0].mlp.experts.held("gate_up_proj"), torch.float32)
        assert float(weight.std()) == pytest.approx(config.initializer_range, rel=0.05)
        # Codes of 4 bits have no middle: their mean lies half a step below it, 0.11 deviations.
        assert abs(float(weight.mean())) < 0.13 * config.initializer_range
