"""`coterie accounts`, `keys`, `audit`, `customers`, `privacy`: who may do what, and what becomes of customers' data."""

import json
import sys
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.options import FolderOption, Json
from coterie.cli.show import bars, result, table, tell
from coterie.errors import CoterieError

if TYPE_CHECKING:  # loaded when a command needs them, so that --help is quick
    from collections.abc import Iterator

    from coterie.privacy.deidentify import Detector
    from coterie.privacy.house import House
    from coterie.privacy.rights import Room

accounts = typer.Typer(help="Who may sign in, and what they may do.", no_args_is_help=True)
keys = typer.Typer(help="The master key, and the customers' keys that it wraps.", no_args_is_help=True)
audit = typer.Typer(help="Who saw, changed, exported, erased what.", no_args_is_help=True)
customers = typer.Typer(help="What a customer may ask for: everything about them, and to be forgotten.",
                        no_args_is_help=True)  # fmt: skip
privacy = typer.Typer(help="Private data in texts: the tagging expert, and masking.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The account's name; an e-mail address where it signs in by OIDC.")]
Customer = Annotated[str, typer.Argument(help="The customer's id.")]


@contextmanager
def house_at(folder: Path) -> "Iterator[House]":
    """Keys, accounts and audit log of the business in a folder, as long as it is needed."""
    from coterie.business import Business
    from coterie.desk.rights import house_of

    house = house_of(Business.open(folder))
    try:
        yield house
    finally:
        house.close()


def _rooms(house: "House", folder: Path) -> "list[Room]":
    from coterie.business import Business
    from coterie.desk.rights import rooms_of

    return rooms_of(house, Business.open(folder))


def _password(prompt: str = "Password") -> str:
    """From the terminal, typed twice; else the first line of stdin."""
    if sys.stdin.isatty():
        return str(typer.prompt(prompt, hide_input=True, confirmation_prompt=True))
    return sys.stdin.readline().rstrip("\n")


def _when(at: float) -> str:
    return datetime.fromtimestamp(at).isoformat(" ", "seconds")


