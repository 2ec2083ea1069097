"""What the procedures in `bank/` do at the bank of tau2-bench: typed functions over its database, as a business writes
them. A customer's name is the name of their task, whose own rows of the database count too; nobody here sees what the
gold solution is. What was done is kept for `taken`, and the database stays as it is: the harness compares deeds.
"""

import json
import re
from collections import defaultdict
from datetime import date, datetime
from decimal import Decimal
from functools import cache
from typing import Any

from common import need_data
from desk_tasks import Action, words

NOW = "2025-11-14 03:40:00 EST"  # what the bank's clock says in every task
PROOFS = ("date_of_birth", "email", "phone_number", "address")  # two of them identify; name and user id do not
DATES = ("%m/%d/%Y", "%Y-%m-%d", "%B %d, %Y", "%B %d %Y", "%b %d, %Y")
OVER = ("RESOLVED", "CLOSED", "DENIED", "APPROVED", "DELIVERED", "CANCELLED")  # of disputes and orders
# By tier of card: days open, days since the last approved request, share of the limit in use, months paid on time, and
# the share of the limit that may be added; from the documents "CLI Eligibility Requirements by Card Tier" and
# "Internal: CLI Payment History and Approval Criteria".
ENTRY, MID, PREMIUM = (120, 120, 0.7, 6, 0.25), (90, 90, 0.8, 3, 0.5), (60, 60, 0.9, 3, 0.5)
TIERS = {
    "Bronze Rewards Card": ENTRY, "EcoCard": ENTRY, "Business Bronze Rewards Card": ENTRY, "Silver Rewards Card": MID,
    "Business Silver Rewards Card": MID, "Green Rewards Card": MID, "Silver Zoom Card": MID,
    "Gold Rewards Card": PREMIUM, "Business Gold Rewards Card": PREMIUM, "Platinum Rewards Card": PREMIUM,
    "Business Platinum Rewards Card": PREMIUM, "Diamond Elite Card": PREMIUM,
}  # fmt: skip
Row = dict[str, Any]
_done: defaultdict[str, list[Action]] = defaultdict(list)


def taken(customer: str) -> tuple[Action, ...]:
    """What was done for this customer since this was asked last."""
    return tuple(_done.pop(customer, ()))


@cache
def _files() -> tuple[Row, dict[str, Row]]:
    """The bank's tables, and for each task the rows that are there in it alone."""
    folder = need_data("tau2_banking")
    tables = {name: t["data"] for name, t in json.loads((folder / "db.json").read_text(encoding="utf-8")).items()}
    own = {}
    for task in json.loads((folder / "tasks.json").read_text(encoding="utf-8")):
        begins = (task["initial_state"] or {}).get("initialization_data") or {}
        own[task["id"]] = begins.get("agent_data") or {}
    return tables, own


def _rows(customer: str, table: str, **wanted: str) -> list[Row]:
    tables, own = _files()
    rows = {**tables.get(table, {}), **own.get(customer, {}).get(table, {}).get("data", {})}
    return [row for row in rows.values() if all(row.get(name) == value for name, value in wanted.items())]


def find(customer: str, told: str) -> Row | None:
    """The one customer of the bank who is proven by what was told: {user_id, name}."""
    proven = [u for u in _rows(customer, "users") if sum(_says(told, name, u[name]) for name in PROOFS) >= 2]
    return {"user_id": proven[0]["user_id"], "name": proven[0]["name"]} if len(proven) == 1 else None


def _says(told: str, name: str, value: str) -> bool:
    if name == "date_of_birth":
        dates = re.findall(r"\d{1,2}/\d{1,2}/\d{4}|\d{4}-\d\d-\d\d|[A-Z][a-z]+ \d{1,2},? \d{4}", told)
        return _day(value) in [_day(d) for d in dates]
    if name == "phone_number":
        return re.sub(r"\D", "", value) in re.sub(r"(?<=\d)[-. ()]+(?=\d)", "", told)
    return f" {' '.join(words(value))} " in f" {' '.join(words(told))} "


def log_verification(customer: str, user_id: str) -> None:
    """Write down that the customer was identified, with what the bank knows of them."""
    (record,) = _rows(customer, "users", user_id=user_id)
    kept = {name: record[name] for name in ("name", "user_id", "address", "email", "phone_number", "date_of_birth")}
    _done[customer].append({"name": "log_verification", "arguments": {**kept, "time_verified": NOW}})


