"""`coterie suite` and `coterie compare`: tasks, several models, one table; and whether a difference is real."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli.options import Folder, Json
from coterie.cli.show import Bars, bars, result, table, tell
from coterie.errors import CoterieError, DataError

if TYPE_CHECKING:
    from coterie.business import Business
    from coterie.engine.engine import Engine
    from coterie.experts.library import ExpertFacts

app = typer.Typer(help="Measure the base model and experts on data sets.", no_args_is_help=True)
TaskData = Annotated[list[str] | None, typer.Option("--task", help="NAME=PATH: task and its data; may be repeated.")]
Who = Annotated[list[str] | None, typer.Option("--expert", "-e", help="An expert or 'base'; may be repeated.")]
Limit = Annotated[int, typer.Option(min=0, help="Only the first rows; 0: all (at most 1,000).")]


@app.command("list")
def list_tasks(as_json: Json = False) -> None:
    """The built-in tasks. Your own is a .toml file; see docs/evaluate.md."""
    from coterie.evaluation.task import find, names

    found = [{"task": n, "about": find(n).about, "metric": find(n).metric} for n in names()]
    result(found, as_json, table(["task", "about", "metric"], [list(f.values()) for f in found]))


@app.command()
def data(
    task: Annotated[str, typer.Argument(help="NAME=PATH: the task and where its data lies.")],
    target: Annotated[Path, typer.Argument(help="A new folder for train.jsonl and test.jsonl.")],
    as_json: Json = False,
) -> None:
    """Write a task's rows, apart and without near-duplicates, as files that `coterie fit` learns from."""
    from coterie.data.write import write_rows
    from coterie.evaluation.suite import parse_task, prompt_of
    from coterie.evaluation.task import find
    from coterie.files import check_free

    name, path = parse_task(task)
    check_free(target)
    found, counts = find(name), {}
    splits = found.splits(path)
    target.mkdir(parents=True)
    for part, rows in zip(("train", "test"), splits, strict=True):
        lines = ({"messages": [*prompt_of(found, None, e), e.messages[-1]]} for e in rows)
        counts[part] = write_rows(target / f"{part}.jsonl", lines)
    result(
        {"path": str(target), **counts}, as_json, f"{target}: {counts['train']} rows to learn, {counts['test']} to test"
    )


