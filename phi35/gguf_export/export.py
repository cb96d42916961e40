"""A checkpoint written as one GGUF file, tensor by tensor."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi35.checkpoint.streaming import StoredWeights, check_space
from phi35.config import ModelConfig
from phi35.gguf_export.blocks import FILE_TYPES, TYPES, stored_bytes
from phi35.gguf_export.limits import architecture, check, notes
from phi35.gguf_export.tensors import Entry, Tensors
from phi35.gguf_export.vocabulary import Vocabulary, vocabulary
from phi35.loading import find_folder, load_config
from phi35.tokenizer import Tokenizer


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of the model's kind.
        name: ``general.name``.
        num_bytes: of the file.
        types: GGUF type -> number of tensors.
        notes: what llama.cpp computes otherwise than this model.
    """

    path: Path
    architecture: str
    name: str
    num_bytes: int
    types: dict[str, int]
    notes: tuple[str, ...]


def export_gguf(
    source: str | Path, target: str | Path, kind: str | None = None, text_only: bool = False, routing: str = "equal"
) -> Report:
    """Write a checkpoint as a GGUF file.

    Beside the process's own memory it holds about one tensor; of experts, one in float32 and all in the file's type.

    Args:
        source: folder or hub id of a checkpoint, dense or sparse, plain or written by ``phi35 quantize``.
        target: file to write; an earlier one is replaced when the new one is whole.
        kind: type of matrices, one of ``TYPES``; embedding and head get q8_0 at least. None keeps what is stored,
            codes in groups of 32, 64 or 128 too (as q4_0, q4_1 and q8_0).
        text_only: export a vision model's text model.
        routing: where the experts' weights are SparseMixer's, which llama.cpp has not: "equal" stands in for it,
            "softmax" leaves the weights as they are.

    Raises:
        ValueError: before anything is written, if llama.cpp cannot run the model or read its tokenizer, the source is
            damaged, an option is unknown, or the disk lacks the space.
    """
    if kind is not None and kind not in TYPES:
        raise ValueError(f"type must be one of {TYPES}, got {kind!r}")
    folder, path = find_folder(source), Path(target).expanduser()
    if path.suffix != ".gguf" or path.is_dir():
        raise ValueError(f"{path} must be the name of a file that ends in .gguf")
    config = load_config(folder)
    check(config, text_only, routing)
    writer_class = _writer_class()
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json, and a GGUF file holds its tokenizer")
    tokenizer = Tokenizer.from_folder(folder)
    words = vocabulary(tokenizer, config.vocab_size)
    entries = list(Tensors(config, StoredWeights(folder, config), kind, routing).entries())
    check_space(path.parent, sum(entry.num_bytes for entry in entries))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    writer = writer_class(part, architecture(config))
    name = model_name(folder.name if folder.name else "model", words.strips)
    types = Counter(entry.kind for entry in entries if len(entry.shape) > 1)
    try:
        add_metadata(writer, config, name, FILE_TYPES[types.most_common(1)[0][0]])
        add_vocabulary(writer, tokenizer, words, config)
        _write_tensors(writer, entries)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    told = (*notes(config, routing), *words.notes)
    return Report(path, architecture(config), name, path.stat().st_size, dict(types), told)


def add_metadata(writer: Any, config: ModelConfig, name: str, file_type: int) -> None:
    """Sizes and settings, as llama.cpp reads them."""
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.attention_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)
    if config.rope_scaling is not None:
        writer.add_rope_scaling_attn_factors(rotary_factor(config))
    if config.is_sparse:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def rotary_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied by under LongRoPE."""
    scaling = config.rope_scaling
    assert scaling is not None
    if scaling.short_mscale is not None:
        return scaling.short_mscale
    original = config.original_max_position_embeddings
    ratio = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0


def add_vocabulary(writer: Any, tokenizer: Tokenizer, words: Vocabulary, config: ModelConfig) -> None:
    """Tokens, special ids and the chat template."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words.tokens)
    writer.add_token_scores(words.scores)
    writer.add_token_types(words.types)
    writer.add_add_space_prefix(True)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    if "<unk>" in words.tokens:
        writer.add_unk_token_id(words.tokens.index("<unk>"))
    if "<|end|>" in words.tokens:
        writer.add_eot_token_id(words.tokens.index("<|end|>"))
    writer.add_chat_template(tokenizer.chat_template)


def model_name(name: str, strips: bool) -> str:
    """``general.name``: llama.cpp drops white space after special tokens of models that have "phi-3" in it."""
    marked = "phi-3" in name.lower() or "phi3" in name.lower()
    if strips:
        return name if marked else f"{name} (Phi-3)"
    return name.replace("-", " ").replace("Phi3", "Phi 3").replace("phi3", "phi 3") if marked else name


def _write_tensors(writer: Any, entries: list[Entry]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType

    for entry in entries:
        kind, shape = GGMLQuantizationType[entry.kind.upper()], stored_bytes(entry.kind, entry.shape)
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), entry.num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.make())
    writer.close()


def _writer_class() -> Any:
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise ValueError("GGUF files need the gguf package: pip install 'phi35[gguf]'") from error
    return GGUFWriter
