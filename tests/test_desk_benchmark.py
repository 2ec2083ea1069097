"""The harness of whole contacts says what happened: the gold oracle is right, and nobody else is by accident."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import desk
import desk_actions
import numpy as np
import pytest
from common import Report
from desk_bank import Front
from desk_tasks import (
    Reply,
    Run,
    Task,
    answers,
    handed_over,
    oracle,
    play,
    products,
    read_documents,
    read_tasks,
    replay,
    state,
)

from coterie.desk.confidence import Confidence, Signals
from coterie.desk.conversation import Conversations
from coterie.desk.flow import Parts
from coterie.desk.knowing import check
from coterie.desk.procedures.actions import Actions
from coterie.desk.procedures.procedures import Procedures
from coterie.desk.procedures.runs import Runs
from coterie.desk.procedures.spec import read_procedures
from coterie.grounding import Grounding
from coterie.knowledge.evidence import Evidence
from coterie.store.database import open_database
from desk_support import Script, ScriptedAnswerer, scripted
from knowledge_support import WordEmbedder

DECLARED = Path(desk.__file__).parent / "bank"
FACT = Evidence("bank", "fees.md > Fees", "The Gold Rewards Card has no annual fee.", 0.7)


@pytest.fixture(scope="module")
def tasks(public_data: Callable[[str], Path]) -> list[Task]:
    return read_tasks(public_data("tau2_banking"))


@pytest.fixture(scope="module")
def names(tasks: list[Task], public_data: Callable[[str], Path]) -> list[str]:
    return products(tasks, read_documents(public_data("tau2_banking")))


def test_the_gold_oracle_solves_all_and_doing_nothing_or_more_does_not(tasks: list[Task]) -> None:
    assert len(tasks) == 97
    assert all(replay(t).verified for t in tasks)
    changing = [t for t in tasks if t.state]
    assert len(changing) > 80
    assert not any(Run(t).verified for t in changing), "leaving things as they are is no solution"
    extra = {"name": "apply_for_credit_card", "arguments": {"card_type": "Other"}}
    assert not any(Run(t, t.wants_person, [*oracle(t, ()).actions, extra]).verified for t in tasks)


def test_calling_a_person_counts_where_the_gold_solution_calls_one(tasks: list[Task], names: list[str]) -> None:
    runs = [play(t, lambda _t, _s: Reply(person=True), names) for t in tasks]
    assert not any(r.assumed or r.silent_failure for r in runs)
    assert {r.task.name for r in runs if r.verified} == {t.name for t in tasks if t.wants_person and not t.state}


def test_the_customer_acts_on_what_the_assistant_names(tasks: list[Task], names: list[str]) -> None:
    task = next(t for t in tasks if t.name == "task_001")
    good = play(task, lambda _t, _s: Reply("Take the Gold Rewards Card."), names)
    bad = play(task, lambda _t, _s: Reply("Take the Bronze Rewards Card, not the Gold Rewards Card."), names)
    none = play(task, lambda _t, _s: Reply("We have many cards."), names)
    assert (good.verified, bad.silent_failure, none.silent_failure) == (True, True, True)


def test_the_customer_tells_facts_only_when_asked_and_never_the_gold_answer(
    tasks: list[Task], names: list[str]
) -> None:
    for task in tasks:
        heard: list[str] = []

        def listen(_task: Task, said: object, heard: list[str] = heard) -> Reply:
            heard[:] = list(said)  # type: ignore[call-overload]
            return Reply("What is your income?" if len(heard) < 4 else "Goodbye.")

        play(task, listen, names)
        assert heard[0] == task.opening
        assert set(heard[2::2]) <= set(task.facts)


def test_order_and_looking_things_up_do_not_change_the_state() -> None:
    a, b = {"name": "submit_referral", "arguments": {"x": 1}}, {"name": "change_user_email", "arguments": {}}
    look = {"name": "get_referrals_by_user", "arguments": {"user_id": "1"}}
    inner = {"name": "call_discoverable_agent_tool", "arguments": {"agent_tool_name": "get_x"}}
    assert state([a, look, b, inner]) == state([b, a])
    assert state([a, a]) != state([a])


def test_the_customer_opens_in_their_own_words(tasks: list[Task]) -> None:
    by_name = {t.name: t for t in tasks}
    assert by_name["task_050"].opening.startswith("Hi, I'd like to request a credit limit increase")
    assert not any("**" in t.opening for t in tasks if t.opening.startswith("Hi"))
    assert sum(t.opening.startswith(("Hi", "Hey", "Hello")) for t in tasks) > 80


def fronted(
    folder: Path, says: Callable[[str], Script], parts: Parts | None = None, confidence: Confidence | None = None
) -> Front:  # fmt: skip
    """The answer flow with the bank's own procedures and a scripted model."""

    def embed(texts: Sequence[str]) -> Any:
        """Of one direction: what is about limits; of another: what says "account"; of none: all else."""
        near = [2 if "limit" in t else 1 if "account" in t else 0 for t in texts]
        return np.array([[0, 0], [1, 0], [0, 1]], np.float32)[near]

    folder.mkdir(exist_ok=True)
    database = open_database(f"sqlite:///{folder}/desk.db")
    runs = Runs(database, read_procedures(DECLARED), Actions(folder, DECLARED))
    found = parts or Parts(ground=lambda _q, _r: [FACT])
    talks = Conversations(database, beside=runs)
    parts = Parts(ground=found.ground, check=found.check, procedures=Procedures(runs, embed))
    return Front(scripted(folder, says, unknown="hand_over"), talks, parts, confidence)  # type: ignore[arg-type]


