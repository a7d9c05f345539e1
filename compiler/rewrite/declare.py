"""What a pass is: a function with a name, help, options and a contract, declared in one place, its own definition.

A pass is a function `(module, target, *, options)` under `@pass_`, which returns the module after it, or that with
notes (`Rewritten`). `read_pass` reads the declaration off the text of a file, and the file is imported when
the pass runs: what passes are made of takes seconds to import, and what passes there are is asked for without them.
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import resolve_name
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MoecError
from ..errors.plugins import PASSES as BROUGHT
from ..errors.plugins import broken_package, brought_names, entry_points_of, load_brought, refuse_names
from ..ir.deferred import DeferredFunction
from ..ir.notes import Rewritten, distinct_notes
from ..ir.pipelines import Pipeline, option_text
from ..ir.stages import STAGES

if TYPE_CHECKING:
    from ..ir.module import Module


@dataclass(frozen=True)
class Option:
    """A keyword of a pass: its type (and None where that is allowed), its default, and the texts that it can be, if not all."""

    name: str
    type: type
    optional: bool
    default: Any
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.type.__name__} = {option_text(self.default)}"


@dataclass(frozen=True)
class PassDef:
    """A pass with its contract; `reads` and `leaves` are stages, or `any` for a pass that keeps the stage.

    `states` says that it may change how the states of the program are stored, and so which there are.
    `judge` raises MoecError for options that no module makes good; they are judged before the first pass runs.
    """

    name: str
    doc: str
    function: Callable[..., Module | Rewritten]
    reads: str
    leaves: str
    rounds: bool
    options: Mapping[str, Option]
    judge: Callable[..., None] | None = None
    states: bool = False

    def __call__(self, module: Module, target: Any = None, **options: Any) -> Module:
        """Return the module after the pass, options checked, nothing else."""
        return self.run(module, target, **options).module

    def run(self, module: Module, target: Any = None, **options: Any) -> Rewritten:
        """Return the module after the pass, and its notes."""
        result = self.function(module, target, **self.convert(options))
        return (
            Rewritten(result.module, distinct_notes(result.notes))
            if isinstance(result, Rewritten)
            else Rewritten(result)
        )

    def convert(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options as the types that the pass declares; MoecError for one that it does not have."""
        converted = {name: self._convert(name, value) for name, value in given.items()}
        if self.judge is not None and converted:
            self.judge(**{**{o.name: o.default for o in self.options.values()}, **converted})
        return converted

    def _convert(self, name: str, value: Any) -> Any:
        known = "; ".join(map(str, self.options.values())) or "none"
        if name not in self.options:
            raise MoecError(f"pass {self.name} has no option {name}", todo=f"its options: {known}")
        option = self.options[name]
        match value:
            case None | "none" if option.optional:
                return None
            case bool() if option.type is bool:
                return value
            case "true" | "false" if option.type is bool:
                return value == "true"
            case str() | int() | float() if option.type is str and not isinstance(value, bool):
                if not option.choices or value in option.choices:
                    return str(value)
            case str() | int() | float() if option.type in (int, float) and not isinstance(value, bool):
                number = _parse_number(value, option.type)
                if number is not None:
                    return number
        wanted = " or ".join(option.choices) or _with_article(option.type.__name__)
        what = f"option {name} of pass {self.name} is {option_text(value)}, not {wanted}"
        raise MoecError(what, todo=f"its options: {known}")


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _parse_number(value: str | int | float, type: type) -> int | float | None:
    try:
        return type(value) if isinstance(value, str) or type(value) == value else None
    except (ValueError, OverflowError):
        return None


