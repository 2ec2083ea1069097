"""Conversations, whatever happens to them: no message lost, none doubled, order kept, one owner."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError

from coterie.desk.conversation import NEXT, Conversations, Handoff
from coterie.desk.message import Changed, NoConversation, NotAllowed, Turn
from coterie.errors import CoterieError, StorageError
from coterie.store.database import _prepare_sqlite, open_database, writing

ALL = ("message", "note", "suggestion", "event")
AGENTS = ("bea", "cem")
HANDOFF = Handoff("low_confidence", summary="The customer asks for a thing.", suggestion="You could say this.")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/desk.db"
    url: str = request.getfixturevalue("new_postgres")(migrated=True)
    return url


@pytest.fixture
def desk(url: str) -> Iterator[Conversations]:
    database = open_database(url)
    yield Conversations(database)
    database.dispose()


def said(desk: Conversations, id: str) -> list[tuple[str, str]]:
    return [(m.author, m.text) for m in desk.messages(id, kinds=("message",))]


# What each side can rely on


def test_a_conversation_goes_from_the_bot_to_a_person_and_back(desk: Conversations) -> None:
    c = desk.open("ada")
    desk.say(c.id, "Where is my order?")
    turn = desk.claim(c.id)
    assert turn
    assert [m.text for m in turn.messages] == ["Where is my order?"]
    assert desk.finish(turn, "", handoff=HANDOFF) == "sent"
    waiting = desk.get(c.id)
    assert (waiting.state, waiting.owner, waiting.reason) == ("waiting", "queue", "low_confidence")
    kinds = [m.kind for m in desk.messages(c.id, kinds=ALL)]
    assert kinds == ["message", "event", "note", "suggestion"]
    assert [m.kind for m in desk.messages(c.id)] == ["message", "event"], "customers do not see the rest"

    desk.take(c.id, "bea", seen="queue")
    desk.reply(c.id, "bea", "It left this morning.")
    assert desk.back_to_bot(c.id).owner == "bot"
    assert desk.claim(c.id) is None, "the customer's question has been answered"
    desk.say(c.id, "Thanks. And the invoice?")
    turn = desk.claim(c.id)
    assert turn
    assert desk.finish(turn, "It is in your mail.") == "sent"
    assert [who for who, _ in said(desk, c.id)] == ["customer", "agent:bea", "customer", "bot"]


def test_what_the_bot_finishes_after_a_take_over_is_a_suggestion(desk: Conversations) -> None:
    c = desk.open("ada")
    desk.say(c.id, "Hi")
    turn = desk.claim(c.id)
    assert turn
    desk.take(c.id, "bea")
    assert not desk.hold(turn)
    assert desk.finish(turn, "Hello!") == "suggested"
    assert said(desk, c.id) == [("customer", "Hi")]
    assert desk.messages(c.id, kinds=("suggestion",))[0].text == "Hello!"


def test_what_the_bot_finishes_after_another_message_is_discarded(desk: Conversations) -> None:
    c = desk.open("ada")
    desk.say(c.id, "Hi")
    old = desk.claim(c.id)
    desk.say(c.id, "Are you there?")
    new = desk.claim(c.id)
    assert old
    assert new
    assert [m.text for m in new.messages] == ["Hi", "Are you there?"]
    assert desk.finish(old, "Hello!") == "discarded"
    assert desk.finish(new, "Yes.") == "sent"
    assert desk.finish(new, "Yes.") == "discarded", "an answer is sent once"
    assert said(desk, c.id)[-1] == ("bot", "Yes.")


def test_a_person_who_hands_back_lets_the_bot_answer_what_is_open(desk: Conversations) -> None:
    c = desk.open("ada")
    desk.say(c.id, "Hi")
    turn = desk.claim(c.id)
    desk.take(c.id, "bea")
    with pytest.raises(NotAllowed, match="not yours"):
        desk.back_to_bot(c.id, by="cem")
    desk.back_to_bot(c.id, by="bea")
    assert turn
    assert desk.finish(turn, "late") == "discarded", "the answer of before the take-over"
    turn = desk.claim(c.id)
    assert turn
    assert desk.finish(turn, "Hello!") == "sent"


def test_only_the_owner_replies_and_a_collision_is_told(desk: Conversations) -> None:
    c = desk.open("ada")
    desk.ask_for_person(c.id)
    desk.take(c.id, "bea", seen="queue")
    with pytest.raises(Changed, match="its owner is agent:bea now"):
        desk.take(c.id, "cem", seen="queue")
    with pytest.raises(NotAllowed, match="not yours"):
        desk.reply(c.id, "cem", "Me too")
    desk.assign(c.id, "cem", "cem", seen="agent:bea")
    assert desk.reply(c.id, "cem", "Now me").author == "agent:cem"


def test_a_resend_is_not_doubled_and_keys_of_others_do_not_matter(desk: Conversations) -> None:
    c = desk.open("ada", key="tab1")
    assert desk.open("ada", key="tab1").id == c.id
    assert desk.open("bob", key="tab1").id != c.id
    first = desk.say(c.id, "Hi", key="1")
    assert desk.say(c.id, "Hi", key="1").seq == first.seq
    assert desk.say(c.id, "Hi", key="2").seq == first.seq + 1
    desk.take(c.id, "bea")
    reply = desk.reply(c.id, "bea", "Hello", key="1")
    desk.resolve(c.id, "bea")
    assert desk.reply(c.id, "bea", "Hello", key="1") == reply, "even when it could not be sent any more"
    assert len(said(desk, c.id)) == 3


def test_time_wakes_what_is_snoozed_and_ends_what_is_over(url: str) -> None:
    now = [1000.0]
    desk = Conversations(open_database(url), clock=lambda: now[0])
    asleep, idle, owed = desk.open("ada"), desk.open("bob"), desk.open("cy")
    desk.take(asleep.id, "bea")
    desk.snooze(asleep.id, "bea", 1500)
    desk.say(idle.id, "Hi")
    turn = desk.claim(idle.id)
    assert turn
    desk.finish(turn, "Hello")
    desk.say(owed.id, "Hi")
    assert desk.pass_time(idle_s=1000) == []
    now[0] = 1600
    assert desk.pass_time(idle_s=1000) == [asleep.id]
    assert (desk.get(asleep.id).state, desk.get(asleep.id).owner) == ("person", "agent:bea")
    now[0] = 2600
    assert desk.pass_time(idle_s=1000) == [idle.id], "not the one that waits for its answer"
    desk.say(idle.id, "One more thing")
    assert desk.get(idle.id).state == "bot"


def test_a_worker_that_dies_gives_its_answer_to_another(url: str) -> None:
    now = [1000.0]
    desk = Conversations(open_database(url), clock=lambda: now[0])
    c = desk.open("ada")
    desk.say(c.id, "Hi")
    assert desk.owed() == [c.id]
    first = desk.claim(c.id)
    assert first
    assert desk.owed() == []
    assert desk.claim(c.id) is None
    now[0] += 10
    assert desk.hold(first)
    now[0] += 10
    assert desk.claim(c.id) is None
    now[0] += 10
    assert desk.owed() == [c.id]
    second = desk.claim(c.id)
    assert second
    assert desk.finish(second, "Hello") == "sent"
    assert desk.finish(first, "Hello") == "discarded"


@pytest.mark.parametrize("text", ["", "  \n", "\0\x01", "\u200b\u200d\ufeff", "a" * 20_001, "half \ud83d"])
def test_a_message_that_says_nothing_or_too_much_is_refused(text: str, tmp_path: Path) -> None:
    desk = Conversations(open_database(f"sqlite:///{tmp_path}/desk.db"))
    c = desk.open("ada")
    with pytest.raises(CoterieError, match="message"):
        desk.say(c.id, text)
    assert desk.get(c.id).last_seq == 0


@pytest.mark.parametrize(
    "text", ["مرحبا، أين طلبي؟", "<script>alert(1)</script>", "a\u200bb", "🙂", "'; DROP TABLE messages; --"]
)
def test_other_messages_are_kept_as_they_are(text: str, desk: Conversations) -> None:
    c = desk.open("ada")
    desk.say(c.id, f"\0{text}\x07")
    assert said(desk, c.id) == [("customer", text)]
    assert [m.text for _, m in desk.search(text)[0]] == [text]


def test_another_customers_conversation_reads_as_if_there_were_none(desk: Conversations) -> None:
    c = desk.open("ada")
    for id, customer in ((c.id, "bob"), ("nonsense", "ada")):
        with pytest.raises(NoConversation, match="there is no conversation"):
            desk.get(id, customer)


# What the database refuses, whatever a program does


@pytest.mark.parametrize(
    "change",
    [
        "owner = 'agent:bea'", "owner = NULL", "owner = ''", "state = 'person'", "state = 'waiting'",
        "state = 'person', owner = 'agent:'", "state = 'nonsense'", "state = 'snoozed', owner = 'agent:bea'",
        "state = 'waiting', owner = 'queue', answering = 1", "wake_at = 5",
    ],
)  # fmt: skip
def test_the_database_refuses_a_conversation_without_exactly_one_owner(change: str, desk: Conversations) -> None:
    c = desk.open("ada")
    with pytest.raises(DBAPIError), desk.database.begin() as connection:
        connection.execute(sql(f"UPDATE conversations SET {change} WHERE id = :id"), {"id": c.id})


@pytest.mark.parametrize("author", ["bot", "agent:cem", "system"])
def test_the_database_lets_nobody_but_the_owner_speak(author: str, desk: Conversations) -> None:
    c = desk.open("ada")
    desk.take(c.id, "bea")
    insert = sql(
        "INSERT INTO messages (conversation_id, seq, author, kind, body, data, at) "
        "VALUES (:id, 9, :author, 'message', :body, '{}', 0)"
    )
    with pytest.raises(DBAPIError, match="only the owner"), desk.database.begin() as connection:
        connection.execute(insert, {"id": c.id, "author": author, "body": b"Hi"})


def test_two_writers_of_the_same_version_cannot_both_win(url: str) -> None:
    from sqlalchemy.orm.exc import StaleDataError

    from coterie.store.conversation import ConversationRow

    desk = Conversations(open_database(url))
    c = desk.open("ada")
    with writing(desk.database) as session:
        row = session.get(ConversationRow, c.id)
        assert row
        session.execute(sql("UPDATE conversations SET version = version + 1 WHERE id = :id"), {"id": c.id})
        row.queue = "sales"
        with pytest.raises(StaleDataError):
            session.flush()
        session.rollback()


def test_a_database_of_a_newer_coterie_is_left_alone(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path}/desk.db")
    with database.begin() as connection:
        connection.execute(sql("UPDATE alembic_version SET version_num = 'desk_9999' WHERE version_num LIKE 'desk%'"))
    database.dispose()
    with pytest.raises(StorageError, match="made by a newer version of coterie"):
        open_database(f"sqlite:///{tmp_path}/desk.db")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "not a URL"), ("mysql://x@y/z", "mysql is not supported"),
        ("sqlite:////proc/none/desk.db", "cannot be"), ("postgresql://x@127.0.0.1:1/z", "cannot be opened"),
    ],
)  # fmt: skip
def test_a_database_that_cannot_be_opened_is_said_in_a_sentence(url: str, says: str) -> None:
    with pytest.raises(CoterieError, match=says):
        open_database(url)


# Whatever order things happen in


class Interleavings(RuleBasedStateMachine):
    """Customer, bot, agents, time and restarts in any order, beside a plain list of what was accepted."""

    fresh: ClassVar[Callable[[], str]]

    @initialize()
    def begin(self) -> None:
        self.now, self.count = 1000.0, 0
        self.where = type(self).fresh()
        self.desk = Conversations(open_database(self.where), clock=lambda: self.now)
        self.id = self.desk.open("ada").id
        self.accepted: list[tuple[str, str]] = []
        self.keys: dict[str, tuple[str, str, int]] = {}  # of messages: their author, text and number
        self.turns: list[Turn] = []
        self.owner, self.state = "bot", "bot"

    def _text(self) -> str:
        self.count += 1
        return f"text {self.count}"

    def _allowed(self, action: str) -> bool:
        return (self.state, action) in NEXT

    def _try(self, action: str, do: Callable[[], Any], mine: bool = True) -> bool:
        """Do it; it must work exactly where the state and the owner allow it."""
        if mine and self._allowed(action):
            do()
            return True
        with pytest.raises(NotAllowed):
            do()
        return False

    @rule()
    def customer_says(self) -> None:
        text, key = self._text(), f"c{self.count}"
        self.keys[key] = ("customer", text, self.desk.say(self.id, text, key).seq)
        self.accepted.append(("customer", text))
        self.state = NEXT[self.state, "say"]
        self.owner = "bot" if self.state == "bot" else self.owner

    @precondition(lambda self: any(a == "customer" for a, _, _ in self.keys.values()))
    @rule(data=st.data())
    def customer_sends_again(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(k for k, v in self.keys.items() if v[0] == "customer")))
        _, text, seq = self.keys[key]
        assert self.desk.say(self.id, text, key).seq == seq

    @rule()
    def customer_asks_for_a_person(self) -> None:
        self.desk.ask_for_person(self.id)
        self.state = NEXT[self.state, "ask"]
        self.owner = "queue" if self.state == "waiting" else self.owner

    @rule()
    def customer_returns_to_the_bot(self) -> None:
        self.desk.back_to_bot(self.id)
        self.owner, self.state = "bot", "bot"

    @rule()
    def bot_begins(self) -> None:
        turn = self.desk.claim(self.id)
        if turn:
            assert self.state == "bot"
            assert [(m.author, m.text) for m in turn.messages] == self.accepted
            self.turns.append(turn)

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), handoff=st.sampled_from([None, HANDOFF]))
    def bot_finishes(self, data: st.DataObject, handoff: Handoff | None) -> None:
        turn, text = data.draw(st.sampled_from(self.turns)), self._text()
        self.turns.remove(turn)
        outcome = self.desk.finish(turn, text, handoff=handoff)
        if outcome == "sent":
            assert self.state == "bot"
            self.accepted.append(("bot", text))
            if handoff:
                self.owner, self.state = "queue", "waiting"
        elif outcome == "suggested":
            assert self.state in ("waiting", "person", "snoozed")

    @rule(agent=st.sampled_from(AGENTS), to=st.sampled_from(AGENTS))
    def agent_assigns(self, agent: str, to: str) -> None:
        self.desk.assign(self.id, agent, to)
        self.owner, self.state = f"agent:{to}", "person"

    @rule(agent=st.sampled_from(AGENTS))
    def agent_replies(self, agent: str) -> None:
        text, mine = self._text(), self.owner == f"agent:{agent}" and self.state in ("person", "snoozed")
        if mine:
            self.desk.reply(self.id, agent, text, f"a{self.count}")
            self.accepted.append((f"agent:{agent}", text))
            self.state = "person"
        else:
            with pytest.raises(NotAllowed):
                self.desk.reply(self.id, agent, text)

    @rule(agent=st.sampled_from(AGENTS))
    def agent_notes(self, agent: str) -> None:
        self.desk.note(self.id, agent, self._text())

    @rule(agent=st.sampled_from(AGENTS))
    def agent_releases(self, agent: str) -> None:
        if self._try("release", lambda: self.desk.release(self.id, agent), self.owner == f"agent:{agent}"):
            self.owner, self.state = "queue", "waiting"

    @rule(agent=st.sampled_from(AGENTS), seconds=st.floats(1, 100))
    def agent_snoozes(self, agent: str, seconds: float) -> None:
        mine = self.owner == f"agent:{agent}"
        if self._try("snooze", lambda: self.desk.snooze(self.id, agent, self.now + seconds), mine):
            self.state = "snoozed"

    @rule(agent=st.sampled_from(AGENTS))
    def agent_resolves(self, agent: str) -> None:
        self.desk.resolve(self.id, agent)
        self.owner = f"agent:{agent}" if self.owner == "queue" else self.owner
        self.state = "resolved"

    @rule(seconds=st.sampled_from([0.0, 10.0, 50.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.desk.pass_time(idle_s=900)
        seen = self.desk.get(self.id)
        if self.state != seen.state:
            assert (self.state, seen.state) in (("snoozed", "person"), ("bot", "resolved"))
            assert seen.answering is None, "a message that waits for its answer is not resolved by time"
            self.state = seen.state

    @rule()
    def everything_restarts(self) -> None:
        self.desk.database.dispose()
        self.desk = Conversations(open_database(self.where), clock=lambda: self.now)

    @invariant()
    def nothing_is_lost_doubled_or_out_of_order_and_one_owns(self) -> None:
        if not hasattr(self, "desk"):
            return
        entries = self.desk.messages(self.id, kinds=ALL)
        assert [m.seq for m in entries] == list(range(1, len(entries) + 1))
        assert [(m.author, m.text) for m in entries if m.kind == "message"] == self.accepted
        seen = self.desk.get(self.id)
        assert (seen.state, seen.owner) == (self.state, self.owner)
        spoke_last = next((a for a, _ in reversed(self.accepted)), None)
        if self.state == "bot" and spoke_last == "customer":
            assert seen.answering is not None, "the bot owes an answer to who spoke last"

    def teardown(self) -> None:
        if hasattr(self, "desk"):
            self.desk.database.dispose()


STEPS = settings(max_examples=15, stateful_step_count=40)


def test_any_interleaving_keeps_all_messages_and_one_owner(tmp_path: Path) -> None:
    numbers = iter(range(10_000))

    class OnSqlite(Interleavings):
        fresh = staticmethod(lambda: f"sqlite:///{tmp_path}/{next(numbers)}.db")

    OnSqlite.TestCase.settings = STEPS
    OnSqlite.TestCase("runTest").debug()


def test_any_interleaving_keeps_all_messages_and_one_owner_on_postgresql(new_postgres: Callable[..., str]) -> None:
    class OnPostgres(Interleavings):
        fresh = staticmethod(lambda: new_postgres(migrated=True))

    OnPostgres.TestCase.settings = settings(STEPS, max_examples=5)
    OnPostgres.TestCase("runTest").debug()


def test_a_connection_to_sqlite_waits_until_the_disk_has_what_it_wrote(tmp_path: Path) -> None:
    """As the product opens it; the connections of these tests do not wait (conftest.py)."""
    with closing(sqlite3.connect(tmp_path / "desk.db")) as connection:
        _prepare_sqlite(connection, None)
        found = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
    assert found == [2, "wal"]  # 2: FULL


def test_many_at_once_lose_nothing(url: str) -> None:
    """Threads of a customer, the bot and two agents, each at full speed on the same two conversations."""
    desk = Conversations(open_database(url))
    ids = [desk.open("ada").id, desk.open("bob").id]
    accepted: dict[tuple[str, str], list[str]] = {(i, w): [] for i in ids for w in ("customer", "bot", "bea", "cem")}

    def customer(id: str) -> None:
        for n in range(25):
            desk.say(id, f"customer {n}", key=str(n))
            desk.say(id, f"customer {n}", key=str(n))
            accepted[id, "customer"].append(f"customer {n}")

    def bot(id: str) -> None:
        for n in range(40):
            if (turn := desk.claim(id)) and desk.finish(turn, f"bot {n}") == "sent":
                accepted[id, "bot"].append(f"bot {n}")

    def agent(id: str, name: str) -> None:
        for n in range(8):
            desk.take(id, name)
            with suppress(NotAllowed):
                desk.reply(id, name, f"{name} {n}")
                accepted[id, name].append(f"{name} {n}")
            with suppress(NotAllowed):
                desk.back_to_bot(id, by=name)

    jobs = [(customer, (i,)) for i in ids] + [(bot, (i,)) for i in ids] + [(agent, (i, n)) for i in ids for n in AGENTS]
    threads = [threading.Thread(target=job, args=args) for job, args in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for id in ids:
        entries = desk.messages(id, kinds=ALL)
        assert [m.seq for m in entries] == list(range(1, len(entries) + 1))
        for who in ("customer", "bot", *AGENTS):
            author = f"agent:{who}" if who in AGENTS else who
            assert [m.text for m in entries if m.author == author and m.kind == "message"] == accepted[id, who]
        owner = "bot"
        for m in entries:
            owner = m.data["to"] if m.kind == "event" else owner
            assert m.kind != "message" or m.author in ("customer", owner)


WRITER = """
import os, sys, threading
from coterie.desk.conversation import Conversations
from coterie.store.database import open_database

desk = Conversations(open_database(sys.argv[1]))
def write(n):
    id = desk.open(f"customer {n}", key="1").id
    for k in range(100_000):
        seq = desk.say(id, f"message {k}", key=str(k)).seq
        os.write(1, f"{id} {k} {seq}\\n".encode())
for n in range(4):
    threading.Thread(target=write, args=(n,)).start()
"""


def test_a_process_killed_while_it_writes_loses_nothing_that_it_accepted(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/desk.db"
    open_database(url).dispose()
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(100)]
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
        process.wait()
        accepted = [line.split() for line in lines if line.endswith("\n")]
        desk = Conversations(open_database(url))
        kept = {i: {m.seq: m.text for m in desk.messages(i)} for i in {i for i, _, _ in accepted}}
        for id, k, seq in accepted:
            assert kept[id][int(seq)] == f"message {k}"
        for texts in kept.values():
            assert sorted(texts) == list(range(1, len(texts) + 1))
            assert len(set(texts.values())) == len(texts), "sent again after the restart, and not doubled"
        desk.database.dispose()
