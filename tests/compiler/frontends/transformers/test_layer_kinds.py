"""Layers that do the same are traced and written once, whatever tells them apart; those that differ stay apart."""

import moec
import pytest
import torch
from moec.compiler.check.interpret import interpret
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.frontends.transformers.merge import merge_functions
from moec.compiler.ops.verify import verify_module
from moec.compiler.text.parser import parse_module
from moec.compiler.weights.evaluate import evaluate_recipe
from tiny_models import padded_batch, random_model


def numbers_equal(model, loaded, length=11):
    """Return whether the imported program's logits of a padded batch are transformers'."""
    ids, mask, positions = padded_batch(128, length)
    states = [
        torch.zeros([{"B": 3, "P": 0}.get(str(s), s) if s.is_Symbol else int(s) for s in p.type.shape])
        for p in loaded.module.main.params
        if p.type.state
    ]
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        weights = lambda recipe: evaluate_recipe(recipe, loaded.weights)  # noqa: E731
        got = interpret(loaded.module, [ids, mask, positions, *states], weights)[0][mask.bool()]
    return ((got - want).abs().max() / want.abs().max()).item() < 1e-5


def callees(loaded):
    """Return the function that each layer calls, in order."""
    return [op.callee for op in loaded.module.main.ops if op.callee]


@pytest.fixture
def traced(monkeypatch):
    """Return a list that gets a layer's number each time that one is traced."""
    from moec.compiler.frontends.transformers import model as transformers_model

    found, original = [], transformers_model.trace_module
    monkeypatch.setattr(
        transformers_model, "trace_module", lambda *args: found.append(args[2].rpartition(".")[2]) or original(*args)
    )
    return found


# --- alike though something tells them apart -------------------------------------------------------------------------


def test_llama4_with_layers_of_three_kinds(tmp_path, traced):
    """Experts in every layer but one, positions in three of four: `moe_layers` is a list of layer numbers."""
    model = random_model(
        FAMILIES["llama4_text"], num_hidden_layers=8, moe_layers=[0, 1, 2, 3, 4, 6, 7], attention_chunk_size=4,
        no_rope_layers=[1, 1, 1, 0] * 2, intermediate_size_mlp=48,
    )  # fmt: skip
    artifact = moec.compile(model, out=tmp_path / "a")
    assert [n for n in traced if n.isdigit()] == ["0", "3", "5"]
    found = artifact.verify(against=model)
    assert found.passed and found.relative < 1e-4, found.lines()


@pytest.mark.parametrize("numbers", [list(range(6)), [10, 3, 7, 0, 5, 1], [[i] for i in range(6)]], ids=str)
def test_a_list_that_no_layer_reads(traced, numbers):
    model = random_model(FAMILIES["qwen3_moe"], num_hidden_layers=6)
    model.config.some_layers = numbers
    loaded = load(model)
    assert callees(loaded) == ["layer"] * 6 and traced.count("0") == 1 and len(traced) == 2
    assert numbers_equal(model, loaded)


def test_an_attribute_that_nothing_reads(traced):
    model = random_model(FAMILIES["llama"], num_hidden_layers=4)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.place, layer.mlp.label = i, f"mlp of {i}"
        layer.self_attn.register_buffer("unread", torch.full((4,), float(i)), persistent=False)
    loaded = load(model)
    assert callees(loaded) == ["layer"] * 4 and len(traced) == 2
    assert numbers_equal(model, loaded)


def test_what_a_config_makes_a_model_return_beside_its_logits(traced):
    """Fine-tuned checkpoints say so in their config.json; it changes no logits."""
    model = random_model(FAMILIES["qwen3_moe"], output_router_logits=True, output_hidden_states=True)
    loaded = load(model)
    assert model.config.output_router_logits and len(traced) == 2
    assert numbers_equal(model, loaded)


# --- apart ---------------------------------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    """Multiplies what a module returns with a number, or with a buffer that holds it."""

    def __init__(self, inner, value, how):
        super().__init__()
        self.inner, self.how = inner, how
        self.code = lambda x: x * value  # in a closure, where no look at attributes finds it
        if how == "buffer":
            self.register_buffer("table", torch.full((1,), value), persistent=False)

    def forward(self, x):
        """Return the inner module's result, scaled."""
        return self.inner(x) * self.table if self.how == "buffer" else self.code(self.inner(x))


