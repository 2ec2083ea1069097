"""Who may do what: every route with every role, sessions, tokens, second factor, and what other sites try."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyotp
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pwdlib import PasswordHash
from starlette.routing import BaseRoute, Mount

from coterie.business import Business
from coterie.desk.desk import Desk
from coterie.errors import Busy
from coterie.privacy import accounts as accounts_module
from coterie.privacy.access import MAY, PERMISSIONS, ROLES, Forbidden, Limit, NotSignedIn, Role
from coterie.privacy.accounts import AccountError, Accounts
from coterie.privacy.house import House, open_house
from coterie.privacy.master import KeyLost
from coterie.privacy.rights import Room
from coterie.privacy.tables import AccountRow
from coterie.store.database import open_database, reading
from coterie.web import access, widget
from coterie.web import door as door_module
from coterie.web.app import create_app
from coterie.web.door import COOKIE as DESK_COOKIE
from coterie.web.door import Agent, open_door
from coterie.web.events import Streams

WORD = "correct horse battery"
LOCAL = {"base_url": "http://localhost:8000", "client": ("127.0.0.1", 50000)}
AWAY = {"base_url": "http://shop.example", "client": ("203.0.113.7", 50000)}


@contextmanager
def house_in(folder: Path) -> Iterator[House]:
    database = open_database(f"sqlite:///{folder}/coterie.db")
    opened = open_house(folder, database, {})
    yield opened
    opened.close()
    database.dispose()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with house_in(tmp_path) as opened:
        yield opened


def staffed(tmp_path: Path) -> Iterator[House]:
    """A house with an owner, an agent and a reviewer, who are named so and sign in with WORD; for a fixture."""
    with house_in(tmp_path) as opened:
        for role in ("owner", "agent", "reviewer"):
            opened.accounts.add(role, role, WORD)
        yield opened


class _Engine:
    """As much of an engine as the pages ask for."""

    alive = True

    def load_numbers(self) -> tuple[int, int]:
        return 0, 0


class _Answerer:
    def __init__(self, business: Business) -> None:
        self.business, self.engine = business, _Engine()
        self.engine.base = business.config.business  # type: ignore[attr-defined]
        self.engine.stats = None  # type: ignore[attr-defined]


def application(house: House | None, folder: Path, rooms: Callable[[], list[Room]] = list) -> FastAPI:
    (folder / "coterie.toml").write_text('[business]\nname = "Shop"\n')
    answerer: Any = _Answerer(Business.open(folder))
    desk = Desk(answerer, house.database, None, house.seal, house.unseal) if house else None
    return create_app(answerer, desk, house, rooms)


@pytest.fixture
def app(house: House, tmp_path: Path) -> FastAPI:
    return application(house, tmp_path)


@pytest.fixture
def staff(house: House) -> dict[Role, str]:
    """An account of each role, named after it: the secret of a session."""
    for role in ROLES:
        if role != "visitor":
            house.accounts.add(role, role, WORD)
    return {role: house.accounts.login(role, WORD).secret for role in ROLES if role != "visitor"}


def every_route(routes: Sequence[BaseRoute], prefix: str = "") -> Iterator[tuple[str, BaseRoute]]:
    """With their whole paths. Those of included routers too (FastAPI keeps each router whole), and of the widget, which
    is an application of its own."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner:
            yield from every_route(inner.routes, prefix)
        elif isinstance(route, Mount) and isinstance(route.app, FastAPI):
            yield from every_route(route.app.routes, prefix + route.path)
        else:
            yield prefix + getattr(route, "path", ""), route


