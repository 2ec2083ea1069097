"""`coterie learn`, `ask`, `sources`, `mcp`: what the business knows."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli.options import Folder, FolderOption, Json
from coterie.cli.show import bars, result, table, tell
from coterie.errors import CoterieError
from coterie.knowledge.evidence import Evidence, Reader

As = Annotated[str, typer.Option("--as", help="Who asks, for permissions by name.")]
Groups = Annotated[str, typer.Option(help="Groups that the one who asks belongs to, as in 'hr,sales'.")]


def reader_of(name: str, groups: str) -> Reader:
    return Reader(name, frozenset(g.strip() for g in groups.split(",") if g.strip()))


def learn(
    folder: Folder = Path(),
    source: Annotated[
        list[str] | None, typer.Option("--source", "-s", help="Only this source; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Index the declared knowledge: what is new, changed or gone. Goes on where a stopped run left off."""
    from coterie.business import Business
    from coterie.sources import learn

    with bars() as shown:
        done = list(learn(Business.open(folder), source, tell, shown.count))
    rows = [
        [d.source, str(d.indexed), str(d.dropped), str(d.kept), f"{d.passages} {d.unit}", str(len(d.errors))]
        for d in done
    ]
    result([asdict(d) for d in done], as_json,
           table(["source", "indexed", "gone", "as before", "holds", "not read"], rows))  # fmt: skip
    if any(d.errors and not d.passages for d in done):
        raise typer.Exit(2)


def ask(
    question: Annotated[str, typer.Argument(help="What to ask; '-' reads stdin.")],
    folder: FolderOption = Path(),
    expert: Annotated[str, typer.Option("--expert", "-e", help="Who answers: an expert, 'base', or 'auto'.")] = "auto",
    as_: As = "",
    groups: Groups = "",
    search: Annotated[bool, typer.Option("--search", help="Show the evidence, and ask no model.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 200,
    as_json: Json = False,
) -> None:
    """Answer from the sources that the one who asks may read; each sentence with the source that says it."""
    from coterie.answer import Answerer
    from coterie.business import Business
    from coterie.engine.request import Sampling
    from coterie.grounding import Grounded, Grounding
    from coterie.sources import Knowledge

    text = sys.stdin.read() if question == "-" else question
    if not text.strip():
        raise CoterieError("the question is empty")
    business, reader = Business.open(folder), reader_of(as_, groups)
    if not business.config.knowledge.sources:
        raise CoterieError(f"{folder}/coterie.toml declares no [knowledge.NAME]; see docs/knowledge.md")
    knowledge = Knowledge(business, tell=tell)
    try:
        if search:
            found = knowledge.gather(text, reader, tell=tell)
            rows = [[*row[:3], f"{row[3]}\n{e.query}".strip()] for row, e in zip(_rows(found), found, strict=True)]
            result([asdict(e) for e in found], as_json, table(["", "source", "where", "text"], rows))
            return
        answerer = Answerer.open(business, tell)
        try:
            said, grounded = "", None
            for part in Grounding(answerer, knowledge).answer(expert, text, reader, Sampling(max_tokens), tell=tell):
                if isinstance(part, Grounded):
                    grounded = part
                    break
                said += part
                if not as_json:
                    print(part, end="", flush=True)
            assert grounded is not None
            if not as_json:
                print()
                cited = {s.cites for s in grounded.sentences}
                for row in _rows(grounded.evidence):
                    if int(row[0]) in cited:
                        found_by = grounded.evidence[int(row[0]) - 1]
                        tell(f"  [{row[0]}] {row[1]}: {row[2]}{f' ({found_by.link})' if found_by.link else ''}")
                        if found_by.query:
                            tell(f"      {' '.join(found_by.query.split())}")
            else:
                shown: dict[str, Any] = {
                    "text": said.strip(), "known": grounded.known, "sources": grounded.sources(),
                    "sentences": [asdict(s) for s in grounded.sentences], "problems": grounded.problems,
                }  # fmt: skip
                result(shown, True, "")
        finally:
            answerer.close()
    finally:
        knowledge.close()


def _rows(found: list[Evidence]) -> list[list[str]]:
    return [[str(n), e.source, e.where, " ".join(e.text.split())[:200]] for n, e in enumerate(found, 1)]


def sources(folder: Folder = Path(), as_: As = "", groups: Groups = "", as_json: Json = False) -> None:
    """List the sources that the one who asks may read: files, freshness, and what could not be read."""
    from coterie.business import Business
    from coterie.sources import overview

    found = overview(Business.open(folder), reader_of(as_, groups))
    rows = [
        [
            s["name"],
            s["kind"],
            str(len(s["files"])),
            f"{s['passages']} {s['unit']}",
            s["indexed"] or "never",
            str(len(s["errors"])),
        ]
        for s in found
    ]
    result(found, as_json, table(["source", "kind", "files", "holds", "indexed", "errors"], rows))
    if not as_json:
        for s in found:
            for error in s["errors"]:
                tell(f"{s['name']}: {error}")


def mcp(folder: Folder = Path(), as_: As = "", groups: Groups = "") -> None:
    """Serve `search` and `ask` over the Model Context Protocol on stdin and stdout (pip install 'coterie[mcp]')."""
    from coterie.mcp import serve

    serve(folder, reader_of(as_, groups), tell)
