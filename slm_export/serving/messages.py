"""What may be asked of the endpoint. A field that this server cannot honour is refused unless it asks for nothing.

Names, ranges and defaults are those of OpenAI's API reference; a request that is accepted means what it means there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Field -> the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "annotations": (None, []),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "refusal": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_calls": (None, []),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "web_search_options": (None,),
}
# They say something of who asks, and nothing of the answer.
_OF_NO_MATTER = frozenset({"metadata", "name", "prompt_cache_key", "safety_identifier", "user"})
_LONGEST_STOP = 256

TokenIds = Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise ValueError(f"'{name}' is not supported by this server; leave it out")
            elif name not in _NEUTRAL and name not in _OF_NO_MATTER:
                kept[name] = value
        return kept


class StreamOptions(_Asked):
    """What a stream holds beside its text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampled(_Asked):
    """What chats and completions have in common."""

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: tuple[str, ...] = Field(default=(), max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("temperature", "top_p", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any) -> Any:
        return 1.0 if value is None else value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _of_some_length(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(0 < len(text) <= _LONGEST_STOP for text in value):
            raise ValueError(f"a stop sequence has 1 to {_LONGEST_STOP} characters")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is of use with 'stream' alone")
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Asked):
    """A part of a message; other kinds than text are refused."""

    type: Literal["text"]
    text: str


class Message(_Asked):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]

    def for_template(self) -> dict[str, str]:
        """Return it as chat templates read it; what is now called developer is their system."""
        parts = (self.content,) if isinstance(self.content, str) else (part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(parts)}


class ChatRequest(Sampled):
    """``POST /v1/chat/completions``."""

    messages: tuple[Message, ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def most(self) -> int | None:
        """The most tokens of the answer; None: as many as fit."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampled):
    """``POST /v1/completions``."""

    prompt: str | TokenIds | tuple[str, ...]
    max_tokens: int | None = Field(default=16, ge=1)

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("an empty list; give a text")
        return value

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts, each a text or token ids; every one has a choice in the answer."""
        several = isinstance(self.prompt, tuple) and isinstance(self.prompt[0], str)
        return self.prompt if several else (self.prompt,)  # type: ignore[return-value]


class EmbeddingRequest(_Asked):
    """``POST /v1/embeddings``."""

    model: str
    input: str | TokenIds | tuple[str, ...] | tuple[TokenIds, ...]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)

    @field_validator("input")
    @classmethod
    def _of_some_length(cls, value: Any) -> Any:
        if len(value) > 2048 and not (isinstance(value, str) or isinstance(value[0], int)):
            raise ValueError(f"{len(value)} inputs; at most 2048 in one request")
        if value == ():
            raise ValueError("an empty list; give a text")
        return value

    @property
    def inputs(self) -> tuple[str | tuple[int, ...], ...]:
        """The inputs, each a text or token ids."""
        alone = isinstance(self.input, str) or isinstance(self.input[0], int)
        return (self.input,) if alone else self.input  # type: ignore[return-value]
