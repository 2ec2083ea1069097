"""`coterie data`: look at data, mend it, ask whether it is enough and like production, and make more of it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from coterie.cli.knowledge import reader_of
from coterie.cli.options import FolderOption, Json
from coterie.cli.show import bars, result, table, tell
from coterie.data.read import Example, Source, read_inputs
from coterie.errors import CoterieError, DataError

if TYPE_CHECKING:  # loaded when a command needs them, so that --help is quick
    from coterie.business import Business
    from coterie.data.curve import Measure
    from coterie.data.report import Report

app = typer.Typer(help="Check data, mend it, and ask whether it is enough.", no_args_is_help=True)
What = Annotated[Path, typer.Argument(help="A data file, or the folder of a business.")]
Expert = Annotated[str, typer.Option("--expert", "-e", help="In a folder: the expert whose data it is.")]
Test = Annotated[list[Path] | None, typer.Option("--test", help="Test data; may be repeated.")]
Prompt = Annotated[str, typer.Option("--prompt", help="Column of the file that holds the question.")]
Completion = Annotated[str, typer.Option("--completion", help="Column of the file that holds the answer or label.")]
Words = Annotated[bool, typer.Option("--words", help="Compare words instead of the base model's vectors: faster.")]
Train = Annotated[bool, typer.Option("--train", help="Train the expert itself for each measurement: slow, and exact.")]
Limit = Annotated[int, typer.Option(min=0, help="Only so many rows, by chance; 0: all.")]


@dataclass(frozen=True)
class Target:
    """A data set to look at: of a declared expert, or of files alone."""

    title: str
    source: Source
    test: Source | None
    business: Optional["Business"] = None
    expert: str = ""


def targets(paths: list[Path], expert: str, test: list[Path] | None, prompt: str, completion: str) -> list[Target]:
    """The data sets that the arguments name. Raises CoterieError."""
    columns = {k: v for k, v in (("prompt", prompt), ("completion", completion)) if v}
    from coterie.business import Business

    if len(paths) == 1 and paths[0].is_dir():
        business = Business.open(paths[0])
        if not business.config.experts:
            raise CoterieError(f"{paths[0]}/coterie.toml declares no experts; name data files instead")
        out = []
        for name in [expert] if expert else business.config.experts:
            spec = business.spec(name)
            train = Source(tuple(business.files(spec.train)), columns or dict(spec.columns.items()), spec.system)
            tests = tuple(test or business.files(spec.test))
            out.append(Target(name, train, replace(train, paths=tests) if tests else None, business, name))
        return out
    if expert:
        raise CoterieError("--expert needs the folder of a business, not data files")
    train = Source(tuple(paths), columns)
    return [Target(", ".join(p.name for p in paths), train, Source(tuple(test), columns) if test else None)]


def one_target(path: Path, expert: str, test: list[Path] | None, prompt: str, completion: str) -> Target:
    """`targets`, where there must be one."""
    found = targets([path], expert, test, prompt, completion)
    if len(found) > 1:
        raise CoterieError(
            f"{path} declares several experts; choose with --expert: {', '.join(t.expert for t in found)}"
        )
    return found[0]


@app.command()
def check(
    paths: Annotated[list[Path], typer.Argument(help="Data files, or the folder of a business.")],
    test: Test = None, expert: Expert = "", prompt: Prompt = "", completion: Completion = "",
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    fix: Annotated[list[str] | None, typer.Option(help="Mend this fault; may be repeated. Needs --out.")] = None,
    out: Annotated[Path | None, typer.Option(help="New file (.jsonl, .csv) for the mended rows.")] = None,
    context: Annotated[int, typer.Option(min=16, help="Tokens that a row may have, where no expert says.")] = 1024,
    labels: Annotated[
        bool | None, typer.Option("--labels/--free-text", help="What answers are; default: seen from the data.")
    ] = None,
    language: Annotated[str, typer.Option(help="Expected language, as 'en'; default: that of most rows.")] = "",
    terms: Annotated[Path | None, typer.Option(help="File of more terms to look for, one a line.")] = None,
    region: Annotated[str, typer.Option(help="Region of phone numbers without a country code.")] = "GB",
    presidio: Annotated[bool, typer.Option("--presidio", help="Ask presidio too (needs coterie[presidio]).")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Report duplicates, conflicts, label errors, leaks, private data and more, and write mended copies."""
    from coterie.curation import token_counter
    from coterie.data.fix import check_fixes
    from coterie.data.fix import fix as mend
    from coterie.data.insults import Insults
    from coterie.data.page import write_page
    from coterie.data.private import finder
    from coterie.data.quality import Checks
    from coterie.data.quality import check as examine

    found = targets(paths, expert, test, prompt, completion)
    if bool(fix) != bool(out):
        raise CoterieError("--fix NAME and --out NEWFILE go together")
    if fix and len(found) > 1:
        raise CoterieError(f"--fix mends one data set; choose with --expert: {', '.join(t.expert for t in found)}")
    if fix and out:
        check_fixes(fix, out)
    if html and html.suffix != ".html":
        raise CoterieError(f"--html {html}: the page's name ends in .html")
    private = finder(region, presidio)
    how = Checks(None, context, labels, language, private, Insults(terms))
    reports = []
    for t in found:
        mine = how
        if t.business:
            spec = t.business.spec(t.expert)
            mine = replace(how, count=token_counter(t.business, tell), context=spec.training.max_tokens,
                           labels=True if spec.choices else labels)  # fmt: skip
        reports.append((t.title, examine(t.source, t.test, mine)))
    if html:
        write_page(html, reports)
        tell(f"{html}: written")
    mended = mend(reports[0][1], found[0].source, fix, out, private) if fix and out else None
    value = [{"title": title, **report.json(), "mended": mended} for title, report in reports]
    result(value if len(value) > 1 else value[0], True, "") if as_json else _show(reports)
    if mended:
        tell(f"{out}: {mended['written']} rows; {mended['dropped']} left out, {mended['changed']} changed")


