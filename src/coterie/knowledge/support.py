"""Does the evidence say what a sentence says? Numbers must be there; the rest is weighed by a small logistic model.

The features of a sentence, against the line of the evidence that is nearest to it: the share of its content words
found there, the cosine of the two, whether one of them denies and the other does not, and the share of its words found
in the whole passage. The weights were fitted by `benchmarks/support.py` on sentences of documents, left as they are,
shortened, or changed in a word, a number or a denial, with other documents than it measures on.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coterie.knowledge.embed import Embedder

WEIGHTS = (9.07, 3.81, -5.72, 1.99)
BIAS = -11.47
SURE = 0.5  # probability from which a sentence is taken as said by the evidence
QUOTED = 0.4  # cosine to the question from which a paragraph is quoted in place of an answer; see docs/log.md
SECOND = 0.05  # a second one is quoted too where it is nearer than this to the first
LONGEST = 400  # characters of a quotation
STEM = 5  # letters of a word that count: "deliver" and "delivery" are the same
_COMMON = """
a an the is are was were be been do does did i you he she it we they my your our their his her its me us them to of in
on at for from by with as and or if then than that this these those there here so but can could may might will would
shall should must have has had what which who when where how why any all each please yes just also into about after
before up out over
"""
_STOP = frozenset(_COMMON.split())
_DENIES = re.compile(r"\b(?:not|no|never|none|cannot|without|nor|\w+n['\u2019]t)\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_WORDS = "one two three four five six seven eight nine ten eleven twelve"
_SPELLED = {word: str(n) for n, word in enumerate(_WORDS.split(), 1)}


@dataclass(frozen=True)
class Support:
    """How sure it is that the evidence says a sentence, and which piece of it (its number from 0, or None)."""

    probability: float
    by: int | None

    @property
    def given(self) -> bool:
        return self.by is not None


def sentences(text: str) -> list[str]:
    """The sentences of an answer, with the white space after each, so that joined they are the answer."""
    return [s for s in re.split(r"(?<=[.!?])(?<!\n\d\.)(?<!^\d\.)(?=\s)|(?<=\n)(?=\S)", text) if s]


def lines(text: str) -> list[str]:
    """What a passage says, one by one: its lines and sentences."""
    return [s.strip(" -*#|\t") for s in re.split(r"\n+|(?<=[.!?;])\s+", text) if len(s.strip(" -*#|\t")) > 3]


def paragraphs(text: str) -> list[str]:
    """What can be quoted by itself: list items, rows of tables, paragraphs; lines that were only wrapped are joined."""
    whole = re.sub(r"\n[ \t]+(?=[^\s\-*+#|>])", " ", text)
    parts = (re.sub(r"\s*\|\s*", " | ", p.strip(" -*+#>|\t")) for p in whole.split("\n"))
    return [p for p in parts if len(content(p)) >= 2]


def says_something(sentence: str) -> bool:
    """Is there anything to check? Greetings, thanks and questions state no fact."""
    return len(content(sentence)) >= 2 and not sentence.strip().endswith("?")


def content(text: str) -> set[str]:
    """The words that carry the meaning, cut to STEM letters."""
    return {w[:STEM] for w in re.findall(r"[^\W\d_]+", text.lower()) if w not in _STOP and len(w) > 1}


def numbers(text: str) -> set[str]:
    """The numbers in a text, as digits; small ones also where they are spelled."""
    spelled = {_SPELLED[w] for w in re.findall(r"[a-z]+", text.lower()) if w in _SPELLED}
    return {n.replace(",", "").rstrip(".:") for n in _NUMBER.findall(text)} | spelled


def features(
    sentence: str, passage: str, its_lines: Sequence[str], cosines: Sequence[float]
) -> tuple[float, float, float, float]:
    """See the top of this file; `cosines` of the sentence to each of the passage's lines."""
    words = content(sentence)
    shares = [len(words & content(line)) / max(1, len(words)) for line in its_lines]
    best = max(range(len(its_lines)), key=lambda i: shares[i] + cosines[i])
    differ = bool(_DENIES.search(sentence)) != bool(_DENIES.search(its_lines[best]))
    return shares[best], cosines[best], float(differ), len(words & content(passage)) / max(1, len(words))


def probability(found: Sequence[float]) -> float:
    """Of a sentence being said, given its features."""
    return 1 / (1 + math.exp(-BIAS - sum(w * f for w, f in zip(WEIGHTS, found, strict=True))))


@dataclass(frozen=True)
class Quotation:
    """A paragraph of the evidence, and the number of its piece from 0."""

    text: str
    by: int


class Checker:
    """Checks sentences against pieces of evidence, embedded once."""

    def __init__(self, evidence: Sequence[str], embedder: Embedder) -> None:
        self.embedder, self.evidence = embedder, list(evidence)
        self.lines = [lines(text) or [text] for text in self.evidence]
        flat = [line for of in self.lines for line in of]
        self._vectors = embedder.embed(flat) if flat else np.zeros((0, embedder.width), np.float32)
        self._numbers = [numbers(text) for text in self.evidence]

    def check(self, sentence: str) -> Support:
        """The piece that says the sentence best, where it is likelier than not that it does."""
        if not self.evidence:
            return Support(0.0, None)
        cosines = (self._vectors @ self.embedder.embed([sentence])[0]).tolist()
        best, by, start = 0.0, None, 0
        for n, (text, of) in enumerate(zip(self.evidence, self.lines, strict=True)):
            near = cosines[start : start + len(of)]
            start += len(of)
            if numbers(sentence) <= self._numbers[n]:
                sure = probability(features(sentence, text, of, near))
                if sure > best:
                    best, by = sure, n
        return Support(best, by if best >= SURE else None)

    def quote(self, question: str, places: Sequence[str]) -> list[Quotation]:
        """The one or two paragraphs of the evidence that are nearest to a question, if any is near; `places` are the
        headings of each piece, which say what a short paragraph is about."""
        found = [(n, p) for n, text in enumerate(self.evidence) for p in paragraphs(text)]
        if not found:
            return []
        texts = [p for _, p in found] + [f"{places[n]}: {p}" for n, p in found]
        vectors = self.embedder.embed([question, *texts])
        near = (vectors[1:] @ vectors[0]).reshape(2, -1).max(axis=0)
        best = np.argsort(-near, kind="stable")[:2].tolist()
        kept = [i for i in best if near[i] >= max(QUOTED, near[best[0]] - SECOND)]
        return [Quotation(_cut(found[i][1]), found[i][0]) for i in kept]


def _cut(text: str) -> str:
    """At most LONGEST characters: whole sentences where one fits."""
    if len(text) <= LONGEST:
        return text
    held = re.match(rf".{{1,{LONGEST}}}[.!?](?=\s)", text, re.DOTALL)
    return held[0] if held else text[: LONGEST - 3].rsplit(" ", 1)[0] + " ..."
