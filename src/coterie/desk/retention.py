"""Retention as a job: what is older than its rule allows is deleted by whoever serves, once, day after day."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Engine

from coterie.config import RetentionSpec
from coterie.errors import Stopped
from coterie.privacy.audit import Audit
from coterie.privacy.rights import Room, check_rules, keep_only
from coterie.store.job import failures, take

JOB = "retention"
LOOK_S = 60.0  # between two looks whether it is due
FIRST_AGAIN_S, LONGEST_AGAIN_S = 60.0, 3600.0  # after a failure; then twice as long, and so on
log = logging.getLogger(__name__)


def run_due(
    database: Engine, spec: RetentionSpec, rooms: Sequence[Room], audit: Audit, clock: Callable[[], float] = time.time
) -> dict[str, int] | None:
    """Delete what is due, if it is time and nobody else is at it: how much, by room. None: it was not our turn."""
    job = take(database, JOB, clock) if spec.days else None
    if job is None:
        return None
    try:
        done = keep_only(rooms, spec.days, audit, clock(), hold=job.hold)
    except Stopped as error:
        log.warning("retention: %s", error)
        return None
    except Exception as error:
        rest = min(FIRST_AGAIN_S * 2.0 ** failures(database, JOB), LONGEST_AGAIN_S)
        job.end(clock() + rest, f"{type(error).__name__}: {error}")
        raise
    job.end(clock() + spec.every_hours * 3600)
    return done


class RetentionTask:
    """In a thread of its own, until `close`. Raises CoterieError for a rule that fits no room."""

    def __init__(
        self, database: Engine, spec: RetentionSpec, rooms: Sequence[Room], audit: Audit, look_s: float = LOOK_S
    ) -> None:
        check_rules(rooms, spec.days)
        self._database, self._spec, self._rooms, self._audit = database, spec, rooms, audit
        self._look_s, self._over = look_s, threading.Event()
        self._thread = threading.Thread(target=self._again_and_again, name="retention", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Lets a run that is under way end, for a while; what it has not deleted is deleted by the next."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _again_and_again(self) -> None:
        while True:
            try:
                run_due(self._database, self._spec, self._rooms, self._audit)
            except Exception:
                log.exception("retention failed; it is tried again")
            if self._over.wait(self._look_s):
                return
