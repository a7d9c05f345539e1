"""Profiles of accelerators: the shipped ones against their notes, a user's own, and `moec targets` showing them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from moec.compiler.errors import MoecError
from moec.targets.accelerator.chip.chip import FIGURES, GRADES, RULES, TOP, kind_of
from moec.targets.accelerator.chip.profile import FOLDER, find_profile, read_profile, shipped_profiles
from moec.targets.accelerator.chip.quantities import parse_quantity, quantity_text
from moec.targets.accelerator.chip.schema import SCHEMA
from moec_command import invoke

NAMES = [
    "amd-mi300x", "amd-mi325x", "amd-mi350x", "amd-mi355x", "amd-strixhalo", "ascend-910b", "ascend-910c", "ascend-950dt",
    "ascend-950pr", "cambricon-mlu370", "cambricon-mlu590", "nvidia-a100", "nvidia-b200", "nvidia-b300", "nvidia-gb10",
    "nvidia-gb200", "nvidia-gb300", "nvidia-h100", "nvidia-h20", "nvidia-h20-3e", "nvidia-h200", "nvidia-h800",
    "nvidia-l40s", "nvidia-rtx4090", "nvidia-rtx5090", "nvidia-rtx6000ada", "nvidia-rtxpro6000",
]  # fmt: skip
BINS = [(name, variant) for name, profile in shipped_profiles().items() for variant in profile.variants]
KIB, MIB = 1024, 1024**2

OWN = """
family = "ascend"
threads = 1
cores = 20
doc = "my chip"
[memory.gm]
per = "device"
capacity = "64GB"
bandwidth = 1.2e12
[memory.ub]
per = "vector"
capacity = "192KiB"
usable = 131072
[moves]
paths.gm = ["ub"]
[unit.bf16]
peak = "200TFLOPS"
shapes.of = [{ m = [16], n = { first = 16, last = 64, step = 16 }, k = 16 }]
"""


def own(tmp_path: Path, old: str = "", new: str = "") -> Path:
    """Write the user's own chip with one text in place of another."""
    assert old in OWN
    path = tmp_path / "my-chip.toml"
    path.write_text(OWN.replace(old, new) if old else OWN + new, "utf-8")
    return path


# --- what moec brings along ----------------------------------------------------------------------------------------


def test_every_accelerator_of_the_design_has_a_profile():
    assert list(shipped_profiles()) == NAMES
    assert all(profile.name == name for name, profile in shipped_profiles().items())


def origins(profile):
    """Yield the grade and the source of all that a profile says."""
    yield from (figure for figure in profile.figures().values() if figure)
    yield from (unit.origin for unit in profile.units if unit.m)
    yield from (layout.origin for layout in profile.layouts)
    yield from (profile.moves_origin, profile.operands.origin)


@pytest.mark.parametrize(("name", "variant"), [*((name, None) for name in NAMES), *BINS])
def test_every_number_has_a_grade_and_a_source(name, variant):
    profile = find_profile(name, {"variant": variant} if variant else {})
    short = tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))["sources"]
    found = list(origins(profile))
    assert len(found) > 10
    for origin in found:
        assert origin.grade in GRADES and origin.grade != "U"
        assert len(origin.source) > 10 and not set(origin.source.split("; ")) & set(short)  # resolved, not a short name
        assert (origin.grade == "K") == (origin.source == "general knowledge")


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_is_a_whole_chip(name):
    profile = shipped_profiles()[name]
    first = {"nvidia": "dram", "amd": "dram", "ascend": "gm", "cambricon": "gm"}[profile.family.name]
    assert profile.memories[0].name == first and profile.memories[0].per == "device"
    assert profile.memories[0].capacity is not None
    threads = {
        "nvidia": 32,
        "amd": 64,
        "ascend": 1,
        "cambricon": 1,
        "amd-strixhalo": 32,
    }  # RDNA's wavefronts are half as wide
    assert profile.threads == threads.get(name, threads[profile.family.name])
    assert profile.unit("bf16") is not None and profile.unit("bf16").dtype == "bf16"
    assert set(profile.formats) <= {unit.dtype for unit in profile.units}
    assert bool(profile.toolchain) == bool(profile.arch) == (profile.family.name != "cambricon")
    # what the matrix unit reads can be brought there from the device's memory, and what it writes brought back
    reached = {first}
    for _ in profile.memories:
        reached |= {target for source, target in profile.moves if source in reached}
    assert set(profile.operands.left) | set(profile.operands.right) <= reached
    back = {first}
    for _ in profile.memories:
        back |= {source for source, target in profile.moves if target in back}
    assert profile.operands.result in back


