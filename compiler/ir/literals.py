"""Reads the nodes of literals, attributes and sizes: their values, given what names mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lark import Token

from ..errors import MoecError
from .activation import FORMS, Activation
from .syntax import AttrNode, Node, Source

if TYPE_CHECKING:
    from .types import Attr

LONGEST_INT = 40  # digits

Names = Callable[[Token, bool], Any]  # what a name means; the flag says that it stands alone, as in {act=silu}


def read_attribute(node: Node, source: Source, names: Names) -> Attr:
    """Return the Python value of a literal; sizes as sympy expressions, lists as tuples."""
    match node:
        case ("value", value):
            return value
        case ("list", items):
            return tuple(read_attribute(item, source, names) for item in items)
        case ("range", first, _):
            raise source.error("a range of numbers is only for an attribute of a call", first)
        case ("int", token):
            return read_integer(token, source)
        case ("name", token):
            return names(token, True)
        case ("call", name, (("name", kind), *options)) if name in FORMS:
            return _read_activation(name, kind, options, source)
    result = read_size(node, source, names)
    return int(result) if isinstance(result, int) or result.is_Integer else result


def _read_activation(form: Token, kind: Token, options: list[Any], source: Source) -> Attr:
    if not all(isinstance(n, AttrNode) for n in options):
        raise source.error(f"{form} takes one name and then options, such as limit=7.0", form)

    def names(token: Token, alone: bool) -> str:
        if not alone:
            raise source.error("an activation has no sizes", token)
        return str(token)

    try:
        return Activation.of(form, str(kind), read_attributes(options, source, names))
    except MoecError as error:
        raise error if error.where else source.error(error.what, form, todo=error.todo) from None


def read_attributes(nodes: Iterable[AttrNode], source: Source, names: Names) -> dict[str, Attr]:
    """Return attributes by name; a name twice is an error."""
    result: dict[str, Attr] = {}
    for node in nodes:
        if node.name in result:
            raise source.error(f"attribute {node.name} is given twice", node.name)
        result[str(node.name)] = read_attribute(node.value, source, names)
    return result


def read_size(node: Node, source: Source, names: Names) -> Any:
    """Return the sympy expression of a size."""
    from .dims import size  # sympy takes longer to import than a pipeline to read

    match node:
        case ("int", token):
            return size(read_integer(token, source))
        case ("name", token):
            return names(token, False)
        case ("neg", a):
            return -read_size(a, source, names)
        case ("call", name, arguments):
            if option := next((a for a in arguments if isinstance(a, AttrNode)), None):
                raise source.error(f"{name} takes no options", option.name)
            return _apply_function(name, [read_size(a, source, names) for a in arguments], source)
    kind, left, right = node
    a, b = read_size(left, source, names), read_size(right, source, names)
    return a + b if kind == "add" else a - b if kind == "sub" else a * b


def _apply_function(name: Token, arguments: list[Any], source: Source) -> Any:
    from .dims import FUNCTIONS

    function = FUNCTIONS.get(name)
    if function is None:
        raise source.error(f"unknown function {name}", name, todo=f"sizes have {', '.join(FUNCTIONS)}")
    if name not in ("max", "min") and len(arguments) != 2:
        raise source.error(f"{name} takes 2 arguments, {len(arguments)} given", name)
    if name not in ("max", "min") and arguments[1].is_zero:
        raise source.error("division by zero", name)
    return function(*arguments)


def read_integer(token: Token, source: Source) -> int:
    """Return the value of an integer token, within reason."""
    if len(token) > LONGEST_INT:
        raise source.error(f"an integer of {len(token)} digits", token)
    return int(token)
