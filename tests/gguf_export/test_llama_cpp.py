"""Exported files in llama.cpp itself: equal log-probabilities, equal ids, equal chats."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp_peer import LlamaCpp
from published import published_file

import phi35
from phi35 import presets
from phi35.api import SMALL_MODEL
from phi35.gguf_export.export import export_gguf
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.convert import quantize
from phi35.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="the gguf package is not installed")
pytest.importorskip("xllamacpp", reason="llama.cpp's package xllamacpp is not installed")

GROUP = WeightFormat(group_size=32)


def folder_of(preset: str, folder: Path, tokenizer: Path = SMALL_MODEL, **changes: Any) -> Path:
    """A random model whose norms and biases are not those of the start, with a tokenizer."""
    torch.manual_seed(0)
    model = phi35.create(presets.get(preset).replace(**changes), seed=0, initializer_range=0.15)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    phi35.save(model, None, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


@torch.no_grad()
def largest_difference(folder: Path, peer: LlamaCpp, *lengths: int) -> float:
    """Of log-probabilities after random ids."""
    model, _ = phi35.load(folder, device="cpu", dtype="float32")
    worst = 0.0
    for length in lengths:
        ids = torch.randint(3, 1000, (length,))
        mine = model(input_ids=ids[None]).logits[0, -1].log_softmax(-1)
        worst = max(worst, float((mine - peer.logprobs(ids.tolist(), len(mine))).abs().max()))
    return worst


SAME = {
    "dense": ("tiny-phi-3.5-mini", {}),
    "dense, grouped heads": ("tiny-phi-3-medium-128k", {}),
    "sparse, LayerNorm": ("tiny-phi-3.5-moe", {"router_type": "topk"}),
    "sparse, RMSNorm, no biases": (
        "tiny-phi-3.5-moe",
        {"router_type": "topk", "norm_type": "rmsnorm", "attention_bias": False, "lm_head_bias": False},
    ),
    "three experts of four": ("tiny-phi-3.5-moe", {"router_type": "topk", "num_experts_per_tok": 3}),
    "tied head": ("tiny-phi-3-mini-4k", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", SAME)
def test_log_probabilities_are_equal(case: str, tmp_path: Path) -> None:
    preset, changes = SAME[case]
    folder = folder_of(preset, tmp_path / "model", **changes)
    export_gguf(folder, tmp_path / "model.gguf")
    found = largest_difference(folder, LlamaCpp(tmp_path / "model.gguf"), 1, 7, 200)
    print(f"{case}: {found:.1e}")
    # Measured: up to 2.5e-5 where log-probabilities have a standard deviation of 1.2.
    assert found < 1e-4


def test_long_factors(tmp_path: Path) -> None:
    """A context beyond the original length takes the long factors, as this model does with a text beyond it."""
    folder = folder_of(
        "tiny-phi-3.5-mini", tmp_path / "model", original_max_position_embeddings=64, max_position_embeddings=2048
    )
    export_gguf(folder, tmp_path / "model.gguf")
    assert largest_difference(folder, LlamaCpp(tmp_path / "model.gguf", 512), 65, 300) < 1e-4
    assert largest_difference(folder, LlamaCpp(tmp_path / "model.gguf", 512), 64) > 1e-2, "64 tokens are short here"


@torch.no_grad()
def test_equal_routing_stands_in_for_sparsemixer(tmp_path: Path) -> None:
    folder = folder_of("tiny-phi-3.5-moe", tmp_path / "model")
    model, _ = phi35.load(folder, device="cpu", dtype="float32")
    rows = torch.randint(3, 1000, (8, 40))
    mine = model(input_ids=rows).logits[:, -1].log_softmax(-1)
    errors = {}
    for routing in ("equal", "softmax"):
        export_gguf(folder, tmp_path / "model.gguf", routing=routing)
        peer = LlamaCpp(tmp_path / "model.gguf")
        theirs = torch.stack([peer.logprobs(row.tolist(), mine.shape[1]) for row in rows])
        errors[routing] = float((mine - theirs).norm() / (mine - mine.mean(dim=-1, keepdim=True)).norm())
    print(errors)
    assert errors["equal"] < 0.05 and errors["softmax"] > 0.3


@pytest.mark.parametrize("preset", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
@torch.no_grad()
def test_types_in_fewer_bits(preset: str, kind: str, tmp_path: Path) -> None:
    folder = folder_of(preset, tmp_path / "model", **({"router_type": "topk"} if "moe" in preset else {}))
    export_gguf(folder, tmp_path / "model.gguf", kind)
    found = largest_difference(folder, LlamaCpp(tmp_path / "model.gguf"), 50)
    print(f"{preset} {kind}: {found:.1e}")
    # llama.cpp rounds activations, too.
    assert found < {"f16": 0.05, "bf16": 0.2, "q8_0": 0.3, "q4_0": 3.0}[kind]


@pytest.mark.parametrize(
    "one", [GROUP, WeightFormat(group_size=32, symmetric=False), WeightFormat(bits=8, group_size=32)]
)
def test_codes_of_quantized_checkpoints_are_run_as_they_are(one: WeightFormat, tmp_path: Path) -> None:
    folder = folder_of("tiny-phi-3.5-mini", tmp_path / "model")
    quantize(folder, tmp_path / "few", QuantizationConfig(linear=one))
    export_gguf(tmp_path / "few", tmp_path / "model.gguf")
    found = largest_difference(tmp_path / "few", LlamaCpp(tmp_path / "model.gguf"), 50)
    print(f"{one.label}: {found:.1e}")
    assert found < 0.2, "llama.cpp rounds activations to 8 bits; other codes would differ by more than 1"


def test_greedy_text_is_equal(tmp_path: Path) -> None:
    for preset in ("tiny-phi-3.5-mini", "tiny-phi-3.5-moe"):
        changes = {"router_type": "topk"} if "moe" in preset else {}
        folder = folder_of(preset, tmp_path / preset, **changes)
        export_gguf(folder, tmp_path / "model.gguf")
        model, _ = phi35.load(folder, device="cpu", dtype="float32")
        ids = torch.randint(3, 1000, (1, 20))
        mine = model.generate(ids, max_new_tokens=40, stop_token_ids=())[0, 20:].tolist()
        assert LlamaCpp(tmp_path / "model.gguf").greedy(ids[0].tolist(), 40) == mine


def test_published_tokenizer_and_chat(tmp_path: Path) -> None:
    place = published_file("tokenizers/phi-3-mini/tokenizer.json").parent
    sizes = {"vocab_size": 32064, "eos_token_id": 32000, "pad_token_id": 32000, "stop_token_ids": (32007,)}
    folder = folder_of("tiny-phi-3.5-mini", tmp_path / "phi-3-mini", place, **sizes)
    report = export_gguf(folder, tmp_path / "model.gguf")
    assert not [note for note in report.notes if "cut" in note or "white space" in note]
    peer, tokenizer = LlamaCpp(tmp_path / "model.gguf"), Tokenizer.from_folder(folder)
    texts = published_file("tokenizers/golden_texts.txt").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    golden = published_file("tokenizers/golden_ids.txt").read_text("utf-8").splitlines()
    assert len(texts) >= 47
    for text, ids in zip(texts, golden, strict=False):
        assert peer.encode(text) == tokenizer.encode(text) == [int(index) for index in ids.split()], repr(text)
    messages = [
        {"role": "system", "content": " You are helpful. "},
        {"role": "user", "content": "Hi\n\n there"},
        {"role": "assistant", "content": "Yes "},
        {"role": "user", "content": "ok?"},
    ]
    chat = tokenizer.apply_chat_template(messages)
    assert peer.chat(messages) == chat and peer.encode(chat) == tokenizer.encode(chat)


def test_vision_tokenizer_keeps_white_space_after_turns(tmp_path: Path) -> None:
    """There most special tokens keep it; llama.cpp goes by the model's name, and a note says which token differs."""
    place = published_file("tokenizers/phi-3.5-vision/tokenizer.json").parent
    sizes = {"vocab_size": 32064, "eos_token_id": 32000, "pad_token_id": 32000, "stop_token_ids": (32007,)}
    folder = folder_of("tiny-phi-3.5-mini", tmp_path / "Phi-3.5-vision-instruct", place, **sizes)
    report = export_gguf(folder, tmp_path / "model.gguf")
    assert report.name == "Phi 3.5 vision instruct"
    assert any("<|assistant|>" in note and "<|user|>" not in note for note in report.notes)
    peer, tokenizer = LlamaCpp(tmp_path / "model.gguf"), Tokenizer.from_folder(folder)
    text = "<|user|>\nHi<|end|>\n"
    assert peer.encode(text) == tokenizer.encode(text)
