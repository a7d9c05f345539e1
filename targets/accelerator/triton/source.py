"""Prints a tile program as one Triton source file: the kernel, its grid, and a function that launches it.

Memories are Triton's own business: it puts the operands of a product into shared memory and keeps `stages` of them. So
a move between memories is a new name, and a buffer only states the shape and dtype that a value must have.
"""

from __future__ import annotations

import ast
import keyword
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ....compiler.errors import MoecError
from ..tile.expr import parse
from ..tile.tiles import Argument, Dot, For, If, Let, Load, Move, Program, Statement, Store
from .expr import (
    HELPERS,
    Expressions,
    Kind,
    Printed,
    as_dtype,
    broadcast,
    call,
    dtype_node,
    powers_of_two,
    sizes_node,
    strong,
)

WIDTH = 116
LIMIT = 2**31 - 1  # what an offset of 32 bits reaches

Lines: TypeAlias = "list[str]"


def triton_source(program: Program, warps: int = 4, limit: int | None = None) -> str:
    """Return the Python source of a kernel for `warps` warps of a block, with at most `limit` registers a thread.

    MoecError for what Triton cannot say: sizes of tiles that are no powers of two, dtypes that numpy and Triton would
    promote otherwise, names that are used after the loop that makes them.
    """
    printer = _Printer(program)
    while True:  # each turn knows better which names are negative or wider than the first value they get
        before = (set(printer.negative), dict(printer.wider))
        body = printer.kernel()
        if before == (printer.negative, printer.wider):
            return "\n".join(_file(program, body, printer.expressions.helpers, warps, limit)) + "\n"


def pointer(name: str) -> str:
    """Return the kernel's name for a tensor's address."""
    return f"{name}_ptr"


# --- the file ------------------------------------------------------------------------------------------------------


def _file(program: Program, body: Lines, helpers: set[str], warps: int, limit: int | None) -> Lines:
    tensors, scalars = [a.name for a in program.arguments], list(program.scalars)
    lines = [f'"""{program.doc or program.name}', "", "Tensors, row by row:", ""]
    for a in program.arguments:
        lines.append(f"    {a.name}: {a.dtype}[{', '.join(map(str, a.shape))}], {a.role}")
    lines += ["", "Printed from the kernel's tile program by moec.", '"""', ""]
    lines += ["import triton", "import triton.language as tl", ""]
    for name in sorted(helpers):
        lines += ["", "@triton.jit", f"def {name}(a, b):", f"    {HELPERS[name]}", ""]
    fixed = f"(do_not_specialize={scalars})" if scalars else ""
    lines += ["", f"@triton.jit{fixed}", f"def {program.name}({', '.join([pointer(t) for t in tensors] + scalars)}):"]
    lines += [*(f"    {line}" for line in body), "", ""]
    lines += [f"def grid({', '.join(scalars)}):", '    """Return the extents of the grid."""']
    lines += [f"    return ({_product([host(extent) for _, extent in program.grid])},)", "", ""]
    lines += [f"def launch({', '.join(tensors + scalars)}):", '    """Run the kernel on tensors of torch."""']
    options = f"num_warps={warps}" + (f", maxnreg={limit}" if limit else "")
    lines.append(f"    {program.name}[grid({', '.join(scalars)})]({', '.join(tensors + scalars)}, {options})")
    return lines


def _product(extents: Sequence[str]) -> str:
    return " * ".join(f"({e})" if not e.isidentifier() and not e.isdigit() else e for e in extents)


def host(extent: str) -> str:
    """Return an expression over the scalars as plain Python, for the host."""
    return ast.unparse(_Host().visit(parse(extent)))


