"""The tokenizer of a model folder, through the ``tokenizers`` library alone.

``tokenizer.json`` is read as it stands: transformers rebuilds the family's LlamaTokenizer and gives other ids
for text after a special token (``<|user|>\\nHi``). Decoding is done here, byte by byte, so that a stream of tokens
and a finished text decode alike: it equals the library's decoding of valid UTF-8, and where bytes are invalid
only those become U+FFFD (the library replaces the whole run of byte tokens they stand in).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from phi35.byte_level import byte_of_character
from phi35.chat_template import FAMILY_TEMPLATE, Message, flatten_messages, render
from phi35.tiktoken_ranks import definition_from_folder

TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Text to ids and back, and the folder's chat template.

    Args:
        definition: the text of a ``tokenizer.json``.
        settings: the contents of ``tokenizer_config.json``.
        chat_template: Jinja source; None takes the family's template (phi-3.5-mini's).
        special_tokens_map: the contents of ``special_tokens_map.json``; None derives them from the settings.
        sentencepiece: the bytes of a ``tokenizer.model``, kept for the export alone.

    Raises:
        ValueError: if the definition cannot be read or decodes in a way this family does not use.
    """

    def __init__(
        self,
        definition: str,
        settings: dict[str, Any],
        chat_template: str | None = None,
        special_tokens_map: dict[str, Any] | None = None,
        sentencepiece: bytes | None = None,
    ) -> None:
        import tokenizers

        self.definition = definition
        self.settings = settings
        self.chat_template = FAMILY_TEMPLATE if chat_template is None else chat_template
        self._special_tokens_map = special_tokens_map
        self._sentencepiece = sentencepiece
        try:
            self.backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.json cannot be read: {error}") from error
        fields = json.loads(definition)
        self._byte_level, self._num_stripped = _decoder_kind(fields.get("decoder"))
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = {token.content: index for index, token in added.items() if token.special}
        self._skipped = frozenset(self.special_ids.values())
        self._added = {index: token.content for index, token in added.items()}
        self.bos_token_id, self.eos_token_id, _, self.pad_token_id = (self._role_id(name) for name in TOKEN_ROLES)
        if self.pad_token_id is None:
            self.pad_token_id = self.eos_token_id
        template_ids = self.backend.encode("").ids
        self.add_bos = bool(settings.get("add_bos_token", self.bos_token_id in template_ids))
        self.add_eos = bool(settings.get("add_eos_token", False))
        if (self.add_bos and self.bos_token_id is None) or (self.add_eos and self.eos_token_id is None):
            raise ValueError("tokenizer_config.json asks for a bos or eos token that the tokenizer does not have")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a model folder: ``tokenizer.json``, or phi-3-small's ``*.tiktoken`` ranks.

        The template comes from ``chat_template.jinja``, else from ``tokenizer_config.json``, else it is the
        family's.

        Raises:
            ValueError: if the folder holds neither, or they cannot be read.
        """
        folder = Path(folder)
        settings = _read_json(folder / "tokenizer_config.json") or {}
        definition_path = folder / "tokenizer.json"
        if definition_path.is_file():
            definition = definition_path.read_bytes().decode("utf-8")
        else:
            definition = definition_from_folder(folder, settings)
        template_path = folder / "chat_template.jinja"
        template = template_path.read_text("utf-8") if template_path.is_file() else _template(settings)
        special_tokens_map = _read_json(folder / "special_tokens_map.json")
        settings = {**(special_tokens_map or {}), **settings}
        sentencepiece_path = folder / "tokenizer.model"
        sentencepiece = sentencepiece_path.read_bytes() if sentencepiece_path.is_file() else None
        return cls(definition, settings, template, special_tokens_map, sentencepiece)

    def with_settings(self, **changes: Any) -> "Tokenizer":
        """The same tokenizer with other entries of ``tokenizer_config.json``."""
        settings = {**self.settings, **changes}
        return Tokenizer(self.definition, settings, self.chat_template, self._special_tokens_map, self._sentencepiece)

    def with_definition(self, definition: str, chat_template: str) -> "Tokenizer":
        """The same tokenizer with another ``tokenizer.json`` (tokens were added, say) or template."""
        return Tokenizer(definition, self.settings, chat_template, self._special_tokens_map, self._sentencepiece)

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows; a model's table may be larger."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with BOS and EOS as the folder's config says (the text models: neither)."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if add_special_tokens and self.add_bos and self.bos_token_id is not None:
            ids = [self.bos_token_id, *ids]
        if add_special_tokens and self.add_eos and self.eos_token_id is not None:
            ids = [*ids, self.eos_token_id]
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids (a list or a 1-D tensor); negative ids stand for images and have no text."""
        pieces = (self.token_bytes(int(token_id), skip_special) for token_id in ids)
        return self.strip_start(b"".join(pieces).decode("utf-8", errors="replace"))

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """The bytes one id adds to a text; none for ids that have no text."""
        if token_id < 0 or (skip_special and token_id in self._skipped):
            return b""
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            alphabet = byte_of_character()
            return bytes(alphabet[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode("utf-8")

    def strip_start(self, text: str) -> str:
        """Take away the space that encoding put in front of a text."""
        for _ in range(self._num_stripped):
            text = text.removeprefix(" ")
        return text

    @property
    def num_stripped_spaces(self) -> int:
        """How many leading spaces of a whole text decoding takes away (1 for Llama-like tokenizers, else 0)."""
        return self._num_stripped

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt string of a chat, by the folder's template.

        Raises:
            ValueError: for malformed messages or a template that refuses them.
        """
        flat, _ = flatten_messages(messages)
        tokens = {name: _content(self.settings.get(name)) for name in TOKEN_ROLES}
        return render(self.chat_template, flat, add_generation_prompt, **tokens)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer.model (as they were read), tokenizer_config.json, special_tokens_map.json.

        tokenizer.model is what llama.cpp's converter asks for; nothing here reads it.
        The class is written as PreTrainedTokenizerFast, which makes transformers use tokenizer.json as it stands;
        under LlamaTokenizer it gives other ids.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self.definition.encode("utf-8"))
        settings = {key: value for key, value in self.settings.items() if key != "auto_map"}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.chat_template}
        _write_json(folder / "tokenizer_config.json", settings)
        roles = self._special_tokens_map
        if roles is None:
            roles = {name: _content(settings[name]) for name in TOKEN_ROLES if settings.get(name)}
        _write_json(folder / "special_tokens_map.json", roles)
        # Left by an earlier save of another program, these would win over the files just written.
        for name in ("chat_template.jinja", "tokenizer.model"):
            (folder / name).unlink(missing_ok=True)
        if self._sentencepiece is not None:
            (folder / "tokenizer.model").write_bytes(self._sentencepiece)

    def _role_id(self, name: str) -> int | None:
        content = _content(self.settings.get(name))
        return None if content is None else self.backend.token_to_id(content)


def _decoder_kind(decoder: dict[str, Any] | None) -> tuple[bool, int]:
    """(byte level?, number of leading spaces stripped) of a tokenizer.json's decoder."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, 0
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return False, sum(step["start"] for step in steps if step["type"] == "Strip")
    raise ValueError(
        f"tokenizer.json has the decoder {kinds}; expected ByteLevel, or Replace, ByteFallback, Fuse and Strip as in "
        "this family's files"
    )


def _content(token: Any) -> str | None:
    """A token's text: configs hold it as a string or as a dict with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _template(settings: dict[str, Any]) -> str | None:
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"tokenizer_config.json names the chat templates {sorted(named)} and none is 'default'")
        return named["default"]
    return template


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
