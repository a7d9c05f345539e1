"""DeepSeek-V4-Flash and -Pro from their config.json: counts that were published, and the cost of a million tokens."""

import time

import pytest
from moec.compiler.cli.report import inspect_source, open_source
from moec.compiler.cost.count import module_costs, op_flops
from moec.compiler.frontends.load import load
from moec.compiler.ir.dims import evaluate
from moec.compiler.ir.module import walk_calls
from moec.compiler.ir.recipes import Step
from moec.compiler.ops.verify import verify_module
from moec.compiler.text.parser import parse_module
from moec.compiler.text.printer import print_module
from places import CONFIGS

MILLION = 1 << 20
# what the config says of layers: (layers of 4 tokens an entry, layers of 128)
LAYERS = {"Flash": (21, 20), "Pro": (30, 31)}


@pytest.fixture(scope="module", params=LAYERS)
def full(request):
    """Return (Flash or Pro, its module, its report at a million past tokens)."""
    folder = CONFIGS / f"DeepSeek-V4-{request.param}"
    return request.param, load(folder).module, inspect_source(open_source(folder), context=MILLION - 128)


def test_import_is_quick_and_the_text_short(full):
    name, module, _ = full
    start = time.process_time()
    again = load(CONFIGS / f"DeepSeek-V4-{name}").module
    assert time.process_time() - start < 5
    assert again == module
    verify_module(module)
    text = print_module(module)
    assert len(text.splitlines()) <= 600
    assert parse_module(text) == module
    assert len(module.functions) == 5


def test_parameters(full):
    name, _, report = full
    total = {"Flash": 284_332_000_000, "Pro": 1_572_997_000_000}[name]
    assert abs(report["parameters"]["total"] - total) < 1e6


def test_checkpoint_bytes(full):
    """What the released checkpoint's index calls total_size, multi-token prediction included."""
    name, _, report = full
    whole = report["bytes"]["checkpoint"] + report["left_out"]["bytes"]
    assert report["left_out"]["names"] == ["mtp.*"]
    assert whole == 159_609_485_896 if name == "Flash" else abs(whole - 865e9) < 1e9


def test_cache(full):
    """Per token as the length grows: (512 + 128) / 4 numbers in a sparse layer, 512 / 128 in a heavy one."""
    name, module, report = full
    sparse, heavy = LAYERS[name]
    costs = module_costs(module)
    grown = [costs.at(costs.total.state_bytes, past) for past in (MILLION // 2, MILLION)]
    numbers = sparse * 160 + heavy * 4
    assert (grown[1] - grown[0]) / (MILLION // 2) == 4 * numbers  # kept in float32
    assert abs(report["state"]["bf16_bytes_per_token"] - 2 * numbers) < 10
    assert 2 * numbers == {"Flash": 6880, "Pro": 9848}[name]


# --- against DeepSeek-V3.2 at a million tokens (technical report of DeepSeek-V4, arXiv 2606.19348, figure 1) ---------
#
# FLOPs are counted in FP8 ones, as the report does: an FP4 operation is half of one, one in BF16 or FP32 two.
# - DeepSeek-V4: linears in the format that the checkpoint stores, FP4 weights beside FP8 activations as FP8; the
#   indexer's scores in FP4; attention over the selected entries and everything without a weight in BF16.
# - DeepSeek-V3.2 by formula: 37 B active parameters of which the head is BF16; MLA with absorbed projections over 2048
#   tokens, 128 heads of 576 + 512 numbers, BF16; the indexer scores all tokens with 64 heads of 128 numbers in FP8.
#   2 * 128 * (576 + 512) FLOPs for each token attended to are those of absorb-mla's IR, see tests/passes/test_absorb_mla.py.
# Caches as they are served: V3.2 656 + 132 bytes a token and layer (FP8 latent with scales, BF16 rope, FP8 index key
# with a scale); V4 584 bytes an entry (FP8 with scales, BF16 rope) and 68 bytes an index entry (FP4 with scales).

HEAD = 129280 * 7168
V32_FLOPS = 2 * (37e9 + HEAD) + 61 * (2 * 2 * 128 * 2048 * (576 + 512) + 2 * 64 * 128 * MILLION)
V32_CACHE = 61 * (656 + 132)


def fp8_flops(module, past):
    """Return the FLOPs of one token in FP8 ones."""
    total, dims, known = 0.0, {"B": 1, "S": 1, "P": past}, {}
    for function, _ in walk_calls(module):
        if function.name not in known:
            stored = {c.value.name: recipe_dtype(c.recipe) for c in function.consts}
            known[function.name] = sum(weight_of(op, stored) * evaluate(op_flops(op), dims) for op in function.ops)
        total += known[function.name]
    return total


def weight_of(op, stored):
    if op.name == "nn.select_entries":
        return 0.5
    weights = {stored[v.name] for v in op.inputs if v.name in stored}
    return 1 if weights & {"f8e4m3", "i8"} else 2


def recipe_dtype(recipe):
    while isinstance(recipe, Step):
        recipe = recipe.items[0]
    return recipe.type.dtype


def served_bytes(module, tokens):
    """Return the bytes of the entries that so many tokens leave, as they are served."""
    each = {"entries": 584, "index_entries": 68}
    states = [(p.name.split(".")[-1], p.type.shape[1]) for p in module.main.params if p.type.state]
    return sum(each[name] * evaluate(count, {"P": tokens}) for name, count in states if name in each)


def test_a_million_tokens_against_v32(full):
    name, module, _ = full
    flops = fp8_flops(module, MILLION) / V32_FLOPS
    cache = served_bytes(module, MILLION) / MILLION / V32_CACHE
    published = {"Flash": (0.10, 0.07), "Pro": (0.27, 0.10)}[name]
    assert abs(flops - published[0]) < 0.01
    assert abs(cache - published[1]) < 0.01
