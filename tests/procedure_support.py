"""A desk with procedures whose actions are recorded, or done, by a test."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coterie.desk.desk import Desk
from coterie.desk.flow import Parts
from coterie.desk.procedures.actions import FOUND
from coterie.desk.procedures.procedures import Embed, Procedures
from coterie.desk.procedures.runs import Runs
from coterie.desk.procedures.spec import ActionSpec, read_procedures
from coterie.desk.procedures.values import Value
from coterie.store.database import open_database
from desk_support import Script, ScriptedAnswerer, scripted, settled

REFUND = """
title = "Return an order"
triggers = ["I want to send my order back"]
topics = ["returns"]

[slots.order]
kind = "order_number"
ask = "What is your order number?"
pattern = "LW-[0-9]{5}"

[slots.reason]
kind = "choice"
choices = ["Too small", "Broken"]
ask = "Why do you send it back?"

[actions.find]
kind = "python"
function = "orders:find"
arguments = { order = "order", customer = "customer.id" }
gives = { status = "text", total = "money", delivered = "date" }

[actions.refund]
kind = "python"
title = "Refund an order"
function = "orders:refund"
arguments = { order = "order", amount = "find.total" }
gives = { number = "text" }
writes = true
only_if = "find.status == 'delivered'"
confirm = "Shall I refund {find.total} for {order}?"
approve = "agent"
approve_when = "find.total > 100"

[[steps]]
ask = "order"
[[steps]]
do = "find"
[[steps]]
check = "find.found"
otherwise = "I cannot find the order {order}."
[[steps]]
check = "find.status == 'delivered' and days_since(find.delivered) <= 30"
hand_over = "too_late"
[[steps]]
ask = "reason"
[[steps]]
do = "refund"
[[steps]]
say = "Done, number {refund.number}: {find.total} for {order}."
"""
ORDERS = """
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal

@dataclass
class Order:
    status: str
    total: Decimal
    delivered: date | None

def find(order: str, customer: str) -> Order | None:
    return None

def refund(order: str, amount: Decimal, key: str) -> dict[str, str]:
    raise RuntimeError
"""
Act = Callable[[ActionSpec, Mapping[str, Value], str], dict[str, Value]]


class Recorded:
    """Does actions by script and writes down each. `does`: title or function -> what is given, or an error."""

    def __init__(self, does: Mapping[str, Any]) -> None:
        self.does, self.done = does, list[tuple[str, dict[str, Value], str]]()

    def __call__(self, action: ActionSpec, arguments: Mapping[str, Value], key: str) -> dict[str, Value]:
        name = key.rpartition("-")[2]
        self.done.append((name, dict(arguments), key))
        found = self.does[name]
        found = found(arguments) if callable(found) else found
        if isinstance(found, BaseException):
            raise found
        if found is None:
            return {FOUND: False, **dict.fromkeys(action.gives)}
        return {FOUND: True, **found}

    def close(self) -> None:
        pass

    def named(self, name: str) -> list[dict[str, Value]]:
        return [arguments for n, arguments, _ in self.done if n == name]


def procedure_folder(folder: Path, files: Mapping[str, str] | None = None) -> Path:
    place = folder / "procedures"
    place.mkdir(exist_ok=True)
    (place / "orders.py").write_text(ORDERS)
    for name, text in (files or {"refund": REFUND}).items():
        (place / f"{name}.toml").write_text(text)
    return place


def guided(
    folder: Path, perform: Any, says: Callable[[str], Script] = lambda _t: Script("All is well."), start: bool = True,
    embed: Embed | None = None, files: Mapping[str, str] | None = None, told: Any = None, **desk: Any
) -> Desk:  # fmt: skip
    """A desk with the procedures of `files`."""
    return opened_desk(folder, scripted(folder, says, **desk), perform, start, embed, files, told)


def opened_desk(
    folder: Path, answerer: ScriptedAnswerer, perform: Any, start: bool = True, embed: Embed | None = None,
    files: Mapping[str, str] | None = None, told: Any = None, parts: Parts | None = None,
) -> Desk:  # fmt: skip
    database = open_database(f"sqlite:///{folder}/desk.db")
    found = read_procedures(procedure_folder(folder, files), answerer.business.config.desk.hosts)
    runs = Runs(database, found, perform, **({"told": told} if told else {}))
    opened = Desk(answerer, database, parts, procedures=Procedures(runs, embed))  # type: ignore[arg-type]
    if start:
        opened.start()
    return opened


class Customer:
    """Talks to a desk in one conversation."""

    def __init__(self, desk: Desk, name: str = "ada") -> None:
        self.desk, self.id = desk, desk.conversations.open(name).id

    def say(self, text: str, **data: Any) -> str:
        """What the bot says to it."""
        self.desk.conversations.say(self.id, text, data=data)
        return self.heard()

    def press(self, text: str) -> str:
        """A button under the bot's last message."""
        return self.say(text, asked=self.last()["asked"])

    def begin(self, name: str = "refund") -> str:
        return self.say("Return an order", start=name)

    def heard(self) -> str:
        self.desk.wake(self.id)
        settled(self.desk, self.id)
        said = self.desk.conversations.messages(self.id, kinds=("message",))
        return said[-1].text if said[-1].author == "bot" else ""

    def last(self) -> dict[str, Any]:
        """What goes with the bot's last message of a procedure."""
        said = self.desk.conversations.messages(self.id, kinds=("message",))
        found: dict[str, Any] = next(m.data["procedure"] for m in reversed(said) if "procedure" in m.data)
        return found
