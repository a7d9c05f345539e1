"""Artifacts for accelerators run: whole models through the kernels, against transformers."""

import dataclasses
import json
from functools import cache

import gpu_driver
import moec
import numpy as np
import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.runtime.artifact import Artifact
from moec.compiler.runtime.generate import left_pad
from moec.compiler.runtime.reference import Reference
from moec.targets import open_target
from moec.targets.accelerator.artifact.spec import kernel_specs
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.run import slots
from moec.targets.accelerator.run.artifact import read_kernels, read_program
from moec.targets.accelerator.run.graph import Graphs
from moec.targets.accelerator.run.launchers import Compiled, open_launcher
from moec.targets.accelerator.select import dense as select_dense
from moec.targets.accelerator.tile.tiles import Argument
from moec.targets.accelerator.triton.architectures import architecture_of
from places import ROOT, TINY

TARGETS = (
    "nvidia-h200", "ascend-950dt", *(pytest.param(n, marks=pytest.mark.long) for n in ("amd-mi355x", "cambricon-mlu370"))
)  # fmt: skip
TYPICAL, TIE = (
    0.01,
    0.02,
)  # relative to the largest logit: of most tokens, and of choices that are as good as each other


@pytest.fixture(scope="module")
def references():
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    dtypes = (torch.bfloat16, torch.float32)
    models = [load(TINY, dtype=dtype, attn_implementation="eager").eval() for dtype in dtypes]
    return [Reference.of(model, str(TINY)) for model in models]


@pytest.fixture(scope="module")
def open_session(tmp_path_factory):
    """Return a function from a target's name to a session on the tiny model compiled for it, made once."""

    @cache
    def made(target):
        out = tmp_path_factory.mktemp("run") / target
        return moec.compile(TINY, target=target, out=out, options={"kernels": "source"}).session(threads=1)

    return made


@pytest.fixture(scope="module")
def session(open_session):
    return open_session("nvidia-h200")


def compare(found, wanted):
    """Compare logits of tokens [N, V]: rounding to bf16 chooses another expert for a few, and other logits tie."""
    scale = np.abs(wanted).max()
    off = np.abs(found - wanted).max(-1) / scale
    assert np.quantile(off, 0.8) <= TYPICAL, np.sort(off)[-5:]
    rows = np.arange(len(wanted))
    behind = (wanted.max(-1) - wanted[rows, found.argmax(-1)]) / scale
    assert np.mean(behind <= TIE) >= 0.97, np.sort(behind)[-5:]


@pytest.mark.parametrize("target", TARGETS)
def test_prefill_of_one_and_two_sequences_and_cached_steps(target, open_session, references):
    """The prompts begin as text does; 40 and 11 tokens in one batch, with padding, and then one by one."""
    session = open_session(target)
    text = Artifact.open(session.folder).tokenizer.encode((ROOT / "compiler/runtime/sample.txt").read_text())
    one = np.array([text[:1]])
    found, _ = session.step(one, np.ones_like(one), np.zeros_like(one))
    for reference in references:
        compare(found[0], reference.step(one, np.ones_like(one), np.zeros_like(one))[0][0])
    ids, mask, positions = left_pad([text[:40], text[50:61]])
    found, states = session.step(ids, mask, positions)
    wanted, caches = zip(*(r.step(ids, mask, positions) for r in references), strict=True)
    real = mask.astype(bool)
    for logits in wanted:
        compare(found[real], logits[real])
    for count in range(8):
        chosen = wanted[1][:, -1].argmax(-1)[:, None]
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        following = positions[:, -1:] + 1 + count
        found, states = session.step(chosen, mask, following, states)
        both = [r.step(chosen, mask, following, c) for r, c in zip(references, caches, strict=True)]
        wanted, caches = zip(*both, strict=True)
        for logits in wanted:
            compare(found[:, -1], logits[:, -1])
    assert states.length == 48 and len(states) == 8


def test_states_do_not_change_under_the_hands_of_others(session):
    ids = np.array([[5, 9, 17]])
    _, states = session.step(ids, np.ones_like(ids), np.arange(3)[None])
    mask, position = np.ones((1, 4), np.int64), np.array([[3]])
    first, _ = session.step(np.array([[7]]), mask, position, states)
    other, _ = session.step(np.array([[8]]), mask, position, states)
    again, _ = session.step(np.array([[7]]), mask, position, states)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    for given, what in (
        ((np.array([[7]]), np.ones((1, 3)), position, states), "attention_mask has the shape"),
        ((np.array([[5000]]), mask, position, states), "the token 5000 is outside of the vocabulary"),
        ((np.array([[7], [8]]), mask, position, states), "the states are those of 1 rows"),
    ):
        with pytest.raises(MoecError, match=what):
            session.step(*given)


# --- objects, by a stand-in for a driver --------------------------------------------------------------------------


def by_objects(session, folder, monkeypatch, arch, hip=None):
    """Return a session on objects for an architecture, the driver's library and its graphs."""
    suffix = architecture_of(arch).suffix
    found = read_kernels(session.folder)
    launches = []
    for launch in found.launches:
        (folder / f"{launch.name}{suffix}").write_bytes(launch.name.encode())
        entry = {arch: {"file": f"{launch.name}{suffix}", "shared": 64 << 10}}
        launches.append(dataclasses.replace(launch, objects=entry))
    kernels = dataclasses.replace(found, launches=tuple(launches))
    library, graphs = gpu_driver.install(monkeypatch, kernels, hip)
    executor = dataclasses.replace(session.executor, kernels=kernels, launcher=Compiled(folder, kernels, arch))
    return dataclasses.replace(session, executor=executor, graphs=Graphs(executor)), library, graphs


