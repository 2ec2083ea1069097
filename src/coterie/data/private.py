"""Private data in texts: e-mail addresses, card numbers, IBANs and phone numbers, found by rule and checksum.

Names and postal addresses need a language model and are not looked for here; with `presidio=True` the recognisers of
presidio-analyzer that need none are asked as well (an extra: it brings spaCy).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import phonenumbers

from coterie.errors import CoterieError

EMAIL = re.compile(r"[A-Za-z0-9._%+'-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}\b")
DIGITS = re.compile(r"(?<![0-9])[0-9]+(?:[ -][0-9]+)*")  # groups of digits, one space or hyphen between
# Most cards; JCB's of 15 digits; Maestro's of 12 (ISO/IEC 7812 ranges of the issuers).
CARD = re.compile(r"[2-6][0-9]{12,18}|(?:1800|2131)[0-9]{11}|(?:50[0-9]{2}|5[6-8][0-9]{2}|6304|67[0-9]{2})[0-9]{8}")
# A number written as people write phone numbers, though no region's plan has it: begins with +, ( or 0.
PHONE = re.compile(r"(?<![\w.+-])(?:\+|\(|0)[0-9](?:[ ()./-]{0,2}[0-9]){7,13}(?!\w|[-.][0-9])")
IPV4 = re.compile(r"[0-9]{1,3}(?:[.][0-9]{1,3}){3}")
DATE = re.compile(r"[0-9]{1,4}[-./ ][0-9]{1,2}[-./ ][0-9]{1,4}")
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}(?![A-Za-z0-9])", re.IGNORECASE)
# Lengths of the countries' IBANs (ISO 13616); another country's number passes by its checksum alone.
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20,
    "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27,
    "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24,
    "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TR": 26,
}  # fmt: skip
ROUNDS = 8  # masking brings numbers apart, and may so uncover another; twice has been enough
MOST_GROUPS = 8  # groups of digits that one card number may be written in


@dataclass(frozen=True)
class Span:
    """A piece of private data: text[start:end], and what kind it is."""

    start: int
    end: int
    kind: str


Finder = Callable[[str], list[Span]]


def luhn(digits: str) -> bool:
    """Whether the check digit is right (ISO/IEC 7812-1)."""
    total = 0
    for i, d in enumerate(reversed(digits)):
        n = int(d) * (1 + i % 2)
        total += n - 9 if n > 9 else n
    return total % 10 == 0


def is_card(digits: str) -> bool:
    """12 to 19 digits that begin as payment cards of that length do, with a right check digit, not all the same."""
    return bool(CARD.fullmatch(digits)) and len(set(digits)) > 1 and luhn(digits)


def is_iban(text: str) -> bool:
    """Whether country, length and checksum (ISO 7064, mod 97) are right."""
    text = text.replace(" ", "").upper()
    wanted = IBAN_LENGTHS.get(text[:2])
    if not 15 <= len(text) <= 34 or (wanted and len(text) != wanted):
        return False
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def finder(region: str = "GB", presidio: bool = False) -> Finder:
    """What finds private data; phone numbers without a country code are read as `region`'s. Raises CoterieError."""
    region = region.upper()
    if region not in phonenumbers.SUPPORTED_REGIONS:
        raise CoterieError(f"{region!r}: not a region of phone numbers; use two letters such as GB, US or DE")
    more = _presidio() if presidio else None

    def find(text: str) -> list[Span]:
        spans = [*_ibans(text), *_cards(text), *_emails(text), *_phones(text, region), *(more(text) if more else [])]
        out: list[Span] = []
        for span in spans:  # the surer kinds come first
            if all(span.end <= other.start or span.start >= other.end for other in out):
                out.append(span)
        return sorted(out, key=lambda s: s.start)

    return find


def mask(text: str, find: Finder) -> str:
    """`text` with [EMAIL], [CARD], ... in place of private data, until nothing is found any more."""
    for _ in range(ROUNDS):
        spans = find(text)
        for span in reversed(spans):
            text = f"{text[: span.start]}[{span.kind.upper()}]{text[span.end :]}"
    return text


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        yield from (Span(m.start(), m.end(), "email") for m in EMAIL.finditer(text))


def _cards(text: str) -> Iterator[Span]:
    """Runs of neighbouring groups of digits that make a card number together."""
    for run in DIGITS.finditer(text):
        if sum(c.isdigit() for c in run.group()) < 12:
            continue
        groups = [(m.start() + run.start(), m.end() + run.start()) for m in re.finditer("[0-9]+", run.group())]
        first = 0
        while first < len(groups):
            found = 0
            for last in range(min(len(groups), first + MOST_GROUPS), first, -1):
                start, end = groups[first][0], groups[last - 1][1]
                if is_card(re.sub("[ -]", "", text[start:end])):
                    yield Span(start, end, "card")
                    found = last
                    break
            first = found or first + 1


def _ibans(text: str) -> Iterator[Span]:
    """Spaced IBANs may run into the words after them: the longest valid beginning counts."""
    for match in IBAN.finditer(text):
        found = match.group()
        for end in range(len(found), 14, -1):
            if found[end - 1] != " " and (end == len(found) or found[end] == " ") and is_iban(found[:end]):
                yield Span(match.start(), match.start() + end, "iban")
                break


def _phones(text: str, region: str) -> Iterator[Span]:
    if sum(c.isdigit() for c in text) >= 7:
        for match in phonenumbers.PhoneNumberMatcher(text, region):
            if not IPV4.fullmatch(match.raw_string):
                yield Span(match.start, match.end, "phone")
        for found in PHONE.finditer(text):
            if not DATE.fullmatch(found.group()):
                yield Span(found.start(), found.end(), "phone")


@cache
def _presidio() -> Finder:
    """The recognisers of presidio that work by pattern, without a language model and without the network."""
    try:
        import tldextract
        from presidio_analyzer import PatternRecognizer, predefined_recognizers
    except ImportError as error:
        raise CoterieError("presidio is not installed; pip install 'coterie[presidio]', or leave it out") from error
    # Its e-mail recogniser would fetch the public suffix list: the copy in the package serves.
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())
    names = ("UsSsnRecognizer", "NhsRecognizer", "IpRecognizer", "CryptoRecognizer", "UkNinoRecognizer")
    recognisers: list[PatternRecognizer] = [
        getattr(predefined_recognizers, n)() for n in names if hasattr(predefined_recognizers, n)
    ]

    def find(text: str) -> list[Span]:
        found = (r for one in recognisers for r in one.analyze(text, one.supported_entities, None) or [])
        return [Span(r.start, r.end, r.entity_type.lower()) for r in found if r.score >= 0.5]

    return find
