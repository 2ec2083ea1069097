"""The one chokepoint: what a model, a log or a training set gets to see of a text, and how its answer is turned back.

Everything private becomes a pseudonym: what rules and checksums find, what the customer is known by, and what the
tagging expert finds. `Mask.hide` gives a masked text or raises `MaskingFailed`; there is no third way, so where the
masker fails, nothing goes out.

    mask = Mask(Detector(tagger), Pseudonyms(), KnownValues({"name": ["Anna Müller"]}))
    prompt = mask.hide("Anna Müller here, my card is 4111 1111 1111 1111")   # "[NAME_1] here, my card is [CARD_1]"
    mask.restore("Thank you, [NAME_1]!")                                     # "Thank you, Anna Müller!"
"""

import hashlib
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Protocol

from coterie.data.private import IPV4, Span, finder
from coterie.errors import CoterieError
from coterie.privacy.known import KnownValues
from coterie.privacy.pseudonyms import FORM, Pseudonyms, Restorer
from coterie.recent import Recent

# Kinds that say who somebody is, or reach them. The others that the tagger knows (place, organisation, date, title,
# nationality, url) are left in, as an answer often turns on them; ask for them by name.
IDENTIFYING = frozenset(
    {"name", "email", "phone", "card", "iban", "address", "zip", "order", "ssn", "licence", "ip", "age"}
)
KEPT, KEPT_S = 8192, 600.0  # texts whose tags are in memory, and for how long
ROUNDS = 4  # masking brings numbers apart, and may so uncover another
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]"
)

SSN = re.compile(r"(?<![\w-])(?!000|666|9)[0-9]{3}([- ])(?!00)[0-9]{2}\1(?!0000)[0-9]{4}(?![\w-])")
IPV6 = re.compile(
    r"(?<![\w:.])(?:[0-9a-f]{1,4}:){2,7}(?::?[0-9a-f]{1,4}){1,7}(?![\w:])|(?<![\w:])::[0-9a-f]{1,4}(?!\w)", re.I
)
URL = re.compile(r"\b(?:https?://|www\.)[^\s<>\"']*[\w/]|(?<![\w@.-])(?:[a-z0-9-]+\.)+(?:com|org|net|info|biz|io|co|"
                 r"edu|gov|uk|de|fr|it|es|nl|be|ch|at|pl|cz|se|dk|no|fi|pt|eu|us|ca|au|ie|in|jp|br|ru|hu|ro|tr)\b(?![@\w])",
                 re.IGNORECASE)  # fmt: skip
ORDER = re.compile(
    r"\b(?:order|invoice|ticket|case|reference|ref|customer|booking|tracking|contract|account|policy)"
    r"(?:[ \t]+(?:number|no|nr|id|code))?[.:#]*[ \t]*(?:is[ \t]+)?#?[ \t]*((?=[\w-]*[0-9]{3})[\w-]{4,24})(?!\w)|"
    r"(?<!\w)(\#[0-9]{4,12}|[A-Z]{2,4}-?[0-9]{5,12})(?!\w)", re.IGNORECASE,
)  # fmt: skip


class MaskingFailed(CoterieError):
    """A text could not be masked, so it was not let through. Says nothing of the text."""

    exit_code = 1
    status = 503
    code = "masking_failed"


class Finds(Protocol):
    """A tagging expert: the private spans in each of several texts."""

    def find(self, texts: list[str]) -> list[list[Span]]: ...


class Detector:
    """Finds private spans in any text: by rule and checksum first, then by the tagging expert, where there is one.

    What the expert found is kept for a while, as each turn of a conversation is masked with all that was said before,
    and passages are evidence again and again. The texts are not kept, only their digests under a key of this process.
    """

    def __init__(self, tagger: Finds | None = None, region: str = "GB", kinds: Iterable[str] = IDENTIFYING) -> None:
        self.tagger, self.kinds = tagger, frozenset(kinds)
        self._rules = finder(region)
        self._key, self._tagged = secrets.token_bytes(32), Recent[bytes, tuple[Span, ...]](KEPT, KEPT_S)

    def open(self) -> None:
        """Have the tagging expert ready, if there is one: it may have to be trained, or read, at the first text."""
        if self.tagger:
            self.tagger.find([""])

    def __call__(self, text: str) -> list[Span]:
        """The spans of the wanted kinds, in order, none over another."""
        return self.united(text, self._tags(self.tagger, text) if self.tagger else [])

    def _tags(self, tagger: Finds, text: str) -> list[Span]:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._key, digest_size=16).digest()
        found = self._tagged.get(digest)
        if found is None:
            found = tuple(tagger.find([text])[0])
            self._tagged.put(digest, found)
        return list(found)

    def united(self, text: str, tagged: list[Span]) -> list[Span]:
        """What the rules find, and what is left of the tagger's spans beside it."""
        spans = [*self._rules(text), *rules(text)]
        out: list[Span] = []
        for span in spans:  # the surer kinds come first
            if all(span.end <= other.start or span.start >= other.end for other in out):
                out.append(span)
        sure = sorted(out, key=lambda s: s.start)
        for span in tagged:
            out += _beside(text, span, sure)
        return sorted((s for s in out if s.kind in self.kinds), key=lambda s: s.start)


