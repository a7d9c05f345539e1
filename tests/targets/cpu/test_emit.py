"""Lowering to ONNX Runtime's ops and writing model.onnx: the program stays the same, and so do the bytes."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from moec.compiler.check.interpret import interpret
from moec.compiler.errors import MoecError, Refuse
from moec.compiler.ir.module import Function, Module, Op, Value
from moec.compiler.ir.recipes import Recipe, Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.ops.verify import verify_module
from moec.compiler.text.parser import parse_module
from moec.compiler.text.printer import print_module
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.source import RandomSource
from moec.compiler.weights.steps.table import step
from moec.passes import PASSES
from moec.targets import TARGETS
from moec.targets.cpu.lower.module import lower_module
from moec.targets.cpu.lower.quantized import interleaved_recipe
from moec.targets.cpu.onnx.emit import DATA, MODEL, emit_model, why_unsupported
from moec.targets.cpu.onnx.genai import genai_config
from onnx_session import open_session

SOURCE = RandomSource(3)
pytestmark = pytest.mark.usefixtures("one_thread")


PROGRAM = """moec 1 stage moe
dim B in 1..64
dim S in 1..4096
dim P in 0..4096

func @layer(%h: f32[B, S, 32], %cos: f32[B, S, WIDTH], %sin: f32[B, S, WIDTH], %mask: i64[B, P + S], %past_key: state f32[B, 2, P, WIDTH], %past_value: state f32[B, 2, P, WIDTH])
    -> (f32[B, S, 32], 2 * state f32[B, 2, P + S, WIDTH]) weights "layers.{layer}." {
  const %norm : f32[32] = cast(tensor("norm.weight", bf16[32]), to=f32)
  const %q_proj : f32[Q, 32] = cast(tensor("q.weight", bf16[Q, 32]), to=f32)
  const %k_proj : f32[K, 32] = cast(tensor("k.weight", bf16[K, 32]), to=f32)
  const %v_proj : f32[K, 32] = cast(tensor("v.weight", bf16[K, 32]), to=f32)
  const %o_proj : f32[32, Q] = cast(tensor("o.weight", bf16[32, Q]), to=f32)
  const %router : f32[6, 32] = tensor("mlp.gate.weight", f32[6, 32])
  const %up : f32[6, 48, 32] = cast(concat(stack(tensor("mlp.experts.{0..5}.gate.weight", bf16[24, 32])), stack(tensor("mlp.experts.{0..5}.up.weight", bf16[24, 32])), axis=1), to=f32)
  const %down : f32[6, 32, 24] = cast(stack(tensor("mlp.experts.{0..5}.down.weight", bf16[32, 24])), to=f32)
  %x = nn.rms_norm(%h, %norm) {eps=1e-05} : f32[B, S, 32] loc("norm")
  %q = core.linear(%x, %q_proj, _) : f32[B, S, Q] loc("q")
  %k = core.linear(%x, %k_proj, _) : f32[B, S, K] loc("k")
  %v = core.linear(%x, %v_proj, _) : f32[B, S, K] loc("v")
  %q4 = core.reshape(%q) {shape=[B, S, 4, WIDTH]} : f32[B, S, 4, WIDTH]
  %k4 = core.reshape(%k) {shape=[B, S, 2, WIDTH]} : f32[B, S, 2, WIDTH]
  %v4 = core.reshape(%v) {shape=[B, S, 2, WIDTH]} : f32[B, S, 2, WIDTH]
  %qh = core.transpose(%q4) {perm=[0, 2, 1, 3]} : f32[B, 4, S, WIDTH]
  %kh = core.transpose(%k4) {perm=[0, 2, 1, 3]} : f32[B, 2, S, WIDTH]
  %vh = core.transpose(%v4) {perm=[0, 2, 1, 3]} : f32[B, 2, S, WIDTH]
  %qr = nn.rope(%qh, %cos, %sin) : f32[B, 4, S, WIDTH]
  %kr = nn.rope(%kh, %cos, %sin) : f32[B, 2, S, WIDTH]
  %key = nn.cache_append(%past_key, %kr) {axis=2} : state f32[B, 2, P + S, WIDTH]
  %value = nn.cache_append(%past_value, %vh) {axis=2} : state f32[B, 2, P + S, WIDTH]
  %a = nn.attention(%qr, %key, %value, %mask, _) {scale=0.25, window=5} : f32[B, S, 4, WIDTH] loc("attention")
  %a2 = core.reshape(%a) {shape=[B, S, Q]} : f32[B, S, Q]
  %o = core.linear(%a2, %o_proj, _) : f32[B, S, 32] loc("o")
  %h1 = core.add(%h, %o) : f32[B, S, 32]
  %t = core.reshape(%h1) {shape=[B*S, 32]} : f32[B*S, 32]
  %r = core.linear(%t, %router, _) : f32[B*S, 6] loc("mlp.gate")
  %p = core.SCORE : f32[B*S, 6]
  %top, %ids = core.topk(%p) {axis=1, k=2} : f32[B*S, 2], i64[B*S, 2]
  %e = moe.experts(%t, %ids, %top, %up, %down, _, _) {act=gated(ACT)} : f32[B*S, 32] loc("mlp.experts")
  %e3 = core.reshape(%e) {shape=[B, S, 32]} : f32[B, S, 32]
  %h2 = core.add(%h1, %e3) : f32[B, S, 32]
  return %h2, %key, %value
}