# bandwidth GB/s, bf16, fp8 or int8 TFLOPS, fp4 TFLOPS, cores, capacity in GB, of the notes' table
TABLE = {
    "nvidia-h100": (3350, 989.4, 1979, None, 132, 80), "nvidia-h200": (4800, 989.4, 1979, None, 132, 150.8),
    "nvidia-h20": (4000, 148, 296, None, 78, 96), "nvidia-b200": (8000, 2250, 4500, 9000, 148, 191.5),
    "nvidia-b300": (8000, 2250, 4500, 13500, 148, 287.4), "nvidia-gb200": (8000, 2500, 5000, 10000, 152, 186),
    "nvidia-rtx4090": (1008, 165.2, 330.3, None, 128, 24), "nvidia-rtx5090": (1792, 209.5, 419, 1676, 170, 32),
    "nvidia-rtxpro6000": (1792, 503.8, 1007, 2000, 188, 96), "nvidia-gb10": (273, 125, 250, 500, 48, 128),
    "ascend-910b": (1600, 353.9, 707.8, None, 24, 64), "ascend-910c": (3200, 707.8, 1415.6, None, 48, 128),
    "ascend-950pr": (1600, 432, 865, 1730, 32, 128), "ascend-950dt": (4000, 432, 865, 1730, 32, 96),
    "cambricon-mlu370": (614.4, 96, 256, None, 32, 48), "amd-mi300x": (5300, 1307.4, 2614.9, None, 304, 192),
    "amd-mi355x": (8000, 2516.6, 5033, 10066, 256, 288),
    # not of the notes: device queries, aiconfigurator's systems/*.yaml, vendors' pages as the profiles cite them
    "nvidia-a100": (2039, 312, 624, None, 108, 85.2), "nvidia-h800": (3350, 989.4, 1979, None, 132, 85.9),
    "nvidia-h20-3e": (4917, 148, 296, None, 78, 151.4), "nvidia-l40s": (864, 362.05, 733, None, 142, 48.3),
    "nvidia-gb300": (8000, 2500, 5000, 15000, 152, 279), "nvidia-rtx6000ada": (960, 364.2, 728.5, None, 142, 48),
    "amd-mi325x": (6000, 1307.4, 2614.9, None, 304, 256), "amd-mi350x": (8000, 2306.9, 4613.7, 9227, 256, 288),
    "amd-strixhalo": (256, 59.4, 59.4, None, 40, 128),
}  # fmt: skip


def eight_bits(profile):
    return profile.unit("f8e4m3") or profile.unit("i8")


@pytest.mark.parametrize("name", TABLE)
def test_figures_are_those_of_the_notes(name):
    bandwidth, bf16, b8, fp4, cores, capacity = TABLE[name]
    profile = shipped_profiles()[name]
    memory = profile.memories[0].name
    assert profile.need(f"memory.{memory}.bandwidth") == pytest.approx(bandwidth * 1e9)
    assert profile.need(f"memory.{memory}.capacity") == pytest.approx(capacity * 1e9, rel=1e-3)
    assert profile.need("unit.bf16.peak") == pytest.approx(bf16 * 1e12)
    assert eight_bits(profile).peak.value == pytest.approx(b8 * 1e12)
    assert (profile.unit("mxfp4") is None) == (fp4 is None)
    if fp4:
        assert profile.need("unit.mxfp4.peak") == pytest.approx(fp4 * 1e12)
    assert profile.need("cores") == cores


