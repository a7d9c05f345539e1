"""Runs what triton-ascend's adapter writes, in numpy: Linalg on tensors and memrefs, read in MLIR's generic form.

It knows the operations that the kernels become, each as its dialect defines it; another one is an error, and so is a
write outside of a tensor's memory. Behind its end SLACK more numbers may be read: where rows are gathered, the adapter
reads whole tiles and throws away what a mask of columns excludes. They, and memory not written yet, hold odd numbers.
"""

import math
import re
from dataclasses import dataclass, field
from itertools import product

import ml_dtypes
import numpy as np

DTYPES = {
    "i1": np.bool_, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "index": np.int64,
    "f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16, "f8E4M3FN": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DYNAMIC = -(2**63)
SLACK = 128


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass
class Op:
    name: str
    operands: list[str]
    results: list[str]
    attributes: str
    regions: list["Region"] = field(default_factory=list)
    types: list[str] = field(default_factory=list)  # of the results

    def integers(self, name):
        """Return an attribute `name = array<i64: ...>`."""
        found = re.search(rf"\b{name} = array<i\d+(?:: ([^>]*))?>", self.attributes)
        assert found, (self.name, name, self.attributes)
        return [int(n) for n in (found[1] or "").split(",") if n.strip()]


@dataclass
class Region:
    arguments: list[str] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)


LINE = re.compile(r'(?:(%[\w:, %]+) = )?"([\w.]+)"\(([^)]*)\)(.*)')


