"""A procedure as its file declares it: what is asked, what is checked, what is done, what is said.

Notable: steps run from the first to the last, each at most once, so every procedure ends. All that can be wrong with a
file is found when it is read: names that nothing gives, conditions that compare unlike things, a host that is not on
the list, a statement that writes where it must not. The error names file, field and mend.
"""

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import sqlglot
from pydantic import Field, ValidationError, model_validator
from sqlglot import exp
from sqlglot.errors import SqlglotError

from coterie.config import FILE, described
from coterie.declared import Strict
from coterie.desk.procedures.conditions import expression, places
from coterie.desk.procedures.functions import check_signature, load_function
from coterie.desk.procedures.values import SAMPLES, Kind, Value
from coterie.errors import CoterieError

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
ALWAYS: dict[str, Kind] = {"customer.id": "text", "today": "date"}
Name = Annotated[str, Field(pattern=NAME.pattern)]


class SlotSpec(Strict):
    """[slots.NAME]: one thing that the customer is asked for."""

    kind: Kind = Field("text", description="what is taken as an answer; code reads it, never a model")
    ask: str = Field(min_length=1, max_length=1000, description="the question")
    invalid: str = Field("", description="said where the answer is none; default: what the kind wants")
    pattern: str = Field("", max_length=200, description="text, order_number: a regular expression of the whole value")
    choices: list[str] = Field([], max_length=12, description="choice: what there is to choose from, as buttons")
    least: float | None = Field(None, description="number, money: no less")
    most: float | None = Field(None, description="number, money: no more")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.kind == "choice") != bool(self.choices):
            raise ValueError("`choices` are needed with kind = 'choice', and only there")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"`pattern` is no regular expression ({error})") from error
        return self


class ActionSpec(Strict):
    """[actions.NAME]: something that is looked up or done, as a typed function."""

    kind: Literal["http", "sql", "python"] = Field(description="how it is done")
    title: str = Field("", max_length=120, description="what it does, for people; default: its name")
    arguments: dict[Name, str] = Field({}, description="name = expression over the procedure's values")
    gives: dict[Name, Kind] = Field({}, description="what comes back, and of which kind; read as ACTION.NAME")
    writes: bool = Field(False, description="it changes something: done once, never tried again by itself")
    timeout_s: float = Field(5.0, gt=0, le=60, description="seconds after which it has failed")
    only_if: str = Field("", description="an expression that must hold when it is done, whatever the steps say")
    confirm: str = Field("", max_length=1000, description="asked before it is done; the customer must agree")
    confirm_when: str = Field("true", description="an expression: when the customer must agree")
    approve: Literal["", "agent", "supervisor"] = Field("", description="who at the desk must approve it first")
    approve_when: str = Field("true", description="an expression: when they must")
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = Field("GET", description="http: the method")
    url: str = Field("", description="http: the address, with {arguments} after the host; sql: the database")
    url_env: str = Field("", description="sql: the environment variable that holds the database's address")
    token_env: str = Field("", description="http: the environment variable of a bearer token")
    statement: str = Field("", description="sql: one statement with :arguments; :key is the action's own key")
    function: str = Field("", description="python: module:function, beside the procedure's file or installed")


class StepSpec(Strict):
    """[[steps]]: one of `ask`, `check`, `do`, `say`."""

    ask: str = Field("", description="a slot to be filled")
    check: str = Field("", description="an expression that must hold for the procedure to go on")
    do: str = Field("", description="an action")
    say: str = Field("", max_length=2000, description="a text with {values}")
    when: str = Field("", description="an expression: the step is left out where it does not hold")
    otherwise: str = Field("", max_length=2000, description="check: said where it does not hold; the procedure ends")
    hand_over: str = Field("", max_length=80, description="check: the reason with which a person is called instead")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(map(bool, (self.ask, self.check, self.do, self.say))) != 1:
            raise ValueError("exactly one of `ask`, `check`, `do` and `say` is needed")
        if bool(self.check) != (bool(self.otherwise) != bool(self.hand_over)):
            raise ValueError("a check needs `otherwise` or `hand_over`, one of them; no other step has either")
        return self


class TextsSpec(Strict):
    """[texts]: what the procedure says of itself, in the customers' language."""

    agree: str = Field("Yes, do it", min_length=1, description="the button that agrees")
    decline: str = Field("No", min_length=1, description="and the one that does not")
    stop: str = Field("Stop this", min_length=1, description="the button that ends the procedure, at any time")
    yes: str = Field("Yes", min_length=1, description="the answer yes of kind yes_no")
    no: str = Field("No", min_length=1, description="and no")
    declined: str = Field("All right. Nothing was done.", description="after the customer did not agree")
    stopped: str = Field("All right, I have stopped. Nothing more will be done.", description="after a stop")
    waiting: str = Field("A colleague looks at this first. You will hear here.", description="before an approval")
    refused: str = Field("A colleague looked at this and could not approve it.", description="after a refusal")
    again: str = Field("Please answer with one of the buttons.", description="where an agreement is unclear")
    handed: str = Field("I have called a person, who takes it from here.", description="when something went wrong")


