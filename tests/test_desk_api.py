"""The doors of the desk: what a visitor's page and an agent's page may do, and what nobody may."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from itsdangerous import URLSafeTimedSerializer
from joserfc import jwt
from joserfc.jwk import OctKey

from coterie.config import DeskRuleSpec
from coterie.desk.conversation import Conversations
from coterie.desk.desk import Desk
from coterie.errors import StorageError
from coterie.privacy.access import Limit
from coterie.privacy.house import open_house
from coterie.privacy.tables import AccountRow
from coterie.store.database import open_database, writing
from coterie.web import widget
from coterie.web.app import create_app
from coterie.web.door import COOKIE, TOKEN_S, Agent, Door, open_door
from desk_support import Script, open_desk, scripted, settled

SHOP, KEY, IDENTITY = "https://shop.example", "k" * 32, "i" * 32
AGENT = {"X-Coterie-Desk": "1"}
ALL_KINDS = ("message", "note", "suggestion", "event")


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTERIE_DESK_KEY", KEY)
    monkeypatch.setenv("COTERIE_IDENTITY_KEY", IDENTITY)
    monkeypatch.setattr(widget, "SAYS", Limit(30, 60))
    monkeypatch.setattr(widget, "VISITS", Limit(120, 60))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    answerer = scripted(tmp_path, lambda text: Script(f"You said {text}."), origins=[SHOP])
    desk = open_desk(answerer, f"sqlite:///{tmp_path}/desk.db")
    yield desk
    desk.close()


@pytest.fixture
def app(desk: Desk) -> FastAPI:
    return create_app(desk.answerer, desk)


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://desk.example")


class Visitor:
    """A page of the shop."""

    def __init__(self, client: TestClient, site: str = SHOP, **visit: str) -> None:
        self.client, self.headers = client, {"Origin": site}
        self.visited = client.post("/widget/visits", json=visit, headers=self.headers)
        self.headers["Authorization"] = f"Bearer {self.visited.json().get('token')}"

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(f"/widget/{path}", json=body, headers=self.headers)

    def begin(self) -> str:
        return str(self.post("conversations", key="1").json()["id"])

    def entries(self, id: str, desk: Desk) -> list[dict[str, Any]]:
        settled(desk, id)
        return [widget.public(m) for m in desk.conversations.messages(id)]


def agent(client: TestClient, name: str = "Bea", role: Any = "agent") -> TestClient:
    inside = TestClient(client.app, base_url="http://desk.example", headers=AGENT)
    inside.cookies.set(COOKIE, Door(KEY, []).invite(Agent(name, role)))
    return inside


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# Visitors


def test_a_visitor_writes_and_is_answered(client: TestClient, desk: Desk) -> None:
    visitor = Visitor(client)
    assert visitor.visited.json()["disclosure"].startswith("You are talking to an AI")
    id = visitor.begin()
    assert visitor.post(f"conversations/{id}/messages", text="Hi", key="a").json() == {"seq": 1}
    assert visitor.post(f"conversations/{id}/messages", text="Hi", key="a").json() == {"seq": 1}
    assert [(e["author"], e["text"]) for e in visitor.entries(id, desk)] == [
        ("customer", "Hi"),
        ("bot", "You said Hi."),
    ]
    assert visitor.post(f"conversations/{id}/person").json()["state"] == "waiting"
    assert visitor.post(f"conversations/{id}/bot").json()["state"] == "bot"
    assert visitor.post(f"conversations/{id}/ratings", seq=2, good=False, reason="No.").status_code == 200
    assert desk.conversations.disliked(id) == {2: "No."}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"\xff\xfe\x00", 400), (b"", 400), (b"[]", 400), (b'{"text": 5, "key": "b"}', 400),
        (b'{"text": "\\ud800", "key": "b"}', 400), ('{"text": "\u200b\u200d\ufeff", "key": "b"}'.encode(), 400),
        (b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"text": "x", "key": "b", "asked": 1e400}', 400),
        (b'{"text": "' + b"x" * 20_001 + b'", "key": "b"}', 400), (b'{"text": "' + b"x" * (9 << 20) + b'"}', 413),
        ('{"text": "\u202e\u0634\u0643 <script>alert(1)</script>", "key": "b"}'.encode(), 200),
    ],
)  # fmt: skip
def test_a_body_that_is_no_message_is_refused_with_its_reason(body: bytes, status: int, client: TestClient) -> None:
    visitor = Visitor(client)
    headers = {**visitor.headers, "Content-Type": "application/json"}
    reply = client.post(f"/widget/conversations/{visitor.begin()}/messages", content=body, headers=headers)
    assert reply.status_code == status
    assert status == 200 or reply.json()["error"]["message"]


@pytest.mark.parametrize("number", [-1, 2**31, 10**30])
def test_a_number_that_no_entry_can_have_is_refused(number: int, client: TestClient) -> None:
    visitor = Visitor(client)
    id = visitor.begin()
    assert visitor.post(f"conversations/{id}/ratings", seq=number, good=True).status_code == 400
    assert visitor.post(f"conversations/{id}/messages", text="Yes", key="a", asked=number).status_code == 400
    reply = client.get(f"/widget/conversations/{id}/events", params={"after": number}, headers=visitor.headers)
    assert reply.status_code == 400


def test_who_asks_for_anothers_conversation_is_on_record_once(tmp_path: Path, client: TestClient, desk: Desk) -> None:
    with closing(open_house(tmp_path, desk.conversations.database, {})) as house:
        inside = TestClient(create_app(desk.answerer, desk, house), base_url="http://desk.example")
        visitor, other = Visitor(inside), Visitor(inside)
        id = visitor.begin()
        for _ in range(3):
            assert other.post(f"conversations/{id}/person").status_code == 404
        assert other.post("conversations/none/person").status_code == 404
        (line,) = house.audit.lines()
        assert line.action == "conversation.refused"
        assert line.subject == desk.conversations.get(id).customer
        assert line.actor.removeprefix("customer:") not in ("", line.subject, line.actor)
        assert line.detail["id"] == id


def test_what_agents_know_is_not_in_what_customers_see(client: TestClient, desk: Desk) -> None:
    visitor = Visitor(client)
    id = visitor.begin()
    desk.conversations.take(id, "Bea")
    desk.conversations.note(id, "Bea", "A secret.")
    desk.conversations.reply(id, "Bea", "Hello.")
    seen = json.dumps(visitor.entries(id, desk))
    assert "Hello." in seen
    for secret in ("A secret.", "reason", "similarity", "logprob", "agent:"):
        assert secret not in seen


def forged(payload: Any, key: str = KEY, salt: str = "coterie-visitor") -> str:
    return str(URLSafeTimedSerializer(key, salt).dumps(payload))


@pytest.mark.parametrize(
    "token",
    ["", "nonsense", forged(["ada", SHOP], "x" * 32), forged(["ada", "https://other.example"]),
     forged(["ada", SHOP], salt="coterie-agent"), forged("ada"), forged({"a": 1}), "é"],
    ids=["empty", "nonsense", "other key", "other site", "other salt", "no site", "no list", "not ASCII"],
)  # fmt: skip
def test_a_forged_token_opens_nothing(token: str, client: TestClient, desk: Desk) -> None:
    id = desk.conversations.open("ada").id
    headers = {"Origin": SHOP, "Authorization": f"Bearer {token}".encode()}
    asked = client.post(f"/widget/conversations/{id}/messages", json={"text": "Hi", "key": "1"}, headers=headers)
    assert code(asked) == (401, "not_signed_in")
    assert desk.conversations.messages(id) == []


def test_a_token_expires_and_is_renewed_for_the_same_visitor(
    client: TestClient, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = Visitor(client)
    id = visitor.begin()
    old = visitor.visited.json()["token"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + TOKEN_S + 60)
    assert code(visitor.post(f"conversations/{id}/person")) == (401, "not_signed_in")
    again = Visitor(client, token=old)
    assert again.visited.json()["conversation"] == id
    assert again.post(f"conversations/{id}/person").status_code == 200
    monkeypatch.setattr(time, "time", lambda: now + 40 * 24 * 3600)
    assert Visitor(client, token=old).visited.json()["conversation"] is None


def test_only_listed_sites_may_show_the_widget(client: TestClient) -> None:
    assert code(Visitor(client, "https://evil.example").visited) == (403, "forbidden")
    assert code(Visitor(client, "null").visited) == (403, "forbidden")
    assert Visitor(client, "http://desk.example").visited.status_code == 200, "its own site"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    good = client.options("/widget/visits", headers={"Origin": SHOP, **asked})
    assert good.headers["access-control-allow-origin"] == SHOP
    assert (
        "access-control-allow-origin"
        not in client.options("/widget/visits", headers={"Origin": "https://evil.example", **asked}).headers
    )
    for path in ("/v1/models", "/desk/api/conversations"):
        assert "access-control-allow-origin" not in client.get(path, headers={"Origin": SHOP}).headers


def test_a_site_vouches_for_its_customer(client: TestClient, desk: Desk) -> None:
    def word(claims: dict[str, Any], key: str = IDENTITY) -> str:
        return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(key))

    soon = int(time.time()) + 300
    visitor = Visitor(client, identity=word({"sub": "ada@example.com", "exp": soon}))
    assert desk.conversations.get(visitor.begin()).customer == "ada@example.com"
    none = jwt.encode({"alg": "HS256"}, {"sub": "x", "exp": soon}, OctKey.import_key(IDENTITY)).split(".")
    for bad in (
        word({"sub": "ada", "exp": soon - 1000}), word({"sub": "ada", "exp": soon}, "x" * 32), word({"sub": "ada"}),
        word({"exp": soon}), word({"sub": "visitor-1", "exp": soon}), word({"sub": 7, "exp": soon}), "nonsense",
        word({"sub": "coterie:audit", "exp": soon}),
        f"eyJhbGciOiJub25lIn0.{none[1]}.",
    ):  # fmt: skip
        assert code(Visitor(client, identity=bad).visited) == (401, "not_signed_in")
    renewed = Visitor(client, token=visitor.visited.json()["token"]).visited.json()
    assert renewed["conversation"] is None, "a token is no word of the site"


@pytest.mark.parametrize("path", ["messages", "stop", "person", "bot", "ratings"])
def test_another_customers_conversation_is_not_found(path: str, client: TestClient, desk: Desk) -> None:
    id = desk.conversations.open("ada").id
    before = desk.conversations.get(id)
    body = {"text": "Hi", "key": "1", "seq": 1, "good": True}
    assert code(Visitor(client).post(f"conversations/{id}/{path}", **body)) == (404, "conversation_not_found")
    assert desk.conversations.get(id) == before
    events = client.get(f"/widget/conversations/{id}/events", headers=Visitor(client).headers)
    assert code(events) == (404, "conversation_not_found")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"text": "", "key": "1"}, 400), ({"text": "\u200b\0", "key": "1"}, 400),
        ({"text": "a" * 20_001, "key": "1"}, 400), ({"text": "Hi"}, 400), ({"text": 7, "key": "1"}, 400),
        ({"text": "Hi", "key": ""}, 400), ({"text": "Hi", "key": "é"}, 400),
        ({"text": "مرحبا <b>", "key": "1"}, 200),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_taken_are_refused_in_words(
    body: dict[str, Any], status: int, client: TestClient
) -> None:
    visitor = Visitor(client)
    asked = visitor.post(f"conversations/{visitor.begin()}/messages", **body)
    assert asked.status_code == status
    if status != 200:
        assert asked.json()["error"]["message"]


def test_who_writes_too_often_is_asked_to_wait(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widget, "SAYS", Limit(3, 60))
    visitor = Visitor(client)
    id = visitor.begin()
    asked = [visitor.post(f"conversations/{id}/messages", text="Hi", key=str(n)) for n in range(3)]
    assert [a.status_code for a in asked] == [200, 200, 429]
    assert 1 <= int(asked[2].headers["Retry-After"]) <= 60
    assert Visitor(client).begin(), "others go on"


def test_the_script_may_come_from_anywhere_and_files_beside_it_may_not(client: TestClient) -> None:
    for path in ("/widget.js", "/widget/static/widget.js", "/widget/static/render.js", "/widget/static/tokens.css"):
        assert client.get(path).headers["access-control-allow-origin"] == "*"
    for path in ("/widget/static/../desk.py", "/widget/static/%2e%2e%2fdesk.py", "/widget/static/chat.css"):
        assert client.get(path).status_code == 404


# Agents


def test_an_invitation_opens_the_desk_and_nothing_else_does(client: TestClient) -> None:
    page = client.get("/desk")
    assert page.status_code == 401
    assert "coterie desk invite" in page.text
    for token in ("nonsense", forged(["Eve", "supervisor"], "x" * 32, "coterie-agent"), forged(["Eve", "supervisor"])):
        assert client.get("/desk", params={"invite": token}).status_code == 401
        inside = TestClient(client.app, headers=AGENT, cookies={COOKIE: token})
        assert code(inside.get("/desk/api/conversations")) == (401, "not_signed_in")
    came = client.get("/desk", params={"invite": Door(KEY, []).invite(Agent("Bea"))}, follow_redirects=False)
    assert came.status_code == 303
    cookie = came.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert agent(client).get("/desk").status_code == 200


def test_another_sites_form_cannot_act_for_an_agent(client: TestClient, desk: Desk) -> None:
    id = desk.conversations.open("ada").id
    inside = agent(client)
    del inside.headers["X-Coterie-Desk"]
    assert code(inside.post(f"/desk/api/conversations/{id}/resolve")) == (403, "forbidden")
    assert desk.conversations.get(id).state == "bot"


def test_an_agent_works_through_a_conversation(client: TestClient, desk: Desk) -> None:
    id = desk.conversations.open("ada").id
    desk.conversations.say(id, "Hi")
    desk.wake(id)
    settled(desk, id)
    desk.conversations.ask_for_person(id)
    bea, cem = agent(client), agent(client, "Cem")
    listed = bea.get("/desk/api/conversations").json()
    assert [c["last"]["text"] for c in listed["conversations"]] == ["You said Hi."]
    assert listed["counts"] == {"waiting": 1, "mine": 0, "approvals": 0}
    assert (listed["queues"], listed["people"]) == ({"general": 1}, ["Bea"])
    path = f"/desk/api/conversations/{id}"
    assert bea.post(f"{path}/take", json={"seen": "queue"}).json()["owner"] == "agent:Bea"
    assert code(cem.post(f"{path}/take", json={"seen": "queue"})) == (409, "conversation_changed")
    assert code(cem.post(f"{path}/replies", json={"text": "Me"})) == (409, "not_allowed_now")
    cem.post(f"{path}/looking", json={"typing": True})
    assert bea.get(path).json()["present"] == [{"name": "Cem", "typing": True}]
    assert bea.post(f"{path}/replies", json={"text": "Hello", "key": "1"}).json()["seq"] == 5
    assert bea.post(f"{path}/replies", json={"text": "Hello", "key": "1"}).json()["seq"] == 5
    assert bea.post(f"{path}/notes", json={"text": "A note"}).status_code == 200
    assert bea.get("/desk/api/search", params={"q": "a NOTE"}).json()["conversations"][0]["id"] == id
    assert bea.post(f"{path}/snooze", json={"minutes": 60}).json()["state"] == "snoozed"
    assert bea.post(f"{path}/release").json()["state"] == "waiting"
    assert bea.post(f"{path}/take", json={"to": "Cem"}).json()["owner"] == "agent:Cem"
    assert cem.post(f"{path}/bot").json()["state"] == "bot"
    assert bea.post(f"{path}/resolve").json()["state"] == "resolved"
    assert code(bea.get("/desk/api/conversations/none")) == (404, "conversation_not_found")


@pytest.mark.parametrize(
    ("declared", "language", "disclosure", "greeting"),
    [
        ({}, "ar", "أنت تتحدث مع ذكاء اصطناعي", "كيف"), ({}, "de-AT", "Sie sprechen mit einer KI", "Wie"),
        ({}, "pl", "You are talking to an AI", "How"), ({}, "", "You are talking to an AI", "How"),
        ({"disclosure": "I am Rob."}, "ar", "I am Rob.", "كيف"),
        ({"disclosure": "I am Rob.", "languages": {"ar": {"disclosure": "أنا روب"}}}, "ar", "أنا روب", "كيف"),
        ({"languages": {"pl": {"disclosure": "To AI.", "greeting": "Dzień dobry"}}}, "pl-PL", "To AI.", "Dzień dobry"),
    ],
)  # fmt: skip
def test_a_visitor_reads_the_first_words_in_their_language(
    declared: dict[str, Any], language: str, disclosure: str, greeting: str, tmp_path: Path
) -> None:
    answerer = scripted(tmp_path, lambda _: Script("Hi."), origins=[SHOP], **declared)
    desk = open_desk(answerer, f"sqlite:///{tmp_path}/desk.db", start=False)
    client = TestClient(create_app(answerer, desk), base_url="http://desk.example")  # type: ignore[arg-type]
    said = client.post("/widget/visits", json={"language": language}, headers={"Origin": SHOP}).json()
    assert said["disclosure"].startswith(disclosure)
    assert said["greeting"].startswith(greeting)
    desk.close()


def test_a_case_keeps_its_queue_and_queues_are_listed_apart(client: TestClient, desk: Desk) -> None:
    desk.spec.rules.append(DeskRuleSpec(reason="grief", words=["grief"], queue="care"))
    care, general = (desk.conversations.open(name).id for name in ("ada", "bob"))
    desk.conversations.ask_for_person(care, queue="care")
    desk.conversations.ask_for_person(general)
    bea = agent(client)

    def waiting(queue: str) -> list[str]:
        found = bea.get("/desk/api/conversations", params={"queue": queue}).json()
        assert found["queues"] == {"general": 1, "care": 1}
        return [c["id"] for c in found["conversations"]]

    assert (waiting("care"), waiting("general"), set(waiting(""))) == ([care], [general], {care, general})
    path = f"/desk/api/conversations/{care}"
    bea.post(f"{path}/take", json={})
    assert bea.post(f"{path}/release").json()["queue"] == "care"
    bea.post(f"{path}/take", json={})
    refused = bea.post(f"{path}/release", json={"queue": "cear"})
    assert (refused.status_code, "there is no 'cear'" in refused.json()["error"]["message"]) == (400, True)
    assert bea.post(f"{path}/release", json={"queue": "general"}).json()["queue"] == "general"


def test_a_conversation_is_given_only_to_who_works_at_the_desk(client: TestClient, desk: Desk) -> None:
    id = desk.conversations.open("ada").id
    path = f"/desk/api/conversations/{id}"
    desk.conversations.ask_for_person(id)
    bea = agent(client)
    with writing(desk.conversations.database) as session:
        for name, role, disabled in (("Dan", "agent", False), ("Eve", "viewer", False), ("Fay", "agent", True)):
            session.add(AccountRow(name=name, role=role, password="", totp=b"", totp_last=0, subject="", failures=0,
                                   locked_until=0.0, made_at=0.0, disabled=disabled))  # fmt: skip
    for name in ("Cme", "Eve", "Fay"):
        refused = bea.post(f"{path}/take", json={"to": name})
        assert (refused.status_code, f"nobody named '{name}'" in refused.json()["error"]["message"]) == (400, True)
    assert desk.conversations.get(id).owner == "queue"
    agent(client, "Cem").get("/desk/api/conversations")
    assert bea.get("/desk/api/conversations").json()["people"] == ["Bea", "Cem", "Dan"]
    for name in ("Cem", "Dan"):
        assert bea.post(f"{path}/take", json={"to": name}).json()["owner"] == f"agent:{name}"


def test_only_supervisors_see_the_overview(client: TestClient, desk: Desk) -> None:
    desk.conversations.ask_for_person(desk.conversations.open("ada").id)
    assert code(agent(client).get("/desk/api/state")) == (403, "forbidden")
    state = agent(client, role="supervisor").get("/desk/api/state").json()
    assert (state["counts"], state["queues"]) == ({"waiting": 1}, {"general": 1})
    assert state["reasons"] == {"asked_for_a_person": 1}


def test_a_profile_that_cannot_be_read_is_said_and_stops_nothing(tmp_path: Path) -> None:
    from coterie.desk.flow import Parts

    def down(_customer: str) -> dict[str, Any]:
        raise TimeoutError

    desk = open_desk(scripted(tmp_path, lambda _t: Script("Yes.")), f"sqlite:///{tmp_path}/d.db", Parts(profile=down))
    try:
        id = desk.conversations.open("ada").id
        said = agent(TestClient(create_app(desk.answerer, desk))).get(f"/desk/api/conversations/{id}").json()
        assert said["trouble"] == "The customer's profile could not be read."
    finally:
        desk.close()


# Keys


def test_a_key_is_made_once_and_is_for_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTERIE_DESK_KEY")
    token = open_door(tmp_path, []).invite(Agent("Bea"))
    assert open_door(tmp_path, []).invited(token) == Agent("Bea")
    file = tmp_path / ".coterie" / "desk.key"
    assert file.stat().st_mode & 0o077 == 0
    file.write_text("")
    with pytest.raises(StorageError, match="no key in it"):
        open_door(tmp_path, [])


def test_no_message_is_lost_when_many_visitors_write_at_once(client: TestClient, desk: Desk) -> None:
    def visit(n: int) -> None:
        visitor = Visitor(client)
        ids[n] = visitor.begin()
        for k in range(5):
            assert visitor.post(f"conversations/{ids[n]}/messages", text=f"{n} {k}", key=str(k)).status_code == 200

    ids: dict[int, str] = {}
    threads = [threading.Thread(target=visit, args=(n,)) for n in range(10)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for n in range(10):
        settled(desk, ids[n])
        said = [m.text for m in desk.conversations.messages(ids[n]) if m.author == "customer"]
        assert said == [f"{n} {k}" for k in range(5)]


SERVER = """
import sys
from pathlib import Path
import uvicorn
sys.path.insert(0, sys.argv[1])
from coterie.store.database import open_database
from coterie.web import widget
from coterie.web.app import create_app
from coterie.privacy.access import Limit
from desk_support import Script, open_desk, scripted