@accounts.command("add")
def add_account(
    name: Name,
    role: Annotated[str, typer.Option(help="owner, admin, agent, reviewer or viewer.")] = "owner",
    oidc: Annotated[bool, typer.Option("--oidc", help="No password: signs in by OIDC only.")] = False,
    group: Annotated[
        list[str] | None, typer.Option("--group", "-g", help="A group it belongs to, for `readers`; may be repeated.")
    ] = None,
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Add an account. The first one, an owner's, closes the door: from then on everybody signs in."""
    with house_at(folder) as house:
        house.accounts.add(name, role, "" if oidc else _password(), groups=group or [])
    result({"name": name, "role": role, "groups": group or []}, as_json, f"{name}: {role}")


@accounts.command("list")
def list_accounts(folder: FolderOption = Path(), as_json: Json = False) -> None:
    """List all accounts."""
    with house_at(folder) as house:
        found = house.accounts.all()
    rows = [
        [
            a.name,
            a.role,
            ", ".join(a.groups),
            "yes" if a.second_factor else "no",
            "disabled" if a.disabled else "locked" if a.locked else "",
        ]
        for a in found
    ]
    result([vars(a) for a in found], as_json, table(["name", "role", "groups", "second factor", ""], rows))


@accounts.command("change")
def change_account(
    name: Name,
    role: Annotated[str | None, typer.Option(help="Another role.")] = None,
    password: Annotated[bool, typer.Option("--password", help="Another password, from the terminal or stdin.")] = False,
    drop_second_factor: Annotated[bool, typer.Option("--drop-second-factor", help="Ask for no code any more.")] = False,
    disabled: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Whether it may sign in.", show_default=False)
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option("--group", "-g", help="Its groups from now on; may be repeated.")
    ] = None,
    no_groups: Annotated[bool, typer.Option("--no-groups", help="It belongs to no group any more.")] = False,
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Change an account; its sessions and tokens end."""
    if group and no_groups:
        raise CoterieError("--group and --no-groups: say one of them")
    with house_at(folder) as house:
        groups = [] if no_groups else group
        changed = _password("New password") if password else None
        house.accounts.change(name, role, changed, disabled=disabled, groups=groups)
        if drop_second_factor:
            house.accounts.drop_second_factor(name)
    result({"name": name}, as_json, f"{name}: changed")


@accounts.command("remove")
def remove_account(name: Name, folder: FolderOption = Path(), as_json: Json = False) -> None:
    """Remove an account with its sessions and tokens."""
    with house_at(folder) as house:
        house.accounts.remove(name)
    result({"name": name}, as_json, f"{name}: removed")


@accounts.command("token")
def account_token(
    name: Name,
    scope: Annotated[list[str], typer.Option("--scope", "-s", help="What it may: ask, see, ...; may be repeated.")],
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    days: Annotated[int, typer.Option(help="How long it holds.")] = 90,
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Make an API token. It is shown once."""
    with house_at(folder) as house:
        made = house.accounts.token(name, label, scope, days)
    result({"token": made.secret, "until": made.until}, as_json, made.secret)


@keys.command("new")
def new_master_key(file: Annotated[Path, typer.Argument(help="A new file.")], as_json: Json = False) -> None:
    """Write a fresh master key that only you can read."""
    from coterie.privacy.master import write_key

    write_key(file)
    result({"file": str(file)}, as_json, f"{file}: keep a copy where nobody else finds it; without it, all is lost")


@keys.command("rotate")
def rotate_master_key(
    new: Annotated[Path, typer.Argument(help="The file with the new master key, from `coterie keys new`.")],
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Wrap every customer's key by a new master key. Then start coterie with the new one."""
    from coterie.privacy.master import VARIABLE, master_key

    fresh = master_key({f"{VARIABLE}_FILE": str(new)})
    assert fresh, "the file was named"
    with house_at(folder) as house:
        count = house.keys.rewrap(fresh)
        house.audit.record("cli", "keys.rotate", "", keys=count, master=fresh.id[:8])
    result({"keys": count, "master": fresh.id}, as_json,
           f"{new} wraps {count} keys; set {VARIABLE}_FILE to it, or move it to .coterie/master.key")  # fmt: skip


@audit.command("verify")
def verify_audit(
    head: Annotated[str, typer.Option(help="A link noted earlier, which must be on the way.")] = "",
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Walk the whole chain. Exit code 1 where a line was changed, deleted or put in."""
    with house_at(folder) as house:
        count, last = house.audit.verify(head)
    result({"lines": count, "head": last}, as_json, f"{count} lines, all as they were written; head {last}")


@audit.command("head")
def audit_head(folder: FolderOption = Path(), as_json: Json = False) -> None:
    """Print the last link: note it elsewhere, and verify against it later."""
    with house_at(folder) as house:
        head = house.audit.head()
    result({"head": head}, as_json, head)


@audit.command("show")
def show_audit(
    subject: Annotated[str, typer.Option(help="Only about this customer or account.")] = "",
    actor: Annotated[str, typer.Option(help="Only what this account did.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="So many of the newest lines.")] = 50,
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Show the newest lines."""
    with house_at(folder) as house:
        lines = house.audit.lines(subject, actor, limit)
    rows = [[_when(x.at), x.actor, x.action, x.subject, json.dumps(x.detail) if x.detail else ""] for x in lines]
    result([vars(x) for x in lines], as_json, table(["when", "who", "did", "to", ""], rows))


@customers.command("export")
def export_one(customer: Customer, folder: FolderOption = Path()) -> None:
    """Print everything about a customer, as JSON."""
    from coterie.privacy.rights import export_customer

    with house_at(folder) as house:
        found = export_customer(_rooms(house, folder), house.audit, customer, "cli")
    print(json.dumps(found, ensure_ascii=False, indent=1, default=str))


@customers.command("erase")
def erase_one(
    customer: Customer,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask again.")] = False,
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Forget a customer for good: the key is destroyed, and every room deletes what it has."""
    from coterie.privacy.rights import erase_customer

    if not yes:
        if not sys.stdin.isatty():
            raise CoterieError(f"erasing {customer!r} cannot be undone; say --yes")
        typer.confirm(f"Erase {customer!r} for good?", abort=True)
    with house_at(folder) as house:
        done = erase_customer(_rooms(house, folder), house.keys, house.audit, customer, "cli")
    result(done, as_json, table(["room", "erased"], [[k, str(v)] for k, v in done.items()]))


@customers.command("consents")
def consents(customer: Customer, folder: FolderOption = Path(), as_json: Json = False) -> None:
    """List what a customer was told and agreed to, in which words and when."""
    with house_at(folder) as house:
        house.audit.record("cli", "consents.read", customer)
        found = house.consents.of(customer)
    rows = [[_when(c["at"]), c["purpose"], c["what"], c["version"], c["language"], c["text"]] for c in found]
    result(found, as_json, table(["when", "purpose", "what", "version", "language", "text"], rows))


@customers.command("consent")
def consent(
    customer: Customer,
    purpose: Annotated[str, typer.Argument(help="What it is for, such as training.")],
    what: Annotated[str, typer.Argument(help="told, agreed or withdrawn.")],
    text: Annotated[str, typer.Option(help="The words that they read.")],
    language: Annotated[str, typer.Option(help="Their language, such as de.")] = "",
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Write down what a customer was told elsewhere, agreed to, or took back."""
    from coterie.privacy.rights import check_what

    said = check_what(what)
    with house_at(folder) as house:
        house.audit.record("cli", f"consent.{said}", customer, purpose=purpose)
        house.consents.record(customer, purpose, said, text, language)
        agreed = house.consents.agreed(customer, purpose)
    result({"agreed": agreed}, as_json, f"{customer}: {purpose}: {'agreed' if agreed else 'not agreed'}")


@customers.command("trained")
def trained_on_erased(folder: FolderOption = Path(), as_json: Json = False) -> None:
    """List the experts that learned from erased customers, until they are fitted anew, with the rows to take out."""
    from coterie.business import Business
    from coterie.desk.trained import marked

    with house_at(folder) as house:
        found = marked(Business.open(folder), house)
    rows = [[name, ", ".join(where) or "none is left; run `coterie fit`"] for name, where in found.items()]
    result(found, as_json, table(["expert", "rows"], rows))


@customers.command("retain")
def retain(
    rule: Annotated[
        list[str] | None, typer.Argument(help="ROOM=DAYS, such as conversations=365; none: as declared.")
    ] = None,
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Delete what is older than its rule allows, at once; `coterie serve` does so by itself, by [retention]."""
    from coterie.business import Business
    from coterie.privacy.rights import keep_only

    days: dict[str, float] = {}
    for text in rule or []:
        name, _, number = text.partition("=")
        try:
            days[name] = float(number)
        except ValueError as error:
            raise CoterieError(f"{text!r}: not a rule; write ROOM=DAYS, such as conversations=365") from error
    if not rule and not (days := dict(Business.open(folder).config.retention.days)):
        raise CoterieError("[retention] in coterie.toml declares no days; say ROOM=DAYS, such as conversations=365")
    with house_at(folder) as house:
        done = keep_only(_rooms(house, folder), days, house.audit)
    result(done, as_json, table(["room", "deleted"], [[k, str(v)] for k, v in done.items()]))


@privacy.command("train")
def train_tagger(folder: FolderOption = Path(), as_json: Json = False) -> None:
    """Train the tagging expert of this business's base model anew, on made sentences (minutes)."""
    from coterie.business import Business
    from coterie.privacy.expert import file_of, tagger_of, taggers_dir

    base, place = Business.open(folder).base(tell), taggers_dir()
    with bars() as shown:
        tagger_of(base, place, lambda done, total: shown.count("training the tagger", done, total), anew=True)
    result({"file": str(file_of(base, place))}, as_json, str(file_of(base, place)))


def _detector(folder: Path, rules_only: bool, region: str) -> "Detector":
    from coterie.business import Business
    from coterie.privacy.deidentify import Detector
    from coterie.privacy.expert import tagger_of

    if rules_only:
        return Detector(None, region)
    base = Business.open(folder).base(tell)
    with bars() as shown:
        found = tagger_of(base, None, lambda done, total: shown.count("training the tagger", done, total))
    return Detector(found, region)


RulesOnly = Annotated[bool, typer.Option("--rules-only", help="Without the tagging expert: finds no names.")]
Region = Annotated[str, typer.Option(help="Whose phone numbers need no country code.")]


@privacy.command("mask")
def mask_text(
    text: Annotated[str, typer.Argument(help="A text; '-' reads stdin.")],
    rules_only: RulesOnly = False,
    region: Region = "GB",
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Show what a model would get to see of a text."""
    from coterie.privacy.deidentify import Mask
    from coterie.privacy.pseudonyms import Pseudonyms

    pseudonyms = Pseudonyms()
    found = _detector(folder, rules_only, region)
    masked = Mask(found, pseudonyms).hide(sys.stdin.read() if text == "-" else text)
    pairs = {pair.pseudonym: pair.value for pair in pseudonyms.pairs()}
    result({"masked": masked, "pseudonyms": pairs}, as_json, masked)


@privacy.command("mask-file")
def mask_file(
    file: Annotated[Path, typer.Argument(help="Rows: .jsonl, .csv or .parquet.")],
    out: Annotated[Path, typer.Argument(help="A new file (.jsonl, .csv) for the masked rows.")],
    rules_only: RulesOnly = False,
    region: Region = "GB",
    folder: FolderOption = Path(),
    as_json: Json = False,
) -> None:
    """Mask every text in a data file, row by row; the original stays as it is, and the values are kept nowhere."""
    from coterie.data.read import check_file, raw_rows
    from coterie.data.write import check_new, write_rows
    from coterie.privacy.once import mask_row

    check_file(file)
    check_new(out)
    found = _detector(folder, rules_only, region)
    written = write_rows(out, (mask_row(found, row) for _, row in raw_rows(file)))
    result({"file": str(out), "rows": written}, as_json, f"{out}: {written} rows, masked")