func @main(%input_ids: i64[B, S], %attention_mask: i64[B, P + S], %position_ids: i64[B, S], %past_key_values.0.key: state f32[B, 2, P, WIDTH], %past_key_values.0.value: state f32[B, 2, P, WIDTH], %past_key_values.1.key: state f32[B, 2, P, WIDTH], %past_key_values.1.value: state f32[B, 2, P, WIDTH])
    -> (f32[B, S, 40], 4 * state f32[B, 2, P + S, WIDTH]) {
  const %table : f32[40, 32] = cast(tensor("embed.weight", bf16[40, 32]), to=f32)
  const %frequencies : f32[HALF] = literal(f32[HALF], [FREQ])
  %h = nn.embedding(%input_ids, %table) : f32[B, S, 32]
  %position = core.cast(%position_ids) {to=f32} : f32[B, S]
  %position3 = core.reshape(%position) {shape=[B, S, 1]} : f32[B, S, 1]
  %angle = core.mul(%position3, %frequencies) : f32[B, S, HALF]
  %angles = core.concat(%angle, %angle) {axis=2} : f32[B, S, WIDTH]
  %cos = core.cos(%angles) : f32[B, S, WIDTH]
  %sin = core.sin(%angles) : f32[B, S, WIDTH]
  %h.0, %present.0.key, %present.0.value = call @layer(%h, %cos, %sin, %attention_mask, %past_key_values.0.key, %past_key_values.0.value) {layer=0} : f32[B, S, 32], state f32[B, 2, P + S, WIDTH], state f32[B, 2, P + S, WIDTH]
  %h.1, %present.1.key, %present.1.value = call @layer(%h.0, %cos, %sin, %attention_mask, %past_key_values.1.key, %past_key_values.1.value) {layer=1} : f32[B, S, 32], state f32[B, 2, P + S, WIDTH], state f32[B, 2, P + S, WIDTH]
  %logits = core.linear(%h.1, %table, _) : f32[B, S, 40] loc("head")
  return %logits, %present.0.key, %present.0.value, %present.1.key, %present.1.value
}
"""


def program(width: int = 8, act: str = "silu", score: str = "softmax(%r) {axis=1}", fuse: bool = True) -> Module:
    text = PROGRAM.replace("HALF", str(width // 2)).replace(
        "FREQ", ", ".join(["0.5", "0.1", "0.05", "0.01", "0.4", "0.3", "0.2", "0.02"][: width // 2])
    )
    text = text.replace("SCORE", score).replace("ACT", act).replace("WIDTH", str(width))
    text = text.replace("[Q, ", f"[{4 * width}, ").replace(", Q]", f", {4 * width}]")
    module = parse_module(text.replace("[K, ", f"[{2 * width}, ").replace(", K]", f", {2 * width}]"))
    module = PASSES["fuse-attention"](module) if fuse else module
    verify_module(module)
    return module


def weights(recipe: Recipe) -> torch.Tensor:
    return evaluate_recipe(recipe, SOURCE)


def names(module: Module) -> set[str]:
    return {op.name for function in module.functions for op in function.ops}


def compare(module: Module, folder: Path) -> None:
    """Run three steps (a padded prompt, a chunk, a token) in ONNX Runtime and compare with the interpreter."""
    emit_model(lower_module(module).module, SOURCE, folder)
    runner = open_session(folder)
    width = int(module.main.params[3].type.shape[3])
    states = [torch.zeros(3, 2, 0, width)] * 4
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :4], mask[2, :2] = 0, 0
    generator = torch.Generator().manual_seed(0)
    for new in (7, 3, 1):
        ids = torch.randint(0, 40, (3, new), generator=generator)
        mask = mask if new == 7 else torch.cat((mask, torch.ones(3, new, dtype=torch.int64)), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:].contiguous()
        want = interpret(module, [ids, mask, positions, *states], weights)
        feeds = {p.name: x.numpy() for p, x in zip(module.main.params, [ids, mask, positions, *states], strict=True)}
        got = runner.run(None, feeds)
        for a, b in zip(got, want, strict=True):
            assert a.shape == tuple(b.shape)
            assert np.abs(a - b.numpy()).max() <= 1e-5 * b.abs().max()
        states = list(want[1:])


def test_program_uses_the_fused_ops_and_is_right(tmp_path: Path) -> None:
    module = program()
    lowered, notes = lower_module(module)
    verify_module(lowered)
    assert lowered.stage == "kernel" and notes == ()
    assert {"ort.group_query_attention", "ort.moe", "ort.rotary_embedding", "ort.attention_bias"} <= names(lowered)
    assert not {"nn.attention", "nn.cache_append", "moe.experts", "core.transpose", "nn.rope"} & names(lowered)
    assert parse_module(print_module(lowered)) == lowered
    assert lower_module(lowered).module is lowered
    compare(module, tmp_path)


@pytest.mark.parametrize("width", [8, 16])  # the rotary embedding in front of the attention op, and inside it
def test_caches_may_be_longer_than_the_past(width: int, tmp_path: Path) -> None:
    """A cache with room for later tokens, bound as past and present, is written in place and gives the same numbers."""
    module = program(width)
    lowered = lower_module(module).module
    assert ("ort.rotary_embedding" in names(lowered)) == (width == 8)
    emit_model(lowered, SOURCE, tmp_path)
    runner = open_session(tmp_path)
    caches = [v for v in module.main.params if v.type.state]
    room = [ort.OrtValue.ortvalue_from_numpy(np.zeros((2, 2, 32, width), np.float32)) for _ in caches]
    states = [torch.zeros(2, 2, 0, width) for _ in caches]
    ids = torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for start, stop in ((0, 6), (6, 10), (10, 11)):
        given = [x.contiguous() for x in (ids[:, start:stop], mask[:, :stop], positions[:, start:stop])]
        want = interpret(module, [*given, *states], weights)
        states = list(want[1:])
        binding = runner.io_binding()
        for value, x in zip(module.main.params, given, strict=False):
            binding.bind_cpu_input(value.name, x.numpy())
        binding.bind_output(module.main.results[0].name)
        for past, present, cache in zip(caches, module.main.results[1:], room, strict=True):
            binding.bind_ortvalue_input(past.name, cache)
            binding.bind_ortvalue_output(present.name, cache)
        runner.run_with_iobinding(binding)
        got = binding.get_outputs()[0].numpy()
        assert np.abs(got - want[0].numpy()).max() <= 1e-5 * want[0].abs().max()


@pytest.mark.parametrize(
    ("options", "reason", "kept"),
    [
        (
            {"width": 4},
            "nn.cached_attention .*heads have 4 numbers, and GroupQueryAttention heads of no multiple of 8 is rejected",
            "nn.attention",
        ),
        ({"act": "gelu"}, "moe.experts .*MoE gated_gelu weights is rejected", "moe.experts"),
        (
            {"score": "tanh(%r)"},
            "moe.experts .*may be negative, and MoE swiglu negative weights is wrong",
            "moe.experts",
        ),
    ],
)
def test_refusals_have_a_reason_and_the_fallback_is_right(
    options: dict[str, Any], reason: str, kept: str, tmp_path: Path
) -> None:
    module = program(**options)
    lowered, notes = lower_module(module)
    assert kept in names(lowered)
    assert len(notes) == 1 and re.search(reason, str(notes[0]))
    compare(module, tmp_path)


def test_a_cache_that_is_read_elsewhere_is_not_fused() -> None:
    module = program(fuse=False)
    layer = module.by_name["layer"]
    key = next(v for v in layer.results if v.name == "key")
    extra = Op("core.neg", (key,), (Value("other", key.type.plain),))
    position = next(i for i, op in enumerate(layer.ops) if op.name == "nn.attention")
    ops = (*layer.ops[:position], extra, *layer.ops[position:])
    module, notes = PASSES["fuse-attention"].run(module.with_functions({"layer": replace(layer, ops=ops)}))
    assert len(notes) == 1 and "is also read by core.neg" in notes[0].reason
    assert {"nn.attention", "nn.cache_append"} <= names(lower_module(module).module)


def test_same_bytes_and_hashes(tmp_path: Path) -> None:
    module = lower_module(program()).module
    folders = [tmp_path / "a", tmp_path / "b"]
    hashes = []
    for folder in folders:
        folder.mkdir()
        hashes.append(emit_model(module, SOURCE, folder).files)
    assert hashes[0] == hashes[1] and set(hashes[0]) == {MODEL, DATA}
    for name, digest in hashes[0].items():
        assert hashlib.sha256((folders[0] / name).read_bytes()).hexdigest() == digest
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_files(tmp_path: Path) -> None:
    """Large weights lie aligned in the data file, once each; small ones in the model; names say where from."""
    seen: list[int] = []
    emit_model(lower_module(program()).module, SOURCE, tmp_path, progress=seen.append)
    onnx.checker.check_model(str(tmp_path / MODEL))
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    places = [{e.key: e.value for e in t.external_data} for t in external]
    assert {p["location"] for p in places} == {DATA}
    assert all(int(p["offset"]) % 64 == 0 for p in places)
    assert len({p["offset"] for p in places}) == len(places)
    assert max(int(p["offset"]) + int(p["length"]) for p in places) == (tmp_path / DATA).stat().st_size
    assert sum(int(p["length"]) for p in places) == seen[-1]
    # q, k and v in one, o and two of the experts' matrices in each layer (router and norm are small), and the one table
    assert len(external) == 2 * 4 + 1
    assert {"layer.0/up.interleaved", "layer.1/up.interleaved", "table"} <= {t.name for t in external}
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)
    assert {n.doc_string for n in model.graph.node} >= {"mlp.experts", "attention"}
    assert [i.name for i in model.graph.input] == [p.name for p in program().main.params] + ["logits_to_keep"]
    assert model.graph.input[1].type.tensor_type.shape.dim[1].dim_param == "P + S"
    assert model.producer_name == "moec"


def test_standard_ops_pass_the_full_check(tmp_path: Path) -> None:
    text = """moec 1 stage kernel
