"""moec's own kernels in artifacts: what is written and said of them, what runs them, what compiles them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import moec
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from moec.compiler.cli import main
from moec.compiler.errors import MoecError
from moec.targets.cpu.kernels import library
from moec.targets.cpu.kernels.processor import describe_processor
from places import TINY

NONE, PLAIN = "none", "plain"  # what MOEC_CPU_KERNELS may ask for, beside what the processor has


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    if library.find_compiler() is None or library.this_platform() is None:
        pytest.skip("ziglang is not installed, or moec has no kernels for this platform")
    folder = tmp_path_factory.mktemp("own") / "out"
    moec.compile(TINY, out=folder, quantize="int4")
    return folder


def domains_of(folder):
    """Return how many nodes the model has of each domain but ONNX's own."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return Counter(node.domain for node in model.graph.node if node.domain)


def test_an_artifact_says_which_kernels_it_has(artifact):
    manifest = json.loads((artifact / "moec.json").read_text())
    said = manifest["cpu_kernels"]
    assert said["operators"] == {
        "GroupQueryAttentionF16": 4,
        "MatMulNBits": 9,
        "QMoE": 4,
    }  # q, k, v and output of 4 layers in 2 each, and the head
    assert said["compiler"].startswith("ziglang ")
    assert sorted(said["libraries"]) == sorted(library.PLATFORMS)
    for name, entry in said["libraries"].items():
        content = (artifact / entry["file"]).read_bytes()
        assert entry["sha256"] == manifest["files"][entry["file"]] == hashlib.sha256(content).hexdigest()
        assert content.startswith(BEGINNINGS[name])


# what a library of each platform begins with: the format, its class and byte order
BEGINNINGS = {
    "linux-x86_64": b"\x7fELF\x02\x01", "linux-aarch64": b"\x7fELF\x02\x01", "macos-aarch64": b"\xcf\xfa\xed\xfe",
    "windows-x86_64": b"MZ",
}  # fmt: skip


def test_the_library_of_this_platform_is_named_for_genai(artifact):
    config = json.loads((artifact / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == library.this_platform().file


def test_without_ziglang_an_artifact_has_the_operators_of_onnx_runtime(monkeypatch, tmp_path):
    moec.compile(TINY, out=tmp_path / "wanted", quantize="int4", options={"kernels": "onnxruntime"})
    without_ziglang(monkeypatch)
    made = moec.compile(TINY, out=tmp_path / "out", quantize="int4")
    assert made.report["figures"]["notes"] == [
        "ONNX Runtime's operators compute, without moec's kernels, which are faster: the package ziglang is not installed"
    ]
    assert made.manifest["cpu_kernels"] == {"onnxruntime": {"the package ziglang is not installed": 17}}
    files = {path.name for path in made.folder.iterdir()}
    assert files == {path.name for path in (tmp_path / "wanted").iterdir()}
    for name in files - {"moec.json"}:
        assert (made.folder / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes(), name
    assert set(domains_of(made.folder)) == {"com.microsoft"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantize": "f32"}, None),
        ({"quantize": "int4", "accuracy": "exact"}, {"onnxruntime": {"activations stay in f32 there": 13}}),
    ],
)
def test_what_rounds_no_activations_keeps_the_operators_of_onnx_runtime(settings, said, tmp_path):
    made = moec.compile(TINY, out=tmp_path / "out", **settings)
    assert made.manifest.get("cpu_kernels") == said
    assert not list(made.folder.glob("moec-kernels.*"))
    assert "moec" not in domains_of(made.folder)


@pytest.mark.parametrize(
    ("asked", "said"), [(PLAIN, "moec's kernels for plain"), (NONE, "ONNX Runtime's operators: this")]
)
def test_debugging_says_what_computes(artifact, asked, said, monkeypatch):
    monkeypatch.setenv("MOEC_CPU_KERNELS", asked)
    done = CliRunner().invoke(main, ["run", str(artifact), "--tokens", "1,2", "--max-new-tokens", "1", "--debug"])
    assert done.exit_code == 0, done.output
    assert f"quantized layers: {said}" in done.stderr
    assert (
        "quantized layers"
        not in CliRunner().invoke(main, ["run", str(artifact), "--tokens", "1,2", "--max-new-tokens", "1"]).stderr
    )


TOKENS = np.random.default_rng(5).integers(0, 2048, (1, 96))


def logits_of(artifact, **options):
    mask, positions = np.ones_like(TOKENS), np.arange(TOKENS.shape[1])[None]
    return artifact.session(**options).step(TOKENS, mask, positions)[0]


def test_the_kernels_are_as_close_to_exact_numbers_as_onnx_runtime(artifact, monkeypatch):
    # numbers that round to the other side move everything after them, so that the two cannot be compared directly
    opened = moec.load(artifact)
    exact, own = logits_of(opened, accuracy="exact"), logits_of(opened)
    monkeypatch.setenv("MOEC_CPU_KERNELS", NONE)
    other = logits_of(opened)
    assert np.abs(own[:, 0] - other[:, 0]).max() < 1e-4
    errors = [np.square(found - exact).mean() for found in (own, other)]
    assert errors[0] < 1.2 * errors[1]
    assert (own.argmax(-1) == other.argmax(-1)).mean() > 0.95


def test_a_plain_session_takes_the_model(artifact):
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(artifact / "model.onnx"))
    assert {n.op_type for n in model.graph.node if n.domain == "moec"} == {
        "GroupQueryAttentionF16", "QMoE", "MatMulNBits",
    }  # fmt: skip
    onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("change", ["other", "short", "gone"])
def test_a_changed_library_is_refused(artifact, tmp_path, change):
    folder = tmp_path / "out"
    shutil.copytree(artifact, folder)
    path = folder / library.this_platform().file
    content = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if change == "short" else content[:-1] + b"\x01")
    with pytest.raises(MoecError, match=r"not as it was written|lacks"):
        moec.load(folder).session()


