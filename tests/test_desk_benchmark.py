"""The harness of whole contacts says what happened: the gold oracle is right, and nobody else is by accident."""

from collections.abc import Callable
from pathlib import Path

import pytest
from desk_tasks import Reply, Run, Task, oracle, play, products, read_documents, read_tasks, replay, state


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
