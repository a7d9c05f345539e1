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
from ..tile.expr import Expr, operator_node, python_syntax, shape_of
from ..tile.tiles import Argument, Dot, For, If, Let, Load, Move, Program, Statement, Store
from ..tile.types import EIGHT, FLOATS, ExprType
from .expr import HELPERS, Expressions, as_dtype, call_node, dtype_node, powers_of_two, sizes_node, typed_constant

WIDTH = 116
LIMIT = 2**31 - 1  # what an offset of 32 bits reaches

Lines: TypeAlias = "list[str]"


def triton_source(program: Program, warps: int = 4, limit: int | None = None) -> str:
    """Return the Python source of a kernel for `warps` warps of a block, with at most `limit` registers a thread.

    MoecError for what Triton cannot express: sizes of tiles that are no powers of two, names that it has taken, quotients
    of numbers that may be negative by others than constants.
    """
    printer = _Printer(program)
    while True:  # each pass knows better which names a loop makes negative
        before = set(printer.negative)
        body = printer.kernel()
        if before == printer.negative:
            return "\n".join(_file_lines(program, body, printer.expressions.helpers, warps, limit)) + "\n"


def pointer_name(name: str) -> str:
    """Return the kernel's name for a tensor's address."""
    return f"{name}_ptr"


# --- the file ------------------------------------------------------------------------------------------------------


def _file_lines(program: Program, body: Lines, helpers: set[str], warps: int, limit: int | None) -> Lines:
    tensors, scalars = [a.name for a in program.arguments], list(program.scalars)
    lines = [f'"""{program.doc or program.name}', "", "Tensors, row by row:", ""]
    for a in program.arguments:
        lines.append(f"    {a.name}: {a.dtype}[{', '.join(map(str, a.shape))}], {a.role}")
    lines += ["", "Printed from the kernel's tile program by moec.", '"""', ""]
    lines += ["import triton", "import triton.language as tl", ""]
    for name in sorted(helpers):
        lines += ["", "@triton.jit", f"def {name}(a, b):", f"    {HELPERS[name]}", ""]
    fixed = f"(do_not_specialize={scalars})" if scalars else ""
    lines += [
        "",
        f"@triton.jit{fixed}",
        f"def {program.name}({', '.join([pointer_name(t) for t in tensors] + scalars)}):",
    ]
    lines += [*(f"    {line}" for line in body), "", ""]
    lines += [f"def grid({', '.join(scalars)}):", '    """Return the extents of the grid."""']
    lines += [f"    return ({_product_text([host_expression(extent) for _, extent in program.grid])},)", "", ""]
    lines += [f"def launch({', '.join(tensors + scalars)}):", '    """Run the kernel on tensors of torch."""']
    options = f"num_warps={warps}" + (f", maxnreg={limit}" if limit else "")
    lines.append(f"    {program.name}[grid({', '.join(scalars)})]({', '.join(tensors + scalars)}, {options})")
    return lines


def _product_text(extents: Sequence[str]) -> str:
    return " * ".join(f"({e})" if not e.isidentifier() and not e.isdigit() else e for e in extents)


def host_expression(extent: Expr) -> str:
    """Return an expression over the scalars as plain Python, for the host."""
    return ast.unparse(python_syntax(extent, _host_call))


def _host_call(name: str, arguments: list[ast.expr]) -> ast.expr:
    match name:
        case "minimum" | "maximum":
            return ast.Call(ast.Name(name[:3]), arguments, [])
        case "cdiv":
            return ast.UnaryOp(ast.USub(), operator_node("//", ast.UnaryOp(ast.USub(), arguments[0]), arguments[1]))
    raise MoecError(f"{name} in the extent of a grid", todo="it knows minimum, maximum and cdiv")


# --- the kernel ----------------------------------------------------------------------------------------------------


