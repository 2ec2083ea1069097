"""The kinds of value that a procedure knows, how each is read from what a customer writes, and how it is kept.

A value is a text, a Decimal (number, money), a date or a bool; None is one that is not there. Kept as JSON it is a
text or a bool, so that an amount is never a rounded binary fraction.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from coterie.desk.handoff import amounts
from coterie.errors import CoterieError

Kind = Literal["text", "number", "money", "date", "email", "order_number", "choice", "yes_no"]
Value = str | Decimal | date | bool | None
ORDER_NUMBER = r"[A-Z]{0,4}-?[0-9]{4,12}"
EMAIL = re.compile(r"[\w.+-]{1,64}@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,24}")
NUMBER = re.compile(r"(?<![\w.,])-?\d{1,15}(?:[.,]\d{1,6})?(?![\w.,]*\d)")
DATES = ("%Y-%m-%d", "%d.%m.%Y", "%d/%m/%Y", "%d %B %Y", "%d %b %Y", "%B %d, %Y", "%b %d, %Y", "%B %d %Y")
DAYS = {"today": 0, "yesterday": 1}
LONGEST_TEXT = 2000
SAMPLES: Mapping[Kind, Value] = {
    "text": "text", "number": Decimal(1), "money": Decimal("1.00"), "date": date(2026, 1, 1), "choice": "choice",
    "email": "ada@example.com", "order_number": "A-1234", "yes_no": True,
}  # fmt: skip


class NotOne(CoterieError):
    """What the customer wrote is not one value of the kind: a sentence that says what is."""

    code = "not_a_value"


def plain(text: str) -> str:
    """A text as it is compared: without case, marks at its ends, and runs of spaces."""
    return " ".join(re.sub(r"^[\W_]+|[\W_]+$", "", text).casefold().split())


def read(
    kind: Kind, text: str, today: date, pattern: str = "", choices: Sequence[str] = (), least: float | None = None,
    most: float | None = None,
) -> Value:  # fmt: skip
    """The one value of this kind in what was written. Raises NotOne."""
    value = _read(kind, text.strip(), today, pattern, choices)
    if isinstance(value, Decimal):
        if least is not None and value < Decimal(str(least)):
            raise NotOne(f"It must be {least:g} or more.")
        if most is not None and value > Decimal(str(most)):
            raise NotOne(f"It must be {most:g} or less.")
    return value


def _read(kind: Kind, text: str, today: date, pattern: str, choices: Sequence[str]) -> Value:
    if kind == "money":
        named = {Decimal(str(a)) for a in amounts(text)}
        return _one({_cents(n) for n in named or _numbers(text)}, "I need one amount, such as 24.90.")
    if kind == "number":
        return _one(_numbers(text), "I need one number.")
    if kind == "date":
        return _one(_dates(text, today), "I need a date, such as 2026-03-24 or 24 March 2026.")
    if kind == "email":
        return _one({found.casefold() for found in EMAIL.findall(text)}, "I need an e-mail address.")
    if kind == "order_number":
        found = re.finditer(rf"(?<![\w-])(?:{pattern or ORDER_NUMBER})(?![\w-])", text, re.IGNORECASE)
        return _one({m[0].upper() for m in found}, "I need the number as it stands on the order.")
    if kind == "choice":
        return _one(
            {c for c in choices if plain(c) == plain(text)}, "Please choose one of: " + ", ".join(choices) + "."
        )
    if kind == "yes_no":
        return _one({"yes": {True}, "no": {False}}.get(plain(text), set()), "Please answer yes or no.")
    if not text or len(text) > LONGEST_TEXT or (pattern and not re.fullmatch(pattern, text)):
        raise NotOne("I cannot use that.")
    return text


def _one(found: Any, otherwise: str) -> Value:
    if len(found) != 1:
        raise NotOne(otherwise)
    value: Value = next(iter(found))
    return value


def _numbers(text: str) -> set[Decimal]:
    return {Decimal(found.replace(",", ".")) for found in NUMBER.findall(text)}


def _dates(text: str, today: date) -> set[date]:
    if plain(text) in DAYS:
        return {today - timedelta(days=DAYS[plain(text)])}
    bare = re.sub(r"(?<=\d)(st|nd|rd|th)\b", "", text.strip(" .!"))
    found = set()
    for form in DATES:
        try:
            found.add(datetime.strptime(bare, form).date())
        except ValueError:
            continue
    return found


def _cents(amount: Decimal) -> Decimal:
    """With at least two places, as amounts are written: databases give 349 for 349.00."""
    return amount if int(amount.as_tuple().exponent) <= -2 else amount.quantize(Decimal("0.01"))


def typed(kind: Kind, raw: Any) -> Value:
    """A value that an action gave, or that was kept. Raises NotOne where it is not of the kind."""
    if raw is None:
        return None
    try:
        if kind in ("number", "money"):
            if isinstance(raw, bool):
                raise ValueError
            number = Decimal(str(raw))
            if not number.is_finite() or abs(number) > Decimal(10) ** 15:
                raise ValueError
            return _cents(number) if kind == "money" else number
        if kind == "date":
            if isinstance(raw, datetime):
                return raw.date()
            return raw if isinstance(raw, date) else datetime.fromisoformat(str(raw)).date()
        if kind == "yes_no":
            if raw not in (True, False):  # 1 and 0 too: SQLite has no booleans
                raise ValueError
            return bool(raw)
        if isinstance(raw, dict | list):
            raise ValueError
        return str(raw)[:LONGEST_TEXT]
    except (ValueError, InvalidOperation) as error:
        raise NotOne(f"{raw!r} is no {kind}") from error


def kind_of(value: Value) -> Kind:
    """The kind under which a value keeps its type."""
    kinds: dict[type, Kind] = {Decimal: "number", date: "date", bool: "yes_no"}
    return kinds.get(type(value), "text")


def kept(value: Value) -> str | bool | None:
    """As JSON."""
    return value if value is None or isinstance(value, str | bool) else shown(value)


def shown(value: Value) -> str:
    """As a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value.isoformat() if isinstance(value, date) else f"{value:f}" if isinstance(value, Decimal) else value
