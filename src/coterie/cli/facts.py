"""`coterie facts`: what a model reads in documents for a graph, and what people decide of it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from coterie.cli.knowledge import As, Groups, reader_of
from coterie.cli.options import Folder, FolderOption, Json
from coterie.cli.show import bars, result, table, tell
from coterie.errors import CoterieError

app = typer.Typer(help="Facts that a model reads in documents for a graph, and a person accepts.", no_args_is_help=True)

Ids = Annotated[list[str], typer.Argument(help="The ids, as `coterie facts list` gives them.")]


@app.command("propose")
def propose_facts(
    folder: Folder = Path(),
    source: Annotated[str, typer.Option("--source", "-s", help="Only for this graph.")] = "",
    as_json: Json = False,
) -> None:
    """Let a model read the passages that it has not read yet. Goes on where a stopped run left off."""
    from coterie.business import Business
    from coterie.facts import propose

    with bars() as shown:
        done = dict(propose(Business.open(folder), source, tell, shown.count))
    result(done, as_json, table(["graph", "new proposals"], [[name, str(new)] for name, new in done.items()]))


@app.command("list")
def list_facts(
    folder: Folder = Path(),
    state: Annotated[
        Literal["waiting", "accepted", "rejected", "all"], typer.Option(help="Those in this state.")
    ] = "waiting",
    as_: As = "",
    groups: Groups = "",
    as_json: Json = False,
) -> None:
    """List proposals from documents that the one who asks may read."""
    from coterie.business import Business
    from coterie.facts import listed

    found = listed(Business.open(folder), reader_of(as_, groups), None if state == "all" else state)
    rows = [[p.id, graph, p.where, f"{p.subject}, {p.relation}: {p.object}", p.state, p.by] for graph, p in found]
    result(
        [{"id": p.id, "graph": graph, **asdict(p)} for graph, p in found],
        as_json, table(["id", "graph", "document", "fact", "state", "by"], rows),
    )  # fmt: skip


@app.command("accept")
def accept_facts(
    ids: Ids, folder: FolderOption = Path(), as_: As = "", groups: Groups = "", as_json: Json = False
) -> None:
    """Accept proposals: they are in the graph at once, read by whoever may read their document."""
    _decide(ids, True, folder, as_, groups, as_json)


@app.command("reject")
def reject_facts(
    ids: Ids, folder: FolderOption = Path(), as_: As = "", groups: Groups = "", as_json: Json = False
) -> None:
    """Reject proposals, or take back what was accepted; they are not proposed again."""
    _decide(ids, False, folder, as_, groups, as_json)


def _decide(ids: list[str], accept: bool, folder: Path, as_: str, groups: str, as_json: bool) -> None:
    from coterie.business import Business
    from coterie.facts import decide, listed

    business, reader = Business.open(folder), reader_of(as_, groups)
    if unknown := set(ids) - {p.id for _, p in listed(business, reader, None)}:
        raise CoterieError(f"there is no proposal {min(unknown)!r} that you may read; `coterie facts list` lists them")
    changed = decide(business, ids, accept, as_ or "cli", reader)
    result({"changed": changed}, as_json, f"{changed} {'accepted' if accept else 'rejected'}")
