"""A customer's own known values, found in a text however they are written: other case, spaces, hyphens, accents,
invisible letters, digits in other groups, dates in other orders, a name turned round or in part.

Notable: text and values are reduced to their letters and digits, and compared there; each letter remembers where it
stood. A value of letters only, shorter than `LONG`, must stand as whole words and have spaces only where the value has.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date

import phonenumbers

from coterie.data.private import Span

LONG = 8  # letters and digits from which a value is found with spaces anywhere in it
REGION = "GB"  # of phone numbers without a country code
SHORT = 3  # letters below which only the same case counts: "Al" is found, "al" is not
POSTCODE = re.compile(
    r"\b[A-Z]{1,2}[0-9][0-9A-Z]? ?[0-9][A-Z]{2}\b|\b[0-9]{4} ?[A-Z]{2}\b|\b[0-9]{5,6}\b", re.IGNORECASE
)
MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
          "december")  # fmt: skip


@dataclass(frozen=True)
class Folded:
    """A text's letters and digits, without case, accents and invisible signs, and where each stood."""

    letters: str
    places: list[int]

    @classmethod
    def of(cls, text: str) -> "Folded":
        out, places = list[str](), list[int]()
        for at, character in enumerate(text):
            if character.isascii():
                parts = character.lower() if character.isalnum() else ""
            else:
                spread = unicodedata.normalize("NFKD", character).casefold()
                parts = "".join(c for c in unicodedata.normalize("NFKD", spread) if c.isalnum())
            for c in parts:
                out.append(str(unicodedata.digit(c, c)) if not c.isascii() else c)
                places.append(at)
        return cls("".join(out), places)


@dataclass(frozen=True)
class _Value:
    kind: str
    text: str
    key: str
    breaks: frozenset[int]  # letters of `key` before which the value itself has a space


class KnownValues:
    """What is known of one customer: `values` by kind ("name": ["Anna Müller"], "born": ["1980-05-01"], ...)."""

    def __init__(self, values: Mapping[str, Iterable[str]] = {}) -> None:
        found: dict[tuple[str, str], _Value] = {}
        for kind, texts in values.items():
            for text in texts:
                for way in _ways(kind, text.strip()):
                    folded = Folded.of(way)
                    if len(folded.letters) < 2:
                        continue
                    breaks = frozenset(
                        i for i in range(1, len(folded.places))
                        if any(c.isspace() for c in way[folded.places[i - 1] + 1 : folded.places[i]])
                    )  # fmt: skip
                    found.setdefault((kind, folded.letters), _Value(kind, way, folded.letters, breaks))
        self.values = sorted(found.values(), key=lambda v: -len(v.key))  # the longest first

    def find(self, text: str) -> list[Span]:
        """Every place where a known value stands; of several at one place, the longest."""
        if not self.values:
            return []
        folded, out = Folded.of(text), list[Span]()
        for value in self.values:
            at = folded.letters.find(value.key)
            while at >= 0:
                if span := _stands(text, folded, value, at):
                    if all(span.end <= s.start or span.start >= s.end for s in out):
                        out.append(span)
                    elif not any(s.start <= span.start and span.end <= s.end for s in out):
                        out = _grow(out, span)  # half in another: what either covers is private
                at = folded.letters.find(value.key, at + 1)
        return sorted(out, key=lambda s: s.start)


def _grow(spans: list[Span], new: Span) -> list[Span]:
    """`spans` with those that `new` touches and itself made one."""
    touched = [s for s in spans if s.start < new.end and s.end > new.start]
    whole = Span(min(s.start for s in [*touched, new]), max(s.end for s in [*touched, new]), touched[0].kind)
    return [*(s for s in spans if s not in touched), whole]


def _stands(text: str, folded: Folded, value: _Value, at: int) -> Span | None:
    """The span of `value` at this letter, if it is one there and not a part of other words."""
    last = at + len(value.key) - 1
    places = folded.places
    start, end = places[at], places[last] + 1
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1  # an accent that stands for itself
    if (at and places[at - 1] == start) or (last + 1 < len(places) and places[last + 1] == places[last]):
        return None  # half of a ligature
    for outside, inside in ((at - 1, at), (last + 1, last)):
        if 0 <= outside < len(places) and abs(places[outside] - places[inside]) == 1:
            digits = {folded.letters[outside].isdigit(), folded.letters[inside].isdigit()}
            if digits == {True} or (digits == {False} and len(value.key) < 2 * LONG):
                return None  # runs on: 123 in 1234, Ann in Annual; but not Ann in Ann2
    if len(value.key) < SHORT and text[start:end] != value.text:
        return None
    if len(value.key) < LONG and not any(c.isdigit() for c in value.key):
        gaps = {
            i - at for i in range(at + 1, last + 1) if any(c.isspace() for c in text[places[i - 1] + 1 : places[i]])
        }
        spelled = len(gaps) == len(value.key) - 1  # A N N A
        if not spelled and not gaps <= value.breaks:
            return None
    return Span(start, end, value.kind)


def _ways(kind: str, text: str) -> Iterable[str]:
    """The forms in which a value may be written that differ by more than case and signs."""
    yield text
    words = text.split()
    if kind == "name" and len(words) > 1:
        yield " ".join([words[-1], *words[:-1]])
        yield from (w for w in words if len(Folded.of(w).letters) > 1 and not w.islower())  # no "de", "van"
        yield f"{words[0]} {words[-1]}"
    elif kind == "phone":
        yield from _numbers(text)
    elif kind == "email":
        local, _, domain = text.partition("@")
        for name in (local, local.replace(".", " dot ")):
            for site in (domain, domain.replace(".", " dot ")):
                yield from (f"{name}@{site}", f"{name} at {site}")
    elif kind in ("address", "birthday", "born", "date"):
        yield from (line for line in text.replace(",", "\n").split("\n") if len(Folded.of(line).letters) >= 5)
        yield from (m.group() for m in POSTCODE.finditer(text))
        yield from _dates(text)


def _numbers(text: str) -> Iterable[str]:
    try:
        number = phonenumbers.parse(text, REGION)
    except phonenumbers.NumberParseException:
        return
    for form in (phonenumbers.PhoneNumberFormat.E164, phonenumbers.PhoneNumberFormat.NATIONAL):
        yield phonenumbers.format_number(number, form)
    yield f"00{number.country_code}{number.national_number}"
    yield f"{number.country_code} 0 {number.national_number}"  # +44 (0)20 ...
    if len(str(number.national_number)) >= 6:
        yield str(number.national_number)


def _dates(text: str) -> Iterable[str]:
    """The orders and words in which an ISO date is written."""
    try:
        day = date.fromisoformat(text)
    except ValueError:
        return
    y, m, d, name = f"{day.year}", day.month, day.day, MONTHS[day.month - 1]
    for dd in {f"{d}", f"{d:02d}"}:
        for mm in {f"{m}", f"{m:02d}"}:
            for year in (y, y[2:]):
                yield from (f"{dd}.{mm}.{year}", f"{mm}/{dd}/{year}", f"{year}-{mm}-{dd}")
        for month in (name, name[:3]):
            for end in ("", "st", "nd", "rd", "th"):
                yield from (f"{dd}{end} {month} {y}", f"{month} {dd}{end} {y}", f"{dd}{end} of {month} {y}")
