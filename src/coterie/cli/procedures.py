"""`coterie desk procedures`: list and check the declared procedures, or try one in the terminal."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.options import FolderOption, Json
from coterie.cli.show import result, table, tell
from coterie.errors import CoterieError

if TYPE_CHECKING:
    from coterie.business import Business
    from coterie.desk.procedures.actions import Perform
    from coterie.desk.procedures.guide import Act, Guide, State
    from coterie.desk.procedures.spec import ActionSpec, Procedure
    from coterie.desk.procedures.values import Value


def procedures(
    name: Annotated[str, typer.Argument(help="Only this one.")] = "",
    folder: FolderOption = Path(),
    attempt: Annotated[bool, typer.Option("--try", help="Try it here: you are the customer, and the agent.")] = False,
    act: Annotated[bool, typer.Option("--act", help="While trying, do what writes, too. It is done for real.")] = False,
    customer: Annotated[str, typer.Option(help="While trying, who the customer is.")] = "ada@example.com",
    as_json: Json = False,
) -> None:
    """List the procedures and their steps, each checked; or try one."""
    from coterie.business import Business
    from coterie.desk.rights import declared

    business = Business.open(folder)
    found = declared(business)
    if name and name not in found:
        raise CoterieError(f"there is no procedure {name!r}; declared: {', '.join(found) or 'none'}")
    if attempt:
        if not name:
            raise CoterieError("say which procedure to try")
        _try(business, found[name], customer, act)
        return
    wanted = [found[name]] if name else list(found.values())
    if name:
        p = found[name]
        shown = table(["", "step", "only"], [[str(n), *_step(p, n)] for n in range(1, len(p.spec.steps) + 1)])
    else:
        rows = [[p.name, p.spec.title, str(len(p.spec.steps)), ", ".join(_writes(p))] for p in wanted]
        shown = table(["procedure", "title", "steps", "changes"], rows)
    facts = [{"name": p.name, "title": p.spec.title, "version": p.version, "writes": _writes(p),
              "steps": [_step(p, n)[0] for n in range(1, len(p.spec.steps) + 1)]} for p in wanted]  # fmt: skip
    result(facts, as_json, shown)


def _writes(p: "Procedure") -> list[str]:
    return [name for name, action in p.spec.actions.items() if action.writes]


def _step(p: "Procedure", n: int) -> list[str]:
    """What a step does, and when."""
    step = p.spec.steps[n - 1]
    action = p.spec.actions.get(step.do)
    words = [
        *([f"when {step.when}"] if step.when else []),
        *([f"only if {action.only_if}"] if action and action.only_if else []),
        *([f"the customer agrees ({action.confirm_when})"] if action and action.confirm else []),
        *([f"{action.approve} approves ({action.approve_when})"] if action and action.approve else []),
    ]  # fmt: skip
    what = next(f"{k} {v}" for k in ("ask", "check", "do", "say") if (v := getattr(step, k)))
    return [what, "; ".join(words)]


def _try(business: "Business", procedure: "Procedure", customer: str, act: bool) -> None:
    import time
    from datetime import date

    from coterie.desk.message import Message
    from coterie.desk.procedures.actions import Actions
    from coterie.desk.procedures.guide import Guide, State

    actions = Actions(business.folder, procedure.folder)
    guide = Guide(procedure, State(procedure.spec.title, 0), _acting(actions, act, procedure), date.today(),
                  {"customer.id": customer})  # fmt: skip
    lines = _lines()
    try:
        guide.go_on()
        seq = 0
        while guide.status in ("asking", "approving"):
            _say(guide)
            line = next(lines, None)
            if line is None:
                break
            if guide.status == "approving" and not guide.is_stop(line):
                guide.status = "asking"
                guide.decide("you" if line.casefold() in ("yes", "approve") else "")
            else:
                seq += 1
                guide.take([Message(seq, "customer", "message", line, time.time())])
        _say(guide)
    finally:
        actions.close()
    reason = f" ({guide.reason}: {guide.detail})" if guide.reason else ""
    tell(f"{guide.status}{reason}")


def _acting(actions: "Perform", act: bool, procedure: "Procedure") -> "Act":
    """Does what reads, and what writes where it may; else it says what would be done, and samples come back."""
    from coterie.desk.procedures.actions import FOUND
    from coterie.desk.procedures.values import SAMPLES, shown

    def do(
        name: str, action: "ActionSpec", given: "Mapping[str, Value]", state: "State"
    ) -> "Mapping[str, Value]":  # fmt: skip
        arguments = ", ".join(f"{k} = {shown(v)}" for k, v in given.items())
        if action.writes and not act:
            tell(f"would do: {name} ({arguments})")
            return {FOUND: True, **{field: SAMPLES[kind] for field, kind in action.gives.items()}}
        tell(f"doing: {name} ({arguments})")
        return actions(action, given, f"try-{procedure.name}-{name}")

    return do


def _say(guide: "Guide") -> None:
    """Print what it says, once, and its buttons."""
    if guide.says:
        print("\n\n".join(guide.says))
    guide.says.clear()
    if guide.status == "approving":
        print("[approve] [refuse]")
    elif guide.status == "asking" and guide.state.buttons:
        print(" ".join(f"[{b}]" for b in guide.state.buttons))


def _lines() -> Iterator[str]:
    """What is typed, until the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()
