"""What a caller asks of the engine, and the handle on which the answer arrives."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from coterie.errors import CoterieError
from coterie.model.constrain import Constraint

Adapter = tuple[str, int]  # name and version of an expert
Combine = Literal["merge", "logits", "arrow"]
Callback = Callable[["Piece"], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blend:
    """Several experts that answer one request together.

    `merge`: the weighted sum of their updates. `logits`: each computes its own scores for the next token, and their
    weighted mean is sampled from; takes a cache slot for each expert. `arrow`: every token wakes its own `top_k` of
    them in every layer (see experts/arrow.py), and the weights play no part.
    """

    parts: tuple[tuple[Adapter, float], ...]
    how: Combine = "merge"
    top_k: int = 3  # experts that a token wakes; of `arrow` only

    def __post_init__(self) -> None:
        """Raises CoterieError where the parts are none, or a weight is not positive."""
        if not self.parts or any(weight <= 0 for _, weight in self.parts) or self.top_k < 1:
            raise CoterieError("experts that answer together need weights above 0, and a top_k of at least 1")


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 leave all tokens in.

    The same `seed`, any whole number, gives the same text, whatever else runs in the batch.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # how many alternatives to report beside each token; None: no log-probabilities
    constraint: Constraint | None = None
    echo: bool = False  # report the prompt first, its tokens with log-probabilities where `logprobs` asks for them

    def __post_init__(self) -> None:
        """Raises CoterieError, naming the field and what it may be."""
        for name, good, want in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 2, "between 0 and 2"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            ("stop", len(self.stop) <= 16 and all(self.stop), "at most 16 texts, none empty"),
        ):
            if not good:
                raise CoterieError(f"{name} must be {want}, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class TokenChoice:
    """One token, its log-probability in nats, and the likeliest alternatives; a prompt's first token has neither."""

    id: int
    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """News of a generation: text that is now certain; `finish` says why it ended (stop, length, cancelled, error)."""

    text: str
    tokens: tuple[TokenChoice, ...] = ()
    finish: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Generation:
    """A request under way. Iterate over it, once, for its pieces; or call `text()`, once, to wait for all of it.

    Raises the error that ended it, where one did.
    """

    prompt: list[int]
    sampling: Sampling
    adapter: Adapter | Blend | None = None
    on_piece: Callback | None = None
    generated: list[int] = field(default_factory=list)
    finish: str | None = None
    asked_at: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    cached: int = 0  # tokens of the prompt whose keys and values were there already
    trunk: int = 0  # of the rest, those that the layers below the expert had read already
    _pieces: queue.SimpleQueue[Piece] = field(default_factory=queue.SimpleQueue)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Ask the engine to stop; the last piece will say `cancelled`."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def emit(self, piece: Piece) -> None:
        """Called by the engine's thread, which a callback that raises must not take down."""
        self.finish = piece.finish
        try:
            (self.on_piece or self._pieces.put)(piece)
        except Exception:
            log.exception("a callback failed; its request is cancelled")
            self.cancel()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self._pieces.get()
            if piece.error:
                raise piece.error
            yield piece
            if piece.finish:
                return

    def text(self) -> str:
        """All of the answer, once it is complete."""
        return "".join(piece.text for piece in self)
