"""Who may call which route, declared in one table; signing in and out; accounts, tokens, the audit log, rights.

Notable: the table is asked before any route's own code, and a route that does not stand in it is refused, so a new
route cannot be forgotten. A session's cookie counts for changes only where the browser says that a page of ours asks
(Fetch metadata, else Origin, else the session's token in X-CSRF-Token).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Path, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from itsdangerous import BadSignature, URLSafeTimedSerializer
from jinja2 import Environment
from pydantic import BaseModel as Record
from pydantic import Field

from coterie.knowledge.evidence import Reader
from coterie.privacy.access import (
    LOCAL,
    PASSER,
    ROLES,
    VISITOR,
    Forbidden,
    Limit,
    NotSignedIn,
    Permission,
    Person,
    Role,
)
from coterie.privacy.accounts import SHORTEST, Login
from coterie.privacy.house import House
from coterie.privacy.oidc import Attempt, Provider, provider
from coterie.privacy.rights import Room, What, erase_customer, export_customer
from coterie.web.door import Door
from coterie.web.schema import Text

COOKIE, ATTEMPT = "coterie_session", "coterie_attempt"
ATTEMPT_S = 600  # that signing in at an identity provider may take
OPEN = "open"  # anyone, signed in or not
OWN = "own"  # the page that says how to come in
DESK = "desk"  # an agent: by an account that may converse, or by invitation
LEAD = "supervisor"  # an agent who is a supervisor: by an owner's or admin's account, or by such an invitation
VISIT = "visit"  # a visitor with the token of their visit, and no further than their own conversations
SELF = "self"  # anyone who is signed in, about themselves
SESSION = "session"  # the same, but nobody's token: what opens or keeps an account is changed by its owner alone
SAFE = ("GET", "HEAD", "OPTIONS")
ROUTES: dict[str, Permission | str] = {
    "GET /": "ask", "GET /healthz": OPEN, "GET /metrics": "metrics",
    "GET /v1/models": "see", "GET /v1/models/{name}": "see", "GET /experts": "see",
    "GET /experts/scores.svg": "see", "GET /experts/{name}/loss.svg": "see", "GET /experts/{name}/curve.svg": "see",
    "POST /v1/chat/completions": "ask", "POST /v1/completions": "ask", "POST /v1/route": "review",
    "PUT /v1/route/{name}": "manage",
    "GET /login": OPEN, "POST /login": OPEN, "POST /logout": OPEN, "GET /v1/me": SELF,
    "POST /v1/me/password": SESSION, "POST /v1/me/second-factor": SESSION, "PUT /v1/me/second-factor": SESSION,
    "GET /v1/me/tokens": SESSION, "POST /v1/me/tokens": SESSION, "DELETE /v1/me/tokens/{id}": SESSION,
    "GET /v1/accounts": "accounts", "POST /v1/accounts": "accounts", "PATCH /v1/accounts/{name}": "accounts",
    "DELETE /v1/accounts/{name}": "accounts", "DELETE /v1/accounts/{name}/second-factor": "accounts",
    "GET /v1/audit": "audit", "GET /account": SELF,
    "GET /v1/customers/{customer}/export": "export", "DELETE /v1/customers/{customer}": "erase",
    "GET /login/oidc": OPEN, "GET /login/oidc/return": OPEN,
    "GET /v1/customers/{customer}/consents": "customers", "POST /v1/customers/{customer}/consents": "customers",
    "GET /desk": OWN, "GET /desk/api/conversations": DESK, "GET /desk/api/conversations/{id}": DESK,
    "POST /desk/api/conversations/{id}/take": DESK, "POST /desk/api/conversations/{id}/release": DESK,
    "POST /desk/api/conversations/{id}/snooze": DESK, "POST /desk/api/conversations/{id}/resolve": DESK,
    "POST /desk/api/conversations/{id}/bot": DESK, "POST /desk/api/conversations/{id}/replies": DESK,
    "POST /desk/api/conversations/{id}/notes": DESK, "POST /desk/api/conversations/{id}/looking": DESK,
    "POST /desk/api/conversations/{id}/approval": DESK, "GET /desk/api/approvals": DESK, "GET /desk/api/search": DESK,
    "GET /desk/api/events": DESK, "GET /desk/api/files/{id}": DESK, "GET /desk/api/state": LEAD,
    "GET /widget.js": OPEN, "GET /widget/static/{name}": OPEN, "POST /widget/visits": OPEN,
    "POST /widget/conversations": VISIT, "POST /widget/conversations/{id}/messages": VISIT,
    "POST /widget/conversations/{id}/stop": VISIT, "POST /widget/conversations/{id}/person": VISIT,
    "POST /widget/conversations/{id}/bot": VISIT, "POST /widget/conversations/{id}/ratings": VISIT,
    "GET /widget/conversations/{id}/events": VISIT, "POST /widget/consents": VISIT,
    "GET /knowledge": "ask", "GET /knowledge/sources": "ask", "GET /knowledge/passage": "ask",
    "GET /knowledge/picture": "ask", "GET /knowledge/search": "ask",
    "GET /knowledge/facts": "review", "POST /knowledge/facts": "review",
}  # fmt: skip
PAGES = {"/": "Chat", "/desk": "Desk", "/knowledge": "Knowledge", "/experts": "Experts", "/account": "Account"}
LANDING: dict[Role, str] = {"agent": "/desk", "viewer": "/experts"}  # after signing in; the others: the first they may
UNGATED = {"/static", "/openapi.json"}  # what the gate does not see: files with nothing secret in them


@dataclass(frozen=True)
class Page:
    """A page of the navigation."""

    path: str
    name: str


class Gate:
    """Asked before every route: who is it, and may they. `request.state.person` is who, `reader` what they may read.

    without: pages that this business does not have. door: of its desk, where it has one.
    """

    def __init__(self, house: House | None, without: Collection[str] = (), door: Door | None = None) -> None:
        self.house, self.without, self.door = house, without, door
        self._calls = Limit(600, 60)  # of one person or address
        self._desk = Limit(3000, 60)  # of one agent: their page reads again what changes
        self._logins = Limit(20, 60)  # of one address
        self._any = False

    def closed(self) -> bool:
        """Whether there are accounts; once there are, it is not asked again."""
        self._any = self._any or (self.house is not None and self.house.accounts.any())
        return self._any

    def __call__(self, request: Request) -> None:
        """Raises NotSignedIn, Forbidden, Busy."""
        template = getattr(request.scope.get("route"), "path", request.url.path)
        rule, route = declared(request, template)
        request.state.person = person = self.person(request)
        if person not in (LOCAL, PASSER, VISITOR):
            request.state.reader = Reader(person.name, person.groups | {person.role})
        if rule is None:
            raise Forbidden(f"{route}: nobody may call this, as nothing declares who may")
        if rule in (OPEN, OWN):
            return
        if rule in (DESK, LEAD):
            assert self.door, "the desk's routes come with its door"
            agent = self.door.agent(request)
            if rule == LEAD and agent.role != "supervisor":
                raise Forbidden("only supervisors see this")
            return self._desk.count(agent.name)
        if self.closed():
            self._calls.count(person.name if person is not VISITOR else _address(request))
        if template in PAGES and person is VISITOR:
            raise HTTPException(303, "sign in first", {"Location": "/login"})
        if template == "/" and rule not in person.may:  # whoever comes by the address alone is led on
            raise HTTPException(303, "another page is yours", {"Location": self.landing(person)})
        if rule in (SELF, SESSION):
            if person.name == VISITOR.name or person is PASSER:
                raise NotSignedIn("sign in first")
            if rule == SESSION and person.by_token:
                raise Forbidden("a token may not change the account that it belongs to; sign in")
            return
        person.must(rule)  # type: ignore[arg-type] # what is left of the table are permissions

    def pages(self, person: Person) -> list[Page]:
        """What they may open, for the navigation."""
        known = person not in (LOCAL, PASSER, VISITOR)  # by an account
        open_to = {OWN: known and "converse" in person.may, SELF: known}
        return [
            Page(path, name) for path, name in PAGES.items()
            if path not in self.without and open_to.get(rule := ROUTES[f"GET {path}"], rule in person.may)
        ]  # fmt: skip

    def landing(self, person: Person) -> str:
        """The page that somebody comes to who signs in."""
        paths = [page.path for page in self.pages(person)]
        wanted = LANDING.get(person.role, "/")
        return wanted if wanted in paths else next(iter(paths), "/login")

    def person(self, request: Request) -> Person:
        """Who asks. Raises NotSignedIn for a token that is over, Forbidden for a cookie that another site sent."""
        if not self.closed():
            return LOCAL if _at_this_machine(request) else PASSER
        assert self.house, "closed says so"
        header = request.headers.get("authorization", "")
        if header.lower().startswith("bearer ct_"):
            found = self.house.accounts.who(header[7:].strip())
            if found is None:
                raise NotSignedIn("this token is unknown, revoked or over")
            return found
        secret = request.cookies.get(COOKIE, "")
        found = self.house.accounts.who(secret) if secret.startswith("cs_") else None
        if found and request.method not in SAFE and not self._from_our_page(request, secret):
            raise Forbidden("this request was not made by a page of ours")
        return found or VISITOR

    def _from_our_page(self, request: Request, secret: str) -> bool:
        fetched = request.headers.get("sec-fetch-site")
        if fetched:
            return fetched in ("same-origin", "none")
        origin = request.headers.get("origin")
        if origin:
            return origin.partition("://")[2] == request.headers.get("host")
        assert self.house, "somebody is signed in"
        given = request.headers.get("x-csrf-token", "")
        return bool(given) and given == self.house.accounts.csrf(secret)

    def login(self, request: Request, name: str, password: str, code: str) -> Login:
        """A session. Raises NotSignedIn, Busy."""
        self._logins.count(_address(request))
        if self.house is None or not self.closed():
            raise NotSignedIn("there are no accounts; make one with `coterie accounts add`")
        return self.house.accounts.login(name, password, code)


def declared(request: Request, template: str) -> tuple[Permission | str | None, str]:
    """Who may call this route, and its name in the table."""
    route = f"{'GET' if request.method == 'HEAD' else request.method} {template}"
    return ROUTES.get(route), route


def visits(door: Door) -> Callable[[Request], None]:
    """What the gate is for the other routes, for those of the widget, which is an application of its own."""

    def asked(request: Request) -> None:
        """Raises NotSignedIn, Forbidden."""
        template = getattr(request.scope.get("route"), "path", "")
        rule, route = declared(request, f"/widget{template}")
        if rule == VISIT:
            door.visitor(request)
        elif rule != OPEN:
            raise Forbidden(f"{route}: nobody may call this, as nothing declares who may")

    return asked


def _address(request: Request) -> str:
    return request.client.host if request.client else "?"


def _at_this_machine(request: Request) -> bool:
    """By its address and by the name it asked for: a page elsewhere may make a browser here ask for another name."""
    host = (request.headers.get("host") or "").rpartition(":")[0] or request.headers.get("host", "")
    behind = any(h in request.headers for h in ("x-forwarded-for", "forwarded"))
    return _address(request) in ("127.0.0.1", "::1") and host in ("localhost", "127.0.0.1", "[::1]") and not behind


class NewPassword(Record):
    old: str = Field(max_length=256)
    new: str = Field(max_length=256)


class SecondFactor(Record):
    secret: str = Field(max_length=64)
    code: str = Field(max_length=16)  # that the new device shows
    password: str = Field(max_length=256)
    current: str = Field("", max_length=16)  # that the former device shows, where there is one


class NewToken(Record):
    label: str = Field("", max_length=80)
    scopes: list[str]
    days: int = 90


class NewAccount(Record):
    name: str
    role: str
    password: str = ""
    groups: list[str] = Field([], max_length=200)


class Changed(Record):
    role: str | None = None
    password: str | None = None
    disabled: bool | None = None
    groups: list[str] | None = Field(None, max_length=200)


class NewConsent(Record):
    """POST /v1/customers/{customer}/consents: what they were told, or said, elsewhere. `text`: as they read it."""

    purpose: Text = Field(min_length=1, max_length=80)
    what: What
    text: Text = Field(min_length=1, max_length=4000)
    language: Text = Field("", max_length=40)


def session_reply(request: Request, gate: Gate, login: Login) -> Response:
    """To the page of whoever it is, with the session's cookie."""
    assert gate.house, "somebody has signed in"
    reply = RedirectResponse(gate.landing(gate.house.accounts.who(login.secret) or VISITOR), 303)
    secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"
    reply.set_cookie(COOKIE, login.secret, httponly=True, samesite="lax", secure=secure, path="/")
    return reply


