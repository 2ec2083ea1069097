"""Webhooks: signed, in order, at least once, and again on request."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.business import Business
from coterie.cli.main import main
from coterie.desk.conversation import Conversations
from coterie.desk.desk import database_of
from coterie.desk.rights import audited, rooms_of
from coterie.desk.webhook import KINDS, Webhook, Webhooks, replay, sign, verify
from coterie.errors import CoterieError
from coterie.privacy.house import open_house
from coterie.privacy.rights import erase_customer
from coterie.store.database import open_database, writing
from desk_support import Script, open_desk, scripted

URL, SECRET = "https://crm.example/hook", "s" * 32


class Receiver:
    """Takes what it is sent, or answers as `answers` says first."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.answers: list[Any] = []

    def post(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        if answer == 200:
            assert verify(SECRET, headers["X-Coterie-Signature"], body, now[0])
            self.got.append((json.loads(body), headers))
        return int(answer)


now = [1000.0]


@pytest.fixture
def told(tmp_path: Path) -> tuple[Conversations, Receiver, Callable[..., Webhooks]]:
    now[0] = 1000.0
    talks, receiver = Conversations(open_database(f"sqlite:///{tmp_path}/d.db"), clock=lambda: now[0]), Receiver()

    def hooks(**more: Any) -> Webhooks:
        return Webhooks(talks, [Webhook(URL, SECRET, **more)], lambda: now[0], receiver.post)

    hooks().deliver()  # from here on it is told
    return talks, receiver, hooks


def test_what_happens_is_told_in_order_and_once(told: Any) -> None:
    talks, receiver, hooks = told
    c = talks.open("ada")
    talks.say(c.id, "A secret order")
    talks.ask_for_person(c.id)
    talks.note(c.id, "bea", "private")
    now[0] += 5
    assert hooks().deliver() == 2
    assert hooks().deliver() == 0
    (said, _), (asked, _) = receiver.got
    assert (said["seq"], said["kind"], said["author"], said["customer"]) == (1, "message", "customer", "ada")
    assert (asked["kind"], asked["action"], asked["to"]) == ("event", "ask", "queue")
    assert "A secret order" not in json.dumps(receiver.got), "texts are told only where that is declared"


def test_texts_are_told_where_declared(told: Any) -> None:
    talks, receiver, hooks = told
    talks.say(talks.open("ada").id, "Hi")
    now[0] += 5
    hooks(texts=True, kinds=("message",)).deliver()
    assert [body["text"] for body, _ in receiver.got] == ["Hi"]


@pytest.mark.parametrize("failure", [500, 302, 404, httpx.ConnectError("down"), httpx.ReadTimeout("slow")], ids=str)
def test_a_receiver_that_fails_is_tried_again_later_and_misses_nothing(failure: Any, told: Any) -> None:
    talks, receiver, hooks = told
    id = talks.open("ada").id
    for n in range(3):
        talks.say(id, str(n))
    receiver.answers = [200, failure, failure]
    now[0] += 5
    assert hooks(kinds=("message",)).deliver() == 1
    assert hooks(kinds=("message",)).deliver() == 0, "not at once"
    now[0] += 3
    assert hooks(kinds=("message",)).deliver() == 0
    now[0] += 3
    assert hooks(kinds=("message",)).deliver() == 0, "the pause grows"
    now[0] += 3
    assert hooks(kinds=("message",)).deliver() == 2
    assert [body["seq"] for body, _ in receiver.got] == [1, 2, 3]


def test_a_replay_tells_it_again_under_the_same_ids(told: Any) -> None:
    talks, receiver, hooks = told
    id = talks.open("ada").id
    talks.say(id, "old")
    now[0] = 2000
    talks.say(id, "new")
    now[0] += 5
    hooks().deliver()
    hooks().replay(URL, 1500)
    hooks().deliver()
    assert [headers["X-Coterie-Event"] for _, headers in receiver.got] == ["1", "2", "2"]
    with pytest.raises(CoterieError, match="there is no webhook"):
        hooks().replay("https://other.example", 0)


def test_a_replay_while_entries_are_told_is_not_lost(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    talks, receiver, hooks = told
    id = talks.open("ada").id
    for n in range(3):
        talks.say(id, str(n))
    now[0] += 5
    at_work, post = hooks(kinds=("message",)), receiver.post

    def replayed_meanwhile(url: str, body: bytes, headers: dict[str, str]) -> int:
        status = post(url, body, headers)
        if len(receiver.got) == 2:
            replay(talks.database, URL, entry=1)
        return int(status)

    at_work.post = replayed_meanwhile
    at_work.deliver()
    at_work.deliver()
    assert [body["id"] for body, _ in receiver.got] == [1, 2, 1, 2, 3]


def test_the_command_lists_addresses_and_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now[0] = 1000.0
    (tmp_path / "coterie.toml").write_text("")
    talks, receiver = Conversations(database_of(Business.open(tmp_path)), clock=lambda: now[0]), Receiver()
    hooks = Webhooks(talks, [Webhook(URL, SECRET)], lambda: now[0], receiver.post)
    hooks.deliver()
    id = talks.open("ada").id
    for n in range(3):
        now[0] += 100
        talks.say(id, str(n))
    now[0] += 5
    hooks.deliver()

    def run(*args: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(["desk", "webhooks", *args, "-f", str(tmp_path)])
        except SystemExit as error:
            code = int(error.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    (listed,) = json.loads(run("list", "--json")[1])
    assert (listed["url"], listed["told"], listed["waiting"]) == (URL, 3, 0)
    assert json.loads(run("replay", "3", "--json")[1]) == {URL: 1}
    hooks.deliver()
    since = datetime.fromtimestamp(1150).isoformat()
    assert json.loads(run("replay", "--since", since, "--url", URL, "--json")[1]) == {URL: 2}
    hooks.deliver()
    assert [body["id"] for body, _ in receiver.got] == [1, 2, 3, 3, 2, 3]
    for args, says in (
        (["replay"], "say either"), (["replay", "1", "--since", "2026-01-01"], "say either"),
        (["replay", "99"], "there is no entry 99"), (["replay", "--since", "monday"], "is no time"),
        (["replay", "1", "--url", "https://other.example"], "there is no webhook"),
    ):  # fmt: skip
        code, _, err = run(*args)
        assert code == 2
        assert says in err


@given(body=st.binary(max_size=50), at=st.integers(0, 10**9), off=st.integers(-1000, 1000))
def test_a_signature_holds_for_its_body_and_its_time_only(body: bytes, at: int, off: int) -> None:
    header = sign(SECRET, body, at)
    assert verify(SECRET, header, body, at + off) == (abs(off) <= 300)
    assert not verify("x" * 32, header, body, at)
    assert not verify(SECRET, header, body + b"!", at)
    assert not verify(SECRET, header.replace(f"t={at}", f"t={at + 1}"), body, at)


@pytest.mark.parametrize("header", ["", "t=,v1=", "t=1,v1=zz", "v1=" + "0" * 64, "t=1000,v1=" + "é" * 64])
def test_a_malformed_signature_is_refused(header: str) -> None:
    assert not verify(SECRET, header, b"", 1000)


def test_the_desk_needs_the_secret_and_delivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [{"url": URL, "secret_env": "HOOK_SECRET"}]
    answerer = scripted(tmp_path, lambda _t: Script("Yes."), webhooks=declared)
    with pytest.raises(CoterieError, match="the environment has no HOOK_SECRET"):
        open_desk(answerer, f"sqlite:///{tmp_path}/d.db")
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    desk = open_desk(answerer, f"sqlite:///{tmp_path}/d.db", start=False)
    assert desk.webhooks.hooks == [Webhook(URL, SECRET, list(KINDS))]
    desk.close()


def test_thumbs_steps_of_procedures_and_erasures_are_told_too(tmp_path: Path) -> None:
    now[0] = 1000.0
    database = open_database(f"sqlite:///{tmp_path}/.coterie/desk.db")
    house, receiver = open_house(tmp_path, database, {}), Receiver()
    object.__setattr__(house.audit, "clock", lambda: now[0])
    talks = Conversations(database, house.seal, house.unseal, lambda: now[0])

    def hooks(**more: Any) -> Webhooks:
        return Webhooks(talks, [Webhook(URL, SECRET, **more)], lambda: now[0], receiver.post)

    hooks().deliver()
    c = talks.open("ada")
    talks.take(c.id, "bea")
    answer = talks.reply(c.id, "bea", "No.")
    for good in (True, False):
        talks.rate(c.id, answer.seq, good, "My secret reason")
    with writing(database) as session:
        detail = {"procedure": "refund", "step": "pay", "key": "r-1", "outcome": "done"}
        audited(house)(session, "bot", "procedure.action", "ada", detail)
        audited(house)(session, "coterie", "crm.case", "ada", {})
    now[0] += 5
    receiver.answers = [200, 200, 200, 500]
    assert hooks().deliver() == 3, "two entries and the first thumb; then the receiver fails"
    now[0] += 5
    assert hooks().deliver() == 2
    assert hooks().deliver() == 0
    others = [(body, headers["X-Coterie-Event"]) for body, headers in receiver.got[2:]]
    assert [(b["kind"], b["customer"], b.get("good"), b.get("outcome")) for b, _ in others] == [
        ("rating", "ada", True, None), ("rating", "ada", False, None), ("action", "ada", None, "done"),
    ]  # fmt: skip
    assert [name for _, name in others] == [b["id"] for b, _ in others] == ["rating-1", "rating-2", "action-3"]
    assert others[0][0]["conversation"] == c.id
    assert "secret" not in json.dumps(receiver.got), "reasons are told only where texts are"
    assert replay(database, URL, since=1000.0) == 5
    hooks(texts=True, kinds=("rating",)).deliver()
    assert [b["text"] for b, _ in receiver.got[5:]] == ["My secret reason"] * 2
    (tmp_path / "coterie.toml").write_text("[business]\n")
    rooms = rooms_of(house, Business.open(tmp_path))
    hooks().deliver()
    erase_customer(rooms, house.keys, house.audit, "ada", "anna")
    now[0] += 5
    receiver.got.clear()
    assert hooks().deliver() == 1
    assert [(b["kind"], b["customer"], b["conversation"]) for b, _ in receiver.got] == [("erasure", "ada", None)]
    assert replay(database, URL, since=1000.0) == 1, "of an erased customer nothing else is left to tell"
    house.close()


@pytest.mark.parametrize("meanwhile", [False, True])
def test_what_follows_an_erasure_is_told_though_sqlite_gives_its_id_again(meanwhile: bool, tmp_path: Path) -> None:
    """Whether the newest entry was told before it was erased, or is erased on its way out."""
    now[0] = 1000.0
    (tmp_path / "coterie.toml").write_text("[business]\n")
    house = open_house(tmp_path, open_database(f"sqlite:///{tmp_path}/d.db"))
    talks = Conversations(house.database, house.seal, house.unseal, clock=lambda: now[0])
    rooms, got = rooms_of(house, Business.open(tmp_path)), list[dict[str, Any]]()

    def post(url: str, body: bytes, headers: dict[str, str]) -> int:
        got.append(json.loads(body))
        if meanwhile and got[-1]["customer"] == "ada":
            erase_customer(rooms, house.keys, house.audit, "ada", "anna")
        return 200

    hooks = Webhooks(talks, [Webhook(URL, SECRET, kinds=("message",))], lambda: now[0], post)
    hooks.deliver()
    talks.say(talks.open("ben").id, "First")
    talks.say(talks.open("ada").id, "Soon erased")
    now[0] += 5
    assert hooks.deliver() == 2
    if not meanwhile:
        erase_customer(rooms, house.keys, house.audit, "ada", "anna")
    talks.say(talks.open("cleo").id, "New")
    now[0] += 5
    assert hooks.deliver() == 1
    assert [g["customer"] for g in got] == ["ben", "ada", "cleo"]
    assert got[1]["id"] == got[2]["id"], "else there is nothing to test"
    house.close()


def test_an_address_is_told_only_the_kinds_that_it_wants(told: Any) -> None:
    talks, _, hooks = told
    c = talks.open("ada")
    talks.take(c.id, "bea")
    talks.rate(c.id, talks.reply(c.id, "bea", "Hi").seq, True)
    now[0] += 5
    assert hooks(kinds=("message",)).deliver() == 1
    assert hooks(kinds=("rating",)).deliver() == 1
