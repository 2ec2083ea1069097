"""RDF files as triples, and whether they fit a business's shapes (SHACL)."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyoxigraph as ox

from coterie.errors import CoterieError, SourceError, first_line

FORMATS = {".ttl": ox.RdfFormat.TURTLE, ".nt": ox.RdfFormat.N_TRIPLES, ".jsonld": ox.RdfFormat.JSON_LD}
STRING = ox.NamedNode("http://www.w3.org/2001/XMLSchema#string")
SHOWN = 5  # violations named in one error


def read_rdf(file: Path, base: str = "urn:coterie:thing:") -> Iterator[ox.Quad]:
    """The triples of a Turtle, N-Triples or JSON-LD file, one at a time; its graph names are left out.

    Blank nodes are named anew. Raises SourceError, naming file and line, at the first that cannot be read; no context
    of a JSON-LD file is fetched.
    """
    form = FORMATS.get(file.suffix.lower())
    if form is None:
        raise SourceError(f"{file}: the graph reads {', '.join(FORMATS)}; not {file.suffix or 'a file without ending'}")
    try:
        yield from ox.parse(path=str(file), format=form, base_iri=base, rename_blank_nodes=True)
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        mend = "; put the context into the file" if "LoadDocument" in str(error.msg) else ""
        raise SourceError(f"{file}{line}: not valid {form.name}: {error.msg}{mend}") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: cannot be read ({error})") from error


def check_shapes(triples: Iterable[ox.Triple | ox.Quad], shapes: Path) -> None:
    """Raises SourceError, naming the first violations, where `triples` do not fit the SHACL shapes in a file. pyshacl
    holds a file's triples in memory, here once and no second time."""
    try:
        import rdflib
        from pyshacl import validate
    except ImportError as error:
        raise CoterieError("shapes need pyshacl: pip install 'coterie[shacl]'") from error
    kinds = {".ttl": "turtle", ".nt": "nt", ".jsonld": "json-ld"}
    data, wanted = rdflib.Graph(), rdflib.Graph()

    def term(of: Any) -> rdflib.term.Node:
        if isinstance(of, ox.Literal):
            kind = None if of.language or of.datatype == STRING else rdflib.URIRef(of.datatype.value)
            return rdflib.Literal(of.value, lang=of.language, datatype=kind)
        if isinstance(of, ox.Triple):
            raise SourceError(f"{shapes.name}: a triple that speaks of a triple cannot be held against shapes")
        return rdflib.BNode(of.value) if isinstance(of, ox.BlankNode) else rdflib.URIRef(of.value)

    for t in triples:
        data.add((term(t.subject), term(t.predicate), term(t.object)))
    try:
        wanted.parse(str(shapes), format=kinds[shapes.suffix.lower()])
    except Exception as error:  # rdflib has no error of its own for a file it cannot parse
        raise SourceError(f"{shapes}: the shapes cannot be read ({str(error)[:200]})") from error
    try:
        fits, report, _ = validate(data, shacl_graph=wanted, advanced=False, meta_shacl=False)
    except Exception as error:  # pyshacl has many errors for shapes that are none, and lets those of `re` through
        raise SourceError(f"{shapes}: the shapes cannot be used ({first_line(error)})") from error
    if fits:
        return
    shacl = rdflib.Namespace("http://www.w3.org/ns/shacl#")
    said = []
    for result in sorted(report.subjects(rdflib.RDF.type, shacl.ValidationResult)):
        node, path, message = (
            report.value(result, p) for p in (shacl.focusNode, shacl.resultPath, shacl.resultMessage)
        )
        said.append(f"{node} {path or ''}: {message}")
    rest = f"; {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    raise SourceError(f"{shapes.name}: {'; '.join(sorted(said)[:SHOWN])}{rest}")