# FLOP for a byte of memory at which a product is bound by compute: bf16, fp8 or int8, fp4; for a byte of the link, fp8
RIDGES = {
    "nvidia-h100": (295, 591, None, 4398), "nvidia-h200": (206, 412, None, 4398), "nvidia-h20": (37, 74, None, 658),
    "nvidia-b200": (281, 562, 1125, 5000), "nvidia-b300": (281, 562, 1688, 5000),
    "nvidia-rtx5090": (117, 234, 935, None), "nvidia-rtxpro6000": (281, 562, 1116, None),
    "nvidia-gb10": (458, 916, 1832, None), "ascend-910b": (221, 442, None, None),
    "ascend-910c": (221, 442, None, 3611), "ascend-950pr": (270, 541, 1081, 858),
    "ascend-950dt variant=36": (122, 243, 486, 965), "ascend-950dt": (108, 216, 432, 858),
    "amd-mi300x": (247, 493, None, 5837), "amd-mi355x": (315, 629, 1258, 9362),
}  # fmt: skip


@pytest.mark.parametrize("name", RIDGES)
def test_ridge_points_are_those_derived_in_the_notes(name):
    bf16, b8, fp4, scale_up = RIDGES[name]
    chip, _, variant = name.partition(" variant=")
    profile = find_profile(chip, {"variant": variant} if variant else {})
    bandwidth = profile.memories[0].bandwidth.value
    eight = (profile.unit("f8e4m3fnuz") or eight_bits(profile)).peak.value
    assert profile.need("unit.bf16.peak") / bandwidth == pytest.approx(bf16, rel=0.01)
    assert eight / bandwidth == pytest.approx(b8, rel=0.01)
    if fp4:
        assert profile.need("unit.mxfp4.peak") / bandwidth == pytest.approx(fp4, rel=0.01)
    if scale_up:
        assert eight / profile.links[0].bandwidth.value == pytest.approx(scale_up, rel=0.01)


def test_memories_of_a_core():
    shared = {"nvidia-h200": 232448, "nvidia-b200": 232448, "nvidia-rtx5090": 101376, "nvidia-rtx4090": 99 * KIB}
    for name, usable in shared.items():
        assert shipped_profiles()[name].need("memory.shared.usable") == usable
    assert shipped_profiles()["nvidia-h200"].need("memory.shared.capacity") == 233472
    assert [shipped_profiles()[f"amd-{n}"].need("memory.lds.usable") for n in ("mi300x", "mi355x")] == [65536, 163840]
    tensor = [p.name for p in shipped_profiles().values() if any(m.name == "tensor" for m in p.memories)]
    assert tensor == ["nvidia-b200", "nvidia-b300", "nvidia-gb200", "nvidia-gb300"]  # the consumer parts have none
    for name, l0c, ub, usable in (
        ("ascend-910b", 128, 192, 192), ("ascend-910c", 128, 192, 192), ("ascend-950pr", 256, 256, 248),
        ("ascend-950dt", 256, 256, 248),
    ):  # fmt: skip
        profile = shipped_profiles()[name]
        sizes = {m.name: m.capacity.value / KIB for m in profile.memories if m.per != "device"}
        assert sizes == {"l1": 512, "l0a": 64, "l0b": 64, "l0c": l0c, "ub": ub}
        assert profile.need("memory.ub.usable") == usable * KIB
        assert [profile.memory(m).align for m in ("ub", "l1", "l0a", "l0b")] == [32, 32, 512, 512]
    for name, nram, wram, sram in (("cambricon-mlu370", 768, 1024, 4096), ("cambricon-mlu590", 512, 512, 2048)):
        profile = shipped_profiles()[name]
        assert [profile.need(f"memory.{m}.capacity") for m in ("nram", "wram", "sram")] == [
            nram * KIB, wram * KIB, sram * KIB,
        ]  # fmt: skip
        assert profile.need("memory.nram.usable") == (nram - 128) * KIB
    assert shipped_profiles()["nvidia-b200"].need("memory.l2.capacity") == 126 * MIB
    assert shipped_profiles()["nvidia-a100"].need("memory.shared.capacity") == 164 * KIB


