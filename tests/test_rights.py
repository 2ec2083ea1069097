"""What a customer may ask for, through every room; how long things stay; and no plain text on the disk meanwhile."""

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyotp import TOTP
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from coterie.business import Business, fingerprint
from coterie.cli.main import app
from coterie.desk.conversation import Conversations, Handoff
from coterie.desk.rights import rooms_of, tell_of_erased
from coterie.desk.trained import learned_from, marked
from coterie.errors import CoterieError
from coterie.experts.library import ExpertFacts
from coterie.privacy.deidentify import Detector
from coterie.privacy.house import House, open_house
from coterie.privacy.keys import Erased, Keys
from coterie.privacy.master import KeyLost, MasterKey
from coterie.privacy.rights import NotErased, Room, erase_customer, export_customer, keep_only
from coterie.privacy.scan import scan
from coterie.privacy.tables import AccountRow
from coterie.privacy.vault import Vault
from coterie.store.database import open_database, writing


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
    house.accounts.add("ada", "owner", "correct horse battery")  # somebody else
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


def test_erasing_or_exporting_touches_no_key_of_the_house(house: House, tmp_path: Path) -> None:
    rooms = rooms_of(house, shop(house))
    for name in ("coterie:audit", "coterie:mail", "coterie:account:anna"):
        for deed in (
            lambda name=name: erase_customer(rooms, house.keys, house.audit, name, "anna"),
            lambda name=name: export_customer(rooms, house.audit, name, "anna"),
        ):
            with pytest.raises(CoterieError, match="the house's own"):
                deed()
    assert house.audit.lines() == []
    open_house(tmp_path, house.database, {}).close()


def test_a_customer_named_like_an_account_does_not_hold_its_second_factor(house: House, tmp_path: Path) -> None:
    """Neither one made now, nor one that an older coterie sealed under "account:NAME"."""
    secret, _ = house.accounts.offer_second_factor("anna")
    for name in ("anna", "bea"):
        house.accounts.add(name, "owner", "correct horse battery")
        house.accounts.take_second_factor(name, secret, TOTP(secret).at(time.time() - 30))
    talk(house, "account:bea", "I am customer number bea")
    with writing(house.database) as session:
        row = session.get(AccountRow, "bea")
        assert row
        row.totp = house.keys.seal("account:bea", secret, "totp")
    again = open_house(tmp_path, house.database, {})
    for name in ("anna", "bea"):
        erase_customer(rooms_of(again, shop(again)), again.keys, again.audit, f"account:{name}", "anna")
        assert again.accounts.login(name, "correct horse battery", TOTP(secret).now())
    again.close()


def test_experts_that_learned_from_an_erased_customer_are_listed_until_their_rows_are_gone(house: House) -> None:
    """And until the version that answers was made of data without them."""
    business = shop(house)

    def fitted() -> None:
        facts = ExpertFacts("support", fingerprint=fingerprint(business, "support"))
        business.library.publish(facts, lambda folder: None)

    fitted()
    assert marked(business, house) == {}
    done = erase_customer(rooms_of(house, business), house.keys, house.audit, "zoe", "anna")
    assert done["experts"] == marked(business, house) == {"support": ["a.jsonl:1", "b.csv:2"]}
    assert "zoe" not in (business.folder / ".coterie" / "retrain.json").read_text()
    (business.folder / "a.jsonl").write_text('{"prompt": "p", "completion": "c", "customer": "ben"}\n')
    fitted()
    assert marked(business, house) == {"support": ["b.csv:2"]}, "a fit that learned from the rest of the rows, too"
    (business.folder / "b.csv").write_text("prompt,completion,customer\np,c,ben\n")
    assert marked(business, house) == {"support": []}, "they are gone, and what was learned of them is not"
    fitted()
    told = list[str]()
    tell_of_erased(business, told.append)
    assert (told, marked(business, house)) == ([], {})
    (business.folder / "b.csv").write_text("prompt,completion,customer\np,q,ben\n")
    assert marked(business, house) == {}, "what is over is over, whatever is to be fitted next"


