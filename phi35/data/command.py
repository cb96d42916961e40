"""The command line of ``scripts/prepare_text.py`` and ``scripts/prepare_chat.py``."""

import argparse
from typing import Any

from phi35.data.documents import JoinedDocuments, open_documents
from phi35.data.opening import build_encoder
from phi35.data.prepare import TOKENS_PER_PART, describe, prepare_tokens
from phi35.data.token_files import check_files
from phi35.loading import find_folder, load_config
from phi35.tokenizer import Tokenizer


def prepare_from_command_line(kind: str, description: str, arguments: list[str] | None = None) -> int:
    """Parses, prepares, and prints the validation report.

    Args:
        kind: "text" or "chat".
        description: of the script.
        arguments: in place of the process's own.

    Returns:
        Exit code: 2 for a mistake, whose message is printed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help="folders or files: .jsonl, .parquet, .tar shards, text files")
    parser.add_argument("--output", required=True, help="folder of the token files")
    parser.add_argument("--model", help="folder or hub id of the model that will be trained")
    parser.add_argument("--num-workers", type=int, default=1, help="processes that tokenize (default 1)")
    parser.add_argument("--tokens-per-part", type=int, default=TOKENS_PER_PART, help="a new file begins after so many")
    parser.add_argument("--verify", action="store_true", help="compare the output's SHA-256 sums and do nothing else")
    if kind == "text":
        parser.add_argument("--text-field", default="text", help="field of the records (default text)")
    options = parser.parse_args(arguments)
    if not options.verify and (not options.data or options.model is None):
        parser.error("give data to prepare, and --model")
    if options.num_workers < 1 or options.tokens_per_part < 1:
        parser.error("--num-workers and --tokens-per-part must be at least 1")
    try:
        index = check_files(options.output) if options.verify else _prepare(kind, options)
    except ValueError as error:
        print(f"error: {error}")
        return 2
    print(describe(index))
    if options.verify:
        print(f"{options.output}: every file is as it was written")
    else:
        print(f"written to {options.output}; train with data={options.output}")
    return 0


def _prepare(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    folder = find_folder(options.model)
    config, tokenizer = load_config(folder), Tokenizer.from_folder(folder)
    documents = JoinedDocuments([open_documents(data) for data in options.data])
    encoder = build_encoder(kind, documents, tokenizer, config.eos_token_id, getattr(options, "text_field", "text"))
    return prepare_tokens(
        documents,
        encoder,
        options.output,
        vocab_size=config.vocab_size,
        num_workers=0 if options.num_workers == 1 else options.num_workers,
        tokens_per_part=options.tokens_per_part,
    )
