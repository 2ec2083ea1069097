"""Everything of the privacy room for one business, opened together: keys, accounts, audit log, consents.

Notable: encryption is on from the first start. Where no master key is given, one is made in `.coterie/master.key` of
the business's folder: a copy of the database alone is then worth nothing; keep the key elsewhere for more than that.
A database that has keys and finds its master key gone is never given a new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from coterie.errors import StorageError
from coterie.privacy.accounts import Accounts
from coterie.privacy.audit import Audit
from coterie.privacy.keys import FORM, Keys, refuse_without
from coterie.privacy.master import MasterKey, master_key, write_key
from coterie.privacy.rights import Consents
from coterie.store.database import open_database

PLACE = ".coterie"
AUDIT = "coterie:audit"  # whose key links the audit log; a new master key leaves it as it is
KEY_FILE, KEYS_FILE = "master.key", "keys.db"


@dataclass(frozen=True)
class House:
    """What is open. Tables lie in `database`, keys in a database of their own."""

    database: Engine
    keys: Keys
    audit: Audit
    accounts: Accounts
    consents: Consents

    def seal(self, customer: str, plain: str) -> bytes:
        """What is kept of a text: sealed under its customer's key."""
        return self.keys.seal(customer, plain)

    def unseal(self, customer: str, kept: bytes) -> str:
        """A text as it was; also one that was kept before there was encryption. Raises Erased, Unreadable."""
        return self.keys.unseal(customer, kept) if kept[:1] == FORM else kept.decode()

    def close(self) -> None:
        """Let go of both databases."""
        self.keys.database.dispose()
        self.database.dispose()


def open_house(folder: Path, database: Engine, environment: Mapping[str, str] | None = None) -> House:
    """Over a business's folder and database. Raises KeyLost, CoterieError, StorageError; then nothing is changed."""
    place = folder / PLACE
    on_sqlite = database.dialect.name == "sqlite"
    at_keys = open_database(f"sqlite:///{(place / KEYS_FILE).resolve()}") if on_sqlite else database
    master = master_key(environment) or _kept(place / KEY_FILE, at_keys)
    keys = Keys(at_keys, master)
    audit = Audit(database, keys.secret(AUDIT))
    accounts = Accounts(database, keys, audit)
    accounts.apart()
    return House(database, keys, audit, accounts, Consents(database))


def _kept(file: Path, keys: Engine) -> MasterKey:
    """The business's own master key, made where there is none and nothing is encrypted yet."""
    if not file.exists():
        refuse_without(keys)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{file.parent}: cannot be written ({error.strerror})") from error
        write_key(file)
    found = master_key({"COTERIE_MASTER_KEY_FILE": str(file)})
    assert found, "the file was named"
    return found