class ProcedureSpec(Strict):
    """A whole file procedures/NAME.toml."""

    title: str = Field(min_length=1, max_length=60, description="on the button that begins it, and at the desk")
    about: str = Field("", description="what it is for, for people at the desk")
    offer: bool = Field(True, description="a button in the widget, before anything was written")
    triggers: list[str] = Field([], description="sentences of customers who want it; what is near them begins it")
    near: float = Field(0.65, gt=0, lt=1, description="how near (cosine) to one of them")
    topics: list[str] = Field([], description="experts, or labels of experts, that begin it")
    tries: int = Field(3, ge=1, le=10, description="unusable answers to one question before a person is called")
    slots: dict[Name, SlotSpec] = Field({}, description="what is asked for")
    actions: dict[Name, ActionSpec] = Field({}, description="what is done")
    steps: list[StepSpec] = Field(min_length=1, max_length=60, description="in their order")
    texts: TextsSpec = TextsSpec()


@dataclass(frozen=True)
class Procedure:
    """One that was checked. `version` changes with its file; `kinds` are those of all its values."""

    name: str
    spec: ProcedureSpec
    version: str
    kinds: Mapping[str, Kind]
    folder: Path


def read_procedures(folder: Path, hosts: Collection[str] = (), fields: Collection[str] = ()) -> dict[str, Procedure]:
    """All files *.toml in a folder, by name; none where there is no folder. Raises CoterieError for the first that
    cannot be used.

    hosts: that actions may call. fields: of the customer's record, by the names that `[desk.crm] fields` gives them.
    """
    return {f.stem: read_procedure(f, hosts, fields) for f in sorted(folder.glob("*.toml"))} if folder.is_dir() else {}