def test_domains_and_links_of_racks_and_boards():
    domains = {"nvidia-gb200": 72, "nvidia-gb300": 72, "nvidia-b300": 8, "nvidia-h800": 8, "nvidia-a100": 8}
    for name, domain in domains.items():
        assert shipped_profiles()[name].need("link.nvlink.domain") == domain
    assert [shipped_profiles()[f"nvidia-{n}"].need("link.nvlink.bandwidth") for n in ("h800", "h100")] == [2e11, 4.5e11]


def test_paths_of_ascend():
    old, new = set(shipped_profiles()["ascend-910b"].moves), set(shipped_profiles()["ascend-950dt"].moves)
    assert not old & {("ub", "l1"), ("l1", "ub"), ("l0c", "ub")} and {("gm", "l0a"), ("gm", "l0b"), ("l1", "gm")} <= old
    assert {("ub", "l1"), ("l1", "ub"), ("l0c", "ub")} <= new and not new & {("gm", "l0a"), ("gm", "l0b"), ("l1", "gm")}
    orders = [
        next(x.order for x in shipped_profiles()[f"ascend-{n}"].layouts if x.memory == "l0a") for n in ("910b", "950pr")
    ]
    assert orders == ["zZ", "zN"]
    assert shipped_profiles()["ascend-910b"].rule("l0c_buffers") == 2
    assert shipped_profiles()["ascend-910b"].rule("simt_cache_bytes") is None
    assert shipped_profiles()["ascend-950dt"].rule("simt_cache_most_bytes") == 120 * KIB
    # bytes a core and cycle by cores and clock, as in the notes
    assert shipped_profiles()["ascend-910b"].rate("l2", "l1") == pytest.approx(4.75e12, rel=0.01)
    small = find_profile("ascend-950pr", {"variant": "28"})
    assert small.rate("gm", "l2") == pytest.approx(1.25e12, rel=0.01)
    assert small.rate("l2", "l1") == pytest.approx(small.need("memory.l2.bandwidth"))
    assert small.rate("ub", "l0a") is None


def test_shapes_of_instructions():
    hopper = shipped_profiles()["nvidia-h200"]
    assert (hopper.unit("bf16").m, hopper.unit("bf16").n, hopper.unit("bf16").k) == ((64,), tuple(range(8, 257, 8)), 16)
    assert hopper.unit("f8e4m3").k == 32 and hopper.unit("mxfp4") is None
    one, two = (u for u in shipped_profiles()["nvidia-b200"].units if u.dtype == "nvfp4")
    assert (one.m, one.cores, one.k) == ((64, 128), 1, 64) and (two.m, two.cores) == ((128, 256), 2)
    assert {u.m + u.n for u in shipped_profiles()["nvidia-rtx5090"].units} == {(16, 8)}
    wide = [(u.m, u.n, u.k) for u in shipped_profiles()["amd-mi355x"].units if u.dtype == "mxfp4"]
    assert wide == [((16,), (16,), 128), ((32,), (32,), 64)]
    cube = shipped_profiles()["ascend-910b"]
    assert [cube.unit(d).k for d in ("f32", "bf16", "i8", "int4")] == [8, 16, 32, 64]
    bang = shipped_profiles()["cambricon-mlu370"].unit("bf16")
    assert (bang.m, bang.n, bang.k) == ((), (), 1)
    assert shipped_profiles()["amd-mi300x"].unit("f8e4m3") is None  # its FP8 is another one


# --- bins ----------------------------------------------------------------------------------------------------------


def test_bins_of_950():
    bf16 = {"36": 486e12, "32": 432e12, "28": 378e12}
    assert set(shipped_profiles()["ascend-950dt"].variants) == set(bf16)
    for variant, peak in bf16.items():
        profile = find_profile("ascend-950dt", {"variant": variant})
        assert profile.variant == profile.variants[0] == variant and set(profile.variants) == set(bf16)
        assert profile.need("unit.bf16.peak") == peak
        assert profile.need("cores") == int(variant) and profile.need("vector_cores") == 2 * int(variant)
        assert profile.need("unit.bf16.peak") == pytest.approx(
            8192 * profile.need("cores") * profile.need("clock"), 2e-3
        )
        assert profile.need("unit.mxfp8.peak") == {"36": 973e12, "32": 865e12, "28": 756e12}[variant]
        assert profile.need("memory.gm.bandwidth") == 4e12
    card = find_profile("ascend-950pr", {"variant": "28"})
    assert [card.need(f"memory.gm.{key}") for key in ("capacity", "bandwidth")] == [112e9, 1.4e12]
    assert card.need("memory.l2.capacity") == 112 * MIB and card.need("unit.mxfp4.peak") == 1513e12
    assert card.arch == "Ascend950PR_957b"