@pytest.mark.parametrize("how", ["buffer", "number"])
def test_layers_that_compute_with_other_numbers(how):
    model = random_model(FAMILIES["llama"], num_hidden_layers=4)
    for layer, value in zip(model.model.layers, [0.5, 2.0, 0.5, 2.0], strict=True):
        layer.mlp = Scaled(layer.mlp, value, how)
    loaded = load(model)
    assert callees(loaded) == ["layer_0", "layer_1"] * 2
    assert numbers_equal(model, loaded)


def test_a_setting_that_layers_read_from_the_config():
    """Windows of their own, some equal, from a list in the config; and a list of numbers beside it."""
    model = random_model(
        FAMILIES["gpt_oss"], num_hidden_layers=4, layer_types=["full_attention", "sliding_attention"] * 2
    )
    model.config.numbered = [0, 1, 2, 3]
    loaded = load(model)
    assert callees(loaded) == ["layer_0", "layer_1"] * 2
    assert numbers_equal(model, loaded)


# --- indexers that choose more tokens than any rehearsal has -----------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "topk"),
    [
        ("glm_moe_dsa", 2048),
        *(pytest.param("glm_moe_dsa", topk, marks=pytest.mark.long) for topk in (4, 1500, 5000)),
        *(pytest.param("mistral_large4", topk, marks=pytest.mark.long) for topk in (1015, 2048)),
    ],
)
def test_a_shared_indexer_of_any_size(family, topk):
    shared = {"num_hidden_layers": 4, "indexer_types": ["full", "full", "shared", "full"]} if "glm" in family else {}
    model = random_model(FAMILIES[family], index_topk=topk, **shared)
    loaded = load(model)
    verify_module(loaded.module)
    assert numbers_equal(model, loaded)


# --- the merge of functions ----------------------------------------------------------------------------------------

FUNCTIONS = """moec 1 stage graph
dim B in 1..8
{functions}
func @main(%x: f32[B, 4]) -> (f32[B, 4]) {{
{calls}
  return %h.{last}
}}
"""
BODY = """
func @layer_{n}(%x: f32[B, 4]) -> (f32[B, 4]) weights "layers.{{layer}}." {{
  const %{v} : f32[4] = {weight}
  %{r} = core.add(%x, %{v}) : f32[B, 4] loc("part.{n}")
  return %{r}
}}
"""


def program(*weights):
    """Return a module with a layer for each weight, called one after the other; every function has value names of its own."""
    bodies = [BODY.format(n=i, v=f"w{i}", r=f"r{i}", weight=w) for i, w in enumerate(weights)]
    calls = [
        f"  %h.{i} = call @layer_{i}({'%x' if i == 0 else f'%h.{i - 1}'}) {{layer={i}}} : f32[B, 4]"
        for i in range(len(weights))
    ]
    return parse_module(FUNCTIONS.format(functions="".join(bodies), calls="\n".join(calls), last=len(weights) - 1))


NORM = 'tensor("norm", f32[4])'
OTHER = 'tensor("other", f32[4])'


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((NORM, NORM, NORM), ["layer"] * 3),
        ((NORM, OTHER, NORM, OTHER), ["layer_0", "layer_1"] * 2),
        ((NORM, OTHER, OTHER), ["layer_0", "layer_1", "layer_1"]),
        (("literal(f32[4], [0.0, 1.0, 2.0, 3.0])", "literal(f32[4], [-0.0, 1.0, 2.0, 3.0])"), ["layer_0", "layer_1"]),
        ((NORM, 'tensor("norm", bf16[4])'), None),
    ],
)
def test_equal_bodies_are_one_function(weights, expected):
    if expected is None:  # a cast makes the types fit
        weights, expected = (weights[0], f"cast({weights[1]}, to=f32)"), ["layer_0", "layer_1"]
    merged = merge_functions(program(*weights))
    verify_module(merged)
    assert [op.callee for op in merged.main.ops] == expected
    assert [op.attributes["layer"] for op in merged.main.ops] == list(range(len(weights)))
    assert len(merged.functions) == len(set(expected)) + 1


def test_a_module_without_equal_bodies_is_itself():
    module = program(NORM, OTHER)
    assert merge_functions(module) is module
