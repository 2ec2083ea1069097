"""`coterie optimise-prompt`: a better prompt without touching weights."""

from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli.options import Folder, Json
from coterie.cli.show import bars, result, table, tell


def optimise_prompt(
    folder: Folder = Path(),
    expert: Annotated[str, typer.Option("--expert", "-e", help="The declared expert whose task it is.")] = ...,  # type: ignore[assignment]
    budget: Annotated[int, typer.Option(help="Calls of the model, everything included.")] = 400,
    instruction: Annotated[list[str] | None, typer.Option(help="An instruction to try; may be repeated.")] = None,
    metric: Annotated[str, typer.Option(help="exact_match, token_f1, rouge_l, numeric_match; default by task.")] = "",
    name: Annotated[str, typer.Option("--as", help="Name of the new expert; default NAME-prompt.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Fixes what is tried.")] = 0,
    as_json: Json = False,
) -> None:
    """Search instructions and examples for the base model; publish the best if it wins on unseen rows.

    Ctrl-C keeps every answer: the same command goes on from there.
    """
    from coterie.business import Business
    from coterie.optimise import Optimised, optimise
    from coterie.tuning.prompts import Tried

    standing: list[Tried] = []

    def show(tried: list[Tried]) -> None:
        standing[:] = tried
        best = tried[0]
        tell(f"round {best.rounds}: {len(tried)} candidates, best {best.mean:.1%} on {len(best.scores)} rows")

    business = Business.open(folder)
    try:
        with bars() as shown:
            found = optimise(business, expert, budget, instruction or [], metric, name, seed, tell, show,
                             lambda n: shown.count("answers", min(n, budget), budget))  # fmt: skip
    except KeyboardInterrupt:
        tell("stopped: every answer so far is kept, and the same command goes on from there")
        result(Optimised(standing, 0, 0).json(), as_json, _table(standing))
        raise typer.Exit(130) from None
    result(found.json(), as_json, _table(found.tried))
    if not as_json:
        to = found.published
        _say(found.final, f"published as {to.name}, version {to.version}" if to else "not better: nothing is published")


def _table(tried: Any) -> Any:
    rows = [[f"{t.mean:.1%}", str(len(t.scores)), t.candidate.origin, t.candidate.instruction[:90]] for t in tried]
    return table(["score", "rows", "from", "instruction"], rows)


def _say(final: dict[str, Any], end: str) -> None:
    gap = final["difference"]
    print(
        f"on {final['rows']} unseen rows, {final['metric'].replace('_', ' ')}: "
        f"declared {final['declared']['value']:.1%}, best {final['best']['value']:.1%}; "
        f"{100 * gap['value']:+.1f} points (95% CI {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}), "
        f"p = {gap['p']:.3g}; {end}"
    )
