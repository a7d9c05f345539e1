"""What ARCHITECTURE.md and design fix about the tree: the floors, no circles, relative imports, short files, the packages."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from places import ROOT, TESTS
from setuptools import find_packages

PARTS = ("compiler", "passes", "targets")
FILES = sorted(p for part in PARTS for p in (ROOT / part).rglob("*.py"))
TEST_FILES = sorted(TESTS.rglob("*.py"))

# the rooms from the ground up: a room imports those of lower floors only, types included, inside of functions too
FLOORS = (
    {"compiler/errors", "compiler/formats", "compiler/version"},
    {"compiler/ir", "targets/session"},
    {"compiler/ops", "compiler/weights"},
    {"compiler/artifact", "compiler/cost", "compiler/text"},
    {"compiler/check", "compiler/frontends", "targets/target"},
    {"compiler/rewrite"},
    {"targets/accelerator", "targets/checkpoints", "targets/cpu"},
    {"targets/portable", "targets/systems"},
    {"targets/serving"},
    {"targets/ranks"},
    {"targets"},
    {"compiler/runtime"},
    {"compiler/quantize"},
    {"passes"},
    {"compiler/driver"},
    {"compiler/cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def module_of(file):
    """Return a file's module as a path below the root, that of a package for an `__init__.py`."""
    path = file.relative_to(ROOT)
    return (path.parent if path.name == "__init__.py" else path.with_suffix("")).as_posix()


MODULES = {module_of(file): file for file in FILES}


@cache
def imports(module):
    """Return the modules that a module imports from inside the package, wherever the import stands."""
    file = MODULES[module]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parent
            for _ in range(node.level - 1):
                base = base.parent
            target = base.joinpath(*(node.module or "").split(".")).relative_to(ROOT).as_posix()
            for alias in node.names:
                inner = f"{target}/{alias.name}"
                found.add(inner if inner in MODULES else target)
    return frozenset(found - {module, "."})


def room(module):
    """Return the room of a module: what stands side by side in compiler/ and targets/, and passes/ as a whole."""
    parts = module.split("/")
    return parts[0] if parts[0] == "passes" else "/".join(parts[:2])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_the_floors(module):
    own = room(module)
    if own == "compiler":  # its face says what is there
        assert not imports(module)
        return
    above = {m for m in imports(module) if room(m) != own and FLOOR[room(m)] >= FLOOR[own]}
    assert not above, f"{own} stands on floor {FLOOR[own]}; see FLOORS"


def test_no_modules_import_each_other():
    state, circles = {}, []

    def visit(module, path):
        state[module] = "open"
        for other in sorted(imports(module) & MODULES.keys()):
            if state.get(other) == "open":
                circles.append([*path[path.index(other) :], other] if other in path else [module, other])
            elif other not in state:
                visit(other, [*path, other])
        state[module] = "done"

    for module in MODULES:
        if module not in state:
            visit(module, [module])
    assert not circles


def test_a_house_that_can_be_seen_at_once():
    rooms = {r for r in map(room, MODULES) if r.startswith("compiler/")}
    assert len(rooms) <= 16
    accelerator = {m.split("/")[2] for m in MODULES if m.startswith("targets/accelerator/")}
    assert len(accelerator) <= 12


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are_for(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_inside_the_package_are_relative(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        assert not {n.split(".")[0] for n in names} & {"moec", *PARTS}


def test_folders_of_tests_are_those_of_the_product():
    """Only what concerns the whole, what several tests make, and what is measured by hand lies outside of them."""
    folders = {file.parent.relative_to(TESTS) for file in TEST_FILES} - {Path(), Path("support"), Path("bench")}
    assert not [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()]


def test_no_test_module_imports_another():
    """What several of them make or check is a module of tests/support, and so is where their files lie."""
    found = []
    for file in TEST_FILES:
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += ["." * node.level + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
            found += [(file.name, name) for name in names if re.match(r"\.|tests\b|test_|conftest$", name)]
        if file.parent.name != "bench" and file.name != "places.py" and "Path(__file__).parent" in text:
            found.append((file.name, "its own path"))
    assert not [entry for entry in found if entry[0] != Path(__file__).name]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_check_of_types_is_turned_off(file):
    text = file.read_text(encoding="utf-8")
    assert "# type: ignore" not in text
    assert not re.search(r"^from typing import .*\bcast\b|typing\.cast", text, re.MULTILINE)


def test_every_folder_of_modules_is_a_package_of_the_wheel():
    folders = {file.parent.relative_to(ROOT).as_posix().replace("/", ".") for file in FILES}
    patterns = [name for part in PARTS for name in (part, f"{part}.*")]
    assert set(find_packages(str(ROOT), include=patterns)) == folders
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]["*"]
    others = {p for part in PARTS for p in (ROOT / part).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert not [str(p) for p in others if not any(p.match(pattern) for pattern in data)]
    # data of a folder that is no package is left out of the wheel
    assert {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in others} <= folders


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed, *optional = (
        {re.match(r"[\w-]+", text)[0].replace("-", "_") for text in texts}
        for texts in (project["dependencies"], *project["optional-dependencies"].values())
    )
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert needed <= found <= needed.union(*optional)  # what may be absent is imported where it is found


def test_importing_moec_is_light():
    code = "import moec, sys; print(sorted({'torch', 'transformers', 'onnxruntime', 'sympy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_pass_is_in_the_file_of_its_name():
    from moec.passes import PASSES

    files = {p.stem.replace("_", "-") for p in (ROOT / "passes").glob("*.py")} - {"--init--"}
    assert set(PASSES) == files


def test_ops_that_the_source_names_are_declared():
    """A name that no op has any more matches nothing, and nobody notices."""
    from moec.compiler.ops import OPS
    from moec.targets import declare_kernel_ops

    declare_kernel_ops()
    dialects = "|".join({name.partition(".")[0] for name in OPS})
    nodes = ((file, node) for file in FILES for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    named = {
        (node.value, str(file.relative_to(ROOT)))
        for file, node in nodes
        if isinstance(node, ast.Constant) and re.fullmatch(rf"({dialects})\.\w+", str(node.value))
    }
    assert len(named) > 100
    assert not {(name, file) for name, file in named if name not in OPS}
