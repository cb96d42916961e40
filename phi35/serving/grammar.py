"""Answers of a given form: JSON, a JSON schema, a pattern, a choice or a grammar, by the library llguidance.

The library turns a grammar into the set of tokens that may come next. An answer may begin with one space, which the
tokenizers of this family put in front of a first word and which decoding takes away again. JSON may hold a space, or a
line feed and an indent, wherever it may hold white space: without a limit a weak model might write nothing else.
"""

import collections
import dataclasses
import json
import threading
from typing import Any

import torch

from phi35.config import ModelConfig
from phi35.generation.constraints import ConstraintError
from phi35.kernels.operands import MASK_BITS
from phi35.serving.protocol import Generation
from phi35.tokenizer import Tokenizer

WHITESPACE = r" |\n {0,24}"
CACHED = 64
"""Compiled grammars that are kept."""


@dataclasses.dataclass(frozen=True)
class GrammarSpec:
    """What an answer must look like.

    Attributes:
        kind: "json" (a schema as JSON text), "regex" or "lark".
        text: the schema, pattern or grammar.
    """

    kind: str
    text: str


def spec_of(call: Generation) -> GrammarSpec | None:
    """The form that a call asks for; None for free text."""
    form = call.response_format
    schema = call.guided_json
    if form is not None and form.type == "json_object":
        schema = {"type": "object"}
    elif form is not None and form.json_schema is not None:
        schema = form.json_schema.schema_
    if schema is not None:
        return GrammarSpec("json", json.dumps(schema))
    if call.guided_regex is not None:
        return GrammarSpec("regex", call.guided_regex)
    if call.guided_choice is not None:
        return GrammarSpec(
            "lark", "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in call.guided_choice)
        )
    return None if call.guided_grammar is None else GrammarSpec("lark", call.guided_grammar)


class GrammarCompiler:
    """Makes constraints for a model's tokens; safe to call from several threads.

    Args:
        tokenizer: the model's.
        config: the model's; its stop tokens end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._compiled: collections.OrderedDict[GrammarSpec, Any] = collections.OrderedDict()

    def constraint(self, spec: GrammarSpec) -> "GrammarConstraint":
        """A constraint for one answer.

        Raises:
            ValueError: if the grammar is broken, too large, or uses what the library does not know.
        """
        with self._lock:
            matcher = self._compiled.get(spec)
            if matcher is None:
                matcher = self._compiled[spec] = self._compile(spec)
            self._compiled.move_to_end(spec)
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
            return GrammarConstraint(matcher.deep_copy(), self.config.vocab_size)

    def _compile(self, spec: GrammarSpec) -> Any:
        import llguidance

        if self._tokens is None:
            self._tokens = llguidance.LLTokenizer(
                self.tokenizer.definition,
                n_vocab=self.config.vocab_size,
                eos_token=list(self.config.stop_token_ids),
            )
        body: dict[str, Any]
        if spec.kind == "json":
            schema = json.loads(spec.text)
            options = schema.get("x-guidance", {})
            if not isinstance(options, dict):
                raise ValueError(f"x-guidance of a schema must be an object, got {options!r}")
            schema["x-guidance"] = {"whitespace_pattern": WHITESPACE, **options}
            body = {"json_schema": schema}
        elif spec.kind == "regex":
            body = {
                "lark_grammar": json.loads(llguidance.LLMatcher.grammar_from_regex(spec.text))["grammars"][0][
                    "lark_grammar"
                ]
            }
        else:
            body = {"lark_grammar": spec.text}
        start = "start: / ?/ @answer" if self.tokenizer.num_stripped_spaces else "start: @answer"
        whole = {"grammars": [{"lark_grammar": start}, {"name": "answer", **body}]}
        matcher = llguidance.LLMatcher(
            self._tokens, json.dumps(whole), log_level=0, limits=llguidance.LLParserLimits(verbose_errors=False)
        )
        if matcher.is_error():
            raise ValueError(f"the answer's form cannot be kept: {matcher.get_error()}")
        return matcher


class GrammarConstraint:
    """Follows one answer; a ``TokenConstraint``.

    Args:
        matcher: of llguidance, at its start.
        vocab_size: of the model.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // MASK_BITS)

    def allowed(self) -> torch.Tensor:
        """(ceil(V / 32),) int32: tokens that the grammar lets come next; at its end the stop tokens."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)[: self._num_words]
        self._check()
        if not mask.any():
            raise ConstraintError("the answer's form leaves no token that the model has")
        return mask

    def advance(self, token_id: int) -> bool:
        """Take a token; True where the grammar has come to its end."""
        self._matcher.consume_token(token_id)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"the answer's form could not be kept: {self._matcher.get_error()}")
