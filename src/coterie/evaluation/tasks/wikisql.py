"""WikiSQL (Zhong et al. 2017; text2sql-data): questions on one table to SQL. Reads wikisql.json.bz2 or its folder.

The collection has no table contents, so queries are compared by their words, not run. The table's one alias, the
same everywhere, is taken out.
"""

import bz2
import json
from pathlib import Path

from coterie.data.read import Example
from coterie.errors import DataError
from coterie.evaluation.sql import same_query
from coterie.evaluation.task import Splits, Task, row
from coterie.evaluation.tasks.geoquery import questions


def splits(path: Path) -> Splits:
    file = path / "wikisql.json.bz2" if path.is_dir() else path
    rows: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
    try:
        with bz2.open(file, "rt", encoding="utf-8") as f:
            queries = json.load(f)
        for n, query in enumerate(queries):
            for split, text, sql in questions(query):
                short = sql.replace("TABLE AS TABLEalias0", "TABLE").replace("TABLEalias0.", "")
                if text.strip():
                    rows[split].append(row(text, short, f"{file}: query {n}"))
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{file}: not WikiSQL of text2sql-data ({type(error).__name__}: {error})") from error
    return Splits(rows["train"], rows["test"])


TASK = Task(
    "wikisql", "Questions on one table to SQL, compared by their words", splits,
    system="Write one SQL query on the table TABLE that answers the question. Give only the query.",
    metric="same_query", scorer=lambda _path: lambda answer, example: same_query(answer, example.completion),
    max_tokens=96,
)  # fmt: skip
