"""Questions to a graph: what they name, the path they ask for, and evidence with its source."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sqlalchemy import create_engine, text

from coterie.errors import CoterieError, DataError, SourceError
from coterie.knowledge import entities, graph_source
from coterie.knowledge.endpoint import Endpoint
from coterie.knowledge.entities import Entities, plain
from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph import Graph
from coterie.knowledge.graph_learn import learn_graph, open_graph, read_asked
from coterie.knowledge.graph_source import GraphSource
from coterie.knowledge.listing import overview
from coterie.knowledge.paths import COUNT, Asked, Finder, mask
from coterie.knowledge.sparql import Rows, Term
from coterie.knowledge.specs import GraphSpec
from knowledge_support import WordEmbedder

ANYONE, STAFF = Reader(), Reader("ada", frozenset({"staff"}))
LABEL = "@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> . @prefix e: <urn:e:> .\n"
MUSIC = {
    "artists.csv": "id,name,born\n1,Ella Fitzgerald,1917\n2,Louis Armstrong,1901\n",
    "albums.csv": "id,title,artist,price\n1,Ella and Louis,1,9.5\n2,Satchmo,2,8\n3,Lullabies,1,7\n",
    "deals.ttl": LABEL + "<urn:m:artist/1> e:fee 900 . e:fee rdfs:label \"fee\" .",
}  # fmt: skip
SPEC = {
    "base": "urn:m:",
    "parts": [{"files": ["deals.ttl"], "readers": ["staff"]}],
    "tables": [
        {"file": "artists.csv", "id": "artist/{id}", "type": "artist", "label": "{name}",
         "properties": {"birth year": "born"}},
        {"file": "albums.csv", "id": "album/{id}", "type": "album", "label": "{title}",
         "properties": {"price": "price"}, "links": {"artist": "artist/{artist}"}},
    ],
}  # fmt: skip


@pytest.fixture
def music(tmp_path: Path) -> Iterator[tuple[Path, GraphSource]]:
    for name, content in MUSIC.items():
        (tmp_path / name).write_text(content)
    spec = GraphSpec.model_validate(SPEC)
    learned = learn_graph(spec, tmp_path, tmp_path / "graph")
    assert learned.problems == {}
    source = open_graph("music", spec, tmp_path / "graph")
    yield tmp_path, source
    source.graph.close()  # type: ignore[attr-defined]


LINKED = [
    ("When was Ella Fitzgerald born?", "ella fitzgerald", "name"),
    ("When was ella fitzgerald born?", "ella fitzgerald", "name"),
    ("When was Élla-Fitzgerald born?", "ella fitzgerald", "name"),
    ("When was Ella Fitzgerld born?", "ella fitzgerald", "spelling"),
    ("What did Satchmo cost?", "satchmo", "name"),
    ("Who was Henry VII of England's wife?", "henry vii of england", "name"),
]  # fmt: skip
NAMES = [("Ella Fitzgerald", "urn:1"), ("Ella", "urn:2"), ("Satchmo", "urn:3"), ("Louis Armstrong", "urn:4"),
         ("Henry VII of England", "urn:5"), ("Henry VIII of England", "urn:6")]  # fmt: skip


@pytest.mark.parametrize(("question", "name", "how"), LINKED)
def test_a_thing_is_found_by_its_name_however_it_is_spelled(question: str, name: str, how: str) -> None:
    mention = Entities(NAMES).link(question)[0]
    assert (mention.name, mention.how) == (name, how)


@pytest.mark.parametrize("question", ["", "?", "What is the weather?", "cat", "🎵"])
def test_a_question_that_names_nothing_links_to_nothing(question: str) -> None:
    assert Entities(NAMES).link(question) == []
    assert Entities([]).link(question) == []


def test_a_thing_is_found_by_meaning_where_its_name_does_not_stand_there() -> None:
    def embed(texts: list[str]) -> NDArray[np.float32]:
        places = {"satchmo": 0, "the record": 0, **{plain(n): i for i, (n, _) in enumerate(NAMES, 1) if n != "Satchmo"}}
        return np.eye(8, dtype=np.float32)[[places.get(t, 7) for t in texts]]

    mention = Entities(NAMES, embed).link("how dear is the record")[0]  # type: ignore[arg-type]
    assert (mention.iris, mention.how) == (("urn:3",), "meaning")


@given(st.lists(st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=3)), max_size=6), st.text(max_size=40))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_linking_takes_any_text_and_names_each_word_once(names: list[tuple[str, str]], question: str) -> None:
    found = Entities(names).link(question)
    taken = [i for m in found for i in range(m.start, m.end)]
    assert len(taken) == len(set(taken))
    assert all(0 < m.score <= 1 and m.iris for m in found)


def test_a_long_question_costs_no_more_guesses_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, embedded = list[str](), list[str]()

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        embedded.extend(texts)
        return np.eye(8, dtype=np.float32)[[1 + i % 7 if t in keys else 0 for i, t in enumerate(texts)]]

    keys = {plain(n) for n, _ in NAMES}
    many = Entities(NAMES, embed)
    monkeypatch.setattr(entities, "ratio", lambda a, b, **_: compared.append(a) or 0)
    assert many.link("henri the eighth of england in word " * 6) == []
    once = len(compared), len(embedded)
    assert min(once) > 0
    compared.clear()
    embedded.clear()
    for _ in range(3):  # as one question is, by one search
        assert many.link("henri the eighth of england in word " * 200) == []
    assert (len(compared), len(embedded)) <= once
    assert many.link("henri the eighth of england in word " * 100 + "Satchmo")[0].name == "satchmo"


ASKED = [
    ("What is the birth year of Ella Fitzgerald?", {"1917"}),
    ("What is the price of Satchmo?", {"8"}),
    ("Who is the artist of Lullabies?", {"urn:m:artist/1"}),
    ("How many albums are there?", {"3"}),
    ("What is the birth year of the artist of Satchmo?", {"1901"}),
    ("Which albums are by Ella Fitzgerald?", {"urn:m:album/1", "urn:m:album/3"}),
    ("How many albums are by Ella Fitzgerald?", {"2"}),
]  # fmt: skip


@pytest.mark.parametrize(("question", "values"), ASKED)
def test_an_untrained_finder_follows_the_words_of_relations(
    music: tuple[Path, GraphSource], question: str, values: set[str]
) -> None:
    assert {v.value for v in music[1].answers(question, ANYONE)[0].values} == values


def test_evidence_names_triple_source_and_query(music: tuple[Path, GraphSource]) -> None:
    best = music[1].search("What is the birth year of the artist of Satchmo?", ANYONE)[0]
    assert best.text == "Satchmo, artist: Louis Armstrong; Louis Armstrong, birth year: 1901"
    assert best.where.startswith("albums.csv: <urn:m:album/2> <urn:m:artist> <urn:m:artist/2>; artists.csv: ")
    assert best.query.startswith("SELECT DISTINCT ?x1 ?x2 ?g1 ?g2")
    assert best.source == "music"


def test_a_question_about_a_thing_without_a_known_relation_gives_what_is_known_of_it(
    music: tuple[Path, GraphSource],
) -> None:
    assert any("price: 8" in e.text for e in music[1].search("Satchmo?", ANYONE))
    assert music[1].search("What is the weather?", ANYONE) == []


@pytest.mark.parametrize("question", [
    "What is the fee of Ella Fitzgerald?", "fee Ella Fitzgerald", "900", "Which artist has the fee 900?",
    "Ella Fitzgerald", "Ella Fitzgerald\"> ?p ?o } UNION { GRAPH ?g { ?s <urn:e:fee> ?o",
])  # fmt: skip
def test_a_reader_gets_nothing_of_what_they_may_not_see(music: tuple[Path, GraphSource], question: str) -> None:
    assert not any("900" in e.text or "fee" in e.text for e in music[1].search(question, ANYONE))
    assert music[1].answers("What is the fee of Ella Fitzgerald?", STAFF)[0].values[0].value == "900"


def test_learning_again_takes_what_changed_and_drops_what_is_gone(music: tuple[Path, GraphSource]) -> None:
    root, source = music
    spec = GraphSpec.model_validate(SPEC)
    with Graph(root / "graph").writing() as writer:
        writer.put("extracted from note.md", [], ["*"], "1")  # which this declaration says nothing of
    again = learn_graph(spec, root, root / "graph")
    assert (again.changed, again.removed, again.kept) == ([], [], 3)
    (root / "albums.csv").write_text(MUSIC["albums.csv"].replace("8\n", "12\n"))
    (root / "deals.ttl").unlink()
    changed = learn_graph(spec, root, root / "graph")
    assert (changed.changed, changed.removed) == (["albums.csv"], ["deals.ttl"])
    assert "extracted from note.md" in [s.name for s in Graph(root / "graph").sources()]
    assert "no such file" in changed.problems["deals.ttl"]
    assert source.answers("What is the price of Satchmo?", ANYONE)[0].values[0].value == "12"
    assert source.answers("What is the fee of Ella Fitzgerald?", STAFF)[:1] != ["900"]
    assert "900" not in str(source.search("What is the fee of Ella Fitzgerald?", STAFF))


def test_a_source_that_breaks_keeps_what_it_said_but_not_who_may_read_it(music: tuple[Path, GraphSource]) -> None:
    root, _ = music
    (root / "deals.ttl").write_text("this is no turtle")
    narrowed = GraphSpec.model_validate({**SPEC, "parts": [{"files": ["deals.ttl"], "readers": ["boss"]}]})
    learned = learn_graph(narrowed, root, root / "graph")
    assert "deals.ttl:1: not valid" in learned.problems["deals.ttl"]
    source = open_graph("music", narrowed, root / "graph")
    assert "900" not in str(source.search("What is the fee of Ella Fitzgerald?", STAFF))
    boss = Reader("b", frozenset({"boss"}))
    assert source.answers("What is the fee of Ella Fitzgerald?", boss)[0].values[0].value == "900"
    source.graph.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", [
    {"parts": [{"files": ["deals.ttl"], "readers": ["board"]}]},
    {"tables": [SPEC["tables"][0], {**SPEC["tables"][1], "readers": ["board"]}]},  # type: ignore[dict-item]
])  # fmt: skip
def test_changed_readers_hold_before_anything_is_asked(music: tuple[Path, GraphSource], change: dict[str, Any]) -> None:
    root, before = music
    board = Reader("cyd", frozenset({"staff", "board"}))
    spec = GraphSpec.model_validate({**SPEC, **change})
    source = open_graph("music", spec, root / "graph")
    question = "What is the price of Satchmo?"
    for ask, what in ((source.search, question), (source.answers, question), (source.around, "urn:m:album/2")):
        with pytest.raises(CoterieError, match="its readers have changed since it was learned; run `coterie learn`"):
            ask(what, board)
    listed = overview("music", {"music": spec}, root / "graph", board)
    assert listed["files"] == []
    assert any("its readers have changed" in error for error in listed["errors"])
    assert before.answers(question, STAFF)  # who does not know of the change yet
    assert learn_graph(spec, root, root / "graph").problems == {}
    assert source.answers(question, board)[0].values[0].value == "8"
    assert bool(source.answers(question, STAFF)) is ("parts" in change)
    with pytest.raises(CoterieError, match="its readers have changed"):
        before.search(question, STAFF)
    assert overview("music", {"music": spec}, root / "graph", board)["files"]
    source.graph.close()  # type: ignore[attr-defined]


def test_shapes_keep_a_file_out(music: tuple[Path, GraphSource]) -> None:
    root, source = music
    (root / "shapes.ttl").write_text(
        "@prefix sh: <http://www.w3.org/ns/shacl#> . @prefix e: <urn:e:> . "
        "e:S a sh:NodeShape ; sh:targetSubjectsOf e:fee ; sh:property [ sh:path e:fee ; sh:maxInclusive 1000 ] ."
    )
    (root / "deals.ttl").write_text(MUSIC["deals.ttl"].replace("900", "9000"))
    learned = learn_graph(GraphSpec.model_validate({**SPEC, "shapes": "shapes.ttl"}), root, root / "graph")
    assert "urn:m:artist/1" in learned.problems["deals.ttl"]
    assert source.answers("What is the fee of Ella Fitzgerald?", STAFF)[0].values[0].value == "900"


def test_other_shapes_are_held_against_files_that_have_not_changed(music: tuple[Path, GraphSource]) -> None:
    root, _ = music
    spec = GraphSpec.model_validate({**SPEC, "shapes": "shapes.ttl"})
    text = (
        "@prefix sh: <http://www.w3.org/ns/shacl#> . @prefix e: <urn:e:> . "
        "e:S a sh:NodeShape ; sh:targetSubjectsOf e:fee ; sh:property [ sh:path e:fee ; sh:maxInclusive %d ] ."
    )
    (root / "shapes.ttl").write_text(text % 1000)
    assert learn_graph(spec, root, root / "graph").problems == {}
    assert learn_graph(spec, root, root / "graph").kept == 3
    (root / "shapes.ttl").write_text(text % 100)
    for _ in range(2):  # the second time, too: it does not fit as long as neither changes
        assert list(learn_graph(spec, root, root / "graph").problems) == ["deals.ttl"]
    (root / "shapes.ttl").write_text(text % 1000)
    assert learn_graph(spec, root, root / "graph").problems == {}


WAREHOUSE = {
    "base": "urn:m:", "database": "sqlite:///none.db",
    "tables": [{"table": "album", "id": "album/{id}", "type": "album", "label": "{title}"}],
}  # fmt: skip


@pytest.mark.parametrize("address", ["nonsense", "mysql+nothing://x/y", "oracle://x/y"])
def test_a_database_that_cannot_be_used_is_said_in_one_sentence(tmp_path: Path, address: str) -> None:
    with pytest.raises(CoterieError, match="database: cannot be used"):
        learn_graph(GraphSpec.model_validate({**WAREHOUSE, "database": address}), tmp_path, tmp_path / "graph")


def test_a_database_that_is_not_there_is_named_and_not_made(tmp_path: Path) -> None:
    learned = learn_graph(GraphSpec.model_validate(WAREHOUSE), tmp_path, tmp_path / "graph")
    assert "none.db: no such file" in learned.problems["album"]
    assert not (tmp_path / "none.db").exists()


def test_tables_of_postgresql_become_triples(tmp_path: Path, new_postgres: Callable[..., str]) -> None:
    url = new_postgres()
    engine = create_engine(url)
    with engine.begin() as c:
        c.execute(text("CREATE TABLE album (id INTEGER, title TEXT)"))
        c.execute(text("INSERT INTO album SELECT n, 'Album ' || n FROM generate_series(1, 2500) AS n"))
    engine.dispose()
    spec = GraphSpec.model_validate({**WAREHOUSE, "database": url.replace("+psycopg", "")})
    assert learn_graph(spec, tmp_path, tmp_path / "graph").problems == {}
    assert [s.triples for s in Graph(tmp_path / "graph").sources()] == [2 * 2500 + 1]


TRAINED = [Asked(mask(f"{how} of entity's {word}", 2, 3), path, COUNT if "many" in how else "=list")
           for how, end in (("what colour", "colour"), ("how many", ""))
           for word, first in (("car", "drives"), ("dad", "father"))
           for path in [(first, end) if end else (first,)]]  # fmt: skip


def test_a_trained_finder_learns_other_words_for_a_relation_and_is_the_same_from_disk(tmp_path: Path) -> None:
    finder = Finder({"drives": "drives", "father": "father", "colour": "colour"})
    finder.learn(TRAINED)
    follow = {(): {"drives", "father"}, ("drives",): {"colour", "drives"}, ("father",): {"colour", "drives"}}
    words = mask("what colour of entity's car", 2, 3)
    found = finder.find(words, lambda taken: follow.get(taken, set()))
    assert found[0].relations == ("drives", "colour")
    finder.save(tmp_path / "f.safetensors")
    again = Finder.load(tmp_path / "f.safetensors")
    assert again.find(words, lambda taken: follow.get(taken, set())) == found
    (tmp_path / "f.safetensors").write_bytes(b"no finder")
    with pytest.raises(DataError, match="no path finder"):
        Finder.load(tmp_path / "f.safetensors")


@pytest.mark.parametrize(("line", "said"), [
    ("{", ":1: not valid JSON"), ('{"question": "a"}', "needs 'names', a text"),
    ('{"question": "who is bob", "names": "al", "path": ["x"]}', "does not say 'al'"),
])  # fmt: skip
def test_examples_that_cannot_be_used_are_named_by_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=said):
        list(read_asked(tmp_path / "q.jsonl", "urn:"))


def test_declared_examples_train_the_finder(music: tuple[Path, GraphSource]) -> None:
    root, _ = music
    rows = [{"question": f"{how} {name}", "names": name, "path": path}
            for how, path in (("who sings on", ["artist"]), ("how dear is", ["price"]))
            for name in ("Satchmo", "Lullabies")]  # fmt: skip
    (root / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = GraphSpec.model_validate({**SPEC, "examples": ["q.jsonl"]})
    assert learn_graph(spec, root, root / "graph").problems == {}
    source = open_graph("music", spec, root / "graph")
    assert source.answers("How dear is Ella and Louis?", ANYONE)[0].values[0].value == "9.5"
    source.graph.close()  # type: ignore[attr-defined]


def test_examples_that_cannot_be_read_leave_the_graph_learned(music: tuple[Path, GraphSource]) -> None:
    root, source = music
    (root / "folder.jsonl").mkdir()
    for examples in ("none*.jsonl", "folder.jsonl"):
        learned = learn_graph(GraphSpec.model_validate({**SPEC, "examples": [examples]}), root, root / "graph")
        assert examples in learned.problems["examples"]
        assert learned.told["examples"]
    assert source.answers("What is the price of Satchmo?", ANYONE)[0].values[0].value == "8"


@pytest.mark.parametrize("pattern", ["none.ttl", "*.nt", "/etc/hosts", "."])
def test_a_pattern_that_fits_no_file_is_named(tmp_path: Path, pattern: str) -> None:
    spec = GraphSpec.model_validate({"parts": [{"files": [pattern]}]})
    learned = learn_graph(spec, tmp_path, tmp_path / "graph")
    assert learned.problems == {pattern: f"{pattern}: no such file in {tmp_path}"}


class Words(WordEmbedder):
    """Keeps the texts that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts += texts
        return super().embed(texts)


