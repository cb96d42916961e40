"""The family's tokenizer as one of transformers: a folder's ``tokenizer.json`` as it stands.

transformers rebuilds the family's LlamaTokenizer, which gives other ids for text after a special token; see
``phi35.tokenizer``.
"""

from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from phi35.loading import find_folder
from phi35.tokenizer import TOKEN_ROLES, Tokenizer


class FamilyTokenizer(PreTrainedTokenizerFast):
    """A tokenizer of transformers that gives the ids of ``phi35.tokenizer.Tokenizer``; it pads on the left.

    Attributes:
        family: the tokenizer it was made from.
    """

    family: Tokenizer

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *inputs: Any, **options: Any
    ) -> "FamilyTokenizer":
        """The tokenizer of a folder or hub id.

        Args:
            folder: as ``phi35.load`` takes it.
            *inputs: none.
            **options: ``padding_side``, ``truncation_side``, ``model_max_length`` and ``chat_template`` are taken over.

        Raises:
            ValueError: as ``Tokenizer.from_folder``.
        """
        kept = ("padding_side", "truncation_side", "model_max_length", "chat_template")
        found = find_folder(folder, options.get("revision"))
        options = {name: options[name] for name in kept if options.get(name) is not None}
        return cls.of(Tokenizer.from_folder(found), name_or_path=str(folder), **options)

    @classmethod
    def of(cls, family: Tokenizer, **options: Any) -> "FamilyTokenizer":
        """The tokenizer around one of this package."""
        added = family.backend.get_added_tokens_decoder()
        by_text = {token.content: token for token in added.values()}
        roles = {name: family.settings.get(name) for name in TOKEN_ROLES}
        texts = {name: role.get("content") if isinstance(role, dict) else role for name, role in roles.items()}
        if texts["pad_token"] is None:
            texts["pad_token"] = texts["eos_token"]
        given = {name: by_text.get(text, text) for name, text in texts.items() if text is not None}
        length = family.settings.get("model_max_length")
        defaults = {"padding_side": "left", "chat_template": family.chat_template} | (
            {"model_max_length": length} if isinstance(length, int) else {}
        )
        tokenizer = cls(tokenizer_object=family.backend, **given, **(defaults | options))
        tokenizer.family = family
        tokenizer.take_special_tokens()
        return tokenizer

    def take_special_tokens(self) -> None:
        """Add BOS and EOS around a text where the folder's settings say so, whatever its ``tokenizer.json`` does."""
        family = self.family
        before = f"{self.bos_token} " if family.add_bos else ""
        after = f" {self.eos_token}" if family.add_eos else ""
        used = [(self.bos_token, family.bos_token_id)] * family.add_bos
        used += [(self.eos_token, family.eos_token_id)] * family.add_eos
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}", pair=f"{before}$A $B{after}", special_tokens=list(dict.fromkeys(used))
        )

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *arguments: Any, **options: Any
    ) -> tuple[str, ...]:
        """Write the files of ``Tokenizer.save``; the definition as it was read, unless tokens were added."""
        family = self.family
        template = self.chat_template if isinstance(self.chat_template, str) else family.chat_template
        definition = family.definition
        if self.backend_tokenizer.get_vocab_size() != family.vocab_size:
            definition = self.backend_tokenizer.to_str()
        family.with_definition(definition, template).save(save_directory)
        return tuple(str(path) for path in sorted(Path(save_directory).iterdir()))
