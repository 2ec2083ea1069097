"""Data at rest: each customer's under a key of its own; where the master key is lost, nothing starts or changes."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError

from coterie.errors import CoterieError
from coterie.privacy import scan as scanning
from coterie.privacy.audit import Audit, Tampered
from coterie.privacy.deidentify import Detector, MaskingFailed
from coterie.privacy.keys import Erased, Keys, Unreadable, refuse_without
from coterie.privacy.master import KeyLost, MasterKey, master_key, new_key, read_key, write_key
from coterie.privacy.scan import scan
from coterie.privacy.tables import KeyRow
from coterie.privacy.vault import Vault
from coterie.store.database import open_database, reading, writing

ONE, TWO = (MasterKey(bytes([n]) * 32) for n in (1, 2))


@pytest.fixture
def database(tmp_path: Path) -> Engine:
    return open_database(f"sqlite:///{tmp_path}/coterie.db")


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(open_database(f"sqlite:///{tmp_path}/keys.db"), ONE)


def wrapped(keys: Keys, customer: str) -> bytes:
    with reading(keys.database) as session:
        return session.scalars(select(KeyRow.wrapped).where(KeyRow.customer == customer)).one()


MEMORY = Keys(open_database("sqlite:///:memory:"), ONE)


@given(
    plain=st.text(max_size=200), customer=st.sampled_from(["ada", "ben", "a" * 200, "é"]), purpose=st.text(max_size=5)
)
def test_what_is_sealed_opens_again_and_shows_nothing(plain: str, customer: str, purpose: str) -> None:
    sealed = MEMORY.seal(customer, plain, purpose)
    assert MEMORY.unseal(customer, sealed, purpose) == plain
    assert sealed != MEMORY.seal(customer, plain, purpose)
    assert len(plain) < 4 or plain.encode() not in sealed


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[:-1], lambda b: b[:10], lambda b: b"", lambda b: b"plain text that was never sealed at all",
        lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:20] + bytes([b[20] ^ 1]) + b[21:],
        lambda b: b[:1] + (7).to_bytes(4, "big") + b[5:],
    ],
)  # fmt: skip
def test_changed_or_cut_data_is_refused(keys: Keys, change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(Unreadable):
        keys.unseal("ada", change(keys.seal("ada", "my secret")))


def test_data_does_not_open_as_anothers_or_for_another_purpose(keys: Keys) -> None:
    sealed = keys.seal("ada", "my secret", "message")
    keys.seal("ben", "x")
    for customer, purpose in (("ben", "message"), ("ada", "profile"), ("adam", "essage")):
        with pytest.raises(Unreadable):
            keys.unseal(customer, sealed, purpose)


def test_many_threads_make_one_key(keys: Keys) -> None:
    sealed: list[bytes] = []
    threads = [threading.Thread(target=lambda: sealed.append(keys.seal("ada", "x"))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [keys.unseal("ada", s) for s in sealed] == ["x"] * 8


def test_an_erased_customers_key_is_gone_from_the_files_and_nothing_opens(keys: Keys, tmp_path: Path) -> None:
    sealed, other = keys.seal("ada", "my secret"), keys.seal("ben", "his")
    secret = wrapped(keys, "ada")
    files = sorted(tmp_path.glob("keys.db*"))
    assert any(secret in f.read_bytes() for f in files)
    assert keys.destroy("ada") == 1
    assert not any(secret in f.read_bytes() for f in files if f.exists())
    assert not any(b"ada" in f.read_bytes() for f in files if f.exists()), "who it was is not written there either"
    for fresh in (keys, Keys(keys.database, ONE)):
        with pytest.raises(Erased):
            fresh.unseal("ada", sealed)
        assert fresh.unseal("ben", other) == "his"
    again = keys.seal("ada", "who came back")  # under a new key
    assert keys.unseal("ada", again) == "who came back"


def test_keys_that_an_older_coterie_destroyed_keep_no_ids_either(keys: Keys, tmp_path: Path) -> None:
    sealed = keys.seal("ada@example.com", "my secret")
    with keys.database.begin() as c:
        c.execute(text("UPDATE customer_keys SET wrapped = x'', destroyed_at = 1"))
    keys = Keys(keys.database, ONE)
    assert keys.seal("ada@example.com", "again")[4] == 2
    keys.seal("ben", "x")
    keys.destroy("ben")
    assert [row[0] for row in contents(keys)[1:] if not str(row[0]).startswith("coterie:")] == ["ada@example.com"]
    fresh = Keys(keys.database, ONE)
    with pytest.raises(Erased):
        fresh.unseal("ada@example.com", sealed)
    keys.destroy("ada@example.com")
    assert b"ada@example.com" not in b"".join(f.read_bytes() for f in tmp_path.glob("keys.db*"))
    assert keys.seal("ada@example.com", "once more")[4] == 3


def test_a_retired_key_opens_what_it_sealed_until_it_is_destroyed_and_seals_nothing_more(keys: Keys) -> None:
    now = [1000.0]
    keys.clock = lambda: now[0]
    sealed, other = keys.seal("ada", "my secret"), keys.seal("ben", "his")
    assert list(keys.customers()) == [["ada", "ben"]]
    assert keys.retire(["ada"]) == 0
    assert keys.unseal("ada", sealed) == "my secret"
    back = keys.seal("ada", "back at once")
    assert (back[4], keys.retire([])) == (2, 0)
    now[0] += 3601
    assert keys.retire(["ada"]) == 1, "the first; the second is retired only now"
    assert Keys(keys.database, ONE).unseal("ada", back) == "back at once"
    with pytest.raises(Erased):
        keys.unseal("ada", sealed)
    assert keys.unseal("ben", other) == "his"


def test_another_process_notices_within_a_minute_that_a_key_was_destroyed(keys: Keys) -> None:
    now = [1000.0]
    other = Keys(keys.database, ONE, lambda: now[0])
    sealed = other.seal("ada", "my secret")
    keys.destroy("ada")
    now[0] += 61
    with pytest.raises(Erased):
        other.unseal("ada", sealed)


def contents(keys: Keys) -> list[tuple[object, ...]]:
    with keys.database.connect() as c:
        return [tuple(r) for t in ("master_keys", "customer_keys") for r in c.execute(text(f"SELECT * FROM {t}"))]


def test_a_wrong_or_missing_master_key_is_refused_and_nothing_is_overwritten(keys: Keys) -> None:
    sealed = keys.seal("ada", "my secret")
    before = contents(keys)
    with pytest.raises(KeyLost, match="not the one that this database was encrypted with"):
        Keys(keys.database, TWO)
    with pytest.raises(KeyLost, match="no master key is given"):
        refuse_without(keys.database)
    assert contents(keys) == before
    assert Keys(keys.database, ONE).unseal("ada", sealed) == "my secret"


def test_a_new_master_key_opens_everything_and_the_old_one_nothing(keys: Keys) -> None:
    sealed = keys.seal("ada", "my secret")
    assert keys.rewrap(TWO) == 1
    assert Keys(keys.database, TWO).unseal("ada", sealed) == "my secret"
    with pytest.raises(KeyLost):
        Keys(keys.database, ONE)


def test_a_process_that_runs_on_after_a_rotation_makes_no_key_under_the_old_master(keys: Keys) -> None:
    now = [1000.0]
    running = Keys(keys.database, ONE, lambda: now[0])
    sealed = running.seal("ada", "my secret")
    keys.rewrap(TWO)
    with pytest.raises(KeyLost, match="rotated while this was running"):
        running.seal("ben", "the first words of a new customer")
    with pytest.raises(KeyLost, match="rotated while this was running"):
        running.rewrap(MasterKey(bytes([3]) * 32))
    now[0] += 61
    with pytest.raises(KeyLost, match="rotated while this was running"):
        running.unseal("ada", sealed)
    fresh = Keys(keys.database, TWO)
    assert fresh.unseal("ada", sealed) == "my secret"
    assert fresh.unseal("ben", fresh.seal("ben", "again")) == "again"


def test_no_customer_has_the_name_of_a_key_of_the_house(keys: Keys) -> None:
    secret, sealed = keys.secret("coterie:audit"), keys.seal_own("coterie:account:anna", "totp", "totp")
    for deed in (
        lambda: keys.destroy("coterie:audit"), lambda: keys.destroy("coterie:account:anna"),
        lambda: keys.seal("coterie:audit", "x"), lambda: keys.unseal("coterie:account:anna", sealed, "totp"),
        lambda: keys.current("coterie:audit"),
    ):  # fmt: skip
        with pytest.raises(CoterieError, match="the house's own"):
            deed()
    assert Keys(keys.database, ONE).secret("coterie:audit") == secret
    assert keys.unseal_own("coterie:account:anna", sealed, "totp") == "totp"


def test_a_rotation_that_fails_changes_nothing(keys: Keys) -> None:
    keys.seal("ada", "x")
    with keys.database.begin() as c:
        c.execute(text("INSERT INTO customer_keys VALUES ('ben', 1, 'x', x'00112233', 0, NULL, NULL)"))
    before = contents(keys)
    with pytest.raises(KeyLost):
        keys.rewrap(TWO)
    assert contents(keys) == before


def test_the_master_key_comes_from_variable_file_or_command(tmp_path: Path) -> None:
    file, key = tmp_path / "master.key", new_key()
    write_key(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert master_key({}) is None
    assert master_key({"COTERIE_MASTER_KEY": key}) == read_key(key, "here")
    from_file = master_key({"COTERIE_MASTER_KEY_FILE": str(file)})
    assert from_file == master_key({"COTERIE_MASTER_KEY_COMMAND": f"cat '{file}'"})
    assert from_file is not None
    assert file.read_text().strip() not in repr(from_file)


BAD = [
    ({"COTERIE_MASTER_KEY": "short"}, "not a master key"), ({"COTERIE_MASTER_KEY_FILE": "nowhere"}, "cannot be read"),
    ({"COTERIE_MASTER_KEY_COMMAND": "false"}, "exit code 1"), ({"COTERIE_MASTER_KEY_COMMAND": "echo no"}, "a master"),
    ({"COTERIE_MASTER_KEY_COMMAND": "/no/such/program"}, "could not be run"),
    ({"COTERIE_MASTER_KEY": new_key(), "COTERIE_MASTER_KEY_FILE": "x"}, "both set"),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "message"), BAD)
def test_a_master_key_that_cannot_be_used_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(CoterieError, match=message) as error:
        master_key(environment)
    assert not any(v in str(error.value) for v in environment.values() if len(v) > 30)


def test_a_key_file_that_others_may_read_is_refused_and_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "master.key"
    write_key(file)
    kept = file.read_bytes()
    with pytest.raises(CoterieError, match="never overwritten"):
        write_key(file)
    assert file.read_bytes() == kept
    os.chmod(file, 0o644)
    with pytest.raises(CoterieError, match="chmod 600"):
        master_key({"COTERIE_MASTER_KEY_FILE": str(file)})


def test_pseudonyms_are_kept_sealed_and_the_same_after_a_restart(database: Engine, keys: Keys, tmp_path: Path) -> None:
    def known(customer: str) -> dict[str, list[str]]:
        return {"name": ["Margarethe Oldenburg"]} if customer == "ada" else {}

    vault = Vault(Detector(), database, keys, known)
    masked = vault.mask("ada", ["margarethe oldenburg, m.old@example.org", "card 4111 1111 1111 1111"])
    assert masked.texts == ["[NAME_1], [EMAIL_1]", "card [CARD_1]"]
    assert Vault(Detector(), database, keys, known).mask("ada", ["to M.OLD@example.org"]).texts == ["to [EMAIL_1b]"]
    assert vault.mask("ben", ["Margarethe Oldenburg"]).texts == ["Margarethe Oldenburg"], "another's known values"
    restoring = masked.restoring()
    assert "".join(map(restoring.feed, "Dear [NAME_1]!")) == "Dear margarethe oldenburg!"
    assert scan([tmp_path], ["Margarethe Oldenburg", "m.old@example.org", "4111 1111 1111 1111"]) == []


def test_two_processes_that_mask_for_one_customer_agree(database: Engine, keys: Keys) -> None:
    one, other = (Vault(Detector(), database, keys) for _ in range(2))
    one.mask("ada", [""])
    other.mask("ada", [""])
    assert one.mask("ada", ["a@b.com"]).texts == ["[EMAIL_1]"]
    assert other.mask("ada", ["c@d.com and a@b.com"]).texts == ["[EMAIL_2] and [EMAIL_1]"]
    assert other.mask("ada", ["x"]).restore("[EMAIL_1] [EMAIL_2]") == "a@b.com c@d.com"


def test_where_nothing_can_be_known_of_a_customer_nothing_goes_out(database: Engine, keys: Keys) -> None:
    def broken(customer: str) -> dict[str, list[str]]:
        raise OSError("the CRM is down")

    with pytest.raises(MaskingFailed):
        Vault(Detector(), database, keys, broken).mask("ada", ["hello"])


def test_a_scan_finds_a_value_however_a_file_has_it(tmp_path: Path) -> None:
    value = "Zoë Brown"
    for n, data in enumerate((value, "ZO\\u00cb".lower() + " brown", "zo%C3%AB+brown", f"x{value}")):
        (tmp_path / f"{n}.log").write_bytes(data.encode())
    (tmp_path / "4.bin").write_bytes(b"\0" * ((1 << 22) - 5) + value.encode() + b"\0")
    (tmp_path / "5.bin").write_bytes(value.encode("utf-16-le"))
    (tmp_path / "clean.log").write_text("Zoe Braun")
    found = scan([tmp_path], ["no such value", value])
    assert {h.value for h in found} == {1}
    assert [Path(h.file).name for h in found] == ["0.log", "1.log", "2.log", "3.log", "4.bin", "5.bin"]


def test_the_audit_log_verifies_and_names_what_was_done(database: Engine) -> None:
    audit = Audit(database, ONE.key, lambda: 1e9)
    assert audit.verify() == (0, audit.head())
    audit.record("anna", "conversation.read", "ada", conversation="c1")
    head = audit.head()
    audit.record("anna", "customer.export", "ada")
    assert audit.verify(head) == (2, audit.head())
    assert [(line.actor, line.action, line.detail) for line in audit.lines(subject="ada")] == [
        ("anna", "customer.export", {}), ("anna", "conversation.read", {"conversation": "c1"}),
    ]  # fmt: skip


def test_a_line_and_its_deed_are_kept_together_or_not_at_all(database: Engine) -> None:
    audit = Audit(database, ONE.key)

    def deed() -> None:
        with writing(database) as session:
            audit.record_in(session, "anna", "customer.erase", "ada")
            raise ValueError("the deed failed")

    with pytest.raises(ValueError, match="the deed failed"):
        deed()
    assert audit.verify()[0] == 0


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'x'", "DELETE FROM audit WHERE seq = 2"])
def test_the_database_itself_refuses_to_change_the_log(database: Engine, statement: str) -> None:
    Audit(database).record("anna", "x")
    with database.begin() as c, pytest.raises(DBAPIError, match="only added to"):
        c.execute(text(statement.replace("seq = 2", "seq = 1")))


TAMPERING = [
    ("UPDATE audit SET actor = 'nobody' WHERE seq = 2", "line 2 is not as it was written"),
    ("UPDATE audit SET at = at + 1 WHERE seq = 3", "line 3 is not as it was written"),
    ("UPDATE audit SET detail = '{}' WHERE seq = 1", "line 1 is not as it was written"),
    ("DELETE FROM audit WHERE seq = 2", "line 2 is missing"),
    ("DELETE FROM audit WHERE seq = 4", "that was noted"),
    ("UPDATE audit SET seq = CASE seq WHEN 2 THEN 30 WHEN 3 THEN 2 ELSE seq END", "line 2 is not"),
    ("DELETE FROM audit", "that was noted"),
]


@pytest.mark.parametrize(("statement", "message"), TAMPERING)
def test_tampering_with_the_log_is_found(database: Engine, statement: str, message: str) -> None:
    audit = Audit(database, ONE.key)
    for n in range(4):
        audit.record("anna", "x", n=n)
    head = audit.head()
    with database.begin() as c:  # as somebody who owns the database
        c.execute(text("DROP TRIGGER audit_is_never_updated"))
        c.execute(text("DROP TRIGGER audit_is_never_deleted"))
        c.execute(text(statement))
    with pytest.raises(Tampered, match=message):
        audit.verify(head)


def test_a_chain_that_was_redone_without_the_master_key_does_not_verify(database: Engine) -> None:
    Audit(database).record("anna", "x")
    with pytest.raises(Tampered):
        Audit(database, ONE.key).verify()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("abcäß \u202e", min_size=1, max_size=9), max_size=6),
    st.lists(st.sampled_from("aäbcAÄ \0ß"), max_size=90), st.sampled_from(["utf-8", "utf-16-le"]), st.integers(5, 40),
)  # fmt: skip
def test_a_scan_finds_just_what_a_plain_search_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[str], letters: list[str], code: str, chunk: int
) -> None:
    """Whatever the values, and wherever a piece of the file ends."""
    monkeypatch.setattr(scanning, "CHUNK", chunk)
    file = tmp_path / "file"
    file.write_bytes("".join(letters).encode(code))
    whole = file.read_bytes().lower()
    wanted = {
        (at, n)
        for n, value in enumerate(values) if len(value) >= scanning.SHORTEST
        for form in scanning._forms(value) for at in range(len(whole)) if whole.startswith(form, at)
    }  # fmt: skip
    assert {(hit.at, hit.value) for hit in scan([file], values)} == wanted
