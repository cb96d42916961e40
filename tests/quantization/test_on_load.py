"""Weights rounded as a plain checkpoint is read equal those of a checkpoint that was quantized first."""

import warnings
from pathlib import Path

import pytest
import torch

import phi35
from phi35.model import CausalLM
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.convert import quantize

INT4 = WeightFormat(group_size=32)
FORMS = {
    "int4": QuantizationConfig(linear=INT4),
    "zero points": QuantizationConfig(linear=WeightFormat(group_size=32, symmetric=False)),
    "all": QuantizationConfig(linear=INT4, embedding=INT4, head=WeightFormat(bits=8, group_size=32)),
    "fp8": QuantizationConfig(linear=WeightFormat(bits=8, type="float", group_size=None)),
    "byte scales": QuantizationConfig(linear=WeightFormat(group_size=32, scale_bits=8)),
}


def saved(name: str, folder: Path, **changes: object) -> Path:
    model = phi35.create(name, seed=0, **changes)
    phi35.save(model, None, folder)
    return folder


def load(folder: Path, **options: object) -> CausalLM:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no tokenizer.json")
        return phi35.load(folder, device="cpu", **options)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe", "tiny-phi-3.5-vision"])
def test_loading_rounds_to_what_quantizing_writes(name: str, form: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "plain")
    quantize(folder, tmp_path / "few", FORMS[form])
    expected, model = load(tmp_path / "few"), load(folder, quantization=FORMS[form])
    assert model.config == expected.config
    state, wanted = model.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    for key, tensor in wanted.items():
        assert state[key].dtype == tensor.dtype
        assert torch.equal(state[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_experts_in_few_bits_go_to_host_memory_too(tmp_path: Path) -> None:
    folder = saved("tiny-phi-3.5-moe", tmp_path / "plain")
    ids = torch.randint(3, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    expected, model = (load(folder, quantization=FORMS["int4"], expert_memory=size) for size in (None, "300KB"))
    assert type(model.model.layers[0].mlp.experts).__name__ == "OffloadedQuantizedExperts"
    assert torch.equal(model.generate(ids, max_new_tokens=12), expected.generate(ids, max_new_tokens=12))


def test_names_of_formats_and_what_is_refused(tmp_path: Path) -> None:
    model = phi35.create("tiny-phi-3.5-mini", quantization="fp8", seed=0)
    assert model.config.quantization == FORMS["fp8"]
    folder = saved("tiny-phi-3.5-mini", tmp_path / "plain")
    assert load(folder, quantization="fp8").config.quantization == FORMS["fp8"]
    quantize(folder, tmp_path / "few", FORMS["int4"])
    for where, given, message in (
        (folder, "int3", r"one of \['fp8', 'int4', 'int8'\] or a QuantizationConfig, got 'int3'"),
        (folder, QuantizationConfig(method="gptq"), "needs calibration: run phi35 quantize"),
        (tmp_path / "few", "int8", r"quantized already \(int4 g32\)"),
        (folder, "int4", "no multiple of group_size 128"),
    ):
        with pytest.raises(ValueError, match=message):
            load(where, quantization=given)
