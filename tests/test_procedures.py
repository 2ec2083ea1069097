"""Procedures at the desk: what customers are led through, and that nothing is done without its conditions."""

import sqlite3
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coterie.desk.desk import Desk
from coterie.desk.message import Changed, NotAllowed
from coterie.desk.procedures.actions import ActionFailed, OutcomeUnknown
from desk_support import Script, settled
from procedure_support import REFUND, Customer, Recorded, guided

TODAY = date.today()
ALL = ("message", "note", "suggestion", "event")


def order(total: str = "40.00", status: str = "delivered", days: int = 3) -> dict[str, Any]:
    return {"status": status, "total": Decimal(total), "delivered": TODAY - timedelta(days=days)}


Open = Callable[..., tuple[Desk, Recorded]]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens desks whose actions find an order, or what is given, and close at the end."""
    desks: list[Desk] = []

    def make(find: Any = None, refund: Any = None, **more: Any) -> tuple[Desk, Recorded]:
        recorded = Recorded({"find": find or order(), "refund": refund or {"number": "R-1"}})
        desks.append(guided(tmp_path, recorded, **more))
        return desks[-1], recorded

    yield make
    for desk in desks:
        desk.close()


def note(desk: Desk, id: str) -> dict[str, Any]:
    return [m for m in desk.conversations.messages(id, kinds=("note",)) if m.author == "bot"][-1].data


def lead(c: Customer) -> str:
    """As far as the question whether to refund."""
    c.begin()
    c.say("It is LW-12345, thanks")
    return c.press("Broken")


# The customer's way


def test_a_customer_is_led_from_question_to_question_and_agrees_before_it_is_done(opened: Open) -> None:
    desk, did = opened()
    c = Customer(desk)
    assert c.begin() == "What is your order number?"
    assert (c.last()["step"], c.last()["of"], c.last()["stop"]) == (1, 3, "Stop this")
    assert c.say("I have no idea") == "I need the number as it stands on the order.\n\nWhat is your order number?"
    assert c.say("lw-12345, I think") == "Why do you send it back?"
    assert c.last()["buttons"] == ["Too small", "Broken"]
    assert c.press("Broken") == "Shall I refund 40.00 for LW-12345?"
    assert did.named("refund") == []
    assert c.press("Yes, do it") == "Done, number R-1: 40.00 for LW-12345."
    assert did.named("find") == [{"order": "LW-12345", "customer": "ada"}]
    assert did.named("refund") == [{"order": "LW-12345", "amount": Decimal("40.00")}]
    assert c.say("Thanks!") == "All is well.", "the assistant answers again"
    assert len(desk.answerer.asked) == 1, "no model had a part in it"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("said", "heard", "status"),
    [("No", "All right. Nothing was done.", "declined"), ("stop this!", "All right, I have stopped.", "stopped"),
     ("perhaps", "Please answer with one of the buttons.", "asking"), ("yes please do", "Please answer", "asking"),
     ("YES", "Done, number R-1", "done")],
)  # fmt: skip
def test_only_a_clear_agreement_counts(said: str, heard: str, status: str, opened: Open) -> None:
    desk, did = opened()
    c = Customer(desk)
    lead(c)
    assert c.say(said).startswith(heard)
    assert (c.last()["status"], len(did.named("refund"))) == (status, int(status == "done"))


@pytest.mark.parametrize(
    ("found", "state", "says"),
    [(order(status="on its way"), "waiting", "I have called a person"), (order(days=31), "waiting", "I have called"),
     (lambda _: None, "bot", "I cannot find the order LW-12345.")],
)  # fmt: skip
def test_who_is_not_eligible_is_told_or_gets_a_person(found: Any, state: str, says: str, opened: Open) -> None:
    desk, did = opened(find=found)
    c = Customer(desk)
    c.begin()
    assert c.say("LW-12345").startswith(says)
    now = desk.conversations.get(c.id)
    assert (now.state, now.reason) == (state, "too_late" if state == "waiting" else "")
    assert did.named("refund") == []
    if state == "waiting":
        assert "order: LW-12345" in note(desk, c.id)["detail"]


CARE = [{"reason": "vulnerable_customer", "words": ["passed away"], "queue": "care"}]


@pytest.mark.parametrize("where", ["beginning", "inside"])
def test_a_rule_that_calls_a_person_comes_before_a_procedure(where: str, opened: Open) -> None:
    desk, did = opened(says=lambda _: Script("All is well.", "returns"), rules=CARE)
    c = Customer(desk)
    if where == "inside":
        lead(c)
    c.say("I want to return a thing. My husband has passed away.")
    now = desk.conversations.get(c.id)
    assert (now.state, now.reason, now.queue) == ("waiting", "vulnerable_customer", "care")
    assert did.named("refund") == []
    assert desk.procedures
    assert desk.procedures.runs.active(c.id) is None
    details = [m.data.get("detail", "") for m in desk.conversations.messages(c.id, kinds=("note",))]
    assert any("order: LW-12345" in d for d in details) == (where == "inside"), "the person knows what was said in it"


def test_what_the_crm_says_when_it_fails_is_in_no_log(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    def fail(customer: str) -> Any:
        raise RuntimeError(f"no such row: ada@mail.example, {customer}")

    desk, _ = opened()
    assert desk.procedures
    desk.procedures._profile = fail
    desk.procedures.procedures["refund"].kinds["customer.tier"] = "text"  # type: ignore[index]
    assert Customer(desk, "ada@mail.example").begin() == "What is your order number?"
    assert "the customer's profile could not be read: RuntimeError" in caplog.text
    assert "ada@" not in caplog.text


def test_a_button_of_an_older_question_does_nothing(opened: Open) -> None:
    desk, did = opened()
    c = Customer(desk)
    lead(c)
    old = c.last()["asked"]
    c.say("hm?")
    assert c.say("Yes, do it", asked=old) == "Shall I refund 40.00 for LW-12345?"
    assert did.named("refund") == []
    c.press("Yes, do it")
    assert len(did.named("refund")) == 1


def test_nobody_agrees_to_a_question_that_came_after_their_words(opened: Open) -> None:
    desk, did = opened(start=False)
    c = Customer(desk)
    c.begin()
    c.say("LW-12345")
    for text in ("Broken", "yes"):
        desk.conversations.say(c.id, text)
    assert c.heard() == "Shall I refund 40.00 for LW-12345?"
    assert did.named("refund") == []


def test_after_some_unusable_answers_a_person_is_called(opened: Open) -> None:
    desk, _ = opened()
    c = Customer(desk)
    c.begin()
    for _ in range(3):
        c.say("no idea")
    assert desk.conversations.get(c.id).reason == "procedure_stuck"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ActionFailed("it was refused (402)"), "action_failed"),
     (OutcomeUnknown("no answer within 5 s"), "action_unknown")],
)  # fmt: skip
def test_an_action_that_fails_calls_a_person_with_the_reason(error: Exception, reason: str, opened: Open) -> None:
    desk, did = opened(refund=error)
    c = Customer(desk)
    lead(c)
    assert c.press("Yes, do it") == "I have called a person, who takes it from here."
    assert desk.conversations.get(c.id).reason == reason
    detail = note(desk, c.id)["detail"]
    assert detail.startswith(f"Return an order, step 6 of 7 (refund): {error}")
    assert f"refund: {'failed' if reason == 'action_failed' else 'unknown'}" in detail
    assert len(did.named("refund")) == 1


@pytest.mark.parametrize("way", ["ask_for_person", "take"])
def test_a_person_ends_it_at_any_time_and_knows_what_was_said(way: str, opened: Open) -> None:
    desk, did = opened()
    c = Customer(desk)
    lead(c)
    desk.conversations.ask_for_person(c.id) if way == "ask_for_person" else desk.conversations.take(c.id, "bea")
    detail = note(desk, c.id)["detail"]
    assert "refund was under way and has ended here." in detail
    assert {"order: LW-12345", "reason: Broken", "find: done"} <= set(detail.splitlines())
    desk.conversations.back_to_bot(c.id)
    assert c.say("Yes, do it") == "All is well.", "it does not go on where it was"
    assert did.named("refund") == []


# How one begins


def test_it_begins_by_an_expert_by_what_is_near_a_trigger_and_else_not(opened: Open) -> None:
    near = {"I want to send my order back": 1.0, "Please take my order back": 0.8, "Order?": 0.5}

    def embed(texts: Any) -> Any:
        return np.array([[near.get(t, 0.0), (1 - near.get(t, 0.0) ** 2) ** 0.5] for t in texts], np.float32)

    desk, _ = opened(embed=embed, says=lambda t: Script("All is well.", "returns" if "helmet" in t else "shop"))
    for said, begins in (("Please take my order back", True), ("Order?", False), ("My helmet broke", True)):
        assert (Customer(desk).say(said) == "What is your order number?") is begins, said


def test_an_order_number_in_the_first_message_is_not_asked_for_again(opened: Open) -> None:
    desk, _ = opened(says=lambda _t: Script("", "returns"))
    assert Customer(desk).say("Take LW-12345 back") == "Why do you send it back?"


# Approval


def approve(desk: Desk, c: Customer, yes: bool = True, role: str = "agent", agent: str = "bea") -> None:
    assert desk.procedures
    desk.procedures.decide(desk.conversations, c.id, agent, role, desk.procedures.runs.waiting()[0]["run"], yes)


def test_what_needs_an_approval_waits_for_a_person_who_sees_what_will_be_done(opened: Open) -> None:
    desk, did = opened(find=order("250.00"))
    c = Customer(desk)
    lead(c)
    assert c.press("Yes, do it") == "A colleague looks at this first. You will hear here."
    assert desk.conversations.get(c.id).state == "bot"
    (waits,) = desk.procedures.runs.waiting()  # type: ignore[union-attr]
    assert (waits["action"], waits["arguments"], waits["agreed"], waits["by"]) == (
        "Refund an order", {"order": "LW-12345", "amount": "250.00"}, True, "agent",
    )  # fmt: skip
    assert c.say("How long will it take?") == "All is well.", "the conversation goes on"
    assert did.named("refund") == []
    approve(desk, c)
    assert c.heard() == "Done, number R-1: 250.00 for LW-12345."
    assert desk.procedures.runs.recorded(waits["run"])[-1].approved_by == "bea"  # type: ignore[union-attr]
    assert desk.procedures.runs.waiting() == []  # type: ignore[union-attr]


def test_a_refusal_is_told_and_nothing_is_done(opened: Open) -> None:
    desk, did = opened(find=order("250.00"))
    c = Customer(desk)
    lead(c)
    c.press("Yes, do it")
    run = desk.procedures.runs.waiting()[0]["run"]  # type: ignore[union-attr]
    approve(desk, c, yes=False)
    assert c.heard() == "A colleague looked at this and could not approve it."
    with pytest.raises(Changed):
        desk.procedures.decide(desk.conversations, c.id, "cem", "agent", run, True)  # type: ignore[union-attr]
    assert did.named("refund") == []


def test_while_it_waits_the_customer_may_stop_it_and_a_person_withdraws_it(opened: Open) -> None:
    desk, did = opened(find=order("250.00"))
    for leave in ("stop", "person"):
        c = Customer(desk, leave)
        lead(c)
        c.press("Yes, do it")
        run = desk.procedures.runs.waiting()[0]["run"]  # type: ignore[union-attr]
        if leave == "stop":
            assert c.say("Stop this") == "All right, I have stopped. Nothing more will be done."
        else:
            desk.conversations.ask_for_person(c.id)
        with pytest.raises((Changed, NotAllowed)):
            desk.procedures.decide(desk.conversations, c.id, "bea", "agent", run, True)  # type: ignore[union-attr]
        settled(desk, c.id)
    assert did.named("refund") == []


def test_a_supervisor_must_decide_where_the_file_says_so(opened: Open) -> None:
    text = REFUND.replace('approve = "agent"', 'approve = "supervisor"')
    desk, did = opened(find=order("250.00"), files={"refund": text})
    c = Customer(desk)
    lead(c)
    c.press("Yes, do it")
    with pytest.raises(NotAllowed, match="supervisor"):
        approve(desk, c)
    approve(desk, c, role="supervisor")
    assert c.heard().startswith("Done")
    assert len(did.named("refund")) == 1


def test_a_decision_that_comes_while_the_assistant_answers_is_acted_on_after_it(opened: Open) -> None:
    import threading

    gate = threading.Event()
    desk, _ = opened(find=order("250.00"), says=lambda _t: Script("One. Two.", gate=gate))
    c = Customer(desk)
    lead(c)
    c.press("Yes, do it")
    desk.conversations.say(c.id, "Is it long?")
    desk.wake(c.id)
    while not desk.working:
        threading.Event().wait(0.01)
    approve(desk, c)
    gate.set()
    assert c.heard().startswith("Done")
    assert [m.text for m in desk.conversations.messages(c.id) if m.author == "bot"][-2:] == [
        "One. Two.", "Done, number R-1: 250.00 for LW-12345.",
    ]  # fmt: skip


# What is in the database


def test_a_change_of_the_file_hands_over_what_is_under_way(opened: Open, tmp_path: Path) -> None:
    desk, _ = opened()
    c = Customer(desk)
    lead(c)
    desk.close()
    desk, did = opened(files={"refund": REFUND.replace("30", "300")})
    c.desk = desk
    c.say("Yes")
    assert desk.conversations.get(c.id).reason == "procedure_changed"
    assert did.named("refund") == []


def test_the_database_itself_takes_no_action_without_its_agreement_or_approval(opened: Open, tmp_path: Path) -> None:
    desk, _ = opened(find=order("250.00"))
    c = Customer(desk)
    lead(c)
    c.press("Yes, do it")
    approve(desk, c)
    c.heard()
    with sqlite3.connect(tmp_path / "desk.db") as db:
        assert db.execute("SELECT count(*) FROM procedure_actions WHERE needs_approval").fetchone() == (1,)
        for column, value in (("agreed_seq", "NULL"), ("approved_by", "''")):
            with pytest.raises(sqlite3.IntegrityError):
                db.execute(f"UPDATE procedure_actions SET {column} = {value} WHERE needs_approval")


def test_every_action_is_in_the_audit_log_with_who_agreed_and_who_approved(opened: Open) -> None:
    lines: list[Any] = []
    desk, _ = opened(find=order("250.00"), told=lambda _s, actor, action, customer, detail: lines.append(
        (actor, action, customer, detail)))  # fmt: skip
    c = Customer(desk)
    lead(c)
    c.press("Yes, do it")
    approve(desk, c)
    c.heard()
    assert [(a, w) for a, w, _, d in lines if d.get("step") != "find"] == [
        ("bot", "procedure.begin"), ("agent:bea", "procedure.decide"), ("bot", "procedure.action"),
        ("bot", "procedure.action"), ("bot", "procedure.end"),
    ]  # fmt: skip
    begun = next(d for *_, d in lines if d.get("step") == "refund")
    assert (begun["outcome"], begun["approved_by"]) == ("begun", "bea")
    assert begun["agreed"] == 7
    assert "LW-12345" not in str(lines)