def _me(request: Request) -> Person:
    person = request.state.person
    assert isinstance(person, Person), "the gate has set it"
    return person


Me = Annotated[Person, Depends(_me)]


def add_access(app: FastAPI, gate: Gate, pages: Environment, rooms: Callable[[], list[Room]] = list) -> None:
    """The routes of this file. `rooms`: who holds customers' data."""
    router = APIRouter()
    house = gate.house

    @router.get("/login", response_class=HTMLResponse)
    def login_page() -> str:
        return pages.get_template("login.html").render(oidc=provider() is not None)

    @router.post("/login")
    def login(
        request: Request, name: Annotated[str, Form()] = "", password: Annotated[str, Form()] = "",
        code: Annotated[str, Form()] = "",
    ) -> Response:  # fmt: skip
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Forbidden("this request was not made by a page of ours")
        try:
            return session_reply(request, gate, gate.login(request, name, password, code))
        except NotSignedIn as error:
            page = pages.get_template("login.html")
            return HTMLResponse(page.render(wrong=str(error), name=name, oidc=provider() is not None), 401)

    @router.get("/account", response_class=HTMLResponse)
    def account_page(person: Me) -> str:
        roles = [r for r in ROLES if r != "visitor" and (r != "owner" or person.role == "owner")]
        return pages.get_template("account.html").render(
            person=person, may=sorted(person.may), roles=roles, shortest=SHORTEST, signed_in=person is not LOCAL
        )

    @router.post("/logout")
    def logout(request: Request) -> Response:
        if house and (secret := request.cookies.get(COOKIE)):
            house.accounts.logout(secret)
        reply = RedirectResponse("/login", 303)
        reply.delete_cookie(COOKIE, path="/", httponly=True, samesite="lax")
        return reply

    @router.get("/v1/me")
    def me(request: Request, person: Me) -> dict[str, Any]:
        csrf = house.accounts.csrf(request.cookies.get(COOKIE, "")) if house else ""
        own = house.accounts.get(person.name) if house else None
        return {"name": person.name, "role": person.role, "may": sorted(person.may), "csrf": csrf,
                "second_factor": bool(own and own.second_factor), "groups": sorted(person.groups)}  # fmt: skip

    if house:
        _of_provider(router, gate, house)
        _of_accounts(router, house)
        _of_customers(router, house, rooms)
    app.include_router(router)


