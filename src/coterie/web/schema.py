"""What the API takes, in OpenAI's words. Unknown fields are ignored, as OpenAI's clients expect."""

from typing import Any, Literal

from pydantic import BaseModel as Record
from pydantic import ConfigDict, Field

from coterie.data.read import Message
from coterie.engine import constrain
from coterie.engine.request import Sampling
from coterie.errors import CoterieError


class _Lenient(Record):
    model_config = ConfigDict(extra="ignore")


class TextPart(_Lenient):
    type: Literal["text"]
    text: str


class ChatMessage(_Lenient):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Message:
        """Role and text, as the chat template wants them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(_Lenient):
    model_config = ConfigDict(extra="ignore", populate_by_name=True)
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Lenient):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Lenient):
    """vLLM's extension: one of a list of choices, a regex, or a JSON schema."""

    choice: list[str] | None = None
    regex: str | None = None
    json_: dict[str, Any] | None = Field(None, alias="json")


class StreamOptions(_Lenient):
    include_usage: bool = False


class _Request(_Lenient):
    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1, strict=True)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    n: Literal[1] = 1
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        """The engine's settings. Raises CoterieError, naming the field."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens, self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, self.top_k or 0,
            self.seed, stop, logprobs, self._constraint(),
        )  # fmt: skip

    def _constraint(self) -> constrain.Constraint | None:
        form, extra = self.response_format, self.structured_outputs
        if form and form.type == "json_schema":
            if form.json_schema is None:
                raise CoterieError("response_format of type json_schema needs json_schema.schema")
            return constrain.json_schema(form.json_schema.schema_)
        if form and form.type == "json_object":
            return constrain.json_schema({"type": "object"})
        if extra and extra.choice is not None:
            return constrain.choices(extra.choice)
        if extra and extra.regex is not None:
            return constrain.regex(extra.regex)
        return constrain.json_schema(extra.json_) if extra and extra.json_ is not None else None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, strict=True)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    def settings(self, room: int) -> Sampling:
        """Sampling, with at most `room` tokens where the request does not say."""
        most = self.max_completion_tokens or self.max_tokens or room
        return self.sampling(most, self.top_logprobs if self.logprobs else None)


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str
    max_tokens: int | None = Field(16, ge=1, strict=True)
    logprobs: int | None = Field(None, ge=0, le=20)

    def settings(self, room: int) -> Sampling:
        """Sampling, with at most `room` tokens where the request does not say."""
        return self.sampling(self.max_tokens or room, self.logprobs)