def _show(reports: list[tuple[str, "Report"]]) -> None:
    """One table for each report, and the first row of each finding."""
    for title, r in reports:
        n, labels = r.lengths, f", {len(r.labels)} labels" if r.labels else ""
        print(f"{title}: {r.rows:,} rows{labels}, {n['total']:,} tokens ({n['counted_by']}; half of the rows have at "
              f"most {n['p50']}, the longest {n['longest']}), language {next(iter(r.languages), '')}")  # fmt: skip
        rows = []
        for f in r.findings:
            first = f.places[0] if f.places else {"place": "", "text": "", "note": ""}
            said = " ".join(filter(None, (first["place"], first["text"][:60], first["note"])))
            rows.append(["problem" if f.grave else "note", f"{f.count:,}", f.title, said, " ".join(f.fixes)])
        result(None, False, table(["", "rows", "finding", "for example", "--fix"], rows) if rows else "no faults found")


def _train_and_test(t: Target, limit: int) -> tuple[list[Example], list[Example]]:
    """Rows to learn from and rows to measure on; without test data, a fifth of the rows (at most 1000)."""
    from coterie.data.split import draw, hold_out, leaks

    rows = draw(t.source.examples(), limit)
    if t.test:
        tests = draw(t.test.examples(), limit)
        bad = set(leaks([e.question for e in rows], [e.question for e in tests]))
        rows = [e for i, e in enumerate(rows) if i not in bad]
    else:
        kept, held = hold_out([e.question for e in rows], 0.2, 1000, 0)
        rows, tests = [rows[i] for i in kept], [rows[i] for i in held]
    if len(rows) < 20 or not tests:
        raise DataError(
            f"{t.title}: {len(rows)} rows to learn from and {len(tests)} to measure on; 20 and 1 are needed"
        )
    return rows, tests


