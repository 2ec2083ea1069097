"""Tokens to text as they come: whole characters only, and nothing that may be the start of a stop text."""

from tokenizers import Tokenizer

BROKEN = "\ufffd"  # how a tokenizer shows bytes that are no character, or not yet


class TextStream:
    """Decodes one generation. `push` gives the text that is now certain; `stopped` turns true at a stop text.

    Notable: only a short end of the tokens is decoded again at each step. It begins one character early, because
    some tokenizers treat the first token of a text apart. `flush` also gives what never became a character, so the
    pieces add up to what the tokenizer makes of all the tokens at once.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.recent: list[int] = []  # tokens decoded at each step
        self.told = 0  # of them, those whose text was taken already
        self.held = ""  # text that may be the start of a stop text
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; return what can be shown."""
        self.recent.append(token)
        new = self._new()
        if not new or new.endswith(BROKEN):
            return ""
        self.recent, self.told = self.recent[self.told :], len(self.recent) - self.told
        return self._certain(new)

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        new, self.recent, self.told = self._new(), [], 0
        out = self._certain(new) + self.held
        self.held = ""
        return out

    def _new(self) -> str:
        before, now = (self.tokenizer.decode(ids) for ids in (self.recent[: self.told], self.recent))
        return now[len(before) :]

    def _certain(self, new: str) -> str:
        """The part of the held and the new text that no later token can turn into a stop text; holds the rest."""
        if self.stopped:
            return ""
        self.held += new
        hits = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        if hits:
            self.stopped = True
            out, self.held = self.held[: min(hits)], ""
            return out
        keep = max((_overlap(self.held, s) for s in self.stop), default=0)
        cut = len(self.held) - keep
        out, self.held = self.held[:cut], self.held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
