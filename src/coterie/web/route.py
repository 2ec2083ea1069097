"""`coterie route` over HTTP. Its answer quotes training data, so it is for those who review."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel as Record

from coterie.answer import Answerer
from coterie.explain import explain
from coterie.web.schema import Text


class RouteRequest(Record):
    """POST /v1/route."""

    text: Text


def router(answerer: Answerer) -> APIRouter:
    """The route: whom "auto" would ask, and why."""
    routes = APIRouter()

    @routes.post("/v1/route")
    def route(body: RouteRequest, request: Request) -> dict[str, Any]:
        choice = answerer.chooser.choose(body.text, request.headers.get("x-coterie-channel", ""))
        return explain(answerer.business, choice)

    return routes
