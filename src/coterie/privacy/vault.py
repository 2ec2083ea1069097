"""Masking for many customers: each one's pseudonyms are kept, sealed, so that they are the same next week."""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError

from coterie.data.private import Span
from coterie.privacy.deidentify import Mask, MaskingFailed
from coterie.privacy.keys import Keys
from coterie.privacy.known import KnownValues
from coterie.privacy.pseudonyms import Pair, Pseudonyms, Restorer
from coterie.privacy.tables import PseudonymRow
from coterie.recent import Recent
from coterie.store.database import reading, writing

KEPT, KEPT_S = 1024, 600.0  # customers whose pseudonyms are in memory, and for how long after they were needed
PURPOSE = "pseudonym"


@dataclass(frozen=True)
class Masked:
    """Texts without private data, in their order, and what puts it back: into a text, or into one that streams."""

    texts: list[str]
    restore: Callable[[str], str]
    restoring: Callable[[], Restorer] = lambda: Restorer(Pseudonyms())


def nothing_known(_customer: str) -> Mapping[str, Iterable[str]]:
    """Of whom nothing is known."""
    return {}


Masking = Callable[[str, list[str], Mapping[str, Any]], Masked]  # customer, texts, what is known of them by kind


def as_it_is(_customer: str, texts: list[str], _known: Mapping[str, Any]) -> Masked:
    """The masking of a desk without one."""
    return Masked(texts, lambda text: text)


def loggable(mask: Masking, customer: str, text: str) -> str:
    """`text` as a log or a list may show it: masked, or where that fails, only that it was not shown."""
    try:
        return mask(customer, [text], {}).texts[0]
    except Exception as error:  # whatever it is: nothing is shown unmasked
        return f"not shown, as it could not be masked ({type(error).__name__})"


class Vault:
    """Masks and restores, customer by customer. `known`: a customer's own values by kind, where `mask` is not given
    them; where it fails, nothing goes out."""

    def __init__(
        self, detector: Callable[[str], list[Span]], database: Engine, keys: Keys,
        known: Callable[[str], Mapping[str, Iterable[str]]] = nothing_known,
    ) -> None:  # fmt: skip
        self.detector, self.database, self.keys, self.known = detector, database, keys, known
        self._lock = threading.Lock()  # two threads that need a customer's pseudonyms get the same object
        self._open = Recent[str, tuple[int, Pseudonyms]](KEPT, KEPT_S)  # with the key they were kept under

    def mask(self, customer: str, texts: list[str], values: Mapping[str, Iterable[str]] | None = None) -> Masked:
        """The texts with pseudonyms, which are in the database before this returns; `values` are known to be the
        customer's own. Raises MaskingFailed."""
        try:
            known = KnownValues(self.known(customer) if values is None else values)
        except Exception as error:  # what a CRM may raise is not known here
            why = f"what is known of the customer could not be read ({type(error).__name__}), so the text was not used"
            raise MaskingFailed(why) from None
        for _ in range(5):
            pseudonyms = self._of(customer)
            mask = Mask(self.detector, pseudonyms, known)
            hidden = [mask.hide(text) for text in texts]
            if self._keep(customer, pseudonyms):
                return Masked(hidden, mask.restore, mask.restoring)
            self.forget(customer)  # another process gave out the same pseudonyms: take theirs, and mask again
        raise MaskingFailed("the text could not be masked: the customer's pseudonyms changed all the time")

    def forget(self, customer: str) -> None:
        """Drop what is in memory of a customer."""
        self._open.drop(customer)

    def _of(self, customer: str) -> Pseudonyms:
        key = self.keys.current(customer)  # another one after an erasure: what is in memory is forgotten too
        with self._lock:
            kept = self._open.get(customer)
            if kept and kept[0] == key:
                self._open.put(customer, kept)
                return kept[1]
        read = Pseudonyms(self._read(customer))
        with self._lock:
            kept = self._open.get(customer)
            if kept is None or kept[0] != key:
                kept = key, read
            self._open.put(customer, kept)
            return kept[1]

    def _read(self, customer: str) -> list[Pair]:
        query = select(PseudonymRow).where(PseudonymRow.customer == customer)
        with reading(self.database) as session:
            rows = [(row.pseudonym, row.value) for row in session.scalars(query)]
        return [Pair(pseudonym, self.keys.unseal(customer, value, PURPOSE)) for pseudonym, value in rows]

    def _keep(self, customer: str, pseudonyms: Pseudonyms) -> bool:
        """Write what is new. False where another process has written the same pseudonyms for other values."""
        new = pseudonyms.unsaved()
        if not new:
            return True
        rows = [
            PseudonymRow(
                customer=customer, pseudonym=p.pseudonym, value=self.keys.seal(customer, p.value, PURPOSE)
            ) for p in new
        ]  # fmt: skip
        try:
            with writing(self.database) as session:
                session.add_all(rows)
        except IntegrityError:
            return False
        pseudonyms.saved(new)
        return True