def test_names_are_read_and_embedded_once_for_all_who_see_the_same(
    music: tuple[Path, GraphSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = music
    by, spec = Words(), GraphSpec.model_validate(SPEC)
    source = open_graph("music", spec, root / "graph", by.embed)
    read, asked = source.graph.select, list[str]()
    monkeypatch.setattr(source.graph, "select", lambda query, *more: asked.append(query) or read(query, *more))
    assert source.answers("What is the price of Satchmo?", Reader("customer 0"))
    names, before = by.texts.count("satchmo"), len(asked)
    assert source.answers("What is the price of Satchmo?", Reader("customer 0"))
    once = len(asked) - before
    for n in range(1, 20):  # more customers than are held
        assert source.answers("What is the price of Satchmo?", Reader(f"customer {n}"))
    assert len(asked) == before + 20 * once
    assert source.answers("What is the price of Satchmo?", STAFF)  # who sees more: only what is new is computed
    assert by.texts.count("satchmo") == names == 1
    (root / "albums.csv").write_text(MUSIC["albums.csv"] + "4,Porgy and Bess,1,9\n")
    learn_graph(spec, root, root / "graph")
    assert source.answers("What is the price of Porgy and Bess?", ANYONE)
    assert (by.texts.count("satchmo"), by.texts.count("porgy and bess")) == (1, 1)
    source.graph.close()  # type: ignore[attr-defined]


class Server:
    """An endpoint of names only, which gives at most `most` rows at once and never says when it changes."""

    fresh_s = 0.05

    def __init__(self, *names: str, most: int = 3, deaf: bool = False) -> None:
        self.names, self.most, self.asked, self.deaf = list(names), most, 0, deaf

    def seen(self, _reader: Reader) -> frozenset[str]:
        return frozenset({"all"})

    def select(self, query: str, _reader: Reader, limit: int = 1000) -> Rows:
        if " OFFSET " not in query:
            return Rows((), ())
        self.asked += 1
        start = 0 if self.deaf else int(query.rpartition(" OFFSET ")[2])
        pairs = [(Term("literal", n), Term("uri", f"urn:{n}")) for n in self.names]
        return Rows(("n", "e"), tuple(pairs[start : start + min(limit, self.most)]))


def test_all_names_are_read_however_few_a_server_gives_at_once() -> None:
    names = [f"name{n}" for n in range(10)]
    assert sorted(Entities.of(Server(*names), ANYONE).keys) == names
    assert Entities.of(Server(), ANYONE).keys == []
    assert Entities.of(Server(*names, deaf=True), ANYONE).keys == names[:3]  # to OFFSET: it ends all the same


def test_a_graph_on_disk_is_read_page_by_page(music: tuple[Path, GraphSource], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Entities.of(music[1].graph, STAFF).iris
    monkeypatch.setattr(entities, "PAGE", 2)
    assert Entities.of(music[1].graph, STAFF).iris == whole
    assert len(whole) > 4


def test_the_names_of_an_endpoint_are_read_again_after_a_while() -> None:
    server = Server("Satchmo")
    source = GraphSource("far", server, named=False)
    assert source._entities(ANYONE).keys == source._entities(Reader("ada")).keys == ["satchmo"]
    read = server.asked
    server.names = ["Lullabies"]
    time.sleep(2 * server.fresh_s)
    assert source._entities(ANYONE).keys == ["lullabies"]
    assert server.asked == 2 * read
    assert Endpoint("http://far.invalid/").fresh_s < 3600


def test_who_may_see_nothing_of_an_endpoint_gets_nothing_and_no_error() -> None:
    source = GraphSource("far", Endpoint("http://far.invalid/", readers=["staff"]), named=False)
    assert source.search("What is the price of Satchmo?", ANYONE) == []
    assert source.search("How many albums are there?", ANYONE) == []


def test_many_names_are_found_as_they_are_written_until_their_vectors_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entities, "WAITED_FOR", 2)
    go = threading.Event()

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        assert go.wait(10)
        places = {"satchmo": 0, "the record": 0, **{plain(n): 1 for n, _ in NAMES if n != "Satchmo"}}
        return np.eye(3, dtype=np.float32)[[places.get(t, 2) for t in texts]]

    many = Entities(NAMES, embed)
    assert many.link("When was Ella born?")[0].name == "ella"
    assert many.vectors is None
    assert many.link("how dear is the record") == []
    go.set()
    for _ in range(100):
        if many.vectors is not None:
            break
        time.sleep(0.05)
    assert many.link("how dear is the record")[0].name == "satchmo"


def test_a_graph_too_large_to_be_looked_over_in_time_is_not_looked_over_at_each_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def fails(*_: object) -> None:
        tried.append(1)
        raise SourceError("no answer in 5 s")

    monkeypatch.setattr(graph_source, "shape_of", fails)
    source = GraphSource("far", Server("Satchmo"), named=False)
    for _ in range(3):
        assert source.total("How many albums are there?", ANYONE) is None
    assert len(tried) == 1


def test_plain_compares_what_people_write() -> None:
    assert plain("  Straße_No.7 — Élan ") == "strasse no 7 elan"
