"""The knowledge graph: what is put in is asked by those who may, and gone with its source."""

import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pyoxigraph as ox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from coterie.errors import CoterieError, QueryRefused, SourceError
from coterie.knowledge.endpoint import Endpoint
from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph import Graph, source_of
from coterie.knowledge.mapping import csv_rows, map_rows, table_rows
from coterie.knowledge.rdf import check_shapes, read_rdf
from coterie.knowledge.sparql import Term, check, iri
from coterie.knowledge.specs import MappingSpec

ALL = "SELECT ?s ?p ?o { ?s ?p ?o }"
ANYONE, HR = Reader(), Reader("ada", frozenset({"hr"}))


def triple(s: str, p: str, o: str) -> ox.Triple:
    return ox.Triple(ox.NamedNode(f"urn:{s}"), ox.NamedNode(f"urn:{p}"), ox.NamedNode(f"urn:{o}"))


@pytest.fixture(scope="module")
def staff(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    """`team` for everyone, `salaries` for hr."""
    graph = Graph(tmp_path_factory.mktemp("staff"))
    with graph.writing() as writer:
        writer.put("team", [triple("ada", "manages", "bob"), triple("bob", "manages", "cyd")], ["*"], "1")
        writer.put("salaries", [triple("ada", "earns", "90"), triple("bob", "manages", "dee")], ["hr"], "1")
    yield graph
    graph.close()


# Ways to reach a graph that is not one's own; each must find what a plain query finds of it: nothing.
REACHES = [
    "SELECT ?o { <urn:ada> <urn:earns> ?o }",
    "SELECT ?o { GRAPH ?g { <urn:ada> <urn:earns> ?o } }",
    "SELECT ?o { GRAPH <%(salaries)s> { ?s <urn:earns> ?o } }",
    "SELECT ?o { { SELECT * { GRAPH <%(salaries)s> { ?s ?p ?o } } } }",
    "SELECT ?o { OPTIONAL { GRAPH <%(salaries)s> { ?s ?p ?o } } FILTER(BOUND(?o)) }",
    "SELECT ?o { VALUES ?g { <%(salaries)s> } GRAPH ?g { ?s ?p ?o } }",
    "SELECT ?o { ?s (<urn:earns>|!<urn:manages>) ?o }",
    "SELECT ?o { <urn:bob> <urn:manages> ?o FILTER EXISTS { GRAPH <%(salaries)s> { ?x ?y ?o } } }",
    "SELECT ?o { GRAPH <urn:coterie:register> { ?s ?p ?o } }",
    "SELECT ?o { ?s <urn:coterie:reader> ?o }",
]


@pytest.mark.parametrize("query", REACHES)
def test_a_reader_never_reaches_a_graph_that_is_not_theirs(staff: Graph, query: str) -> None:
    salaries = next(s.graph for s in staff.sources() if s.name == "salaries")
    assert staff.select(query.replace("%(salaries)s", salaries), ANYONE).rows == ()


def test_the_data_set_is_what_the_reader_may_see(staff: Graph) -> None:
    assert len(staff.select(ALL, ANYONE).rows) == 2
    assert len(staff.select(ALL, HR).rows) == 4
    assert staff.select("SELECT (COUNT(*) AS ?n) { ?s ?p ?o }", ANYONE).column("n")[0].plain == 2
    assert staff.select("ASK { <urn:ada> <urn:earns> ?x }", ANYONE).rows[0][0] == Term(
        "literal", "false", "http://www.w3.org/2001/XMLSchema#boolean"
    )


def test_every_triple_names_its_source(staff: Graph) -> None:
    found = staff.select("SELECT ?g { GRAPH ?g { <urn:bob> <urn:manages> <urn:dee> } }", HR)
    assert source_of(found.column("g")[0].value) == "salaries"


REFUSED = {
    "update": "INSERT DATA { <urn:a> <urn:b> <urn:c> }",
    "delete": "DELETE WHERE { ?s ?p ?o }",
    "drop": "DROP ALL",
    "load": "LOAD <http://example.org/x>",
    "clear after a query": "SELECT * { ?s ?p ?o } ; CLEAR ALL",
    "service": "SELECT * { SERVICE <http://example.org/> { ?s ?p ?o } }",
    "service silent, deep": "SELECT * { ?s ?p ?o FILTER EXISTS { { SERVICE SILENT <http://x.org> { ?a ?b ?c } } } }",
    "service in a subquery": "SELECT * { { SELECT * { sErViCe ?x { ?s ?p ?o } } } }",
    "service by prefix": "PREFIX e: <http://example.org/> SELECT * { SERVICE e:x { ?s ?p ?o } }",
    "service behind an escape": "SELECT * { \\u0053ERVICE <http://example.org/> { ?s ?p ?o } }",
    "service behind a comment": "SELECT * { # }\n SERVICE<http://example.org/> { ?s ?p ?o } }",
    "from": "SELECT * FROM <urn:g> { ?s ?p ?o }",
    "from named": "SELECT * FROM NAMED <urn:g> { GRAPH ?g { ?s ?p ?o } }",
    "construct": "CONSTRUCT { ?s ?p ?o } WHERE { ?s ?p ?o }",
    "describe": "DESCRIBE <urn:a>",
    "no query": "please drop the tables",
    "empty": "",
    "unclosed": "SELECT * { ?s ?p ?o",
    "very deep": "SELECT * " + "{ " * 3000 + "} " * 3000,
    "many terms": "SELECT * { <urn:a> <urn:b> 1" + ",1" * 9000 + " }",
    "very long": "SELECT * { ?s ?p \"" + "x" * 30_000 + "\" }",
}  # fmt: skip


@pytest.mark.parametrize("query", REFUSED.values(), ids=REFUSED)
def test_what_reads_no_graph_of_ours_is_refused(staff: Graph, query: str) -> None:
    with pytest.raises(QueryRefused):
        staff.select(query, HR)


@pytest.mark.parametrize("query", [
    "SELECT ?s { ?s ?p \"the service is good\" } # SERVICE, in a comment",
    "PREFIX s: <urn:service/> SELECT ?s { ?s s:p ?o }",
    "SELECT (COUNT(?s) AS ?n) { ?s (<urn:a>/^<urn:b>)+ ?o } GROUP BY ?s HAVING(?n > 1) ORDER BY DESC(?n) LIMIT 3",
])  # fmt: skip
def test_a_plain_query_is_not_mistaken_for_one_that_calls_out(query: str) -> None:
    assert check(query) == query


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_value_ends_its_quotes(value: str) -> None:
    store, found = ox.Store(), Term("literal", value).sparql()
    rows = list(store.query(f"SELECT ?x {{ BIND({found} AS ?x) }}"))
    assert rows[0]["x"].value == value
    try:
        name = iri("urn:" + value)
    except QueryRefused:
        return
    assert rows is not None
    assert name.count(">") == 1


def test_a_source_goes_with_its_triples_and_a_change_takes_its_place(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    assert graph.select(ALL, HR).rows == ()
    with graph.writing() as writer:
        writer.put("a", [triple("x", "p", "y")], ["*"], "1")
        writer.put("b", [triple("x", "p", "y"), triple("x", "p", "z")], ["*"], "1")
    with graph.writing() as writer:
        writer.remove("b")
        writer.put("a", [triple("x", "p", "new")], ["*"], "2")
    assert [row[2].value for row in graph.select(ALL, ANYONE).rows if row[2]] == ["urn:new"]
    assert [s.name for s in graph.sources()] == ["a"]
    with graph.writing() as writer:  # same content, other readers
        writer.put("a", [], ["hr"], "2")
    assert graph.select(ALL, ANYONE).rows == ()
    assert len(graph.select(ALL, HR).rows) == 1
    graph.close()


def test_a_write_that_fails_or_is_killed_changes_nothing(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    with graph.writing() as writer:
        writer.put("a", [triple("x", "p", "old")], ["*"], "1")

    def broken() -> Iterator[ox.Triple]:
        yield triple("x", "p", "half")
        raise SourceError("the file breaks off")

    with pytest.raises(SourceError), graph.writing() as writer:
        writer.put("a", broken(), ["*"], "2")
    store = ox.Store(str(tmp_path / "store"))  # killed before it registered what it wrote
    stray = ox.NamedNode("urn:coterie:graph:a:stray")
    store.add(ox.Quad(ox.NamedNode("urn:x"), ox.NamedNode("urn:p"), ox.NamedNode("urn:stray"), stray))
    store.flush()
    del store
    assert [row[2].value for row in graph.select(ALL, ANYONE).rows if row[2]] == ["urn:old"]
    with graph.writing() as writer:
        assert [s.name for s in writer.sources()] == ["a"]
        assert stray not in list(writer.store.named_graphs())
    assert len(graph.select(ALL, ANYONE).rows) == 1
    graph.close()


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with Graph(tmp_path).writing(), pytest.raises(CoterieError, match="another process"):
        Graph(tmp_path).writing().__enter__()


def test_a_query_that_takes_too_long_is_stopped_and_the_next_answers(tmp_path: Path) -> None:
    graph = Graph(tmp_path, timeout_s=1.0)
    with graph.writing() as writer:
        writer.put("many", (triple(str(i), "p", str(i + 1)) for i in range(3000)), ["*"], "1")
    with pytest.raises(SourceError, match="did not answer in 1 s"):
        graph.select("SELECT (COUNT(*) AS ?n) { ?a ?p ?b . ?c ?q ?d . ?e ?r ?f FILTER(?a = ?f) }", ANYONE)
    graph.timeout_s = 30  # it is a new process that answers, which must start first
    assert len(graph.select(ALL, ANYONE, limit=10).rows) == 10
    assert graph.select(ALL, ANYONE, limit=10).cut
    graph.close()


def test_a_query_that_takes_too_much_memory_ends_and_the_next_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.knowledge.graph.MEMORY", 200 << 20)
    graph = Graph(tmp_path, timeout_s=60)
    with graph.writing() as writer:
        writer.put("many", (triple(str(i), "p", str(i + 1)) for i in range(100)), ["*"], "1")
    with pytest.raises(SourceError, match="ended, as over too much memory"):
        graph.select("SELECT * { ?a ?b ?c . ?d ?e ?f . ?g ?h ?i } ORDER BY ?i ?f LIMIT 5", ANYONE)
    assert len(graph.select(ALL, ANYONE, limit=10).rows) == 10
    graph.close()


READ = {
    "a.ttl": "@prefix e: <urn:> . e:x e:p e:y , [ e:q 1 ] .",
    "a.nt": "<urn:x> <urn:p> <urn:y> .\n_:b <urn:q> \"1\" .\n<urn:x> <urn:p> _:b .\n",
    "a.jsonld": json.dumps({"@id": "urn:x", "urn:p": [{"@id": "urn:y"}, {"urn:q": 1}]}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), READ.items())
def test_turtle_ntriples_and_jsonld_are_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    first, again = list(read_rdf(tmp_path / name)), list(read_rdf(tmp_path / name))
    assert len(first) == 3
    assert triple("x", "p", "y") in [q.triple for q in first]
    nodes = [{q.object for q in quads if isinstance(q.object, ox.BlankNode)} for quads in (first, again)]
    assert not nodes[0] & nodes[1]  # two files' blank nodes are never one


BROKEN = {
    "a.ttl": ("@prefix e: <urn:> .\ne:x e:p e:y .\ne:x e:p", "a.ttl:3: not valid"),
    "a.nt": ("<urn:x> <urn:p> .", "a.nt:1: not valid"),
    "a.jsonld": ('{"@context": "http://example.org/c", "@id": "urn:x"}', "put the context into the file"),
    "a.xml": ("<rdf/>", "the graph reads .ttl, .nt, .jsonld"),
    "b.ttl": ("\udcff\udcfe", "b.ttl"),
}


@pytest.mark.parametrize(("name", "content", "said"), [(n, c, s) for n, (c, s) in BROKEN.items()])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SourceError, match=said):
        list(read_rdf(tmp_path / name))
    with pytest.raises(SourceError, match="cannot be read"):
        list(read_rdf(tmp_path / "missing.ttl"))


def test_shapes_name_what_does_not_fit(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.ttl"
    shapes.write_text(
        "@prefix sh: <http://www.w3.org/ns/shacl#> . @prefix e: <urn:> .\n"
        "e:S a sh:NodeShape ; sh:targetSubjectsOf e:manages ; sh:property [ sh:path e:manages ; sh:maxCount 1 ] ."
    )
    fits: list[ox.Triple | ox.Quad] = [triple("ada", "manages", "bob")]
    check_shapes(fits, shapes)
    with pytest.raises(SourceError, match="urn:ada urn:manages"):
        check_shapes([*fits, triple("ada", "manages", "cyd")], shapes)
    check_shapes(iter(fits), shapes)  # one at a time
    shapes.write_text("no turtle")
    with pytest.raises(SourceError, match="shapes cannot be read"):
        check_shapes(fits, shapes)


@pytest.mark.parametrize("wrong", [
    'sh:path e:manages ; sh:pattern "("', "sh:maxCount 1", 'sh:path e:manages ; sh:minCount "many"',
])  # fmt: skip
def test_shapes_that_cannot_be_used_are_named(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "shapes.ttl").write_text(
        "@prefix sh: <http://www.w3.org/ns/shacl#> . @prefix e: <urn:> .\n"
        f"e:S a sh:NodeShape ; sh:targetSubjectsOf e:manages ; sh:property [ {wrong} ] ."
    )
    with pytest.raises(SourceError, match=r"shapes\.ttl: the shapes cannot be used"):
        check_shapes([triple("ada", "manages", "bob")], tmp_path / "shapes.ttl")


ALBUMS = MappingSpec(
    table="album", id="album/{id}", type="album", label="{title}", properties={"price": "price"},
    links={"artist": "artist/{artist}"},
)  # fmt: skip


def test_a_table_and_a_file_become_the_same_kind_of_triples(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/a.db")
    with engine.begin() as c:
        c.execute(text("CREATE TABLE album (id INTEGER, title TEXT, price REAL, artist TEXT, cover BLOB)"))
        c.execute(text("INSERT INTO album VALUES (1, 'Blue', 9.5, 'a b/<c>', x'00'), (2, 'Red', NULL, NULL, NULL)"))
        c.execute(text("INSERT INTO album VALUES (NULL, 'no id', 1, 'x', NULL)"))
    triples = list(map_rows(ALBUMS, table_rows(engine, "album"), "urn:"))
    said = {(t.subject.value, t.predicate.value.rpartition("#")[2], t.object.value) for t in triples}
    assert ("urn:album/1", "urn:artist", "urn:artist/a%20b%2F%3Cc%3E") in said
    assert ("urn:album/1", "label", "Blue") in said
    assert ("urn:price", "label", "price") in said
    assert {p for s, p, _ in said if s == "urn:album/2"} == {"type", "label"}
    (tmp_path / "a.csv").write_text("id,title,price,artist\n1,Blue,9.5,a b/<c>\n")
    other = ALBUMS.model_copy(update={"table": "", "file": "a.csv"})
    mapped = {(t.subject.value, t.object.value) for t in map_rows(other, csv_rows(tmp_path / "a.csv"), "urn:")}
    assert ("urn:album/1", "9.5") in mapped
    bad = ALBUMS.model_copy(update={"properties": {"cost": "cost"}})
    with pytest.raises(SourceError, match="no column 'cost'; there are id, title"):
        list(map_rows(bad, table_rows(engine, "album"), "urn:"))
    with pytest.raises(SourceError, match="table nothing: there is no such table"):
        list(table_rows(engine, "nothing"))
    with pytest.raises(SourceError, match="album: cannot be mapped"):
        list(map_rows(ALBUMS, table_rows(engine, "album"), "no address"))
    with engine.begin() as c:
        c.execute(text("CREATE TABLE diary (day DATE)"))
        c.execute(text("INSERT INTO diary VALUES ('soon')"))
    with pytest.raises(SourceError, match="table diary: cannot be read"):
        list(table_rows(engine, "diary"))


def test_a_column_that_is_not_among_many_is_named_in_a_short_message(tmp_path: Path) -> None:
    row = {f"column {n}": "" for n in range(100_000)}
    with pytest.raises(SourceError, match="there is no column 'id'; there are column 0, column 1") as said:
        list(map_rows(ALBUMS, [row], "urn:"))
    assert len(str(said.value)) < 1000


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers as its address says, and remembers what it was asked."""

    asked: list[dict[str, list[str]]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.asked.append(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()))
        good = {"head": {"vars": ["x"]}, "results": {"bindings": [{"x": {"type": "uri", "value": "urn:1"}}] * 3}}
        bodies = {"/good": json.dumps(good), "/html": "<html>", "/other": "[1]", "/deep": "[" * 100_000}
        body = bodies.get(self.path, "")
        self.send_response(503 if self.path == "/busy" else 200)
        self.end_headers()
        for _ in range(30 if self.path == "/slow" else 0):
            self.wfile.write(b" ")
            time.sleep(0.1)
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    it = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=it.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{it.server_port}"
    it.shutdown()


def test_an_endpoint_gets_the_readers_graphs_as_the_data_set(server: str) -> None:
    endpoint = Endpoint(f"{server}/good", {"urn:open": ["*"], "urn:hr": ["hr"]})
    found = endpoint.select("SELECT ?x { ?x ?p ?o }", ANYONE, limit=2)
    assert (len(found.rows), found.cut) == (2, True)
    asked = _Server.asked[-1]
    assert asked["default-graph-uri"] == asked["named-graph-uri"] == ["urn:open"]
    assert asked["query"][0].endswith("LIMIT 3")
    endpoint.select("SELECT ?x { ?x ?p ?o }", HR)
    assert _Server.asked[-1]["named-graph-uri"] == ["urn:hr", "urn:open"]
    before = len(_Server.asked)
    with pytest.raises(QueryRefused):
        endpoint.select("SELECT * { SERVICE <http://example.org/> { ?s ?p ?o } }", HR)
    closed = Endpoint(f"{server}/good", readers=["hr"])
    assert closed.select("SELECT ?x { ?x ?p ?o }", ANYONE).rows == ()
    assert len(_Server.asked) == before  # nothing was sent for either


@pytest.mark.parametrize(("path", "said"), [
    ("/slow", "no answer in 0.5 s"), ("/busy", "answered 503"), ("/html", "not JSON"), ("/deep", "not JSON"),
    ("/other", "not SPARQL results"),
])  # fmt: skip
def test_an_endpoint_that_fails_is_named(server: str, path: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        Endpoint(server + path, timeout_s=0.5 if path == "/slow" else 30).select("SELECT ?x { ?x ?p ?o }", ANYONE)


def test_queries_are_parsed_in_several_threads_from_the_first_one_on() -> None:
    """In a process of its own, whose parser has parsed nothing yet."""
    code = (
        "import sys, threading; from concurrent.futures import ThreadPoolExecutor; sys.setswitchinterval(1e-6)\n"
        "from coterie.knowledge.sparql import check, limited\n"
        "query, together = 'SELECT ?x { ?x ?p ?o FILTER(?p > 1 && STR(?o) IN (1, 2)) }', threading.Barrier(8)\n"
        "def ask(_): together.wait(); return limited(check(query), 3)\n"
        "with ThreadPoolExecutor(8) as pool: assert set(pool.map(ask, range(8))) == {query + '\\nLIMIT 3'}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]


def test_an_endpoint_that_is_not_there_is_named() -> None:
    with pytest.raises(SourceError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:9/sparql", timeout_s=0.5).select("SELECT ?x { ?x ?p ?o }", ANYONE)
