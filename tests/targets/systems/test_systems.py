"""Systems as data: every figure has a source, files of a user's own are checked key by key, and names are found."""

import pytest
from moec.compiler.errors import MoecError
from moec.targets.systems.graph import all_to_all
from moec.targets.systems.read import find_system, read_system, system_names

OWN = """
device = "nvidia-h200"
devices = 4

[fabric.pcie]
bandwidth = "55GB/s"

[host]
memory = "1TB"
bandwidth = "300GB/s"
"""


@pytest.mark.parametrize("name", system_names())
def test_figures_have_a_grade_and_a_source(name):
    system = find_system(name)
    assert system.name == name
    assert system.doc
    assert all(figure.grade in "PTMSDK" and figure.source for figure in system.figures().values())
    assert system.device.peak("bf16") > 1e12
    if system.devices > 1:
        assert all_to_all(system, min(system.devices, 16)).seconds > 0


def test_own_file(tmp_path):
    file = tmp_path / "box.toml"
    file.write_text(OWN)
    system = find_system(str(file))
    assert (system.name, system.devices, system.fabrics[0].span) == ("box", 4, 4)
    assert system.fabrics[0].bandwidth.value == 55e9
    assert system.host.memory.value == 1e12
    assert system.figures()["fabric.pcie.bandwidth"].grade == "U"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("devices = 4", "devices = 0", "devices must be a whole number"),
        ('device = "nvidia-h200"', "", "device is missing"),
        ("[fabric.pcie]", '[fabric.pcie]\nshape = "torus"', "fabric.pcie.shape must be one of"),
        ("[fabric.pcie]", "[fabric.pcie]\nspan = 2", "no fabric joins all 4 devices"),
        ('"55GB/s"', '"55GB"', "fabric.pcie.bandwidth is in bytes/s"),
        ('memory = "1TB"', "", "host.memory is missing"),
        ("[host]", "[host]\nmemroy = 1", "host.memroy is no key of a system"),
        ('"1TB"', '{ value = "1TB", grade = "Z" }', "host.memory.grade must be one of"),
        ("[fabric.pcie]", "[fabric.pcie", "the system is not TOML"),
        ('"nvidia-h200"', '"nvidia-h2000"', "no accelerator 'nvidia-h2000'"),
    ],
)
def test_impossible_files_are_refused_by_key(tmp_path, old, new, said):
    file = tmp_path / "box.toml"
    file.write_text(OWN.replace(old, new))
    with pytest.raises(MoecError, match=said.replace(".", r"\.")):
        read_system(file)


def test_profiles_by_number():
    assert find_system("nvidia-h200:8").name == "hgx-h200"
    assert find_system("nvidia-gb200:36").devices == 36
    own = find_system("nvidia-h20:16")  # no shipped system has it: its links say how they are joined
    assert [(f.name, f.span) for f in own.fabrics] == [("nvlink", 8), ("nic", 16)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nvidia-h200:x", "number of devices"),
        ("hgx-h300", "did you mean"),
        ("hgx-h200:9", "has 8 devices, not 9"),
        ("nowhere.toml", "cannot be read"),
    ],
)
def test_unknown_systems(name, said):
    with pytest.raises(MoecError, match=said):
        find_system(name)


def test_this_machine_is_measured():
    here = find_system("here")
    assert here.unified and here.devices == 1
    assert 1e8 < here.device.bandwidth.value < 1e13
    assert 1e8 < here.device.peak("bf16") < 1e15
    assert {figure.grade for figure in here.figures().values()} == {"M"}
