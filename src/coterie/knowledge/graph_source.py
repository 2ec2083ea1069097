"""A question answered from a graph: what it names, the path of relations it asks for, SPARQL, and the triples found."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from coterie.errors import QueryRefused, SourceError
from coterie.knowledge.entities import NAMES, Embed, Entities, Mention
from coterie.knowledge.evidence import Evidence, Reader
from coterie.knowledge.graph import Askable, source_of
from coterie.knowledge.paths import COUNT, Finder, RelationPath, mask, split_words
from coterie.knowledge.shape import TYPE, Shape, shape_of
from coterie.knowledge.sparql import Term, iri
from coterie.knowledge.totals import TIED, Reading, asks, read
from coterie.recent import Recent

STARTS = 8  # things that a question may name, tried one by one
RELATIONS = 500  # of one step
FRONTIER = 200  # things at the end of a path whose relations are looked at
NAMED = 100  # things whose names are asked for at once
SHOWN = 20  # pieces of evidence
SURE = 0.8  # probability at which no further path is shown
UNSURE = 0.2  # and below which what is known of the thing itself is shown instead
KIND = 0.3  # what a type of things counts beside a thing itself
AROUND = 12  # triples of that
FAILED_S = 600.0  # after which a graph that was too large to be looked over in time is looked over again
CLASSES = 8  # groups of readers who see the same, for whom the names are held


@dataclass(frozen=True)
class Fact:
    """One triple and the source it is from ("" where an endpoint does not say)."""

    subject: Term
    relation: str  # an IRI
    object: Term
    source: str = ""


@dataclass(frozen=True)
class GraphAnswer:
    """What one path from one thing leads to. `sparql` is what was run; each chain of facts ends at one value."""

    mention: Mention
    start: str  # an IRI
    path: RelationPath
    sparql: str
    values: tuple[Term, ...]  # without repeats; of a count, the number
    chains: tuple[tuple[Fact, ...], ...]
    probability: float  # of the path among those that the graph has, times the mention's score


def step(relation: str, start: str, end: str) -> str:
    """The pattern of one relation, of which "^" begins one that is followed backwards."""
    return f"{end} {iri(relation[1:])} {start}" if relation.startswith("^") else f"{start} {iri(relation)} {end}"


def chain(start: str, relations: Iterable[str], graphs: bool = False) -> str:
    """Patterns from a thing over `relations` to ?x1, ?x2, ...; with `graphs`, each in the graph ?g1, ?g2, ..."""
    at, out = iri(start), []
    for n, relation in enumerate(relations, 1):
        pattern = step(relation, at, f"?x{n}")
        out.append(f"GRAPH ?g{n} {{ {pattern} }}" if graphs else f"{pattern} .")
        at = f"?x{n}"
    return " ".join(out)


def ends(start: str, relations: Sequence[str]) -> str:
    """A pattern that binds ?x to things at the end of a path: FRONTIER of them at most, at each step, so that a path
    through a hub ("tracks of the same genre") costs no more than another."""
    inner, at = "", iri(start)
    for n, relation in enumerate(relations, 1):
        inner = f"{{ SELECT DISTINCT ?x{n} {{ {inner} {step(relation, at, f'?x{n}')} }} LIMIT {FRONTIER} }}"
        at = f"?x{n}"
    return f"{inner} BIND({at} AS ?x)"


@dataclass(frozen=True)
class Known:
    """What is held of a graph for all who see the same of it: its names, the words of its relations, its types."""

    entities: Entities
    labels: dict[str, str]
    kinds: set[str]


@dataclass(frozen=True)
class Total:
    """What a question over all things of a kind led to. `values`: one number, or the things that share the first
    place, with the `numbers` they are ranked by."""

    reading: Reading
    values: tuple[Term, ...]
    numbers: tuple[Term, ...]


class GraphSource:
    """A graph that questions are put to. `finder` None: relations are found by their own words."""

    def __init__(
        self, name: str, graph: Askable, finder: Finder | None = None, embed: Embed | None = None, named: bool = True
    ) -> None:  # fmt: skip
        self.name, self.graph, self.finder, self.embed, self.named = name, graph, finder, embed, named
        self._kept = Recent[frozenset[str], Known](CLASSES, graph.fresh_s)  # by what a reader sees, whoever it is
        self._shapes = Recent[frozenset[str], Shape](CLASSES, graph.fresh_s)
        self._failed = Recent[frozenset[str], SourceError](CLASSES, FAILED_S)  # why there is no shape

    def search(self, question: str, reader: Reader) -> list[Evidence]:
        """Evidence for `question` among what `reader` may see, best first; none where it names nothing here."""
        if total := self.total(question, reader):
            return self._say_total(total, reader)
        out: list[Evidence] = []
        answers, sure = self.answers(question, reader), 0.0
        for answer in answers:
            out += self._evidence(answer, reader)
            sure += answer.probability
            if sure >= SURE or len(out) >= SHOWN:
                break
        if (not answers or answers[0].probability < UNSURE) and (known := self._entities(reader).link(question)):
            facts = self.around(known[0].iris[0], reader, AROUND)
            names = self.names([t for f in facts for t in (f.subject, f.object)], reader)
            out += [self._say((f,), names, UNSURE * known[0].score, "", known[0].iris[0]) for f in facts]
        return out[:SHOWN]

    def answers(self, question: str, reader: Reader, most: int = 3) -> list[GraphAnswer]:
        """The likeliest readings of the question that lead to something, best first."""
        entities, finder = self._entities(reader), self._finder(reader)
        kinds = self._known(reader).kinds
        tried: list[tuple[float, Mention, str, RelationPath]] = []
        for mention in entities.link(question)[:STARTS]:
            words = mask(question, mention.start, mention.end)
            for start in mention.iris[:STARTS]:
                paths = finder.find(words, lambda taken, start=start: self._follow(start, taken, reader))  # type: ignore[misc]
                worth = mention.score * (KIND if start in kinds else 1)
                tried += [(math.exp(p.score) * worth, mention, start, p) for p in paths]
        tried.sort(key=lambda t: -t[0])
        found, failed = list[GraphAnswer](), list[SourceError]()
        for reading in tried[:most]:
            try:
                found.append(self._run(*reading, reader))
            except SourceError as error:  # one that asks for too much; the next may not
                failed.append(error)
        if failed and not found:
            raise failed[0]
        return [a for a in found if a.values]

    def total(self, question: str, reader: Reader) -> Total | None:
        """What a question over all things of a kind asks for, where it is one; see totals.py. Nothing is guessed."""
        if not asks(question):
            return None
        kinds = self._known(reader).kinds
        mentions = [m for m in self._entities(reader).link(question) if not kinds & set(m.iris)]
        try:
            shape = self._shape(reader)
            having, leading = partial(self._having, reader), partial(self._leading, reader)
            reading = read(question, shape, mentions, having, leading)
            if reading is None:
                return None
            rows = self.graph.select(reading.sparql, reader).rows
        except SourceError:  # too large to be looked over, or to be added up, in time
            return None
        if not reading.ranks:
            values = tuple(t for row in rows for t in row if t)
            return Total(reading, values, values) if values else None
        first = tuple((x, n) for x, n in rows if x and n and rows[0][1] and n.plain == rows[0][1].plain)
        if not first or len(first) > TIED:  # some of those that share the place would be a wrong answer
            return None
        return Total(reading, tuple(x for x, _ in first), tuple(n for _, n in first))

    def _having(self, reader: Reader, kind: str, texts: Sequence[str]) -> list[tuple[str, Term]]:
        """Properties of things of a kind, and their values, that are one of some texts but for case."""
        said = ", ".join(Term("literal", text).sparql() for text in texts)
        hidden = ", ".join(f"<{n}>" for n in NAMES)
        query = (
            f"SELECT DISTINCT ?p ?v {{ ?x a {iri(kind)} ; ?p ?v "
            f"FILTER(ISLITERAL(?v) && LCASE(STR(?v)) IN ({said})) FILTER(?p NOT IN ({hidden})) }}"
        )
        return [(p.value, v) for p, v in self.graph.select(query, reader).rows if p and v]

    def _leading(self, reader: Reader, kind: str, thing: str) -> list[str]:
        query = f"SELECT DISTINCT ?p {{ ?x a {iri(kind)} ; ?p {iri(thing)} }}"
        return [p.value for p in self.graph.select(query, reader).column("p")]

    def _say_total(self, total: Total, reader: Reader) -> list[Evidence]:
        names = self.names(total.values, reader)
        said, query = total.reading.said, total.reading.sparql
        if not total.reading.ranks:
            return [Evidence(self.name, said, f"{said}: {total.values[0].value}", 1.0, query)]
        return [
            Evidence(self.name, said, f"{said}: {names.get(v.value, v.value)} ({n.value})", 1.0, query, thing=_thing(v))
            for v, n in zip(total.values, total.numbers, strict=True)
        ]

    def around(self, thing: str, reader: Reader, most: int = 50) -> list[Fact]:
        """Triples that begin or end at a thing, its names left out."""
        hidden = ", ".join(f"<{p}>" for p in NAMES)
        where = f"{{ ?s ?p ?o FILTER(?s = {iri(thing)}) }} UNION {{ ?s ?p ?o FILTER(?o = {iri(thing)}) }}"
        where = f"GRAPH ?g {{ {where} }}" if self.named else where
        rows = self.graph.select(
            f"SELECT DISTINCT ?s ?p ?o {'?g' if self.named else ''} {{ {where} FILTER(?p NOT IN ({hidden})) }}",
            reader, most,
        ).rows  # fmt: skip
        return [
            Fact(s, p.value, o, source_of(g[0].value) if g and g[0] else "")
            for s, p, o, *g in rows if s and p and o
        ]  # fmt: skip

    def names(self, terms: Iterable[Term], reader: Reader) -> dict[str, str]:
        """What things are called, by IRI; the last words of the IRI where it has no name."""
        wanted = sorted({t.value for t in terms if t.kind == "uri"})
        out = {w: split_words(w) for w in wanted}
        labels = " ".join(f"<{p}>" for p in NAMES[:2])
        for begin in range(0, len(wanted), NAMED):
            part = wanted[begin : begin + NAMED]
            places = " ".join(iri(w) for w in part)
            query = f"SELECT ?e ?n {{ VALUES ?e {{ {places} }} VALUES ?p {{ {labels} }} ?e ?p ?n }} ORDER BY ?e ?n"
            for e, n in self.graph.select(query, reader, 4 * len(part)).rows:
                if e and n:
                    out[e.value] = n.value
        return out

    def _entities(self, reader: Reader) -> Entities:
        return self._known(reader).entities

    def labels(self, reader: Reader) -> dict[str, str]:
        """The words of each relation that `reader` may see."""
        return self._known(reader).labels

    def _finder(self, reader: Reader) -> Finder:
        learned = self.finder
        return Finder(self.labels(reader), *((learned.choices, learned.weight) if learned else ()))

    def _known(self, reader: Reader) -> Known:
        seen = self.graph.seen(reader)
        known = self._kept.get(seen)
        if known is None:
            self._kept.put(seen, known := self._read_known(reader))
        return known

    def _shape(self, reader: Reader) -> Shape:
        seen = self.graph.seen(reader)
        if failed := self._failed.get(seen):
            raise failed
        shape = self._shapes.get(seen)
        if shape is None:
            try:
                self._shapes.put(seen, shape := shape_of(self.graph, reader, lambda t: self.names(t, reader)))
            except SourceError as error:
                self._failed.put(seen, error)
                raise
        return shape

    def _read_known(self, reader: Reader) -> Known:
        """The names in a graph, and the words of its relations; followed backwards, those of what they lead to."""
        rows = self.graph.select("SELECT DISTINCT ?r { ?s ?r ?o }", reader, RELATIONS).column("r")
        words = self.names(rows, reader)
        query = "SELECT DISTINCT ?r ?t { ?s ?r ?o . ?s a ?t FILTER(ISIRI(?o)) }"
        kinds = [(r, t) for r, t in self.graph.select(query, reader, RELATIONS).rows if r and t]
        called = self.names([t for _, t in kinds], reader)
        for r, t in kinds:
            words[f"^{r.value}"] = f"{words.get(f'^{r.value}', '')} {called[t.value]}".strip()
        words[f"^{TYPE}"] = ""
        types = {t.value for _, t in kinds}
        relations = {r.value for r in rows} - types
        before = [known.entities for known in self._kept.values()]
        return Known(Entities.of(self.graph, reader, self.embed, relations, before), words, types)

    def _follow(self, start: str, taken: tuple[str, ...], reader: Reader) -> set[str]:
        """Relations that lead on from the ends of a path, forwards and backwards."""
        before = ends(start, taken)
        query = (
            f"SELECT DISTINCT ?r ?back {{ {{ {before} ?x ?r ?y BIND(false AS ?back) }} UNION "
            f"{{ {before} ?y ?r ?x BIND(true AS ?back) }} }}"
        )
        hidden = {*NAMES, TYPE}
        out = set()
        for r, back in self.graph.select(query, reader, RELATIONS).rows:
            if r is None or back is None:
                continue
            if back.plain and (r.value not in NAMES) and (r.value != TYPE or not taken):
                out.add(f"^{r.value}")
            elif not back.plain and r.value not in hidden:
                out.add(r.value)
        if taken:  # straight back leads to what was there already, most of the time
            last = taken[-1]
            out.discard(last[1:] if last.startswith("^") else f"^{last}")
        return out

    def _run(self, probability: float, mention: Mention, start: str, path: RelationPath, reader: Reader) -> GraphAnswer:
        n = len(path.relations)
        if path.end == COUNT:
            sparql = f"SELECT (COUNT(DISTINCT ?x{n}) AS ?count) WHERE {{ {chain(start, path.relations)} }}"
            values = tuple(self.graph.select(sparql, reader).column("count"))
            return GraphAnswer(mention, start, path, sparql, values, (), probability)
        graphs = " ".join(f"?g{i + 1}" for i in range(n)) if self.named else ""
        things = " ".join(f"?x{i + 1}" for i in range(n))
        sparql = f"SELECT DISTINCT {things} {graphs} WHERE {{ {chain(start, path.relations, self.named)} }}"
        chains, values_ = [], dict[Term, None]()
        for row in self.graph.select(sparql, reader).rows:
            nodes = [Term("uri", start), *(t for t in row[:n] if t)]
            sources = [source_of(g.value) if g else "" for g in row[n:]] or [""] * n
            facts = []
            for i, relation in enumerate(path.relations):
                a, b = (nodes[i], nodes[i + 1]) if not relation.startswith("^") else (nodes[i + 1], nodes[i])
                facts.append(Fact(a, relation.removeprefix("^"), b, sources[i]))
            chains.append(tuple(facts))
            values_[nodes[-1]] = None
        return GraphAnswer(mention, start, path, sparql, tuple(values_), tuple(chains), probability)

    def _evidence(self, answer: GraphAnswer, reader: Reader) -> list[Evidence]:
        if answer.path.end == COUNT:
            names = self.names([Term("uri", answer.start)], reader)
            words = self._finder(reader).labels
            said = ", ".join(words.get(r, split_words(r)) or "of this kind" for r in answer.path.relations)
            text = f"{names[answer.start]}: {answer.values[0].value} ({said})"
            place = f"<{answer.start}>"
            return [Evidence(self.name, place, text, answer.probability, answer.sparql, thing=answer.start)]
        names = self.names([t for c in answer.chains[:SHOWN] for f in c for t in (f.subject, f.object)], reader)
        return [self._say(c, names, answer.probability, answer.sparql, answer.start) for c in answer.chains[:SHOWN]]

    def _say(
        self, facts: tuple[Fact, ...], names: dict[str, str], score: float, sparql: str, thing: str
    ) -> Evidence:  # fmt: skip
        def name(term: Term) -> str:
            return names.get(term.value, term.value) if term.kind == "uri" else term.value

        text = "; ".join(f"{name(f.subject)}, {split_words(f.relation)}: {name(f.object)}" for f in facts)
        where = "; ".join(f"{f.source}: {_short(f)}".removeprefix(": ") for f in facts)
        return Evidence(self.name, where, text, score, sparql, thing=thing)


def _thing(term: Term) -> str:
    return term.value if term.kind == "uri" else ""


def _short(fact: Fact) -> str:
    """The triple as N-Triples writes it."""
    ends = []
    for term in (fact.subject, fact.object):
        try:
            ends.append(term.sparql())
        except QueryRefused:
            ends.append(f"_:{term.value}")
    return f"{ends[0]} <{fact.relation}> {ends[1]}"