def read(text):
    """Return the operations of a module in generic form."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return _region(lines, 0)[0]


def _region(lines, at):
    region = Region()
    while at < len(lines) and not lines[at].startswith("}"):
        if lines[at].startswith("^"):
            region.arguments = re.findall(r"(%\w+):", lines[at])
            at += 1
            continue
        op, at = _op(lines, at)
        region.ops.append(op)
    return region, at


def _op(lines, at):
    results, name, operands, rest = LINE.fullmatch(lines[at]).groups()
    names = []
    for result in (results or "").split(", ") if results else []:
        label, _, count = result.partition(":")
        names += [label] if not count else [f"{label}#{i}" for i in range(int(count))]
    op = Op(name, [o for o in operands.split(", ") if o], names, rest)
    while lines[at].endswith("{"):
        inner, at = _region(lines, at + 1)
        op.regions.append(inner)
        rest = lines[at]
    if op.results:
        after = rest[rest.rindex(" -> ") + 4 :]
        op.types = _split(after[1:-1]) if after.startswith("(") else [after]
    return op, at + 1


def _split(types):
    """Return the types of a list, whose own commas stand in brackets."""
    found, depth = [""], 0
    for c in types:
        depth += (c in "<[") - (c in ">]")
        if c == "," and depth == 0:
            found.append("")
        else:
            found[-1] += c
    return [t.strip() for t in found]


def shape_and_dtype(text):
    """Return the sizes (None where they are dynamic) and the dtype of a type as text."""
    if not text.startswith(("tensor", "memref")):
        return (), DTYPES[text]
    *sizes, dtype = text[text.index("<") + 1 : text.rindex(">")].split(",")[0].split("x")
    return tuple(None if n == "?" else int(n) for n in sizes), DTYPES[dtype]


# --- memory --------------------------------------------------------------------------------------------------------


@dataclass
class View:
    """A memref: cells of a flat array."""

    base: np.ndarray
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    end: int  # cells of the array behind this one may be read, not written

    def cells(self):
        found = np.asarray(self.offset)
        for axis, (size, stride) in enumerate(zip(self.sizes, self.strides, strict=True)):
            found = found + (np.arange(size) * stride).reshape(-1, *[1] * (len(self.sizes) - axis - 1))
        found = np.broadcast_to(found, self.sizes)
        assert not found.size or (found.min() >= 0 and found.max() < self.base.size), "outside of the memory"
        return found

    def read(self):
        return self.base[self.cells()]

    def write(self, value):
        cells = self.cells()
        assert not cells.size or cells.max() < self.end, "written behind the end of the memory"
        self.base[cells] = value

    def part(self, offsets, sizes, strides):
        offset = self.offset + sum(o * s for o, s in zip(offsets, self.strides, strict=True))
        return View(
            self.base, offset, tuple(sizes), tuple(a * b for a, b in zip(strides, self.strides, strict=True)), self.end
        )


def whole(array):
    """Return a view of all of an array, whose cells it shares."""
    strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
    return View(array.reshape(-1), 0, array.shape, tuple(strides), array.size)


def _odd(shape, dtype):
    return np.full(shape, True if dtype == np.bool_ else 77, dtype)


# --- running -------------------------------------------------------------------------------------------------------


def run_linalg(text, tensors, scalars, points):
    """Run the one kernel of a module at the points 0 ... of a grid of one axis; tensors are changed in place.

    The kernel's arguments are two that the runtime gives, tensors, scalars, the extents of the grid and a point of it.
    """
    module = read(text).ops[0].regions[0]
    kernel = next(op for op in module.ops if op.regions[0].ops).regions[0]
    flat = [View(np.append(t.reshape(-1), _odd(SLACK, t.dtype)), 0, (t.size,), (1,), t.size) for t in tensors]
    for point in range(points):
        given = [None, None, *flat, *(np.int32(s) for s in scalars), *map(np.int32, (points, 1, 1, point, 0, 0))]
        Run(dict(zip(kernel.arguments, given, strict=True))).region(kernel)
    for tensor, view in zip(tensors, flat, strict=True):
        tensor[...] = view.base[: tensor.size].reshape(tensor.shape)


class Run:
    def __init__(self, values):
        self.values = values

    def region(self, region, arguments=()):
        """Run a region and return what it yields."""
        self.values |= zip(region.arguments, arguments, strict=False)
        for op in region.ops:
            given = [self.values[o] for o in op.operands]
            if op.name in ("scf.yield", "linalg.yield", "func.return"):
                return given
            try:
                found = self.op(op, given)
            except AssertionError as error:
                raise AssertionError(f"{op.name}({', '.join(op.operands)}): {error}") from error
            for name, value in zip(op.results, found if len(op.results) > 1 else [found], strict=False):
                self.values[name] = value
        return []

    def op(self, op, given):
        dialect, name = op.name.split(".", 1)
        shape, dtype = shape_and_dtype(op.types[0]) if op.types else ((), None)
        if dialect in ("arith", "math"):
            return arithmetic(op, name, given, shape, dtype)
        return getattr(self, f"{dialect}_{name}")(op, given, shape, dtype)

    # scf and func

    def scf_for(self, op, given, shape, dtype):
        start, stop, step, *carried = given
        for turn in range(int(start), int(stop), int(step)):
            carried = self.region(op.regions[0], [np.asarray(start).dtype.type(turn), *carried])
        return carried if len(op.results) > 1 else (carried or [None])[0]

    def scf_if(self, op, given, shape, dtype):
        found = self.region(op.regions[0 if given[0] else 1])
        return found if len(op.results) > 1 else (found or [None])[0]

    def func_call(self, op, given, shape, dtype):
        assert "@triton_cumsum" in op.attributes, op.attributes
        value, axis, reverse = given
        assert not reverse
        return np.cumsum(value, axis=int(axis), dtype=value.dtype)

    # memref and bufferization

    def memref_alloc(self, op, given, shape, dtype):
        return whole(_odd(shape, dtype))

    def memref_reinterpret_cast(self, op, given, shape, dtype):
        source, *rest = given
        (offset,), sizes, strides = self.places(op, rest)
        return View(source.base, offset, tuple(sizes), tuple(strides), source.end)

    def memref_subview(self, op, given, shape, dtype):
        source, *rest = given
        return source.part(*self.places(op, rest))

    def memref_copy(self, op, given, shape, dtype):
        given[1].write(given[0].read())

    def memref_load(self, op, given, shape, dtype):
        view, *at = given
        return view.part(map(int, at), [1] * len(at), [1] * len(at)).read().reshape(())[()]

    def bufferization_to_tensor(self, op, given, shape, dtype):
        return given[0].read()

    def bufferization_to_memref(self, op, given, shape, dtype):
        return whole(np.array(given[0]))

    def bufferization_materialize_in_destination(self, op, given, shape, dtype):
        given[1].write(given[0])

    def bufferization_alloc_tensor(self, op, given, shape, dtype):
        return _odd(shape, dtype)

    # tensor

    tensor_empty = bufferization_alloc_tensor

    def tensor_extract(self, op, given, shape, dtype):
        return given[0][tuple(map(int, given[1:]))]

    def tensor_insert(self, op, given, shape, dtype):
        value, into, *at = given
        found = np.array(into)
        found[tuple(map(int, at))] = value
        return found

    def tensor_extract_slice(self, op, given, shape, dtype):
        source, *rest = given
        return whole(np.ascontiguousarray(source)).part(*self.places(op, rest)).read()

    def tensor_insert_slice(self, op, given, shape, dtype):
        value, into, *rest = given
        found = np.array(into)
        whole(found).part(*self.places(op, rest)).write(value)
        return found

    def tensor_reshape(self, op, given, shape, dtype):
        return np.reshape(given[0], shape)

    tensor_collapse_shape = tensor_expand_shape = tensor_reshape

    @staticmethod
    def places(op, dynamic):
        """Return offsets, sizes and strides, the dynamic ones taken from the operands."""
        rest = iter(dynamic)
        return [
            [int(next(rest)) if n == DYNAMIC else n for n in op.integers(f"static_{what}")]
            for what in ("offsets", "sizes", "strides")
        ]

    # linalg

    def linalg_fill(self, op, given, shape, dtype):
        value, out = given
        if isinstance(out, View):
            out.write(value)
            return None
        return np.full(out.shape, value, out.dtype)

    def linalg_broadcast(self, op, given, shape, dtype):
        source = given[0]
        for axis in op.integers("dimensions"):
            source = np.expand_dims(source, axis)
        return np.broadcast_to(source, given[1].shape)

    def linalg_transpose(self, op, given, shape, dtype):
        return np.transpose(given[0], op.integers("permutation"))

    def linalg_matmul(self, op, given, shape, dtype):
        a, b, acc = given
        return acc + (a.astype(acc.dtype) @ b.astype(acc.dtype))

    def linalg_reduce(self, op, given, shape, dtype):
        count = len(given) // 2
        sources, found = given[:count], given[count:]
        (axis,) = op.integers("dimensions")
        for i in range(sources[0].shape[axis]):
            found = self.region(op.regions[0], [*(np.take(s, i, axis) for s in sources), *found])
        return found if len(op.results) > 1 else found[0]

    def linalg_generic(self, op, given, shape, dtype):
        """Run a region at each point; all maps are the identity, as they are in what the adapter writes."""
        arrays = [v.read() if isinstance(v, View) else np.asarray(v) for v in given]
        sizes = arrays[-1].shape
        assert all(a.shape == sizes for a in arrays)
        out = given[-1] if isinstance(given[-1], View) else np.array(arrays[-1])
        found = np.array(arrays[-1])
        for point in product(*map(range, sizes)):
            self.point = point
            (found[point],) = self.region(op.regions[0], [a[point] for a in arrays])
        if isinstance(out, View):
            out.write(found)
            return None
        return found

    def linalg_index(self, op, given, shape, dtype):
        return np.int64(self.point[int(re.search(r"dim = (\d+)", op.attributes)[1])])


# --- arithmetic ----------------------------------------------------------------------------------------------------


def unsigned(x):
    """Return integers as the same bits without a sign."""
    x = np.asarray(x)
    return x.astype(np.uint8) if x.dtype == np.bool_ else x.view(UNSIGNED[x.dtype.itemsize])


def _divide(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return (np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)).astype(a.dtype)


INTEGER = {0: np.equal, 1: np.not_equal, 2: np.less, 3: np.less_equal, 4: np.greater, 5: np.greater_equal}
FLOAT = {1: np.equal, 2: np.greater, 3: np.greater_equal, 4: np.less, 5: np.less_equal}  # false for NaN
TWO = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply, "addf": np.add, "subf": np.subtract, "mulf": np.multiply,
    "divf": np.divide, "divsi": _divide, "remsi": lambda a, b: a - _divide(a, b) * b, "andi": np.bitwise_and,
    "ori": np.bitwise_or, "xori": np.bitwise_xor, "minsi": np.minimum, "maxsi": np.maximum, "minimumf": np.minimum,
    "maximumf": np.maximum, "minnumf": np.fmin, "maxnumf": np.fmax, "shli": np.left_shift, "shrsi": np.right_shift,
    "shrui": lambda a, b: np.right_shift(unsigned(a), unsigned(b)).view(np.asarray(a).dtype),
}  # fmt: skip
ONE = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "absf": np.abs, "absi": np.abs,
    "negf": np.negative, "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
}  # fmt: skip
CASTS = ("index_cast", "extsi", "trunci", "sitofp", "fptosi", "extf", "truncf")
UNSIGNED_CASTS = ("index_castui", "extui", "uitofp")


def arithmetic(op, name, given, shape, dtype):
    """Return the value of an operation of arith or math."""
    with np.errstate(all="ignore"):
        if name == "constant":
            return _constant(op.attributes, shape, dtype)
        if name in TWO:
            return np.asarray(TWO[name](*given)).astype(dtype)[()]
        if name in ONE:
            return np.asarray(ONE[name](given[0])).astype(dtype)[()]
        if name in CASTS:
            return np.asarray(given[0]).astype(dtype)[()]
        if name in UNSIGNED_CASTS:
            return unsigned(given[0]).astype(dtype)[()]
        if name == "bitcast":
            return np.ascontiguousarray(given[0]).view(dtype).reshape(np.shape(given[0]))[()]
        if name == "select":
            return np.where(*given)[()]
        if name in ("cmpi", "cmpf"):
            number = int(re.search(r"predicate = (\d+)", op.attributes)[1])
            return (INTEGER if name == "cmpi" else FLOAT)[number](*given)
    raise NotImplementedError(op.name)


def _constant(attributes, shape, dtype):
    text = re.search(r"value = (?:dense<(.*?)>|(\S+?))(?: :|}>)", attributes)
    numbers = (text[1] or text[2]).strip("[]").split(", ")
    found = np.array([_number(n, dtype) for n in numbers], dtype)
    return np.broadcast_to(found if len(found) > 1 else found[0], shape)[()] if shape else found[0]


def _number(text, dtype):
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("0x"):
        return np.array(int(text, 16), UNSIGNED[np.dtype(dtype).itemsize]).view(dtype)[()]
    return float(text) if "." in text else int(text)