def test_coterie_is_the_answer_flow_with_the_banks_knowledge(tasks: list[Task], tmp_path: Path) -> None:
    card = next(t for t in tasks if t.name == "task_001")
    front = fronted(tmp_path / "one", lambda _t: Script("Take the Gold Rewards Card.", logprob=-0.25))
    reply = front.reply(card, [card.opening])
    assert (reply.text, reply.person) == ("Take the Gold Rewards Card.", False)
    assert reply.signals == Signals(0.9, -0.25, 0.7)
    assert FACT.text in front.answerer.asked[-1][-1]["content"]  # type: ignore[attr-defined]

    grounding: Any = Grounding(front.answerer, SimpleNamespace(comparing=WordEmbedder()))  # type: ignore[arg-type]
    checked = Parts(ground=lambda _q, _r: [FACT], check=partial(check, grounding))
    fee = Script("The yearly fee of the card is 95 dollars.")
    reply = fronted(tmp_path / "two", lambda _t: fee, checked).reply(card, [card.opening])
    assert (reply.person, reply.reason, reply.text) == (True, "unsupported", "")

    nothing = Parts(ground=lambda _q, _r: [])
    reply = fronted(tmp_path / "three", lambda _t: Script("It costs 3.", None), nothing).reply(card, [card.opening])
    assert (reply.person, reply.reason, reply.text) == (True, "not_known", "")


@pytest.mark.parametrize(("name", "alone"), [("task_050", True), ("task_052", True), ("task_046", False)])
def test_a_procedure_acts_at_the_bank_without_a_model(
    name: str, alone: bool, tasks: list[Task], names: list[str], tmp_path: Path
) -> None:
    """The bank's policy, declared, raises a limit, refuses one, and calls a person for what it does not cover."""
    task = next(t for t in tasks if t.name == name)
    opening = task.opening if alone else "I want to close my account"
    front = fronted(tmp_path, lambda _t: Script("I am a model."))
    run = play(Task(name, opening, task.facts, task.gold, ()), front.reply, names)
    assert run.verified == alone
    assert run.escalated != alone
    assert run.done[0]["name"] == "log_verification"
    assert not front.answerer.asked  # type: ignore[attr-defined]
    assert run.replies[-1].reason == ("" if alone else "account_matter")


