"""Artifacts with quantized weights: their numbers, what is kept of them, and how the commands are used."""

import json

import moec
import numpy as np
import pytest
import torch
from moec.compiler import driver
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.ir.pipelines import parse_pipeline, print_pipeline
from moec.compiler.quantize.request import read_request, with_quantization
from moec.compiler.runtime.reference import Reference
from moec.compiler.runtime.text_score import score_text
from moec.compiler.weights import memory
from moec.compiler.weights.memory import tile_bytes
from moec_command import invoke
from tiny_models import meaning, padded_batch, random_model

TINY = "examples/tiny-moe"
EXACT = 1e-4


@pytest.fixture(scope="module")
def tiny_int4(tmp_path_factory, request):
    """Return the artifact of examples/tiny-moe in int4."""
    source = request.config.rootpath / TINY
    return moec.compile(source, out=tmp_path_factory.mktemp("int4") / "artifact", quantize="int4")


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("olmoe", "int4,group=16"),
        ("qwen3_moe", "int4,group=16,symmetric=true"),
        ("qwen2_moe", "int8,group=16"),
        ("deepseek_v3", "int4,group=16"),
        ("gpt_oss", "int4,group=16,head=int8"),
        ("mixtral", "experts=int2,group=16,embedding=int4"),
    ],
)
def test_exact_artifacts_compute_with_what_the_codes_stand_for(family, spec, tmp_path):
    model = random_model(FAMILIES[family])
    artifact = moec.compile(model, out=tmp_path / "a", quantize=spec, accuracy="exact")
    session, run = artifact.session(spinning=False), meaning(model, spec)
    ids, mask, positions = padded_batch(128, 9)
    logits, states = session.step(ids.numpy(), mask.numpy(), positions.numpy())
    empty = [
        torch.zeros([3 if s == "B" else 0 if s == "P" else s for s in e["shape"]]) for e in artifact.manifest["states"]
    ]
    names = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    given = [names[i["name"]] for i in artifact.manifest["inputs"]]
    wanted, *caches = run([*given, *empty])
    real = mask.bool()
    assert np.abs(logits - wanted.numpy())[real].max() <= EXACT * wanted[real].abs().max()
    names = {
        "input_ids": ids[:, -1:],
        "attention_mask": torch.cat([mask, mask[:, -1:]], 1),
        "position_ids": positions[:, -1:] + 1,
    }
    logits, _ = session.step(*(names[n].numpy() for n in ("input_ids", "attention_mask", "position_ids")), states)
    wanted = run([*(names[i["name"]] for i in artifact.manifest["inputs"]), *caches])[0].numpy()
    assert np.abs(logits - wanted).max() <= EXACT * np.abs(wanted).max()


def test_int8_activations_stay_near(tiny_int4, request):
    """The two accuracies of one artifact differ by less than quantizing the weights does."""
    ids = np.array(tiny_int4.tokenizer.encode((request.config.rootpath / TINY / "heldout.txt").read_text()))[:1024]
    windows = list(ids.reshape(4, 256))
    fast, exact = (tiny_int4.session(spinning=False, accuracy=a) for a in ("fast", "exact"))
    assert 0 < score_text(fast, exact, windows).kl_mean < 2e-3


def test_quality_and_what_is_kept_of_it(tiny_int4, request):
    text = str(request.config.rootpath / TINY / "heldout.txt")
    command = ["verify", str(tiny_int4.folder), "--text", text, "--text-tokens", "4000"]
    printed = invoke(*command)
    assert printed.exit_code == 0, printed.output
    assert "KL" in printed.output and "top-1 agreement" in printed.output and "perplexity" in printed.output
    manifest = json.loads((tiny_int4.folder / "moec.json").read_text())
    kept = manifest["figures"]["measured"]["text"]
    assert kept["kl_mean"] < 0.04 and kept["top1"] > 0.88
    assert kept["perplexity"] < 1.05 * kept["reference_perplexity"]
    assert manifest["lossy"] and manifest["precision"]["layer"] == ["f32", "uint4_g32", "uint4_g64"]


