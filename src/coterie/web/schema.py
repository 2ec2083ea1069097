"""What the API takes, in OpenAI's words. Unknown fields are ignored, and null means absent, as OpenAI's clients expect.

Where we differ: temperature is 0 where a request does not say (OpenAI: 1), because a business wants the same answer
to the same question; and n is 1.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic import BaseModel as Record
from pydantic_core import PydanticCustomError

from coterie.data.read import Message
from coterie.engine.request import Sampling
from coterie.errors import CoterieError
from coterie.model import constrain

ANSWER_TOKENS, COMPLETION_TOKENS = 1024, 16  # most tokens where a request does not say; 16 is OpenAI's own


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("half_character", "holds half a character, a surrogate without its other") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


def _prompts(given: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or tokens."""
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    for one in several:
        if isinstance(one, str):
            _whole(one)
        elif not isinstance(one, list) or not one or not all(type(t) is int for t in one):
            raise PydanticCustomError("prompt", "must be a text or a list of tokens, or a list of these")
    return several


class _Lenient(Record):
    model_config = ConfigDict(extra="ignore", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class TextPart(_Lenient):
    type: Literal["text"]
    text: Text


class ChatMessage(_Lenient):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def plain(self) -> Message:
        """Role and text, as the chat template wants them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(_Lenient):
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Lenient):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Lenient):
    """vLLM's extension: one of a list of choices, a regex, or a JSON schema."""

    choice: list[Text] | None = None
    regex: Text | None = None
    json_: dict[str, Any] | None = Field(None, alias="json")


class StreamOptions(_Lenient):
    include_usage: bool = False


class _Request(_Lenient):
    model: Text
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: Text | list[Text] | None = None
    n: Literal[1] = 1
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens, self.temperature, self.top_p, self.top_k, self.seed, stop, logprobs, self._constraint()
        )

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
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    knowledge: bool = False  # ours: answer from the business's sources, each sentence checked and cited

    def settings(self) -> Sampling:
        """The engine's settings. Raises CoterieError, naming the field."""
        most = self.max_completion_tokens or self.max_tokens or ANSWER_TOKENS
        return self.sampling(most, self.top_logprobs if self.logprobs else None)


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Annotated[Any, AfterValidator(_prompts)]  # of every form a list[str | list[int]] is made
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    def settings(self) -> Sampling:
        """The engine's settings. Raises CoterieError, naming the field."""
        return replace(self.sampling(self.max_tokens or COMPLETION_TOKENS, self.logprobs), echo=self.echo)