def _of_provider(router: APIRouter, gate: Gate, house: House) -> None:
    """Signing in by OpenID Connect. What is under way stands in a signed cookie for ten minutes."""
    signed = URLSafeTimedSerializer(house.keys.secret("coterie:oidc"), "coterie-oidc")

    def known() -> Provider:
        found = provider()
        if found is None:
            raise HTTPException(404, "no identity provider is set up")
        return found

    @router.get("/login/oidc")
    def begin(request: Request) -> Response:
        url, attempt = known().begin(str(request.url_for("return_from_provider")))
        reply = RedirectResponse(url, 303)
        reply.set_cookie(ATTEMPT, signed.dumps(vars(attempt)), ATTEMPT_S, httponly=True, samesite="lax",
                         secure=request.url.scheme == "https", path="/login")  # fmt: skip
        return reply

    @router.get("/login/oidc/return")
    def return_from_provider(request: Request) -> Response:
        try:
            attempt = Attempt(**signed.loads(request.cookies.get(ATTEMPT, ""), max_age=ATTEMPT_S))
        except (BadSignature, TypeError) as error:
            raise NotSignedIn("this sign-in took too long, or began elsewhere; try again") from error
        who = known().finish(request.query_params, attempt, str(request.url_for("return_from_provider")))
        reply = session_reply(request, gate, house.accounts.login_oidc(who.subject, who.email, who.groups))
        reply.delete_cookie(ATTEMPT, path="/login")
        return reply


