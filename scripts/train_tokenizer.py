"""Trains the small tokenizer: the family's form with 1,000 base tokens in place of 32,000.

The published tokenizers are Llama's: byte-pair merges over text whose spaces became U+2581, bytes as a
fallback for every character outside the vocabulary, no pre-tokenizer, and special tokens after the base
vocabulary. This one keeps that form and the published order of special tokens, so that an id of the
family minus 31,000 is the id here: <|endoftext|> 1000, <|assistant|> 1001, <|system|> 1006, <|end|> 1007,
<|user|> 1010, <|image|> 1044.

    python scripts/train_tokenizer.py --output phi35/small_model
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUM_BASE_TOKENS = 1000
NUM_BYTES = 256
CONTROL_TOKENS = ("<unk>", "<s>", "</s>")
SPACE = "\u2581"
ALPHABET = [SPACE] + [chr(code) for code in range(33, 127)]
NAMED_SPECIAL_TOKENS = {
    0: "<|endoftext|>",
    1: "<|assistant|>",
    6: "<|system|>",
    7: "<|end|>",
    10: "<|user|>",
    44: "<|image|>",
}
KEEPS_FOLLOWING_SPACE = ("<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|end|>", "<|user|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\\n' -}}{% endif %}"
)
CHAT_LINES = (
    "Which image shows a red circle?",
    "Do both images show the same shape?",
    "Do both images show the same color?",
    "Do the two images show different shapes or different colors?",
    "How many images show a blue triangle?",
    "What color is the shape in the first image?",
    "What shape is in the second image?",
    "What differs between the first picture and the second picture?",
    "Describe the image. The image shows a gray rectangle.",
    "first second both neither one two none zero yes no",
    "You are a helpful assistant. Hello, how can I help you today?",
)
"""Text of the kind that the small model reads, so that its words are single tokens."""

SOURCE_MODULES = ("argparse", "ast", "asyncio", "collections", "datetime", "difflib", "email", "http", "json")


def training_lines() -> Iterator[str]:
    """Lines of the corpus, each with spaces as U+2581 and printable ASCII only."""
    for line in raw_lines():
        text = line.rstrip("\n").replace("\t", "    ").replace(" ", SPACE)
        if text and all(character in _ALPHABET_SET for character in text):
            yield text


def raw_lines() -> Iterator[str]:
    """Standard library sources once, easy-vqa's questions and the chat lines often enough to win merges."""
    import easy_vqa

    folder = Path(sysconfig.get_paths()["stdlib"])
    for name in SOURCE_MODULES:
        path = folder / f"{name}.py"
        files = [path] if path.exists() else sorted((folder / name).glob("*.py"))
        for file in files:
            yield from file.read_text(encoding="utf-8").splitlines()
    questions, answers, _ = easy_vqa.get_train_questions()
    for question in questions:
        yield question
        yield question[0].upper() + question[1:]
    for answer in answers:
        yield f" {answer}"
    for _ in range(300):
        for line in CHAT_LINES:
            yield line
            yield f" {line.lower()}"


def base_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Trains the merges: control tokens, bytes, merged pieces by rank, then single characters, as Llama's."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Split
    from tokenizers.trainers import BpeTrainer

    trained = Tokenizer(BPE())
    words = f"{SPACE}+(?={SPACE})|{SPACE}?[A-Za-z]+|{SPACE}?[0-9]|{SPACE}?[^A-Za-z0-9{SPACE}]+|{SPACE}+"
    trained.pre_tokenizer = Split(Regex(words), behavior="isolated")
    num_pieces = NUM_BASE_TOKENS - NUM_BYTES - len(CONTROL_TOKENS)
    trainer = BpeTrainer(
        vocab_size=num_pieces, initial_alphabet=ALPHABET, limit_alphabet=len(ALPHABET), show_progress=False
    )
    trained.train_from_iterator(training_lines(), trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merged = [piece for piece in pieces if len(piece) > 1]
    characters = [piece for piece in pieces if len(piece) == 1]
    tokens = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(NUM_BYTES)), *merged, *characters]
    if len(tokens) != NUM_BASE_TOKENS or len(set(tokens)) != NUM_BASE_TOKENS:
        raise RuntimeError(f"expected {NUM_BASE_TOKENS} distinct base tokens, trained {len(set(tokens))}")
    merges = [tuple(pair) for pair in model["merges"]]
    return {token: index for index, token in enumerate(tokens)}, merges


def added_tokens() -> list[dict[str, Any]]:
    """The special tokens with the flags of the Phi-3.5-vision file."""
    tokens = dict(enumerate(CONTROL_TOKENS))
    placeholder = 0
    for offset in range(max(NAMED_SPECIAL_TOKENS) + 1):
        if offset in NAMED_SPECIAL_TOKENS:
            tokens[NUM_BASE_TOKENS + offset] = NAMED_SPECIAL_TOKENS[offset]
        else:
            placeholder += 1
            tokens[NUM_BASE_TOKENS + offset] = f"<|placeholder{placeholder}|>"
    return [
        {
            "id": index,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": content not in KEEPS_FOLLOWING_SPACE,
            "normalized": False,
            "special": content != "</s>",
        }
        for index, content in tokens.items()
    ]


def tokenizer_json(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The whole tokenizer.json in the published form."""
    bos = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": bos,
            "pair": bos + second,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json, with the vision model's chat template."""
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added_tokens()}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }


def main() -> None:
    """Trains and writes the three tokenizer files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("phi35/small_model"), help="folder to write into")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = base_vocabulary()
    special_tokens_map = {
        "additional_special_tokens": ["<|system|>", "<|end|>", "<|user|>"],
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
    }
    for name, content in (
        ("tokenizer.json", tokenizer_json(vocabulary, merges)),
        ("tokenizer_config.json", tokenizer_config()),
        ("special_tokens_map.json", special_tokens_map),
    ):
        text = json.dumps(content, indent=1 if name == "tokenizer.json" else 2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    print(f"{len(vocabulary)} base tokens, {len(merges)} merges, {len(added_tokens())} special tokens: {folder}")


_ALPHABET_SET = frozenset(ALPHABET)

if __name__ == "__main__":
    main()
