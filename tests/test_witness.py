"""What is written down: who saw and did what at the desk, what visitors were told, and what they agreed to."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.config import Config
from coterie.desk.desk import Desk
from coterie.desk.rights import audited, rooms_of
from coterie.privacy.access import Limit
from coterie.privacy.audit import Audit
from coterie.privacy.house import House, open_house
from coterie.privacy.rights import erase_customer, export_customer, version_of
from coterie.store.database import open_database
from coterie.web import widget
from coterie.web.app import create_app
from coterie.web.door import COOKIE, Agent, open_door
from desk_support import Script, ScriptedAnswerer, ScriptedBusiness

ASKED, DISCLOSED = "May we learn from what you write?", "You are talking to a machine."
TOML = f"""
[desk]
disclosure = "{DISCLOSED}"
[privacy.consents.training]
text = "{ASKED}"
language = "en"
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    for name in ("SAYS", "VISITS", "ACTS"):
        monkeypatch.setattr(widget, name, Limit(1000, 60))
    database = open_database(f"sqlite:///{tmp_path}/.coterie/desk.db")
    opened = open_house(tmp_path, database, {})
    yield opened
    opened.close()


@pytest.fixture
def desk(house: House, tmp_path: Path) -> Desk:
    declared = {
        "desk": {"disclosure": DISCLOSED},
        "privacy": {"consents": {"training": {"text": ASKED, "language": "en"}}},
    }
    answerer: Any = ScriptedAnswerer(
        ScriptedBusiness(tmp_path, Config.model_validate(declared)), lambda _: Script("Yes.")
    )
    return Desk(answerer, house.database, None, house.seal, house.unseal, audited=audited(house))


@pytest.fixture
def opened(desk: Desk, house: House) -> TestClient:
    return TestClient(create_app(desk.answerer, desk, house), base_url="http://desk.example")


@pytest.fixture
def bea(opened: TestClient, tmp_path: Path) -> TestClient:
    agent = TestClient(opened.app, base_url="http://desk.example", headers={"X-Coterie-Desk": "1"})
    agent.cookies.set(COOKIE, open_door(tmp_path, []).invite(Agent("Bea", "supervisor")))
    return agent


def lines(house: House) -> list[tuple[str, str, str]]:
    """Actor, action and subject, the oldest first."""
    return [(line.actor, line.action, line.subject) for line in reversed(house.audit.lines())]


def talk(desk: Desk, customer: str, text: str) -> str:
    id = desk.conversations.open(customer).id
    desk.conversations.say(id, text)
    return id


# Who saw, and who changed


def test_whoever_is_shown_customers_words_in_a_list_is_on_record_once(
    desk: Desk, bea: TestClient, house: House
) -> None:
    ids = [talk(desk, customer, "My card is lost") for customer in ("ada", "ben")]
    desk.conversations.open("cat")  # who has said nothing, and of whom nothing is shown
    for _ in range(3):
        bea.get("/desk/api/conversations", params={"view": "bot"})
    assert sorted(lines(house)) == [("agent:Bea", "conversation.listed", c) for c in ("ada", "ben")]
    assert {line.detail["id"] for line in house.audit.lines()} == set(ids)
    assert house.audit.verify()[0] == 2


def test_a_search_is_on_record_with_whom_it_showed_and_never_for_what(
    desk: Desk, bea: TestClient, house: House
) -> None:
    talk(desk, "ada", "My card is lost")
    talk(desk, "ben", "Hello")
    for _ in range(2):
        assert len(bea.get("/desk/api/search", params={"q": "lost CARD"}).json()["conversations"]) == 1
    assert lines(house) == [
        ("agent:Bea", "conversation.search", ""), ("agent:Bea", "conversation.listed", "ada"),
    ]  # fmt: skip
    assert [line.detail.get("where") for line in house.audit.lines()] == ["search", None]
    assert "lost" not in str([line.detail for line in house.audit.lines()])


def test_what_agents_do_is_on_record_with_the_deed(desk: Desk, bea: TestClient, house: House, tmp_path: Path) -> None:
    id = talk(desk, "ada", "Hi")
    cem = TestClient(bea.app, base_url="http://desk.example")
    cem.cookies.set(COOKIE, open_door(tmp_path, []).invite(Agent("Cem", "agent")))
    cem.get("/desk/api/conversations?view=mine")  # who has been here can be given a conversation
    deeds: list[tuple[str, Any]] = [
        ("take", {}), ("replies", {"text": "Hello"}), ("notes", {"text": "odd"}), ("take", {"to": "Cem"}), ("take", {}),
        ("snooze", {"minutes": 5}), ("release", {}), ("take", {}), ("bot", {}), ("take", {}), ("resolve", {}),
    ]  # fmt: skip
    for path, body in deeds:
        assert bea.post(f"/desk/api/conversations/{id}/{path}", json=body).status_code == 200, path
    done = lines(house)
    assert {(actor, customer) for actor, _, customer in done} == {("agent:Bea", "ada")}
    assert [action.removeprefix("conversation.") for _, action, _ in done] == [
        "take", "reply", "note", "take", "take", "snooze", "release", "take", "back", "take", "resolve",
    ]  # fmt: skip
    assert [line.detail["to"] for line in house.audit.lines() if "to" in line.detail][-2:] == ["agent:Cem", "agent:Bea"]
    assert "Hello" not in str([line.detail for line in house.audit.lines()])
    assert house.audit.verify()[0] == 11