@dataclass
class _Printer:
    program: Program
    negative: set[str] = field(default_factory=set)  # names that may be below 0 somewhere
    expressions: Expressions = field(default_factory=lambda: Expressions({}))
    lines: Lines = field(default_factory=list)
    depth: int = 0

    def kernel(self) -> Lines:
        self.expressions, self.lines, self.depth = Expressions({}), [], 0
        self._check_names()
        for name in self.program.scalars:
            self.expressions.nonnegative[name] = True
        self._points()
        self._body(self.program.body)
        return self.lines

    def _check_names(self) -> None:
        taken = {pointer_name(a.name) for a in self.program.arguments} | {"tl", "triton", "program"}
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
            last = number == len(self.program.grid) - 1
            size = ast.unparse(self.expressions.print(extent))
            size = size if size.isidentifier() or size.isdigit() else f"({size})"
            self._line(f"{name} = {rest}" if last else f"{name} = {rest} % {size}")
            rest = f"{rest} // {size}"
            self.expressions.nonnegative[name] = True

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def _statement(self, target: str, node: ast.expr) -> None:
        self.lines += [
            " " * 4 * self.depth + line for line in wrapped_lines(target, node, WIDTH - 4 * (self.depth + 1))
        ]

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
                self._assign(
                    name, self.expressions.print(value), value.type.shape, self.expressions.is_nonnegative(value)
                )
            case Load():
                self._load(statement)
            case Store():
                self._store(statement)
            case Move(name, value):
                shape = self.program.buffers[name].shape
                self._assign(name, ast.Name(value), shape, self.expressions.nonnegative[value])
            case Dot():
                self._dot(statement)
            case For():
                self._loop(statement)
            case If(condition, inner):
                if condition.type.constant is None:
                    node = self.expressions.print(condition)
                    node = node if condition.type.dtype == "bool" else operator_node("!=", node, ast.Constant(0))
                    self._line(f"if {ast.unparse(node)}:")
                    self._inner(inner)
                elif condition.type.constant:
                    self._inner(inner, deeper=0)

    def _inner(self, body: Sequence[Statement], deeper: int = 1) -> None:
        """Print a body, and note which names may be negative after it."""
        outer = dict(self.expressions.nonnegative)
        self.depth += deeper
        if not body:
            self._line("pass")
        self._body(body)
        self.depth -= deeper
        inner = self.expressions.nonnegative
        self.negative |= {name for name, before in outer.items() if before and not inner[name]}
        self.expressions.nonnegative = outer

    def _assign(self, name: str, node: ast.expr, shape: tuple[int, ...], nonnegative: bool) -> None:
        self._check_name(name, {pointer_name(a.name) for a in self.program.arguments} | {"tl", "triton"})
        powers_of_two(shape)
        self._statement(f"{name} = ", node)
        self.expressions.nonnegative[name] = nonnegative and name not in self.negative

    def _address(self, tensor: str, at: Sequence[Expr], mask: Expr | None) -> tuple[ast.expr, dict[str, ast.expr]]:
        """Return the tree of the addresses that a load or store reaches, and its argument with the mask, if there is one."""
        argument = self.program.argument(tensor)
        offsets: list[ast.expr] = []
        first = 0
        for axis, index in enumerate(at):
            node = self.expressions.print(index)
            if axis == len(at) - 1:
                first, node = _split_constant(node)
            if index.type.constant != 0:
                offsets.append(self._offset(argument, axis, node, index.type))
        if first:  # before the rest: where it comes after, triton-ascend fails when every second number is read
            offsets.insert(0, ast.Constant(first))
        address: ast.expr = ast.Name(pointer_name(tensor))
        for offset in offsets:
            address = operator_node("+", address, offset)
        if mask is None:
            return address, {}
        shape, whole = shape_of(*at), shape_of(*at, mask)
        if whole != shape:
            address = (
                call_node("tl.broadcast_to", address, sizes_node(whole)) if shape else _spread_address(address, whole)
            )
        return address, {"mask": self.expressions.print(mask)}

    def _offset(self, argument: Argument, axis: int, node: ast.expr, type: ExprType) -> ast.expr:
        """Return index * stride, in 64 bits where the axis may reach further than 32."""
        constant, scalars = 1, []
        for size in argument.shape[axis + 1 :]:
            known = size if isinstance(size, int) else size.type.constant
            if known is not None:
                constant *= int(known)
            elif isinstance(size, Expr):
                scalars.append(self.expressions.print(size))
        if constant == 1 and not scalars:
            return node
        whole = argument.shape[axis]
        short = isinstance(whole, int) and not scalars and whole * constant <= LIMIT
        if not short and type.dtype != "i64":
            node = typed_constant(node, type, "i64")
        if constant != 1:
            node = operator_node("*", node, ast.Constant(constant))
        for factor in scalars:  # from the left: each product has the 64 bits of the index
            node = operator_node("*", node, factor)
        return node

    def _load(self, statement: Load) -> None:
        address, named = self._address(statement.tensor, statement.at, statement.mask)
        dtype = self.program.argument(statement.tensor).dtype
        if named:
            other = float(statement.other) if dtype in FLOATS or dtype in EIGHT else int(statement.other)
            named["other"] = ast.Constant(other)
        node = call_node("tl.load", address, **named)
        if dtype == "bool":  # a bool lies in a byte
            node = operator_node("!=", node, ast.Constant(0))
        self._assign(statement.name, node, shape_of(*statement.at, statement.mask), dtype in ("u8", "bool"))

    def _store(self, statement: Store) -> None:
        address, named = self._address(statement.tensor, statement.at, statement.mask)
        node, given = self.expressions.print(statement.value), statement.value.type
        dtype = self.program.argument(statement.tensor).dtype
        if not given.weak and given.dtype != dtype:
            node = as_dtype(node, dtype)
        self._statement("", call_node("tl.store", address, node, **named))

    def _dot(self, statement: Dot) -> None:
        buffer = self.program.buffers[statement.acc]
        if statement.scales:
            self._scaled_dot(statement, statement.scales)
            return
        given: list[ast.expr] = [ast.Name(name) for name in (statement.a, statement.b)]
        if statement.bits:
            given = [as_dtype(node, statement.bits, bitcast=ast.Constant(True)) for node in given]
        a, b = given
        second = call_node("tl.trans", b) if statement.transpose else b
        exact = self.program.buffers[statement.a].dtype == "f32"
        precise = {"input_precision": ast.Constant("ieee")} if exact else {}
        node = call_node("tl.dot", a, second, ast.Name(statement.acc), **precise)
        self._assign(statement.acc, node, buffer.shape, self.expressions.nonnegative[statement.acc])

    def _scaled_dot(self, dot: Dot, scales: tuple[str, str]) -> None:
        buffers = self.program.buffers
        forms = [ast.Constant("e4m3" if buffers[name].dtype == "f8e4m3" else "e2m1") for name in (dot.a, dot.b)]
        second = call_node("tl.trans", ast.Name(dot.b))
        node = call_node(
            "tl.dot_scaled", ast.Name(dot.a), ast.Name(scales[0]), forms[0], second, ast.Name(scales[1]), forms[1],
            ast.Name(dot.acc),
        )  # fmt: skip
        self._assign(dot.acc, node, buffers[dot.acc].shape, self.expressions.nonnegative[dot.acc])

    def _loop(self, loop: For) -> None:
        bounds = [self.expressions.print(n) for n in (loop.start, loop.stop, loop.step)]
        counted = call_node("tl.range", *bounds, num_stages=ast.Constant(max(loop.stages, 1)))
        self._line(f"for {loop.var} in {ast.unparse(counted)}:")
        self.expressions.nonnegative[loop.var] = self.expressions.is_nonnegative(loop.start)
        self._inner(loop.body)
        del self.expressions.nonnegative[loop.var]