dim B in 1..8
dim S in 1..8

func @main(%x: f32[B, S, 4]) -> (f32[B, S, 4], f32[B, S, 4], f32[4, B*S]) {
  %y = core.silu(%x) : f32[B, S, 4]
  %flat = core.reshape(%y) {shape=[B*S, 4]} : f32[B*S, 4]
  %z = core.transpose(%flat) {perm=[1, 0]} : f32[4, B*S]
  %again = core.reshape(%flat) {shape=[B, S, 4]} : f32[B, S, 4]
  return %y, %again, %z
}
"""
    module = parse_module(text)
    assert emit_model(module, SOURCE, tmp_path).files.keys() == {MODEL}  # no weights: no data file
    assert not (tmp_path / DATA).exists()
    onnx.checker.check_model(str(tmp_path / MODEL), full_check=True)
    x = torch.randn(2, 3, 4)
    for got, want in zip(
        open_session(tmp_path).run(None, {"x": x.numpy()}), interpret(module, [x], weights), strict=True
    ):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-5)


def test_op_without_a_kernel() -> None:
    value = Value("x", TensorType.of("f32", 2))
    op = Op("core.siluu", (value,), (Value("y", value.type),), loc=("model.mlp",))
    assert "core.silu" in (why_unsupported(op) or "")
    assert "does not take bf16" in (why_unsupported(Op("core.silu", (Value("x", TensorType.of("bf16", 2)),), ())) or "")
    main = Function("main", (value,), (), (op,), op.results)
    with pytest.raises(MoecError, match=r"no kernel for core.siluu.*core.silu") as caught:
        TARGETS["cpu"].lower(Module("moe", (), (main,)), None)
    assert caught.value.model == "model.mlp" and "@main" in caught.value.where


def test_interleaved_recipes() -> None:
    gate, up = (Tensor(n, TensorType.of("bf16", 3, 4, 5)) for n in ("gate", "up"))
    both = step("concat", gate, up, axis=1)
    want = torch.stack([weights(gate), weights(up)], 2).reshape(3, 8, 5)
    assert torch.equal(weights(interleaved_recipe(both)), want)
    assert interleaved_recipe(both) == step("interleave", gate, up, axis=1)
    assert torch.equal(weights(interleaved_recipe(step("cast", both, to="f32"))), want.float())
    single = Tensor("gate_up", TensorType.of("f32", 3, 8, 5))
    halves = weights(single).chunk(2, 1)
    assert torch.equal(weights(interleaved_recipe(single)), torch.stack(halves, 2).reshape(3, 8, 5))


def test_genai_config() -> None:
    config = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1}
    made = genai_config(lower_module(program()).module, config, {"top_p": 0.9}, (2, 3))
    assert made is not None
    decoder = made["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 8)
    assert (made["model"]["vocab_size"], made["model"]["eos_token_id"], made["model"]["pad_token_id"]) == (
        40,
        [2, 3],
        2,
    )
    assert made["search"]["top_p"] == 0.9 and made["search"]["max_length"] == 64
    assert made["search"]["past_present_share_buffer"]
    longer = genai_config(lower_module(program()).module, config | {"max_position_embeddings": 1 << 17}, {}, (2, 3))
    assert (longer["model"]["context_length"], longer["search"]["max_length"]) == (1 << 17, 8192)
    plain = genai_config(lower_module(program(fuse=False)).module, config, {}, (2, 3))["search"]
    assert (plain["past_present_share_buffer"], plain["max_length"]) == (False, 64)  # no op appends in place
    with pytest.raises(Refuse, match="end-of-text"):
        genai_config(lower_module(program()).module, config, {}, ())


def test_many_layers_are_emitted_quickly(tmp_path: Path) -> None:
    module = lower_module(program()).module
    main = module.main
    calls = [op for op in main.ops if op.callee]
    many, h = [], calls[0].operands[0]
    for i in range(94):
        out = Value(f"hidden.{i}", calls[0].results[0].type)
        states = tuple(Value(f"state.{i}.{j}", v.type) for j, v in enumerate(calls[0].results[1:]))
        operands = (h, *calls[0].operands[1:])
        many.append(Op("call", operands, (out, *states), (("layer", i % 2),), callee="layer"))
        h = out
    ops = [op for op in main.ops if not op.callee]
    first = next(i for i, op in enumerate(ops) if op.name == "ort.last_tokens")  # reads what the layers make
    ops = [*ops[:first], *many, replace(ops[first], operands=(h,)), *ops[first + 1 :]]
    module = module.with_functions({"main": replace(main, ops=tuple(ops), results=main.results[:1])})
    start = time.process_time()
    emit_model(module, SOURCE, tmp_path)
    assert time.process_time() - start < 5
    nodes = onnx.load(tmp_path / MODEL, load_external_data=False).graph.node
    assert [n.op_type for n in nodes].count("GroupQueryAttention") == 94


def test_the_table_of_targets() -> None:
    target = TARGETS["cpu"]
    assert target.lower(program(), target).module.stage == "kernel"
    assert target.ops.supported(Op("call", (), (), callee="layer")) is None