@app.command()
def run(
    folder: Folder = Path(), task: TaskData = None, expert: Who = None, limit: Limit = 0,
    likelihood: Annotated[bool, typer.Option("--likelihood", help="Score choices by probability.")] = False,
    chart: Annotated[list[Path] | None, typer.Option(help="Draw it, .svg or .png; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep every row's answer and score in this JSON file.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure models on tasks: a table with 95% intervals, the gain over the base model and its p."""
    from coterie.evaluation import charts
    from coterie.evaluation.suite import Measured, gains, measure, parse_task
    from coterie.evaluation.suite import chart as draw
    from coterie.evaluation.task import find
    from coterie.files import write_atomic

    if not task:
        raise CoterieError("give at least one --task NAME=PATH; `coterie suite list` shows the tasks")
    wanted = [(find(name), path) for name, path in map(parse_task, task)]
    for file in chart or []:
        charts.check_ending(file)
    measured: list[Measured] = []
    with _opened(folder, expert or ["base"]) as (business, engine, models, shown):
        for found, path in wanted:
            splits, score = found.splits(path), found.score(path)
            rows = min(limit or len(splits.test), len(splits.test))
            for facts in models:
                who = facts.name if facts else "base"
                count = partial(shown.count, f"{found.name}: {who}", total=rows)
                with _engine_of(business, engine, facts) as own:
                    measured.append(measure(own, found, splits, score, facts, limit, likelihood, count))
    better = gains(measured)
    for file in chart or []:
        charts.save(draw(measured), file)
    if out:
        kept = [{**m.json(), "scores": m.scores, "answers": m.answers} for m in measured]
        write_atomic(out, json.dumps({"measured": kept, "gains": better}, ensure_ascii=False, indent=1) + "\n")
    result({"measured": [m.json() for m in measured], "gains": better}, as_json, _table(measured, better))


def compare(
    folder: Folder = Path(), expert: Who = None, task: TaskData = None,
    data: Annotated[Path | None, typer.Option(help="A file of rows; default: the declared test data.")] = None,
    limit: Limit = 0, as_json: Json = False,
) -> None:  # fmt: skip
    """Are two experts really different? Both answer the same rows: the paired difference, its interval and p.

    For right-or-wrong scores p is McNemar's exact one beside the bootstrap's.
    """
    from coterie.evaluation.significance import compare_scores
    from coterie.evaluation.suite import measure, parse_task
    from coterie.evaluation.task import Splits, Task, find

    if not expert or len(expert) != 2:
        raise CoterieError("give --expert twice: the two to compare ('base' is the base model)")
    if task and (len(task) > 1 or data):
        raise CoterieError("give one --task NAME=PATH or one --data FILE, not both")
    with _opened(folder, expert) as (business, engine, models, shown):
        if task:
            name, path = parse_task(task[0])
            found = find(name)
            splits, score = found.splits(path), found.score(path)
        else:
            name = next((str(m.training.get("task", m.name)) for m in models if m), "")
            listed: Any = [str(data.resolve())] if data else business.spec(name).test if name else []
            rows = list(islice(business.examples(name, listed), limit or None)) if listed else []
            if not rows:
                raise DataError(
                    f"no rows to compare on: give --data FILE or --task NAME=PATH, or declare test for {name!r}"
                )
            options = next((m.choices for m in models if m and m.choices), ())
            longest = max(len(engine.base.encode(e.completion)) for e in rows)
            splits = Splits(rows, rows)
            found = Task(name, "", lambda _: splits, metric="exact_match" if options else "token_f1",
                         choices=bool(options), max_tokens=min(longest + 8, engine.context // 2))  # fmt: skip
            score = found.score(Path())
        total = min(limit or len(splits.test), len(splits.test))
        sides = []
        for who, facts in zip(expert, models, strict=True):
            count = partial(shown.count, f"{who} answers", total=total)
            with _engine_of(business, engine, facts) as own:
                sides.append(measure(own, found, splits, score, facts, limit, False, count))
    figures = compare_scores(sides[0].scores, sides[1].scores)
    metric = sides[0].figures["metric"]
    value = {"a": expert[0], "b": expert[1], "metric": metric, "a_figures": sides[0].figures,
             "b_figures": sides[1].figures, **figures}  # fmt: skip
    result(value, as_json, _sentence(expert, metric, sides, figures))


@contextmanager
def _opened(folder: Path, who: list[str]) -> Iterator[tuple["Business", "Engine", list["ExpertFacts | None"], Bars]]:
    """The business, an engine for measuring, and the models named, each checked before anything is loaded."""
    from coterie.business import Business

    business = Business.open(folder)
    models = [None if name == "base" else business.library.facts(name) for name in who]
    engine = business.engine(tell, slots=32, queue=64)
    try:
        with bars() as shown:
            yield business, engine, models, shown
    finally:
        engine.close()


@contextmanager
def _engine_of(business: "Business", engine: "Engine", facts: "ExpertFacts | None") -> Iterator["Engine"]:
    """The engine in which an expert answers: its own where it is a whole model, which is closed again."""
    own = business.own_engine(facts, slots=32, queue=64) if facts else None
    try:
        yield own or engine
    finally:
        if own:
            own.close()


def _interval(figures: dict[str, Any]) -> str:
    v = figures[figures["metric"]]
    return f"{v['value']:.1%} ({v['low']:.1%} to {v['high']:.1%})"


def _table(measured: Any, better: Any) -> Any:
    gain = {(g["task"], g["who"]): g for g in better}
    rows = []
    for m in measured:
        f, g = m.figures, gain.get((m.task, m.who))
        more = [f"macro-F1 {f['macro_f1']:.1%}"] if "macro_f1" in f else []
        more += [f"ECE {f['calibration']['ece']:.3f}"] if "calibration" in f else []
        if f.get("perplexity"):
            more.append(
                f"perplexity {f['perplexity']['per_token']:.2f} a token, {f['perplexity']['per_byte']:.3f} a byte"
            )
        more += [f"{f['rows_too_long']} rows too long"] if "rows_too_long" in f else []
        d = g["difference"] if g else None
        change = (
            f"{100 * d['value']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f}), p = {d['p']:.3g}" if d else ""
        )
        rows.append(
            [m.task, m.who, str(f["rows"]), f["metric"].replace("_", " "), _interval(f), change, ", ".join(more)]
        )
    return table(["task", "model", "rows", "metric", "value (95% CI)", "gain, points", ""], rows)


def _sentence(expert: list[str], metric: str, sides: Any, figures: dict[str, Any]) -> str:
    d = figures["difference"]
    lines = [
        f"{name}: {metric.replace('_', ' ')} {_interval(s.figures)}" for name, s in zip(expert, sides, strict=True)
    ]
    lines.append(
        f"{expert[1]} less {expert[0]}: {100 * d['value']:+.1f} points (95% CI {100 * d['low']:+.1f} to "
        f"{100 * d['high']:+.1f}) on {figures['rows']} rows, p = {d['p']:.3g}"
    )
    if "mcnemar_p" in figures:
        lines.append(
            f"McNemar's exact p = {figures['mcnemar_p']:.3g}: only {expert[0]} is right on {figures['only_a_right']} "
            f"rows, only {expert[1]} on {figures['only_b_right']}"
        )
    return "\n".join(lines)
