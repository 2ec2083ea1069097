"""Questions over all things of a kind: read under a grammar into SPARQL, or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph_learn import learn_graph, open_graph
from coterie.knowledge.graph_source import GraphSource
from coterie.knowledge.sparql import check
from coterie.knowledge.specs import GraphSpec
from coterie.knowledge.totals import TIED

ANYONE, STAFF = Reader(), Reader("ada", frozenset({"staff"}))
FILES = {
    "towns.csv": "id,name,country,population\n1,Oslo,Norway,700\n2,Bergen,Norway,290\n3,Lund,Sweden,90\n"
    "4,Ghent,Belgium,260\n",
    "bridges.csv": "id,name,town,length\n1,Old Bridge,1,120\n2,High Bridge,1,300\n3,Mean Bridge,2,80\n"
    "4,Sea Bridge,3,300\n",
    "repairs.csv": "id,bridge,cost\n1,1,10\n2,1,20\n3,2,5.5\n4,4,40\n",
    "inspectors.csv": "id,name,town,salary\n1,Anna Berg,1,900\n2,Ole Dahl,1,800\n3,Eva Lind,3,700\n",
}
SPEC = {"base": "urn:b:", "tables": [
    {"file": "towns.csv", "id": "town/{id}", "type": "town", "label": "{name}",
     "properties": {"country": "country", "population": "population"}},
    {"file": "bridges.csv", "id": "bridge/{id}", "type": "bridge", "label": "{name}",
     "properties": {"length": "length"}, "links": {"town": "town/{town}"}},
    {"file": "repairs.csv", "id": "repair/{id}", "type": "repair", "properties": {"cost": "cost"},
     "links": {"bridge": "bridge/{bridge}"}},
    {"file": "inspectors.csv", "id": "inspector/{id}", "type": "inspector", "label": "{name}",
     "properties": {"salary": "salary"}, "links": {"town": "town/{town}"}, "readers": ["staff"]},
]}  # fmt: skip


@pytest.fixture(scope="module")
def bridges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GraphSource]:
    root = tmp_path_factory.mktemp("bridges")
    for name, content in FILES.items():
        (root / name).write_text(content)
    spec = GraphSpec.model_validate(SPEC)
    assert learn_graph(spec, root, root / "graph").problems == {}
    source = open_graph("bridges", spec, root / "graph")
    yield source
    source.graph.close()  # type: ignore[attr-defined]


def told(source: GraphSource, question: str, reader: Reader = ANYONE) -> list[str] | None:
    total = source.total(question, reader)
    if total is None:
        return None
    check(total.reading.sparql)
    names = source.names(total.values, reader)
    return sorted(names.get(v.value, v.value) for v in total.values)


ASKED = [
    ("How many bridges are there?", ["4"]),
    ("How many towns are in Norway?", ["2"]),
    ("How many towns lie in norway?", ["2"]),
    ("How many bridges does Oslo have?", ["2"]),
    ("What is the number of repairs of the Old Bridge?", ["2"]),
    ("Which town has the most bridges?", ["Oslo"]),
    ("Which town has the fewest bridges?", ["Ghent"]),  # it has none
    ("Which town has the fewest repairs?", ["Bergen", "Ghent"]),  # all that share the place
    ("Which town has the most repairs?", ["Oslo"]),  # over two relations
    ("Which country has the most towns?", ["Norway"]),
    ("Which bridge is the longest?", ["High Bridge", "Sea Bridge"]),
    ("What is the shortest bridge in Oslo?", ["Old Bridge"]),
    ("Which town has the highest population?", ["Oslo"]),
    ("Which town in Norway has the lowest population?", ["Bergen"]),
    ("What is the average population of the towns?", ["335.0"]),
    ("What is the total population of all towns in Norway?", ["990"]),
    ("What is the total cost of the repairs?", ["75.5"]),
    ("Which repair was the cheapest?", ["3"]),
]


@pytest.mark.parametrize(("question", "answer"), ASKED)
def test_what_is_counted_added_up_and_ranked(bridges: GraphSource, question: str, answer: list[str]) -> None:
    found = told(bridges, question)
    assert found is not None
    assert [float(f) if f.replace(".", "").isdigit() else f for f in found] == [
        float(a) if a.replace(".", "").isdigit() else a for a in answer
    ]


NOT_READ = [
    "How many towns are in Atlantis?",  # no such value: not all of them
    "How many towns lie in atlantis?",
    "How many bridges are longer than 100?",
    "How many towns are not in Norway?",
    "How many towns have more than one bridge?",
    "How many repairs of bridges in 1999 were there?",
    "How many people are there?",
    "What is the length of the Mean Bridge?",  # "mean" is part of a name
    "Which town has the second most bridges?",
    "What is the average cost of repairs per bridge?",
    "Where does Anna Berg live?",
    "Which bridge is the prettiest?",
    "What is the total?",
    "most", "how many", "",
]  # fmt: skip


@pytest.mark.parametrize("question", NOT_READ)
def test_what_the_grammar_has_no_place_for_is_not_guessed(bridges: GraphSource, question: str) -> None:
    assert bridges.total(question, STAFF) is None


def test_only_what_the_reader_may_see_is_counted(bridges: GraphSource) -> None:
    for question, answer in (
        ("How many inspectors are there?", ["3"]),
        ("Which town has the most inspectors?", ["Oslo"]),
        ("Which inspector has the highest salary?", ["Anna Berg"]),
    ):
        assert told(bridges, question, STAFF) == answer
        assert told(bridges, question) is None


def test_a_first_place_that_too_many_share_is_not_answered_by_some_of_them(tmp_path: Path) -> None:
    rows = "".join(f"{i},{5 + (i > TIED)}\n" for i in range(2 * TIED + 2))
    (tmp_path / "lamps.csv").write_text("id,height\n" + rows)
    lamp = {"file": "lamps.csv", "id": "lamp/{id}", "type": "lamp", "properties": {"height": "height"}}
    spec = GraphSpec.model_validate({"base": "urn:l:", "tables": [lamp]})
    learn_graph(spec, tmp_path, tmp_path / "graph")
    source = open_graph("lamps", spec, tmp_path / "graph")
    assert told(source, "How many lamps are there?") == [str(2 * TIED + 2)]
    assert source.total("Which lamp has the lowest height?", ANYONE) is None
    source.graph.close()  # type: ignore[attr-defined]


def test_the_evidence_shows_answer_and_sparql(bridges: GraphSource) -> None:
    (first, second) = bridges.search("Which bridge is the longest?", ANYONE)
    assert "SELECT" in first.query
    assert "ORDER BY DESC" in first.query
    assert {first.text, second.text} == {
        "bridge with the most length: High Bridge (300)", "bridge with the most length: Sea Bridge (300)"
    }  # fmt: skip
    (count,) = bridges.search("How many towns are in Norway?", ANYONE)
    assert count.text == "number of town, country: Norway: 2"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=30),
    st.sampled_from(["How many towns are in {}?", "Which {} has the most bridges?", "What is the total {} of towns?"]),
)
def test_no_question_becomes_sparql_that_is_refused(bridges: GraphSource, said: str, frame: str) -> None:
    """Whatever is said in it, quotes and braces too; `select` raises where a value ends its quotes."""
    told(bridges, frame.format(said))
