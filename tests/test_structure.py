"""What design and style fix about the tree: which way imports point, relative imports, short files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for part in ("compiler", "passes", "targets") for p in (ROOT / part).rglob("*.py"))
IR = {
    "ir",
    "dims",
    "dtypes",
    "errors",
    "recipes",
    "printer",
    "parser",
    "syntax",
    "fragments",
    "ops",
    "verify",
    "interpret",
}


def places(file):
    """Return the modules that a file imports from inside the package, as paths below the root such as compiler/ir."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parent
            for _ in range(node.level - 1):
                base = base.parent
            target = base.joinpath(*(node.module or "").split("."))
            names = [target / a.name for a in node.names if (target / a.name).with_suffix(".py").exists()]
            found |= {str((p if p.is_relative_to(ROOT) else ROOT).relative_to(ROOT)) for p in (names or [target])}
    return found


def reaches(file, *prefixes):
    """Return the imports of a file that lie below one of the prefixes."""
    return {p for p in places(file) if any(p == x or p.startswith(x + "/") for x in prefixes)}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file):
    place = file.relative_to(ROOT)
    if place.parts[0] == "compiler" and place.with_suffix("").parts[1] in IR:
        assert not reaches(file, "passes", "targets", "compiler/frontends", "compiler/pipeline", "compiler/driver")
    if place.parts[0] == "passes":
        assert not reaches(file, "targets", "compiler/frontends", "compiler/driver")
    if place.parts[:2] == ("compiler", "frontends"):
        assert not reaches(file, "targets", "passes", "compiler/driver")
    if place.parts[0] == "targets":
        assert not reaches(file, "passes", "compiler/frontends", "compiler/driver")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are_for(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_inside_the_package_are_relative(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        assert not {n.split(".")[0] for n in names} & {"moec", "compiler", "passes", "targets"}


def test_importing_moec_is_light():
    code = "import moec, sys; print(sorted({'torch', 'transformers', 'onnxruntime', 'sympy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_pass_is_in_the_file_of_its_name():
    from moec.passes import PASSES

    files = {p.stem.replace("_", "-") for p in (ROOT / "passes").glob("*.py")} - {"--init--"}
    assert set(PASSES) == files