def test_other_bins():
    four = find_profile("ascend-910b", {"variant": "b4"})
    assert four.need("cores") == 20 and four.arch == "Ascend910B4" and four.need("unit.bf16.peak") == 245.8e12
    server = find_profile("nvidia-rtxpro6000", {"variant": "server"})
    assert server.need("memory.dram.bandwidth") == 1597e9


@pytest.mark.parametrize(("name", "variant"), BINS)
def test_a_bin_is_a_whole_chip(name, variant):
    base, profile = shipped_profiles()[name], find_profile(name, {"variant": variant})
    known = {key for key, figure in base.figures().items() if figure and not key.endswith("measured")}
    assert known == {key for key, f in profile.figures().items() if f and not key.endswith("measured")}


# --- a user's figures ----------------------------------------------------------------------------------------------


def test_options_set_figures():
    options = {"memory.dram.bandwidth": "4.0TB/s", "memory.shared.usable": "100KiB", "launch": "4us", "cores": "100",
               "unit.bf16.peak": "7e14", "link.nvlink.latency": "2us", "rule.registers_per_thread": "128"}  # fmt: skip
    profile = find_profile("nvidia-h200", options)
    values = [4e12, 102400, 4e-6, 100, 7e14, 2e-6, 128]
    assert [profile.need(key) for key in options] == pytest.approx(values)
    assert all(profile.figures()[key].grade == "U" for key in options)
    assert profile.figures()["cores"].source == "-D cores=100"
    # what was measured belongs to the figure that was replaced
    assert profile.memory("dram").measured is None and profile.unit("bf16").measured is None
    assert shipped_profiles()["nvidia-h200"].memory("dram").measured.value == pytest.approx(4.3e12)
    assert find_profile("nvidia-h200", {}) is shipped_profiles()["nvidia-h200"]


def test_an_unknown_figure_that_is_needed():
    profile = shipped_profiles()["cambricon-mlu590"]
    assert profile.memory("gm").bandwidth is None
    with pytest.raises(MoecError) as caught:
        profile.need("memory.gm.bandwidth")
    assert "memory.gm.bandwidth of cambricon-mlu590 is unknown" in caught.value.what
    assert "-D memory.gm.bandwidth=2.0TB/s" in caught.value.todo and ".toml" in caught.value.todo
    given = find_profile("cambricon-mlu590", {"memory.gm.bandwidth": "2.0TB/s"})
    assert given.need("memory.gm.bandwidth") == 2e12
    with pytest.raises(MoecError, match=r"has no figure memory\.gm\.bandwith") as caught:
        profile.need("memory.gm.bandwith")
    assert "memory.gm.bandwidth" in caught.value.todo
    with pytest.raises(MoecError, match="has no memory 'l9'"):
        profile.memory("l9")


@pytest.mark.parametrize(
    ("key", "value", "what", "todo"),
    [
        ("memory.dram.bandwith", "2TB/s", "memory.dram.bandwith is no figure", "memory.dram.bandwidth"),
        ("memory.gm.bandwidth", "2TB/s", "memory.gm.bandwidth is no figure", "memory.dram.bandwidth"),
        ("core", "3", "core is no figure", "did you mean cores"),
        ("memory.dram.bandwidth", "2TB", "memory.dram.bandwidth is in bytes/s, as in 2.0TB/s, not '2TB'", ""),
        ("memory.dram.bandwidth", "fast", "memory.dram.bandwidth must be a number or a text such as 2.0TB/s", ""),
        ("memory.dram.bandwidth", "-2TB/s", "memory.dram.bandwidth must be greater than 0", ""),
        ("memory.dram.bandwidth", "4800", "memory.dram.bandwidth cannot be 4800 bytes/s", ""),
        ("cores", "1.5", "cores must be a whole number", ""),
        ("variant", "36", "nvidia-h200 has no variant '36'", "no variants"),
    ],
)
def test_options_that_cannot_be(key, value, what, todo):
    with pytest.raises(MoecError) as caught:
        find_profile("nvidia-h200", {key: value})
    assert caught.value.what.startswith(what) and todo in caught.value.todo
    assert caught.value.where == f"-D {key}={value}" and caught.value.exit_code == 2


