"""`coterie desk`: invite agents, calibrate when to hand over, list and show conversations."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from coterie.cli.options import FolderOption, Json
from coterie.cli.privacy import house_at
from coterie.cli.procedures import procedures
from coterie.cli.show import bars, result, table, tell
from coterie.errors import CoterieError, DataError

if TYPE_CHECKING:  # loaded when the command needs them, so that --help is quick
    from coterie.business import Business
    from coterie.data.read import Example
    from coterie.desk.conversation import Conversations
    from coterie.desk.message import Conversation

app = typer.Typer(help="Customer service: agents, conversations, and when to hand over.", no_args_is_help=True)
app.command("procedures")(procedures)


@app.command()
def invite(
    name: Annotated[str, typer.Argument(help="The agent's name, shown to customers.")],
    folder: FolderOption = Path(),
    supervisor: Annotated[bool, typer.Option("--supervisor", help="May see the overview.")] = False,
    address: Annotated[str, typer.Option(help="Where `coterie serve` can be reached.")] = "http://localhost:8000",
    as_json: Json = False,
) -> None:
    """Print a link that lets an agent without an account into the desk for a week, or until `desk uninvite`."""
    from coterie.business import Business
    from coterie.web.door import Agent, open_door

    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise CoterieError("NAME: 1 to 100 printable characters")
    business = Business.open(folder)
    agent = Agent(name, "supervisor" if supervisor else "agent")
    door = open_door(business.folder, business.config.desk.origins)
    with house_at(folder) as house:
        house.accounts.invite(name, agent.role)
    link = f"{address.rstrip('/')}/desk?invite={door.invite(agent)}"
    result({"name": name, "link": link}, as_json, link)


@app.command()
def uninvite(
    name: Annotated[str, typer.Argument(help="The name on the invitation.")] = "",
    every: Annotated[bool, typer.Option("--all", help="All invitations.")] = False,
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """End the invitations of an agent, at once: whoever came by one is out."""
    if bool(name) == every:
        raise CoterieError("say either a name or --all")
    with house_at(folder) as house:
        house.accounts.end_invitations(name)
    result({"name": name, "all": every}, as_json, f"{name or 'all'}: invitations ended")


@app.command("list")
def list_(
    folder: FolderOption = Path(),
    state: Annotated[
        Literal["bot", "waiting", "person", "snoozed", "resolved"] | None, typer.Option(help="Only in this state.")
    ] = None,
    search: Annotated[str, typer.Option(help="Only those with these words in a message.")] = "",
    queue: Annotated[str, typer.Option(help="Only of this queue.")] = "",
    as_json: Json = False,
) -> None:
    """List conversations, those that wait longest first."""
    from dataclasses import asdict

    from coterie.business import Business
    from coterie.desk.conversation import Conversations
    from coterie.desk.rights import house_of

    house = house_of(Business.open(folder))
    talks = Conversations(house.database, house.seal, house.unseal)
    found = list(_searched(talks, search)) if search else talks.listed((state,) if state else (), queue=queue)
    if search:
        house.audit.record("cli", "conversation.search", found=len(found))
    found = [c for c in found if state in (None, c.state) and queue in ("", c.queue)]
    rows = [[c.id, c.customer, c.state, c.owner, c.reason] for c in found]
    result([asdict(c) for c in found], as_json, table(["conversation", "customer", "state", "owner", "reason"], rows))


@app.command()
def show(
    conversation: Annotated[str, typer.Argument(help="Its id, as `coterie desk list` prints it.")],
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Show all that was said in a conversation, private notes too."""
    from dataclasses import asdict

    from coterie.business import Business
    from coterie.desk.conversation import Conversations
    from coterie.desk.rights import house_of

    house = house_of(Business.open(folder))
    talks = Conversations(house.database, house.seal, house.unseal)
    house.audit.record("cli", "conversation.read", talks.get(conversation).customer, id=conversation)
    messages = talks.messages(conversation, kinds=("message", "note", "suggestion", "event"))
    rows = [[str(m.seq), m.author, m.kind, m.text or str(m.data.get("action", ""))] for m in messages]
    result([asdict(m) for m in messages], as_json, table(["", "who", "what", ""], rows))


@app.command()
def calibrate(
    folder: FolderOption = Path(),
    data: Annotated[
        Path | None, typer.Option(help="Rows with the right answers; default: all declared test rows.")
    ] = None,
    error: Annotated[
        float | None, typer.Option(min=0.001, max=0.5, help="Wished share of wrong answers; default: [desk] error.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most this many rows; 0: all.")] = 0,
    as_json: Json = False,
) -> None:
    """Learn from answers to rows with known outcome how sure an answer must be to be sent."""
    from dataclasses import asdict
    from functools import partial

    from coterie.answer import Answerer
    from coterie.business import Business
    from coterie.desk.calibrate import outcomes
    from coterie.desk.confidence import fit_confidence
    from coterie.desk.desk import confidence_file
    from coterie.desk.flow import Parts
    from coterie.desk.knowing import check, ground
    from coterie.grounding import Grounding

    business = Business.open(folder)
    rows = list(islice(_rows(business, data), limit or None))
    if not rows:
        raise DataError('no rows to calibrate on; declare test = "..." for an expert in coterie.toml, or give --data')
    answerer = Answerer.open(business, tell)
    grounding, parts = Grounding.of(answerer), Parts()
    if grounding.spec.sources:
        parts = Parts(ground=partial(ground, grounding), check=partial(check, grounding))
    try:
        with bars() as shown:
            signals, right = outcomes(answerer, rows, lambda done: shown.count("answers", done, len(rows)), parts=parts)
    finally:
        grounding.knowledge.close()
        answerer.close()
    fitted = fit_confidence(signals, right, error or business.config.desk.error)
    fitted.save(confidence_file(business))
    said = (
        f"of {fitted.rows} answers {sum(right) / len(right):.1%} were right; sent from a confidence of "
        f"{fitted.threshold:.3f} on: {fitted.handled:.1%} of the answers, {fitted.wrong:.1%} of them wrong"
    )
    if not fitted.handled:
        said += "; no threshold keeps that error for certain: more rows, or a larger --error"
    result(asdict(fitted), as_json, said)


def _searched(talks: "Conversations", words: str) -> "Iterator[Conversation]":
    """Each conversation with these words, however old."""
    seen, before = set[str](), None
    while True:
        found, before = talks.search(words, before)
        yield from (c for c, _ in found if c.id not in seen)
        seen |= {c.id for c, _ in found}
        if before is None:
            return


def _rows(business: "Business", data: Path | None) -> "Iterator[Example]":
    names = list(business.config.experts)
    if data and names:
        yield from business.examples(names[0], [str(data.resolve())])
        return
    for name in names:
        if business.spec(name).test:
            yield from business.examples(name, business.spec(name).test)
