"""What calls may say: OpenAI's chat completions and completions, and what this family's sampling has beside them.

Unknown fields are refused, so that no setting is without effect; fields that only describe the caller are accepted.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from phi35.generation.choices import MAX_ALTERNATIVES
from phi35.serving.errors import ApiError, invalid

LARGEST_SEED = 2**63 - 1


class Strict(BaseModel):
    """Fields as named, and no others."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    """A text within a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """A picture: a data URL, or http(s) where the server allows it; ``detail`` "low" takes one tile."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """A picture within a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(Strict):
    """One turn; "developer" counts as "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart]
    name: str | None = None
    refusal: None = None


class StreamOptions(Strict):
    """``include_usage`` adds a last chunk with the numbers of tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class NamedSchema(Strict):
    """A JSON schema; it is always kept to, so that ``strict`` changes nothing."""

    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and with no other")
        return self


class Generation(Strict):
    """What both kinds of calls may say."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int | None = Field(None, ge=-LARGEST_SEED, le=LARGEST_SEED)
    n: int = Field(1, ge=1)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = None
    # Of no effect by their nature, or refused unless they say nothing.
    user: str | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @model_validator(mode="after")
    def _consistent(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true alone")
        given = [name for name in GUIDES if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type != "text":
            given.append("response_format")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say what the answer must look like: give one of them")
        if self.guided_choice is not None and not all(self.guided_choice):
            raise ValueError("guided_choice must hold non-empty strings")
        if self.top_k == 0:
            raise ValueError("top_k must be positive, or -1 for all tokens")
        return self

    def decoding_options(self) -> dict[str, Any]:
        """Fields of ``DecodingOptions``, all but the number of tokens and the seed."""
        stop_ids: tuple[int, ...] | None = tuple(self.stop_token_ids) if self.stop_token_ids else None
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "repetition_penalty": self.repetition_penalty,
            "stop": () if self.stop is None else self.stop,
            "stop_token_ids": (stop_ids or ()) if self.ignore_eos else stop_ids,
        }
        # Clients send top_p=1 and the like with greedy calls, where filters have no effect.
        if self.temperature > 0:
            top_p = None if self.top_p == 1 else self.top_p
            top_k = None if self.top_k == -1 else self.top_k
            options |= {"top_p": top_p, "top_k": top_k, "min_p": self.min_p or None}
        return options

    def output_tokens(self) -> int | None:
        """The most new tokens that the call wants; None for no number of its own."""
        return self.max_tokens


GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class ChatRequest(Generation):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    num_crops: int | None = Field(None, ge=1, le=64)
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _consistent_chat(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true alone")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    def output_tokens(self) -> int | None:
        """The most new tokens that the call wants; None for as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Generation):
    """``POST /v1/completions``: raw texts or ids, without a chat around them."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _consistent_completion(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo cannot give log-probabilities of the prompt: leave out one of echo and logprobs")
        if not self.prompt or (
            isinstance(self.prompt, list) and not all(one != "" and one != [] for one in self.prompt)
        ):
            raise ValueError("prompt must hold at least one token")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """One text, or one list of ids, for each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


def parse(kind: type[Generation], body: bytes) -> Any:
    """A call from its JSON.

    Raises:
        ApiError: 400, naming every field that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        if found[0]["type"] == "json_invalid":
            raise invalid(f"the body is not valid JSON: {found[0]['msg']}", code="invalid_json") from None
        raise _refusal(found) from None


def _refusal(found: list[Any]) -> ApiError:
    """One message for all wrong fields."""
    messages, param = [], None
    for one in found[:8]:
        place = ".".join(str(part) for part in one["loc"] if not str(part).startswith("function-"))
        text = "unknown field" if one["type"] == "extra_forbidden" else one["msg"].removeprefix("Value error, ")
        messages.append(f"{place}: {text}" if place else text)
        param = param or (str(one["loc"][0]) if one["loc"] else None)
    return invalid("; ".join(messages), param)


def dumps(value: Any) -> str:
    """JSON of one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
