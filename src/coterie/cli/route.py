"""`coterie route`: why a question goes to whom."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli.options import FolderOption, Json
from coterie.cli.show import result, table, tell


def route(
    text: Annotated[str, typer.Argument(help="A question; '-' reads stdin.")],
    folder: FolderOption = Path(),
    channel: Annotated[str, typer.Option(help="The channel it comes from, for the rules of coterie.toml.")] = "",
    as_json: Json = False,
) -> None:
    """Explain whom "auto" would ask: scores, thresholds, nearest training inputs, and why not the others."""
    from coterie.business import Business
    from coterie.choose import Chooser
    from coterie.explain import explain

    business = Business.open(folder)
    question = sys.stdin.read() if text == "-" else text
    choice = Chooser(business, business.base(tell)).choose(question, channel)
    found = explain(business, choice)
    result(found, as_json, table(["expert", "share", "similarity", "asks for", "why"], lines(found)))
    if not as_json:
        for scored in found["scores"][:3]:
            tell(f"\nnearest to it in the training data of {scored['name']}:")
            for near in scored["nearest"]:
                text = "(no longer in the data)" if near["text"] is None else near["text"]
                tell(f"  {near['similarity']:.2f}  {text}  [{near['where']}]")


def lines(found: dict[str, Any]) -> list[list[str]]:
    """What `explain` has found as rows of a table, the chosen ones first."""
    shares, why = {e["name"]: e["weight"] for e in found["experts"]}, found["why_not"]
    scores = {s["name"]: s for s in found["scores"]}
    out = []
    for name in [*shares, *(n for n in scores if n not in shares), *(n for n in why if n not in scores)]:
        s = scores.get(name)
        numbers = [f"{s['similarity']:.2f}", f"{s['threshold']:.2f}"] if s else ["", ""]
        reason = why.get(name) or ("a rule of coterie.toml" if found["forced"] else "the nearest")
        out.append([name, f"{shares[name]:.0%}" if name in shares else "", *numbers, reason])
    if not shares:
        out.insert(0, ["base model", "100%", "", "", "no expert is near enough"])
    return out
