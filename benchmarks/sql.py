"""Does an expert write better SQL than the base model, and is it right? GeoQuery and WikiSQL (text2sql-data).

GeoQuery (Zelle & Mooney 1996): split by question as in the file; a LoRA expert is tuned by `coterie fit` on the
training half, in the common form of plainsql.py, and asked as the product asks: under the grammar of the tables, with
the second tries of asksql.py. Right is execution accuracy: the same rows as the wanted query, on the data set's SQLite
database. Base is the same model without the expert, asked in the same way, with the four nearest training questions
shown (`base`); `nearest` is the peer without a model: the SQL of the nearest
training question, by TF-IDF. `expert_greedy` is the expert alone, free of grammar and second tries.

WikiSQL (Zhong et al. 2017): the collection has neither tables' contents nor their columns, so that the names of
columns must be guessed from the question; right is exact logical form, and figures are not those of the official task.

    python benchmarks/sql.py            # trains both experts: about twenty minutes
    python benchmarks/sql.py --quick    # a minute: a few rows, the accuracy is not meant to be good
"""

import argparse
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import Report, finish, need_data, options, screen

from coterie.business import Business, fit
from coterie.data.read import Example
from coterie.data.split import leaks
from coterie.engine.engine import Engine
from coterie.engine.request import Adapter, Sampling
from coterie.evaluation.metrics import wilson
from coterie.evaluation.run import answer_each
from coterie.evaluation.sql import execution_match, same_query
from coterie.evaluation.tasks import geoquery, wikisql
from coterie.knowledge.asksql import Nearest, SqlSource, instruction
from coterie.knowledge.database import open_database
from coterie.knowledge.evidence import Reader
from coterie.knowledge.plainsql import simplify
from coterie.knowledge.specs import DatabaseSpec
from coterie.model.constrain import Constraint

GEO = ("state", "border_info", "city", "highlow", "river", "mountain", "lake")
WHO = Reader("benchmark")
Pair = tuple[str, str]


def tell(text: str) -> None:
    screen.print(text, highlight=False)


