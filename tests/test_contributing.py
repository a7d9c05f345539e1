"""What CONTRIBUTING.md, ARCHITECTURE.md and CHANGELOG.md name exists: paths, options of commands, markers of tests, names in the source."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from moec.compiler.cli.commands import main
from places import ROOT

PAGES = ("CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md")
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in PAGES}
MARKERS = {
    line.partition(":")[0]
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]["markers"]
}


def codes(text):
    """Return what the page sets as code: the lines of its blocks without their comments, and what stands in backquotes."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s+# .*", "", line) for block in blocks for line in block.splitlines()]
    rest = re.sub(r"^```\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines + [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", rest)]


def commands(text, *start):
    """Return the commands that begin with some words, those joined by && one by one, each as a list of words."""
    found = []
    for code in codes(text):
        for part in code.split("&&"):
            try:
                words = shlex.split(part)
            except ValueError:  # code of another language
                continue
            words = [word for word in words if not re.fullmatch(r"[A-Z]+=.*", word)]
            if tuple(words[: len(start)]) == start:
                found.append(words)
    return found


def missing_paths(text):
    """Return the paths that are not there; NAME in one stands for any name."""
    words = {word for code in codes(text) for word in code.split()}
    paths = {word for word in words if re.fullmatch(r"\.?\w[\w.-]*(/[\w.-]+)+/?|[\w-]+\.(md|txt)", word)}
    return sorted(path for path in paths if not any(ROOT.glob(path.rstrip("/").replace("NAME", "*"))))


def unknown_options(text):
    """Return the commands and options of moec that do not exist."""
    bad = []
    for words in commands(text, "moec"):
        if len(words) == 1 or words[1].startswith("-"):
            command, rest = main, words[1:]
        elif words[1] in main.commands:
            command, rest = main.commands[words[1]], words[2:]
        else:
            bad.append(" ".join(words[:2]))
            continue
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
        bad += [f"{' '.join(words[:2])} {word}" for word in rest if word.startswith("-") and word not in known]
        for argument in command.params:
            if isinstance(argument, click.Argument) and isinstance(argument.type, click.Choice) and rest:
                bad += [f"moec {words[1]} {rest[0]}"] * (rest[0] not in argument.type.choices)
    return bad


def unknown_test_options(text, config):
    """Return the options of pytest and the markers that do not exist."""
    bad = []
    for words in commands(text, "python", "-m", "pytest"):
        rest = words[3:]
        for option, value in zip(rest, [*rest[1:], ""], strict=True):
            if option == "-m":
                bad += [m for m in re.findall(r"\w+", value) if m not in MARKERS | {"and", "or", "not"}]
            if option.startswith("-"):
                try:
                    config.getoption(option)
                except ValueError:
                    bad.append(option)
    return bad


def source_words():
    """Return every word of the source and its tests, this file left out."""
    files = [p for part in ("compiler", "passes", "targets", "tests") for p in (ROOT / part).rglob("*.py")]
    return {word for p in files if p != Path(__file__) for word in re.findall(r"\w+", p.read_text("utf-8"))}


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    assert not missing_paths(TEXTS[page])


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page, pytestconfig):
    assert not unknown_options(TEXTS[page])
    assert not unknown_test_options(TEXTS[page], pytestconfig)


def test_names_of_the_recipes_are_in_the_source():
    named = {code for code in codes(TEXTS["CONTRIBUTING.md"]) if re.fullmatch(r"[A-Za-z]\w{3,}", code)}
    assert len(named) > 15
    assert not named - source_words()


def test_every_marker_is_explained():
    assert not {m for m in MARKERS if f"`{m}`" not in TEXTS["CONTRIBUTING.md"]}


def test_folders_of_the_targets_are_those_of_the_page():
    listed = dict(re.findall(r"In `(targets/\w+)`: ([^.]*)\.", TEXTS["ARCHITECTURE.md"]))
    assert set(listed) == {"targets/accelerator", "targets/cpu"}
    for folder, names in listed.items():
        inside = {p.stem for p in (ROOT / folder).iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
        assert set(re.findall(r"`(\w+)`", names)) <= inside, folder


def test_what_does_not_exist_is_found(pytestconfig):
    text = """See `passes/no_such.py`, `targets/NAME/no_such.py` and `NOTHING.md`; `passes/NAME.py` is there.

```
moec opt a.moir -p raise-norm --check --no-such && moec list nothing
moec nothing
A=b python -m pytest tests/passes/test_files.py -m "long and short" --no-such-option --update   # --nor-this
```
"""
    assert missing_paths(text) == ["NOTHING.md", "passes/no_such.py", "targets/NAME/no_such.py"]
    assert unknown_options(text) == ["moec opt --no-such", "moec list nothing", "moec nothing"]
    assert unknown_test_options(text, pytestconfig) == ["short", "--no-such-option"]
