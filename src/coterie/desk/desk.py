"""The desk of one business at work: it answers what is owed, in threads, and lets time pass.

Notable: nothing that must not be lost lives here. An answer that was under way when the process died is still owed in
the database, and the next process, or another one at the same database, finds it and begins it anew.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Engine

from coterie.answer import Answerer
from coterie.business import Business
from coterie.config import DeskSpec
from coterie.desk import flow, handoff
from coterie.desk.cases import Cases
from coterie.desk.confidence import load_confidence
from coterie.desk.conversation import Audited, Conversations, unaudited
from coterie.desk.flow import Parts, Result, Rules
from coterie.desk.live import Live
from coterie.desk.message import Turn
from coterie.desk.procedures.procedures import Procedures
from coterie.desk.record import Seal, Unseal, from_the_clear, in_the_clear
from coterie.desk.webhook import TIMEOUT_S, Webhook, Webhooks
from coterie.engine.request import Generation
from coterie.errors import CoterieError, Stopped
from coterie.store.database import located, open_database

LOOK_S = 2.0  # between two looks for answers that nobody is at
CONFIDENCE = "desk-confidence.json"
log = logging.getLogger(__name__)


def database_of(business: Business) -> Engine:
    """The database that the business declares; a relative SQLite file lies in its folder. Raises CoterieError."""
    return open_database(located(business.config.desk.database, business.folder))


def _hooks(spec: DeskSpec) -> list[Webhook]:
    """As declared. Raises CoterieError where a secret is not in the environment."""
    for hook in spec.webhooks:
        if not os.environ.get(hook.secret_env):
            raise CoterieError(f"desk.webhooks: the environment has no {hook.secret_env}, the secret of {hook.url}")
    return [Webhook(h.url, os.environ[h.secret_env], h.kinds, h.texts) for h in spec.webhooks]


def confidence_file(business: Business) -> Path:
    return business.folder / ".coterie" / CONFIDENCE


@dataclass
class _Work:
    """An answer under way. `muted`: no longer the bot's to speak; `stopped`: the customer has read enough."""

    turn: Turn
    generation: Generation | None = None
    muted: bool = False
    stopped: bool = False
    dropped: bool = False

    def cancel(self) -> None:
        if self.generation:
            self.generation.cancel()


