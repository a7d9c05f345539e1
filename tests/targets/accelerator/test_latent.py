"""What latent attention is lowered to: no op but attention reads a whole cache, and what layers share is made once."""

import pytest
from moec.compiler.driver import compile_source
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.ops import OPS
from moec.compiler.text.parser import parse_module
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.artifact.spec import kernel_specs
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.lower import module as lowering
from moec.targets.accelerator.lower.chosen import ChosenSlots
from moec.targets.accelerator.select.step import predict_step
from moec.targets.accelerator.select.supported import IMPLEMENTATIONS
from tiny_models import random_model, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(random_model(FAMILIES["deepseek_v3"], num_hidden_layers=2), tmp_path_factory.mktemp("latent"))


def lowered(folder, check=False):
    return compile_source(folder, target="nvidia-h200", stop_after="lower", check=check).module


def readers(module):
    """Return the names of ops that read all tokens of a cache, or copy them to append to it, in any layer."""
    found = set()
    for function in module.functions:
        caches = {v.name for v in function.params if v.type.state}
        for op in (op for op in function.ops if not op.callee):
            read = {name for name, value in op.named if value.name in caches}
            appended = read & set(OPS[op.name].appends)
            copied = appended and not (op.name in IMPLEMENTATIONS and IMPLEMENTATIONS[op.name](op, {}))
            if read - appended or copied:
                found.add(op.name)
            caches |= {v.name for v in op.results if read and (v.type.state or OPS[op.name].view)}
    return found


def test_only_attention_reads_a_whole_cache(folder, monkeypatch):
    module = lowered(folder, check=True)
    assert readers(module) == {"acc.latent_attention"}
    for function in module.functions[:-1]:
        names = [op.name for op in function.ops]
        assert names.count("acc.latent_append") == names.count("acc.latent_attention") == 1
        # angles are cut and doubled once, by the caller
        assert not {"nn.rope", "nn.cache_append", "core.concat", "core.slice"} & set(names)
    # as it was before: keys put together from both caches
    monkeypatch.setattr(lowering, "latent_attention", lambda editor, op, stored, slots: None)
    assert readers(lowered(folder)) == {"core.concat", "nn.attention"}


# --- chosen slots (DeepSeek-V3.2) ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("deepseek_v32", {"num_hidden_layers": 2}, marks=pytest.mark.long),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared"], "num_hidden_layers": 2}),
    ],
)
def test_attention_is_given_the_chosen_slots(family, changes):
    """In layers that choose and in layers that take what the one before chose; no layer makes a mask of them."""
    module = compile_source(random_model(FAMILIES[family], **changes), target="nvidia-h200", stop_after="lower").module
    attended = [op for f in module.functions for op in f.ops if op.name == "acc.latent_attention"]
    assert all(op["selected"].type.dtype == "i32" and op.settings.flag("best_first") for op in attended)
    assert len(attended) == len(module.functions) - 1
    assert not any(op.name == "core.scatter" for f in module.functions for op in f.ops)


MASKS = """moec 1 stage moe
dim B in 1..4
dim S in 1..64
dim P in 0..64
func @main(%mask: bool[B, S, P + S], %other: bool[B, S, P + S], %scores: f32[B, S, P + S], %given: i64[B, S, 6]) -> (bool[B, S, P + S]) {
  %hidden = core.logical_not(%mask) : bool[B, S, P + S]
  %low = core.constant() {dtype=f32, value=-inf} : f32[]
  %seen = core.where(%hidden, %low, %scores) : f32[B, S, P + S]
  %more = core.full() {dtype=f32, shape=[B, S, 6], value=-inf} : f32[B, S, 6]
  %all = core.concat(%seen, %more) {axis=2} : f32[B, S, P + S + 6]
  %values, %index = core.topk(%all) {axis=2, k=6} : f32[B, S, 6], i64[B, S, 6]
  %none = core.full() {dtype=bool, shape=[B, S, P + S + 6], value=0.0} : bool[B, S, P + S + 6]
  %true = core.full() {dtype=bool, shape=[B, S, 6], value=1.0} : bool[B, S, 6]
  %marks = core.scatter(%none, %index, %true) {axis=2} : bool[B, S, P + S + 6]
  %cut = core.slice(%marks) {axis=2, start=0, stop=P + S} : bool[B, S, P + S]
  %y = core.logical_and(%mask, %cut) : bool[B, S, P + S]
  return %y
}
"""


