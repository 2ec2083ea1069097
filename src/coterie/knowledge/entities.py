"""Which things of a graph a question names: by label, by alias, by a spelling that is near, or by meaning."""

import logging
import re
import threading
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.fuzz import ratio

from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph import Askable
from coterie.knowledge.sparql import Term
from coterie.recent import Recent

NAMES = (
    "http://www.w3.org/2000/01/rdf-schema#label", "http://www.w3.org/2004/02/skos/core#prefLabel",
    "http://www.w3.org/2004/02/skos/core#altLabel", "http://schema.org/name", "https://schema.org/name",
    "http://schema.org/alternateName", "https://schema.org/alternateName", "http://xmlns.com/foaf/0.1/name",
)  # fmt: skip
MOST = 500_000  # names held in memory: about 210 MB
PAGE = 20_000  # names read by one query: half a million at once do not come in its time
WAITED_FOR = 2_000  # vectors computed while a question waits, about 2 s; more are computed beside
MEANT = 100_000  # names that are found by meaning as well, where there are no more: 150 MB
LONGEST = 12  # words of a name
READ, GUESSED = 1_000, 40  # words of a question in which names are found, and other spellings and wordings of them
NEAR = 86.0  # rapidfuzz's ratio, of 100, from which another spelling counts
ALIKE = 0.7  # cosine from which another wording counts
TRIED = 200  # names that share most letters with a word, compared letter by letter
LINKED = 8  # questions whose mentions are kept for a minute: one question is linked several times
Embed = Callable[[Sequence[str]], NDArray[np.float32]]  # texts to unit vectors (texts, width)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mention:
    """A part of a question (words start..end of `plain` of it) and what it may name, each equally well.

    how: "name", "spelling" or "meaning". score: 1 for a name to the letter (but for case, accents and marks).
    """

    start: int
    end: int
    name: str
    iris: tuple[str, ...]
    score: float
    how: str

    def holds(self, other: "Mention") -> bool:
        """Whether the words of `other` are some of these, and not all."""
        return self.start <= other.start and other.end <= self.end and self.end - self.start > other.end - other.start