def _measure(t: Target, rows: list[Example], tests: list[Example], words: bool, train: bool) -> tuple["Measure", str]:
    """What scores a subset of `rows` on `tests`, and its name. Raises CoterieError."""
    from coterie.curation import embedder, expert_measure
    from coterie.data.curve import probe_measure

    if train:
        if not t.business:
            raise CoterieError("--train needs the folder of a business, whose coterie.toml says how to train")
        return expert_measure(t.business, t.expert, rows, tests, tell), f"the expert {t.expert} itself"
    labels = [e.completion for e in rows]
    if len(set(labels)) > max(2, len(labels) // 3):
        raise DataError(f"{t.title}: its answers are free text, which the quick probe cannot learn; add --train")
    vectors = embedder(t.business, tell) if t.business and not words else None
    said = "a probe on the base model's vectors" if vectors else "a probe on words"
    asked, wanted = [e.question for e in tests], [e.completion for e in tests]
    return probe_measure([e.question for e in rows], labels, asked, wanted, vectors), said


@app.command()
def curve(
    what: What, test: Test = None, expert: Expert = "", prompt: Prompt = "", completion: Completion = "",
    steps: Annotated[int, typer.Option(min=3, max=20, help="Sizes to measure.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, max=50, help="Random subsets of each size.")] = 3,
    limit: Limit = 5000, words: Words = False, train: Train = False,
    chart: Annotated[Path | None, typer.Option(help="Draw the curve: a file ending in .svg or .png.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Is it enough? Measure growing subsets, and say what twice the data would bring."""
    from coterie.curation import curve_chart, keep_curve
    from coterie.data.curve import learning_curve
    from coterie.evaluation import charts

    if chart:
        charts.check_ending(chart)
    t = one_target(what, expert, test, prompt, completion)
    rows, tests = _train_and_test(t, limit)
    measure, by = _measure(t, rows, tests, words, train)
    with bars() as shown:
        found = learning_curve(measure, [e.completion for e in rows], steps, repeats,
                               tell=lambda i, n: shown.count("measuring", i, n))  # fmt: skip
    facts = {"title": t.title, "measured_by": by, **found.json()}
    if t.business:
        keep_curve(t.business, t.expert, facts)
    if chart:
        charts.save(curve_chart(facts), chart)
        tell(f"{chart}: written")
    shown_rows = [[f"{p.rows:,}", f"{p.score:.1%}", f"{p.low:.1%} to {p.high:.1%}"] for p in found.points]
    result(facts, as_json, table(["rows", "score", "95% interval"], shown_rows))
    if not as_json:
        print(f"\nmeasured by {by}, on {found.test_rows:,} rows")
        for f in found.forecasts:
            print(f)


@app.command()
def compare(
    train: Annotated[Path, typer.Argument(help="Training data: a file, or the folder of a business.")],
    production: Annotated[Path, typer.Argument(help="What people asked: .jsonl, .csv, .parquet, or .txt, one a line.")],
    expert: Expert = "", prompt: Prompt = "", completion: Completion = "",
    column: Annotated[str, typer.Option(help="Column of the production file that holds the question.")] = "",
    words: Words = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Is it like production? Coverage, drift, and examples of what the training data lacks."""
    from coterie.curation import embedder
    from coterie.data.compare import compare as set_side_by_side

    t = one_target(train, expert, None, prompt, completion)
    asked = list(read_inputs(production, column))
    vectors = embedder(t.business, tell) if t.business and not words else None
    found = set_side_by_side([e.question for e in t.source.examples()], asked, vectors)
    c, d = found.coverage, found.drift
    missing = [
        [f"{m.count:,}", f"{m.share:.1%}", " | ".join(e["text"][:60] for e in m.examples[:3])] for m in found.missing
    ]
    lines = table(["inputs", "share", "missing from the training data, for example"], missing)
    result(found.json(), as_json, lines if missing else "nothing is missing")
    if not as_json:
        print(
            f"\ncoverage {c.value:.1%} (95% interval {c.low:.1%} to {c.high:.1%}) of {found.production_rows:,} inputs"
        )
        print(
            f"drift {d.value:.3f} (95% interval {d.low:.3f} to {d.high:.3f}; 0.5: no difference, 1: told apart always)"
        )
        print(found.verdict)


@app.command()
def augment(
    what: What,
    out: Annotated[Path, typer.Option(help="New file (.jsonl, .csv) for the made rows.")],
    method: Annotated[list[str] | None, typer.Option(help="edit, carrier, swap or model; may be repeated.")] = None,
    test: Test = None, expert: Expert = "", prompt: Prompt = "", completion: Completion = "",
    per_row: Annotated[int, typer.Option(min=1, max=20, help="Rows to make by each method for each row.")] = 1,
    seed: Annotated[int, typer.Option(help="Makes it repeatable.")] = 0,
    limit: Limit = 0, as_json: Json = False,
) -> None:  # fmt: skip
    """Make more rows, marked as synthetic and free of test rows; `effect` measures what they bring."""
    from coterie.curation import paraphraser
    from coterie.data.augment import Made
    from coterie.data.augment import augment as make
    from coterie.data.split import draw
    from coterie.data.write import check_new, write_rows

    t = one_target(what, expert, test, prompt, completion)
    check_new(out)
    methods = method or ["edit", "carrier", "swap"]
    rows = list(t.source.rows())
    only = set(draw(range(len(rows)), limit, seed)) if limit else None
    tests = list(t.test.examples()) if t.test else []
    if not tests:
        tell(f"{t.title}: no test data named, so made rows may repeat it; name it with --test")
    engine = t.business.engine(tell, slots=8) if t.business and "model" in methods else None
    made = Made()
    try:
        say = paraphraser(engine, seed=seed) if engine else None
        write_rows(out, make(rows, t.source.columns, tests, methods, per_row, made, seed, say, only))
    finally:
        if engine:
            engine.close()
    value = {"out": str(out), **vars(made)}
    by = ", ".join(f"{n:,} by {m}" for m, n in made.methods.items()) or "nothing to reword"
    text = (f"{out}: {made.rows:,} rows ({by}); thrown away: {made.repeats:,} repeats, {made.leaks:,} like test rows, "
            f"{made.off_label:,} that no longer say the same")  # fmt: skip
    result(value, as_json, text)


@app.command()
def sql(
    source: Annotated[str, typer.Argument(help="A declared database, or tables, with `examples`.")],
    out: Annotated[Path, typer.Option(help="New file (.jsonl) for the rows.")],
    folder: FolderOption = Path(),
    as_: Annotated[str, typer.Option("--as", help="Who will ask, for permissions by name.")] = "",
    groups: Annotated[str, typer.Option(help="Groups that they belong to: it learns the tables that these see.")] = "",
    as_json: Json = False,
) -> None:
    """Make the training rows of an expert that writes SQL out of a source's `examples`."""
    from coterie.business import Business
    from coterie.data.write import check_new, write_rows
    from coterie.knowledge.asksql import lessons, read_examples
    from coterie.knowledge.specs import DatabaseSpec, TablesSpec
    from coterie.knowledge.tables import open_tabular

    check_new(out)
    business = Business.open(folder)
    spec = business.config.knowledge.sources.get(source)
    if not isinstance(spec, DatabaseSpec | TablesSpec):
        raise CoterieError(f"{folder}/coterie.toml declares no database and no tables [knowledge.{source}]")
    files = [f for pattern in spec.examples for f in sorted(business.folder.glob(pattern))]
    examples = [pair for file in files for pair in read_examples(file)]
    if not examples:
        raise CoterieError(f"knowledge.{source}.examples: no file with questions and their SQL; name one")
    made = write_rows(out, lessons(open_tabular(source, spec, business.folder), examples, reader_of(as_, groups)))
    result({"out": str(out), "rows": made}, as_json, f"{out}: {made:,} rows")


@app.command()
def effect(
    what: What,
    added: Annotated[Path, typer.Option("--with", help="The rows to add: a file of the same columns.")],
    test: Test = None, expert: Expert = "", prompt: Prompt = "", completion: Completion = "",
    limit: Limit = 5000, words: Words = False, train: Train = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what added rows bring: the same test rows, without them and with them, paired."""
    import numpy as np

    from coterie.data.effect import effect as pair
    from coterie.data.split import leaks

    t = one_target(what, expert, test, prompt, completion)
    rows, tests = _train_and_test(t, limit)
    kept = {Path(e.where).name for e in rows}
    more = [e for e in replace(t.source, paths=(added,)).examples() if _origin(e) is None or _origin(e) in kept]
    bad = set(leaks([e.question for e in more], [e.question for e in tests]))
    more = [e for i, e in enumerate(more) if i not in bad]
    if not more:
        raise DataError(f"{added}: no rows that could be added; all repeat test rows, or were made from rows left out")
    measure, by = _measure(t, [*rows, *more], tests, words, train)
    without, having = (measure(np.arange(n)) for n in (len(rows), len(rows) + len(more)))
    found = pair(len(rows), len(more), without, having)
    result({"title": t.title, "measured_by": by, **found.json()}, as_json, f"{found}\nmeasured by {by}")


def _origin(example: Example) -> str | None:
    """File and line that a made row came from, None for others: a row made from a held-out one would be a leak.

    Without the folders, which are other ones where the command is run elsewhere.
    """
    mark = example.facts.get("synthetic")
    return Path(str(mark["from"])).name if isinstance(mark, dict) and "from" in mark else None
