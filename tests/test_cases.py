"""Cases and notes in the CRM: opened by rule, once, without holding a conversation up."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from coterie.business import Business
from coterie.config import CrmSpec
from coterie.desk.cases import GIVE_UP_S, Cases, drop, retry, standing
from coterie.desk.conversation import Conversations, Handoff
from coterie.desk.crm import Crm, open_crm
from coterie.desk.rights import rooms_of
from coterie.errors import CoterieError, CrmError
from coterie.privacy.deidentify import Detector, MaskingFailed
from coterie.privacy.house import House, open_house
from coterie.privacy.rights import NotErased, Room, erase_customer
from coterie.privacy.vault import Vault
from coterie.store.database import open_database
from desk_support import Script, ask, open_desk, scripted
from test_crm import Org, org, salesforce  # noqa: F401, the fixture

ADA, LINK = "ada@example.com", "https://desk.example/"
NOTES = ("note",)
now = [1000.0]


def sql_crm(folder: Path) -> Crm:
    database = create_engine(f"sqlite:///{folder}/crm.db")
    with database.begin() as connection:
        for statement in (
            "CREATE TABLE customers (id INTEGER PRIMARY KEY, email TEXT)",
            "CREATE TABLE cases (id INTEGER PRIMARY KEY, contact INTEGER, subject TEXT, text TEXT, key TEXT UNIQUE)",
            "CREATE TABLE notes (id INTEGER PRIMARY KEY, case_id INTEGER, text TEXT, key TEXT UNIQUE)",
            f"INSERT INTO customers VALUES (7, '{ADA}')",
        ):
            connection.execute(text(statement))
    return open_crm(CrmSpec.model_validate({
        "kind": "sql", "url": f"sqlite:///{folder}/crm.db", "find": "SELECT id FROM customers WHERE email = :customer",
        "read": "SELECT email FROM customers WHERE id = :id",
        "case": "INSERT INTO cases (contact, subject, text, key) VALUES (:id, :subject, :text, :key)",
        "note": "INSERT INTO notes (case_id, text, key) VALUES (:case, :text, :key)",
    }))  # fmt: skip


class Shop:
    """A house, its conversations, and what writes from them to a CRM."""

    def __init__(self, folder: Path, crm: Crm, **rules: Any) -> None:
        now[0] = 1000.0
        self.house: House = open_house(folder, open_database(f"sqlite:///{folder}/d.db"))
        self.talks = Conversations(self.house.database, self.house.seal, self.house.unseal, lambda: now[0])
        spec = CrmSpec.model_validate({"kind": "sql", "url": "x", "link": LINK, **rules})
        self.cases = Cases(
            crm, spec, self.talks, lambda s, who, what, c, d: self.house.audit.record_in(s, who, what, c, **d),
            lambda: now[0],
        )  # fmt: skip
        self.cases.write_due()  # from here on

    def handed_over(self, customer: str = ADA) -> str:
        c = self.talks.open(customer)
        self.talks.say(c.id, "Where is my red bicycle?")
        turn = self.talks.claim(c.id)
        assert turn
        self.talks.finish(turn, "", handoff=Handoff("not_known"))
        now[0] += 5
        return c.id

    def told(self, id: str) -> list[str]:
        return [m.text for m in self.talks.messages(id, kinds=NOTES) if m.author == "agent:crm"]


@pytest.fixture
def shop(tmp_path: Path, org: Org) -> Callable[..., Shop]:  # noqa: F811
    rules = {"case_on": ["handoff"], "note_on": ["resolved"]}
    return lambda **more: Shop(tmp_path, salesforce(org), **(rules | more))


def test_a_handoff_opens_a_case_and_the_end_becomes_its_note(shop: Any, org: Org) -> None:  # noqa: F811
    s = shop()
    id = s.handed_over()
    assert (s.cases.write_due(), s.cases.write_due()) == (1, 0)
    case = org.cases[id]
    assert case["ContactId"] == "003A"
    assert case["Subject"] == "Where is my red bicycle?"
    assert "Handed over by bot: not_known." in case["Description"]
    assert case["Description"].endswith(f"https://desk.example/desk#c={id}")
    assert s.told(id) == ["A case was opened in the CRM: 5000"]
    s.talks.take(id, "bea")
    s.talks.reply(id, "bea", "It comes on Monday.")
    s.talks.resolve(id, "bea")
    now[0] += 5
    assert s.cases.write_due() == 1
    (note,) = org.comments
    assert note["ParentId"] == case["Id"]
    assert "Resolved by bea.\n\nLast answer: It comes on Monday." in note["CommentBody"]
    assert [(line.actor, line.action, line.subject) for line in s.house.audit.lines()] == [
        ("coterie", "crm.note", ADA), ("coterie", "crm.case", ADA),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "cases", "notes"),
    [
        ({}, 1, 1), ({"case_on": []}, 0, 0), ({"note_on": []}, 1, 0), ({"case_on": ["resolved"]}, 1, 0),
        ({"note_on": ["handoff", "resolved"]}, 1, 2),
    ],
)  # fmt: skip
def test_only_what_a_rule_names_is_written_and_a_conversation_has_one_case(
    rules: Any, cases: int, notes: int, shop: Any, org: Org  # noqa: F811
) -> None:  # fmt: skip
    s = shop(**rules)
    id = s.handed_over()
    s.talks.back_to_bot(id)
    s.talks.ask_for_person(id)
    s.talks.resolve(id, "customer")
    now[0] += 5
    s.cases.write_due()
    assert (len(org.cases), len(org.comments)) == (cases, notes)


def test_what_happened_before_the_rule_is_not_written(tmp_path: Path, org: Org) -> None:  # noqa: F811
    s = Shop(tmp_path, salesforce(org))
    with s.house.database.begin() as connection:
        connection.execute(text("DELETE FROM mailboxes"))
    s.handed_over()
    s.cases.spec = s.cases.spec.model_copy(update={"case_on": ["handoff"]})
    assert s.cases.write_due() == 0
    s.handed_over()
    assert s.cases.write_due() == 1
    assert len(org.cases) == 1


def test_an_erased_customers_cases_are_listed_where_others_wait_still_and_no_other_waits_for_them(
    shop: Any, org: Org, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """Whatever is unfinished, and where another room fails, too."""
    s = shop()
    s.handed_over()
    s.cases.write_due()
    case = standing(s.talks)[0]["id"]
    s.cases.crm = Failing(s.cases.crm, before=1)
    unfinished = s.handed_over()
    s.cases.write_due()
    assert [w["state"] for w in standing(s.talks)] == ["sent", "due"]
    (tmp_path / "coterie.toml").write_text('[business]\nname = "Shop"\n')
    rooms = rooms_of(s.house, Business.open(tmp_path))

    def locked(_customer: str) -> int:
        raise OSError("the index is locked")

    broken = [Room(r.name, r.export, locked) if r.name in ("files", "conversations") else r for r in rooms]
    with pytest.raises(NotErased, match=f'"kind": "case", "id": "{case}"') as error:
        erase_customer(broken, s.house.keys, s.house.audit, ADA, "anna")
    assert error.value.done["crm"] == [{"kind": "case", "id": case}]
    assert standing(s.talks)[1]["reason"] == "its customer was erased"
    other = s.handed_over("003A")
    now[0] += 3600
    s.cases.write_due()
    waiting = {w["conversation"]: w for w in standing(s.talks)}
    assert (waiting[unfinished]["state"], waiting[other]["tries"]) == ("failed", 1)
    done = erase_customer(rooms, s.house.keys, s.house.audit, ADA, "anna")
    assert (done["crm"], done["conversations"]) == ([{"kind": "case", "id": case}], 2)


class Failing:
    """A CRM before which things go wrong: before the deed, or after it, when its answer is lost."""

    def __init__(self, crm: Crm, before: int = 0, after: int = 0) -> None:
        self.crm, self.before, self.after, self.asked = crm, before, after, 0

    def find(self, customer: str) -> str | None:
        return self.crm.find(customer)

    def open_case(self, id: str, case: Any) -> str:
        return self._do(lambda: self.crm.open_case(id, case))

    def write_note(self, case_id: str, said: str, key: str) -> str:
        return self._do(lambda: self.crm.write_note(case_id, said, key))

    def _do(self, do: Callable[[], str]) -> str:
        self.asked += 1
        if self.before:
            self.before -= 1
            raise CrmError("the CRM did not answer: Where is my red bicycle?")
        done = do()
        if self.after:
            self.after -= 1
            raise ConnectionResetError("gone")
        return done


@pytest.mark.parametrize("kind", ["salesforce", "sql"])
def test_what_fails_is_tried_again_more_seldom_and_is_in_the_crm_once(
    kind: str, tmp_path: Path, org: Org  # noqa: F811
) -> None:  # fmt: skip
    crm = sql_crm(tmp_path) if kind == "sql" else salesforce(org)
    failing = Failing(crm, before=1, after=1)
    s = Shop(tmp_path, failing, case_on=["handoff"], note_on=["resolved"])  # type: ignore[arg-type]
    id = s.handed_over()
    s.talks.resolve(id, "customer")
    now[0] += 5
    assert [s.cases.write_due(), s.cases.write_due()] == [0, 0], "the note waits for the case"
    now[0] += 31
    assert s.cases.write_due() == 0
    now[0] += 31
    assert s.cases.write_due() == 0, "the pause grows"
    now[0] += 31
    assert s.cases.write_due() == 2
    assert failing.asked == 4
    later, opened = s.told(id)
    assert later.startswith("The CRM's case was not opened yet; it is tried again: the CRM did not answer")
    assert opened.startswith("A case was opened in the CRM: ")
    if kind == "salesforce":
        assert (len(org.cases), len(org.comments)) == (1, 1)
    else:
        with crm.database.connect() as connection:  # type: ignore[attr-defined]
            counts = [connection.scalar(text(f"SELECT count(*) FROM {t}")) for t in ("cases", "notes")]
        assert counts == [1, 1]


def test_a_writer_that_dies_leaves_what_it_was_at_to_the_next(tmp_path: Path, org: Org) -> None:  # noqa: F811
    class Dies(Failing):
        def _do(self, do: Callable[[], str]) -> str:
            do()
            raise KeyboardInterrupt

    s = Shop(tmp_path, Dies(salesforce(org)), case_on=["handoff"])  # type: ignore[arg-type]
    s.handed_over()
    with pytest.raises(KeyboardInterrupt):
        s.cases.write_due()
    s.cases.crm = salesforce(org)
    assert s.cases.write_due() == 0, "somebody may still be at it"
    now[0] += 301
    assert s.cases.write_due() == 1
    assert len(org.cases) == 1


def test_what_cannot_be_written_is_given_up_and_the_agent_told(tmp_path: Path, org: Org) -> None:  # noqa: F811
    s = Shop(tmp_path, Failing(salesforce(org), before=99), case_on=["handoff"], note_on=["resolved"])  # type: ignore[arg-type]
    id, unknown = s.handed_over(), s.handed_over("nobody")
    s.talks.resolve(id, "customer")
    now[0] += 5
    s.cases.write_due()
    s.cases.write_due()
    assert s.told(unknown) == ["The CRM's case was not opened: the CRM knows no such customer"]
    now[0] += GIVE_UP_S + 60
    s.cases.write_due()
    s.cases.write_due()
    assert len(s.told(id)) == 2
    assert s.told(id)[1].startswith("The CRM's case was not opened: the CRM did not answer")
    assert {w["state"] for w in standing(s.talks)} == {"failed"}
    with s.house.database.connect() as connection:
        rows = connection.execute(text("SELECT * FROM crm_writes")).all()
    assert rows
    assert "bicycle" not in str(rows), "no word of a customer stands in the clear"


def test_a_reason_that_quotes_the_customer_is_masked_in_the_list_and_short_in_the_log(
    tmp_path: Path, org: Org, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    class Quotes(Failing):
        def _do(self, do: Callable[[], str]) -> str:
            raise CrmError(f"no contact {ADA}: order 48213377 of Ada Lovelace")

    s = Shop(tmp_path, Quotes(salesforce(org)), case_on=["handoff"])  # type: ignore[arg-type]
    vault = Vault(Detector(None), s.house.database, s.house.keys)
    s.cases.mask = lambda customer, texts, _known: vault.mask(
        customer, texts, {"name": ["Ada Lovelace"], "email": [ADA]}
    )
    s.handed_over()
    s.cases.write_due()
    (row,) = standing(s.talks)
    assert row["reason"].startswith("no contact [EMAIL_1]: order [ORDER_1] of [NAME_1]")
    assert "no contact [EMAIL_1]" in caplog.text
    assert not any(private in caplog.text for private in (ADA, "48213377", "Lovelace"))

    def fails(_customer: str, _texts: list[str], _known: Any) -> Any:
        raise MaskingFailed("no")

    s.cases.mask = fails
    now[0] += 60
    s.cases.write_due()
    assert standing(s.talks)[0]["reason"] == "not shown, as it could not be masked (MaskingFailed)"


def outbox(folder: Path, org: Org) -> tuple[Shop, str, str]:  # noqa: F811
    """Two conversations: a case that failed with the note that waits for it, and a case that is in the CRM."""
    s = Shop(folder, salesforce(org), case_on=["handoff"], note_on=["resolved"])
    done, failed = s.handed_over(), s.handed_over("nobody")
    s.talks.resolve(failed, "customer")
    now[0] += 5
    while s.cases.write_due():
        pass
    return s, done, failed


def test_what_was_given_up_is_tried_again_and_dropped_on_demand(tmp_path: Path, org: Org) -> None:  # noqa: F811
    s, _, failed = outbox(tmp_path, org)
    case, note = standing(s.talks, states=("due", "failed"))
    assert (case["kind"], case["reason"]) == ("case", "the CRM knows no such customer")
    assert (note["kind"], note["state"], note["reason"]) == ("note", "failed", "its case could not be opened")
    audited = lambda session, who, what, c, d: s.house.audit.record_in(session, who, what, c, **d)  # noqa: E731
    org.contacts["nobody"] = org.contacts[ADA]  # somebody has entered them meanwhile
    assert retry(s.talks, note["entry"], now[0], audited, "bea") == [case["entry"], note["entry"]]
    assert [s.cases.write_due(), len(org.cases), len(org.comments)] == [2, 2, 1]
    for do in (lambda: retry(s.talks, case["entry"], now[0], audited, "bea"),
               lambda: drop(s.talks, case["entry"], audited, "bea")):  # fmt: skip
        with pytest.raises(CoterieError, match="is in the CRM already, as 500"):
            do()
    with pytest.raises(CoterieError, match="no entry 99999; `coterie desk crm list` prints"):
        drop(s.talks, 99999, audited, "bea")
    assert {line.action for line in s.house.audit.lines() if line.actor == "bea"} == {"crm.retry"}
    assert failed in org.cases


def test_a_dropped_case_takes_its_notes_and_is_written_no_more(tmp_path: Path, org: Org) -> None:  # noqa: F811
    s, done, _ = outbox(tmp_path, org)
    case, note = standing(s.talks, states=("due", "failed"))
    audited = lambda session, who, what, c, d: s.house.audit.record_in(session, who, what, c, **d)  # noqa: E731
    assert drop(s.talks, case["entry"], audited, "bea") == [case["entry"], note["entry"]]
    assert retry(s.talks, None, now[0], audited, "bea") == []
    assert s.cases.write_due() == 0
    assert [w["conversation"] for w in standing(s.talks)] == [done]
    assert [(line.actor, line.subject) for line in s.house.audit.lines() if line.action == "crm.drop"] == [
        ("bea", "nobody"), ("bea", "nobody"),
    ]  # fmt: skip


def test_an_erasure_names_what_the_crm_holds_and_forgets_what_was_due(tmp_path: Path, org: Org) -> None:  # noqa: F811
    s = Shop(tmp_path, salesforce(org), case_on=["handoff"], note_on=["resolved"])
    id = s.handed_over()
    s.cases.write_due()
    s.talks.resolve(id, "customer")
    now[0] += 5
    s.cases._fill()
    business = scripted(tmp_path, lambda _t: None).business  # type: ignore[arg-type, return-value]
    done = erase_customer(rooms_of(s.house, business), s.house.keys, s.house.audit, ADA, "owner")
    assert done["crm"] == [{"kind": "case", "id": "5000"}]
    assert s.cases.write_due() == 0
    assert standing(s.talks) == []


@pytest.mark.parametrize("rule", ["case", "note"])
def test_a_rule_without_its_statement_is_refused(rule: str) -> None:
    declared = {"kind": "sql", "url": "sqlite://", "find": "x", "read": "y", f"{rule}_on": ["handoff"]}
    with pytest.raises(CoterieError, match=f"{rule}_on needs `{rule}`"):
        open_crm(CrmSpec.model_validate(declared))


def test_the_desk_writes_beside_its_work_and_waits_for_no_crm(tmp_path: Path, org: Org) -> None:  # noqa: F811
    asked, answers = threading.Event(), threading.Event()

    class Slow(Failing):
        def _do(self, do: Callable[[], str]) -> str:
            asked.set()
            assert answers.wait(30)
            return do()

    desk = open_desk(scripted(tmp_path, lambda _text: Script("Yes.")), f"sqlite:///{tmp_path}/d.db", start=False)
    spec = CrmSpec.model_validate({"kind": "sql", "url": "x", "case_on": ["handoff"]})
    desk.cases = Cases(Slow(salesforce(org)), spec, desk.conversations)  # type: ignore[arg-type]
    desk.cases.write_due()
    desk.start()
    try:
        id = desk.conversations.open(ADA).id
        desk.conversations.ask_for_person(id)
        assert asked.wait(30), "it is begun by itself"
        other = ask(desk, "Hi")
        assert [m.text for m in desk.conversations.messages(other.id)] == ["Hi", "Yes."]
        assert org.cases == {}
    finally:
        answers.set()
        desk.close()
    assert list(org.cases) == [id], "what was under way is ended first"
