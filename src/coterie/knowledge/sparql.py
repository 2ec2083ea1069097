"""SPARQL that may be run: one SELECT or ASK that stays inside the data set it is given; and what it answers."""

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyparsing import ParseBaseException
from rdflib.plugins.sparql.parser import parseQuery
from rdflib.plugins.sparql.parserutils import CompValue

from coterie.errors import QueryRefused, SourceError

LONGEST = 20_000  # characters of a query
MOST = 1000  # terms of a query: the parser takes some 2 ms for each, and parses one query at a time
DEEPEST = 40  # braces and brackets inside one another: the parser descends
FORMS = {"SelectQuery", "AskQuery"}
_PARSING = threading.Lock()
_TERM = re.compile(r"""<[^<>\s]*>|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s,;.{}()\[\]]+""")
# A second look at the bare text, for where two parsers might read it differently (comments, escapes).
CALLS_OUT = re.compile(r"\bservice\s*(silent\s*)?[<?$]|\bservice\s+(silent\s+)?[\w-]*:|\\u", re.IGNORECASE)


@dataclass(frozen=True)
class Term:
    """An IRI ("uri"), a literal or a blank node ("bnode"); `datatype` is an IRI, "" for plain text."""

    kind: str
    value: str
    datatype: str = ""
    language: str = ""

    @property
    def plain(self) -> str | int | float | bool:
        """A literal as Python has it; the text of anything else."""
        name = self.datatype.rpartition("#")[2]
        try:
            if name in ("integer", "int", "long", "short", "nonNegativeInteger", "positiveInteger"):
                return int(self.value)
            if name in ("decimal", "double", "float"):
                return float(self.value)
        except ValueError:
            return self.value
        return self.value == "true" if name == "boolean" else self.value

    def sparql(self) -> str:
        """As it stands in a query. Raises QueryRefused for a blank node, which has no name outside its answer."""
        if self.kind == "uri":
            return iri(self.value)
        if self.kind == "bnode":
            raise QueryRefused("a blank node cannot be named in a query")
        text = '"' + "".join(ESCAPES.get(c, c) for c in self.value) + '"'
        return text + (f"@{self.language}" if self.language else f"^^{iri(self.datatype)}" if self.datatype else "")


ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def iri(value: str) -> str:
    """<value>. Raises QueryRefused where it could end the brackets early."""
    if re.search(r'[\x00-\x20<>"{}|^`\\]', value) or not value:
        raise QueryRefused(f"{value[:80]!r} is not an IRI")
    return f"<{value}>"


@dataclass(frozen=True)
class Rows:
    """What a SELECT answered; None where a variable has no value. ASK gives one row of one literal, true or false.

    `cut`: there was more than the limit let through.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[Term | None, ...], ...]
    cut: bool = False

    def column(self, name: str) -> list[Term]:
        """The values of one variable, without the missing."""
        if name not in self.names:  # nothing was asked, as the reader may see nothing
            return []
        place = self.names.index(name)
        return [row[place] for row in self.rows if row[place] is not None]  # type: ignore[misc]


def check(query: str) -> str:
    """`query`, when it may be run. Raises QueryRefused, saying why.

    Refused are every form but SELECT and ASK (so all updates), SERVICE (it would send data to another server), and
    FROM (the data set is decided by who asks).
    """
    if len(query) > LONGEST:
        raise QueryRefused(f"a SPARQL query of {len(query)} characters; the most is {LONGEST}")
    if sum(1 for _ in _TERM.finditer(query)) > MOST:
        raise QueryRefused(f"a SPARQL query of more than {MOST} terms")
    depth = 0
    for c in query:
        depth += (c in "{([") - (c in "})]")
        if depth > DEEPEST:
            raise QueryRefused(f"the SPARQL nests more than {DEEPEST} deep")
    try:
        tree = _parse(query)
    except (ParseBaseException, RecursionError, ValueError, TypeError, AttributeError) as error:
        raise QueryRefused(f"this is no SPARQL query that can be run: {str(error)[:200]}") from error
    for node in _walk(tree):
        if node.name == "ServiceGraphPattern":
            raise QueryRefused("SERVICE is not allowed: a query stays inside this graph")
        if node.name == "DatasetClause":
            raise QueryRefused("FROM is not allowed: which graphs are read depends on who asks")
    if (form := tree[1].name) not in FORMS:
        raise QueryRefused(f"only SELECT and ASK may be run, not {form.removesuffix('Query').upper()}")
    if CALLS_OUT.search(query):
        raise QueryRefused(
            "SERVICE and escapes like \\u0041 are not allowed in SPARQL here; write the letters themselves"
        )
    return query


def _parse(query: str) -> Any:
    """One at a time: pyparsing finds out at the first call how many arguments each of rdflib's actions takes, and where
    two threads find out together, the parser refuses every query from then on."""
    with _PARSING:
        return parseQuery(query)


def _walk(node: Any) -> Iterator[CompValue]:
    """All parts of a parse, each before what it holds."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, CompValue):
            yield node
            stack += node.values()
        elif isinstance(node, list | tuple) or type(node).__name__ == "ParseResults":
            stack += list(node)


def limited(query: str, rows: int) -> str:
    """A checked SELECT, with a LIMIT of `rows` where it sets none."""
    body = _parse(query)[1]
    if body.name != "SelectQuery" or "limitoffset" in body or "valuesClause" in body:
        return query
    return f"{query}\nLIMIT {rows}"


def read_answer(answer: Mapping[str, Any], limit: int) -> Rows:
    """From SPARQL 1.1 Query Results JSON. Raises SourceError where it is not that."""
    try:
        if "boolean" in answer:
            value = "true" if answer["boolean"] else "false"
            return Rows(("answer",), ((Term("literal", value, "http://www.w3.org/2001/XMLSchema#boolean"),),))
        names, found = tuple(answer["head"]["vars"]), answer["results"]["bindings"]
        rows = tuple(tuple(_term(row[n]) if n in row else None for n in names) for row in found[:limit])
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"not SPARQL results in JSON ({type(error).__name__}: {error})") from error
    return Rows(names, rows, len(found) > limit or bool(answer.get("cut")))


def _term(value: Mapping[str, str]) -> Term:
    kind = "literal" if value["type"] == "typed-literal" else value["type"]
    return Term(kind, str(value["value"]), value.get("datatype", ""), value.get("xml:lang", ""))