@pytest.mark.parametrize("name", ["rows.parquet", "ROWS.CSV", "pairs.jsonl"])
def test_rows_of_a_customer_are_found_in_every_kind_of_file(name: str, house: House) -> None:
    business = shop(house)
    rows = [{"prompt": "p", "completion": "c", "chosen": "c", "rejected": "d", "customer": c} for c in (7, 1042)]
    kind = "preferences" if name.startswith("pairs") else "train"
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), business.folder / name)
    elif name.endswith("CSV"):
        lines = [",".join(rows[0]), *(",".join(map(str, r.values())) for r in rows)]
        (business.folder / name).write_text("\n".join(lines), encoding="utf-8-sig")
    else:
        (business.folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    spec = business.config.experts["support"].model_copy(update={kind: [name]})
    business.config.experts["support"] = spec
    (found,) = learned_from(business, "1042")["support"]
    assert found.startswith(name)
    (business.folder / ".coterie" / "retrain.json").write_text('{"1042": ["support"]}')  # of an older coterie
    assert marked(business, house) == {"support": [found]}


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


def test_of_whom_nothing_is_kept_any_more_no_pseudonyms_and_keys_stay(house: House) -> None:
    now = [1e9]
    house.keys.clock = lambda: now[0]
    conversations = Conversations(house.database, house.seal, house.unseal, lambda: now[0])
    vault, rooms = Vault(Detector(), house.database, house.keys), rooms_of(house, shop(house))
    for customer in ("ada", "ben", "eve"):
        id = conversations.open(customer).id
        conversations.say(id, "I am a@b.com")
        vault.mask(customer, ["I am a@b.com"])
        conversations.resolve(id, "bot")
    in_backup = house.seal("ada", "in a backup")
    now[0] += 10 * 86400
    talk(house, "ben", "I am still here")

    def kept(customer: str) -> list[str]:
        return list(export_customer(rooms, house.audit, customer, "anna")["pseudonyms"].values())

    assert keep_only(rooms, {"conversations": 9}, house.audit, now[0]) == {"conversations": 3}
    assert [kept(c) for c in ("ada", "ben", "eve")] == [[], ["a@b.com"], []]
    assert house.unseal("ada", in_backup) == "in a backup", "who comes back just now loses no word"
    assert texts(export_customer(rooms, house.audit, "eve", "anna")) == []
    talk(house, "eve", "I came back")
    now[0] += 86400
    keep_only(rooms, {"conversations": 9}, house.audit, now[0])
    with pytest.raises(Erased):
        house.unseal("ada", in_backup)
    for customer, said in (("ben", "I am still here"), ("eve", "I came back")):
        assert texts(export_customer(rooms, house.audit, customer, "anna")) == [said]
    assert next(line.detail for line in house.audit.lines(actor="retention")) == {"room": "keys", "deleted": 1}
    assert house.audit.verify()


@pytest.mark.parametrize(("days", "message"), [({"cellar": 3}, "keeps nothing"), ({"conversations": 0}, "more than 0"),
                                               ({"files": 3}, "keeps nothing that expires")])  # fmt: skip
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


def test_the_record_of_consents_goes_whole_once_its_last_entry_is_old(house: House) -> None:
    now, rooms = [1e9], rooms_of(house, shop(house))
    object.__setattr__(house.consents, "clock", lambda: now[0])
    for customer in ("silent", "ada", *(f"c-{n}" for n in range(300))):
        house.consents.record(customer, "ai", "told", "notice-1")
    house.consents.record("ada", "training", "agreed", "May we?")
    now[0] += 20 * 86400
    house.consents.record("ben", "training", "agreed", "May we?")
    house.consents.tell("ada", "ai", "notice-1")
    now[0] += 15 * 86400
    assert keep_only(rooms, {"consents": 30}, house.audit, now[0]) == {"consents": 301}
    assert house.consents.of("silent") == []
    assert [c["what"] for c in house.consents.of("ada")] == ["told", "agreed", "told"]
    assert house.consents.agreed("ada", "training"), "whoever was here lately keeps what they said"
    assert keep_only(rooms, {"consents": 10}, house.audit, now[0]) == {"consents": 2}
    assert not house.consents.agreed("ben", "training"), "is asked anew"
    assert [line.detail["deleted"] for line in house.audit.lines(actor="retention")] == [2, 101, 200]


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
