"""What the serving process keeps in memory of customers ends with their visit, however many come."""

from pathlib import Path

import pytest

from coterie.errors import Busy
from coterie.privacy import vault as vaults
from coterie.privacy.access import Limit
from coterie.privacy.keys import KEPT_S, Keys
from coterie.privacy.master import MasterKey
from coterie.privacy.vault import Vault
from coterie.recent import Recent
from coterie.store.database import open_database
from coterie.web import witness
from coterie.web.witness import Looks


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path, clock: Clock) -> Keys:
    return Keys(open_database(f"sqlite:///{tmp_path}/keys.db"), MasterKey(bytes(32)), clock)


def test_no_more_than_so_many_are_kept_and_the_oldest_go() -> None:
    recent = Recent[int, str](3, 60.0)
    for n in range(10):
        recent.put(n, str(n))
    assert [n for n in range(10) if recent.get(n)] == [7, 8, 9]
    assert len(recent) == 3


def test_what_is_over_is_not_given_and_leaves_when_another_comes(clock: Clock) -> None:
    recent = Recent[str, int](100, 60.0, clock)
    for name in "abc":
        recent.put(name, 1)
    clock.now += 59.9
    assert recent.get("a") == 1, "and that does not make it younger"
    recent.put("b", 2)  # that does
    clock.now += 0.1
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == (None, 2, None)
    recent.put("d", 1)
    assert len(recent) == 2, "b and d"
    recent.drop("b")
    recent.drop("b")
    assert (recent.get("b"), len(recent)) == (None, 1)


def test_keys_of_customers_who_are_gone_are_not_in_memory(keys: Keys, clock: Clock) -> None:
    for n in range(200):
        assert keys.unseal(f"customer {n}", keys.seal(f"customer {n}", "hello")) == "hello"
        clock.now += 1.0
    assert len(keys._open) <= KEPT_S
    assert len(keys._current) <= KEPT_S


def test_a_limit_knows_only_the_names_of_its_time(clock: Clock) -> None:
    limit = Limit(2, 60.0, clock)
    for n in range(500):
        limit.count(f"visitor {n}")
        clock.now += 1.0
    assert len(limit._times) <= 60
    limit.count("visitor 499")
    with pytest.raises(Busy):
        limit.count("visitor 499")
    clock.now += 60.0
    limit.count("visitor 499")


def test_pseudonyms_that_left_memory_are_the_same_when_they_are_needed(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vaults, "KEPT", 3)
    vault = Vault(lambda _text: [], open_database(f"sqlite:///{tmp_path}/coterie.db"), keys)
    known = {"name": ["Anna Müller", "Ben Okri"]}
    first = vault.mask("anna", ["Anna Müller and Ben Okri"], known).texts
    for n in range(10):
        vault.mask(f"customer {n}", ["hello"], {})
    assert len(vault._open) == 3
    again = vault.mask("anna", ["Ben Okri", "Anna Müller and Ben Okri"], known)
    assert again.texts[1:] == first
    assert again.restore(again.texts[0]) == "Ben Okri"


def test_looks_are_forgotten_beyond_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "SEEN", 3)
    looks = Looks()
    assert [looks.again("kim", "a"), looks.again("kim", "a"), looks.again("lee", "a")] == [True, False, True]
    for n in range(10):
        looks.again("kim", str(n))
    assert len(looks._seen) == 3