def test_two_proofs_identify_a_customer_and_a_name_does_not() -> None:
    def find(told: str) -> object:
        found = desk_actions.find("task_050", told)
        return found and found["user_id"]

    assert find("Sofia Papadopoulos, 347-555-0387, sofia.p@outlook.com") == "584f9c5d00"
    assert find("I am 584f9c5d00, Sofia, born January 25, 1986, at (347) 555-0387") == "584f9c5d00"
    assert find("Sofia Papadopoulos, user id 584f9c5d00, sofia.p@outlook.com") is None
    assert find("sofia.p@outlook.com, born 01/25/1987") is None
    assert find("sofia.p@outlook.com and, of somebody else, 619-555-0756") is None


def confidence(threshold: float) -> Confidence:
    """By the log-probability alone: e to its power is the confidence's odds."""
    zero = (0.0, 0.0, 0.0)
    return Confidence(zero, (1.0, 1.0, 1.0), (0.0, 1.0, 0.0), zero, 0.0, threshold, 0.02, 100, 0.5, 0.0)


def test_thresholds_set_afterwards_hand_over_what_the_desk_would(
    tasks: list[Task], names: list[str], tmp_path: Path
) -> None:
    """Each contact is played once; at a threshold it goes the way that a desk with this confidence takes."""

    def says(text: str) -> Script:
        sure = -0.1 if len(text) % 3 else -4.0
        return Script("Which one do you mean?" if len(text) % 2 else "Take the Gold Rewards Card.", logprob=sure)

    fitted, some = confidence(0.3), [t for t in tasks[::4] if "account" not in t.opening and "limit" not in t.opening]
    once, strict = fronted(tmp_path / "once", says), fronted(tmp_path / "strict", says, confidence=fitted)
    ways = set()
    for task in some:
        after, before = play(task, once.reply, names), play(task, strict.reply, names)
        cut = handed_over(after, fitted.sure)
        assert (cut.escalated, cut.done, len(cut.replies)) == (before.escalated, before.done, len(before.replies))
        ways.add((after.escalated, cut.escalated))
    assert ways >= {(False, True), (False, False)}


def test_an_answer_is_right_where_its_contact_ends_right(tasks: list[Task], names: list[str]) -> None:
    task, signals = next(t for t in tasks if t.name == "task_001"), Signals(None, -0.1, 0.5)
    sent = play(task, lambda _t, _s: Reply("Take the Gold Rewards Card.", signals=signals), names)
    wrong = play(task, lambda _t, _s: Reply("Take the Bronze Rewards Card.", signals=signals), names)
    kept = play(task, lambda _t, _s: Reply("", (), True, signals, "unsupported"), names)
    ruled = play(task, lambda _t, _s: Reply(person=True, reason="asked_for_a_person"), names)
    assert answers([sent, wrong, kept, ruled]) == ([signals] * 2, [True, False])


def test_all_systems_serve_the_same_customers_and_what_cannot_be_calibrated_is_not_sent(
    public_data: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ScriptedAnswerer] = []

    @contextmanager
    def bank(*_args: object) -> Iterator[Front]:
        front = fronted(tmp_path, lambda _t: Script("We have many cards."))
        asked.append(front.answerer)  # type: ignore[arg-type]
        yield front

    class Elsewhere:
        def __init__(self, *_args: object) -> None: ...

        def ask(self, _messages: object, _most: int) -> tuple[str, list[float]]:
            return "We have many cards.", []

    for name, value in {"bank": bank, "Server": Elsewhere, "load": lambda *_a, **_k: None, "pull": str}.items():
        monkeypatch.setattr(desk, name, value)
    report = Report("")
    desk.contacts(report, argparse.Namespace(quick=True, url="there", model_name="big", model=""))
    figures = report.figures
    assert figures["oracle_verified"] == 1
    assert asked[0].asked, "coterie's answers go through the flow"
    assert figures["coterie_verified_by_the_model"] == 0
    assert figures["coterie_assumed"] > figures["coterie_at_2_assumed"] == figures["deflection_at_2"]
    assert any("would refuse" in line for line in report.markdown)
    systems = [line for line in report.markdown if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in systems[2:]] == [
        "| oracle (gold)", "| escalate all", "| BM25-FAQ", "| base model", "| coterie, not calibrated",
        "| coterie, not calibrated (5 held-out)", *(f"| coterie, {e}% wrong wished (5 held-out)" for e in (1, 2, 5)),
    ]  # fmt: skip