widget.SAYS = Limit(1_000_000, 60)
folder = Path(sys.argv[2])
desk = open_desk(scripted(folder, lambda text: Script("Yes. " * 20)), f"sqlite:///{folder}/desk.db")
uvicorn.run(create_app(desk.answerer, desk), port=int(sys.argv[3]), log_level="warning")
"""


def test_a_server_killed_under_load_loses_no_accepted_message(tmp_path: Path) -> None:
    """Visitors write while the server is killed and started anew; they send again what they got no word of."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent), str(tmp_path), str(port)]
    over, accepted, ids = threading.Event(), dict[int, list[str]](), dict[int, str]()

    def patiently(visitor: httpx.Client, path: str, body: dict[str, Any]) -> Any:
        while True:
            try:
                return visitor.post(path, json=body).raise_for_status().json()
            except httpx.TransportError:
                time.sleep(0.05)

    def visit(n: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/widget", timeout=10) as visitor:
            token = patiently(visitor, "/visits", {})["token"]
            visitor.headers["Authorization"] = f"Bearer {token}"
            ids[n], accepted[n] = patiently(visitor, "/conversations", {"key": "1"})["id"], []
            while not over.is_set():
                text = f"message {len(accepted[n])} of {n}"
                patiently(visitor, f"/conversations/{ids[n]}/messages", {"text": text, "key": str(len(accepted[n]))})
                accepted[n].append(text)

    threads = [threading.Thread(target=visit, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for round in range(3):
        server = subprocess.Popen(command)
        try:
            before = sum(map(len, accepted.values()))
            while sum(map(len, accepted.values())) < before + 40:
                assert server.poll() is None, "the server ended by itself"
                time.sleep(0.01)
            if round == 2:
                over.set()
                for t in threads:
                    t.join()
        finally:
            server.kill()
            server.wait()
    talks = Conversations(open_database(f"sqlite:///{tmp_path}/desk.db"))
    for n, texts in accepted.items():
        entries = talks.messages(ids[n], kinds=ALL_KINDS)
        assert [m.text for m in entries if m.author == "customer"] == texts
        assert [m.seq for m in entries] == list(range(1, len(entries) + 1))


def test_what_is_written_while_a_page_is_slow_comes_in_one_piece(desk: Desk) -> None:
    id = desk.conversations.open("ada").id

    async def read() -> list[str]:
        events, came = widget._events(desk, id, 0), list[str]()
        while not came or not came[-1].startswith("event: state"):
            came.append(await anext(events))
        for word in ("Yes", ", we", " are open."):
            desk.live.write(id, word)
        came = [await anext(events)]
        desk.live.write(id, " Until")
        desk.live.write(id, " six.")
        desk.live.written(id)
        return [*came, await anext(events), await anext(events)]

    texts = [json.loads(e.partition("data: ")[2]).get("text") for e in asyncio.run(read())]
    assert texts == ["Yes, we are open.", " Until six.", None]
