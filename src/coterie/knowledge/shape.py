"""What a graph is made of: types of things, their properties, and how types are linked, as one reader sees them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from coterie.knowledge.entities import NAMES
from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph import Askable
from coterie.knowledge.sparql import Term

HOPS = 2  # relations between two types, at most
PARTS = 2000  # pairs of a type and a relation
XSD = "http://www.w3.org/2001/XMLSchema#"
TYPE = "http://www.w3.org/1999/02/22-rdf-syntax-ns#type"


@dataclass(frozen=True)
class Shape:
    """What a graph is made of, as a reader sees it: IRIs of types, relations, and which goes with which."""

    words: dict[str, str]  # what types and relations are called
    properties: dict[str, set[str]]  # of a type: relations to values
    numbers: set[tuple[str, str]]  # type and property with values that are numbers
    links: frozenset[tuple[str, str, str]]  # type, relation, type

    def paths(self, start: str, end: str) -> list[tuple[str, ...]]:
        """The shortest ways between two types, over relations followed either way ("^" before one backwards)."""
        at: list[tuple[str, tuple[str, ...]]] = [(start, ())]
        for _ in range(HOPS):
            at = [(there, (*way, step)) for here, way in at for step, there in self._steps(here)]
            if found := [way for here, way in at if here == end]:
                return sorted(set(found))
        return []

    def _steps(self, here: str) -> Iterator[tuple[str, str]]:
        for a, relation, b in sorted(self.links):
            if a == here:
                yield relation, b
            if b == here:
                yield f"^{relation}", a


def number(value: str) -> str:
    """A variable's value as a number, in SPARQL: what comes from CSV is text."""
    return f"COALESCE(<{XSD}decimal>(STR({value})), <{XSD}double>(STR({value})))"


def shape_of(graph: Askable, reader: Reader, names: Callable[[Iterable[Term]], dict[str, str]]) -> Shape:
    """The shape of what `reader` may see. Raises SourceError where the graph is too large to be looked over in time."""
    hidden = ", ".join(f"<{n}>" for n in (*NAMES, TYPE))
    every = f"?x a ?t ; ?p ?v FILTER(?p NOT IN ({hidden}))"
    having = graph.select(f"SELECT DISTINCT ?t ?p {{ {every} FILTER(ISLITERAL(?v)) }}", reader, PARTS).rows
    other = f"FILTER(!COALESCE(ISNUMERIC({number('?v')}), false))"
    texts = graph.select(f"SELECT DISTINCT ?t ?p {{ {every} FILTER(ISLITERAL(?v)) {other} }}", reader, PARTS).rows
    linked = graph.select(f"SELECT DISTINCT ?t ?p ?u {{ {every} ?v a ?u }}", reader, PARTS).rows
    types = [t for (t,) in graph.select("SELECT DISTINCT ?t { ?x a ?t }", reader, PARTS).rows if t]
    properties: dict[str, set[str]] = {t.value: set() for t in types}
    for t, p in having:
        if t and p:
            properties[t.value].add(p.value)
    links = {(t.value, p.value, u.value) for t, p, u in linked if t and p and u}
    words = names([*types, *(p for _, p in having if p), *(p for _, p, _ in linked if p)])
    numbers = {(t.value, p.value) for t, p in set(having) - set(texts) if t and p}
    return Shape(words, properties, numbers, frozenset(links))