def pass_(
    *,
    reads: str = "any",
    leaves: str | None = None,
    rounds: bool = False,
    judge: Callable[..., None] | None = None,
    states: bool = False,
) -> Callable[[Callable[..., Module | Rewritten]], PassDef]:
    """Declare a pass; `leaves` is `reads` unless given, `rounds` says that it stores weights in fewer bits, `judge`
    takes all options and raises MoecError for wrong ones, and `states` says that it may change how states are stored."""

    def declare(function: Callable[..., Module | Rewritten]) -> PassDef:
        signature = inspect.signature(function)
        name = function.__name__.rstrip("_").replace("_", "-")
        options = {
            p.name: _read_option(name, p, function)
            for p in signature.parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        doc = inspect.cleandoc(function.__doc__ or "")
        return PassDef(name, doc, function, reads, leaves or reads, rounds, options, judge, states)

    return declare


def _read_option(owner: str, parameter: inspect.Parameter, function: Callable[..., Any]) -> Option:
    kind, optional = parameter.annotation, False
    if isinstance(kind, str):
        kind = eval(kind, function.__globals__)
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    kind = str if choices else kind
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        rest = [t for t in typing.get_args(kind) if t is not types.NoneType]
        kind, optional = rest[0], True
        if len(rest) != 1:
            kind = object
    if kind not in (int, float, bool, str) or parameter.default is parameter.empty:
        raise TypeError(f"option {parameter.name} of pass {owner} must be int, float, bool or str, with a default")
    return Option(parameter.name, kind, optional, parameter.default, choices)


def resolve_passes(pipeline: Pipeline, table: Mapping[str, PassDef]) -> list[tuple[PassDef, dict[str, Any]]]:
    """Return passes with their options as they take them; MoecError for what is wrong with either."""
    definitions = [(_look_up(call.name, table), call.options) for call in pipeline]
    return [(definition, definition.convert(options)) for definition, options in definitions]


def _look_up(name: str, table: Mapping[str, PassDef]) -> PassDef:
    if name not in table:
        near = get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise MoecError(f"there is no pass {name}", todo=f"{hint}`moec list passes` shows them")
    return table[name]


def stop_hint(name: str, passes: Sequence[str]) -> str:
    """Return advice for a name that nothing can stop after."""
    near = get_close_matches(name, (*STAGES, *passes), n=1)
    return f"{f'did you mean {near[0]}? ' if near else ''}stages: {', '.join(STAGES)}"


def check_stop(name: str, table: Mapping[str, PassDef]) -> None:
    """Raise MoecError for a name that is no stage and no pass at all."""
    if name not in STAGES and name not in table:
        what = f"cannot stop after {name}: it is no stage and no pass"
        raise MoecError(what, todo=stop_hint(name, list(table)))


class PassTable(Mapping[str, PassDef]):
    """Passes by name: those given, and those of packages outside of moec, which are imported when they are asked for."""

    def __init__(self, own: Mapping[str, PassDef]) -> None:
        """Take the passes that moec has."""
        self.own = own

    def __getitem__(self, name: str) -> PassDef:
        """Return a pass; KeyError if there is none, MoecError for a package that is broken."""
        if name in self.own:
            return self.own[name]
        if (found := load_brought(BROUGHT, name, PassDef, "a function under @pass_")) is None:
            raise KeyError(name)
        if found.name != name:
            raise broken_package(entry_points_of(BROUGHT)[name], f"brings {name} as a pass that is named {found.name}")
        return found

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        refuse_names(BROUGHT, set(self.own))
        return iter((*self.own, *brought_names(BROUGHT)))

    def __len__(self) -> int:
        """Return how many there are."""
        return sum(1 for _ in self)


# --- a pass by the text of its file ----------------------------------------------------------------------------


def read_pass(module: str, file: Path) -> PassDef:
    """Return the pass that a file declares, read off its text; `module` is imported when the pass runs.

    The definition is run as it stands, without its body, so that name, help and options are made as ever.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    definition, decorator = _pass_definition(tree, file)
    given = {k.arg: k.value for k in decorator.keywords if k.arg is not None}
    judge = given.pop("judge", None)
    contract = {name: ast.literal_eval(value) for name, value in given.items()}
    scope: dict[str, Any] = {"__name__": module}
    exec(compile(ast.Module([_without_body(definition)], []), str(file), "exec", dont_inherit=True), scope)
    name = definition.name
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    judged = None if judge is None else _defining_function(ast.unparse(judge), tree, module, package)
    return replace(pass_(**contract)(scope[name]), function=DeferredFunction(module, f"{name}.function"), judge=judged)


def _defining_function(name: str, tree: ast.Module, module: str, package: str) -> DeferredFunction:
    """Return a function by its name in a file: from where the file has it, if it imports it, else from the file."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return DeferredFunction(resolve_name("." * node.level + (node.module or ""), package), name)
    return DeferredFunction(module, name)


def _pass_definition(tree: ast.Module, file: Path) -> tuple[ast.FunctionDef, ast.Call]:
    for node in tree.body:
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            match decorator:
                case ast.Call(func=ast.Name(id=pass_.__name__)):
                    assert isinstance(node, ast.FunctionDef)
                    return node, decorator
    raise TypeError(f"{file} declares no pass")


def _without_body(definition: ast.FunctionDef) -> ast.FunctionDef:
    """Return a function that has the help and the options of another and does nothing; other annotations are left out."""
    help = [node for node in definition.body[:1] if isinstance(node, ast.Expr)]
    arguments = definition.args
    for argument in (*arguments.posonlyargs, *arguments.args):
        argument.annotation = None
    stub = ast.FunctionDef(definition.name, arguments, [*help, ast.Pass()], [], None)
    return ast.fix_missing_locations(ast.copy_location(stub, definition))
