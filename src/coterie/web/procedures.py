"""Approvals at the desk: what procedures want to do, and what a person says to it."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel as Record
from pydantic import Field

from coterie.desk.desk import Desk
from coterie.desk.message import NoConversation
from coterie.web.door import Agent, Door
from coterie.web.witness import Witness


class Decision(Record):
    """POST /desk/api/conversations/{id}/approval: of which run, and yes or no. `note` is for people at the desk."""

    run: str = Field(max_length=80)
    approve: bool
    note: str = Field("", max_length=2000)


def approvals_router(desk: Desk, door: Door, witness: Witness) -> APIRouter:
    """The routes of this file. `witness`: who writes down whose approvals were shown."""
    router = APIRouter()
    ByAgent = Annotated[Agent, Depends(door.agent)]

    @router.get("/desk/api/approvals")
    def waiting(agent: ByAgent) -> dict[str, Any]:
        found = desk.procedures.runs.waiting() if desk.procedures else []
        shown = {a["conversation"] for a in found}
        witness.listed(agent.name, "approvals", [(id, desk.conversations.get(id).customer) for id in shown])
        return {"approvals": found}

    @router.post("/desk/api/conversations/{id}/approval")
    def decide(id: str, body: Decision, agent: ByAgent) -> dict[str, Any]:
        if desk.procedures is None:
            raise NoConversation("no procedure is declared here")
        desk.procedures.decide(desk.conversations, id, agent.name, agent.role, body.run, body.approve, body.note)
        desk.wake(id)
        return {}

    return router
