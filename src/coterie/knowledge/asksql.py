"""A question answered from tables: an expert writes SQL under a grammar, the guard lets it through, the rows answer.

Notable: the first try is the likeliest statement. Only where it is refused, fails or finds nothing is the model asked
again: further statements are drawn, and values that stand in no row are replaced by the nearest that do; the
likeliest one that finds rows answers. The database is the judge of what can be run, never of what is right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import sqlglot
from rapidfuzz.fuzz import partial_ratio, ratio
from sqlglot import exp
from sqlglot.errors import SqlglotError

from coterie.data.features import TfIdf
from coterie.data.read import Message, read_objects
from coterie.engine.engine import Engine
from coterie.engine.request import Adapter, Sampling
from coterie.errors import ContextTooLong, QueryRefused, SourceError, Unreachable
from coterie.knowledge.database import FRESH_S, Answer, Database
from coterie.knowledge.embed import Floats
from coterie.knowledge.entities import Embed, plain
from coterie.knowledge.evidence import Evidence, Reader
from coterie.knowledge.plainsql import simplify
from coterie.knowledge.relevance import About, spoken
from coterie.knowledge.schema import describe
from coterie.knowledge.specs import DatabaseSpec, TablesSpec
from coterie.knowledge.sqlgrammar import sql_grammar
from coterie.knowledge.tables import open_tabular
from coterie.recent import Recent

DRAWN = 4  # statements tried where the first finds nothing
MOST = 128  # tokens of a statement
SHOTS = 4  # worked examples shown, the nearest to the question
NEAR = 70.0  # likeness of a value, of 100, from which it takes the place of one that stands in no row
SHOWN = 20  # rows of an answer that become evidence
ABOUTS = 16  # groups of readers for whom it is known at once what the database is about
WRITTEN = {"sqlite": "SQLite", "postgres": "PostgreSQL", "duckdb": "DuckDB"}


@dataclass(frozen=True)
class Written:
    """A statement that a model wrote, and its log-probability in nats under the grammar."""

    sql: str
    logprob: float


def instruction(db: Database, reader: Reader, samples: bool = False) -> str:
    """What an expert is trained with, and asked with: the tables that this reader may see."""
    tables = describe(db.schema(reader), samples).replace("\n", "; ")
    return (
        f"Write one {WRITTEN[db.dialect]} query that answers the question. Give only the query. The tables: {tables}."
    )


def _base() -> None:
    """No adapter: the base model writes."""


def lessons(db: Database, examples: Sequence[tuple[str, str]], reader: Reader) -> list[dict[str, str]]:
    """Rows that an expert learns to write SQL from: each with the instruction that it will be asked with, and its SQL
    in the common form."""
    about = instruction(db, reader)
    return [{"system": about, "prompt": q, "completion": simplify(sql, db.dialect)} for q, sql in examples]


class Nearest:
    """Worked examples, pairs of question and SQL, by likeness to a question (TF-IDF)."""

    def __init__(self, examples: Sequence[tuple[str, str]]) -> None:
        self.examples = list(examples)
        self.space = TfIdf.learn([q for q, _ in examples])
        self.vectors = self.space([q for q, _ in examples])

    def __call__(self, question: str, most: int = SHOTS) -> list[tuple[str, str]]:
        """The nearest last: right before the question."""
        if not self.examples:
            return []
        order = (-(self.vectors @ self.space([question])[0])).argsort(kind="stable")[:most]
        return [self.examples[i] for i in reversed(order)]

    def likeness(self, question: str) -> float:
        """Of the nearest one, 0 to 1."""
        return float((self.vectors @ self.space([question])[0]).max()) if self.examples else 0.0


class SqlSource:
    """A database or tables that questions are put to, by `adapter` or the base model of `engine`."""

    def __init__(
        self, name: str, db: Database, engine: Callable[[], Engine], adapter: Callable[[], Adapter | None] = _base,
        nearest: Nearest | None = None, about: str = "",
    ) -> None:  # fmt: skip
        """`adapter` is asked at each question: its expert may have been learned again, or rolled back, meanwhile.
        `about`: what people say that it knows."""
        self.name, self.db, self.engine, self.adapter, self.nearest = name, db, engine, adapter, nearest
        self.about = about
        self._abouts = Recent[object, About](ABOUTS, FRESH_S)
        self._grammar = lru_cache(maxsize=16)(sql_grammar)

    def search(self, question: str, reader: Reader) -> list[Evidence]:
        """The rows that answer `question`, each with the SQL that found it. None where no statement could be run, and
        none where it found no rows, or empty ones: that is no evidence, as the statement may be wrong."""
        answer, written = self.answer(question, reader)
        if answer is None or written is None:
            return []
        score = 2.0 ** (written.logprob / max(1, len(written.sql) / 4))  # per token, about: longer is not worse
        what = f"{len(answer.rows)}{' or more' if answer.cut else ''} row(s)"
        out = []
        for number, row in enumerate(answer.rows[:SHOWN], 1):
            if all(cell is None for cell in row):
                continue
            out.append(Evidence(self.name, f"row {number} of {what}", answer.line(row), score, answer.sql))
        return out

    def relevance(self, question: str, vector: Floats, reader: Reader, embed: Embed) -> float:
        """How much `question` (and its vector) is about what this reader may see here, 0 to 1. Raises Unreachable."""
        schema, views = self.db.schema(reader), tuple(self.db.views(reader).values())
        if not schema:
            return 0.0
        known = (views, tuple(schema.values()))
        about = self._abouts.get(known)
        if about is None:
            values = (v for view in views for column in view.columns for v in self.db.values(view, column))
            about = About.of([spoken(table, self.about) for table in schema.values()], values, embed)
            self._abouts.put(known, about)
        alike = self.nearest.likeness(question) if self.nearest else 0.0
        return max(alike, about.relevance(question, vector))

    def messages(self, question: str, reader: Reader, adapter: Adapter | None = None) -> list[Message]:
        """The conversation that asks for SQL; examples are shown to the base model only, an expert has learned them."""
        shots = self.nearest(question) if self.nearest and adapter is None else []
        shown = [m for q, sql in shots for m in _turn(q, sql)]
        about = instruction(self.db, reader, samples=adapter is None and not shots)
        return [{"role": "system", "content": about}, *shown, {"role": "user", "content": question}]

    def write(self, question: str, reader: Reader, drawn: int = 0) -> list[Written]:
        """The likeliest statement, or so many `drawn`, different ones, likeliest first."""
        schema = tuple(self.db.schema(reader).values())
        if not schema:
            raise QueryRefused(f"{self.name}: there is nothing here that {reader.name or 'this reader'} may read")
        engine, constraint = self.engine(), self._grammar(schema, self.db.dialect)
        adapter = self.adapter()
        prompt = engine.base.encode(engine.base.chat(self.messages(question, reader, adapter)))
        plans = [Sampling(MOST, logprobs=0, constraint=constraint)]
        if drawn:
            plans = [replace(plans[0], temperature=0.8, seed=seed) for seed in range(drawn)]
        under_way, out = [engine.submit(prompt, plan, adapter) for plan in plans], dict[str, float]()
        for generation in under_way:
            pieces = list(generation)
            sql, logprob = (
                "".join(p.text for p in pieces).strip(),
                sum(t.logprob or 0 for p in pieces for t in p.tokens),
            )
            if generation.finish == "stop":
                out[sql] = max(logprob, out.get(sql, logprob))
        return [Written(sql, logprob) for sql, logprob in sorted(out.items(), key=lambda o: -o[1])]

    def answer(self, question: str, reader: Reader) -> tuple[Answer | None, Written | None]:
        """What the best statement gave; an empty answer only where every statement that runs finds nothing.

        Raises SourceError where the database itself cannot be asked.
        """
        self.db.views(reader)  # a dead database is an error, and no statement's fault
        empty: tuple[Answer, Written] | None = None
        for drawn in (0, DRAWN):
            try:
                tries = self.write(question, reader, drawn)
            except (ContextTooLong, QueryRefused):
                return None, None
            for written in tries:
                for sql in dict.fromkeys((written.sql, self.with_values(written.sql, question, reader))):
                    try:
                        answer = self.db.run(sql, reader)
                    except Unreachable:
                        raise
                    except (QueryRefused, SourceError):
                        continue
                    if any(cell is not None for row in answer.rows for cell in row):
                        return answer, replace(written, sql=sql)
                    empty = empty or (answer, replace(written, sql=sql))
        return empty or (None, None)

    def with_values(self, sql: str, question: str, reader: Reader) -> str:
        """`sql` with text that is compared for equality, and stands in no row, replaced by the nearest that does."""
        try:
            tree = sqlglot.parse_one(sql, dialect=self.db.dialect)
        except SqlglotError:
            return sql
        views, asked = self.db.views(reader), f" {plain(question)} "
        for test in list(tree.find_all(exp.EQ)):
            column, value = test.this, test.expression
            if not (isinstance(column, exp.Column) and isinstance(value, exp.Literal) and value.is_string):
                continue
            name = column.name.lower()
            tables = [t.name.lower() for t in tree.find_all(exp.Table)]
            known = [
                v
                for view in (views[key] for key in dict.fromkeys(tables) if key in views)
                if name in map(str.lower, view.columns)
                for v in self.db.values(view, name)
            ]  # fmt: skip
            if not known or value.name in known:
                continue
            said = [v for v in known if len(v) > 2 and f" {plain(v)} " in asked]
            best = max(said or known, key=lambda v: (ratio(v.lower(), value.name.lower()), len(v)))
            if said or partial_ratio(best.lower(), value.name.lower()) >= NEAR:
                value.replace(exp.Literal.string(best))
        return tree.sql(dialect=self.db.dialect)


def open_sql(
    name: str, spec: DatabaseSpec | TablesSpec, root: Path, engine: Callable[[], Engine],
    adapter: Callable[[], Adapter | None] = _base,
) -> SqlSource:  # fmt: skip
    """The source that a declaration names; `adapter` gives the version of its expert that answers now.

    Raises CoterieError where an address or an example cannot be used; the database itself need not be alive yet.
    """
    db = open_tabular(name, spec, root)
    files = [f for pattern in spec.examples for f in sorted(root.glob(pattern)) or [root / pattern]]
    examples = [pair for f in files for pair in read_examples(f)]
    return SqlSource(name, db, engine, adapter, Nearest(examples) if examples else None, spec.description)


def read_examples(file: Path) -> list[tuple[str, str]]:
    """Pairs of question and SQL, a JSON object a line. Raises DataError, naming file and line."""
    return [(row["question"], row["sql"]) for _, row in read_objects(file, question=str, sql=str)]


def _turn(question: str, sql: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": sql}]