def _of_accounts(router: APIRouter, house: House) -> None:
    accounts = house.accounts

    @router.post("/v1/me/password", status_code=204)
    def password(body: NewPassword, person: Me) -> None:
        accounts.check(person.name, body.old)
        accounts.change(person.name, password=body.new, by=person.name)

    @router.post("/v1/me/second-factor")
    def offer(person: Me) -> dict[str, str]:
        secret, address = accounts.offer_second_factor(person.name)
        return {"secret": secret, "address": address}

    @router.put("/v1/me/second-factor", status_code=204)
    def take(body: SecondFactor, person: Me) -> None:
        accounts.take_second_factor(person.name, body.secret, body.code, body.password, body.current)

    @router.get("/v1/me/tokens")
    def tokens(person: Me) -> list[dict[str, Any]]:
        return [dict(t) for t in accounts.tokens(person.name)]

    @router.post("/v1/me/tokens", status_code=201)
    def token(body: NewToken, person: Me) -> dict[str, Any]:
        made = accounts.token(person.name, body.label, body.scopes, body.days)
        return {"token": made.secret, "until": made.until}

    @router.delete("/v1/me/tokens/{id}", status_code=204)
    def revoke(id: str, person: Me) -> None:
        accounts.revoke(person.name, id)

    @router.get("/v1/accounts")
    def everybody() -> list[dict[str, Any]]:
        return [vars(a) for a in accounts.all()]

    @router.post("/v1/accounts", status_code=201)
    def add(body: NewAccount, person: Me) -> dict[str, str]:
        _no_owner_but_by_owners(house, person, body.role)
        accounts.add(body.name, body.role, body.password, person.name, body.groups)
        return {"name": body.name, "role": body.role}

    @router.patch("/v1/accounts/{name}", status_code=204)
    def change(name: str, body: Changed, person: Me) -> None:
        _no_owner_but_by_owners(house, person, body.role, name)
        accounts.change(name, body.role, body.password, person.name, body.disabled, body.groups)

    @router.delete("/v1/accounts/{name}", status_code=204)
    def remove(name: str, person: Me) -> None:
        _no_owner_but_by_owners(house, person, None, name)
        accounts.remove(name, by=person.name)

    @router.delete("/v1/accounts/{name}/second-factor", status_code=204)
    def drop(name: str, person: Me) -> None:
        _no_owner_but_by_owners(house, person, None, name)
        accounts.drop_second_factor(name, by=person.name)

    @router.get("/v1/audit")
    def audit(person: Me, subject: str = "", actor: str = "", limit: int = 100) -> list[dict[str, Any]]:
        return [vars(line) for line in house.audit.lines(subject, actor, max(1, min(limit, 1000)))]


