"""Plans: the text of layers, quantization.json and its errors, the choice under a budget, and the whole way."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from moec.compiler.cli import commands as cli
from moec.compiler.driver import opt
from moec.compiler.errors import MoecError
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.quantize.allocate import Weight, choose_formats
from moec.compiler.quantize.plan import Budget, Entry, Plan, Unit, parse_layers, read_plan, spell_layers
from moec.compiler.text.parser import parse_module
from moec_command import invoke
from places import TINY

TEXT = {
    Unit(0, "attention"): "int8_g64", Unit(1, "attention"): "int8_g64", Unit(2, "experts"): "uint4_g32",
    Unit(3, "experts", (0, 1, 2, 7)): "uint4_g32", Unit(3, "experts", (3, 4)): "uint2_g32", Unit(None, "head"): "f32",
}  # fmt: skip


def test_layers_read_as_they_are_spelled():
    text = spell_layers(TEXT)
    assert (
        text
        == "0..1.attention=int8_g64 2.experts=uint4_g32 3.experts[0..2,7]=uint4_g32 3.experts[3..4]=uint2_g32 head=f32"
    )
    assert parse_layers(text) == TEXT
    assert parse_layers("") == {}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.attention", "does not read"),
        ("0.attention=int5", "there is no format int5"),
        ("0.cousin=int8_g64", "there is no role cousin"),
        ("3.experts[1..2]=int8_g64 3.experts[2]=f32", r"3.experts\[2\] is named twice"),
        ("3.experts[1]=int8_g64 3.experts=f32", "3.experts is named twice"),
        ("3.experts[2..1]=int8_g64", "names no experts"),
        ("3.experts[1,1]=int8_g64", "names an expert twice"),
        ("3.attention[1]=int8_g64", "attention has no experts"),
        ("3..1.experts=int8_g64", "names no layers"),
        ("head=int8_g64 head=f32", "head is named twice"),
        ("0..2.experts=int8_g64 1.experts=f32", "1.experts is named twice"),
    ],
)
def test_wrong_layers(text, wanted):
    with pytest.raises(MoecError, match=wanted):
        parse_layers(text)


@pytest.mark.parametrize(
    ("text", "bits", "size"),
    [("4.5bpw", Fraction(9, 2), None), ("6GB", None, 6 * 10**9), ("900 MB", None, 9 * 10**8), ("1.5kB", None, 1500)],
)
def test_budgets(text, bits, size):
    assert Budget.parse(text) == Budget(text, bits, size)


@pytest.mark.parametrize("text", ["", "4.5", "0bpw", "6 apples", "-1GB"])
def test_wrong_budgets(text):
    with pytest.raises(MoecError, match="is no budget"):
        Budget.parse(text)


# --- the choice ------------------------------------------------------------------------------------------------


def weight(name, elements):
    return Weight(Tensor(name, TensorType.of("f32", 1, elements)), frozenset())


UNITS = {Unit(0, "experts"): [weight("a", 1 << 20)], Unit(1, "experts"): [weight("b", 1 << 20)], Unit(None, "head"): [weight("c", 1 << 18)]}  # fmt: skip
COSTS = {
    Unit(0, "experts"): {"uint2_g64": 1.0, "uint4_g64": 0.01, "int8_g64": 0.0001},
    Unit(1, "experts"): {"uint2_g64": 0.02, "uint4_g64": 0.001, "int8_g64": 0.00001},
    Unit(None, "head"): {"uint4_g64": 0.05, "int8_g64": 0.0001},
}


def spent(chosen):
    return sum(UNITS[unit][0].bytes(format) for unit, (format, _) in chosen.items())


def test_bits_go_where_they_save_most():
    chosen = choose_formats(UNITS, COSTS, 1_100_000)
    assert {unit: format for unit, (format, _) in chosen.items()} == {
        Unit(0, "experts"): "uint4_g64", Unit(1, "experts"): "uint2_g64", Unit(None, "head"): "uint4_g64",
    }  # fmt: skip
    assert spent(chosen) <= 1_100_000


@pytest.mark.parametrize("budget", [820_000, 1_000_000, 1_300_000, 1_700_000, 3_000_000])
def test_the_choice_is_near_the_best(budget):
    """Against all combinations: never over the budget, and no worse than the best of nine tenths of it."""
    import itertools

    def best(room):
        found = []
        for formats in itertools.product(*COSTS.values()):
            chosen = {u: (f, COSTS[u][f]) for u, f in zip(COSTS, formats, strict=True)}
            if spent(chosen) <= room:
                found.append(sum(kl for _, kl in chosen.values()))
        return min(found)

    chosen = choose_formats(UNITS, COSTS, budget)
    kl = sum(kl for _, kl in chosen.values())
    assert spent(chosen) <= budget
    assert best(budget) <= kl <= best(int(0.9 * budget) if budget > 900_000 else budget)


def test_a_tied_weight_in_one_format_is_paid_once():
    shared = [weight("table", 1 << 20)]
    units = {Unit(None, "embedding"): shared, Unit(None, "head"): shared}
    costs = {unit: {"uint4_g64": 0.01, "int8_g64": 0.001} for unit in units}
    chosen = choose_formats(units, costs, int(shared[0].bytes("int8_g64")))
    assert {format for format, _ in chosen.values()} == {"int8_g64"}


def test_a_budget_that_cannot_be_met():
    with pytest.raises(MoecError, match="cannot be met") as error:
        choose_formats(UNITS, COSTS, 500_000)
    least = sum(UNITS[u][0].bytes(next(iter(c))) for u, c in COSTS.items())
    assert f"{float(least) / 1e6:.6g} MB" in str(error.value) and "bits per weight" in str(error.value)


# --- the file --------------------------------------------------------------------------------------------------


def plan():
    return Plan("4.5bpw", "gptq", 4.4, 1000, 0.02, 512, tuple(Entry(u, f, 10, 0.25) for u, f in TEXT.items()))


def test_a_plan_reads_as_it_was_written(tmp_path):
    plan().write(tmp_path / "quantization.json")
    found = read_plan(tmp_path / "quantization.json")
    assert found.layers() == plan().layers()
    assert (found.method, found.bits_per_weight, found.bytes) == ("gptq", 4.4, 1000)
    again = tmp_path / "again.json"
    found.write(again)
    assert again.read_text("utf-8") == (tmp_path / "quantization.json").read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda c: c.pop("budget"), "the plan lacks budget"),
        (lambda c: c.update(colour="red"), "the plan has the unknown key colour"),
        (lambda c: c.update(quantization=9), "version 9"),
        (lambda c: c.update(bytes="many"), "bytes of the plan is 'many', not int"),
        (lambda c: c["weights"][0].pop("role"), "entry 1 of the plan lacks role"),
        (lambda c: c["weights"][1].update(format="int5"), "entry 2 of the plan: there is no format int5"),
        (lambda c: c["weights"][0].update(layers="x"), "entry 1 of the plan: 'x' names no layers"),
        (lambda c: c.update(weights=[3]), "entry 1 of the plan is not an object"),
    ],
)
def test_wrong_plans(tmp_path, change, wanted):
    file = tmp_path / "quantization.json"
    plan().write(file)
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(MoecError, match=wanted):
        read_plan(file)


def test_no_plan(tmp_path):
    with pytest.raises(MoecError, match="the plan cannot be read"):
        read_plan(tmp_path / "quantization.json")
    (tmp_path / "quantization.json").write_text("{", "utf-8")
    with pytest.raises(MoecError, match="is not JSON"):
        read_plan(tmp_path / "quantization.json")


# --- the whole way ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module():
    return opt(TINY, "cleanup,raise-norm,raise-rope,lift-moe,cleanup")


def test_layers_that_differ_become_functions(module):
    found = opt(module, 'quantize{layers="0..1.attention=int8_g64 2.experts=uint4_g32"}', check=True)
    calls = [op.callee for op in found.main.ops if op.callee]
    assert calls == ["layer", "layer", "layer_2", "layer_3"]
    formats = {f.name: {c.value.name: c.value.type.dtype for c in f.consts} for f in found.functions}
    assert formats["layer"]["self_attn_q_proj"] == "int8_g64" and formats["layer_3"]["self_attn_q_proj"] == "uint4_g32"
    assert formats["layer_2"]["experts_down_proj"] == "uint4_g32" != formats["layer"]["experts_down_proj"]


def test_layers_that_agree_stay_one(module):
    found = opt(module, 'quantize{layers="0..3.attention=int8_g64"}')
    assert [f.name for f in found.functions] == ["layer", "main"]


def test_layers_that_are_not_there(module):
    with pytest.raises(MoecError, match=r"there is no 4\.attention"):
        opt(module, 'quantize{layers="0..4.attention=int8_g64"}')
    with pytest.raises(MoecError, match="cannot be stored as uint4_g256"):
        opt(module, 'quantize{layers="1.experts=uint4_g256"}')


def test_auto_writes_a_plan_that_can_be_given_back(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(cli.__file__).read_text("utf-8") * 2, "utf-8")
    start = ["compile", TINY, "--calibration", text]
    result = invoke(*start, "-o", tmp_path / "a", "--quantize", "auto", "--budget", "4.5bpw")
    assert result.exit_code == 0, result.stderr
    file = tmp_path / "a" / "quantization.json"
    content = json.loads(file.read_text("utf-8"))
    assert 4.3 < content["bits_per_weight"] <= 4.5
    assert {w["role"] for w in content["weights"]} == {"attention", "experts", "embedding", "head"}
    assert json.loads((tmp_path / "a" / "moec.json").read_text("utf-8"))["files"]["quantization.json"]
    data = (tmp_path / "a" / "model.onnx.data").stat().st_size
    assert content["bytes"] < data < 1.04 * content["bytes"] + 70_000  # norms, the router, and gaps between tensors

    result = invoke("compile", TINY, "-o", tmp_path / "b", "--quantize", file)
    assert result.exit_code == 0, result.stderr
    for name in ("program.moir", "model.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    module = parse_module((tmp_path / "b" / "program.moir").read_text("utf-8"))
    assert len({f.name for f in module.functions}) > 2

    content["weights"][0]["format"] = "mxfp4"
    file.write_text(json.dumps(content), "utf-8")
    result = invoke("compile", TINY, "-o", tmp_path / "c", "--quantize", file)
    assert result.exit_code == 2 and "cannot be stored as mxfp4" in result.stderr

    result = invoke(*start, "-o", tmp_path / "d", "--quantize", "auto", "--budget", "1MB")
    assert result.exit_code == 2 and "cannot be met" in result.stderr and not (tmp_path / "d").exists()


@pytest.mark.long
def test_auto_without_a_text_expects_what_verify_measures(tmp_path):
    result = invoke("compile", TINY, "-o", tmp_path / "a", "--quantize", "auto", "--budget", "4.5bpw")
    assert result.exit_code == 0, result.stderr
    plan = json.loads((tmp_path / "a" / "quantization.json").read_text("utf-8"))
    assert 4.3 < plan["bits_per_weight"] <= 4.5
    invoke("verify", tmp_path / "a", "--text", Path(TINY) / "heldout.txt", "--text-tokens", "4000")
    found = json.loads((tmp_path / "a" / "moec.json").read_text("utf-8"))["figures"]["measured"]["text"]["kl_mean"]
    assert 0.5 < plan["kl"] / found < 2


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--quantize", "auto"], "--quantize auto needs a budget"),
        (["--quantize", "int4", "--budget", "4bpw"], "a budget is for --quantize auto"),
        (["--budget", "4bpw"], "a budget is for --quantize auto"),
        (["--quantize", "auto,method=gptq", "--budget", "4bpw"], "there is no calibration text"),
        (
            ["--quantize", "auto", "--budget", "4bpw", "--calibration", "nowhere.txt"],
            "cannot read the calibration text",
        ),
        (["--quantize", "int4,method=gptq"], "there is no calibration text"),
        (["--quantize", "int4,method=magic"], "there is no method magic"),
        (["--quantize", "nowhere.json"], "the plan cannot be read"),
    ],
)
def test_wrong_use(tmp_path, options, wanted):
    result = invoke("compile", TINY, "-o", tmp_path / "x", *options)
    assert result.exit_code == 2 and wanted in result.stderr
    assert not (tmp_path / "x").exists()


def test_gptq_reports_its_coverage(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("nothing", "utf-8")
    start = ["compile", TINY, "--calibration", text, "-o", tmp_path / "x", "--quantize", "int4,method=gptq"]
    result = invoke(*start)
    assert result.exit_code == 2 and "one batch has 512" in result.stderr and not (tmp_path / "x").exists()
    text.write_text(Path(cli.__file__).read_text("utf-8"), "utf-8")
    result = invoke(*start)
    assert result.exit_code == 0, result.stderr
    assert "calibration: " in result.stderr and "experts" in result.stderr
    figures = json.loads((tmp_path / "x" / "moec.json").read_text("utf-8"))["figures"]["calibration"]
    assert figures["experts"] == 64 and len(figures["layers"]) == 4
    assert sum(figures["layers"][0]["tokens"]) == 2 * figures["tokens"]

    again = invoke("compile", tmp_path / "x", "-o", tmp_path / "y", "--calibration", text)
    assert again.exit_code == 2 and "already lowered" in again.stderr and "stage moe" in again.stderr
