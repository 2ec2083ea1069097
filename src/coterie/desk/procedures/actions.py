"""Doing what a procedure declares: by HTTP, in a SQL database, or with a Python function.

Notable: what failed is told apart from what may have happened. `ActionFailed` says for certain that nothing was
changed; whatever else goes wrong once something was sent (a timeout, a broken line, an answer that is no answer) is
`OutcomeUnknown`, and a person looks.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooSlow
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from coterie.desk.procedures.conditions import PLACE
from coterie.desk.procedures.functions import KEY, load_function
from coterie.desk.procedures.spec import ActionSpec
from coterie.desk.procedures.values import NotOne, Value, shown, typed
from coterie.errors import CoterieError, first_line
from coterie.store.database import located

LONGEST = 1_000_000  # bytes of an answer
FOUND = "found"


class ActionFailed(CoterieError):
    """It was not done: nothing has changed."""

    status = 502
    code = "action_failed"


class OutcomeUnknown(CoterieError):
    """It may have been done, or not: a person must look."""

    status = 502
    code = "action_unknown"


class Perform(Protocol):
    """Does an action. Gives its typed results, `found` among them. Raises ActionFailed, OutcomeUnknown."""

    def __call__(self, action: ActionSpec, arguments: Mapping[str, Value], key: str) -> dict[str, Value]: ...

    def close(self) -> None: ...


class Actions:
    """Does the actions of procedures whose files lie in `folder`; relative databases lie in `business`."""

    def __init__(self, business: Path, folder: Path, transport: httpx.BaseTransport | None = None) -> None:
        self.business, self.folder = business, folder
        self._http = httpx.Client(transport=transport, follow_redirects=False)
        self._engines: dict[str, Engine] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        self._http.close()
        for engine in self._engines.values():
            engine.dispose()

    def __call__(self, action: ActionSpec, arguments: Mapping[str, Value], key: str) -> dict[str, Value]:
        """As `Perform`."""
        do = {"http": self._call, "sql": self._run, "python": self._python}[action.kind]
        try:
            given = _in_time(lambda: do(action, arguments, key), action.timeout_s)
        except (ActionFailed, OutcomeUnknown):
            raise
        except TooSlow as error:
            raise _lost(action, f"no answer within {action.timeout_s:g} s") from error
        except Exception as error:  # a function of theirs may raise anything
            raise _lost(action, f"{type(error).__name__}: {first_line(error)}") from error
        if given is None:
            return {FOUND: False, **dict.fromkeys(action.gives)}
        try:
            return {FOUND: True, **{name: typed(kind, given.get(name)) for name, kind in action.gives.items()}}
        except NotOne as error:
            raise _lost(action, f"what came back cannot be used: {error}") from error

    def _call(self, action: ActionSpec, arguments: Mapping[str, Value], key: str) -> Mapping[str, Any] | None:
        """HTTP: arguments in the path are quoted, the others are the query of a GET or the JSON of the rest."""
        headers = {"Accept": "application/json"} | ({"Idempotency-Key": key} if action.writes else {})
        if action.token_env:
            headers["Authorization"] = f"Bearer {_secret(action.token_env)}"
        in_path = set(PLACE.findall(action.url))
        url = PLACE.sub(lambda m: quote(shown(arguments[m[1]]), safe=""), action.url)
        others = {k: _json(v) for k, v in arguments.items() if k not in in_path}
        body: dict[str, Any] = {"params": others} if action.method == "GET" else {"json": others}
        try:
            with self._http.stream(action.method, url, headers=headers, timeout=action.timeout_s, **body) as answer:
                content = b""
                for piece in answer.iter_bytes():
                    content += piece
                    if len(content) > LONGEST:
                        raise _lost(action, "the answer is too long")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ActionFailed(f"no connection ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            raise _lost(action, f"the connection broke ({type(error).__name__})") from error
        if answer.status_code == 404 and not action.writes:
            return None
        if 400 <= answer.status_code < 500 and answer.status_code not in (408, 409, 429):
            raise ActionFailed(f"it was refused ({answer.status_code})")
        if not 200 <= answer.status_code < 300:
            raise _lost(action, f"it answered {answer.status_code}")
        if not action.gives and not content:
            return {}
        try:
            found = httpx.Response(200, content=content).json()
        except ValueError as error:
            raise _lost(action, "the answer is no JSON") from error
        if not isinstance(found, dict):
            raise _lost(action, "the answer is no JSON object")
        return found

    def _run(self, action: ActionSpec, arguments: Mapping[str, Value], key: str) -> Mapping[str, Any] | None:
        """SQL: parameters are bound, never pasted. What reads is rolled back, whatever it did."""
        engine = self._engine(action.url or _secret(action.url_env))
        plain = _bound if engine.dialect.name == "sqlite" else (lambda v: v)
        given = {name: plain(value) for name, value in arguments.items()} | {KEY: key}
        try:
            with engine.connect() as connection:
                if not action.writes and engine.dialect.name == "postgresql":
                    connection.execute(text("SET TRANSACTION READ ONLY"))
                if engine.dialect.name == "sqlite":
                    connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if action.writes else 'ON'}")
                result = connection.execute(text(action.statement), given)
                row = result.mappings().first() if result.returns_rows else None
                found = dict(row) if row else ({} if action.writes and result.rowcount else None)
                if action.writes:
                    if found is None:
                        raise ActionFailed("no row was changed")
                    try:
                        connection.commit()
                    except SQLAlchemyError as error:
                        raise OutcomeUnknown(f"the database may have kept it or not ({first_line(error)})") from error
                return found
        except SQLAlchemyError as error:  # before the commit: the database has undone it
            raise ActionFailed(f"the database refused it ({first_line(error)})") from error

    def _python(self, action: ActionSpec, arguments: Mapping[str, Value], key: str) -> Mapping[str, Any] | None:
        function = load_function(self.folder, action.function)
        wants_key = KEY in _parameters(function)
        try:
            found = function(**arguments, **({KEY: key} if wants_key else {}))
        except ValidationError as error:
            raise ActionFailed(f"{action.function}: {first_line(error)}") from error
        if isinstance(found, BaseModel):
            return found.model_dump()
        if dataclasses.is_dataclass(found) and not isinstance(found, type):
            return dataclasses.asdict(found)
        if found is None or isinstance(found, Mapping):
            return {} if found is None and action.writes else found
        raise _lost(action, f"{action.function} gave no mapping, dataclass or pydantic model")

    def _engine(self, url: str) -> Engine:
        with self._lock:
            if url not in self._engines:
                try:
                    self._engines[url] = create_engine(located(url, self.business), pool_pre_ping=True)
                except Exception as error:
                    raise ActionFailed(f"its database cannot be used ({first_line(error)})") from error
            return self._engines[url]


def _lost(action: ActionSpec, why: str) -> CoterieError:
    """What went wrong after something was sent: unknown where it writes, a plain failure where it reads."""
    return OutcomeUnknown(why) if action.writes else ActionFailed(why)


def _secret(name: str) -> str:
    found = os.environ.get(name, "")
    if not found:
        raise ActionFailed(f"the environment has no {name}")
    return found


def _in_time(do: Callable[[], Any], seconds: float) -> Any:
    """Do it in a thread, which is left behind where it takes too long."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(do())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="procedure-action", daemon=True).start()
    return future.result(seconds)


def _parameters(function: Callable[..., Any]) -> Any:
    import inspect

    return inspect.signature(function).parameters


def _json(value: Value) -> Any:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value.isoformat() if isinstance(value, date) else value


def _bound(value: Value) -> Any:
    """SQLite knows neither decimals nor dates."""
    return _json(value)
