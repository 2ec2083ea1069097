"""The CRM: Salesforce's REST shapes on a local server, any SQL database, and what becomes of one that fails."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest
from sqlalchemy import create_engine, text

from coterie.config import CrmSpec
from coterie.desk.crm import Careful, Case, open_crm, profile_of
from coterie.desk.crm_sql import SqlCrm
from coterie.desk.flow import Parts
from coterie.desk.salesforce import SalesforceCrm
from coterie.errors import CoterieError, CrmError
from desk_support import Script, ask, open_desk, scripted

DATA = "/services/data/v59.0"
ARTICLES = re.compile(
    r"SELECT ([\w, ]+) FROM Knowledge__kav WHERE PublishStatus = 'Online' AND Language = '(\w+)' "
    r"AND IsVisibleIn(\w{3}) = true(?: AND Id IN \(((?:'\w+'(?:, )?)+)\))?"
)


class Org:
    """As much of a Salesforce organisation as is asked of: its contacts, cases, comments and articles.

    Paths, status codes and bodies are those of the REST API's documentation. `plan`: answers given first, in turn.
    """

    def __init__(self) -> None:
        self.contacts = {"ada@example.com": {"Id": "003A", "Name": "Ada Okafor", "Tier__c": "gold", "SSN__c": "123"}}
        self.cases: dict[str, dict[str, Any]] = {}
        self.comments: list[dict[str, Any]] = []
        self.articles: list[dict[str, Any]] = []  # versions, published or not
        self.plan: list[tuple[int, Any]] = []
        self.usage, self.logins, self.asked = "18/15000", 0, list[str]()
        self.session = "first"

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any, token: str) -> tuple[int, Any]:
        if path == "/services/oauth2/token":
            self.logins += 1
            if body.get("client_secret") != ["secret"]:
                return 400, {"error": "invalid_client"}
            return 200, {"access_token": self.session, "instance_url": self.address, "token_type": "Bearer"}
        if self.plan:
            return self.plan.pop(0)
        if token != f"Bearer {self.session}":
            return 401, [{"message": "Session expired or invalid", "errorCode": "INVALID_SESSION_ID"}]
        if path.startswith(f"{DATA}/query"):
            return 200, self.query(query["q"][0])
        if method == "PATCH" and (m := re.fullmatch(rf"{DATA}/sobjects/Case/Coterie_Key__c/([\w-]+)", path)):
            new = m[1] not in self.cases
            self.cases.setdefault(m[1], {"Id": f"500{len(self.cases)}"}).update(body)
            return (201, {"id": self.cases[m[1]]["Id"], "success": True, "errors": []}) if new else (204, None)
        if method == "POST" and path == f"{DATA}/sobjects/CaseComment/":
            self.comments.append({"Id": f"00a{len(self.comments)}", **body})
            return 201, {"id": self.comments[-1]["Id"], "success": True, "errors": []}
        return 404, [{"message": "The requested resource does not exist", "errorCode": "NOT_FOUND"}]

    def query(self, soql: str) -> dict[str, Any]:
        self.asked.append(soql)
        found: list[dict[str, Any]] = []
        if m := re.fullmatch(r"SELECT Id FROM Contact WHERE Email = '((?:[^'\\]|\\.)*)' LIMIT 1", soql):
            found = [c for email, c in self.contacts.items() if email == m[1]]
        elif m := re.fullmatch(r"SELECT (.+) FROM Contact WHERE Id = '(\w+)'", soql):
            found = [{k: c[k] for k in m[1].split(", ")} for c in self.contacts.values() if c["Id"] == m[2]]
        elif m := re.fullmatch(r"SELECT Id FROM Case WHERE Coterie_Key__c = '([\w-]+)'", soql):
            found = [{"Id": self.cases[m[1]]["Id"]}]
        elif m := re.fullmatch(r"SELECT Id, CommentBody FROM CaseComment WHERE ParentId = '(\w+)'", soql):
            found = [{k: c[k] for k in ("Id", "CommentBody")} for c in self.comments if c["ParentId"] == m[1]]
        elif m := ARTICLES.fullmatch(soql):
            ids = re.findall(r"'(\w+)'", m[4] or "")
            online = [a for a in self.articles if a["PublishStatus"] == "Online" and a["Language"] == m[2]]
            found = [a for a in online if a[f"IsVisibleIn{m[3]}"] and (not ids or a["Id"] in ids)]
            found = [{k: a[k] for k in m[1].split(", ")} for a in found]
        else:
            raise AssertionError(f"not a query that Salesforce would read: {soql}")
        records = [{"attributes": {"type": "x", "url": "/y"}, **r} for r in found]
        return {"totalSize": len(records), "done": True, "records": records}


@pytest.fixture
def org() -> Iterator[Org]:
    org = Org()

    class Handler(BaseHTTPRequestHandler):
        def go(self) -> None:
            url = urlparse(self.path)
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            form = self.headers.get("Content-Type", "").startswith("application/x-www-form")
            body = parse_qs(raw) if form else json.loads(raw) if raw else None
            token = self.headers.get("Authorization", "")
            status, said = org.answer(self.command, unquote(url.path), parse_qs(url.query), body, token)
            content = b"" if said is None else said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Sforce-Limit-Info", f"api-usage={org.usage}")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = go

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    org.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield org
    server.shutdown()
    server.server_close()


def salesforce(org: Org, secret: str = "secret") -> SalesforceCrm:
    return SalesforceCrm(org.address, "id", secret, ("Name", "Tier__c"), pause=lambda _s: None)  # type: ignore[attr-defined]


@pytest.fixture
def sql(tmp_path: Path) -> SqlCrm:
    database = create_engine(f"sqlite:///{tmp_path}/crm.db")
    with database.begin() as connection:
        for statement in (
            'CREATE TABLE customers (id INTEGER PRIMARY KEY, email TEXT, "Name" TEXT, "Tier__c" TEXT, ssn TEXT)',
            "CREATE TABLE cases (id INTEGER PRIMARY KEY, contact INTEGER, subject TEXT, text TEXT, key TEXT UNIQUE)",
            "CREATE TABLE notes (id INTEGER PRIMARY KEY, case_id INTEGER, text TEXT, key TEXT UNIQUE)",
            "INSERT INTO customers VALUES (1, 'ada@example.com', 'Ada Okafor', 'gold', '123')",
        ):
            connection.execute(text(statement))
    return SqlCrm(
        database, "SELECT id FROM customers WHERE email = :customer", "SELECT * FROM customers WHERE id = :id",
        case_sql="INSERT INTO cases (contact, subject, text, key) VALUES (:id, :subject, :text, :key)",
        note_sql="INSERT INTO notes (case_id, text, key) VALUES (:case, :text, :key)",
    )  # fmt: skip


@pytest.fixture(params=["salesforce", "sql"])
def crm(request: pytest.FixtureRequest) -> Any:
    return (
        salesforce(request.getfixturevalue("org")) if request.param == "salesforce" else request.getfixturevalue("sql")
    )


def test_a_customer_is_found_and_only_allowed_fields_are_shown(crm: Any) -> None:
    profile = profile_of(crm, {"Name": "name", "Tier__c": "tier"})
    assert profile("ada@example.com") == {"name": "Ada Okafor", "tier": "gold"}
    assert profile("nobody@example.com") == {}


@pytest.mark.parametrize("customer", ["x' OR Email != '", "'; DROP TABLE customers; --", "a\\' OR Id != '", '"', "é"])
def test_what_a_customer_is_called_is_never_a_query(customer: str, crm: Any) -> None:
    assert crm.find(customer) is None
    assert crm.find("ada@example.com") is not None


def test_a_case_and_its_note_are_written_once_however_often_it_is_tried(crm: Any) -> None:
    id = crm.find("ada@example.com")
    case = Case("Late order", "Where is it?", "conversation-1")
    opened = crm.open_case(id, case)
    assert crm.open_case(id, case) == opened
    assert crm.open_case(id, Case("Other", "", "conversation-2")) != opened
    note = crm.write_note(opened, "The customer called.", "note-1")
    assert crm.write_note(opened, "The customer called.", "note-1") == note
    assert crm.write_note(opened, "And again.", "note-2") != note


def test_a_session_that_ends_is_renewed(org: Org) -> None:
    crm = salesforce(org)
    crm.find("ada@example.com")
    org.session = "second"
    assert crm.find("ada@example.com") == "003A"
    assert org.logins == 2


BUSY = (503, [{"message": "Server too busy", "errorCode": "SERVER_UNAVAILABLE"}])
LIMIT = (403, [{"message": "TotalRequests Limit exceeded.", "errorCode": "REQUEST_LIMIT_EXCEEDED"}])


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ([BUSY, BUSY], ""), ([BUSY] * 3, "failed 3 times: SERVER_UNAVAILABLE"), ([LIMIT], "REQUEST_LIMIT_EXCEEDED"),
        ([(200, b"<html>maintenance</html>")], "no usable answer"), ([(200, {"records": None})], ""),
        ([(200, [])], "no usable answer"), ([(200, {})], "no usable answer"),
    ],
)  # fmt: skip
def test_busy_is_tried_again_and_nonsense_is_named(plan: list[Any], says: str, org: Org) -> None:
    crm = salesforce(org)
    crm.org.session()
    org.plan = list(plan)
    if says:
        with pytest.raises(CrmError, match=says):
            crm.find("ada@example.com")
    else:
        crm.find("ada@example.com")
    assert crm.find("ada@example.com") == "003A", "and it goes on"


def test_the_last_requests_of_the_day_are_left_to_others(org: Org) -> None:
    crm = salesforce(org)
    org.usage = "14900/15000"
    crm.find("ada@example.com")
    before = len(org.asked)
    with pytest.raises(CrmError, match="14900 of the day's 15000"):
        crm.find("ada@example.com")
    assert len(org.asked) == before


def test_a_wrong_secret_or_no_server_is_said_without_the_secret(org: Org) -> None:
    with pytest.raises(CrmError, match="check client id and secret"):
        salesforce(org, "wrong-secret").find("ada@example.com")
    crm = SalesforceCrm("http://127.0.0.1:1", "id", "wrong-secret")
    with pytest.raises(CrmError, match="no session"):
        crm.find("ada@example.com")
    assert "wrong-secret" not in repr(crm)
    with pytest.raises(CrmError, match="not the name of a field"):
        SalesforceCrm("x", "id", "s", ("Name FROM Contact --",))


def test_a_slow_crm_is_given_up_and_then_left_alone() -> None:
    now, waits, asked = [0.0], threading.Event(), [0]

    class Slow:
        def find(self, _customer: str) -> str | None:
            asked[0] += 1
            waits.wait(20)
            return None

    profile = profile_of(Slow(), {}, Careful(deadline_s=0.05, rest_s=30, clock=lambda: now[0]))  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(CrmError, match=r"within 0\.05 s"):
            profile("ada")
    with pytest.raises(CrmError, match="left alone"):
        profile("ada")
    assert asked[0] == 3
    waits.set()
    now[0] = 31
    assert profile("ada") == {}


@pytest.mark.parametrize(
    "fields", [{"Name": {"a": 1}, "Tier__c": ["x"]}, {"Name": None}, {"Name": "  "}, {}],
)  # fmt: skip
def test_values_that_are_not_plain_do_not_reach_a_prompt(fields: dict[str, Any]) -> None:
    class Odd:
        def find(self, customer: str) -> str:
            return customer

        def read(self, id: str) -> Any:
            return type("C", (), {"fields": fields})()

    assert profile_of(Odd(), {"Name": "name", "Tier__c": "tier"})("ada") == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"kind": "sql", "url": "sqlite://"}, "needs `find` and `read`"),
        ({"kind": "sql", "url": "nonsense", "find": "x", "read": "y"}, "url: cannot be used"),
        ({"kind": "salesforce", "url": "https://x"}, "no SALESFORCE_CLIENT_ID and no SALESFORCE_CLIENT_SECRET"),
    ],
)  # fmt: skip
def test_a_declaration_that_lacks_something_says_what(declared: dict[str, Any], says: str) -> None:
    with pytest.raises(CoterieError, match=says):
        open_crm(CrmSpec.model_validate(declared))


def test_a_declared_crm_is_used(org: Org, sql: SqlCrm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALESFORCE_CLIENT_ID", "id")
    monkeypatch.setenv("SALESFORCE_CLIENT_SECRET", "secret")
    fields = {"Name": "name"}
    for declared in (
        {"kind": "salesforce", "url": org.address, "fields": fields},  # type: ignore[attr-defined]
        {"kind": "sql", "url": str(sql.database.url), "find": sql.find_sql, "read": sql.read_sql, "fields": fields},
    ):
        spec = CrmSpec.model_validate(declared)
        assert profile_of(open_crm(spec), spec.fields)("ada@example.com") == {"name": "Ada Okafor"}


def test_a_conversation_goes_on_without_the_crm(tmp_path: Path, org: Org) -> None:
    profile: Callable[[str], dict[str, Any]] = profile_of(salesforce(org), {"Tier__c": "tier"})
    answerer = scripted(tmp_path, lambda _text: Script("Yes."))
    desk = open_desk(answerer, f"sqlite:///{tmp_path}/d.db", Parts(profile=profile))
    try:
        c = ask(desk, "Hi", "ada@example.com")
        assert "tier: gold" in answerer.asked[-1][-1]["content"]
        org.plan = [(500, [{"message": "Oh", "errorCode": "UNKNOWN_EXCEPTION"}])] * 9
        c = ask(desk, "Hi again", "ada@example.com")
        assert c.state == "bot"
        assert "gold" not in answerer.asked[-1][-1]["content"]
        assert [m.text for m in desk.conversations.messages(c.id)] == ["Hi again", "Yes."]
    finally:
        desk.close()
