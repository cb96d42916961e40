"""What an exported file holds, read by the ``gguf`` package, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import phi35
from phi35 import presets
from phi35.api import SMALL_MODEL
from phi35.config import ModelConfig
from phi35.gguf_export.export import export_gguf, model_name
from phi35.loading import load
from phi35.presets import tiny_twin
from phi35.quantization.codes import dequantize
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.convert import quantize
from phi35.quantization.modules import FewBitModule

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")


def folder_of(config: ModelConfig, folder: Path, dtype: str = "bfloat16", tokenizer: bool = True) -> Path:
    """A random model with the small model's tokenizer."""
    phi35.save(phi35.create(config, dtype=dtype, seed=0, initializer_range=0.1), None, folder)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SMALL_MODEL / name, folder)
    return folder


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """Fields, values in float32 with torch's shapes, and types of a file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    values = {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in reader.tensors}
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    assert {name: tuple(tensor.shape) for name, tensor in values.items()} == shapes
    return fields, values, {t.name: t.tensor_type.name for t in reader.tensors}


def test_dense_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    config = presets.get("tiny-phi-3.5-mini")
    folder = folder_of(config, tmp_path / "model")
    report = export_gguf(folder, tmp_path / "model.gguf")
    fields, values, types = read(tmp_path / "model.gguf")
    state = load(folder, device="cpu", dtype="auto")[0].state_dict()
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(2):
        parts = {"attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"}
        parts |= {"ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
        names |= {f"blk.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in parts.items()}
    assert len(names) + 2 == len(values) and len(names) == len(state)
    for ours, theirs in names.items():
        assert torch.equal(values[f"{ours}.weight"], state[f"{theirs}.weight"].float()), ours
        assert types[f"{ours}.weight"] == ("F32" if "norm" in ours else "BF16")
    assert config.rope_scaling is not None
    for name in ("long", "short"):
        factors = torch.tensor(getattr(config.rope_scaling, f"{name}_factor"), dtype=torch.float32)
        assert torch.equal(values[f"rope_factors_{name}.weight"], factors)
    assert report.num_bytes == (tmp_path / "model.gguf").stat().st_size and report.types == {"bf16": 10}


def test_metadata(tmp_path: Path) -> None:
    export_gguf(folder_of(presets.get("tiny-phi-3.5-moe"), tmp_path / "a-phi-3.5-moe"), tmp_path / "model.gguf", "q8_0")
    fields, _, _ = read(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "phimoe",
        "general.name": "a phi 3.5 moe",
        "general.file_type": 7,
        "phimoe.context_length": 131072,
        "phimoe.rope.scaling.original_context_length": 4096,
        "phimoe.rope.dimension_count": 16,
        "phimoe.embedding_length": 64,
        "phimoe.feed_forward_length": 96,
        "phimoe.attention.head_count": 4,
        "phimoe.attention.head_count_kv": 2,
        "phimoe.attention.sliding_window": 131072,
        "phimoe.expert_count": 4,
        "phimoe.expert_used_count": 2,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.eos_token_id": 1000,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["phimoe.rope.scaling.attn_factor"] == pytest.approx(1.243163121016122)
    assert fields["phimoe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(fields["tokenizer.ggml.scores"]) == 1088
    assert tokens[:3] == ["<unk>", "<s>", "</s>"] and types[0] == 2 and types[1] == 3 and types[3] == 6
    assert tokens[1087] == "[PAD1087]" and types[1087] == 5 and "<|assistant|>" in fields["tokenizer.chat_template"]


def test_long_rope_without_given_factors_of_size(tmp_path: Path) -> None:
    export_gguf(folder_of(presets.get("tiny-phi-3.5-mini"), tmp_path / "model"), tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[0]["phi3.rope.scaling.attn_factor"] == pytest.approx(1.190238, abs=1e-6)


def test_sparse_tensors(tmp_path: Path) -> None:
    """What writes to the residual stream has no mean over its columns; the router is 1/1024, down twice itself."""
    folder = folder_of(presets.get("tiny-phi-3.5-moe"), tmp_path / "model", "float32")
    export_gguf(folder, tmp_path / "model.gguf")
    _, values, types = read(tmp_path / "model.gguf")
    state = load(folder, device="cpu", dtype="float32")[0].state_dict()
    mlp, block = "model.layers.1.mlp", "blk.1"
    gate, up = state[f"{mlp}.experts.gate_up_proj"].chunk(2, dim=1)
    assert torch.equal(values[f"{block}.ffn_gate_exps.weight"], gate)
    assert torch.equal(values[f"{block}.ffn_up_exps.weight"], up)
    assert torch.equal(values[f"{block}.ffn_gate_inp.weight"] * 1024, state[f"{mlp}.router.weight"])
    down = state[f"{mlp}.experts.down_proj"]
    assert torch.equal(values[f"{block}.ffn_down_exps.weight"], 2 * (down - down.mean(dim=1, keepdim=True)))
    query, key, value = state["model.layers.1.self_attn.qkv_proj.weight"].split([64, 32, 32])
    assert torch.equal(values[f"{block}.attn_k.weight"], key) and torch.equal(values[f"{block}.attn_q.weight"], query)
    for name, dim in (("token_embd.weight", 1), (f"{block}.attn_output.weight", 0), (f"{block}.attn_output.bias", 0)):
        assert float(values[name].mean(dim=dim).abs().max()) < 1e-7, name
    assert types[f"{block}.ffn_gate_inp.weight"] == "F32" and "output.bias" in values
    export_gguf(folder, tmp_path / "model.gguf", routing="softmax")
    _, values, _ = read(tmp_path / "model.gguf")
    assert torch.equal(values[f"{block}.ffn_gate_inp.weight"], state[f"{mlp}.router.weight"])
    assert torch.equal(values[f"{block}.ffn_down_exps.weight"], down - down.mean(dim=1, keepdim=True))


FEW_BITS = {
    "Q4_0": [WeightFormat(group_size=32), WeightFormat(group_size=64), WeightFormat(group_size=None)],
    "Q4_1": [WeightFormat(group_size=32, symmetric=False)],
    "Q8_0": [WeightFormat(bits=8, group_size=32), WeightFormat(bits=8, group_size=None)],
}


@pytest.mark.parametrize("preset", ["dense", "sparse"])
@pytest.mark.parametrize("kind", FEW_BITS)
def test_codes_are_kept(kind: str, preset: str, tmp_path: Path) -> None:
    config = presets.get("tiny-phi-3.5-mini")
    if preset == "sparse":
        config = presets.get("tiny-phi-3.5-moe").replace(
            norm_type="rmsnorm", intermediate_size=128, router_type="topk", attention_bias=False, lm_head_bias=False
        )
    folder = folder_of(config, tmp_path / "model")
    for one in FEW_BITS[kind]:
        quantize(folder, tmp_path / "few", QuantizationConfig(linear=one, embedding=one))
        export_gguf(tmp_path / "few", tmp_path / "model.gguf")
        _, values, types = read(tmp_path / "model.gguf")
        model = load(tmp_path / "few", device="cpu", dtype="float32")[0]
        down = "model.layers.0.mlp." + ("experts" if preset == "sparse" else "down_proj")
        base = "down_proj" if preset == "sparse" else "weight"
        pairs = {"token_embd.weight": ("model.embed_tokens", "weight")}
        pairs["blk.0.ffn_down_exps.weight" if preset == "sparse" else "blk.0.ffn_down.weight"] = (down, base)
        for name, (module, tensor) in pairs.items():
            holder = model.get_submodule(module)
            assert isinstance(holder, FewBitModule)
            expected = dequantize(holder.held(tensor), torch.float32)
            assert types[name] == kind
            error = float((values[name] - expected).abs().max() / expected.abs().max())
            # float16 holds scales of bfloat16 exactly; a minimum, 15 times a scale at most, to 2^-11 of it.
            assert error == 0.0 if kind != "Q4_1" else error < 6e-4, (one.label, error)


def test_few_bits_that_gguf_lacks_are_restored(tmp_path: Path) -> None:
    folder = folder_of(presets.get("tiny-phi-3.5-mini"), tmp_path / "model")
    fp8 = WeightFormat(bits=8, type="float", group_size=None)
    quantize(folder, tmp_path / "few", QuantizationConfig(linear=fp8))
    export_gguf(tmp_path / "few", tmp_path / "model.gguf")
    _, values, types = read(tmp_path / "model.gguf")
    holder = load(tmp_path / "few", device="cpu", dtype="float32")[0].get_submodule("model.layers.0.mlp.down_proj")
    expected = dequantize(holder.held(), torch.float32)
    assert types["blk.0.ffn_down.weight"] == "Q8_0" and types["token_embd.weight"] == "BF16"
    assert float((values["blk.0.ffn_down.weight"] - expected).norm() / expected.norm()) < 0.01


def test_rows_that_no_block_divides_stay_in_bfloat16(tmp_path: Path) -> None:
    config = presets.get("tiny-phi-3.5-mini").replace(intermediate_size=80)
    export_gguf(folder_of(config, tmp_path / "model"), tmp_path / "model.gguf", "q4_0")
    types = read(tmp_path / "model.gguf")[2]
    assert types["blk.0.ffn_down.weight"] == "BF16" and types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"


def test_the_text_model_of_a_vision_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text_only=True"):
        export_gguf(SMALL_MODEL, tmp_path / "model.gguf")
    report = export_gguf(SMALL_MODEL, tmp_path / "model.gguf", text_only=True)
    _, values, _ = read(tmp_path / "model.gguf")
    assert not any("vision" in name or "img" in name for name in values) and "token_embd.weight" in values
    # This tokenizer, unlike the published ones, does not list every pair whose text is a token.
    assert any("may cut some texts otherwise" in note for note in report.notes)


REFUSED = {
    "LayerNorm": ("tiny-phi-3.5-mini", {"norm_type": "layernorm"}, "RMSNorm"),
    "biases": ("tiny-phi-3.5-mini", {"attention_bias": True}, "no biases"),
    "gelu": ("tiny-phi-3.5-mini", {"hidden_act": "gelu"}, "silu"),
    "wide heads": (
        "tiny-phi-3.5-mini",
        {"head_dim": 32, "rope_scaling": None, "max_position_embeddings": 4096},
        "heads",
    ),
    "muP": ("tiny-phi-3.5-mini", {"mup_use_scaling": True}, "neither block-sparse attention nor muP"),
    "masked ids": ("tiny-phi-3.5-mini", {"dummy_token_indices": (5,)}, "masks the logits"),
    "phi-3-small": ("tiny-phi-3-small-8k", {}, "block-sparse attention.*masks the logits.*RMSNorm.*no biases"),
    "mixed layers": ("tiny-phi-3.5-moe", {"decoder_sparse_step": 2}, "every layer"),
    "shared expert": ("tiny-phi-3.5-moe", {"shared_expert_intermediate_size": 32}, "shared expert"),
    "sum of weights": ("tiny-phi-3.5-moe", {"router_type": "topk", "norm_topk_prob": False}, "norm_topk_prob"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_llama_cpp_cannot_run_are_refused(case: str, tmp_path: Path) -> None:
    preset, changes, message = REFUSED[case]
    folder = folder_of(presets.get(preset).replace(**changes), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        export_gguf(folder, tmp_path / "out" / "model.gguf")
    assert not (tmp_path / "out").exists()


def test_other_refusals(tmp_path: Path) -> None:
    config = presets.get("tiny-phi-3.5-moe")
    folder = folder_of(config, tmp_path / "model")
    quantize(folder, tmp_path / "few", QuantizationConfig(linear=WeightFormat(group_size=32)))
    bare = folder_of(presets.get("tiny-phi-3.5-mini"), tmp_path / "bare", tokenizer=False)
    target = tmp_path / "out" / "model.gguf"
    for arguments, message in (
        ((tmp_path / "few", target), "take no mean"),
        ((bare, target), "no tokenizer.json"),
        ((folder, target, "q6_k"), "type must be one of"),
        ((folder, tmp_path / "out"), "ends in .gguf"),
    ):
        with pytest.raises(ValueError, match=message):
            export_gguf(*arguments)
    with pytest.raises(ValueError, match="routing must be one of"):
        export_gguf(folder, target, routing="none")
    small = tiny_twin(presets.get("phi-3.5-mini")).replace(
        vocab_size=900, eos_token_id=1, pad_token_id=1, stop_token_ids=(1,)
    )
    with pytest.raises(ValueError, match="table ends at 899"):
        export_gguf(folder_of(small, tmp_path / "small"), target)
    assert not target.parent.exists()


def test_values_past_float16_are_refused(tmp_path: Path) -> None:
    model = phi35.create("tiny-phi-3.5-mini", dtype="bfloat16", seed=0)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e6
    phi35.save(model, None, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_MODEL / name, tmp_path / "model")
    with pytest.raises(ValueError, match="output.weight holds values past the range of float16"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*gguf*")), "no part of a file is left"


def test_names() -> None:
    assert model_name("Phi-3.5-mini-instruct", True) == "Phi-3.5-mini-instruct"
    assert model_name("mine", True) == "mine (Phi-3)" and model_name("mine", False) == "mine"
    assert "phi-3" not in model_name("Phi-3.5-vision", False).lower()