def test_a_deed_whose_line_cannot_be_written_is_not_done(desk: Desk, house: House) -> None:
    id = talk(desk, "ada", "Hi")

    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    desk.conversations.audited = broken
    with pytest.raises(OSError, match="full"):
        desk.conversations.take(id, "Bea")
    assert desk.conversations.get(id).owner == "bot"


def test_many_lines_at_once_are_one_chain(house: House) -> None:
    house.audit.record("a", "first")
    house.audit.record_all("b", [("seen", f"c{n}", {"id": n}) for n in range(200)])
    house.audit.record("a", "last")
    assert house.audit.verify()[0] == 202
    assert isinstance(house.audit, Audit)


# What visitors were told


def visit(opened: TestClient, **body: Any) -> dict[str, Any]:
    return dict(opened.post("/widget/visits", json=body).json())


def test_what_a_visitor_was_told_is_on_record_with_its_words(
    desk: Desk, opened: TestClient, house: House, tmp_path: Path
) -> None:
    token = visit(opened, language="de")["token"]
    visit(opened, token=token, language="de")  # a reload
    opened.post("/widget/conversations", json={"key": "1"}, headers={"Authorization": f"Bearer {token}"})
    (talk,) = desk.conversations.listed()
    (told,) = house.consents.of(talk.customer)
    assert told.pop("at") > 0
    assert told == {"purpose": "ai", "what": "told", "text": DISCLOSED, "language": "de",
                    "version": version_of(DISCLOSED, "de")}  # fmt: skip
    visit(opened, token=token, language="fr")
    assert [c["language"] for c in house.consents.of(talk.customer)] == ["de", "fr"]
    rooms = rooms_of(house, desk.business)
    assert len(export_customer(rooms, house.audit, talk.customer, "anna")["consents"]) == 2
    assert erase_customer(rooms, house.keys, house.audit, talk.customer, "anna")["consents"] == 2
    assert house.consents.of(talk.customer) == []


def test_the_same_words_are_told_again_after_a_day(house: House) -> None:
    now = [1e9]
    object.__setattr__(house.consents, "clock", lambda: now[0])
    for later in (0, 3600, 86400, 86400):
        now[0] += later
        house.consents.tell("ada", "ai", DISCLOSED)
    assert [c["at"] for c in house.consents.of("ada")] == [1e9, 1e9 + 90000, 1e9 + 176400]


def test_a_visitor_agrees_to_the_words_that_they_saw_and_takes_it_back(opened: TestClient, house: House) -> None:
    first = visit(opened)
    (asked,) = first["consents"]
    assert (asked["purpose"], asked["text"], asked["agreed"]) == ("training", ASKED, False)
    headers = {"Authorization": f"Bearer {first['token']}"}

    def say(**body: Any) -> Any:
        body = {"purpose": "training", "version": asked["version"], "agreed": True} | body
        return opened.post("/widget/consents", json=body, headers=headers)

    assert say(version="older").status_code == 400
    assert say(purpose="marketing").status_code == 400
    assert say().json()["consents"][0]["agreed"] is True
    assert visit(opened, token=first["token"])["consents"][0]["agreed"] is True
    assert say(agreed=False).json()["consents"][0]["agreed"] is False
    assert visit(opened)["consents"][0]["agreed"] is False, "another visitor has agreed to nothing"


def test_staff_write_down_and_read_consents_by_api_and_by_command(
    opened: TestClient, house: House, tmp_path: Path
) -> None:
    for name, role in (("olga", "owner"), ("cem", "agent")):
        house.accounts.add(name, role, "correct horse battery")
    token = house.accounts.token("cem", "site", ["customers"], 1).secret
    site = TestClient(opened.app, headers={"Authorization": f"Bearer {token}"})
    at = "/v1/customers/c-1/consents"
    body = {"purpose": "training", "what": "agreed", "text": ASKED, "language": "en"}
    assert site.post(at, json=body).json() == {"agreed": True}
    assert site.post(at, json=body | {"what": "maybe"}).status_code == 400
    (tmp_path / "coterie.toml").write_text(TOML)
    command: Callable[..., Any] = lambda *words: CliRunner().invoke(app, [*words, "--folder", str(tmp_path)])  # noqa: E731
    done = command("customers", "consent", "c-1", "training", "withdrawn", "--text", ASKED)
    assert (done.exit_code, "not agreed" in done.output) == (0, True)
    assert [c["what"] for c in site.get(at).json()["consents"]] == ["agreed", "withdrawn"]
    assert ASKED in command("customers", "consents", "c-1", "--json").output
    written = [(actor, action) for actor, action, subject in lines(house) if subject == "c-1"]
    assert written == [("cem", "consent.agreed"), ("cli", "consent.withdrawn"), ("cem", "consents.read"),
                       ("cli", "consents.read")]  # fmt: skip


# Search goes on


def test_a_search_says_where_it_stopped_and_goes_on_from_there(desk: Desk, bea: TestClient, monkeypatch: Any) -> None:
    talks = desk.conversations
    old = talk(desk, "ada", "needle")
    for n in range(5):
        talk(desk, f"c{n}", "hay")
    found, further = talks.search("needle", at_once=4)
    assert (found, further is None) == ([], False)
    found, further = talks.search("needle", before=further, at_once=4)
    assert ([c.id for c, _ in found], further) == ([old], None)
    first = [c.id for c, _ in talks.search("hay", limit=2)[0]]
    again, _ = talks.search("hay", before=talks.search("hay", limit=2)[1])
    assert len(first) == 2
    assert len({c.id for c, _ in again} - set(first)) == 3
    reply = bea.get("/desk/api/search", params={"q": "needle"}).json()
    assert (reply["conversations"][0]["id"], reply["before"]) == (old, None)
