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
from moec.compiler.ir.dims import evaluate
from moec.compiler.runtime.artifact import Artifact
from moec.compiler.runtime.generate import left_pad
from moec.compiler.runtime.reference import Reference
from moec.targets import open_target
from moec.targets.accelerator.artifact.spec import kernel_specs
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.predict.work import state_bytes
from moec.targets.accelerator.run import slots
from moec.targets.accelerator.run.artifact import read_kernels, read_program
from moec.targets.accelerator.run.graph import Graphs
from moec.targets.accelerator.run.launchers import Compiled, open_launcher
from moec.targets.accelerator.select import dense as select_dense
from moec.targets.accelerator.select.step import predict_step
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


# --- caches in 8 bits ----------------------------------------------------------------------------------------------


def divergences(found, wanted):
    """Return the Kullback-Leibler divergence of the next token's chances from those wanted, at each token."""
    one, other = (torch.tensor(x).double().log_softmax(-1) for x in (wanted, found))
    return (one.exp() * (one - other)).sum(-1).numpy()


@pytest.mark.parametrize("target", ["nvidia-h200", pytest.param("amd-mi325x", marks=pytest.mark.long)])
def test_caches_in_eight_bits_are_near_those_in_bf16(target, session, references, tmp_path, monkeypatch):
    """What README.md says of tiny-moe: a prompt, and cached steps while caches are outgrown, beside caches in bf16."""
    monkeypatch.setattr(slots, "STEP", 44)
    options = {"kernels": "source", "buckets": "4,64"}
    artifact = moec.compile(TINY, target=target, out=tmp_path / "a", kv="fp8", options=options)
    assert artifact.lossy and {state["stored"] for state in artifact.manifest["states"]} == {"fp8"}
    runners = (artifact.session(threads=1), session, references[1])
    text = artifact.tokenizer.encode((ROOT / "compiler/runtime/sample.txt").read_text())
    found, states = [[], [], []], [None] * 3
    for start, stop in ((0, 40), *((i, i + 1) for i in range(40, 48))):
        ids, mask = np.array([text[start:stop]]), np.ones((1, stop), np.int64)
        both = [r.step(ids, mask, np.arange(start, stop)[None], s) for r, s in zip(runners, states, strict=True)]
        for rows, (logits, _) in zip(found, both, strict=True):
            rows.append(logits[0])
        states = [after for _, after in both]
    eight, sixteen, exact = map(np.concatenate, found)
    assert np.mean(eight.argmax(-1) == exact.argmax(-1)) >= 0.9
    off, wide = divergences(eight, exact), divergences(sixteen, exact)
    assert np.median(wide) < np.median(off) < 0.003 and off.mean() < 0.008
    held = states[0].held
    assert {h.buffer.dtype for h in held} == {torch.float8_e4m3fn}
    # 8 bits a number and a scale a head, as the step's prediction has it
    module = read_program(artifact.folder, read_kernels(artifact.folder))
    assert json.loads((artifact.folder / "plan.json").read_text())["state"]["bytes_per_token"] == 8 * 2 * (64 + 4)
    assert evaluate(state_bytes(module), {"B": 1, "P": 100}) == 8 * 2 * 100 * (64 + 4)
    predicted = [predict_step(m, find_profile(target, {}), past=2000) for m in (module, session.executor.module)]
    attended = [sum(r.states for r in p.rows if r.op.endswith(".attention")) for p in predicted]
    assert attended[0] == pytest.approx(attended[1] * (64 + 4) / 128)
    moved = [sum(r.device_bytes for r in p.rows if r.op.endswith(".attention")) for p in predicted]
    assert moved[0] < 0.6 * moved[1]


def test_a_state_in_eight_bits_stays_as_it_is():
    """Who appends to an older state gets a copy, of the scales too; what reads no codes gets numbers."""
    first = slots.with_room(torch.zeros(1, 1, 0, 4), 2, 2, torch.float8_e4m3fn)
    first.buffer[:, :, :2], first.part("scales", torch.float32)[:, :, :2] = 2.0, 0.5
    newer, copy = (slots.with_room(first, 2, 3, torch.float8_e4m3fn) for _ in range(2))
    assert newer.buffer is first.buffer and copy.buffer is not first.buffer
    copy.part("scales", torch.float32)[:] = 8.0
    assert (first.tensor == 1.0).all() and first.tensor.shape == (1, 1, 2, 4)
    grown = slots.with_room(newer, 2, 1 + newer.buffer.shape[2], torch.float8_e4m3fn)
    assert (grown.tensor[:, :, :2] == 1.0).all() and grown.buffer.dtype == torch.float8_e4m3fn


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
