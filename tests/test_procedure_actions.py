"""Procedures' files and actions: what a file may say, how each kind of action is done, and what becomes of failures."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from coterie.desk.procedures.actions import FOUND, ActionFailed, Actions, OutcomeUnknown
from coterie.desk.procedures.conditions import BadExpression, expression
from coterie.desk.procedures.spec import ActionSpec, read_procedure
from coterie.desk.procedures.values import NotOne, kept, kind_of, read, typed
from coterie.errors import CoterieError
from procedure_support import REFUND, Customer, Recorded, guided, procedure_folder

TODAY = date(2026, 3, 24)


# Values


@pytest.mark.parametrize(
    ("kind", "said", "value"),
    [
        ("money", "I paid $1,249.50 for it", Decimal("1249.5")), ("money", "24,90", Decimal("24.90")),
        ("money", "10 or 20 euros", Decimal(20)), ("money", "between 10 and 20", None),
        ("number", "about 3", Decimal(3)),
        ("number", "3 or 4", None), ("number", "three", None), ("date", "24.3.2026", date(2026, 3, 24)),
        ("date", "24 March 2026", date(2026, 3, 24)), ("date", "March 1st, 2026", date(2026, 3, 1)),
        ("date", "Yesterday!", date(2026, 3, 23)), ("date", "2026-02-30", None), ("date", "soon", None),
        ("email", "it is Ada@Example.com, ok?", "ada@example.com"), ("email", "a@b", None),
        ("email", "a@x.org or b@x.org", None), ("order_number", "order a-12345.", "A-12345"),
        ("order_number", "12345 and 67890", None), ("choice", "too SMALL.", "Too small"), ("choice", "small", None),
        ("yes_no", "Yes", True), ("yes_no", "yes or no", None), ("text", "  anything ", "anything"), ("text", "", None),
        ("text", "x" * 2001, None), ("number", "1e5", None), ("number", "NaN", None), ("order_number", "٣٤٥٦٧", None),
    ],
)  # fmt: skip
def test_one_value_is_read_from_what_was_written_or_none(kind: Any, said: str, value: Any) -> None:
    if value is None:
        with pytest.raises(NotOne):
            read(kind, said, TODAY, choices=["Too small", "Broken"])
    else:
        assert read(kind, said, TODAY, choices=["Too small", "Broken"]) == value


@given(st.one_of(st.text(), st.booleans(), st.dates(), st.decimals(allow_nan=False, allow_infinity=False,
       min_value=-(10**12), max_value=10**12)))  # fmt: skip
def test_a_value_is_kept_to_the_letter(value: Any) -> None:
    assert typed(kind_of(value), json.loads(json.dumps(kept(value)))) == (
        value[:2000] if isinstance(value, str) else value
    )


@given(st.text(max_size=60) | st.from_regex(r"[a-z_.()'\[\] 0-9*+<>=]{1,40}", fullmatch=True))
@settings(max_examples=300)
def test_an_expression_is_decided_or_refused_and_does_nothing_else(source: str) -> None:
    with suppress(BadExpression):
        assert isinstance(expression(source).holds({"a": Decimal(1), "b": "text"}, TODAY), bool)


@pytest.mark.parametrize(
    "source", ["().__class__", "a.__class__", "open('x')", "9**9**9", "[a for a in b]", "lambda: 1", "a if b else a",
               "b[0]", "f'{a}'", "a := 1", "'%s' % a", "known.__globals__", "lower(b).upper()", "(" * 400],
)  # fmt: skip
def test_nothing_but_conditions_can_be_written(source: str) -> None:
    with pytest.raises(BadExpression):
        expression(source)


# Files


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('title = "Return an order"', "", "title: this field is needed"),
        ("[[steps]]\nask", '[[steps]]\naks = "order"\nask', "steps.0.aks: there is no such field"),
        ('kind = "choice"', 'kind = "choise"', "slots.reason.kind: must be 'text'"),
        ('ask = "reason"', 'ask = "raeson"', "steps[5].ask: there is no slot 'raeson'; declare [slots.raeson]"),
        ('do = "find"', 'say = "?"', "steps[3].check: nothing before it gives find.found"),
        ('check = "find.found"', 'check = "find.total"', "steps[3].check: `find.total` is neither true nor false"),
        ('check = "find.found"', "check = \"find.total == 'a' or find.total > 'a'\"", "cannot be decided (TypeError"),
        ('check = "find.found"', 'check = "find.found and"', "steps[3].check: `find.found and` cannot be read"),
        ('otherwise = "I cannot', 'hand_over = "x"\notherwise = "I cannot', "a check needs `otherwise` or `hand_over`"),
        ("{refund.number}", "{refund.nubmer}", "steps[7].say: nothing before it gives {refund.nubmer}"),
        ('function = "orders:find"', 'function = "orders:fnid"', "find.function: orders has no function 'fnid'"),
        ('function = "orders:find"', 'function = "nowhere_at_all:find"', "nowhere_at_all.py is not there"),
        (', customer = "customer.id"', "", "parameter 'customer' is given by no argument"),
        ('approve_when = "find.total > 100"', 'approve_when = "find.total"', "is neither true nor false"),
        ('approve = "agent"', "", "actions.refund.approve: say who approves"),
        ('[[steps]]\ndo = "refund"', "", "steps[6].say: nothing before it gives {refund.number}"),
        ('order = "order", amount', 'order = "order", amonut', "parameter 'amount' is given by no argument"),
        ("steps]]", "steps]", "not valid TOML"),
    ],
)  # fmt: skip
def test_a_bad_file_gives_one_error_with_file_field_and_mend(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert old in REFUND
    place = procedure_folder(tmp_path, {"refund": REFUND.replace(old, new, 1)})
    with pytest.raises(CoterieError) as caught:
        read_procedure(place / "refund.toml")
    message = str(caught.value)
    assert message.startswith(f"{place}/refund.toml: ")
    assert says in message
    assert "\n" not in message


HTTP = {"kind": "http", "url": "https://api.shop.example/orders/{order}", "arguments": {"order": "customer.id"}}
SQL = {"kind": "sql", "url": "sqlite:///shop.db", "arguments": {"order": "customer.id"}}


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (HTTP, ""),
        (HTTP | {"url": "https://evil.example/{order}"}, "evil.example is not on the list; add it to [desk]"),
        (HTTP | {"url": "https://{order}.shop.example/"}, "no {argument} in the host"),
        (HTTP | {"url": "http://api.shop.example/{order}"}, "must be https"),
        (HTTP | {"url": "https://api.shop.example@evil.example/"}, "no {argument} in the host"),
        (HTTP | {"url": "file:///etc/passwd"}, "must be https://HOST/PATH"),
        (HTTP | {"method": "POST"}, "writes: must"),
        (HTTP | {"url": "https://api.shop.example/{other}"}, "{other} is no argument"),
        (SQL | {"statement": "SELECT 1 WHERE :order = 'x'"}, ""),
        (SQL | {"statement": "UPDATE orders SET x = 1 WHERE n = :order"}, "writes: must be true"),
        (SQL | {"statement": "SELECT 1; DELETE FROM orders"}, "exactly one statement"),
        (SQL | {"statement": "WITH x AS (DELETE FROM o RETURNING n) SELECT * FROM x"}, "writes: must be true"),
        (SQL | {"statement": "SELECT * FROM orders WHERE n = :nubmer"}, ":nubmer is no argument"),
        (SQL | {"statement": "SELEC"}, "statement"), (SQL | {"statement": "SELECT 1", "url_env": "DB"}, "one of them"),
    ],
)  # fmt: skip
def test_an_action_reaches_no_host_and_writes_no_row_that_was_not_declared(
    action: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = tmp_path / "look.toml"
    lines = [f"{k} = {json.dumps(v)}" for k, v in action.items() if k != "arguments"]
    lines.append("arguments = { order = 'customer.id' }")
    file.write_text('title = "Look"\n[actions.look]\n' + "\n".join(lines) + '\n[[steps]]\ndo = "look"\n')
    if says:
        with pytest.raises(CoterieError) as caught:
            read_procedure(file, ["api.shop.example"])
        assert says in str(caught.value)
    else:
        assert read_procedure(file, ["api.shop.example"]).name == "look"


# HTTP


@pytest.fixture
def server() -> Iterator[Any]:
    """A local HTTP server: `answers`, one for each request, and what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def go(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            found.asked.append((self.command, self.path, json.loads(body) if body else None, dict(self.headers)))
            status, said = found.answers.pop(0)
            if status == 0:
                time.sleep(0.6)
                return
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = go

        def log_message(self, *args: Any) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.answers, found.asked = [], []  # type: ignore[attr-defined]
    found.url = f"http://127.0.0.1:{found.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def spec(**fields: Any) -> ActionSpec:
    return ActionSpec.model_validate({"kind": "http", **fields})


def test_an_http_action_sends_typed_arguments_its_key_and_its_secret(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_TOKEN", "secret")
    server.answers = [(201, b'{"number": 7, "paid": "40.00", "on": "2026-03-24T10:00:00", "more": 1}')]
    action = spec(method="POST", url=server.url + "/orders/{order}/refunds", writes=True, token_env="SHOP_TOKEN",
                  gives={"number": "text", "paid": "money", "on": "date"})  # fmt: skip
    given = {"order": "A/../b?x", "amount": Decimal("40.10"), "on": TODAY, "whole": Decimal("3.00")}
    assert Actions(tmp_path, tmp_path)(action, given, "c1-2-refund") == {
        FOUND: True, "number": "7", "paid": Decimal("40.00"), "on": date(2026, 3, 24)
    }  # fmt: skip
    ((method, path, body, headers),) = server.asked
    assert (method, path) == ("POST", "/orders/A%2F..%2Fb%3Fx/refunds")
    assert body == {"amount": 40.1, "on": "2026-03-24", "whole": 3}
    assert (headers["Idempotency-Key"], headers["Authorization"]) == ("c1-2-refund", "Bearer secret")


@pytest.mark.parametrize(
    ("answer", "reads", "writes"),
    [
        ((404, b"{}"), {FOUND: False, "n": None}, ActionFailed), ((422, b"{}"), ActionFailed, ActionFailed),
        ((500, b"{}"), ActionFailed, OutcomeUnknown), ((302, b""), ActionFailed, OutcomeUnknown),
        ((429, b""), ActionFailed, OutcomeUnknown), ((200, b"<html>"), ActionFailed, OutcomeUnknown),
        ((200, b'{"n": "many"}'), ActionFailed, OutcomeUnknown), ((200, b"[1]"), ActionFailed, OutcomeUnknown),
        ((200, b"x" * 1_000_001), ActionFailed, OutcomeUnknown), ((0, b""), ActionFailed, OutcomeUnknown),
    ],
    ids=lambda x: str(x)[:30],
)  # fmt: skip
def test_what_failed_is_told_apart_from_what_may_have_happened(
    answer: tuple[int, bytes], reads: Any, writes: Any, server: Any, tmp_path: Path
) -> None:
    for method, wanted in (("GET", reads), ("POST", writes)):
        server.answers = [answer]
        patience = 30 if answer[0] else 0.3  # seconds; it is answered late where the status is 0
        action = spec(
            method=method, url=server.url + "/x", writes=method == "POST", gives={"n": "number"}, timeout_s=patience
        )
        do = Actions(tmp_path, tmp_path)
        if isinstance(wanted, dict):
            assert do(action, {}, "k") == wanted
        else:
            with pytest.raises(wanted):
                do(action, {}, "k")
        if answer[0] == 302:
            assert server.asked[-1][1] == "/x", "a redirect is not followed"


def test_where_nobody_listens_or_a_secret_is_missing_nothing_was_done(tmp_path: Path) -> None:
    for secret in ("", "NO_SUCH_TOKEN"):
        action = spec(method="POST", writes=True, url="http://127.0.0.1:9/x", token_env=secret)
        with pytest.raises(ActionFailed):
            Actions(tmp_path, tmp_path)(action, {}, "k")


# SQL and Python


@pytest.fixture
def database(tmp_path: Path) -> Callable[[str], list[Any]]:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (n TEXT PRIMARY KEY, total NUMERIC, made DATE, key TEXT UNIQUE)"))
        connection.execute(text("INSERT INTO orders VALUES ('A-1', 40.5, '2026-03-01', NULL)"))

    def rows(statement: str) -> list[Any]:
        with engine.connect() as connection:
            return list(connection.execute(text(statement)))

    return rows


def sql(statement: str, **more: Any) -> ActionSpec:
    return spec(**{"kind": "sql", "url": "sqlite:///shop.db", "statement": statement, **more})


def test_a_sql_action_reads_typed_values_and_binds_what_customers_write(database: Any, tmp_path: Path) -> None:
    do = Actions(tmp_path, tmp_path)
    read_ = sql("SELECT total, made FROM orders WHERE n = :order", gives={"total": "money", "made": "date"})
    assert do(read_, {"order": "A-1"}, "k") == {FOUND: True, "total": Decimal("40.5"), "made": date(2026, 3, 1)}
    for evil in ("' OR 1=1 --", "A-1'; DELETE FROM orders; --"):
        assert do(read_, {"order": evil}, "k") == {FOUND: False, "total": None, "made": None}
    do(sql("UPDATE orders SET total = :amount, key = :key WHERE n = :order", writes=True),
       {"order": "A-1", "amount": Decimal("1.25")}, "c-1-pay")  # fmt: skip
    assert database("SELECT total, key FROM orders") == [(1.25, "c-1-pay")]


@pytest.mark.parametrize(
    ("statement", "writes"),
    [("UPDATE orders SET total = 0", False), ("UPDATE orders SET total = 0 WHERE n = 'none'", True),
     ("INSERT INTO orders VALUES ('A-1', 1, NULL, NULL)", True), ("SELECT * FROM nowhere", False)],
)  # fmt: skip
def test_a_statement_that_fails_has_changed_nothing(
    statement: str, writes: bool, database: Any, tmp_path: Path
) -> None:
    with pytest.raises(ActionFailed):
        Actions(tmp_path, tmp_path)(sql(statement, writes=writes), {}, "k")
    assert database("SELECT n, total FROM orders") == [("A-1", 40.5)]


FUNCTIONS = """
import time
from decimal import Decimal
from pydantic import BaseModel
from coterie.desk.procedures.actions import ActionFailed

class Paid(BaseModel):
    number: str
    left: Decimal

def pay(order: str, amount: Decimal, key: str) -> Paid:
    return Paid(number=key, left=amount)

def nothing(order: str) -> None:
    return None

def refused(order: str) -> None:
    raise ActionFailed("the order is closed")

def broken(order: str) -> dict[str, str]:
    raise KeyError("order")

def slow(order: str) -> None:
    time.sleep(1)

def wrong(order: int) -> None:
    return None
"""


@pytest.mark.parametrize(
    ("function", "writes", "gives"),
    [("pay", True, {FOUND: True, "number": "c-1-pay", "left": Decimal("2.5")}), ("refused", True, ActionFailed),
     ("nothing", False, {FOUND: False, "number": None, "left": None}), ("broken", True, OutcomeUnknown),
     ("broken", False, ActionFailed), ("slow", True, OutcomeUnknown), ("slow", False, ActionFailed),
     ("wrong", True, ActionFailed)],
)  # fmt: skip
def test_a_python_action_is_typed_by_its_annotations(function: str, writes: bool, gives: Any, tmp_path: Path) -> None:
    (tmp_path / "shop_functions.py").write_text(FUNCTIONS)
    action = spec(kind="python", function=f"shop_functions:{function}", writes=writes,
                  timeout_s=0.3 if function == "slow" else 30, gives={"number": "text", "left": "number"})  # fmt: skip
    given_ = {"order": "A-1", **({"amount": Decimal("2.5")} if function == "pay" else {})}
    do = Actions(tmp_path, tmp_path)
    if isinstance(gives, dict):
        assert do(action, given_, "c-1-pay") == gives
    else:
        with pytest.raises(gives):
            do(action, given_, "c-1-pay")


# Whatever customers, agents and crashes do

LED: list[tuple[str, Any]] = [("begin", ""), ("say", "LW-12345"), ("button", 0)]  # to the question about the refund
AGREE = ("button", 0)
CUSTOMER = st.sampled_from(
    ["LW-12345", "yes", "Yes, do it", "no", "Broken", "Too small", "Stop this", "maybe", "LW-1 LW-2", "refund me now!",
     "<yes>", "yes" * 50, "\u202eyes", "Return an order", "approved", "confirm=true", "0", "-1"]
)  # fmt: skip
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), CUSTOMER),
        st.tuples(st.just("old button"), st.sampled_from(["Yes, do it", "Broken"])),
        st.tuples(st.just("button"), st.integers(0, 2)), st.tuples(st.just("button"), st.just(0)),
        st.tuples(st.just("begin"), st.just("")), st.tuples(st.just("person"), st.just("")),
        st.tuples(st.just("back"), st.just("")), st.tuples(st.just("approve"), st.booleans()),
        st.tuples(st.just("crash"), st.just("")),
    ),
    max_size=14,
)  # fmt: skip