def test_the_processor_is_described(artifact, monkeypatch):
    """What Linux says of the same machine."""
    found = describe_processor()
    assert found["instruction_sets"][-1] == PLAIN and found["runs"] in found["instruction_sets"]
    if sys.platform == "linux":
        assert found["processors"] == len(os.sched_getaffinity(0))
        flags = Path("/proc/cpuinfo").read_text()
        for flag, name in (("avx2", "avx2"), ("avx512_vnni", "avx512-vnni"), ("asimddp", "neon-dotprod")):
            assert (name in found["instruction_sets"]) == (re.search(rf"\b{flag}\b", flags) is not None)
    if sizes := cache_sizes_of_linux():
        assert found["cache_bytes"] == sizes
    monkeypatch.setenv("MOEC_CPU_KERNELS", NONE)
    assert describe_processor()["runs"] is None
    without_ziglang(monkeypatch)
    assert describe_processor() == {"none": "the package ziglang is not installed"}


def cache_sizes_of_linux():
    """Return the bytes of the caches that hold data, by level, as the system's files have them."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "type").read_text().strip() != "Instruction":
            sizes[int((index / "level").read_text())] = (
                int((index / "size").read_text().strip().removesuffix("K")) * 1024
            )
    return [sizes[level] for level in sorted(sizes)]


# --- the same tokens by whatever runs the model ---------------------------------------------------------------------

PROMPT, NEW = [12, 7, 99, 100], 16

GENAI = """
import json, sys
import onnxruntime_genai as genai

model = genai.Model(sys.argv[1])
prompt, new = json.loads(sys.argv[2])
settings = genai.GeneratorParams(model)
settings.set_search_options(max_length=len(prompt) + new, do_sample=False)
generator = genai.Generator(model, settings)
generator.append_tokens(prompt)
tokens = []
while not generator.is_done():
    generator.generate_next_token()
    tokens.append(int(generator.get_next_tokens()[0]))