def test_a_chip_of_ones_own(tmp_path):
    profile = find_profile(str(own(tmp_path)), {"cores": "24"})
    assert profile.name == "my-chip" and profile.doc == "my chip" and profile.toolchain is None
    assert profile.need("memory.gm.bandwidth") == 1.2e12 and profile.need("memory.ub.usable") == 131072
    assert profile.need("cores") == 24 and profile.moves == (("gm", "ub"),)
    assert profile.unit("bf16").n == (16, 32, 48, 64)
    assert profile.figures()["memory.gm.capacity"].grade == "U"
    assert profile.figures()["memory.gm.capacity"].source == "my-chip.toml"
    assert read_profile(own(tmp_path)).need("cores") == 20


BAD = [
    ("family = \"ascend\"\n", "", "family is missing"),
    ("threads = 1\n", "", "threads is missing"),
    ("per = \"vector\"\n", "", "memory.ub.per is missing"),
    ("bandwidth = 1.2e12", "bandwidth = -1.2e12", "memory.gm.bandwidth must be greater than 0, not -1200000000000.0"),
    ("bandwidth = 1.2e12", "bandwidth = 0", "memory.gm.bandwidth must be greater than 0"),
    ("bandwidth = 1.2e12", "bandwidth = nan", "memory.gm.bandwidth must be a finite number"),
    ("bandwidth = 1.2e12", "bandwidth = 1200", "memory.gm.bandwidth cannot be 1200 bytes/s"),
    ("bandwidth = 1.2e12", "bandwidth = true", "memory.gm.bandwidth must be a number or a text or a table, not true"),
    ("bandwidth = 1.2e12", "bandwidth = \"fast\"", "memory.gm.bandwidth must be a number or a text such as 2.0TB/s"),
    ("bandwidth = 1.2e12", "bandwidth = \"3GB\"", "memory.gm.bandwidth is in bytes/s"),
    ("bandwidth = 1.2e12", "bandwidth = { value = 1.2e12, grade = \"P\" }", "memory.gm.bandwidth.source is missing"),
    ("bandwidth = 1.2e12", "bandwidth = { value = 1.2e12, grade = \"A\", source = \"x\" }",
     "memory.gm.bandwidth.grade cannot be \"A\""),
    ("bandwidth = 1.2e12", "bandwith = 1.2e12", "memory.gm.bandwith is no key of a profile"),
    ("family", "famly", "famly is no key of a profile"),
    ("\"ascend\"", "\"ascent\"", "family cannot be \"ascent\""),
    ("usable = 131072", "usable = \"193KiB\"", "memory.ub.usable is larger than memory.ub.capacity"),
    ("usable = 131072", "usable = 1000.5", "memory.ub.usable must be a whole number of bytes"),
    ("cores = 20", "cores = 20.5", "cores must be a whole number"),
    ("cores = 20", "cores = 20\nclock = 1.8", "clock cannot be 1.8 Hz"),
    ("paths.gm = [\"ub\"]", "paths.gm = [\"l1\"]", "moves.paths names a memory 'l1' that is not there"),
    ("[unit.bf16]", "[unit.bf61]", "unit.bf61 is no key of a profile"),
    ("m = [16]", "m = [0]", "unit.bf16.shapes.of.0.m.0 must be at least 1"),
    ("m = [16]", "m = []", "unit.bf16.shapes.of.0.m: "),
    ("step = 16", "step = 10", "unit.bf16.shapes n cannot go from 16 to 64 in steps of 10"),
    ("doc = ", "toolchain = \"triton\"\ndoc = ", "arch is missing"),
    ("threads = 1", "threads 1", "the profile is not TOML"),
    ("[unit.bf16]", "[operands]\nleft = [\"l0a\"]\nright = [\"ub\"]\nresult = \"ub\"\n[unit.bf16]",
     "operands names a memory 'l0a' that is not there"),
    ("capacity = \"64GB\"", "measured = \"2TB/s\"", "memory.gm.measured is larger than memory.gm.bandwidth"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "what"), BAD, ids=[f"{b[2][:40]}-{i}" for i, b in enumerate(BAD)])
