"""Files that customers sent: given to agents as something to save, never as something to show or to run."""

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends, Response

from coterie.desk.attachment import Attachments
from coterie.web.door import Agent, Door
from coterie.web.witness import Witness


def router(files: Attachments, door: Door, witness: Witness) -> APIRouter:
    """`witness`: who writes down which agent took a file."""
    routes = APIRouter()
    ByAgent = Annotated[Agent, Depends(door.agent)]

    @routes.get("/desk/api/files/{id}")
    def download(id: str, agent: ByAgent) -> Response:
        found = files.get(id)
        witness.took_file(agent.name, found.conversation, found.customer)
        headers = {
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(found.file.name, safe='')}",
            "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'",
            "Cache-Control": "no-store",
        }  # fmt: skip
        return Response(found.file.body, media_type="application/octet-stream", headers=headers)

    return routes