print(json.dumps(tokens))
"""


def tokens_of_plain_session(folder, library_file=None):
    """Return the likeliest tokens by ONNX Runtime alone, without a cache from step to step; with a library if one is named."""
    options = onnxruntime.SessionOptions()
    if library_file:
        options.register_custom_ops_library(str(folder / library_file))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    states = json.loads((folder / "moec.json").read_text())["states"]
    dtypes = {"f32": np.float32, "f16": np.float16}
    empty = {s["past"]: np.zeros([{"B": 1, "P": 0}.get(n, n) for n in s["shape"]], dtypes[s["dtype"]]) for s in states}
    tokens = list(PROMPT)
    for _ in range(NEW):
        ids = np.array([tokens])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[None]}
        tokens.append(int(session.run(["logits"], {**feeds, **empty})[0][0, -1].argmax()))
    return tokens[len(PROMPT) :]


def tokens_of_genai(folder):
    done = subprocess.run(
        [sys.executable, "-c", GENAI, folder, json.dumps([PROMPT, NEW])], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("accuracy", ["fast", "exact"])
def test_whatever_runs_the_model_gives_the_same_tokens(artifact, accuracy, tmp_path):
    folder = artifact
    if accuracy == "exact":
        folder = moec.compile(TINY, out=tmp_path / "out", quantize="int4", accuracy="exact").folder
    wanted = moec.load(folder).run(tokens=PROMPT, max_new_tokens=NEW, greedy=True, eos=()).tokens[0]
    assert tokens_of_plain_session(folder) == wanted
    if accuracy == "fast":
        assert tokens_of_plain_session(folder, library.this_platform().file) == wanted
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("ONNX Runtime GenAI is not installed: pip install onnxruntime-genai")
    assert tokens_of_genai(folder)[: len(wanted)] == wanted[: len(tokens_of_genai(folder))]


def test_genai_says_what_is_wrong_with_a_foreign_library(artifact, tmp_path):
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("ONNX Runtime GenAI is not installed: pip install onnxruntime-genai")
    shutil.copytree(artifact, tmp_path / "out")
    (tmp_path / "out" / library.this_platform().file).write_bytes(b"MZ no library of this platform")
    with pytest.raises(AssertionError, match="Failed to load library"):
        tokens_of_genai(tmp_path / "out")


# --- compiling ---------------------------------------------------------------------------------------------------


SMALL = ("library.c", "linear.c", "processor.c", "weights.c")  # compiled in a few seconds, all sources in half a minute


def compile_copy(folder, sources, place, monkeypatch):
    """Return the hash of the library of some sources and all headers, copied into a folder and compiled with no cache."""
    left_out = {path.name for path in library.SOURCES.glob("*.c")} - set(sources)
    with monkeypatch.context() as patch:
        shutil.copytree(library.SOURCES, folder, ignore=lambda _, names: left_out & set(names))
        patch.setenv("XDG_CACHE_HOME", f"{folder} cache")
        patch.setattr(library, "SOURCES", folder)
        return hashlib.sha256(library.compile_library(place, library.find_compiler())).digest()


def test_the_same_sources_give_the_same_bytes_in_another_folder(tmp_path, monkeypatch):
    place, folders = library.PLATFORMS["linux-x86_64"], [tmp_path / name for name in ("source", "a folder/source")]
    one, other = (compile_copy(folder, SMALL, place, monkeypatch) for folder in folders)
    assert one == other


@pytest.mark.long
@pytest.mark.parametrize("name", library.PLATFORMS)
def test_all_sources_give_the_same_bytes_for_each_platform(name, tmp_path, monkeypatch):
    place, sources = library.PLATFORMS[name], {path.name for path in library.SOURCES.glob("*.c")}
    before = library.compile_library(place, library.find_compiler())
    assert compile_copy(tmp_path / "a folder/source", sources, place, monkeypatch) == hashlib.sha256(before).digest()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernels": "fast"}, "there are no kernels fast"),
        ({"kernels": "moec", "platforms": "linux-x86_64,amiga"}, "there is no platform amiga"),
        ({"kernels": "moec", "cc": "no-such-compiler"}, "no-such-compiler does not run"),
        ({"kernels": "moec", "cc": f"{sys.executable} -c raise(SystemExit(3))"}, "does not run"),
        ({"kernels": "onnxruntime", "cc": "gcc"}, "-D cc= is for kernels of moec's own"),
        ({"speed": "high"}, "target cpu has no option speed"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(options, said, tmp_path):
    with pytest.raises(MoecError, match=said):
        moec.compile(tmp_path / "no checkpoint", out=tmp_path / "out", options=options)


def test_a_library_of_the_cache_that_is_not_whole_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        library, "_run_compiler", lambda command, *_: Path(command[command.index("-o") + 1]).write_bytes(b"made")
    )
    place, compiler = library.this_platform(), library.find_compiler()
    assert library.compile_library(place, compiler) == b"made"
    (kept,) = (tmp_path / "moec" / "kernels").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert library.compile_library(place, compiler) == b"made"


def test_kernels_that_do_not_compile_are_left_out_unless_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "OPTIONS", ("-no-such-option",))
    made = moec.compile(TINY, out=tmp_path / "out", quantize="int4")
    assert "do not compile" in made.report["figures"]["notes"][0]
    # the operator on a cache of f16 was chosen before; it is a function of the model
    assert domains_of(made.folder)["moec"] == 4 and domains_of(made.folder)["com.microsoft"] > 0
    with pytest.raises(MoecError, match="do not compile"):
        moec.compile(TINY, out=tmp_path / "out", quantize="int4", options={"kernels": "moec"})


def without_ziglang(monkeypatch):
    monkeypatch.setitem(sys.modules, "ziglang", None)  # importing it is an error then


def test_without_ziglang_the_error_says_what_to_install(monkeypatch, tmp_path):
    without_ziglang(monkeypatch)
    with pytest.raises(MoecError, match="ziglang is not installed"):
        moec.compile(TINY, out=tmp_path / "out", quantize="int4", options={"kernels": "moec"})