def rules(text: str) -> Iterator[Span]:
    """What patterns find that the data report does not look for: American social security numbers, addresses of
    machines and sites, numbers of orders."""
    if any(c.isdigit() for c in text):
        yield from (Span(*m.span(), "ssn") for m in SSN.finditer(text))
        yield from (
            Span(*m.span(), "ip") for m in re.finditer(rf"(?<![\w.]){IPV4.pattern}(?![\w]|[.][0-9])", text)
            if all(int(part) < 256 for part in m.group().split("."))
        )  # fmt: skip
        if ":" in text:
            yield from (Span(*m.span(), "ip") for m in IPV6.finditer(text) if m.group().count(":") > 2)
        for m in ORDER.finditer(text):
            yield Span(*m.span(1 if m.group(1) else 2), "order")
    if "." in text or "://" in text:
        yield from (Span(*m.span(), "url") for m in URL.finditer(text))


def _beside(text: str, span: Span, sure: list[Span]) -> Iterator[Span]:
    """The parts of `span` that none of `sure` covers, without the signs at their ends."""
    at = span.start
    for other in sure:
        if other.start < span.end and other.end > at:
            yield from _trimmed(text, at, other.start, span.kind)
            at = max(at, other.end)
    yield from _trimmed(text, at, span.end, span.kind)


def _trimmed(text: str, start: int, end: int, kind: str) -> Iterator[Span]:
    while start < end and not text[start].isalnum() and text[start] not in "+(#":
        start += 1
    while start < end and not text[end - 1].isalnum() and text[end - 1] != ".":
        end -= 1
    if start < end:
        yield Span(start, end, kind)


class Mask:
    """Hides what is private in the texts of one customer or conversation, and turns answers back."""

    def __init__(
        self, detector: Callable[[str], list[Span]], pseudonyms: Pseudonyms, known: KnownValues | None = None
    ) -> None:
        self.detector, self.pseudonyms, self.known = detector, pseudonyms, known or KnownValues()

    def hide(self, text: str) -> str:
        """`text` with pseudonyms; `restore` gives it back to the letter. Raises MaskingFailed."""
        try:
            return self._hide(text)
        except MaskingFailed:
            raise
        except Exception as error:  # whatever it is: nothing may go out unmasked
            # `from None` and the kind alone: an error of a library may quote the text.
            raise MaskingFailed(f"the text could not be masked ({type(error).__name__}), so it was not used") from None

    def _hide(self, text: str) -> str:
        spans = self._found(text)
        masked = self.pseudonyms.replace(text, spans)
        for _ in range(ROUNDS):
            left = self._left(masked)
            if not left:
                return masked
            masked = _replaced(masked, left, self.pseudonyms)
        raise MaskingFailed("the text could not be masked: private data was still found in it, so it was not used")

    def _found(self, text: str) -> list[Span]:
        """The customer's own values, and what the detector finds beside them."""
        own = self.known.find(text)
        clear = INVISIBLE.sub("", text)
        if clear == text:
            others = self.detector(text)
        else:  # signs that nobody sees may part a name or a number: looked at without them
            places = [i for i, c in enumerate(text) if not INVISIBLE.match(c)]
            others = [Span(places[s.start], places[s.end - 1] + 1, s.kind) for s in self.detector(clear)]
        return sorted([*own, *(p for s in others for p in _beside(text, s, own))], key=lambda s: s.start)

    def _left(self, masked: str) -> list[Span]:
        """What is still private between the pseudonyms, by known values and by rule (the tagger has had its say)."""
        out: list[Span] = []
        edges = [0, *(edge for m in FORM.finditer(masked) for edge in m.span()), len(masked)]
        rules_of = self.detector.united if isinstance(self.detector, Detector) else lambda _text, _tagged: []
        for start, end in list(pairwise(edges))[::2]:
            part = masked[start:end]
            own = self.known.find(part)
            more = [p for s in rules_of(part, []) for p in _beside(part, s, own)]
            out += [Span(start + s.start, start + s.end, s.kind) for s in sorted([*own, *more], key=lambda s: s.start)]
        return out

    def restore(self, text: str) -> str:
        """`text` with the values again."""
        return self.pseudonyms.restore(text)

    def restoring(self) -> Restorer:
        """For an answer that comes in pieces."""
        return Restorer(self.pseudonyms)


def _replaced(masked: str, spans: list[Span], pseudonyms: Pseudonyms) -> str:
    """As `Pseudonyms.replace`, but pseudonyms that stand there already are left alone."""
    for span in reversed(spans):
        masked = masked[: span.start] + pseudonyms.of(span.kind, masked[span.start : span.end]) + masked[span.end :]
    return masked
