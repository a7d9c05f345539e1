"""What packages outside of moec bring, found through their entry points; none of them is imported before it is asked for.

    moec.targets   NAME = "package.module:TARGET"   a Target of that name
    moec.chips     NAME = "package.module:FILE"     the path of a chip's TOML file
    moec.families  NAME = "package.module:FAMILY"   a Family that chips' files name (targets/accelerator/chip/families.py)
    moec.passes    NAME = "package.module:function" a function under @pass_
    moec.ops       DIALECT = "package.module"       a module that declares ops DIALECT.* with @op

A program brings targets and passes without a package by `moec.register`. What is wrong with a package is a MoecError that
names it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from . import MoecError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

TARGETS, CHIPS, FAMILIES = "moec.targets", "moec.chips", "moec.families"
PASSES, OPS = "moec.passes", "moec.ops"


_registered: dict[str, dict[str, Any]] = {}  # what a program brings itself: group -> name -> it


def register_brought(group: str, name: str, brought: Any) -> None:
    """Take what a program brings under a name, in place of what it brought under it before."""
    _registered.setdefault(group, {})[name] = brought


def brought_names(group: str) -> tuple[str, ...]:
    """Return the names that packages, and this program, bring of a group."""
    return (*entry_points_of(group), *(n for n in _registered.get(group, {}) if n not in entry_points_of(group)))


@cache
def entry_points_of(group: str) -> dict[str, EntryPoint]:
    """Return what packages bring of a group, by name; MoecError where two bring the same name."""
    from importlib.metadata import entry_points  # it looks at every installed package

    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        if entry.name in found and entry.value != found[entry.name].value:
            packages = f"{package_of(found[entry.name])} and {package_of(entry)}"
            raise MoecError(f"the packages {packages} both bring {entry.name} ({group})", todo="uninstall one of them")
        found[entry.name] = entry
    return found


def load_brought(group: str, name: str, kinds: type | tuple[type, ...], wanted: str) -> Any:
    """Return what a package brings under a name; None if none does, MoecError if it is broken or not what is `wanted`."""
    if name in _registered.get(group, {}):
        return _registered[group][name]
    entry = entry_points_of(group).get(name)
    if entry is None:
        return None
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise broken_package(entry, f"cannot be imported: {reason}") from error
    if not isinstance(loaded, kinds):
        raise broken_package(entry, f"brings {name} as {type(loaded).__name__}, which is not {wanted}")
    return loaded


def refuse_names(group: str, own: set[str]) -> None:
    """Raise MoecError for a package that brings a name which moec has itself."""
    for name in sorted(own & entry_points_of(group).keys()):
        raise broken_package(entry_points_of(group)[name], f"brings {name}, which moec has itself")


def broken_package(entry: EntryPoint, what: str) -> MoecError:
    """Return the error for a package whose entry point is wrong."""
    where = f"the entry point {entry.name} = {entry.value} of {entry.group}"
    return MoecError(f"the package {package_of(entry)} {what}", where, todo="mend the package, or uninstall it")


def package_of(entry: EntryPoint) -> str:
    """Return the name of the installed package that an entry point is from."""
    return (entry.dist and entry.dist.metadata["Name"]) or entry.value.partition(":")[0].partition(".")[0]
