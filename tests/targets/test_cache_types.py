"""`--kv`: in what each target can store caches, and what it says of the others."""

import moec
import pytest
from click.testing import CliRunner
from moec.compiler.cli.commands import main
from moec.compiler.errors import MoecError
from moec.compiler.ir.pipelines import parse_pipeline, print_pipeline
from moec.compiler.text.parser import parse_module
from moec.passes import PASSES
from moec.targets import open_target
from places import TINY


def stored(target, kv, pipeline=None):
    """Return the text of the passes that store caches of a target as asked, by default those that it has by itself."""
    chosen = open_target(target, {})
    return print_pipeline(chosen.store_caches(parse_pipeline(pipeline) if pipeline else chosen.pipeline, kv))


@pytest.mark.parametrize(
    ("target", "kv", "refusal"),
    [
        *((t, "fp8", f"{t} does not store caches as fp8.*it has bf16 only")
          for t in ("nvidia-a100", "ascend-950dt", "cambricon-mlu370")),
        ("nvidia-h200", "int8", "nvidia-h200 does not store caches as int8.*--kv fp8 is the nearest of bf16, fp8"),
        ("nvidia-h200", "f32", "does not store caches as f32.*--kv bf16 is the nearest"),
        ("cpu", "fp8", "cpu does not store caches as fp8.*--kv int8 is the nearest"),
        ("onnx", "f16", "onnx does not store caches as f16.*it has f32 only"),
        ("gguf", "fp8", "gguf has no caches whose type can be chosen.*leave it out"),
        ("nvidia-h200", "fp4", "caches are not stored as fp4.*auto, f32, f16, bf16, fp8, int8"),
    ],
)  # fmt: skip
def test_a_type_that_a_target_lacks_is_refused_with_the_nearest(target, kv, refusal):
    with pytest.raises(MoecError, match=f"(?s){refusal}"):
        moec.compile(TINY, target=target, stop_after="kernel", kv=kv)


def test_the_option_says_what_is_done_by_default_or_takes_the_place_of_it():
    plain = print_pipeline(open_target("nvidia-h200", {}).pipeline)
    assert {stored("nvidia-h200", kv) for kv in (None, "auto", "bf16")} == {plain}
    assert stored("nvidia-h200", "fp8") == f"{plain},round-caches"
    assert stored("nvidia-h200", "bf16", "lower,round-caches") == "lower"
    by_default = print_pipeline(open_target("cpu", {}).pipeline)
    assert by_default.endswith("lower,store-caches") and stored("cpu", "auto") == by_default
    assert stored("cpu", "int8") == f"{by_default}{{type=int8}}"
    assert stored("cpu", "int8", "lower,store-caches{type=f16}") == "lower,store-caches{type=int8}"
    assert stored("onnx", "f32") == print_pipeline(open_target("onnx", {}).pipeline)


def test_a_program_without_a_cache_to_round():
    program = parse_module("moec 1 stage kernel\n\nfunc @main(%x: f32[2]) -> (f32[2]) {\n  return %x\n}\n", "program")
    with pytest.raises(MoecError, match="no cache is stored as fp8"):
        PASSES["round-caches"](program, to="fp8")


def test_inspect_takes_the_option():
    found = [
        CliRunner().invoke(main, ["inspect", str(TINY), *given, "--kv", "fp8"]) for given in ([], ["--target", "cpu"])
    ]
    assert "--kv belongs to --target" in found[0].stderr
    assert "cpu does not store caches as fp8" in found[1].stderr