class Desk:
    """Conversations, and the threads that answer them. Open with `start`, end with `close`."""

    def __init__(
        self, answerer: Answerer, database: Engine, parts: Parts | None = None, seal: Seal = in_the_clear,
        unseal: Unseal = from_the_clear, clock: Callable[[], float] = time.time, procedures: Procedures | None = None,
        audited: Audited = unaudited,
    ) -> None:  # fmt: skip
        self.answerer, self.business = answerer, answerer.business
        self.spec = self.business.config.desk
        self.live = Live()
        self.procedures, runs = procedures, procedures.runs if procedures else None
        self.conversations = Conversations(database, seal, unseal, clock, self._changed, runs, audited)
        self.parts = parts or Parts()
        if procedures:
            self.parts = replace(self.parts, procedures=procedures)
        self.confidence = load_confidence(confidence_file(self.business))
        self.webhooks = Webhooks(self.conversations, _hooks(self.spec), clock)
        self._pool = ThreadPoolExecutor(self.spec.workers, thread_name_prefix="desk")
        self._lock = threading.Lock()
        self._at_work: dict[str, _Work] = {}
        self._awake = set[str]()  # conversations that a thread will look at: queued once, however often they are woken
        self._closing = threading.Event()
        self.cases: Cases | None = None  # set before `start`, where the CRM is written to
        self._tellers: dict[str, threading.Thread] = {}
        self._looker = threading.Thread(target=self._look, name="desk-look", daemon=True)

    def start(self) -> None:
        """Begin with what was left behind, then look for more."""
        self._looker.start()

    def close(self) -> None:
        """End what is being written; it is still owed, and the next start answers it."""
        self._closing.set()
        for work in self._works():
            work.dropped = True
            work.cancel()
        if self._looker.is_alive():
            self._looker.join()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for teller in self._tellers.values():
            teller.join(TIMEOUT_S + 1)
        if self.procedures:
            self.procedures.close()
        self.conversations.database.dispose()

    @property
    def working(self) -> int:
        """How many answers are being written here."""
        return len(self._at_work)

    def wake(self, id: str) -> None:
        """There may be an answer to write."""
        if self._closing.is_set():
            return
        with self._lock:
            if id in self._awake:
                return
            self._awake.add(id)
        self._pool.submit(self._work, id)

    def stop(self, id: str) -> None:
        """The customer has read enough: what was shown so far is the answer."""
        with self._lock:
            work = self._at_work.get(id)
        if work:
            work.stopped = True
            work.cancel()

    def _works(self) -> list[_Work]:
        with self._lock:
            return list(self._at_work.values())

    def _changed(self, id: str) -> None:
        """After each change: an answer that is no longer the bot's to give is not read along any more."""
        with self._lock:
            work = self._at_work.get(id)
        if work:
            now = self.conversations.get(id)
            work.muted = now.answering != work.turn.number
            if now.turn != work.turn.number:
                work.cancel()
        self.live.changed(id)

    def _look(self) -> None:
        """Every LOOK_S: pick up what is owed, keep what is ours, let time pass."""
        while True:
            try:
                for work in self._works():
                    if not self.conversations.hold(work.turn):
                        self._changed(work.turn.conversation.id)
                for id in self.conversations.owed():
                    self.wake(id)
                self.conversations.pass_time(self.spec.idle_hours * 3600)
                self._tell()
            except Exception:
                log.exception("the desk could not look at its conversations; it tries again")
            if self._closing.wait(LOOK_S):
                return

    def _tell(self) -> None:
        """Webhooks and the CRM, each in a thread of its own: a slow receiver holds nothing up."""
        tell: dict[str, Callable[[], int]] = {}
        if self.webhooks.hooks:
            tell["desk-webhooks"] = self.webhooks.deliver
        if self.cases:
            tell["desk-crm"] = self.cases.write_due
        for name, do in tell.items():
            if name not in self._tellers or not self._tellers[name].is_alive():
                self._tellers[name] = threading.Thread(target=do, name=name, daemon=True)
                self._tellers[name].start()

    def _work(self, id: str) -> None:
        """Answer what is owed in one conversation, until nothing is."""
        with self._lock:
            self._awake.discard(id)  # before it is looked at: what is said from now on wakes it again
        try:
            while not self._closing.is_set() and (turn := self.conversations.claim(id)):
                self._answer(_Work(turn))
        except Exception:
            log.exception("conversation %s: the answer could not be recorded; it is still owed", id)

    def _answer(self, work: _Work) -> None:
        turn, id = work.turn, work.turn.conversation.id
        with self._lock:
            self._at_work[id] = work

        def begun(generation: Generation) -> None:
            work.generation = generation
            if work.stopped or work.dropped:
                work.cancel()

        def show(text: str) -> None:
            if not work.muted:
                self.live.write(id, text)

        try:
            try:
                rules = Rules(self.spec, self.confidence, frozenset(self.conversations.disliked(id)))
                result = flow.answer(self.answerer, turn, rules, self.parts, show, begun)
            except Stopped:  # the procedure has ended, or another process is at it
                work.dropped, result = True, Result()
            except Exception:
                log.exception("conversation %s: a fault of ours; a person takes over", id)
                result = Result(handoff=handoff.brief("assistant_failed", turn.messages))
            if work.dropped:
                self.conversations.let_go(turn)
            else:
                self.conversations.finish(turn, result.text, result.data, result.handoff, result.keep)
        finally:
            with self._lock:
                if self._at_work.get(id) is work:
                    del self._at_work[id]
            self.live.written(id)
