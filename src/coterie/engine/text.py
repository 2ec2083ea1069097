"""Tokens to text as they come: whole characters only, and nothing that may be the start of a stop text."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Decodes one generation. `push` gives the text that is now certain; `stopped` turns true at a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; return what can be shown."""
        self.held += self.decoder.step(self.tokenizer, token) or ""
        hits = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        if hits:
            self.stopped = True
            out, self.held = self.held[: min(hits)], ""
            return out
        keep = max((_overlap(self.held, s) for s in self.stop), default=0)
        cut = len(self.held) - keep
        out, self.held = self.held[:cut], self.held[cut:]
        return out

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        out, self.held = self.held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
