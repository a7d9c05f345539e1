"""A family of chips that does not exist, brought by a package outside: two files, and models compile for it and run."""

import sys
from pathlib import Path

import moec
import numpy as np
import pytest
from moec.compiler.errors import MoecError
from moec.compiler.errors.plugins import entry_points_of
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.run.artifact import read_kernels
from moec.targets.accelerator.tile.machine import layout_of

ROOT = Path(moec.__file__).parent
TINY = ROOT / "examples/tiny-moe"
CHIP = Path(__file__).with_name("loom.toml")
FAMILY = """
from moec.targets.accelerator.chip.families import Family

LOOM = Family("loom", left=("near",), right=("warp_beam",), sums="cloth", vector="near", stages=(2, 3), warps=(1, 2),
              resident=4, resident_threads=64, vector_matmuls=("f32",))
"""
ENTRIES = "[moec.families]\nloom = loom_package:LOOM\n[moec.chips]\nloom-1 = loom_package:CHIP\n"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Install the package for the tests of this file."""
    site = tmp_path_factory.mktemp("site")
    (site / "loom_package.py").write_text(f"{FAMILY}\nCHIP = {str(CHIP)!r}\n", "utf-8")
    (site / "loom_package-1.dist-info").mkdir()
    (site / "loom_package-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: loom-package\nVersion: 1\n")
    (site / "loom_package-1.dist-info/entry_points.txt").write_text(ENTRIES, "utf-8")
    sys.path.insert(0, str(site))
    entry_points_of.cache_clear()
    yield site
    sys.path.remove(str(site))
    sys.modules.pop("loom_package", None)
    entry_points_of.cache_clear()


# first: the package stays installed until the last test of this file
def test_without_the_package_its_chips_are_refused():
    with pytest.raises(MoecError, match='family cannot be "loom"') as caught:
        find_profile(str(CHIP), {})
    assert caught.value.todo == "there are nvidia, amd, ascend, cambricon"


@pytest.fixture(scope="module")
def artifact(package, tmp_path_factory):
    options = {"kernels": "source", "buckets": "4,64"}
    return moec.compile(TINY, target="loom-1", out=tmp_path_factory.mktemp("loom") / "a", options=options)


def test_the_row_is_all_that_kernels_ask(artifact):
    profile, kernels = find_profile("loom-1", {}), read_kernels(artifact.folder)
    assert layout_of(profile).operands == ("near", "warp_beam", "cloth")
    assert layout_of(profile).leave == ("near",) and layout_of(profile).enter == ()
    assert {launch.warps for launch in kernels.launches} <= {1, 2} and kernels.chip["family"] == "loom"
    used = {b.memory for launch in kernels.launches for b in launch.program.buffers.values()}
    assert used == {"near", "warp_beam", "cloth"}


def test_a_model_runs_on_it(artifact):
    """The next token after each of a text, in the simulator with the chip's memories, as on the CPU."""
    text = artifact.tokenizer.encode((ROOT / "compiler/runtime/sample.txt").read_text())[:24]
    ids = np.array([text])
    inputs = ids, np.ones_like(ids), np.arange(len(text))[None]
    cpu = moec.compile(TINY, out=artifact.folder.parent / "cpu").session(threads=1)
    found, wanted = (session.step(*inputs)[0][0] for session in (artifact.session(threads=1), cpu))
    off = np.abs(found - wanted).max(-1) / np.abs(wanted).max()
    assert np.quantile(off, 0.8) <= 0.02, np.sort(off)[-5:]


def test_kernels_for_it_are_run_by_no_gpu(artifact):
    with pytest.raises(MoecError, match="not run by cuda: it is a chip of the family loom"):
        artifact.session(device="cuda")