class _Host(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.expr:
        arguments = [self.visit(a) for a in node.args]
        match node.func:
            case ast.Name("minimum"):
                return ast.Call(ast.Name("min"), arguments, [])
            case ast.Name("maximum"):
                return ast.Call(ast.Name("max"), arguments, [])
            case ast.Name("cdiv"):
                below = ast.BinOp(ast.UnaryOp(ast.USub(), arguments[0]), ast.FloorDiv(), arguments[1])
                return ast.UnaryOp(ast.USub(), below)
        raise MoecError(f"{ast.unparse(node)} in the extent of a grid", todo="it knows minimum, maximum and cdiv")


# --- the kernel ----------------------------------------------------------------------------------------------------


@dataclass
class _Printer:
    program: Program
    negative: set[str] = field(default_factory=set)  # names that may be below 0 somewhere
    wider: dict[str, str] = field(default_factory=dict)  # names that begin as a Python int -> the dtype they get
    expressions: Expressions = field(default_factory=lambda: Expressions({}))
    lines: Lines = field(default_factory=list)
    depth: int = 0

    def kernel(self) -> Lines:
        self.expressions, self.lines, self.depth = Expressions({}), [], 0
        self._check_names()
        for name in self.program.scalars:
            self.expressions.kinds[name] = Kind("int", natural=True)
        self._points()
        self._body(self.program.body)
        return self.lines

    def _check_names(self) -> None:
        taken = {pointer(a.name) for a in self.program.arguments} | {"tl", "triton", "program"}
        for name in [*self.program.scalars, *(n for n, _ in self.program.grid), *self.program.buffers]:
            self._check_name(name, taken)

    def _check_name(self, name: str, taken: set[str]) -> None:
        if keyword.iskeyword(name) or not name.isidentifier() or name in taken:
            raise MoecError(f"{self.program.name}: {name} is no name for a value in Triton")

    def _points(self) -> None:
        """Print the point of the grid: its axes are one axis of programs, the first the fastest."""
        rest = "tl.program_id(0)"
        if len(self.program.grid) > 1:
            self._line(f"program = {rest}")
            rest = "program"
        for number, (name, extent) in enumerate(self.program.grid):
            node = self.expressions.print(extent)[0]
            last = number == len(self.program.grid) - 1
            size = ast.unparse(node)
            size = size if size.isidentifier() or size.isdigit() else f"({size})"
            self._line(f"{name} = {rest}" if last else f"{name} = {rest} % {size}")
            rest = f"{rest} // {size}"
            self.expressions.kinds[name] = Kind("int", natural=True)

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def _statement(self, target: str, node: ast.expr) -> None:
        self.lines += [" " * 4 * self.depth + line for line in wrapped(target, node, WIDTH - 4 * (self.depth + 1))]

    def _body(self, body: Sequence[Statement]) -> None:
        for statement in body:
            try:
                self._print(statement)
            except MoecError as error:
                where = f"{self.program.name}, {error.where}" if error.where else self.program.name
                raise MoecError(error.what, where=where if self.program.name not in error.where else error.where,
                                todo=error.todo) from error  # fmt: skip

    def _print(self, statement: Statement) -> None:
        match statement:
            case Let(name, value):
                self._assign(name, self.expressions.print(value))
            case Load():
                self._load(statement)
            case Store():
                self._store(statement)
            case Move(name, value):
                self._assign(name, (ast.Name(value), self.expressions.kinds[value]))
            case Dot():
                self._dot(statement)
            case For():
                self._loop(statement)
            case If(condition, inner):
                node, kind = self.expressions.print(condition)
                if kind.constant is None:
                    node = node if kind.dtype == "bool" else ast.Compare(node, [ast.NotEq()], [ast.Constant(0)])
                    self._line(f"if {ast.unparse(node)}:")
                    self._inner(inner)
                elif kind.constant:
                    self._inner(inner, deeper=0)

    def _inner(self, body: Sequence[Statement], deeper: int = 1) -> None:
        """Print a body; names that are new in it are gone behind it, others must stay what they are."""
        outer = dict(self.expressions.kinds)
        self.depth += deeper
        if not body:
            self._line("pass")
        self._body(body)
        self.depth -= deeper
        inner = self.expressions.kinds
        for name, kind in outer.items():
            now = inner[name]
            if (now.dtype, now.shape) != (kind.dtype, kind.shape):
                if kind.dtype == "int" and now.dtype in ("i32", "i64") and now.shape == ():
                    self.wider[name] = now.dtype
                else:
                    raise MoecError(
                        f"{name} is {kind.dtype}{list(kind.shape)} before and {now.dtype}{list(now.shape)} in a body",
                        todo="Triton wants one type of a name that a loop or an if changes: cast it",
                    )
            if kind.natural and not now.natural:
                self.negative.add(name)
        self.expressions.kinds = outer

    def _assign(self, name: str, value: Printed) -> None:
        node, kind = value
        self._check_name(name, {pointer(a.name) for a in self.program.arguments} | {"tl", "triton"})
        buffer = self.program.buffers.get(name)
        if buffer is not None and (buffer.dtype, buffer.shape) != (kind.dtype, kind.shape):
            raise MoecError(
                f"{name} is stated as {buffer.dtype}{list(buffer.shape)} and gets {kind.dtype}{list(kind.shape)}"
            )
        powers_of_two(kind.shape)
        wider = self.wider.get(name)
        if wider and kind.dtype != wider:
            node = strong(node, kind, wider)
            kind = Kind(wider, kind.shape, kind.natural)
        self._statement(f"{name} = ", node)
        self.expressions.kinds[name] = Kind(kind.dtype, kind.shape, kind.natural and name not in self.negative)

    def _place(self, tensor: str, at: Sequence[str], mask: str) -> tuple[ast.expr, ast.expr | None, tuple[int, ...]]:
        """Return the tree of the addresses and of the mask, and the shape of both together."""
        argument = self.program.argument(tensor)
        if len(at) != len(argument.shape):
            raise MoecError(f"{tensor} has {len(argument.shape)} axes, {len(at)} indices were given")
        offsets: list[ast.expr] = []
        first = 0
        shape: tuple[int, ...] = ()
        for axis, text in enumerate(at):
            node, kind = self.expressions.print(text)
            if axis == len(at) - 1:
                first, node = _split(node)
            if kind.dtype not in ("int", "i32", "i64"):
                raise MoecError(f"an index that is {kind.dtype}", where=text)
            shape = broadcast(shape, kind.shape)
            if kind.constant != 0:
                offsets.append(self._offset(argument, axis, node, kind))
        if first:  # before the rest: where it comes after, triton-ascend fails when every second number is read
            offsets.insert(0, ast.Constant(first))
        address: ast.expr = ast.Name(pointer(tensor))
        for offset in offsets:
            address = ast.BinOp(address, ast.Add(), offset)
        if not mask:
            return address, None, shape
        node, kind = self.expressions.print(mask)
        if kind.dtype != "bool":
            raise MoecError(f"a mask that is {kind.dtype}", where=mask)
        whole = broadcast(shape, kind.shape)
        if whole != shape:
            address = call("tl.broadcast_to", address, sizes_node(whole)) if shape else _spread(address, whole)
        return address, node, whole

    def _offset(self, argument: Argument, axis: int, node: ast.expr, kind: Kind) -> ast.expr:
        """Return index * stride, in 64 bits where the axis may reach further than 32."""
        constant, scalars = 1, []
        for size in argument.shape[axis + 1 :]:
            factor, of = self.expressions.print(size)
            if of.constant is None:
                scalars.append(factor)
            else:
                constant *= int(of.constant)
        if constant == 1 and not scalars:
            return node
        whole = argument.shape[axis]
        short = isinstance(whole, int) and not scalars and whole * constant <= LIMIT
        if not short and kind.dtype != "i64":
            node = strong(node, kind, "i64")
        if constant != 1:
            node = ast.BinOp(node, ast.Mult(), ast.Constant(constant))
        for factor in scalars:  # one after the other: each product has the 64 bits of the index
            node = ast.BinOp(node, ast.Mult(), factor)
        return node

    def _load(self, statement: Load) -> None:
        address, mask, shape = self._place(statement.tensor, statement.at, statement.mask)
        dtype = self.program.argument(statement.tensor).dtype
        named = {}
        if mask is not None:
            other = float(statement.other) if dtype[0] in "bf" and dtype != "bool" else int(statement.other)
            named = {"mask": mask, "other": ast.Constant(other)}
        node = call("tl.load", address, **named)
        if dtype == "bool":  # a bool lies in a byte
            node = ast.Compare(node, [ast.NotEq()], [ast.Constant(0)])
        self._assign(statement.name, (node, Kind(dtype, shape, dtype in ("u8", "bool"))))

    def _store(self, statement: Store) -> None:
        address, mask, shape = self._place(statement.tensor, statement.at, statement.mask)
        node, kind = self.expressions.print(statement.value)
        if broadcast(shape, kind.shape) != shape:
            raise MoecError(f"a value of {list(kind.shape)} stored to {list(shape)} cells", where=statement.value)
        dtype = self.program.argument(statement.tensor).dtype
        if not kind.weak and kind.dtype != dtype:
            node = as_dtype(node, dtype)
        named = {} if mask is None else {"mask": mask}
        if statement.add:
            self._statement("", call("tl.atomic_add", address, node, **named, sem=ast.Constant("relaxed")))
        else:
            self._statement("", call("tl.store", address, node, **named))

    def _dot(self, statement: Dot) -> None:
        a, b, acc = (self.expressions.kinds[n] for n in (statement.a, statement.b, statement.acc))
        b_shape = b.shape[::-1] if statement.transpose else b.shape
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b_shape[0] or acc.shape != (a.shape[0], b_shape[1]):
            raise MoecError(f"{statement.acc}{list(acc.shape)} += {list(a.shape)} times {list(b_shape)}")
        if a.dtype != b.dtype or acc.dtype != "f32" or a.dtype not in ("f32", "bf16", "f16", "f8e4m3", "f8e5m2"):
            raise MoecError(
                f"{statement.acc} ({acc.dtype}) += {a.dtype} times {b.dtype}: it adds floats of one dtype in f32"
            )
        second = call("tl.trans", ast.Name(statement.b)) if statement.transpose else ast.Name(statement.b)
        precise = {"input_precision": ast.Constant("ieee")} if a.dtype == "f32" else {}
        self._assign(
            statement.acc, (call("tl.dot", ast.Name(statement.a), second, ast.Name(statement.acc), **precise), acc)
        )

    def _loop(self, loop: For) -> None:
        (start, first), (stop, last), (step, by) = (
            self.expressions.print(n) for n in (loop.start, loop.stop, loop.step)
        )
        if any(k.shape or k.dtype not in ("int", "i32", "i64") for k in (first, last, by)):
            raise MoecError(f"the bounds of {loop.var} are no ints", where=f"{loop.start}, {loop.stop}, {loop.step}")
        if not by.constant or by.constant < 0:
            raise MoecError(f"the step of {loop.var} is no constant above 0", where=loop.step)
        bounds = call("tl.range", start, stop, step, num_stages=ast.Constant(max(loop.stages, 1)))
        self._line(f"for {loop.var} in {ast.unparse(bounds)}:")
        if loop.var in self.expressions.kinds:
            raise MoecError(f"{loop.var} is a name before its loop", todo="name it otherwise")
        self.expressions.kinds[loop.var] = Kind("int", natural=first.natural)
        self._inner(loop.body)
        del self.expressions.kinds[loop.var]


def _split(node: ast.expr) -> tuple[int, ast.expr]:
    """Return an index as a constant and the rest, which is added to it; 0 where it has none in front."""
    match node:
        case ast.BinOp(ast.Constant(int() as first), ast.Add(), rest):
            return first, rest
        case ast.Subscript(ast.BinOp(ast.Constant(int() as first), ast.Add(), rest), axes):
            return first, ast.Subscript(rest, axes)
    return 0, node


def _spread(address: ast.expr, shape: tuple[int, ...]) -> ast.expr:
    zeros = call("tl.full", sizes_node(shape), ast.Constant(0), dtype_node("i32"))
    return ast.BinOp(address, ast.Add(), zeros)


def wrapped(target: str, node: ast.expr, width: int, inside: bool = False) -> Lines:
    """Return `target` and an expression as lines that fit, broken at the arguments of calls and at operators.

    `inside`: it stands between brackets, so that its lines need none of their own.
    """
    whole = target + ast.unparse(node)
    if len(whole) <= width:
        return [whole]
    match node:
        case ast.Call(ast.Attribute(value, name), arguments, named) if len(ast.unparse(value)) > width // 2:
            tail = ast.unparse(ast.Call(ast.Name(name), arguments, named))
            return [f"{target}(", *_indented(wrapped("", value, width - 4, inside=True)), f").{tail}"]
        case ast.Call(function, arguments, named):
            lines = [f"{target}{ast.unparse(function)}("]
            for prefix, argument in [*(("", a) for a in arguments), *((f"{w.arg}=", w.value) for w in named)]:
                *first, last = wrapped(prefix, argument, width - 5, inside=not prefix)
                lines += _indented([*first, last + ","])
            return [*lines, ")"]
        case ast.BinOp(_, operator, _):
            sign = ast.unparse(ast.BinOp(ast.Name("a"), operator, ast.Name("b")))[2:-2]
            lines = []
            for number, part in enumerate(_operands(node, type(operator))):
                lines += _operand(f"{sign} " if number else "", part, width - 4)
            return lines if inside and not target else [f"{target}(", *_indented(lines), ")"]
        case ast.Compare(left, [operator], [right]):
            sign = ast.unparse(ast.Compare(ast.Name("a"), [operator], [ast.Name("b")]))[2:-2]
            *first, last = _operand(target, left, width - 8)
            return [*first, f"{last} {sign} {ast.unparse(right)}"]
        case ast.Subscript(value, index):
            *first, last = _operand(target, value, width - 16)
            return [*first, f"{last}[{ast.unparse(index)}]"]
    return [whole]


def _operands(node: ast.expr, operator: type[ast.operator]) -> list[ast.expr]:
    """Return the parts of a chain a + b + c, which is grouped from the left."""
    match node:
        case ast.BinOp(left, found, right) if isinstance(found, operator):
            return [*_operands(left, operator), right]
    return [node]


def _operand(prefix: str, node: ast.expr, width: int) -> Lines:
    """Return an operand as lines, in brackets unless it needs none."""
    if isinstance(node, (ast.Call, ast.Name, ast.Constant, ast.Attribute, ast.Subscript)):
        return wrapped(prefix, node, width)
    whole = f"{prefix}({ast.unparse(node)})"
    if len(whole) <= width:
        return [whole]
    if isinstance(node, ast.BinOp):
        return wrapped(prefix, node, width)
    return [f"{prefix}(", *_indented(wrapped("", node, width - 4)), ")"]


def _indented(lines: Lines) -> Lines:
    return ["    " + line for line in lines]
