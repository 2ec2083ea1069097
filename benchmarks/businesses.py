"""Forty questions on Chinook and Northwind: what coterie's own SQL and its own paths answer, from the question alone.

The answers were written with a SQL and a SPARQL query for each question (questions/questions.jsonl), which
tests/test_questions.py runs: both give the recorded answer. Here neither is shown for the question that is asked.
`graph` finds the thing and the path, by the words of relations alone (`untrained`), or by a finder that has learned
the paths of the other questions of the same business (`trained`, leaving one out). Questions over all things of a kind
are read under a grammar; its rules were written with these forty in sight, so they are no blind test of it. `sql` is
the base model under the grammar, shown the four nearest of the other questions with their SQL. Right: the same answer,
no more and no less.

    python benchmarks/businesses.py            # minutes
    python benchmarks/businesses.py --quick    # SQL for a few questions only
"""

import json
import shutil
import sqlite3
import tempfile
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from common import ROOT, Report, finish, need_data, options

from coterie.engine.engine import Engine
from coterie.evaluation.metrics import wilson
from coterie.knowledge.asksql import Nearest, SqlSource
from coterie.knowledge.database import Database, open_database
from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph_learn import asked_of, learn_graph, open_graph
from coterie.knowledge.graph_source import GraphSource
from coterie.knowledge.paths import Finder
from coterie.knowledge.specs import DatabaseSpec, GraphSpec
from coterie.model.load import load
from coterie.model.pull import DEFAULT, pull

FOLDER, WHO = ROOT / "benchmarks" / "questions", Reader("benchmark")
NAMES = ("chinook", "northwind")
Row = dict[str, Any]


def build(name: str, folder: Path, find: Callable[[str], Path] = need_data) -> tuple[Database, GraphSource, GraphSpec]:
    """The database, and the graph that the declaration makes of it, in a new folder."""
    folder.mkdir()
    if name == "chinook":
        shutil.copy(find("chinook/Chinook_Sqlite.sqlite"), folder / "chinook.db")
    else:
        with closing(sqlite3.connect(folder / "northwind.db")) as connection:
            connection.execute("PRAGMA synchronous = OFF")  # its thousands of statements are a transaction each
            connection.executescript(find("northwind/create.sql").read_text(encoding="utf-8"))
    spec = GraphSpec.model_validate(tomllib.loads((FOLDER / f"{name}.toml").read_text()))
    learned = learn_graph(spec, folder, folder / "graph")
    if learned.problems:
        raise SystemExit(str(learned.problems))
    tables = {t.table: {} for t in spec.tables}
    declared = DatabaseSpec.model_validate({"url": f"sqlite:///{name}.db", "tables": tables, "rows": 10_000})
    return open_database(name, declared, folder), open_graph(name, spec, folder / "graph"), spec


def same(found: list[str], wanted: list[Any]) -> bool:
    """Texts as a set; one number by value."""
    if len(found) == len(wanted) == 1:
        try:
            return abs(float(found[0]) - float(wanted[0])) <= 1e-6 * max(1.0, abs(float(wanted[0])))
        except ValueError:
            pass
    return set(found) == {str(a) for a in wanted}


def ask_graph(source: GraphSource, question: str) -> list[str]:
    total = source.total(question, WHO)
    answers = [] if total else source.answers(question, WHO, most=1)
    values = total.values if total else answers[0].values if answers else ()
    names = source.names(values, WHO)
    return [names.get(v.value, v.value) for v in values]


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--graph-only", action="store_true", help="leave SQL out, and with it the model")
    args = parser.parse_args()
    questions: list[Row] = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text().splitlines()]
    report, rows = Report("Questions about two businesses"), []
    right: dict[str, list[bool]] = {"graph, untrained": [], "graph, trained on the others": [], "sql, base model": []}
    paths: list[bool] = []
    engine = None if args.graph_only else Engine(load(pull(DEFAULT), packed=True), slots=16, context=2048, queue=64)
    try:
        with tempfile.TemporaryDirectory() as work:
            for name in NAMES:
                database, source, spec = build(name, Path(work) / name)
                own = [q for q in questions if q["db"] == name]
                for q in own:
                    right["graph, untrained"].append(same(ask_graph(source, q["question"]), q["answer"]))
                for q in own:
                    source.finder = Finder(source.labels(WHO))
                    source.finder.learn([asked_of(o, spec.base, "") for o in own if o is not q and "path" in o])
                    right["graph, trained on the others"].append(same(ask_graph(source, q["question"]), q["answer"]))
                    paths.append("path" in q)

                if engine is None:
                    continue

                def ask_sql(
                    q: Row, own: list[Row] = own, database: Database = database, asked: Engine = engine
                ) -> bool:
                    nearest = Nearest([(o["question"], o["sql"]) for o in own if o is not q])
                    answer, _ = SqlSource(q["db"], database, lambda: asked, nearest=nearest).answer(q["question"], WHO)
                    found = [" ".join(str(c) for c in row) for row in answer.rows] if answer else []
                    return same(found, q["answer"])

                with ThreadPoolExecutor(8) as pool:
                    right["sql, base model"] += pool.map(ask_sql, own[::5] if args.quick else own)
    finally:
        if engine:
            engine.close()
    for name, ok in ((name, ok) for name, ok in right.items() if ok):
        interval = wilson(sum(ok), len(ok))
        report.figures[name.replace(", ", "_").replace(" ", "_")] = sum(ok) / len(ok)
        rows.append([name, sum(ok) / len(ok), f"{interval.low:.3f} to {interval.high:.3f}", len(ok)])
    of_paths = [ok for ok, path in zip(right["graph, trained on the others"], paths, strict=True) if path]
    report.figures["graph_trained_of_path_questions"] = sum(of_paths) / len(of_paths)
    report.table("Chinook and Northwind, from the question alone", ["", "accuracy", "95%", "questions"], rows)
    report.say(
        f"{len(of_paths)} of the 40 questions ask for a path from a thing, which is all that the path finder can do; "
        f"of these the trained one answers {sum(of_paths)}. The others count, add up or rank over all "
        "things of a kind, which is read under a grammar."
    )
    finish(report, args)


if __name__ == "__main__":
    main()
