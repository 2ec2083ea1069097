"""News of conversations for the pages that are open: what changed, and an answer while it is being written.

Notable: this is only a nudge within one process. What counts is in the database, and a page that missed a nudge, or
hangs on another process, finds it there by the numbers of the messages.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EVERY = "*"  # subscribes to all conversations


class Live:
    """Who is to be told of which conversation, and answers so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Queue[dict[str, Any]]]]] = {}
        self._written: dict[str, str] = {}

    @contextmanager
    def subscribed(self, id: str) -> Iterator[asyncio.Queue[dict[str, Any]]]:
        """A queue of news of this conversation, or of `EVERY` one; of the running event loop."""
        entry = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()
        with self._lock:
            self._queues.setdefault(id, set()).add(entry)
            written = self._written.get(id)
        if written:
            entry[1].put_nowait({"event": "writing", "text": written})
        try:
            yield entry[1]
        finally:
            with self._lock:
                self._queues[id].discard(entry)
                if not self._queues[id]:
                    del self._queues[id]

    def changed(self, id: str) -> None:
        """The database has something new."""
        self._tell(id, {"event": "changed", "id": id})

    def write(self, id: str, text: str) -> None:
        """More of the answer that is being written may be read."""
        with self._lock:
            self._written[id] = self._written.get(id, "") + text
        self._tell(id, {"event": "piece", "text": text})

    def written(self, id: str) -> None:
        """The answer has ended; what became of it is in the database."""
        with self._lock:
            self._written.pop(id, None)
        self._tell(id, {"event": "ended"})

    def _tell(self, id: str, news: dict[str, Any]) -> None:
        with self._lock:
            told = [*self._queues.get(id, ()), *(self._queues.get(EVERY, ()) if news["event"] == "changed" else ())]
        for loop, queue in told:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, news)
            except RuntimeError:  # its event loop has closed: the page is gone
                continue