@pytest.mark.parametrize(
    ("there", "instead", "found"),
    [
        ("", "", True),  # as a model has it
        ("core.logical_and(%mask", "core.logical_and(%other", False),  # chosen under another mask: in any order
        ("core.where(%hidden, %low, %scores)", "core.where(%hidden, %scores, %scores)", False),
        ("(%none, %index", "(%none, %given", None),  # numbers of which some may be equal
        ("shape=[B, S, 6], value=1.0", "shape=[B, S, 6], value=0.0", None),
        ("stop=P + S} : bool[B, S, P + S]", "stop=P + S} : bool[B, S, P + S]", True),
    ],
)
def test_masks_that_mark_chosen_slots(there, instead, found):
    function = parse_module(MASKS.replace(there, instead)).main
    chosen = ChosenSlots(parse_module(MASKS.replace(there, instead))).of_mask(function, function.results[0])
    assert (chosen and chosen.best_first) is found


CHOSEN = """moec 1 stage kernel
dim B in 1..64
dim S in 1..8192
dim P in 0..131072
func @main(%q: f32[B, S, 24576], %q_rope: f32[B, 128, S, 64], %mask: bool[B, S, P + S], %selected: i32[B, S, 2048], %latent: state f32[B, 1, P + S, 512], %rope: state f32[B, 1, P + S, 64])
    -> (f32[B, S, 16384]) {
  const %w_uk : bf16[65536, 128] = tensor("w_uk", bf16[65536, 128])
  const %w_uv : bf16[16384, 512] = tensor("w_uv", bf16[16384, 512])
  %y = acc.latent_attention(%q, %q_rope, %latent, %rope, %w_uk, %w_uv, %mask, _, %selected) {heads=128, scale=0.1, best_first=true} : f32[B, S, 16384]
  return %y
}
"""


@pytest.mark.parametrize("chip", ["nvidia-h200", pytest.param("amd-mi355x", marks=pytest.mark.long)])
def test_what_is_not_chosen_is_not_read(chip):
    """DeepSeek-V3.2's sizes: of 65536 tokens 2048 are read, each 576 numbers of bf16, whatever is past."""
    declare_kernel_ops()
    module, profile = parse_module(CHOSEN), find_profile(chip, {})
    every, chosen = (
        parse_module(CHOSEN.replace("%mask, _, %selected", "%mask, _, _").replace(", best_first=true", "")),
        module,
    )
    steps = [predict_step(m, profile, batch=16, past=65535) for m in (chosen, every)]
    (one,), (other,) = (step.rows for step in steps)
    assert one.states == 16 * 2048 * 576 * 2 and other.states == 32 * one.states
    weights = 2 * (65536 * 128 + 16384 * 512)
    assert one.states + weights < one.device_bytes < 2 * (one.states + weights)  # queries and portions too
    flops = 2 * 16 * 128 * (2048 * (576 + 512) + 512 * (128 + 128))  # and the softmax
    assert flops < sum(one.flops.values()) < 1.02 * flops
    # launches and the weights that absorb are the same for both, and more than half of a step that reads what is chosen
    assert 5 * one.time < other.time
    assert predict_step(chosen, profile, batch=16, past=131000).rows[0].time < 1.01 * one.time
    # a prompt that has more tokens than are chosen, and one that has not
    assert (
        predict_step(chosen, profile, new=4096, past=65536).time
        < 0.5 * predict_step(every, profile, new=4096, past=65536).time
    )
    assert predict_step(chosen, profile, new=2048).time == predict_step(every, profile, new=2048).time


def test_kernels_change_with_the_tokens_of_a_sequence():
    declare_kernel_ops()
    made = kernel_specs(parse_module(CHOSEN), find_profile("nvidia-h200", {}), (4, 1024)).kernels
    attended = {
        (k.high, k.new, k.slots): "J" in k.best.program.scalars for k in made if k.kind in ("attention", "merge")[:1]
    }
    few, many, short, long = (1, 170), (171, None), (1, 2048), (2049, None)
    wanted = {(4, few, short): False, (4, few, long): True, (1024, few, short): False, (1024, few, long): True}
    assert attended == wanted | {(1024, many, short): False, (1024, many, long): True}
