"""`coterie desk crm`: cases and notes that wait for the CRM or that it did not take; trying and giving up."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from coterie.cli.desk import app as desk
from coterie.cli.options import FolderOption, Json
from coterie.cli.privacy import house_at
from coterie.cli.show import result, table
from coterie.errors import CoterieError

if TYPE_CHECKING:
    from coterie.desk.cases import Told
    from coterie.desk.conversation import Conversations

app = typer.Typer(help="Cases and notes on their way to the CRM.", no_args_is_help=True)
desk.add_typer(app, name="crm")
Entry = Annotated[int, typer.Argument(min=1, help="The entry's number, as `coterie desk crm list` prints it.")]
WORDS = {"due": "waiting", "failed": "failed", "sent": "written"}


@contextmanager
def _outbox(folder: Path) -> "Iterator[tuple[Conversations, Told]]":
    """The conversations of the business, and its audit log."""
    from coterie.desk.conversation import Conversations
    from coterie.desk.rights import audited

    with house_at(folder) as house:
        yield Conversations(house.database, house.seal, house.unseal), audited(house)


@app.command("list")
def list_(
    folder: FolderOption = Path(),
    state: Annotated[
        Literal["waiting", "failed", "written"] | None, typer.Option(help="Only these; default: waiting and failed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what the CRM does not have yet, with the reason, oldest first. Private data is masked in reasons."""
    from coterie.desk.cases import standing

    states = [s for s, word in WORDS.items() if word == state or (state is None and s != "sent")]
    with _outbox(folder) as (talks, _):
        found = standing(talks, states=states)
    now = time.time()
    rows = [
        [str(w["entry"]), w["conversation"], w["kind"], WORDS[w["state"]], str(w["tries"]),
         _clock(w["next_at"], now) if w["state"] == "due" else "", w["reason"] or w["id"]] for w in found
    ]  # fmt: skip
    head = ["entry", "conversation", "what", "state", "tries", "next try", "reason" if state != "written" else "its id"]
    result(found, as_json, table(head, rows) if rows else "Nothing is waiting." if state is None else "None.")


@app.command()
def retry(
    entry: Annotated[int, typer.Argument(min=0, help="The entry's number; with what its conversation has too.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="All that wait or failed.")] = False,
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Try again at once, and for four days more; `coterie serve` does it."""
    from coterie.desk.cases import retry

    if bool(entry) == every:
        raise CoterieError("say either the number of an entry or --all")
    with _outbox(folder) as (talks, told):
        again = retry(talks, entry or None, time.time(), told, "cli")
    result({"retried": again}, as_json, f"tried again: {_numbers(again)}")


@app.command()
def drop(entry: Entry, folder: FolderOption = Path(), as_json: Json = False) -> None:
    """Give an entry up: the CRM never gets it. A case takes its waiting notes with it."""
    from coterie.desk.cases import drop

    with _outbox(folder) as (talks, told):
        gone = drop(talks, entry, told, "cli")
    result({"dropped": gone}, as_json, f"dropped: {_numbers(gone)}")


def _numbers(entries: list[int]) -> str:
    return ", ".join(map(str, entries)) or "none"


def _clock(at: float, now: float) -> str:
    return "now" if at <= now else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"
