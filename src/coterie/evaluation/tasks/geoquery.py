"""GeoQuery (Zelle & Mooney 1996; text2sql-data of Finegan-Dollak et al. 2018): questions to SQL, run on the database.

Reads the folder with geography.json, geography-schema.csv and the .sqlite file. Split by question, as published.
"""

import csv
import json
from pathlib import Path
from typing import Any

from coterie.data.read import Example
from coterie.errors import DataError
from coterie.evaluation.sql import QueryFailed, execution_match, rows_of
from coterie.evaluation.task import Score, Splits, Task, row

SYSTEM = "Write one SQLite query that answers the question. Give only the query."


def schema(file: Path) -> str:
    """The tables as one line each would name them: river (river_name, length, ...)."""
    tables: dict[str, list[str]] = {}
    for cells in list(csv.reader(file.open()))[1:]:
        if len(cells) > 1 and cells[0].strip() and cells[0].strip() != "-":
            tables.setdefault(cells[0].strip().lower(), []).append(cells[1].strip().lower())
    return "; ".join(f"{t} ({', '.join(columns)})" for t, columns in tables.items())


def questions(query: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Split, question and SQL of every wording of a query, its variables filled in."""
    out = []
    for sentence in query["sentences"]:
        text, sql = sentence["text"], query["sql"][0]
        for name, value in sorted(sentence["variables"].items(), key=lambda item: -len(item[0])):
            text, sql = text.replace(name, value), sql.replace(name, value)
        out.append((sentence["question-split"], text, sql))
    return out


def splits(path: Path) -> Splits:
    file = path / "geography.json"
    try:
        tables = schema(path / "geography-schema.csv")
        rows: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
        for n, query in enumerate(json.loads(file.read_text())):
            for split, text, sql in questions(query):
                if not runs(database(path), sql):
                    continue
                rows[split].append(row(text, sql, f"{file}: query {n}", f"{SYSTEM} The tables: {tables}."))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{file}: not GeoQuery of text2sql-data ({type(error).__name__}: {error})") from error
    return Splits(rows["train"], rows["test"])


def database(path: Path) -> Path:
    found = sorted(path.glob("geography-db*.sqlite"))
    if not found:
        raise DataError(f"{path}: no geography-db*.sqlite here, on which queries are run")
    return found[0]


def runs(file: Path, sql: str) -> bool:
    """Whether SQLite can run a query; a few of the collection are MySQL's and are left out."""
    try:
        rows_of(file, sql)
    except QueryFailed:
        return False
    return True


def scorer(path: Path) -> Score:
    file = database(path)
    return lambda answer, example: execution_match(file, answer, example.completion)


TASK = Task(
    "geoquery", "Questions on US geography to SQL, run on the database", splits,
    metric="execution_match", scorer=scorer, max_tokens=160,
)  # fmt: skip