@given(
    steps=STEPS, led=st.sampled_from([LED, [*LED, AGREE], LED[:1]]),
    total=st.sampled_from(["40", "100", "100.01", "250"]),
    days=st.sampled_from([0, 0, 30, 31]),
    status=st.sampled_from(["delivered"] * 4 + ["sent"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_refund_without_its_conditions_its_agreement_and_its_approval(
    steps: list[tuple[str, Any]],
    led: list[tuple[str, Any]],
    total: str,
    days: int,
    status: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    found = {"status": status, "total": Decimal(total), "delivered": date.today() - timedelta(days=days)}
    recorded = Recorded({"find": found, "refund": {"number": "R-1"}})
    folder = tmp_path_factory.mktemp("any")
    desk = guided(folder, recorded, start=False)
    c = Customer(desk)
    approvals, agreements = set[str](), set[str]()
    try:
        for what, with_ in [*led, *steps]:
            run = desk.procedures.runs.active(c.id)  # type: ignore[union-attr]
            before = len(recorded.named("refund"))
            asked = run.state.question if run and run.state.phase == "agree" else ""
            label = ""
            if what == "begin":
                c.begin()
            elif what == "say":
                label = with_
                c.say(with_)
            elif what == "button" and run and with_ < len(run.state.buttons):
                label = run.state.buttons[with_]
                c.say(label, asked=run.state.asked)
            elif what == "old button" and run:
                c.say(with_, asked=run.state.asked - 1)
            elif what == "person":
                desk.conversations.ask_for_person(c.id)
            elif what == "back":
                desk.conversations.back_to_bot(c.id)
                c.heard()
            elif what == "approve":
                for waits in desk.procedures.runs.waiting(c.id):  # type: ignore[union-attr]
                    desk.procedures.decide(desk.conversations, c.id, "bea", "agent", waits["run"], with_)  # type: ignore[union-attr]
                    approvals |= {waits["run"]} if with_ else set()
                c.heard()
            elif what == "crash":
                desk.close()
                desk = c.desk = guided(folder, recorded, start=False)
            if run and asked.startswith("Shall I refund") and re.fullmatch(r"\W*yes(, do it)?\W*", label, re.I):
                agreements.add(run.id)
            for _, arguments, key in recorded.done:
                if key.endswith("-refund"):
                    of = key.removesuffix("-refund")
                    assert (status, days <= 30) == ("delivered", True)
                    assert of in agreements, "nobody agreed"
                    assert Decimal(total) <= 100 or of in approvals, "nobody approved"
                    assert arguments["amount"] == Decimal(total)
            assert len(recorded.named("refund")) - before <= 1
        keys = [key for name, _, key in recorded.done if name == "refund"]
        assert len(keys) == len(set(keys)), "done once in a run"
    finally:
        desk.close()


KILLED = """
import os, sys, signal
from datetime import date
from decimal import Decimal
from pathlib import Path
sys.path.insert(0, {tests!r})
from procedure_support import Customer, Recorded, guided

found = {{"status": "delivered", "total": Decimal("40"), "delivered": date.today()}}

def refund(arguments):
    with open(sys.argv[1] + "/refunds", "a") as f:
        f.write("refund" + chr(10))
    os.kill(os.getpid(), signal.SIGKILL)

desk = guided(Path(sys.argv[1]), Recorded({{"find": found, "refund": refund}}), start=False)
c = Customer(desk)
c.begin()
c.say("LW-12345")
c.press("Broken")
c.press("Yes, do it")
"""


def test_after_a_kill_in_the_middle_of_an_action_it_is_not_done_again_and_a_person_is_asked(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    recorded = Recorded({"find": {}, "refund": {"number": "R-2"}})
    desk = guided(tmp_path, recorded, start=False)
    try:
        (id,) = [c.id for c in desk.conversations.listed()]
        desk.conversations.clock = desk.procedures.runs.clock = lambda: time.time() + 60  # type: ignore[union-attr]
        assert desk.conversations.owed() == [id]
        desk._work(id)
        c = desk.conversations.get(id)
        assert (c.state, c.reason) == ("waiting", "action_unknown")
        detail = [m for m in desk.conversations.messages(id, kinds=("note",))][-1].data["detail"]
        assert "the server stopped while it was being done; look whether it was" in detail
        assert recorded.done == []
        assert (tmp_path / "refunds").read_text() == "refund\n"
    finally:
        desk.close()
