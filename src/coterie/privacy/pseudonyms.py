"""Pseudonyms: what stands in a text for a private value, the same each time, and turned back in what comes out.

Notable: `restore(replace(text))` is `text`, whatever the text: one that already holds something like a pseudonym has
that replaced too. A streamed reply is restored piece by piece, and only the beginning of a pseudonym is held back.
"""

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from string import ascii_lowercase

from coterie.data.private import Span

FORM = re.compile(r"\[[A-Z]{2,16}_[0-9]{1,9}[a-z]{0,3}\]", re.IGNORECASE | re.ASCII)
LITERAL = "text"  # the kind of a piece of text that was written like a pseudonym


@dataclass(frozen=True)
class Pair:
    """A pseudonym and the value it stands for."""

    pseudonym: str
    value: str


class Pseudonyms:
    """The pairs of one customer or one conversation. Safe to use from several threads.

    `[NAME_1]` is the first name met; the same name in other letters or spacing is `[NAME_1b]`, so that a model sees
    that it is one person, and the text comes back as it was.
    """

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, str] = {}  # by pseudonym, in small letters
        self._known: dict[tuple[str, str], str] = {}  # by kind and value
        self._stems: dict[tuple[str, str], str] = {}  # by kind and the value's letters: "[NAME_1"
        self._numbers: dict[str, int] = {}  # last number of each kind
        self._variants: dict[str, int] = {}  # how many of each stem
        self._beginnings: set[str] = set()  # of all pseudonyms, in small letters
        self._unsaved: dict[str, Pair] = {}
        for pair in pairs:
            kind, _, number = pair.pseudonym[1:-1].lower().partition("_")
            stem = pair.pseudonym[:-1].rstrip(ascii_lowercase)
            self._numbers[kind] = max(self._numbers.get(kind, 0), int(number.rstrip(ascii_lowercase)))
            self._stems.setdefault((kind, letters(pair.value)), stem)
            self._keep(kind, stem, pair)

    def pairs(self) -> list[Pair]:
        """All pairs, to be kept (encrypted) and given to a new `Pseudonyms` later."""
        with self._lock:
            return [Pair(pseudonym, value) for (_, value), pseudonym in self._known.items()]

    def of(self, kind: str, value: str) -> str:
        """The pseudonym of a value; made where there is none yet."""
        with self._lock:
            kind = _plain(kind)
            if found := self._known.get((kind, value)):
                return found
            key = kind, letters(value)
            if key not in self._stems:
                self._numbers[kind] = self._numbers.get(kind, 0) + 1
                self._stems[key] = f"[{kind.upper()}_{self._numbers[kind]}"
            stem = self._stems[key]
            while (pseudonym := f"{stem}{_letter(self._variants.get(stem, 0))}]").lower() in self._values:
                self._variants[stem] += 1
            pair = Pair(pseudonym, value)
            self._keep(kind, stem, pair)
            self._unsaved[pair.pseudonym] = pair
            return pair.pseudonym

    def unsaved(self) -> list[Pair]:
        """The pairs that were made here and not yet `saved`."""
        with self._lock:
            return list(self._unsaved.values())

    def saved(self, pairs: Iterable[Pair]) -> None:
        """These pairs are kept elsewhere now."""
        with self._lock:
            for pair in pairs:
                self._unsaved.pop(pair.pseudonym, None)

    def _keep(self, kind: str, stem: str, pair: Pair) -> None:
        self._known[kind, pair.value] = pair.pseudonym
        self._variants[stem] = self._variants.get(stem, 0) + 1
        low = pair.pseudonym.lower()
        self._values[low] = pair.value
        self._beginnings.update(low[:n] for n in range(1, len(low)))

    def replace(self, text: str, spans: Iterable[Span]) -> str:
        """`text` with pseudonyms in place of `spans`, which do not overlap, and of whatever is written like one."""
        out, at = list[str](), 0
        for span in sorted(spans, key=lambda s: s.start):
            out += [self._literal(text[at : span.start]), self.of(span.kind, text[span.start : span.end])]
            at = span.end
        return "".join([*out, self._literal(text[at:])])

    def _literal(self, text: str) -> str:
        return FORM.sub(lambda m: self.of(LITERAL, m.group()), text)

    def restore(self, text: str) -> str:
        """`text` with the values again; a pseudonym that was never given out stays as it is."""
        return FORM.sub(lambda m: self._values.get(m.group().lower(), m.group()), text)

    def value(self, pseudonym: str) -> str | None:
        """What a whole pseudonym stands for."""
        return self._values.get(pseudonym.lower())

    def begins(self, text: str) -> bool:
        """Whether some pseudonym begins like this and goes on."""
        return text.lower() in self._beginnings


class Restorer:
    """Restores a text that arrives in pieces: `feed` each, then `close`; or `take` each, and say which is the last.

    What it gives back, joined, is `restore` of the whole; it holds back nothing but the beginning of a pseudonym.
    """

    def __init__(self, pseudonyms: Pseudonyms) -> None:
        self.pseudonyms, self.held = pseudonyms, ""

    def feed(self, piece: str) -> str:
        """What can be said so far."""
        text, out, at = self.held + piece, list[str](), 0
        self.held = ""
        while (opening := text.find("[", at)) >= 0:
            out.append(text[at:opening])
            match = FORM.match(text, opening)
            value = self.pseudonyms.value(match.group()) if match else None
            if match and value is not None:
                out.append(value)
                at = match.end()
            elif self.pseudonyms.begins(text[opening:]):
                self.held = text[opening:]
                return "".join(out)
            else:
                out.append("[")
                at = opening + 1
        return "".join([*out, text[at:]])

    def take(self, piece: str, last: bool) -> str:
        """What can be said so far; after the last piece, all."""
        return self.feed(piece) + (self.close() if last else "")

    def close(self) -> str:
        """What was held back, which has turned out to be no pseudonym."""
        rest, self.held = self.held, ""
        return rest


def letters(value: str) -> str:
    """What is the same in all ways of writing a value: its letters and digits, in small letters."""
    return "".join(c for c in value.casefold() if c.isalnum()) or value


def _plain(kind: str) -> str:
    """`kind` in the letters that a pseudonym may have."""
    plain = re.sub("[^a-z]", "", kind.lower())[:16]
    return plain if len(plain) > 1 else "value"


def _letter(n: int) -> str:
    """ "", b, c, ..., z, ba, bb, ...: the first needs none."""
    out = ""
    while n:
        out, n = chr(97 + n % 26) + out, n // 26
    return out