def test_int8_is_nearly_the_source(tmp_path, request):
    folder = request.config.rootpath / TINY
    artifact = moec.compile(folder, out=tmp_path / "a", quantize="int8")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = np.array(artifact.tokenizer.encode((folder / "heldout.txt").read_text()))[:24576]
    score = score_text(artifact.session(spinning=False), Reference.of(model, "source"), list(ids.reshape(-1, 512)))
    assert score.perplexity <= 1.002 * score.reference_perplexity and score.kl_mean < 2e-3


def test_the_same_bytes_with_any_memory(tiny_int4, tmp_path, request):
    again = moec.compile(request.config.rootpath / TINY, out=tmp_path / "a", quantize="int4", memory_limit=3 * 10**6)
    hashes = [a.manifest["files"]["model.onnx.data"] for a in (tiny_int4, again)]
    assert hashes[0] == hashes[1]


def test_from_every_stage(tiny_int4, tmp_path, request):
    """The dumped program compiles to the same bytes, and the final one of the artifact too."""
    source = request.config.rootpath / TINY
    module = driver.compile(source, quantize="int4", stop_after="moe")
    from moec.compiler.text.printer import print_module

    (tmp_path / "moe.moir").write_text(print_module(module))
    for start in (tmp_path / "moe.moir", tiny_int4.folder / "program.moir"):
        again = moec.compile(start, out=tmp_path / f"from-{start.stem}", weights=source)
        assert again.manifest["files"]["model.onnx.data"] == tiny_int4.manifest["files"]["model.onnx.data"]
        assert again.manifest["lossy"]


def test_exact_is_refused_where_the_runtime_rounds(tmp_path, request):
    artifact = moec.compile(request.config.rootpath / TINY, out=tmp_path / "a", quantize="int8")
    with pytest.raises(MoecError, match="rounds activations to int8") as caught:
        artifact.session(accuracy="exact")
    assert "compile with --accuracy exact" in caught.value.todo


def test_running_needs_no_torch(tiny_int4):
    import subprocess
    import sys

    code = (
        "import sys; from moec.compiler.runtime.artifact import Artifact;"
        f"Artifact.open({str(tiny_int4.folder)!r}).run(tokens=[5, 6], max_new_tokens=2);"
        "print(sorted({'torch', 'transformers', 'sympy', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "int5"], "there is no format int5"),
        (["--quantize", "experts=int4,group=48"], "48 is no group size"),
        (["--quantize", "int4,group=256"], "groups of 256 do not divide 128"),
        (["--quantize", "mxfp4"], "target cpu does not run mxfp4: MatMulNBits mxfp4 is rejected"),
        (["--quantize", "int4,colour=red"], "has no option colour"),
        (["--quantize", ""], "--quantize is empty"),
        (["--quantize", "int4", "--memory-limit", "100kB"], "too few to work in"),
        (["--quantize", "int4", "--memory-limit", "lots"], "is not a size"),
    ],
)
def test_wrong_wishes(options, message, tmp_path, request):
    command = ["compile", str(request.config.rootpath / TINY), "-o", str(tmp_path / "out"), *options]
    result = invoke(*command)
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (tmp_path / "out").exists()


def test_spelling():
    def spelled(pipeline, text):
        return print_pipeline(with_quantization(parse_pipeline(pipeline), read_request(text), None)[0])

    assert spelled("a,lower", "int4") == "a,quantize,lower"
    assert spelled("a{x=1,y=2},lower{accuracy=exact}", "experts=int4,group=64") == (
        'a{x=1, y=2},quantize{experts=int4, group="64"},lower{accuracy=exact}'
    )
    assert "router" not in spelled("lower", "int8") and "head=int8" in spelled("lower", "int8")


def test_tiles_fit_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "usable_threads", lambda: 2)
    assert tile_bytes(10**9) == 8 << 20
    assert tile_bytes(20 * 10**6) == 10**6
    with pytest.raises(MoecError, match="too few") as caught:
        tile_bytes(10**6)
    assert "at least 2MB" in caught.value.todo
