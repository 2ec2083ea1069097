"""`coterie desk webhooks`: how far other systems were told what happens, and telling it again."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.desk import app as desk
from coterie.cli.options import FolderOption, Json
from coterie.cli.show import result, table
from coterie.errors import CoterieError

app = typer.Typer(help="Other systems that are told what happens at the desk.", no_args_is_help=True)
desk.add_typer(app, name="webhooks")


@app.command("list")
def list_(folder: FolderOption = Path(), as_json: Json = False) -> None:
    """List the addresses: the last entry that each has taken, and what went wrong since."""
    from coterie.business import Business
    from coterie.desk.desk import database_of
    from coterie.desk.webhook import standing

    found = standing(database_of(Business.open(folder)))
    rows = [[h["url"], str(h["told"]), str(h["waiting"]), str(h["failed"]), h["error"]] for h in found]
    result(found, as_json, table(["address", "told up to", "behind it", "failures in a row", "last problem"], rows))


@app.command()
def replay(
    entry: Annotated[int, typer.Argument(min=0, help="From this entry on: its id, as X-Coterie-Event gave it.")] = 0,
    since: Annotated[str, typer.Option(help="From this time on, such as 2026-11-24 or 2026-11-24T09:30.")] = "",
    url: Annotated[str, typer.Option(help="Only this address; default: all.")] = "",
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Tell it again, in order and under the same ids; `coterie serve` sends it."""
    from coterie.business import Business
    from coterie.desk.desk import database_of
    from coterie.desk.webhook import replay, standing

    if bool(entry) == bool(since):
        raise CoterieError("say either the id of an entry or --since a time")
    try:
        at = datetime.fromisoformat(since).timestamp() if since else None
    except ValueError as error:
        raise CoterieError(f"--since: {since!r} is no time such as 2026-11-24T09:30") from error
    database = database_of(Business.open(folder))
    urls = [url] if url else [str(h["url"]) for h in standing(database)]
    if not urls:
        raise CoterieError("no webhook was told anything yet; they are declared in [[desk.webhooks]]")
    done = {u: replay(database, u, since=at, entry=entry or None) for u in urls}
    rows = [[u, str(n)] for u, n in done.items()]
    result(done, as_json, table(["address", "entries to be told again"], rows))
