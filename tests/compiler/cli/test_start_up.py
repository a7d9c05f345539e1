"""What a command imports before it knows that it was asked for something wrong, and what the lists of what there is import.

Not seconds are compared (they are the machine's) but modules: those that take long are there for what computes.
"""

import subprocess
import sys

import pytest
from moec.passes import PASSES
from places import ROOT

SLOW = ("torch", "sympy", "onnx", "onnxruntime", "transformers", "networkx", "triton")
CODE = """
import sys
from moec.compiler.cli import main
try:
    main()
finally:
    print("imported:", *sorted(set({slow}) & set(sys.modules)), file=sys.stderr)
"""
TINY = "examples/tiny-moe"


@pytest.mark.parametrize(
    "command, code, said",
    [
        ("--help", 0, "An ahead-of-time compiler"),
        ("list passes", 0, "share-expressions"),
        ("targets", 0, "nvidia-b200"),
        ("run nothere", 2, "--prompt"),
        ("run nothere --prompt x", 2, "no such folder"),
        ("verify nothere", 2, "no such folder"),
        ("bench nothere", 2, "no such folder"),
        ("bench nothere --past few", 2, "'few' is not a list of numbers"),
        ("plan nothere --on hgx-h200", 2, "does not exist"),
        ("inspect nothere", 2, "does not exist"),
        ("inspect README.md --target nope", 2, "no known kind"),
        ("opt nothere.moir", 2, "cannot read the file"),
        (f"opt {TINY} -p clean", 2, "no pass clean"),
        ("compile nothere", 2, "does not exist"),
        ("compile nothere --target nope", 2, "no target 'nope'"),
        (f"compile {TINY} -D a=b", 2, "no option a"),
        (f"compile {TINY} --pipeline cleanup{{x=1}}", 2, "no option x"),
        (f"compile {TINY} --pipeline cleanup{{", 2, "syntax error"),
        (f"compile {TINY} --stop-after foo", 2, "cannot stop after foo"),
        (f"compile {TINY} --quantize foo", 2, "no format foo"),
        (f"compile {TINY} --quantize int4,method=gptq", 2, "calibration"),
        (f"compile {TINY} --memory-limit 1KB", 2, "too few"),
    ],
)
def test_what_does_not_compute_imports_nothing_that_takes_long(command, code, said):
    assert imported(command, code, said) == []


@pytest.mark.parametrize(
    "command, said, needed",
    [
        ("list families", "qwen3_moe", []),
        ("list ops", "core.add", ["sympy"]),  # of sizes
        ("list rules", "halves_into_rope", ["sympy"]),
    ],
)
def test_what_there_is_is_listed_without_torch(command, said, needed):
    assert imported(command, 0, said) == needed


def imported(command, code, said):
    """Return what takes long and a command imports; its exit code and a part of its output are given."""
    script = CODE.format(slow=SLOW)
    done = subprocess.run(
        [sys.executable, "-c", script, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    start, _, names = done.stderr.splitlines()[-1].partition(":")
    assert start == "imported"
    return names.split()


def test_a_pass_is_declared_alike_in_its_text_and_in_its_module():
    for name, read in PASSES.items():
        module = __import__(f"moec.passes.{name.replace('-', '_')}", fromlist=["it"])
        made = getattr(module, name.replace("-", "_"))
        for part in ("name", "doc", "reads", "leaves", "rounds", "options"):
            assert getattr(read, part) == getattr(made, part)
        assert (read.judge is None) == (made.judge is None)