def train(folder: Path, name: str, system: str, rows: list[Pair], tests: list[Pair], epochs: int) -> Business:
    """A business of one expert, fitted; one that is there already is kept, as `coterie fit` does."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, pairs in (("train", rows), ("test", tests)):
        lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "coterie.toml").write_text(
        f'[business]\nname = "SQL benchmark"\ncontext = 1024\nslots = 16\n\n[experts.{name}]\n'
        f'system = {json.dumps(system)}\ntrain = "train.jsonl"\ntest = "test.jsonl"\n'
        f"training = {{ epochs = {epochs}, batch = 16, held_out = 0.02, max_tokens = 512 }}\n"
    )
    business, last = Business.open(folder), [0.0]

    def progress(_name: str, p: object) -> None:
        if time.monotonic() - last[0] > 60:
            last[0] = time.monotonic()
            tell(str(p))

    for done in fit(business, tell=tell, progress=progress):
        tell(f"{name}: {done.facts.training.get('seconds')} s of training")
    return business


def plainly(engine: Engine, messages: list[list[dict[str, str]]], adapter: Adapter | None, most: int,
            constraint: Constraint | None = None) -> list[str]:  # fmt: skip
    return [a or "" for a in answer_each(engine, messages, adapter, Sampling(max_tokens=most, constraint=constraint))]


def geo(data: Path, work: Path, args: argparse.Namespace, report: Report) -> None:
    splits, file = geoquery.splits(data), geoquery.database(data)
    pairs = [(e.question, simplify(e.completion, quoted_values=True)) for e in splits.train]
    test = splits.test[:: 35 if args.quick else 1]
    if args.quick:
        pairs = pairs[::6]
    spec = DatabaseSpec.model_validate(
        {"url": f"sqlite:///{file.resolve()}", "tables": {t: {} for t in GEO}, "rows": 10_000}
    )
    db = open_database("geography", spec, data)
    system = instruction(db, WHO)
    asked = [(e.question, e.completion) for e in test]
    twins = set(leaks([q for q, _ in pairs], [q for q, _ in asked]))
    pairs = [pair for i, pair in enumerate(pairs) if i not in twins]  # neither learned, nor shown, nor copied
    start = time.perf_counter()
    business = train(work / "geoquery", "geoquery", system, pairs, asked, 1 if args.quick else args.epochs)
    report.figures["geoquery_fit_s"] = time.perf_counter() - start
    expert: Adapter = ("geoquery", business.library.current("geoquery") or 0)
    engine, nearest = business.engine(), Nearest(pairs)

    def product(adapter: Adapter | None, shots: Nearest | None) -> list[str]:
        source = SqlSource("geography", db, lambda: engine, lambda: adapter, shots)
        with ThreadPoolExecutor(12) as pool:  # the engine generates for all of them at once
            found = list(pool.map(lambda e: source.answer(e.question, WHO)[0], test))
        return [answer.ran if answer else "" for answer in found]

    try:
        timed, answers = time.perf_counter(), {}
        answers["expert"] = product(expert, None)
        report.figures["geoquery_ms_per_answer_12_at_once"] = (time.perf_counter() - timed) / len(test) * 1e3
        messages = [[{"role": "system", "content": system}, {"role": "user", "content": e.question}] for e in test]
        answers["expert_greedy"] = plainly(engine, messages, expert, 160)
        answers["base"] = product(None, nearest)
    finally:
        engine.close()
    answers["nearest"] = [nearest(e.question, 1)[0][1] for e in test]
    rows = []
    for name, found in answers.items():
        right = int(sum(execution_match(file, sql, e.completion) for sql, e in zip(found, test, strict=True)))
        interval = wilson(right, len(test))
        report.figures[f"geoquery_{name}"] = right / len(test)
        rows.append([name, right / len(test), f"{interval.low:.3f} to {interval.high:.3f}", len(test)])
    report.table("GeoQuery, execution accuracy", ["", "accuracy", "95%", "questions"], rows)
    report.figures["geoquery_train_rows"], report.figures["geoquery_left_out_as_test_rows"] = len(pairs), len(twins)
    report.ratios["geoquery_vs_base"] = report.figures["geoquery_expert"] / max(report.figures["geoquery_base"], 1e-9)
    report.ratios["geoquery_vs_nearest"] = report.figures["geoquery_expert"] / max(
        report.figures["geoquery_nearest"], 1e-9
    )


def sample(rows: list[Example], count: int) -> list[Example]:
    """The same rows each time."""
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]


def wiki(data: Path, work: Path, args: argparse.Namespace, report: Report) -> None:
    splits = wikisql.splits(data)
    train_rows, test = (
        sample(splits.train, 48 if args.quick else args.wiki_rows),
        sample(splits.test, 8 if args.quick else 300),
    )
    pairs = [(e.question, e.completion.rstrip("; ")) for e in train_rows]
    asked = [(e.question, e.completion) for e in test]
    system = wikisql.TASK.system
    business = train(work / "wikisql", "wikisql", system, pairs, asked, 1 if args.quick else 2)
    expert: Adapter = ("wikisql", business.library.current("wikisql") or 0)
    engine, nearest = business.engine(), Nearest(pairs)
    alone = [[{"role": "system", "content": system}, {"role": "user", "content": e.question}] for e in test]
    shown = [
        [m[0], *({"role": role, "content": text} for shot in nearest(e.question)
                 for role, text in zip(("user", "assistant"), shot, strict=True)), m[1]]
        for e, m in zip(test, alone, strict=True)
    ]  # fmt: skip
    try:
        answers = {"expert": plainly(engine, alone, expert, 96), "base": plainly(engine, shown, None, 96)}
    finally:
        engine.close()
    rows = []
    for name, found in answers.items():
        right = int(sum(same_query(sql, e.completion) for sql, e in zip(found, test, strict=True)))
        interval = wilson(right, len(test))
        report.figures[f"wikisql_{name}"] = right / len(test)
        rows.append([name, right / len(test), f"{interval.low:.3f} to {interval.high:.3f}", len(test)])
    report.table("WikiSQL, exact logical form, columns unknown", ["", "accuracy", "95%", "questions"], rows)
    report.figures["wikisql_train_rows"] = len(pairs)


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "coterie" / "benchmarks" / "sql")
    parser.add_argument("--epochs", type=int, default=8, help="passes over GeoQuery's training questions")
    parser.add_argument("--wiki-rows", type=int, default=2000, help="training rows of WikiSQL")
    parser.add_argument("--part", choices=("geoquery", "wikisql"), help="only this part")
    parser.add_argument("--fresh", action="store_true", help="train anew")
    args = parser.parse_args()
    data, work = need_data("text2sql"), args.work / ("quick" if args.quick else "full")
    if args.fresh or args.quick:
        shutil.rmtree(work, ignore_errors=True)
    report = Report("Questions to SQL")
    if args.part != "wikisql":
        geo(data, work, args, report)
    if args.part != "geoquery":
        wiki(data, work, args, report)
    finish(report, args)


if __name__ == "__main__":
    main()