def plain(text: str) -> str:
    """Letters and digits only, without accents and case, words one space apart: what names are compared by."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return " ".join(re.findall(r"[^\W_]+", "".join(c for c in letters if not unicodedata.combining(c))))


class Entities:
    """The names of a graph, as pairs of name and IRI."""

    def __init__(
        self, names: Iterable[tuple[str, str]], embed: Embed | None = None, before: Sequence["Entities"] = ()
    ) -> None:
        """`before`: of other readers, or of the same graph as it was; a vector that is there is not computed again."""
        found: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for name, iri in names:
            if key := plain(name):
                found[key][iri] = None
        self.iris = {key: tuple(iris) for key, iris in found.items()}
        self.keys = list(self.iris)
        self.longest = min(LONGEST, max((k.count(" ") + 1 for k in self.keys), default=0))
        self._pieces: defaultdict[str, list[int]] = defaultdict(list)
        for number, key in enumerate(self.keys):
            for piece in _pieces(key):
                self._pieces[piece].append(number)
        self._linked = Recent[tuple[str, bool], tuple[Mention, ...]](LINKED, 60)
        self.embed = embed
        self.vectors: NDArray[np.float32] | None = None  # (names, width), once they are computed
        if embed and 0 < len(self.keys) <= MEANT:
            known = _known(self.keys, before)
            fill = partial(self._fill, embed, known, [i for i, k in enumerate(self.keys) if k not in known])
            if len(self.keys) - len(known) <= WAITED_FOR:
                fill()
            else:
                threading.Thread(target=_logged, args=(fill,), daemon=True).start()

    def _fill(self, embed: Embed, known: dict[str, NDArray[np.float32]], missing: list[int]) -> None:
        """Compute the vectors of names that are `missing` from those `known`."""
        rows = {i: known[k] for i, k in enumerate(self.keys) if k in known}
        for begin in range(0, len(missing), WAITED_FOR):
            part = missing[begin : begin + WAITED_FOR]
            rows.update(zip(part, embed([self.keys[i] for i in part]), strict=True))
        self.vectors = np.stack([rows[i] for i in range(len(self.keys))])

    @classmethod
    def of(
        cls, graph: Askable, reader: Reader, embed: Embed | None = None, without: Collection[str] = (),
        before: Sequence["Entities"] = (),
    ) -> "Entities":  # fmt: skip
        """The things that `reader` may see the name of, but for those `without`. They are read PAGE by PAGE; a server
        may give fewer at once, so the end is where nothing comes, or the same again. What is no name of a thing is left
        out here: a FILTER or DISTINCT would take ten times as long over all that a page skips."""
        listed = " ".join(f"<{p}>" for p in NAMES)
        query = f"SELECT ?n ?e {{ VALUES ?p {{ {listed} }} ?e ?p ?n }}"
        found, asked = dict[tuple[str, str], None](), 0
        last: tuple[tuple[Term | None, ...], ...] = ()
        while len(found) < MOST:
            rows = graph.select(f"{query} LIMIT {PAGE} OFFSET {asked}", reader, PAGE).rows
            if not rows or rows == last:
                break
            found |= {(n.value, e.value): None for n, e in rows if n and e and n.kind == "literal" and e.kind == "uri"}
            asked, last = asked + len(rows), rows
        return cls([(n, e) for n, e in found if e not in without], embed, before)

    def link(self, question: str) -> list[Mention]:
        """What the question names, longest names first and no word used twice; near spellings where no name fits."""
        key = question, self.vectors is not None
        found = self._linked.get(key)
        if found is None:
            self._linked.put(key, found := tuple(self._link(question)))
        return list(found)

    def _link(self, question: str) -> list[Mention]:
        words = plain(question).split()[:READ]
        spans = [
            (i, i + n)
            for n in range(min(self.longest + 1, len(words)), 0, -1) for i in range(len(words) - n + 1)
        ]  # fmt: skip
        taken: set[int] = set()
        out: list[Mention] = []
        for start, end in spans:
            key = " ".join(words[start:end])
            if key in self.iris and not taken & set(range(start, end)):
                taken |= set(range(start, end))
                out.append(Mention(start, end, key, self.iris[key], 1.0, "name"))
        spans = [(start, end) for start, end in spans if end <= GUESSED]
        near = self._spelled(words, spans, out)
        if near and (not out or any(near.holds(m) for m in out)):
            out = [near, *(m for m in out if not near.holds(m))]
        return out or [m for m in [self._meant(words, spans)] if m]

    def _spelled(self, words: list[str], spans: list[tuple[int, int]], said: list[Mention]) -> Mention | None:
        """The name that words of the question are nearest to, and nearer than to the names that stand there, `said`."""
        best: Mention | None = None
        for start, end in spans:
            text, here = " ".join(words[start:end]), Mention(start, end, "", (), 0, "")
            inside = [m for m in said if here.holds(m)]
            if len(text) < 4 or text in self.iris:  # of three letters, one that differs is another word
                continue
            if any(m.start < end and start < m.end for m in said if m not in inside):
                continue
            floor = max([NEAR, *(ratio(text, m.name) + 1e-6 for m in inside)])
            shared = Counter(n for piece in _pieces(text) for n in self._pieces.get(piece, ()))
            for number, _ in shared.most_common(TRIED):
                score = ratio(text, self.keys[number], score_cutoff=floor) / 100
                if score > (best.score if best else 0):
                    key = self.keys[number]
                    best = Mention(start, end, key, self.iris[key], score, "spelling")
        return best

    def _meant(self, words: list[str], spans: list[tuple[int, int]]) -> Mention | None:
        vectors = self.vectors
        if self.embed is None or vectors is None or not spans:
            return None
        alike = self.embed([" ".join(words[a:b]) for a, b in spans]) @ vectors.T  # (spans, names)
        place, number = np.unravel_index(int(alike.argmax()), alike.shape)
        score, key = float(alike[place, number]), self.keys[int(number)]
        return Mention(*spans[int(place)], key, self.iris[key], score, "meaning") if score >= ALIKE else None


def _known(keys: Sequence[str], before: Sequence[Entities]) -> dict[str, NDArray[np.float32]]:
    """The vectors of `keys` that are computed already."""
    wanted = set(keys)
    out: dict[str, NDArray[np.float32]] = {}
    for entities in before:
        if (vectors := entities.vectors) is not None:
            out.update((k, v) for k, v in zip(entities.keys, vectors, strict=True) if k in wanted)
    return out


def _logged(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        log.exception("names of a graph are not found by meaning: their vectors could not be computed")


def _pieces(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}
