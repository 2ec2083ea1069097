"""Python functions that a business brings for its procedures, typed by their own annotations."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pydantic import PydanticSchemaGenerationError, PydanticUserError, validate_call

from coterie.errors import CoterieError, first_line

KEY = "key"  # a parameter of this name gets the action's own key


def load_function(folder: Path, name: str) -> Callable[..., Any]:
    """`module:function`, of a file module.py in `folder` or of an installed package; its arguments are checked by
    pydantic when it is called. Raises CoterieError."""
    module_name, _, function_name = name.partition(":")
    file = folder / (module_name.replace(".", "/") + ".py")
    try:
        module = _of_file(file) if file.exists() else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise CoterieError(f"{file} is not there, and {first_line(error)}") from error
    except Exception as error:  # it is code of theirs: anything may happen
        raise CoterieError(f"{module_name} cannot be imported ({type(error).__name__}: {first_line(error)})") from error
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        raise CoterieError(f"{module_name} has no function {function_name!r}")
    try:
        return validate_call(function)
    except (PydanticSchemaGenerationError, PydanticUserError, NameError) as error:
        raise CoterieError(f"{name}: an annotation cannot be used ({first_line(error)})") from error


def _of_file(file: Path) -> Any:
    """A file's module, run anew each time under a name of its own: two businesses may have files of one name."""
    spec = importlib.util.spec_from_file_location(f"coterie_procedures_{abs(hash(str(file.resolve())))}", file)
    assert spec is not None
    assert spec.loader is not None, "a file *.py has both"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # annotations that are texts are looked up there
    spec.loader.exec_module(module)
    return module


def check_signature(function: Callable[..., Any], arguments: Collection[str]) -> None:
    """That it takes these arguments, and needs no others. Raises CoterieError."""
    found = {n: p for n, p in inspect.signature(function).parameters.items() if n != KEY}
    for name, parameter in found.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise CoterieError(f"parameter {name!r} must have a name of its own")
        if parameter.annotation is parameter.empty:
            raise CoterieError(f"parameter {name!r} has no type; write it as {name}: Decimal")
        if parameter.default is parameter.empty and name not in arguments:
            raise CoterieError(f"parameter {name!r} is given by no argument; declare it under `arguments`")
    if more := set(arguments) - found.keys():
        raise CoterieError(f"it has no parameter {min(more)!r}")
