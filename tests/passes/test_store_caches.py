"""How keys and values are stored: what of a program changes, what cannot, and artifacts that keep them in fewer bits."""

import json

import moec
import numpy as np
import pytest
from moec.compiler.check.interpret import interpret
from moec.compiler.errors import MoecError
from moec.compiler.ir.pipelines import parse_pipeline
from moec.compiler.quantize.stored import is_lossy
from moec.compiler.rewrite.pipeline import run_pipeline
from moec.compiler.text.parser import parse_module
from moec.compiler.text.printer import print_module
from moec.passes import PASSES
from moec.targets import TARGETS, declare_kernel_ops
from moec.targets.cpu.kernels.library import find_compiler
from places import TINY

ATTENTION = "ort.group_query_attention(%x, _, _, {past}, _, _, _, _) {{heads=2, scale=0.5}} : f32[B, S, 8], state f32[B, 1, P + S, 4], state f32[B, 1, P + S, 4]"
PROGRAM = f"""moec 1 stage kernel
dim B in 1..8
dim P in 0..64
dim S in 1..64

func @layer(%x: f32[B, S, 16], %pk: state f32[B, 1, P, 4], %pv: state f32[B, 1, P, 4])
    -> (f32[B, S, 8], 2 * state f32[B, 1, P + S, 4]) {{
  %y, %key, %value = {ATTENTION.format(past="%pk, %pv")}
  return %y, %key, %value
}}

func @main(%x: f32[B, S, 16], %a.key: state f32[B, 1, P, 4], %a.value: state f32[B, 1, P, 4], %b.key: state f32[B, 1, P, 4], %b.value: state f32[B, 1, P, 4])
    -> (f32[B, S, 8], f32[B, S, 8], 4 * state f32[B, 1, P + S, 4]) {{
  %y, %key, %value = call @layer(%x, %a.key, %a.value) : f32[B, S, 8], state f32[B, 1, P + S, 4], state f32[B, 1, P + S, 4]
  %z, %key.1, %value.1 = call @layer(%x, %b.key, %b.value) : f32[B, S, 8], state f32[B, 1, P + S, 4], state f32[B, 1, P + S, 4]
  return %y, %z, %key, %value, %key.1, %value.1
}}
"""
USED = PROGRAM.replace("%a.key, %a.value) :", "%a.key, %a.key) :")  # one state as keys and values of a layer


def store(module, type):
    declare_kernel_ops(TARGETS["cpu"])
    given = parse_module(module, "program") if isinstance(module, str) else module
    return run_pipeline(given, parse_pipeline(f"store-caches{{type={type}}}"), table=PASSES, check=True).module


@pytest.mark.parametrize(("type", "dtype", "states"), [("f16", "f16", 4), ("bf16", "bf16", 4), ("int8", "i8", 8)])
def test_only_states_change_and_they_change_back(type, dtype, states):
    plain = store(PROGRAM, "f32")
    found = store(plain, type)
    kept = [v for v in found.main.params if v.type.state]
    assert len(kept) == states == sum(v.type.state for v in found.main.results)
    assert {str(v.type.dtype) for v in kept if not v.name.endswith("_scale")} == {dtype}
    assert [v for v in found.main.params if not v.type.state] == [v for v in plain.main.params if not v.type.state]
    assert is_lossy(found) and not is_lossy(plain)
    assert parse_module(print_module(found), "printed") == found
    assert store(found, "f32") == plain and store(store(found, "int8"), type) == found and store(found, type) is found


def test_nothing_changes_without_a_reason():
    plain = parse_module(PROGRAM, "program")
    assert store(plain, "auto") is plain and store(plain, "f32") is plain


@pytest.mark.parametrize(
    ("options", "settings", "dtype"),
    [
        ({}, {"quantize": "int4"}, "f16"), ({}, {"quantize": "grid4_g64"}, "f16"), ({}, {}, "f32"),
        ({}, {"quantize": "int4", "kv": "f32"}, "f32"), ({}, {"quantize": "int4", "accuracy": "exact"}, "f32"),
        ({"kernels": "onnxruntime"}, {"quantize": "int4"}, "f32"),
    ],
)  # fmt: skip
def test_caches_are_f16_where_activations_are_rounded_and_kernels_read_them(options, settings, dtype):
    if find_compiler() is None:
        pytest.skip("ziglang is not installed")
    module = moec.compile(TINY, stop_after="kernel", options=options, **settings)
    assert {v.type.dtype for v in module.main.params if v.type.state} == {dtype}


def test_a_state_that_is_read_elsewhere_stays():
    with pytest.raises(MoecError, match="4 states are not stored as f16"):
        store(USED, "f16")  # one call of the layer keeps the layer, and so the other call, as it is


def test_a_type_that_there_is_not():
    with pytest.raises(MoecError, match="caches are not stored as int4"):
        store(PROGRAM, "int4")


def test_rounding_is_all_that_changes():
    torch = pytest.importorskip("torch")
    plain = store(PROGRAM, "f32")
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    results = {}
    for type in ("f32", "f16", "bf16", "int8"):
        module = store(plain, type)
        results[type] = _run_twice(torch, module, x)
    for type, most in (("f16", 1e-3), ("bf16", 1e-2), ("int8", 2e-2)):
        error = float((results[type] - results["f32"]).abs().max() / results["f32"].abs().max())
        assert 0 < error < most, type


def _run_twice(torch, module, x):
    """Return the last results of a program that is given what it returned before."""
    params = [v for v in module.main.params if v.type.state]
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8}
    states = [torch.zeros([2, 1, 0, 4][: len(v.type.shape)], dtype=dtypes[v.type.dtype]) for v in params]
    for _ in range(2):
        y, z, *states = interpret(module, [x, *states], lambda recipe: None)
    return torch.cat((y, z))


# --- artifacts -----------------------------------------------------------------------------------------------------


def test_an_artifact_keeps_fewer_bytes(tmp_path, monkeypatch):
    artifact = moec.compile(TINY, out=tmp_path / "out", kv="int8")
    manifest = json.loads((tmp_path / "out" / "moec.json").read_text())
    assert manifest["lossy"] and manifest["pipeline"].endswith("store-caches{type=int8}")
    held = manifest["figures"]["counted"]["state"]["held_bytes_per_token"]
    assert held == 4 * 2 * 2 * (64 + 4)  # layers, keys and values, heads, a code for each number and the scale
    assert all(state["in_place"] for state in manifest["states"])
    tokens = np.random.default_rng(0).integers(3, 2000, (2, 70))
    found = _greedy_tokens(artifact.session(spinning=False), tokens)
    monkeypatch.setenv("MOEC_CPU_KERNELS", "none")
    assert found == _greedy_tokens(artifact.session(spinning=False), tokens)


def _greedy_tokens(session, tokens):
    """Return what a model goes on with for two rows, the first with padding."""
    mask = np.ones_like(tokens)
    mask[0, :9] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    logits, states = session.step(tokens, mask, positions)
    made = []
    for _ in range(6):
        made.append(logits[:, -1].argmax(-1).tolist())
        mask = np.concatenate((mask, np.ones((2, 1), mask.dtype)), 1)
        logits, states = session.step(np.array(made[-1])[:, None], mask, mask.sum(1, keepdims=True) - 1, states)
    return made
