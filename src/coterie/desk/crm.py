"""The customer's record: what a business's CRM knows, what of it a model may see, and cases and notes written back.

Notable: a CRM is asked with a deadline, and one that fails is left alone for a while (a circuit breaker), so that a
conversation never waits for it twice; what it could not give is told to the agent and to nobody else.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooSlow
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sqlalchemy.exc import ArgumentError

from coterie.config import CrmSpec
from coterie.errors import CoterieError, CrmError

DEADLINE_S, REST_S, FAILURES = 3.0, 30.0, 3
T = TypeVar("T")


@dataclass(frozen=True)
class Contact:
    """One customer as the CRM knows them. `fields`: all that was read, by the CRM's own names."""

    id: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A case to open. `key`: of the conversation, so that it is opened once, however often this is tried."""

    subject: str
    text: str
    key: str


class Crm(Protocol):
    """All that the desk asks of a CRM. Every method raises CrmError."""

    def find(self, customer: str) -> str | None:
        """The id of the contact that the desk knows by this name, such as an e-mail address."""

    def read(self, id: str) -> Contact:
        """A contact's fields."""

    def open_case(self, id: str, case: Case) -> str:
        """The id of a case for a contact, new or of the same key."""

    def write_note(self, case_id: str, text: str, key: str) -> str:
        """The id of a note in a case, new or of the same key."""


@dataclass
class Careful:
    """Asks within `deadline_s`; after FAILURES in a row not at all for `rest_s`."""

    deadline_s: float = DEADLINE_S
    rest_s: float = REST_S
    clock: Callable[[], float] = time.monotonic
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, thread_name_prefix="crm"))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _failed: int = 0
    _rests_until: float = 0.0

    def ask(self, do: Callable[[], T]) -> T:
        """Do it in a thread. Raises CrmError, whatever went wrong."""
        with self._lock:
            if self.clock() < self._rests_until:
                raise CrmError("the CRM has failed several times; it is left alone for a moment")
        future: Future[T] = self._pool.submit(do)
        try:
            got = future.result(self.deadline_s)
        except TooSlow as error:
            future.cancel()
            self._count(failed=True)
            raise CrmError(f"the CRM did not answer within {self.deadline_s:g} s") from error
        except Exception as error:
            self._count(failed=True)
            raise error if isinstance(error, CrmError) else CrmError(f"the CRM failed: {error}") from error
        self._count(failed=False)
        return got

    def _count(self, failed: bool) -> None:
        with self._lock:
            self._failed = self._failed + 1 if failed else 0
            if self._failed >= FAILURES:
                self._rests_until, self._failed = self.clock() + self.rest_s, 0


def profile_of(crm: Crm, allowed: Mapping[str, str], careful: Careful | None = None) -> Callable[[str], dict[str, Any]]:
    """The desk's `profile`: of a customer's record the fields that a rule lets into the prompt, by the names it gives.

    allowed: name in the CRM -> name shown. Values that are not plain (text, number, yes or no) are left out, and long
    texts are cut. Raises CrmError.
    """
    careful = careful or Careful()

    def profile(customer: str) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            id = crm.find(customer)
            return dict(crm.read(id).fields) if id else {}

        known = careful.ask(look)
        return {shown: _plain(known[name]) for name, shown in allowed.items() if _plain(known.get(name)) is not None}

    return profile


def open_crm(spec: CrmSpec) -> Crm:
    """As declared. Raises CoterieError where something that it needs is not there."""
    if spec.kind == "sql":
        if not spec.find or not spec.read:
            raise CoterieError("desk.crm: a CRM of kind sql needs `find` and `read`, two SELECT statements")
        for needs, statement, name in ((spec.case_on, spec.case, "case"), (spec.note_on, spec.note, "note")):
            if needs and not statement:
                raise CoterieError(f"desk.crm: {name}_on needs `{name}`, an INSERT statement")
        from sqlalchemy import create_engine

        from coterie.desk.crm_sql import SqlCrm

        try:
            database = create_engine(spec.url, pool_pre_ping=True)
            return SqlCrm(database, spec.find, spec.read, spec.case, spec.case_of, spec.note, spec.note_of)
        except (ArgumentError, ImportError) as error:
            raise CoterieError(f"desk.crm: url: cannot be used ({error})") from error
    missing = [name for name in (spec.client_id_env, spec.client_secret_env) if not os.environ.get(name)]
    if missing:
        raise CoterieError(f"desk.crm: the environment has no {' and no '.join(missing)}")
    try:
        from coterie.desk.salesforce import SalesforceCrm
    except ImportError as error:
        raise CoterieError("desk.crm: Salesforce needs simple-salesforce; pip install 'coterie[salesforce]'") from error
    id, secret = os.environ[spec.client_id_env], os.environ[spec.client_secret_env]
    return SalesforceCrm(spec.url, id, secret, tuple(spec.fields))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split())[:200] or None
    return value if isinstance(value, bool | int | float) else None