def _no_owner_but_by_owners(house: House, person: Person, role: str | None, name: str = "") -> None:
    owners = {a.name for a in house.accounts.all() if a.role == "owner"}
    if person.role != "owner" and (role == "owner" or name in owners):
        raise Forbidden("only an owner makes or changes an owner's account")


def _of_customers(router: APIRouter, house: House, rooms: Callable[[], list[Room]]) -> None:
    @router.get("/v1/customers/{customer}/export")
    def export(customer: str, person: Me) -> JSONResponse:
        found = export_customer(rooms(), house.audit, customer, person.name)
        return JSONResponse(found, headers={"Content-Disposition": 'attachment; filename="customer.json"'})

    @router.get("/v1/customers/{customer}/consents")
    def consents(customer: str, person: Me) -> dict[str, Any]:
        house.audit.record(person.name, "consents.read", customer)
        return {"consents": house.consents.of(customer)}

    @router.post("/v1/customers/{customer}/consents", status_code=201)
    def consent(customer: Annotated[str, Path(max_length=200)], body: NewConsent, person: Me) -> dict[str, Any]:
        house.audit.record(person.name, f"consent.{body.what}", customer, purpose=body.purpose)
        house.consents.record(customer, body.purpose, body.what, body.text, body.language)
        return {"agreed": house.consents.agreed(customer, body.purpose)}

    @router.delete("/v1/customers/{customer}")
    def erase(customer: str, person: Me) -> dict[str, Any]:
        return erase_customer(rooms(), house.keys, house.audit, customer, person.name)