def card(customer: str, user_id: str, said: str) -> Row | None:
    """The credit card that the customer names, or their only one: {account, kind}."""
    cards = _rows(customer, "credit_card_accounts", user_id=user_id)
    named = sorted((c for c in cards if c["card_type"] in said), key=lambda c: len(c["card_type"]), reverse=True)
    chosen = named[0] if named else cards[0] if len(cards) == 1 else None
    return {"account": chosen["account_id"], "kind": chosen["card_type"]} if chosen else None


def limit(customer: str, account: str, said: str) -> Row | None:
    """By how much the card's limit shall grow, said in dollars or percent, and may at once: {amount, most}; None where
    nothing is said, or the bank does not know the limit."""
    (found,) = _rows(customer, "credit_card_accounts", account_id=account)
    asked = re.search(r"\$\s?([\d,]+(?:\.\d\d)?)|([\d.]+)\s?%|([\d,]+) dollars", said)
    if "credit_limit" not in found or found["card_type"] not in TIERS or not asked:
        return None
    now = _money(found["credit_limit"])
    amount = now * Decimal(asked[2]) / 100 if asked[2] else _money(asked[1] or asked[3])
    return {"amount": amount, "most": now * Decimal(str(TIERS[found["card_type"]][4]))}


def request_limit(customer: str, user_id: str, account: str, amount: Decimal) -> None:
    """Step 1 of the bank's workflow: a request is on record before it is looked at."""
    given = {"credit_card_account_id": account, "user_id": user_id, "requested_increase_amount": _plain(amount)}
    _call(customer, "submit_credit_limit_increase_request_7392", given)


def decide_limit(customer: str, user_id: str, account: str, amount: Decimal) -> Row:
    """Steps 2 to 4: every criterion is looked at, and the decision is on record: {denied} with the reason, or ""."""
    reason = _against(customer, user_id, account)
    given: Row = {"credit_card_account_id": account, "user_id": user_id}
    if reason:
        _call(customer, "deny_credit_limit_increase_5848", given | {"denial_reason": reason})
    else:
        (found,) = _rows(customer, "credit_card_accounts", account_id=account)
        given["new_credit_limit"] = _plain(_money(found["credit_limit"]) + amount)
        _call(customer, "approve_credit_limit_increase_5847", given)
    return {"denied": reason}


def _against(customer: str, user_id: str, account: str) -> str:
    """The first criterion that is not met, in the bank's words."""
    (found,) = _rows(customer, "credit_card_accounts", account_id=account)
    days_open, cooldown, in_use, months, _ = TIERS[found["card_type"]]
    asked = _rows(customer, "credit_limit_increase_requests", credit_card_account_id=account)
    since = [_age(r["submitted_date"]) for r in asked if r["status"].casefold() == "approved"]
    paid = _rows(customer, "payment_history", credit_card_account_id=account)
    paid.sort(key=lambda p: _age(p["payment_date"]), reverse=True)
    on_time = len(paid) >= months and all(p["status"] == "ON_TIME" for p in paid[-months:])
    criteria = {
        "insufficient_account_age": _age(found["date_of_account_open"]) < days_open,
        "cooldown_period_active": any(days < cooldown for days in since),
        "pending_disputes": _open(_rows(customer, "transaction_disputes", user_id=user_id)),
        "pending_replacement_card": _open(_rows(customer, "credit_card_orders", credit_card_account_id=account)),
        "past_due_balance": _money(found.get("past_due_amount", "$0")) > 0,
        "high_utilization": _money(found["current_balance"]) >= _money(found["credit_limit"]) * Decimal(str(in_use)),
        "insufficient_payment_history": not on_time,
    }
    return next((reason for reason, holds in criteria.items() if holds), "")


def _open(rows: list[Row]) -> bool:
    return any(row["status"].upper() not in OVER for row in rows)


def _call(customer: str, tool: str, given: Row) -> None:
    call = {"agent_tool_name": tool, "arguments": json.dumps(given)}
    _done[customer].append({"name": "call_discoverable_agent_tool", "arguments": call})


def _day(text: str) -> date | None:
    for form in DATES:
        try:
            return datetime.strptime(text, form).date()
        except ValueError:
            continue
    return None


def _age(text: str) -> int:
    """Days from then to the bank's today."""
    day, today = _day(text), _day(NOW[:10])
    assert day
    assert today
    return (today - day).days


def _money(text: str) -> Decimal:
    return Decimal(text.replace("$", "").replace(",", ""))


def _plain(amount: Decimal) -> int | float:
    return int(amount) if amount == int(amount) else float(amount)
