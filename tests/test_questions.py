"""Forty questions about two businesses, answered over their databases and over a graph of the same tables: alike."""

import json
from typing import Any

import pytest
from businesses import FOLDER, NAMES, build

from coterie.knowledge.database import Database
from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph import Graph
from coterie.knowledge.graph_learn import asked_of
from coterie.knowledge.specs import GraphSpec

QUESTIONS = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text().splitlines()]
ANYONE = Reader()


@pytest.fixture(scope="module")
def businesses(
    tmp_path_factory: pytest.TempPathFactory, public_data: Any
) -> dict[str, tuple[Database, Graph, GraphSpec]]:
    built = {name: build(name, tmp_path_factory.mktemp(name) / name, public_data) for name in NAMES}
    return {name: (database, source.graph, spec) for name, (database, source, spec) in built.items()}


def plain(rows: list[tuple[Any, ...]]) -> list[Any]:
    """Rows as sorted texts; one number as a number."""
    if len(rows) == 1 and len(rows[0]) == 1:
        try:
            return [pytest.approx(float(rows[0][0]))]
        except ValueError:
            pass
    return sorted(" ".join(str(c) for c in row) for row in rows)


def test_there_are_forty() -> None:
    assert len({q["question"] for q in QUESTIONS}) == 40


@pytest.mark.parametrize("question", QUESTIONS, ids=[q["question"] for q in QUESTIONS])
def test_the_database_and_the_graph_give_the_same_answer(
    question: dict[str, Any], businesses: dict[str, tuple[Database, Graph, GraphSpec]]
) -> None:
    database, graph, spec = businesses[question["db"]]
    rows = [tuple(row) for row in database.run(question["sql"], ANYONE).rows]
    found = [tuple(t.plain for t in row if t) for row in graph.select(question["sparql"], ANYONE).rows]
    assert plain(rows) == plain([(a,) for a in question["answer"]])
    assert plain(found) == plain(rows)
    if "path" in question:
        assert asked_of(question, spec.base, "questions.jsonl").path
