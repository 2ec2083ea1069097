"""`coterie desk`, as an owner calls it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.business import Business
from coterie.cli.main import main
from coterie.config import CrmSpec
from coterie.desk.cases import Cases, standing
from coterie.desk.confidence import load_confidence
from coterie.desk.conversation import Conversations
from coterie.desk.desk import confidence_file, database_of
from coterie.desk.rights import house_of
from coterie.web.door import Agent, open_door


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(a) for a in args])
    except SystemExit as error:
        code = int(error.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_an_invitation_is_a_link_that_lets_in(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "desk", "invite", "Bea", "-f", shop, "--supervisor", "--address", "https://d.example/")
    link = out.strip()
    assert (code, link.partition("=")[0]) == (0, "https://d.example/desk?invite")
    invited = link.partition("=")[2]
    assert open_door(shop, []).invited(invited) == Agent("Bea", "supervisor")
    assert run(capsys, "desk", "uninvite", "-f", shop)[0] == 2
    assert run(capsys, "desk", "uninvite", "bea", "-f", shop)[0] == 0
    house = house_of(Business.open(shop))
    assert open_door(shop, [], house.accounts.invitation_ended).invited(invited) is None
    assert [line.action for line in house.audit.lines()] == ["invitation.end", "invitation.add"]
    house.close()


def test_conversations_are_listed_and_shown(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talks = Conversations(database_of(Business.open(shop)))
    waits, other = talks.open("ada"), talks.open("bob")
    talks.say(waits.id, "Where is my order?")
    talks.ask_for_person(waits.id)
    _, out, _ = run(capsys, "desk", "list", "-f", shop, "--json")
    assert [c["id"] for c in json.loads(out)] == [waits.id, other.id]
    for narrow in (["--state", "waiting"], ["--search", "my ORDER"]):
        _, out, _ = run(capsys, "desk", "list", "-f", shop, "--json", *narrow)
        assert [c["customer"] for c in json.loads(out)] == ["ada"]
    _, out, _ = run(capsys, "desk", "show", waits.id, "-f", shop)
    assert "Where is my order?" in out
    code, _, err = run(capsys, "desk", "show", "none", "-f", shop)
    assert (code, err.strip()) == (2, "error: there is no conversation 'none'")


def test_what_the_crm_did_not_take_is_listed_retried_and_dropped(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Strangers:
        """A CRM that knows nobody."""

        def find(self, _customer: str) -> None:
            return None

    now = [1000.0]
    house = house_of(Business.open(shop))
    talks = Conversations(house.database, house.seal, house.unseal, lambda: now[0])
    spec = CrmSpec.model_validate({"kind": "sql", "url": "x", "case_on": ["handoff"]})
    cases = Cases(Strangers(), spec, talks, clock=lambda: now[0])  # type: ignore[arg-type]
    cases.write_due()
    ids = [talks.open(name).id for name in ("ada", "bob")]
    for id in ids:
        talks.ask_for_person(id)
    now[0] += 5
    cases.write_due()
    assert run(capsys, "desk", "crm", "list", "-f", shop, "--state", "written")[1] == "None.\n"
    _, out, _ = run(capsys, "desk", "crm", "list", "-f", shop)
    assert "the CRM knows no such" in out
    _, out, _ = run(capsys, "desk", "crm", "list", "-f", shop, "--state", "failed", "--json")
    first, second = json.loads(out)
    assert [first["conversation"], second["conversation"]] == ids
    assert run(capsys, "desk", "crm", "retry", first["entry"], "-f", shop)[1] == f"tried again: {first['entry']}\n"
    assert [w["state"] for w in standing(talks)] == ["due", "failed"]
    assert run(capsys, "desk", "crm", "retry", "--all", "-f", shop)[0] == 0
    assert [w["state"] for w in standing(talks)] == ["due", "due"]
    assert run(capsys, "desk", "crm", "drop", second["entry"], "-f", shop)[1] == f"dropped: {second['entry']}\n"
    assert [w["conversation"] for w in standing(talks)] == ids[:1]
    assert [(line.actor, line.action) for line in house.audit.lines()] == [
        ("cli", "crm.drop"), *[("cli", "crm.retry")] * 3,
    ]  # fmt: skip
    for wrong, said in ((["retry"], "--all"), (["retry", "7", "--all"], "--all"), (["drop", "9999"], "no entry 9999")):
        code, _, err = run(capsys, "desk", "crm", *wrong, "-f", shop)
        assert (code, said in " ".join(err.split())) == (2, True)


def test_calibrate_asks_the_experts_and_keeps_what_it_learns(
    fitted_shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shop"
    shutil.copytree(fitted_shop, folder)
    code, out, err = run(capsys, "desk", "calibrate", "-f", folder, "--data", folder / "colors.csv", "--error", "0.3")
    assert (code, out) == (2, "")
    assert "24 answers with an outcome; at least 50 are needed" in err
    rows = (folder / "colors.csv").read_text().splitlines()
    (folder / "more.csv").write_text("\n".join([rows[0], *rows[1:] * 3]))
    code, out, _ = run(
        capsys, "desk", "calibrate", "-f", folder, "--data", folder / "more.csv", "--error", "0.3", "--json"
    )
    kept = load_confidence(confidence_file(Business.open(folder)))
    assert code == 0
    assert kept
    assert (kept.rows, kept.error) == (72, 0.3)
    assert json.loads(out)["threshold"] == kept.threshold


def test_serve_says_what_is_wrong_with_the_desk_and_ends(shop: Path) -> None:
    toml = shop / "coterie.toml"
    toml.write_text(toml.read_text() + '\n[desk]\ndatabase = "mysql://x/y"\n')
    command = [sys.executable, "-m", "coterie", "serve", str(shop), "--port", "18997"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (
        2, "error: database: mysql is not supported; use sqlite or postgresql"
    )  # fmt: skip
