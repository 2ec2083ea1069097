"""`coterie route` and `coterie experts learn-route` over HTTP."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel as Record
from pydantic import Field

from coterie.answer import Answerer
from coterie.business import learn_route
from coterie.explain import explain
from coterie.web.schema import Text

INPUTS = 10_000  # in one request; the router reads 2,000 of them


class Question(Record):
    """POST /v1/route."""

    text: Text


class Inputs(Record):
    """PUT /v1/route/{name}."""

    inputs: Annotated[list[Text], Field(min_length=1, max_length=INPUTS)]


def router(answerer: Answerer, learned: Callable[[str, str, int], None]) -> APIRouter:
    """The routes: whom "auto" would ask, and why, which quotes training data; and what to know an expert by.

    learned: told who taught the router which expert by how many inputs.
    """
    routes = APIRouter()

    @routes.post("/v1/route")
    def route(body: Question, request: Request) -> dict[str, Any]:
        choice = answerer.chooser.choose(body.text, request.headers.get("x-coterie-channel", ""))
        return explain(answerer.business, choice)

    @routes.put("/v1/route/{name}")
    def learn(name: str, body: Inputs, request: Request) -> dict[str, Any]:
        found = [(f"request:{number}", text) for number, text in enumerate(body.inputs, 1)]
        version = learn_route(answerer.business, name, found)
        learned(request.state.person.name, name, len(found))
        return {"expert": name, "version": version, "inputs": len(found)}

    return routes
