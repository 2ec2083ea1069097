"""The page of experts: what each is, how good it is beside the base model, and how it learned."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment

from coterie.business import Business
from coterie.curation import curve_chart, kept_curve
from coterie.data.curve import Forecast
from coterie.errors import CoterieError
from coterie.evaluation import charts
from coterie.evaluation.suite import loss_chart
from coterie.experts.card import percent
from coterie.experts.library import ExpertFacts

UNCOUNTED = ("rows", "too_long")


class NoCurve(CoterieError):
    """Nobody has measured the learning curve of this expert's data."""

    status = 404
    code = "not_found"


def measured(evaluation: dict[str, Any]) -> tuple[str, dict[str, dict[str, Any]]] | None:
    """What an expert was measured on, test rows before held-out ones, and the figures of base and expert."""
    for on, name in (("test", "test row(s)"), ("held_out", "held-out row(s)")):
        sides = evaluation.get(on)
        if isinstance(sides, dict) and sides.keys() == {"base", "expert"}:
            return name, sides
    return None


def main_figure(figures: dict[str, Any]) -> tuple[str, dict[str, float]] | None:
    """Name of the first figure that has an interval, and the figure."""
    return next(((k, v) for k, v in figures.items() if isinstance(v, dict) and "low" in v), None)


def router(business: Business, pages: Environment) -> APIRouter:
    """The page and its pictures."""
    routes, library = APIRouter(), business.library

    def told(facts: ExpertFacts) -> dict[str, Any]:
        evaluation = library.evaluation(facts.name)
        found, curve = measured(evaluation), kept_curve(business, facts.name)
        figures = []
        if found:
            sides = found[1]
            for name in (k for k in sides["expert"] if k not in UNCOUNTED and k in sides["base"]):
                base, expert = (percent("", sides[who][name]).strip() for who in ("base", "expert"))
                figures.append({"name": name.replace("_", " "), "base": base, "expert": expert})
        return {
            "facts": facts, "on": f"{found[1]['expert']['rows']} {found[0]}" if found else "", "figures": figures,
            "losses": (library.folder(facts.name, facts.version) / "losses.json").exists(),
            "forecasts": [str(Forecast(**{k: v for k, v in f.items() if k != "says"})) for f in curve["forecasts"]]
            if curve else [],
            "curve": curve,
        }  # fmt: skip

    @routes.get("/experts", response_class=HTMLResponse)
    def page(request: Request) -> str:
        experts = [told(facts) for facts in library.shelf()]
        return pages.get_template("experts.html").render(
            experts=experts, chart=scores_chart() is not None, person=request.state.person
        )

    def scores_chart() -> charts.Chart | None:
        groups: dict[str, dict[str, charts.Bar]] = {}
        for facts in library.shelf():
            found = measured(library.evaluation(facts.name))
            for who, figures in (found[1] if found else {}).items():
                if main := main_figure(figures):
                    value = main[1]
                    groups.setdefault(facts.name, {})[who] = charts.Bar(value["value"], value["low"], value["high"])
        return charts.bars("Before and after tuning", "share right", groups) if groups else None

    @routes.get("/experts/scores.svg")
    def scores() -> Response:
        chart = scores_chart()
        if chart is None:
            raise NoCurve("no expert has been measured yet; `coterie fit` or `coterie eval` does")
        return Response(charts.svg(chart), media_type="image/svg+xml")

    @routes.get("/experts/{name}/loss.svg")
    def loss(name: str) -> Response:
        return Response(charts.svg(loss_chart(library, name)), media_type="image/svg+xml")

    @routes.get("/experts/{name}/curve.svg")
    def curve(name: str) -> Response:
        library.facts(name)
        found = kept_curve(business, name)
        if found is None:
            raise NoCurve(f"{name}: its learning curve is not measured; `coterie data curve -e {name}` does")
        return Response(charts.svg(curve_chart(found)), media_type="image/svg+xml")

    return routes
