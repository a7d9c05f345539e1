"""Tile programs as JSON values, as kernels.json has them: expressions are text, which is read once and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....compiler.errors import MoecError
from .scope import Scope
from .tiles import Argument, Buffer, Dot, For, If, Let, Load, Move, Program, Statement, Store


def program_to_json(program: Program) -> dict[str, Any]:
    """Return a program as JSON values; `program_from_json` reads them."""
    return {
        "name": program.name,
        "doc": program.doc,
        "grid": [[name, str(extent)] for name, extent in program.grid],
        "scalars": list(program.scalars),
        "arguments": [
            {"name": a.name, "dtype": a.dtype, "shape": [n if isinstance(n, int) else str(n) for n in a.shape],
             "role": a.role}
            for a in program.arguments
        ],
        "buffers": {
            name: {"memory": b.memory, "dtype": b.dtype, "shape": list(b.shape), "copies": b.copies, "bytes": b.bytes}
            for name, b in program.buffers.items()
        },
        "body": [_statement_to_json(statement) for statement in program.body],
    }  # fmt: skip


def _statement_to_json(statement: Statement) -> dict[str, Any]:
    match statement:
        case Let(name, value):
            return {"let": name, "value": str(value)}
        case Load(name, tensor, at, mask, other):
            entry: dict[str, Any] = {"load": name, "from": tensor, "at": [str(i) for i in at], "mask": str(mask or "")}
            return entry | ({"other": other} if other else {})
        case Store(tensor, at, value, mask):
            return {"store": tensor, "at": [str(i) for i in at], "value": str(value), "mask": str(mask or "")}
        case Dot(acc, a, b, transpose, scales, bits):
            entry = {"dot": acc, "a": a, "b": b, "transpose": transpose}
            return entry | ({"scales": list(scales)} if scales else {}) | ({"bits": bits} if bits else {})
        case Move(name, source):
            return {"move": name, "value": source}
        case For(var, start, stop, step, body, stages):
            entry = {"for": var, "start": str(start), "stop": str(stop), "step": str(step), "stages": stages}
            return entry | {"body": [_statement_to_json(s) for s in body]}
        case If(condition, body):
            return {"if": str(condition), "body": [_statement_to_json(s) for s in body]}


def program_from_json(data: Mapping[str, Any]) -> Program:
    """Return the program of JSON values; MoecError for anything but statements that fit together."""
    buffers = {
        name: Buffer(b["memory"], b["dtype"], tuple(b["shape"]), b["copies"]) for name, b in data["buffers"].items()
    }
    scope = Scope(data["name"], buffers=buffers)
    scalars = tuple(scope.integer(name) for name in data["scalars"])
    for a in data["arguments"]:
        scope.tensor(Argument(a["name"], a["dtype"], tuple(scope.size(n) for n in a["shape"]), a["role"]))
    grid = tuple((name, scope.value(extent)) for name, extent in data["grid"])
    for name, _ in grid:
        scope.integer(name)
    arguments = tuple(scope.arguments.values())
    body = _statements_from_json(data["body"], scope)
    return Program(data["name"], grid, arguments, scalars, buffers, body, data.get("doc", ""))


def _statements_from_json(entries: Sequence[Mapping[str, Any]], scope: Scope) -> tuple[Statement, ...]:
    return tuple(_read_one(entry, scope) for entry in entries)


def _read_one(entry: Mapping[str, Any], scope: Scope) -> Statement:
    match entry:
        case {"let": name, "value": value}:
            return scope.add(Let(name, scope.value(value)))
        case {"load": name, "from": tensor, "at": at}:
            indices = tuple(scope.value(i) for i in at)
            return scope.add(Load(name, tensor, indices, scope.mask(entry.get("mask")), entry.get("other", 0)))
        case {"store": tensor, "at": at, "value": value}:
            indices = tuple(scope.value(i) for i in at)
            return scope.add(Store(tensor, indices, scope.value(value), scope.mask(entry.get("mask"))))
        case {"dot": acc, "a": a, "b": b}:
            scales = tuple(entry["scales"]) if "scales" in entry else None
            return scope.add(Dot(acc, a, b, entry.get("transpose", False), scales, entry.get("bits", "")))
        case {"move": name, "value": value}:
            return scope.add(Move(name, value))
        case {"for": var, "start": start, "stop": stop, "step": step, "body": body}:
            bounds = scope.value(start), scope.value(stop), scope.value(step)
            with scope.loop(var, *bounds):
                inner = _statements_from_json(body, scope)
            return For(var, *bounds, inner, entry.get("stages", 1))
        case {"if": condition, "body": body}:
            tested = scope.value(condition)
            with scope.when(tested):
                inner = _statements_from_json(body, scope)
            return If(tested, inner)
    raise MoecError(f"{dict(entry)} is no statement of a tile program")
