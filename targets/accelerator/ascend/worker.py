"""Lower Triton kernels for Ascend; lower.py runs it with the Python of an environment that has triton-ascend, no moec.

A line says that it has started; then one job a line comes in and one answer a line goes out, JSON, in order. A job: `source` (a file), `kernel` (the
function in it), `signature` (argument -> Triton type), `constants` (argument -> value), `arch` (Ascend910B4 ...) and
`newer` (whether that is an Ascend 950). An answer: `ttir` and `linalg`, or `stage` and `error`.
"""

import importlib.util
import json
import os
import subprocess
import sys


def answer(job):
    """Return the answer to one job, whatever goes wrong in it."""
    stage = "source"
    try:
        function = load(job["source"], job["kernel"])
        stage = "triton"
        module, lower = to_triton_ir(function, job)
        text = str(module)
        stage = "linalg"
        return {"ttir": text, "linalg": lower(module)}
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode("utf-8", "replace").strip()
        return {"stage": stage, "error": said or f"the adapter ended with {error.returncode} and said nothing"}
    except Exception as error:  # whatever the compiler raises is this kernel's answer, and the others still get theirs
        return {"stage": stage, "error": f"{type(error).__name__}: {error}"}


def load(path, name):
    """Return a kernel of a source file."""
    spec = importlib.util.spec_from_file_location("kernel_source", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def to_triton_ir(function, job):
    """Return a kernel as optimized Triton IR, and the function that lowers it to Linalg."""
    from triton._C.libtriton import ir
    from triton.backends.ascend import compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.triton_patch.language import core, semantic

    newer = job["newer"]
    for module in (compiler, core, semantic):  # what the language allows; the package keeps it in constants of modules
        module.is_compile_on_910_95 = newer
    target = GPUTarget("npu", job["arch"], 0)
    backend = compiler.AscendBackend(target)
    options = backend.parse_options(
        {
            "compile_on_910_95": newer,
            "multibuffer": not newer,
            "enable_auto_bind_sub_block": not newer,
            # off for the 950 too, where it is on by itself: it turns where(i == n, x, 0) into a read at n, also behind x
            "enable_select_analysis": False,
        }
    )
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(function, job["signature"], job["constants"])
    made = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {"hash": job["kernel"], "target": target, **options.__dict__}
    made = compiler.make_ttir(made, metadata, options)
    return made, lambda module: compiler.ttir_to_linalg(module, metadata, options, named_ops=True)


def main():
    """Say that triton-ascend is here, then answer the jobs on standard input; what it prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import triton.backends.ascend.compiler

    print(json.dumps({"ready": triton.__version__}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
