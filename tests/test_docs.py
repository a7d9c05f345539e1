"""The documentation: it builds without warnings and with whole links, has every op, and its blocks run."""

import html
import json
import re
import subprocess
import sys

import moec
import pytest
from moec.compiler.artifact.manifest import SHAPE
from moec.compiler.cli.listing import list_ops, list_passes
from moec_command import invoke
from places import ROOT

DOCS = ROOT / "docs"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / "guide.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_manifest_page_has_its_keys():
    text = (DOCS / "artifact.md").read_text("utf-8").partition("## moec.json")[2]
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == {key.rstrip("?") for key in SHAPE}


def test_blocks_stand_only_in_the_guide():
    assert all("```" not in page.read_text("utf-8") for page in DOCS.glob("*.md") if page.name != "guide.md")
    assert {kind for kind, _ in BLOCKS} == {"", "python"}


def test_the_pictures_are_of_the_figures_in_benchmarks(monkeypatch):
    """Made by docs/picture.py, which has to be run again where the tables change."""
    monkeypatch.syspath_prepend(DOCS)
    import picture

    text = (ROOT / "BENCHMARKS.md").read_text("utf-8")
    for name, rows in (("speed", picture.speeds(text)), ("loss", picture.losses(text))):
        drawn = (DOCS / f"{name}.svg").read_text("utf-8")
        assert json.loads(html.unescape(re.search("<desc>(.*?)</desc>", drawn)[1])) == json.loads(json.dumps(rows))
        assert len(drawn) < 40_000 and rows


@pytest.mark.long
def test_it_builds_without_warnings(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "mkdocs.yml", "-d", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0 and not re.search(r"^(WARNING|ERROR)", done.stderr, re.MULTILINE), done.stderr
    ir, api = ((tmp_path / name).read_text("utf-8") for name in ("ir.html", "api.html"))
    assert not [row["name"] for row in list_ops() if f">{row['name']}<" not in ir]
    assert not [row["name"] for row in list_passes() if f">{row['name']}<" not in ir]
    assert "<!-- ops" not in ir and "<!-- api" not in api
    assert not [name for name in moec.__all__ if name[0] != "_" and f">moec.{name}<" not in api]


@pytest.mark.long
def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    """Every block in its order: some go on from what an earlier one wrote."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for kind, body in BLOCKS:
        if kind == "python":
            exec(compile(body, "guide.md", "exec"), {})
            assert capsys.readouterr().out.strip()
            continue
        for line in body.splitlines():
            words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
            assert words[0] == "moec"
            result = invoke(*words[1:])
            assert result.exit_code == 0, result.stderr
            assert result.stdout.strip() or "compile" in words
