"""`coterie route`: why a question goes to whom."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli.options import FolderOption, Json
from coterie.cli.show import result, table, tell
from coterie.data.read import read
from coterie.errors import CoterieError

if TYPE_CHECKING:  # loaded when the command needs them, so that --help is quick
    from coterie.business import Business
    from coterie.choose import Choice

SHOWN = 10  # experts, of those that scored


def route(
    text: Annotated[str, typer.Argument(help="A question; '-' reads stdin.")],
    folder: FolderOption = Path(),
    channel: Annotated[str, typer.Option(help="The channel it comes from, for the rules of coterie.toml.")] = "",
    as_json: Json = False,
) -> None:
    """Explain whom "auto" would ask: scores, thresholds, nearest training inputs, and why not the others."""
    from coterie.business import Business
    from coterie.choose import Chooser

    business = Business.open(folder)
    question = sys.stdin.read() if text == "-" else text
    choice = Chooser(business, business.base(tell)).choose(question, channel)
    rows = texts_of(business, {where for s in choice.decision.scored[:SHOWN] for where, _ in s.nearest})
    result(explained(choice, rows), as_json, table(["expert", "share", "similarity", "asks for", "why"], lines(choice)))
    if not as_json:
        for s in choice.decision.scored[:3]:
            tell(f"\nnearest to it in the training data of {s.name}:")
            for where, cosine in s.nearest:
                tell(f"  {cosine:.2f}  {rows.get(where, '(no longer in the data)')}  [{where}]")


def explained(choice: "Choice", rows: dict[str, str]) -> dict[str, Any]:
    """A choice as JSON."""
    return {
        "experts": [{"name": name, "weight": share} for name, share in choice.decision.chosen],
        "forced": choice.forced,
        "scores": [
            {**asdict(s), "nearest": [{"where": w, "similarity": c, "text": rows.get(w)} for w, c in s.nearest]}
            for s in choice.decision.scored[:SHOWN]
        ],
        "why_not": choice.why_not(),
    }


def lines(choice: "Choice") -> list[list[str]]:
    """A choice as rows of a table, the chosen ones first."""
    shares, why = dict(choice.decision.chosen), choice.why_not()
    scores = {s.name: s for s in choice.decision.scored[:SHOWN]}
    out = []
    for name in [*shares, *(n for n in scores if n not in shares), *(n for n in why if n not in scores)]:
        s = scores.get(name)
        numbers = [f"{s.similarity:.2f}", f"{s.threshold:.2f}"] if s else ["", ""]
        reason = why.get(name) or ("a rule of coterie.toml" if choice.forced else "the nearest")
        out.append([name, f"{shares[name]:.0%}" if name in shares else "", *numbers, reason])
    if not shares:
        out.insert(0, ["base model", "100%", "", "", "no expert is near enough"])
    return out


def texts_of(business: "Business", wanted: set[str]) -> dict[str, str]:
    """The inputs at these places (file and row), as far as they are still in the data."""
    found: dict[str, str] = {}
    for spec in business.config.experts.values():
        columns: dict[str, str] = {field: column for field, column in spec.columns.items()}
        for file in business.files(spec.train):
            if not any(where.startswith(f"{business.place(str(file))}:") for where in wanted):
                continue
            try:
                for example in read(file, columns, spec.system):
                    where = business.place(example.where)
                    if where in wanted:
                        found[where] = example.question
            except CoterieError:  # the data has changed since: the rows read so far are shown
                continue
    return found
