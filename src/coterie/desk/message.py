"""What flows through the desk: a conversation as it stands, one entry of it, and what a message may be."""

import unicodedata
from dataclasses import dataclass, field
from typing import Any, Literal

from coterie.errors import CoterieError

State = Literal["bot", "waiting", "person", "snoozed", "resolved"]
Kind = Literal["message", "note", "suggestion", "event"]
LONGEST = 20_000  # characters of one message
LONGEST_KEY = 80


class NoConversation(CoterieError):
    """There is none of this id, or none that the asker may see: both read the same."""

    status = 404
    code = "conversation_not_found"


class NotAllowed(CoterieError):
    """The conversation's state, or its owner, does not allow the action."""

    status = 409
    code = "not_allowed_now"


class Changed(CoterieError):
    """Somebody else was faster: the conversation is no longer as the caller saw it."""

    status = 409
    code = "conversation_changed"


@dataclass(frozen=True)
class Message:
    """One entry. `author`: "customer", "bot", "agent:NAME", "system". Customers see kinds "message" and "event"."""

    seq: int
    author: str
    kind: Kind
    text: str
    at: float  # seconds since 1970
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """As it stood when it was read; `version` changes with every change. `owner`: "bot", "queue" or "agent:NAME"."""

    id: str
    customer: str
    channel: str
    state: State
    owner: str
    version: int
    last_seq: int
    turn: int
    answering: int | None
    queue: str
    reason: str
    wake_at: float | None
    waiting_since: float | None
    opened_at: float
    changed_at: float


@dataclass(frozen=True)
class Turn:
    """An answer that the bot owes: the customer's turn of this number, in a conversation that stood so."""

    conversation: Conversation
    number: int
    messages: tuple[Message, ...]


def clean(text: str) -> str:
    """A message as it is kept: without control characters, in Unicode's composed form.

    Raises CoterieError where nothing readable is left, or it is too long.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CoterieError("the message holds half a character, a surrogate without its other") from error
    if len(text) > LONGEST:
        raise CoterieError(f"the message has {len(text)} characters; at most {LONGEST} are taken")
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc").strip()
    if not any(unicodedata.category(c)[0] not in "CZ" for c in text):
        raise CoterieError("the message is empty")
    return text


def check_key(key: str | None) -> str | None:
    """A client's key. Raises CoterieError."""
    if key is not None and not (1 <= len(key) <= LONGEST_KEY and key.isascii() and key.isprintable()):
        raise CoterieError(f"key: 1 to {LONGEST_KEY} printable ASCII characters")
    return key