def test_a_toml_that_cannot_be(old, new, what, tmp_path):
    path = own(tmp_path, old, new)
    with pytest.raises(MoecError) as caught:
        read_profile(path)
    assert caught.value.what.startswith(what)
    assert caught.value.where == str(path) and caught.value.exit_code == 2


def test_a_misspelt_key_comes_with_a_suggestion(tmp_path):
    with pytest.raises(MoecError, match="did you mean bandwidth"):
        read_profile(own(tmp_path, "bandwidth = ", "bandwith = "))
    with pytest.raises(MoecError, match="did you mean ascend"):
        read_profile(own(tmp_path, '"ascend"', '"ascent"'))
    with pytest.raises(MoecError, match="cannot be read"):
        read_profile(tmp_path / "gone.toml")


def test_bins_of_ones_own(tmp_path):
    bins = 'variant = "big"\n[variants.small]\ncores = 10\nunit.bf16.peak = "100TFLOPS"\n[memory.gm]'
    path = str(own(tmp_path, "[memory.gm]", bins))
    assert find_profile(path, {"variant": "small"}).need("unit.bf16.peak") == 1e14
    assert find_profile(path, {"variant": "big"}).need("cores") == 20
    with pytest.raises(MoecError, match="has no variant 'tiny'") as caught:
        find_profile(path, {"variant": "tiny"})
    assert caught.value.todo == "variants: big, small"
    path = str(own(tmp_path, "[memory.gm]", bins.replace("cores = 10", "core = 10")))
    with pytest.raises(MoecError, match=r"variants\.small\.core is no figure of this profile"):
        find_profile(path, {"variant": "small"})
    path = str(own(tmp_path, "[memory.gm]", bins.replace("cores = 10", "cores = [10]")))
    with pytest.raises(MoecError, match="cores must be a number or a text or a table"):
        find_profile(path, {"variant": "small"})


# --- quantities, and the schema beside the code --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("228KiB", "bytes", 233472), ("228KB", "bytes", 228000), ("1.5 GB", "bytes", 1.5e9), ("0.3GB", "bytes", 3e8),
        ("4.8TB/s", "bytes/s", 4.8e12), ("4800 GB/s", "bytes/s", 4.8e12), ("1e12", "bytes/s", 1e12),
        ("989.4TFLOPS", "FLOP/s", 989.4e12), ("2 POPS", "FLOP/s", 2e15), ("1.2us", "s", 1.2e-6),
        ("1.65GHz", "Hz", 1.65e9), ("132", "count", 132), (132, "count", 132),
    ],
)  # fmt: skip
def test_quantities(text, kind, value):
    assert parse_quantity(text, kind) == pytest.approx(value, rel=1e-12)
    assert parse_quantity(quantity_text(value, kind).replace(",", "").replace(" ", ""), kind) == pytest.approx(
        value, rel=1e-5
    )


def test_the_schema_knows_the_figures_of_the_code():
    properties = json.loads(SCHEMA.read_text("utf-8"))["properties"]
    assert set(properties["rule"]["properties"]) == set(RULES)
    assert set(TOP) < set(properties)
    for table, figures in FIGURES.items():
        assert set(figures) == set(properties[table]["additionalProperties"]["properties"]) - {"per", "shapes"}
    keys = [key for profile in shipped_profiles().values() for key in profile.figures()]
    assert all(kind_of(key) for key in keys)
    assert {key.removeprefix("rule.") for key in keys if key.startswith("rule.")} == set(RULES)  # none without a chip