def called(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route that has code of ours."""
    return [(m, path) for path, r in every_route(app.routes) if isinstance(r, APIRoute) for m in sorted(r.methods)]


def client(app: FastAPI, secret: str = "", where: dict[str, Any] = AWAY) -> TestClient:
    cookies = {access.COOKIE: secret} if secret else None
    return TestClient(app, cookies=cookies, follow_redirects=False, raise_server_exceptions=False, **where)


def test_every_route_declares_who_may_call_it(app: FastAPI) -> None:
    found = {f"{method} {path}" for method, path in called(app)}
    assert found >= {"GET /healthz", "POST /desk/api/conversations/{id}/take", "POST /widget/conversations/{id}/bot"}
    plain = {path for path, r in every_route(app.routes) if not isinstance(r, APIRoute)}
    assert plain <= access.UNGATED
    assert found - set(access.ROUTES) == set(), "add it to coterie.web.access.ROUTES"
    assert set(access.ROUTES) - found == set(), "there is no such route any more"
    words = {access.OPEN, access.OWN, access.SELF, access.SESSION, access.DESK, access.LEAD, access.VISIT}
    assert set(access.ROUTES.values()) <= PERMISSIONS | words


HEADERS = {"Sec-Fetch-Site": "same-origin", "X-Coterie-Desk": "1"}


def admits(rule: str, role: str) -> bool:
    """Whether the table lets this role, or an invited "agent" or "supervisor" without an account, past the door."""
    invited, may = role.startswith("invited "), {str(r): MAY[r] for r in ROLES}.get(role, frozenset())
    match rule:
        case access.OPEN:
            return True
        case access.DESK | access.OWN:
            return invited or "converse" in may
        case access.LEAD:
            return role in ("invited supervisor", "owner", "admin")
        case access.VISIT:
            return role == "visit"
        case access.SELF | access.SESSION:
            return not invited and role not in ("visitor", "visit")
    return rule in may


@pytest.mark.parametrize("role", [*ROLES, "invited agent", "invited supervisor", "visit"])
def test_every_route_with_every_role(role: Any, app: FastAPI, staff: dict[Role, str], tmp_path: Path) -> None:
    """Only whom the table admits gets past the gate. What comes after it may be any other answer. "visit" is a visitor
    with the token of their visit, "invited" an agent with a link and no account."""
    browser, door = client(app, staff.get(role, "")), open_door(tmp_path, [])
    if role.startswith("invited "):
        browser.cookies.set(DESK_COOKIE, door.invite(Agent("Bea", role.removeprefix("invited "))))
    if role == "visit":
        browser.headers["Authorization"] = f"Bearer {browser.post('/widget/visits', json={}).json()['token']}"
    for method, route in called(app):
        if route in ("/logout", "/metrics") or route.endswith("/events"):  # ends the session; asks the engine; go on
            continue
        rule = access.ROUTES[f"{method} {route}"]
        path = route.replace("{name}", "nobody").replace("{id}", "none").replace("{customer}", "c1")
        reply = browser.request(method, path, headers=HEADERS)
        led_on = reply.headers.get("location") in ("/login", "/experts")  # a viewer's page instead of the chat
        refused = reply.status_code in (401, 403) or led_on
        wrong_password = (method, route) in (("POST", "/login"), ("GET", "/login/oidc/return"))
        assert refused != admits(rule, role) or wrong_password, (role, method, route, reply.status_code, reply.text)


def test_streams_of_events_are_opened_only_for_whom_the_table_admits(app: FastAPI, staff: dict[Role, str]) -> None:
    """Their answers never end, so only those who are refused are asked for here; test_desk_api follows the others."""
    for method, route in called(app):
        if not route.endswith("/events"):
            continue
        for role in ROLES:
            if not admits(access.ROUTES[f"{method} {route}"], role):
                reply = client(app, staff.get(role, "")).request(method, route.replace("{id}", "none"))
                assert reply.status_code == 401, (role, route)


def test_what_changes_something_at_the_desk_must_come_from_its_page(app: FastAPI, staff: dict[Role, str]) -> None:
    agent = client(app, staff["agent"])
    for method, route in called(app):
        if method == "POST" and access.ROUTES[f"{method} {route}"] == access.DESK:
            path = route.replace("{id}", "none")
            assert agent.post(path, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 403, route


def test_a_route_of_the_widget_that_nothing_declares_is_refused(app: FastAPI) -> None:
    (widget,) = (r.app for r in app.routes if isinstance(r, Mount) and isinstance(r.app, FastAPI))

    @widget.get("/forgotten")
    def forgotten() -> str:
        return "secret"

    reply = client(app).get("/widget/forgotten")
    assert (reply.status_code, "secret" in reply.text) == (403, False)


@pytest.mark.parametrize(
    ("path", "limit"), [("conversations/{id}/person", "ACTS"), ("conversations/{id}/bot", "ACTS"),
                        ("conversations/{id}/stop", "ACTS"), ("conversations/{id}/ratings", "ACTS"),
                        ("consents", "ACTS"), ("conversations/{id}/messages", "SAYS")],
)  # fmt: skip
def test_a_visitor_who_presses_all_the_time_is_told_to_wait(
    path: str, limit: str, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = client(app)
    visitor.headers["Authorization"] = f"Bearer {visitor.post('/widget/visits', json={}).json()['token']}"
    id = visitor.post("/widget/conversations", json={"key": "1"}).json()["id"]
    monkeypatch.setattr(widget, limit, Limit(2, 60))
    body = {"seq": 1, "good": True, "text": "Hi", "key": "1", "purpose": "p", "version": "1", "agreed": True}
    said = [visitor.post(f"/widget/{path}".replace("{id}", id), json=body) for _ in range(3)]
    assert [r.status_code == 429 for r in said] == [False, False, True]
    assert int(said[-1].headers["Retry-After"]) > 0


def test_an_agent_who_asks_all_the_time_is_told_to_wait(
    app: FastAPI, staff: dict[Role, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = next(d.dependency for d in app.router.dependencies if isinstance(d.dependency, access.Gate))
    monkeypatch.setattr(gate, "_desk", Limit(2, 60))
    agent, other = client(app, staff["agent"]), client(app, staff["owner"])
    assert [agent.get("/desk/api/conversations").status_code for _ in range(3)] == [200, 200, 429]
    assert other.get("/desk/api/conversations").status_code == 200


def test_one_person_has_a_bounded_number_of_streams_open() -> None:
    async def silent() -> AsyncIterator[str]:
        yield "x"

    async def served(response: Any) -> None:
        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        async def send(_message: Any) -> None:
            pass

        await response({"type": "http", "asgi": {"spec_version": "2.0"}}, receive, send)

    streams = Streams(2)
    first, _second = streams.stream("ada", silent()), streams.stream("ada", silent())
    with pytest.raises(Busy):
        streams.stream("ada", silent())
    streams.stream("ben", silent())
    asyncio.run(served(first))
    streams.stream("ada", silent())


@pytest.mark.parametrize("role", ROLES)
def test_everybody_lands_on_a_page_of_theirs_and_is_shown_only_such(
    role: Role, app: FastAPI, staff: dict[Role, str]
) -> None:
    browser = client(app)
    if role == "visitor":
        assert {browser.get(path).headers["location"] for path in ("/", "/account", "/knowledge")} == {"/login"}
        assert browser.get("/desk").status_code == 401
        return
    signed_in = browser.post("/login", data={"name": role, "password": WORD})
    landing = signed_in.headers["location"]
    assert landing == {"agent": "/desk", "viewer": "/experts"}.get(role, "/")
    by_address = browser.get("/")
    assert by_address.status_code == 200 if "ask" in MAY[role] else by_address.headers["location"] == landing
    seen, left = set[str](), [landing]
    while left:
        path = left.pop()
        page = browser.get(path)
        assert (page.status_code, page.headers["content-type"][:9]) == (200, "text/html"), (role, path)
        seen.add(path)
        links = {f"/{m}" for m in re.findall(r'<a href="(?:\./)?(\w*)"', page.text)}
        left += links - seen - {*left}
    assert "/account" in seen, "where they sign out"
    assert ("/desk" in seen) == ("converse" in MAY[role])
    assert ("/" in seen) == ("ask" in MAY[role])


def test_an_invitation_lets_nobody_in_whose_account_asks_for_more_and_can_be_ended(
    app: FastAPI, house: House, tmp_path: Path
) -> None:
    door = open_door(tmp_path, [])

    def lets_in(token: str) -> bool:
        guest = client(app)
        guest.cookies.set(door_module.COOKIE, token)
        statuses = {guest.get("/desk/api/conversations").status_code, guest.get("/desk").status_code,
                    {303: 200}.get(status := client(app).get(f"/desk?invite={token}").status_code, status)}  # fmt: skip
        assert len(statuses) == 1
        return statuses == {200}

    early = door.invite(Agent("Zoe"))
    assert lets_in(early)
    house.accounts.add("anna", "owner", WORD)
    assert not lets_in(early), "the first account closes the door"
    bea, zoe = door.invite(Agent("Bea", "supervisor")), door.invite(Agent("Zoe"))
    assert lets_in(bea)
    assert lets_in(zoe)
    house.accounts.add("bea", "agent", WORD)
    assert not lets_in(bea), "she signs in now"
    assert not lets_in(door.invite(Agent("bea")))
    with pytest.raises(AccountError, match="has an account"):
        house.accounts.invite("Bea", "supervisor")
    house.accounts.remove("bea")
    assert not lets_in(bea), "what was ended stays ended"
    house.accounts.end_invitations("zoe")
    assert not lets_in(zoe)
    again = door.invite(Agent("Zoe"))
    assert lets_in(again)
    house.accounts.end_invitations()
    assert not lets_in(again)


def test_accounts_have_groups_that_only_who_manages_accounts_gives(app: FastAPI, staff: dict[Role, str]) -> None:
    admin, same = client(app, staff["admin"]), {"Sec-Fetch-Site": "same-origin"}
    new = {"name": "hana", "role": "agent", "password": WORD, "groups": ["hr", "Human Resources", "hr"]}
    assert admin.post("/v1/accounts", json=new, headers=same).status_code == 201
    groups = {a["name"]: a["groups"] for a in admin.get("/v1/accounts").json()}
    assert (groups["hana"], groups["agent"]) == (["Human Resources", "hr"], [])
    hana = client(app)
    hana.post("/login", data={"name": "hana", "password": WORD})
    assert hana.get("/v1/me").json()["groups"] == ["Human Resources", "hr"]
    assert hana.patch("/v1/accounts/hana", json={"groups": ["board"]}, headers=same).status_code == 403
    for wrong in ("owner", "*", "", " hr", "a,b", "x" * 81, "a\n"):
        reply = admin.patch("/v1/accounts/hana", json={"groups": [wrong]}, headers=same)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_account"), wrong
    assert admin.patch("/v1/accounts/hana", json={"groups": []}, headers=same).status_code == 204
    assert admin.get("/v1/audit", params={"subject": "hana"}).json()[0]["detail"]["groups"] == []


def test_a_route_that_nothing_declares_is_refused(app: FastAPI, staff: dict[Role, str]) -> None:
    @app.get("/forgotten")
    def forgotten() -> str:
        return "secret"

    reply = client(app, staff["owner"]).get("/forgotten")
    assert (reply.status_code, "secret" in reply.text) == (403, False)


def test_without_accounts_the_one_at_the_machine_is_the_owner_and_others_only_ask(app: FastAPI) -> None:
    here, there = client(app, where=LOCAL), client(app)
    assert here.get("/v1/me").json()["role"] == "owner"
    assert here.get("/v1/accounts").json() == []
    assert there.get("/v1/models").status_code == 200
    assert [there.get(p).status_code for p in ("/v1/accounts", "/v1/audit", "/v1/me", "/v1/customers/a/export")] == [
        401
    ] * 4


@pytest.mark.parametrize(
    ("where", "headers"),
    [
        ({**LOCAL, "base_url": "http://evil.example:8000"}, {}), (LOCAL, {"X-Forwarded-For": "203.0.113.7"}),
        (LOCAL, {"Forwarded": "for=203.0.113.7"}), ({**LOCAL, "client": ("10.0.0.9", 1)}, {}),
    ],
)  # fmt: skip
def test_only_a_request_that_really_is_from_this_machine_is(app: FastAPI, where: Any, headers: dict[str, str]) -> None:
    assert client(app, where=where).get("/v1/accounts", headers=headers).status_code == 401


def test_the_first_account_closes_the_door(app: FastAPI, house: House) -> None:
    here = client(app, where=LOCAL)
    assert here.get("/v1/audit").status_code == 200
    house.accounts.add("anna", "owner", WORD)
    assert here.get("/v1/audit").status_code == 401
    assert here.get("/").headers["location"] == "/login"
    reply = here.post("/login", data={"name": "anna", "password": WORD})
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert here.get("/v1/audit").status_code == 200
    here.post("/logout", headers={"Sec-Fetch-Site": "same-origin"})
    assert here.get("/v1/audit").status_code == 401


def test_over_https_the_cookie_is_secure(app: FastAPI, staff: dict[Role, str]) -> None:
    browser = client(app, where={**AWAY, "base_url": "https://shop.example"})
    assert "Secure" in browser.post("/login", data={"name": "agent", "password": WORD}).headers["set-cookie"]


OTHERS = [
    ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403), ({}, 403),
    ({"X-CSRF-Token": "guess"}, 403), ({"X-CSRF-Token": ""}, 403),
    ({"Sec-Fetch-Site": "same-origin"}, 204), ({"Origin": "http://shop.example"}, 204),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "status"), OTHERS)
def test_another_site_cannot_use_a_session(
    headers: dict[str, str], status: int, app: FastAPI, staff: dict[Role, str]
) -> None:
    reply = client(app, staff["owner"]).delete("/v1/accounts/viewer", headers=headers)
    assert reply.status_code == status


def test_a_program_shows_the_sessions_token_instead(app: FastAPI, staff: dict[Role, str]) -> None:
    program = client(app, staff["owner"])
    csrf = program.get("/v1/me").json()["csrf"]
    assert program.delete("/v1/accounts/viewer", headers={"X-CSRF-Token": csrf}).status_code == 204


def test_pages_carry_a_content_security_policy(app: FastAPI) -> None:
    policy = client(app).get("/login").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy


def test_a_token_may_no_more_than_its_scopes_and_its_role(app: FastAPI, staff: dict[Role, str], house: House) -> None:
    token = house.accounts.token("admin", "nightly", ["see", "audit"], 30).secret
    program = client(app)
    program.headers["Authorization"] = f"Bearer {token}"
    assert [program.get(p).status_code for p in ("/v1/models", "/v1/audit", "/v1/accounts")] == [200, 200, 403]
    more = program.post("/v1/me/tokens", json={"scopes": ["accounts"]})
    assert more.status_code == 403
    house.accounts.change("admin", role="viewer")
    assert program.get("/v1/models").status_code == 401, "a changed role ends tokens"


def test_a_token_changes_nothing_of_what_opens_its_account(app: FastAPI, staff: dict[Role, str], house: House) -> None:
    """Neither does a session alone: a second factor is replaced by who knows the password and has the former one."""
    program, secret = client(app), pyotp.random_base32()
    program.headers["Authorization"] = f"Bearer {house.accounts.token('owner', 'all', PERMISSIONS, 30).secret}"
    body = {"secret": secret, "code": pyotp.TOTP(secret).now(), "password": WORD}
    replies = [
        program.put("/v1/me/second-factor", json=body), program.post("/v1/me/second-factor"),
        program.post("/v1/me/password", json={"old": WORD, "new": WORD + "!"}), program.get("/v1/me/tokens"),
        program.post("/v1/me/tokens", json={"scopes": ["see"], "days": 3650}), program.delete("/v1/me/tokens/none"),
    ]  # fmt: skip
    assert [r.status_code for r in replies] == [403] * 6
    assert program.get("/v1/me").json()["name"] == "owner"
    browser = client(app, staff["owner"])
    browser.headers["Sec-Fetch-Site"] = "same-origin"

    def take(new: str, password: str, current: str = "") -> int:
        code = pyotp.TOTP(new).now()
        body = {"secret": new, "code": code, "password": password, "current": current}
        return browser.put("/v1/me/second-factor", json=body).status_code

    assert [take(secret, "wrong"), take(secret, WORD)] == [403, 204]
    next_code = pyotp.TOTP(secret).at(int(house.accounts.clock()) + 30)
    other = pyotp.random_base32()
    assert [take(other, WORD), take(other, WORD, "000000"), take(other, WORD, next_code)] == [403, 403, 204]


def test_who_guesses_a_password_in_a_session_is_locked_out(house: House) -> None:
    now = [1e9]
    accounts = Accounts(house.database, house.keys, house.audit, lambda: now[0])
    accounts.add("anna", "owner", WORD)
    for _ in range(accounts_module.FREE_FAILURES):
        with pytest.raises(Forbidden):
            accounts.check("anna", "wrong")
    with pytest.raises(Forbidden, match="too many"):
        accounts.check("anna", WORD)
    assert [line.action for line in house.audit.lines(subject="anna", limit=1)] == ["login.refused"]
    now[0] += 31
    accounts.check("anna", WORD)


def test_a_token_ends_when_it_is_revoked_or_over(house: House, staff: dict[Role, str]) -> None:
    now = [house.accounts.clock()]
    accounts = Accounts(house.database, house.keys, house.audit, lambda: now[0])
    first, second = (accounts.token("agent", "x", ["ask"], 1) for _ in range(2))
    accounts.revoke("agent", str(accounts.tokens("agent")[0]["id"]))
    assert [accounts.who(t.secret) is None for t in (first, second)].count(True) == 1
    now[0] += 86401
    assert [accounts.who(t.secret) for t in (first, second)] == [None, None]
    with pytest.raises(AccountError, match="does not have it"):
        accounts.token("agent", "x", ["erase"], 1)


@pytest.mark.parametrize(("after", "ends"), [(accounts_module.IDLE_S - 1, False), (accounts_module.IDLE_S + 61, True)])
def test_a_session_ends_when_nothing_happens(house: House, after: float, ends: bool) -> None:
    now = [1e9]
    accounts = Accounts(house.database, house.keys, house.audit, lambda: now[0])
    accounts.add("anna", "owner", WORD)
    secret = accounts.login("anna", WORD).secret
    now[0] += after
    assert (accounts.who(secret) is None) == ends


def test_secrets_are_kept_as_hashes_and_in_no_file_as_they_are(
    house: House, staff: dict[Role, str], tmp_path: Path
) -> None:
    secret, _ = house.accounts.offer_second_factor("owner")
    house.accounts.take_second_factor("owner", secret, pyotp.TOTP(secret).now())
    token = house.accounts.token("admin", "x", ["see"], 1).secret
    everything = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    for kept in (WORD, staff["owner"], token, secret):
        assert kept.encode() not in everything


def test_many_wrong_passwords_lock_an_account_for_a_while(house: House) -> None:
    now = [1e9]
    accounts = Accounts(house.database, house.keys, house.audit, lambda: now[0])
    accounts.add("anna", "owner", WORD)
    for _ in range(accounts_module.FREE_FAILURES):
        with pytest.raises(NotSignedIn):
            accounts.login("anna", "wrong")
    with pytest.raises(NotSignedIn):
        accounts.login("anna", WORD)
    now[0] += 31
    assert accounts.login("anna", WORD)


@pytest.mark.parametrize(
    ("name", "password"), [("anna", "wrong"), ("nobody", WORD), ("", ""), ("oidc", ""), ("anna", "x" * 10_000)]
)
def test_every_wrong_sign_in_gets_the_same_answer(house: House, name: str, password: str) -> None:
    house.accounts.add("anna", "owner", WORD)
    house.accounts.add("oidc", "agent")
    with pytest.raises(NotSignedIn, match=f"^{accounts_module.WRONG}$"):
        house.accounts.login(name, password)


def test_a_password_is_hashed_at_the_cost_that_owasp_asks_for(
    house: House, slow_hasher: PasswordHash, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was hashed for less is hashed anew when its owner signs in."""
    house.accounts.add("anna", "owner", WORD)
    monkeypatch.setattr(accounts_module, "HASHER", slow_hasher)
    house.accounts.login("anna", WORD)
    house.accounts.add("ben", "viewer", WORD)
    with reading(house.database) as session:
        kept = [row.password for row in session.query(AccountRow)]
    assert len(kept) == 2
    assert all(password.startswith("$argon2id$v=19$m=19456,t=2,p=1$") for password in kept)


def test_a_second_factor_is_asked_for_and_each_code_works_once(house: House) -> None:
    now = [1e9]
    accounts = Accounts(house.database, house.keys, house.audit, lambda: now[0])
    accounts.add("anna", "owner", WORD)
    secret, address = accounts.offer_second_factor("anna")
    assert address.startswith("otpauth://totp/")
    totp = pyotp.TOTP(secret)
    with pytest.raises(AccountError, match="does not fit"):
        accounts.take_second_factor("anna", secret, "000000")
    accounts.take_second_factor("anna", secret, totp.at(int(now[0])))
    now[0] += 60
    code = totp.at(int(now[0]))
    for wrong in ("", "000000", totp.at(int(now[0]) - 300)):
        with pytest.raises(NotSignedIn):
            accounts.login("anna", WORD, wrong)
    assert accounts.login("anna", WORD, code)
    with pytest.raises(NotSignedIn):
        accounts.login("anna", WORD, code)


BAD = [
    (lambda a: a.add("anna", "owner", "short"), "12 to 256"), (lambda a: a.add("anna", "boss", WORD), "not a role"),
    (lambda a: a.add("anna", "visitor", WORD), "not a role"), (lambda a: a.add("an na", "owner", WORD), "a name has"),
    (lambda a: a.add("anna", "agent", WORD), "first account must be an owner"),
    (lambda a: a.remove("nobody"), "no account"),
]  # fmt: skip


@pytest.mark.parametrize(("deed", "message"), BAD)
def test_an_account_that_cannot_be_is_refused(house: House, deed: Callable[[Accounts], None], message: str) -> None:
    with pytest.raises(AccountError, match=message):
        deed(house.accounts)


def test_the_last_owner_stays(house: House) -> None:
    house.accounts.add("anna", "owner", WORD)
    for deed in (lambda: house.accounts.remove("anna"), lambda: house.accounts.change("anna", role="viewer")):
        with pytest.raises(AccountError, match="last owner"):
            deed()


def test_a_disabled_account_is_nobody_until_it_is_enabled(house: House, staff: dict[Role, str]) -> None:
    accounts = house.accounts
    accounts.login_oidc("https://id.example agent-7", "agent")
    token = accounts.token("agent", "x", ["ask"], 1).secret
    accounts.change("agent", disabled=True)
    assert [accounts.who(secret) for secret in (staff["agent"], token)] == [None, None]
    with pytest.raises(NotSignedIn, match=f"^{accounts_module.WRONG}$"):
        accounts.login("agent", WORD)
    with pytest.raises(NotSignedIn):
        accounts.login_oidc("https://id.example agent-7", "agent")
    with pytest.raises(AccountError, match="is disabled"):
        accounts.token("agent", "x", ["ask"], 1)
    assert [a.name for a in accounts.all() if a.disabled] == ["agent"]
    accounts.change("agent", disabled=False)
    assert accounts.who(accounts.login("agent", WORD).secret)
    assert accounts.who(token) is None, "what has ended stays ended"


def test_an_owner_who_is_disabled_is_no_owner_to_fall_back_on(house: House) -> None:
    for name in ("anna", "bea"):
        house.accounts.add(name, "owner", WORD)
    house.accounts.change("bea", disabled=True)
    for deed in (
        lambda: house.accounts.remove("anna"), lambda: house.accounts.change("anna", role="viewer"),
        lambda: house.accounts.change("anna", disabled=True),
    ):  # fmt: skip
        with pytest.raises(AccountError, match="last owner"):
            deed()
    house.accounts.remove("bea")


def test_an_admin_cannot_make_or_change_an_owner(app: FastAPI, staff: dict[Role, str]) -> None:
    admin = client(app, staff["admin"])
    admin.headers["Sec-Fetch-Site"] = "same-origin"
    body = {"name": "mallory", "role": "owner", "password": WORD}
    replies = [
        admin.post("/v1/accounts", json=body), admin.delete("/v1/accounts/owner"),
        admin.patch("/v1/accounts/owner", json={"password": WORD}),
        admin.patch("/v1/accounts/admin", json={"role": "owner"}),
        admin.patch("/v1/accounts/owner", json={"disabled": True}),
        admin.delete("/v1/accounts/owner/second-factor"),
    ]  # fmt: skip
    assert [r.status_code for r in replies] == [403] * 6


def test_too_many_tries_from_one_address_are_slowed(app: FastAPI, staff: dict[Role, str]) -> None:
    browser = client(app)
    replies = [browser.post("/login", data={"name": f"n{i}", "password": "x"}) for i in range(21)]
    assert [r.status_code for r in replies] == [401] * 20 + [429]
    assert int(replies[-1].headers["retry-after"]) > 0


def test_a_lost_master_key_is_a_clear_refusal_and_no_new_one_is_made(house: House, tmp_path: Path) -> None:
    file = tmp_path / ".coterie" / "master.key"
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(KeyLost, match="no master key is given"):
        open_house(tmp_path, house.database, {})
    assert not file.exists()
    file.write_bytes(kept)
    file.chmod(0o600)
    again = open_house(tmp_path, house.database, {})
    assert again.keys.unseal("ada", house.keys.seal("ada", "x")) == "x"
    again.close()


def test_every_deed_is_in_the_audit_log_and_it_verifies(app: FastAPI, staff: dict[Role, str], house: House) -> None:
    owner = client(app, staff["owner"])
    owner.get("/v1/customers/ada/export")
    owner.delete("/v1/customers/ada", headers={"Sec-Fetch-Site": "same-origin"})
    deeds = [(line.actor, line.action) for line in house.audit.lines(subject="ada")]
    assert deeds == [("owner", "customer.erased"), ("owner", "customer.erase"), ("owner", "customer.export")]
    assert house.audit.verify()[0] > 10


def test_who_signs_in_many_times_at_once_is_let_in_each_time(house: House) -> None:
    house.accounts.add("anna", "owner", WORD)
    got: list[str] = []
    threads = [threading.Thread(target=lambda: got.append(house.accounts.login("anna", WORD).secret)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(got)) == 4
