"""Conditions and texts of a procedure: a small expression language over its values, decided by code.

    find.status == "delivered" and days_since(find.delivered) <= 30

Comparisons, `and`, `or`, `not`, `in` a list, + - * /, brackets, literals, the procedure's values by name, and a few
functions; nothing else can be written, and none of it can loop. simpleeval evaluates; what it is given was checked node
by node when the file was read, names are looked up in one flat table, and attributes of objects are never touched.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from simpleeval import SimpleEval

from coterie.desk.procedures.values import Value, shown
from coterie.errors import CoterieError

LONGEST, DEEPEST = 500, 20  # characters of an expression, and brackets in one another
NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.Eq, ast.NotEq, ast.Lt,
    ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Name, ast.Load,
    ast.Attribute, ast.Constant, ast.Call, ast.List, ast.Tuple,
)  # fmt: skip
FUNCTIONS = ("days_since", "lower", "known")
TRUTH = {"true": True, "false": False}
NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)?")
PLACE = re.compile(r"\{([^{}]*)\}")


class BadExpression(CoterieError):
    """An expression that cannot be used; says what is wrong with it."""

    code = "invalid_expression"


@dataclass(frozen=True)
class Expression:
    """One that was checked. `names` are those it needs, such as amount or find.status."""

    source: str
    names: frozenset[str]

    def value(self, values: Mapping[str, Value], today: date) -> Any:
        """What it comes to. Raises BadExpression, as where it compares a text with a number or what is not there."""
        return _value(self.source, values, today)

    def holds(self, values: Mapping[str, Value], today: date) -> bool:
        """Raises BadExpression, also where it is no yes or no."""
        found = self.value(values, today)
        if not isinstance(found, bool):
            raise BadExpression(f"`{self.source}` is neither true nor false: it is {found!r}")
        return found


def expression(source: str) -> Expression:
    """Check what was written. Raises BadExpression."""
    if len(source) > LONGEST:
        raise BadExpression(f"at most {LONGEST} characters, not {len(source)}")
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise BadExpression(f"`{source}` cannot be read: write it as in amount > 100 and reason == 'broken'") from error
    names: set[str] = set()
    _check(tree.body, names, source, 0)
    return Expression(source.strip(), frozenset(names))


def _check(node: ast.AST, names: set[str], source: str, depth: int) -> None:
    if depth > DEEPEST:
        raise BadExpression(f"`{source}` has too many brackets in one another")
    if not isinstance(node, NODES):
        raise BadExpression(f"`{source}`: {type(node).__name__} cannot be used in a condition")
    if isinstance(node, ast.Constant) and not isinstance(node.value, str | int | float):
        raise BadExpression(f"`{source}`: {node.value!r} cannot be used; ask known(x) whether there is a value")
    if isinstance(node, ast.Name | ast.Attribute):
        names.update({_dotted(node, source)} - TRUTH.keys())
        return
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS or len(node.args) != 1 or node.keywords:
            raise BadExpression(f"`{source}`: only {', '.join(FUNCTIONS)}, of one value, can be called")
        _check(node.args[0], names, source, depth + 1)
        return
    for child in ast.iter_child_nodes(node):
        _check(child, names, source, depth + 1)


def _dotted(node: ast.AST, source: str) -> str:
    name = ast.unparse(node)
    if not NAME.fullmatch(name):
        raise BadExpression(f"`{source}`: a name is NAME or ACTION.FIELD, in small letters, digits and _")
    return name


def _value(source: str, values: Mapping[str, Value], today: date) -> Any:
    def named(node: ast.AST) -> Value:
        name = _dotted(node, source)
        if name in TRUTH:
            return TRUTH[name]
        if name not in values:
            raise BadExpression(f"`{source}`: there is no {name}")
        return values[name]

    functions = {
        "days_since": lambda day: Decimal((today - day).days), "lower": lambda text: text.casefold(),
        "known": lambda value: value is not None,
    }  # fmt: skip
    by = SimpleEval(functions=functions)
    by.nodes[ast.Name] = by.nodes[ast.Attribute] = named
    by.nodes[ast.Constant] = lambda n: n.value if isinstance(n.value, str | bool) else Decimal(str(n.value))
    by.nodes[ast.List] = by.nodes[ast.Tuple] = lambda n: [by._eval(e) for e in n.elts]
    try:
        return by.eval(source)
    except BadExpression:
        raise
    except Exception as error:  # of Decimal and dates, too: a condition that fails is never true
        raise BadExpression(f"`{source}` cannot be decided ({type(error).__name__}: {error})") from error


def places(text: str) -> set[str]:
    """The names in a text's {places}."""
    return set(PLACE.findall(text))


def filled(text: str, values: Mapping[str, Value]) -> str:
    """A text with its {places} filled."""
    return PLACE.sub(lambda m: shown(values.get(m[1])), text)