def read_procedure(file: Path, hosts: Collection[str] = (), fields: Collection[str] = ()) -> Procedure:
    """One file. Raises CoterieError naming file, field and mend."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        spec = ProcedureSpec.model_validate(tomllib.loads(text))
    except OSError as error:
        raise CoterieError(f"{file}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise CoterieError(f"{file}: {described(error)} (see docs/procedures.md)") from error
    except (ValueError, RecursionError) as error:
        raise CoterieError(f"{file}: not valid TOML: {error}") from error
    if not NAME.fullmatch(file.stem):
        raise CoterieError(f"{file}: name the file with small letters, digits and _ only, such as refund.toml")
    try:
        kinds = _Checker(spec, file.parent, frozenset(h.casefold() for h in hosts), fields).check()
    except _Wrong as error:
        raise CoterieError(f"{file}: {error} (see docs/procedures.md)") from error
    digest = blake2b(text.encode(), digest_size=8).hexdigest()
    return Procedure(file.stem, spec, digest, kinds, file.parent)


class _Wrong(Exception):
    """A field, and what is wrong with it."""


class _Checker:
    """Walks the steps in their order, and knows at each which values there may be."""

    def __init__(self, spec: ProcedureSpec, folder: Path, hosts: frozenset[str], fields: Collection[str]) -> None:
        self.spec, self.folder, self.hosts = spec, folder, hosts
        self.known: dict[str, Kind] = {**ALWAYS, **{f"customer.{f}": "text" for f in fields}}

    def check(self) -> dict[str, Kind]:
        if both := self.spec.slots.keys() & self.spec.actions.keys():
            raise _Wrong(f"actions.{min(both)}: there is a slot of that name; give it another")
        if taken := {"customer", "today", "true", "false"} & (self.spec.slots.keys() | self.spec.actions.keys()):
            raise _Wrong(f"{min(taken)}: this name is taken; give it another")
        for name, action in self.spec.actions.items():
            self._action(f"actions.{name}", action)
        done: set[str] = set()
        for n, step in enumerate(self.spec.steps):
            at = f"steps[{n + 1}]"
            if step.when:
                self._condition(f"{at}.when", step.when)
            if step.ask:
                self._ask(at, step.ask, done)
            elif step.check:
                self._condition(f"{at}.check", step.check)
                self._text(f"{at}.otherwise", step.otherwise)
            elif step.do:
                self._do(at, step.do, done)
            else:
                self._text(f"{at}.say", step.say)
        for name in (self.spec.slots.keys() | self.spec.actions.keys()) - done:
            raise _Wrong(f"{name}: no step asks for it or does it; add a step, or take it out")
        return self.known

    def _ask(self, at: str, name: str, done: set[str]) -> None:
        if name not in self.spec.slots:
            raise _Wrong(f"{at}.ask: there is no slot {name!r}; declare [slots.{name}]")
        if name in done:
            raise _Wrong(f"{at}.ask: {name!r} was asked for before; each step is taken once")
        self._text(f"slots.{name}.ask", self.spec.slots[name].ask)
        done.add(name)
        self.known[name] = self.spec.slots[name].kind

    def _do(self, at: str, name: str, done: set[str]) -> None:
        action = self.spec.actions.get(name)
        if action is None:
            raise _Wrong(f"{at}.do: there is no action {name!r}; declare [actions.{name}]")
        if name in done:
            raise _Wrong(f"{at}.do: {name!r} was done before; each action is done once")
        where = f"actions.{name}"
        for argument, source in action.arguments.items():
            found = self._expression(f"{where}.arguments.{argument}", source)
            if not isinstance(found, str | bool | Decimal | date):
                raise _Wrong(f"{where}.arguments.{argument}: must be one text, number, date or yes and no")
        for field in ("only_if", "confirm_when", "approve_when"):
            if source := getattr(action, field):
                self._condition(f"{where}.{field}", source)
        self._text(f"{where}.confirm", action.confirm)
        done.add(name)
        self.known |= {f"{name}.{field}": kind for field, kind in action.gives.items()} | {f"{name}.found": "yes_no"}

    def _expression(self, field: str, source: str) -> Any:
        """Its value over samples, so that a text compared with a number is found now. Raises _Wrong."""
        try:
            found = expression(source)
            if unknown := next((n for n in sorted(found.names) if n not in self.known), ""):
                known = ", ".join(sorted(self.known))
                raise _Wrong(f"{field}: nothing before it gives {unknown}; known here: {known}")
            samples: dict[str, Value] = {name: SAMPLES[kind] for name, kind in self.known.items()}
            return found.value(samples, SAMPLES["date"])  # type: ignore[arg-type]
        except CoterieError as error:
            raise _Wrong(f"{field}: {error}") from error

    def _condition(self, field: str, source: str) -> None:
        found = self._expression(field, source)
        if not isinstance(found, bool):
            raise _Wrong(f"{field}: `{source}` is neither true nor false; compare it with something")

    def _text(self, field: str, text: str) -> None:
        for name in sorted(places(text)):
            if name not in self.known:
                raise _Wrong(
                    f"{field}: nothing before it gives {{{name}}}; known here: {', '.join(sorted(self.known))}"
                )

    def _action(self, at: str, action: ActionSpec) -> None:
        if "found" in action.gives:
            raise _Wrong(f"{at}.gives: `found` is given by every action; take it out")
        if not action.confirm and action.confirm_when != "true":
            raise _Wrong(f"{at}.confirm: the question is needed where there is `confirm_when`")
        if not action.approve and action.approve_when != "true":
            raise _Wrong(f"{at}.approve: say who approves, 'agent' or 'supervisor', where there is `approve_when`")
        {"http": self._http, "sql": self._sql, "python": self._python}[action.kind](at, action)

    def _http(self, at: str, action: ActionSpec) -> None:
        parts = urlsplit(action.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "{" in parts.netloc or "@" in parts.netloc:
            raise _Wrong(f"{at}.url: must be https://HOST/PATH, with no {{argument}} in the host, not {action.url!r}")
        if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise _Wrong(f"{at}.url: must be https, as other people's data goes there")
        if parts.netloc.casefold() not in self.hosts and parts.hostname not in self.hosts:
            raise _Wrong(f"{at}.url: {parts.netloc} is not on the list; add it to [desk] hosts in {FILE}")
        if unknown := places(action.url) - action.arguments.keys():
            raise _Wrong(f"{at}.url: {{{min(unknown)}}} is no argument; declare it under {at}.arguments")
        if action.method != "GET" and not action.writes:
            raise _Wrong(f"{at}.writes: must be true with {action.method}, as it changes something")

    def _sql(self, at: str, action: ActionSpec) -> None:
        if bool(action.url) == bool(action.url_env):
            raise _Wrong(f"{at}.url: give the database's address, or `url_env`, one of them")
        url = action.url or "sqlite://"
        dialect = "postgres" if url.startswith("postgresql") or action.url_env else "sqlite"
        try:
            trees = sqlglot.parse(action.statement, dialect=dialect)
        except SqlglotError as error:
            raise _Wrong(f"{at}.statement: cannot be read as SQL ({str(error).splitlines()[0]})") from error
        if len(trees) != 1 or trees[0] is None:
            raise _Wrong(f"{at}.statement: must be exactly one statement")
        inside = trees[0].find_all(exp.Insert, exp.Update, exp.Delete, exp.Merge, exp.Command, exp.DDL, exp.Drop)
        reads = isinstance(trees[0], exp.Select | exp.Union) and not any(True for _ in inside)
        if not reads and not action.writes:
            raise _Wrong(f"{at}.writes: must be true for a statement that is no SELECT")
        used = {p.name for p in trees[0].find_all(exp.Placeholder)} | set(re.findall(r":(\w+)", action.statement))
        if unknown := used - action.arguments.keys() - {"key"}:
            raise _Wrong(f"{at}.statement: :{min(unknown)} is no argument; declare it under {at}.arguments")

    def _python(self, at: str, action: ActionSpec) -> None:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", action.function):
            raise _Wrong(f"{at}.function: must be module:function, not {action.function!r}")
        try:
            check_signature(load_function(self.folder, action.function), action.arguments)
        except CoterieError as error:
            raise _Wrong(f"{at}.function: {error}") from error
