"""What a citation of a row or a triple opens: found again, under the permissions of whoever opens it.

Notable: a row has no address of its own, so its citation is the statement that found it and its place in the answer.
The statement comes from outside, like any that a model writes: the guard lets through what this reader may read.
"""

import re

from coterie.knowledge.database import Database
from coterie.knowledge.evidence import Evidence, Reader
from coterie.knowledge.graph import source_of
from coterie.knowledge.graph_source import Fact, GraphSource
from coterie.knowledge.paths import split_words
from coterie.knowledge.sparql import ESCAPES, Term

ROW = re.compile(r"row (\d+) of ")
_END = r'<[^<>\s]*>|"(?:[^"\\]|\\.)*"(?:@[\w-]+|\^\^<[^<>\s]*>)?'
TRIPLE = re.compile(rf"(?P<s>{_END}) <(?P<p>[^<>\s]*)> (?P<o>{_END})")  # as graph_source.py writes them
NAMELESS = re.compile(r"(?:^|; |: )_:|> _:")  # a blank node has no name by which it is found again
SHOWN = 20  # rows of a query that counts or ranks
PLAIN = {escaped: c for c, escaped in ESCAPES.items()}


def open_row(name: str, db: Database, where: str, query: str, reader: Reader) -> Evidence | None:
    """The row at its place in what `query` answers now; None where there is none. Raises QueryRefused, SourceError."""
    if not query:
        return None
    answer, place = db.run(query, reader), ROW.match(where)
    if place is None:
        return None if answer.rows else Evidence(name, where, "no rows", 0.0, query)
    number = int(place[1])
    if not 1 <= number <= len(answer.rows):
        return None
    return Evidence(name, where, answer.line(answer.rows[number - 1]), 0.0, query)


def open_triples(source: GraphSource, where: str, query: str, reader: Reader) -> Evidence | None:
    """The triples that `where` names, where the reader may see all of them; what `query` answers, where it names none,
    as of a count. Raises QueryRefused, SourceError."""
    named = [] if NAMELESS.search(where) else list(TRIPLE.finditer(where))
    if not named:
        return _open_answer(source, where, query, reader) if query else None
    facts = [_found(source, _term(t["s"]), t["p"], _term(t["o"]), reader) for t in named]
    if not all(facts):
        return None
    seen = [fact for fact in facts if fact]
    names = source.names([end for f in seen for end in (f.subject, f.object)], reader)
    text = "; ".join(f"{_name(f.subject, names)}, {split_words(f.relation)}: {_name(f.object, names)}" for f in seen)
    return Evidence(source.name, where, text, 0.0, thing=seen[0].subject.value)


def _open_answer(source: GraphSource, where: str, query: str, reader: Reader) -> Evidence | None:
    answer = source.graph.select(query, reader)
    if not answer.rows:
        return None
    shown = answer.rows[:SHOWN]
    names = source.names([term for row in shown for term in row if term], reader)
    lines = [", ".join(_name(term, names) if term else "" for term in row) for row in shown]
    return Evidence(source.name, where, "\n".join(lines), 0.0, query)


def _found(source: GraphSource, subject: Term, relation: str, end: Term, reader: Reader) -> Fact | None:
    pattern = f"{subject.sparql()} {Term('uri', relation).sparql()} {end.sparql()}"
    if not source.named:
        yes = source.graph.select(f"ASK {{ {pattern} }}", reader).rows[0][0]
        return Fact(subject, relation, end) if yes and yes.plain is True else None
    graphs = source.graph.select(f"SELECT ?g {{ GRAPH ?g {{ {pattern} }} }}", reader, 1).column("g")
    return Fact(subject, relation, end, source_of(graphs[0].value)) if graphs else None


def _term(written: str) -> Term:
    """A term as N-Triples writes it."""
    if written.startswith("<"):
        return Term("uri", written[1:-1])
    text, _, rest = written[1:].rpartition('"')
    plain = re.sub(r"\\.", lambda m: PLAIN.get(m[0], m[0]), text)
    kind = rest[3:-1] if rest.startswith("^^") else ""
    return Term("literal", plain, kind, rest[1:] if rest.startswith("@") else "")


def _name(term: Term, names: dict[str, str]) -> str:
    return names.get(term.value, term.value) if term.kind == "uri" else term.value