# --- the command ---------------------------------------------------------------------------------------------------


def test_targets_lists_the_accelerators():
    rows = {row["name"]: row for row in json.loads(invoke("targets", "--json").stdout)}
    assert {"cpu", *NAMES} <= set(rows)
    assert len({tuple(row) for row in rows.values()}) == 1
    text = invoke("targets").stdout
    assert "NVIDIA H200 SXM: 151 GB at 4,800 GB/s, 989.4 TFLOPS bf16; kernels compiled for sm_90" in text
    assert "unknown bandwidth, bf16 peak unknown; kernels as source" in text
    assert max(map(len, text.splitlines()[2:])) < 200


def test_targets_shows_a_profile():
    text = invoke("targets", "nvidia-b200").stdout
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["memory.dram.bandwidth"][:3] == ["8,000", "GB/s", "S"]
    assert rows["memory.shared.capacity"][:2] == ["228", "KiB"]
    number = rows["memory.dram.bandwidth"][3]
    assert f"\n  {number} https://glennklockwood.com/garden/processors/B200\n" in text
    assert "\nunknown: clock, launch, memory.l2.bandwidth" in text and "K general knowledge" in text
    (found,) = json.loads(invoke("targets", "nvidia-b200", "--json").stdout)
    peak = next(row for row in found["figures"] if row["figure"] == "unit.nvfp4.peak")
    assert peak["value"] == 9e15 and peak["unit"] == "FLOP/s" and peak["grade"] == "S" and "http" in peak["source"]
    assert "launch" in found["unknown"]
    assert all(row["grade"] and row["source"] for key in ("figures", "units", "layouts") for row in found[key])


@pytest.mark.parametrize("name", NAMES)
def test_targets_shows_every_profile(name):
    text = invoke("targets", name).stdout
    figures = [key for key, figure in shipped_profiles()[name].figures().items() if figure]
    shown = [line.split()[0] for line in text.splitlines() if line]
    assert set(figures) <= set(shown)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_targets_with_options_and_a_file(tmp_path):
    (found,) = json.loads(invoke("targets", "ascend-950dt", "-D", "variant=36", "-D", "launch=3us", "--json").stdout)
    figures = {row["figure"]: row for row in found["figures"]}
    assert found["variant"] == "36" and figures["cores"]["value"] == 36 and figures["launch"]["value"] == 3e-6
    assert figures["launch"]["grade"] == "U" and "launch" not in found["unknown"]
    text = invoke("targets", own(tmp_path)).stdout
    assert text.startswith(
        "my chip: 64 GB at 1,200 GB/s, 200 TFLOPS bf16; kernels as source and simulation, checked by no compiler\n"
    )
    assert "\n  1 my-chip.toml\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nvidia-b20"], "error: there is no target 'nvidia-b20'\n  did you mean nvidia-b20"),
        (["nvidia-h200", "-D", "core=3"], "error: core is no figure of this profile\n  at -D core=3\n  did you mean"),
        (["nvidia-h200", "--probe"], "error: target nvidia-h200 has no probe"),
        (["gone.toml"], "error: the profile cannot be read: No such file"),
        (["cpu", "-D", "cores=3"], "Usage: "),
        (["-D", "cores=3"], "Usage: "),
        (["nvidia-h200", "-D", "cores"], "Usage: "),
    ],
)
def test_wrong_use_of_targets(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("targets", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(message)


def test_a_bad_file_is_one_error(tmp_path):
    path = own(tmp_path, "bandwidth = 1.2e12", "bandwith = -1\nusable = 'x'")
    result = invoke("targets", path)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == (
        f"error: memory.gm.bandwith is no key of a profile\n  at {path}\n  did you mean bandwidth?\n"
    )


def test_profiles_cost_nothing_until_they_are_read():
    code = (
        "import sys, moec.targets, moec.targets.accelerator.chip.profile as p; "
        "print(sorted({'jsonschema', 'tomllib', 'torch'} & set(sys.modules))); "
        "p.find_profile('nvidia-b200', {}); print(p.shipped_profiles.cache_info().currsize, p._shipped_profile.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "0 1"]
