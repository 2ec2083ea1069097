"""A job that runs by itself, once at a time whoever serves: when it is due, and who is at it.

Notable: a job is taken by writing one's name over the row in one transaction, for so long as the lease says. What the
job does in a transaction of its own, it does only while the row still has its name (`hold`), so that a worker that was
thought dead and comes back finds its work refused. When it was last run is in the database: a restart repeats nothing,
and a night without a server is caught up with.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine, Float, Integer, String, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, Session, mapped_column

from coterie.errors import Stopped
from coterie.store.base import Base
from coterie.store.database import reading, writing

LEASE_S = 600.0  # a worker that says nothing for so long is taken for dead


class JobRow(Base):
    """One job by its name. `worker`, `until`: who is at it and for how long; "": nobody."""

    __tablename__ = "jobs"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    next_at: Mapped[float] = mapped_column(Float)
    worker: Mapped[str] = mapped_column(String(40))
    until: Mapped[float] = mapped_column(Float)
    failed: Mapped[int] = mapped_column(Integer)  # times in a row
    error: Mapped[str] = mapped_column(String(300))


@dataclass(frozen=True)
class Job:
    """A run of a job that is ours alone until it ends, or the lease does."""

    database: Engine
    clock: Callable[[], float]
    name: str
    worker: str

    def hold(self, session: Session) -> None:
        """Keep the lease, in a transaction that does the job's work. Raises Stopped where it is somebody else's."""
        row = _row(session, self.name)
        if row is None or row.worker != self.worker:
            raise Stopped(f"the job {self.name} has gone over to another worker")
        row.until = self.clock() + LEASE_S

    def end(self, again_at: float, error: str = "") -> None:
        """It is done until then; or it failed, and is tried again then."""
        with writing(self.database) as session:
            row = _row(session, self.name)
            if row is not None and row.worker == self.worker:
                row.next_at, row.worker, row.until = again_at, "", 0.0
                row.failed, row.error = (row.failed + 1 if error else 0), error[:300]


def take(database: Engine, name: str, clock: Callable[[], float]) -> Job | None:
    """The job, if it is due and nobody is at it; one that has never run is due."""
    with reading(database) as session:  # most looks end here, and write nothing
        row = session.get(JobRow, name)
        if row is not None and not _free(row, clock()):
            return None
    worker, now = uuid.uuid4().hex, clock()
    try:
        with writing(database) as session:
            row = _row(session, name)
            if row is None:
                row = JobRow(name=name, next_at=0.0, worker="", until=0.0, failed=0, error="")
                session.add(row)
            if not _free(row, now):
                return None
            row.worker, row.until = worker, now + LEASE_S
    except IntegrityError:  # another one has just made the row
        return None
    return Job(database, clock, name, worker)


def failures(database: Engine, name: str) -> int:
    """How often in a row it has failed."""
    with reading(database) as session:
        row = session.get(JobRow, name)
        return row.failed if row else 0


def _free(row: JobRow, now: float) -> bool:
    return row.next_at <= now and (not row.worker or row.until < now)


def _row(session: Session, name: str) -> JobRow | None:
    return session.scalars(select(JobRow).where(JobRow.name == name).with_for_update()).first()
