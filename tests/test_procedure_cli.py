"""`coterie desk procedures` and the example of docs/procedures.md, as an owner and a customer use them."""

import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest

from coterie.business import Business
from coterie.cli.main import main
from coterie.desk.desk import Desk, database_of
from coterie.desk.procedures.procedures import Procedures
from coterie.desk.rights import declared, house_of, procedures_of, rooms_of
from coterie.privacy.rights import export_customer
from desk_support import Script, ScriptedAnswerer
from procedure_support import Customer

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """The example, with its database."""
    folder = tmp_path / "returns"
    shutil.copytree(ROOT / "examples" / "returns", folder, ignore=shutil.ignore_patterns("*.db", ".coterie"))
    sys.path.insert(0, str(folder))
    try:
        import make_shop
    finally:
        sys.path.remove(str(folder))
    make_shop.make(folder / "shop.db")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def go(*args: object, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", StringIO(typed))
        code = 0
        try:
            main([str(a) for a in args])
        except SystemExit as error:
            code = int(error.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return go


def refunds(folder: Path) -> list[tuple[str, float]]:
    with sqlite3.connect(folder / "shop.db") as database:
        return database.execute("SELECT number, amount FROM refunds").fetchall()


def test_the_page_shows_the_example_as_it_is() -> None:
    page = (ROOT / "docs" / "procedures.md").read_text()
    file = (ROOT / "examples" / "returns" / "procedures" / "return_order.toml").read_text()
    assert file.partition("\n")[2] == page.partition("```toml\n")[2].partition("```")[0]


def test_they_are_listed_with_what_they_change(shop: Path, run: Run) -> None:
    code, out, _ = run("desk", "procedures", "-f", shop, "--json")
    (found,) = json.loads(out)
    assert (code, found["name"], found["writes"], len(found["steps"])) == (0, "return_order", ["refund"], 8)
    _, out, _ = run("desk", "procedures", "return_order", "-f", shop)
    assert "agent approves (find.total > 100)" in re.sub(r"\s+", " ", out)


def test_a_bad_file_is_one_sentence_and_an_exit_code(shop: Path, run: Run) -> None:
    file = shop / "procedures" / "return_order.toml"
    file.write_text(file.read_text().replace('ask = "why"', 'ask = "wyh"'))
    code, out, err = run("desk", "procedures", "-f", shop)
    assert (code, out) == (2, "")
    assert f"error: {file}: steps[6].ask: there is no slot 'wyh'" in err
    assert run("desk", "procedures", "nothing", "-f", shop)[0] == 2


@pytest.mark.parametrize(("options", "kept"), [((), []), (("--act",), [("LW-10001", 24.9)])])
def test_one_is_tried_in_the_terminal_and_writes_only_where_told_to(
    options: tuple[str, ...], kept: list[tuple[str, float]], shop: Path, run: Run
) -> None:
    typed = "LW-10001\nada@example.com\nBroken\nyes\n"
    code, out, err = run("desk", "procedures", "return_order", "-f", shop, "--try", *options, typed=typed)
    assert code == 0
    assert "Shall I refund 24.90 for the order LW-10001?\n[Yes, do it] [No]" in out
    assert "You get 24.90 back" in out
    assert ("doing" if options else "would do") + ": refund (order = LW-10001, amount = 24.90, why = Broken)" in err
    assert err.strip().endswith("done")
    assert refunds(shop) == kept


@pytest.mark.parametrize(
    ("typed", "ends", "says"),
    [("LW-10002\nada@example.com\nBroken\nyes\nrefuse\n", "refused", "could not approve it"),
     ("LW-10003\nada@example.com\n", "handed_over (return_too_late", "I have called a person"),
     ("LW-10001\neve@example.com\n", "ended", "I find no order LW-10001"), ("", "asking", "What is the number"),
     ("LW-10001\nstop this\n", "stopped", "I have stopped")],
)  # fmt: skip
def test_a_try_ends_as_the_real_one_would(typed: str, ends: str, says: str, shop: Path, run: Run) -> None:
    code, out, err = run("desk", "procedures", "return_order", "-f", shop, "--try", "--act", typed=typed)
    assert (code, says in out, ends in err) == (0, True, True)
    assert refunds(shop) == []


def test_the_example_at_the_desk_is_sealed_audited_exported_and_erased(shop: Path) -> None:
    business = Business.open(shop)
    house = house_of(business)
    procedures = procedures_of(business, house, lambda _c: {}, lambda _t: pytest.fail("no model is needed"))
    assert isinstance(procedures, Procedures)
    answerer = ScriptedAnswerer(business, lambda _t: Script("All is well."))
    desk = Desk(answerer, database_of(business), None, house.seal, house.unseal, procedures=procedures)  # type: ignore[arg-type]
    try:
        c = Customer(desk)
        c.begin("return_order")
        c.say("LW-10001")
        c.say("ada@example.com")
        c.press("Broken")
        assert c.press("Yes, do it") == "Done. You get 24.90 back within five days."
        assert refunds(shop) == [("LW-10001", 24.9)]
        raw = (shop / ".coterie" / "desk.db").read_bytes() + (shop / ".coterie" / "desk.db-wal").read_bytes()
        assert b"LW-10001" not in raw
        assert b"ada@example.com" not in raw
        lines = [line for line in house.audit.lines(limit=100) if line.action == "procedure.action"]
        assert [line.detail["outcome"] for line in reversed(lines)] == ["begun", "done"] * 2
        house.audit.verify()
        out = export_customer(rooms_of(house, business), house.audit, "ada", "owner")
        (ran,) = out["conversations"][0]["procedures"]
        assert (ran["status"], ran["values"]["order"]) == ("done", "LW-10001")
        assert [a["action"] for a in ran["actions"]] == ["find", "refund"]
        room = next(r for r in rooms_of(house, business) if r.name == "conversations")
        assert room.erase("ada") == 1
        assert procedures.runs.recorded(f"{c.id}-1") == []
    finally:
        desk.close()
        house.close()


def test_a_business_without_procedures_has_none(tmp_path: Path) -> None:
    (tmp_path / "coterie.toml").write_text('[business]\nname = "Shop"\n')
    assert declared(Business.open(tmp_path)) == {}