def _split_constant(node: ast.expr) -> tuple[int, ast.expr]:
    """Return an index as a constant and the rest, which is added to it; 0 where it has none in front."""
    match node:
        case ast.BinOp(ast.Constant(int() as first), ast.Add(), rest):
            return first, rest
        case ast.Subscript(ast.BinOp(ast.Constant(int() as first), ast.Add(), rest), axes):
            return first, ast.Subscript(rest, axes)
    return 0, node


def _spread_address(address: ast.expr, shape: tuple[int, ...]) -> ast.expr:
    zeros = call_node("tl.full", sizes_node(shape), ast.Constant(0), dtype_node("i32"))
    return operator_node("+", address, zeros)


def wrapped_lines(target: str, node: ast.expr, width: int, inside: bool = False) -> Lines:
    """Return `target` and an expression as lines that fit, broken at the arguments of calls and at operators.

    `inside`: it stands between brackets, so that its lines need none of their own.
    """
    whole = target + ast.unparse(node)
    if len(whole) <= width:
        return [whole]
    match node:
        case ast.Call(ast.Attribute(value, name), arguments, named) if len(ast.unparse(value)) > width // 2:
            tail = ast.unparse(ast.Call(ast.Name(name), arguments, named))
            return [f"{target}(", *_indent_lines(wrapped_lines("", value, width - 4, inside=True)), f").{tail}"]
        case ast.Call(function, arguments, named):
            lines = [f"{target}{ast.unparse(function)}("]
            for prefix, argument in [*(("", a) for a in arguments), *((f"{w.arg}=", w.value) for w in named)]:
                *first, last = wrapped_lines(prefix, argument, width - 5, inside=not prefix)
                lines += _indent_lines([*first, last + ","])
            return [*lines, ")"]
        case ast.BinOp(_, operator, _):
            sign = ast.unparse(ast.BinOp(ast.Name("a"), operator, ast.Name("b")))[2:-2]
            lines = []
            for number, part in enumerate(_operands_of_chain(node, type(operator))):
                lines += _operand_lines(f"{sign} " if number else "", part, width - 4)
            return lines if inside and not target else [f"{target}(", *_indent_lines(lines), ")"]
        case ast.Compare(left, [operator], [right]):
            sign = ast.unparse(ast.Compare(ast.Name("a"), [operator], [ast.Name("b")]))[2:-2]
            *first, last = _operand_lines(target, left, width - 8)
            return [*first, f"{last} {sign} {ast.unparse(right)}"]
        case ast.Subscript(value, index):
            *first, last = _operand_lines(target, value, width - 16)
            return [*first, f"{last}[{ast.unparse(index)}]"]
    return [whole]


def _operands_of_chain(node: ast.expr, operator: type[ast.operator]) -> list[ast.expr]:
    """Return the parts of a chain a + b + c, which is grouped from the left."""
    match node:
        case ast.BinOp(left, found, right) if isinstance(found, operator):
            return [*_operands_of_chain(left, operator), right]
    return [node]


def _operand_lines(prefix: str, node: ast.expr, width: int) -> Lines:
    """Return an operand as lines, in brackets unless it needs none."""
    if isinstance(node, (ast.Call, ast.Name, ast.Constant, ast.Attribute, ast.Subscript)):
        return wrapped_lines(prefix, node, width)
    whole = f"{prefix}({ast.unparse(node)})"
    if len(whole) <= width:
        return [whole]
    if isinstance(node, ast.BinOp):
        return wrapped_lines(prefix, node, width)
    return [f"{prefix}(", *_indent_lines(wrapped_lines("", node, width - 4)), ")"]


def _indent_lines(lines: Lines) -> Lines:
    return ["    " + line for line in lines]
