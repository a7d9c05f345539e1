"""Compiles printed kernels to GPU code through Triton's own compiler, on a machine that needs no GPU.

What a compiled kernel takes of the chip is read back from what the compiler wrote: registers and local memory from the
cubin with the cuobjdump that Triton brings, or from the metadata that ends AMD's assembly.
"""

from __future__ import annotations

import hashlib
import linecache
import re
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ....compiler.errors import MoecError
from ..tile.tiles import Program
from .architectures import architecture_of
from .source import pointer_name, triton_source

SIGNATURE: Mapping[str, str] = {
    "f32": "fp32", "bf16": "bf16", "f16": "fp16", "f8e4m3": "fp8e4nv", "f8e5m2": "fp8e5",
    "f8e4m3fnuz": "fp8e4b8",
    "i64": "i64", "i32": "i32", "i8": "i8", "u8": "u8", "bool": "i1",
}  # fmt: skip
UNITS: Mapping[str, str] = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"mma\.sync",
    "mfma": "v_mfma",
    "wmma": "v_wmma",
}
TENSOR_COLUMNS = 512  # of 128 lanes of 32 bits, that a core of sm_100 and sm_103 has
ALIGN = 16  # bytes that every tensor's address is a multiple of


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture: `object` is a cubin or hsaco, `assembly` its PTX or AMD assembly.

    `registers` a thread, `shared` bytes a block, `tensor_memory` columns of sm_100's. `spills`: bytes of local memory a
    thread; `scalar_spills`: scalar registers that AMD's compiler keeps in vector ones. `limit`: how many registers the
    assembler was told to take at most (Triton's maxnreg), where its own choice would have spilled. `uses`: which of
    UNITS it computes products with.
    """

    name: str
    arch: str
    warps: int
    object: bytes
    assembly: str
    registers: int
    shared: int
    tensor_memory: int
    spills: int
    scalar_spills: int
    limit: int | None
    uses: frozenset[str]

    @property
    def suffix(self) -> str:
        """The suffix of a file that holds the object."""
        return architecture_of(self.arch).suffix


@dataclass(frozen=True)
class Request:
    """A kernel to compile: a printed source, the name and signature of its kernel, for an architecture and so many warps."""

    source: str
    name: str
    signature: tuple[tuple[str, str], ...]
    arch: str
    warps: int


def compile_request_of(program: Program, arch: str, warps: int, source: str | None = None) -> Request:
    """Return what to compile for a program, printed here unless `source` is what was printed from it.

    Raises MoecError for an `arch` that ARCHITECTURES does not have, and for a program that Triton cannot express.
    """
    architecture_of(arch)
    tensors = tuple((pointer_name(a.name), "*" + SIGNATURE[a.dtype]) for a in program.arguments)
    signature = (*tensors, *((name, "i32") for name in program.scalars))
    return Request(source or triton_source(program, warps), program.name, signature, arch, warps)


def triton_module() -> ModuleType:
    """Return the module triton; MoecError with what to install where it is missing."""
    try:
        import triton
        import triton.compiler
    except ImportError as error:
        raise MoecError(
            "kernels are compiled by Triton, which is not installed here",
            todo="pip install 'moec[kernels]' (on Linux); without it the kernels' source is written and not compiled",
            exit_code=1,
        ) from error
    return triton


def load_kernel(source: str, name: str) -> dict[str, Any]:
    """Return what a printed source defines. Triton reads a kernel's text again, so it is left where Python looks for it."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = (
        f"moec/{digest}/{name}.py"  # no place on this machine: it ends in the object's line table, which must reproduce
    )
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    defined: dict[str, Any] = {"__name__": f"moec_kernel_{name}", "__file__": path}
    exec(compile(source, path, "exec"), defined)
    return defined


@lru_cache(maxsize=4096)
def compile_request(wanted: Request) -> Compiled:
    """Compile what is asked for. MoecError where Triton is not installed or does not compile it."""
    triton = triton_module()
    name, arch, warps, signature = wanted.name, wanted.arch, wanted.warps, wanted.signature
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = load_kernel(wanted.source, name)[name]
    aligned = {(i,): [["tt.divisibility", ALIGN]] for i, (_, dtype) in enumerate(signature) if dtype.startswith("*")}
    row = architecture_of(arch)
    target = GPUTarget(row.backend, int(arch[3:]) if row.backend == "cuda" else arch, row.warp)

    def build(limit: int | None) -> Compiled:
        options = {"num_warps": warps, "enable_fp_fusion": True} | ({"maxnreg": limit} if limit else {})
        made = _run_triton(
            triton, ASTSource(kernel, dict(signature), {}, aligned), target, options, f"{name} for {arch}"
        )
        if (columns := getattr(made.metadata, "tmem_size", 0) or 0) > TENSOR_COLUMNS:
            raise MoecError(
                f"{name} for {arch}: its sums take {columns} columns of tensor memory, there are {TENSOR_COLUMNS}",
                exit_code=1,
            )
        if getattr(made.metadata, "global_scratch_size", 0):
            raise MoecError(f"{name} for {arch} wants scratch memory, which is not given at a launch", exit_code=1)
        read = (_read_nvidia if row.backend == "cuda" else _read_amd)(triton, made)
        return Compiled(
            name, arch, warps, **read, limit=limit, shared=made.metadata.shared,
            tensor_memory=columns,
        )  # fmt: skip

    found = build(None)
    most = min(255, row.registers // (row.warp * warps))
    if found.spills and found.registers < most:  # spilled to have more blocks on a core
        again = build(most)
        return again if again.spills < found.spills else found
    return found


def _run_triton(triton: Any, source: Any, target: Any, options: Mapping[str, Any], what: str) -> Any:
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        triton.knobs.cache.dir = folder  # nothing is left behind: the object is all that is wanted
        try:
            return triton.compile(source, target=target, options=dict(options))
        except (triton.TritonError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AssertionError) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise MoecError(f"Triton does not compile {what}: {text[-1]}", exit_code=1) from error


def _read_nvidia(triton: Any, made: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "object": made.asm["cubin"], "assembly": made.asm["ptx"], "registers": found["REG"],
        "spills": found["STACK"] + found["LOCAL"], "scalar_spills": 0, "uses": _units_in_assembly(made.asm["ptx"]),
    }  # fmt: skip


def _read_amd(triton: Any, made: Any) -> dict[str, Any]:
    text = made.asm["amdgcn"]
    keys = ("vgpr_count", "private_segment_fixed_size", "sgpr_spill_count")
    registers, scratch, scalars = (int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1]) for key in keys)
    return {
        "object": made.asm["hsaco"], "assembly": text, "registers": registers, "spills": scratch,
        "scalar_spills": scalars, "uses": _units_in_assembly(text),
    }  # fmt: skip


def _units_in_assembly(assembly: str) -> frozenset[str]:
    return frozenset(name for name, pattern in UNITS.items() if re.search(pattern, assembly))
