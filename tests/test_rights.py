"""What a customer may ask for, through every room; how long things stay; and no plain text on the disk meanwhile."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from coterie.business import Business
from coterie.cli.main import app
from coterie.desk.conversation import Conversations, Handoff
from coterie.desk.rights import rooms_of
from coterie.desk.trained import marked
from coterie.errors import CoterieError
from coterie.privacy.deidentify import Detector
from coterie.privacy.house import House, open_house
from coterie.privacy.keys import Erased, Keys
from coterie.privacy.master import KeyLost, MasterKey
from coterie.privacy.rights import NotErased, Room, erase_customer, export_customer, keep_only
from coterie.privacy.scan import scan
from coterie.privacy.vault import Vault
from coterie.store.database import open_database


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    database = open_database(f"sqlite:///{tmp_path}/.coterie/desk.db")
    opened = open_house(tmp_path, database, {})
    yield opened
    opened.close()
    database.dispose()


def shop(house: House) -> Business:
    """The business of the house, with an expert that learned from two customers."""
    folder = Path(str(house.keys.database.url.database)).parents[1]
    toml = '[business]\nname = "Shop"\n[experts.support]\ntrain = ["a.jsonl", "b.csv"]\n'
    (folder / "coterie.toml").write_text(toml)
    if not (folder / "a.jsonl").exists():
        rows = [{"prompt": "p", "completion": "c", "customer": c} for c in ("zoe", "ben")]
        (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "b.csv").write_text("prompt,completion,customer\np,c,zoe\n")
    return Business.open(folder)


def talk(house: House, customer: str, *said: str) -> str:
    """A conversation that is kept sealed."""
    conversations = Conversations(house.database, house.seal, house.unseal)
    id = conversations.open(customer).id
    for text in said:
        conversations.say(id, text)
    return id


def texts(found: dict[str, Any]) -> list[str]:
    return [m["text"] for c in found["conversations"] for m in c["messages"]]


def test_an_export_has_everything_about_a_customer_and_nothing_about_others(house: House) -> None:
    talk(house, "ada", "I am Ada", "card 4111 1111 1111 1111")
    talk(house, "ben", "I am Ben")
    Vault(Detector(), house.database, house.keys).mask("ada", ["card 4111 1111 1111 1111"])
    house.consents.record("ada", "ai", "told", "notice-1")
    found = export_customer(rooms_of(house, shop(house)), house.audit, "ada", "anna")
    assert texts(found) == ["I am Ada", "card 4111 1111 1111 1111"]
    assert found["pseudonyms"] == {"[CARD_1]": "4111 1111 1111 1111"}
    assert [c["what"] for c in found["consents"]] == ["told"]
    assert [line["action"] for line in found["audit"]] == ["customer.export"]
    assert "Ben" not in json.dumps(found)


def test_an_erased_customer_is_gone_from_every_room_and_can_come_back(house: House) -> None:
    id = talk(house, "ada", "I am Ada")
    other = talk(house, "ben", "I am Ben")
    vault = Vault(Detector(), house.database, house.keys)
    assert vault.mask("ada", ["a@b.com"]).texts == ["[EMAIL_1]"]
    house.consents.record("ada", "ai", "agreed", "notice-1")
    kept = house.seal("ada", "in a backup")
    done = erase_customer(rooms_of(house, shop(house)), house.keys, house.audit, "ada", "anna")
    assert done == {"keys": 1, "crm": [], "files": 0, "conversations": 1, "pseudonyms": 1, "consents": 1, "experts": {}}
    with pytest.raises(Erased):
        house.unseal("ada", kept)
    conversations = Conversations(house.database, house.seal, house.unseal)
    with pytest.raises(CoterieError, match="there is no conversation"):
        conversations.messages(id)
    assert [m.text for m in conversations.messages(other)] == ["I am Ben"]
    assert vault.mask("ada", ["new@b.com"]).texts == ["[EMAIL_1]"], "nothing is left in memory either"
    found = export_customer(rooms_of(house, shop(house)), house.audit, "ada", "anna")
    assert (found["conversations"], list(found["pseudonyms"].values())) == ([], ["new@b.com"])


def test_experts_that_learned_from_an_erased_customer_are_listed_until_their_rows_are_gone(house: House) -> None:
    business = shop(house)
    assert marked(business) == {}
    done = erase_customer(rooms_of(house, business), house.keys, house.audit, "zoe", "anna")
    assert done["experts"] == marked(business) == {"support": ["a.jsonl:1", "b.csv:2"]}
    (business.folder / "a.jsonl").write_text('{"prompt": "p", "completion": "c", "customer": "ben"}\n')
    assert marked(business) == {"support": ["b.csv:2"]}
    (business.folder / "b.csv").unlink()
    assert marked(business) == {}


def test_where_a_room_fails_the_others_are_erased_and_it_may_be_run_again(house: House) -> None:
    talk(house, "ada", "I am Ada")
    works = [False]

    def erase(customer: str) -> int:
        if not works[0]:
            raise OSError("the index is locked")
        return 7

    rooms = [Room("index", lambda c: [], erase), *rooms_of(house, shop(house))]
    with pytest.raises(NotErased, match="OSError: the index is locked"):
        erase_customer(rooms, house.keys, house.audit, "ada", "anna")
    assert texts(export_customer(rooms, house.audit, "ada", "anna")) == []
    works[0] = True
    assert erase_customer(rooms, house.keys, house.audit, "ada", "anna")["index"] == 7


def test_resolved_conversations_are_kept_as_long_as_the_rule_says(house: House) -> None:
    now = [1e9]
    conversations = Conversations(house.database, house.seal, house.unseal, lambda: now[0])
    old, still_open = (conversations.open(c).id for c in ("ada", "ben"))
    conversations.say(old, "hello")
    conversations.resolve(old, "bot")
    now[0] += 10 * 86400
    rooms = rooms_of(house, shop(house))
    assert keep_only(rooms, {"conversations": 11}, house.audit, now[0]) == {"conversations": 0}
    assert keep_only(rooms, {"conversations": 9}, house.audit, now[0]) == {"conversations": 1}
    assert [c.id for c in conversations.listed()] == [still_open]
    assert [line.detail for line in house.audit.lines()] == [{"days": 9, "deleted": 1, "room": "conversations"}]


@pytest.mark.parametrize(("days", "message"), [({"cellar": 3}, "keeps nothing"), ({"conversations": 0}, "more than 0"),
                                               ({"consents": 3}, "keeps nothing that expires")])  # fmt: skip
def test_a_rule_that_fits_nothing_deletes_nothing(house: House, days: dict[str, float], message: str) -> None:
    with pytest.raises(CoterieError, match=message):
        keep_only(rooms_of(house, shop(house)), {"conversations": 1, **days}, house.audit)


def test_consent_is_what_was_said_last_and_silence_is_no(house: House) -> None:
    consents = house.consents
    assert not consents.agreed("ada", "training")
    for what, agreed in (("told", False), ("agreed", True), ("told", True), ("withdrawn", False), ("agreed", True)):
        consents.record("ada", "training", what, "notice-1")  # type: ignore[arg-type]
        assert consents.agreed("ada", "training") == agreed
    assert not consents.agreed("ada", "marketing")
    assert not consents.agreed("ben", "training")


def test_no_plain_text_is_on_the_disk_after_many_conversations(house: House, tmp_path: Path) -> None:
    """Database, its log, and what a program writes down of masked texts, scanned for every known value."""
    rng, values = random.Random(0), list[str]()
    vault = Vault(Detector(), house.database, house.keys)
    with (tmp_path / "program.log").open("w") as log:
        for n in range(25):
            name, mail = f"Xaviera Q{n}uimby{n}", f"x{n}.quimby@mail{n}.example"
            card = f"4{rng.randrange(10**14):014d}"
            card += next(d for d in "0123456789" if _luhn(card + d))
            values += [name, mail, card]
            text = f"I am {name}, {mail}, my card is {card}"
            id = talk(house, f"c{n}", text)
            conversations = Conversations(house.database, house.seal, house.unseal)
            turn = conversations.claim(id)
            assert turn is not None
            evidence = ({"source": "crm", "where": "contacts", "text": text},)
            handed = Handoff("low_confidence", f"{name} asks", f"Dear {name}", f"Yours, {name}", evidence)
            conversations.finish(turn, "", {}, handed)
            assert any(m.data.get("evidence") == list(evidence) for m in conversations.messages(id, kinds=("note",)))
            known = Vault(Detector(), house.database, house.keys, lambda _c, name=name: {"name": [name]})
            print(known.mask(f"c{n}", [text]).texts[0], file=log)
            assert vault.mask(f"c{n}", [f"again {mail}"]).texts == ["again [EMAIL_1]"]
    assert scan([tmp_path], values) == []
    (tmp_path / "careless.log").write_text(values[1])
    assert [h.value for h in scan([tmp_path], values)] == [1], "the scan finds what is there"


def _luhn(digits: str) -> bool:
    return sum(sum(divmod(int(d) * (1 + i % 2), 10)) for i, d in enumerate(reversed(digits))) % 10 == 0


RUN = CliRunner()


def test_the_command_line_does_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "coterie.toml").write_text('[business]\nname = "Shop"\n')
    here = ["--folder", str(tmp_path)]

    def run(*words: str, stdin: str = "") -> Any:
        done = RUN.invoke(app, [*words, *here], input=stdin, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout) if "--json" in words or words[1] == "export" else done.stdout

    run("accounts", "add", "anna", "--group", "hr", "-g", "sales", stdin="correct horse battery\n")
    assert [(a["role"], a["groups"]) for a in run("accounts", "list", "--json")] == [("owner", ["hr", "sales"])]
    run("accounts", "change", "anna", "--no-groups")
    assert [a["groups"] for a in run("accounts", "list", "--json")] == [[]]
    token = run("accounts", "token", "anna", "--scope", "see", "--json")["token"]
    assert token.startswith("ct_")
    head = run("audit", "head").strip()
    assert run("audit", "verify", "--head", head, "--json")["lines"] == 3
    assert run("customers", "export", "ada")["conversations"] == []
    assert run("customers", "erase", "ada", "--yes", "--json")["conversations"] == 0
    assert run("customers", "retain", "conversations=30", "--json") == {"conversations": 0}
    RUN.invoke(app, ["keys", "new", str(tmp_path / "next.key")], catch_exceptions=False)
    run("keys", "rotate", str(tmp_path / "next.key"))
    (tmp_path / "next.key").replace(tmp_path / ".coterie" / "master.key")
    assert run("audit", "verify", "--head", head, "--json")["lines"] == 7
    masked = run("privacy", "mask", "write to a@b.com", "--rules-only", "--json")
    assert masked == {"masked": "write to [EMAIL_1]", "pseudonyms": {"[EMAIL_1]": "a@b.com"}}


def test_on_postgresql_keys_audit_log_and_accounts_hold_as_on_sqlite(
    tmp_path: Path, new_postgres: Callable[..., str]
) -> None:
    """Keys lie in the same database there, and a first key is made in the middle of the desk's transaction."""
    database = open_database(new_postgres())
    house = open_house(tmp_path, database, {})
    id = talk(house, "ada", "I am Ada", "and again")
    conversations = Conversations(database, house.seal, house.unseal)
    assert [m.text for m in conversations.messages(id)] == ["I am Ada", "and again"]
    house.accounts.add("anna", "owner", "correct horse battery")
    assert house.accounts.who(house.accounts.login("anna", "correct horse battery").secret) is not None
    assert Vault(Detector(), database, house.keys).mask("ada", ["a@b.com"]).texts == ["[EMAIL_1]"]
    for statement in ("UPDATE audit SET actor = 'x'", "DELETE FROM audit", "TRUNCATE audit"):
        with database.begin() as c, pytest.raises(DBAPIError, match="only added to"):
            c.execute(sql(statement))
    (tmp_path / "coterie.toml").write_text('[business]\nname = "Shop"\n')
    rooms = rooms_of(house, Business.open(tmp_path))
    assert erase_customer(rooms, house.keys, house.audit, "ada", "anna")["conversations"] == 1
    assert house.audit.verify()[0] == 4
    with pytest.raises(KeyLost):
        Keys(database, MasterKey(bytes(32)))
    house.close()
