"""Server-sent events: how they are written, and how long a silence lasts."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

SILENCE_S = 10.0  # after which a page is told that the line is open, and the database is looked at


def event(kind: str, data: Any) -> str:
    """One event. JSON has no raw line breaks, so its data is one line."""
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def next_news(news: asyncio.Queue[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that has come, at least one piece of it; nothing after a silence."""
    try:
        came = [await asyncio.wait_for(news.get(), SILENCE_S)]
    except TimeoutError:
        return []
    while not news.empty():
        came.append(news.get_nowait())
    return came


def stream(events: AsyncIterator[str]) -> StreamingResponse:
    """A response of events; proxies must not hold them back."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