def decode(session, count):
    """Return the logits of a prefill of two tokens and of steps behind it."""
    ids = np.array([[5, 9]])
    found, states = [], None
    for past in range(0, 2 + count):
        if past == 1:
            continue
        new = ids.shape[1]
        logits, states = session.step(ids, np.ones((1, past + new)), np.arange(past, past + new)[None], states, last=1)
        found.append(logits)
        ids = np.array([[40 + past]])
    return np.concatenate(found)


def test_steps_are_replayed_as_a_graph(session, tmp_path, monkeypatch):
    """Caches with room for 6: a step loads, one is captured, two are replayed; then the caches are outgrown."""
    monkeypatch.setattr(slots, "STEP", 6)
    wanted = decode(session, 6)
    graphed, library, graphs = by_objects(session, tmp_path, monkeypatch, "sm_90")
    assert graphed.runs == "a GPU, by the objects for sm_90; steps of one token as a CUDA graph"
    assert np.array_equal(decode(graphed, 6), wanted)
    assert [g.replays for g in graphs] == [3] and library.lanes == 32
    told = library.calls.count("cuGraphExecKernelNodeSetParams")
    assert told == 2 * 2 * 4  # two replays after other tokens; the kernels that append and attend, in four layers
    assert "cuFuncSetAttribute" in library.calls


def test_objects_for_amd(session, tmp_path, monkeypatch):
    graphed, library, graphs = by_objects(session, tmp_path, monkeypatch, "gfx942", hip="7.0")
    assert "launch by launch, since AMD's driver" in graphed.runs
    assert np.array_equal(decode(graphed, 0), decode(session, 0))
    assert {"hipModuleLoadData", "hipModuleGetFunction", "hipModuleLaunchKernel"} == set(library.calls)
    assert library.lanes == 64 and not graphs
    with pytest.raises(MoecError, match="torch is not built for AMD's GPUs"):
        monkeypatch.setattr(torch.version, "hip", None)
        open_launcher("hip", session.folder, read_kernels(session.folder))


# --- what kernels.json says ----------------------------------------------------------------------------------------


def test_another_layout_than_the_op_has_is_refused(monkeypatch):
    """A kernel that stored the heads of q behind the tokens, for attention to read them in front of these."""
    original = select_dense.qk_rope_append

    def other(p, t, layout):
        program = original(p, t, layout)
        y = program.argument("y")
        batch, heads, tokens, width = y.shape
        turned = Argument("y", y.dtype, (batch, tokens, heads, width), y.role)
        return dataclasses.replace(program, arguments=tuple(turned if a is y else a for a in program.arguments))

    monkeypatch.setattr(select_dense, "qk_rope_append", other)
    module = moec.compile(TINY, target="nvidia-h200", stop_after="kernel")
    with pytest.raises(MoecError, match=r"has y as \[B, S, 4, 64\], it is f32\[B, 4, S, 64\]"):
        kernel_specs(module, find_profile("nvidia-h200", {}), (16,))


def test_an_older_artifact_says_what_to_do(session, tmp_path):
    data = json.loads((session.folder / "kernels.json").read_text())
    (tmp_path / "kernels.json").write_text(json.dumps({**data, "schema": 1}))
    with pytest.raises(MoecError, match="schema 1, which an older moec wrote") as caught:
        read_kernels(tmp_path)
    assert caught.value.todo == "compile it again: moec compile SOURCE --target nvidia-h200"
    text = (session.folder / "program.moir").read_text()
    (tmp_path / "program.moir").write_text(text.replace("{act=gated(silu)}", "{act=silu, layout=concat}"))
    with pytest.raises(MoecError, match="has no attribute layout") as caught:
        read_program(tmp_path, read_kernels(session.folder))
    assert caught.value.todo == "compile it again: moec compile SOURCE --target nvidia-h200"
    with pytest.raises(MoecError, match="there is no device gpu"):
        Artifact.open(session.folder).session(device="gpu")


@pytest.mark.parametrize("given", ["", "a", "1,,4", "0,4", "-1"])
def test_buckets_that_are_no_numbers(given):
    with pytest.raises(MoecError, match="buckets cannot be") as caught:
        open_target("nvidia-h200", {"buckets": given})
    assert caught.value.todo == "give numbers, as in 1,16,256"


def test_a_chip_that_is_known_by_a_file_only(session, tmp_path):
    for path in session.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    manifest = json.loads((session.folder / "moec.json").read_text())
    (tmp_path / "moec.json").unlink()
    (tmp_path / "moec.json").write_text(json.dumps({**manifest, "target": "my-chip"}))
    ids = np.array([[5]])
    found, _ = Artifact.open(tmp_path).session(device="simulator").step(ids, np.ones_like(ids), np.zeros_like(ids))
    assert np.array_equal(found, session.step(ids, np.ones_like(ids), np.zeros_like(ids))[0])
    (tmp_path / "kernels.json").unlink()
    with pytest.raises(MoecError):
        Artifact.open(tmp_path).session()
