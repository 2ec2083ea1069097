"""Server-sent events: how they are written, and how long a silence lasts."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from coterie.errors import Busy

SILENCE_S = 10.0  # after which a page is told that the line is open, and the database is looked at


def event(kind: str, data: Any) -> str:
    """One event. JSON has no raw line breaks, so its data is one line."""
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def next_news(news: asyncio.Queue[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that has come, at least one piece of it; nothing after a silence."""
    try:
        async with asyncio.timeout(SILENCE_S):
            came = [await news.get()]
    except TimeoutError:
        return []
    while not news.empty():
        came.append(news.get_nowait())
    return came


class Streams:
    """Responses of events, at most `most` at once for each name: a page has one open, and many pages have some."""

    def __init__(self, most: int) -> None:
        self.most, self._open, self._lock = most, Counter[str](), threading.Lock()

    def stream(self, who: str, events: AsyncIterator[str]) -> StreamingResponse:
        """Raises Busy."""
        with self._lock:
            if self._open[who] >= self.most:
                raise Busy(f"too many pages at once: at most {self.most} follow what happens")
            self._open[who] += 1
        return _Counted(events, lambda: self._closed(who))

    def _closed(self, who: str) -> None:
        with self._lock:
            self._open[who] -= 1
            if not self._open[who]:
                del self._open[who]


class _Counted(StreamingResponse):
    """Proxies must not hold its events back. However it ends, `ended` is called."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()
