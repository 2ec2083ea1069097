"""Forty questions about two businesses, answered over their databases and over a graph of the same tables: alike."""

import json
import shutil
import sqlite3
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coterie.knowledge.database import Database, open_database
from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph import Graph
from coterie.knowledge.graph_learn import asked_of, learn_graph
from coterie.knowledge.specs import DatabaseSpec, GraphSpec

FOLDER = Path(__file__).parents[1] / "benchmarks" / "questions"
QUESTIONS = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text().splitlines()]
ANYONE = Reader()


def build(name: str, data: Callable[[str], Path], folder: Path) -> tuple[Database, Graph, GraphSpec]:
    """The business's tables as they are, and as a graph by the declaration beside the questions."""
    if name == "chinook":
        shutil.copy(data("chinook/Chinook_Sqlite.sqlite"), folder / "chinook.db")
    else:
        with sqlite3.connect(folder / "northwind.db") as connection:
            connection.executescript(data("northwind/create.sql").read_text(encoding="utf-8"))
        connection.close()
    spec = GraphSpec.model_validate(tomllib.loads((FOLDER / f"{name}.toml").read_text()))
    learned = learn_graph(spec, folder, folder / "graph")
    assert learned.problems == {}
    tables = {t.table: {} for t in spec.tables}
    database = DatabaseSpec.model_validate({"url": f"sqlite:///{name}.db", "tables": tables, "rows": 10_000})
    return open_database(name, database, folder), Graph(folder / "graph"), spec


@pytest.fixture(scope="module")
def businesses(
    tmp_path_factory: pytest.TempPathFactory, public_data: Any
) -> dict[str, tuple[Database, Graph, GraphSpec]]:
    return {name: build(name, public_data, tmp_path_factory.mktemp(name)) for name in ("chinook", "northwind")}


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
