"""Files with something wrong in them, made at random: each ends with exit code 0, 1 or 2 and at most one error message.

By hand, many more: `PYTHONPATH=tests/support python tests/test_mutated_files.py 20000`.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from moec_command import invoke
from onnx_files import filled_model
from places import TINY
from written_experts import WIDTH, Einsum

PYTHON = re.compile(r"Traceback|\b[A-Z]\w*(Error|Exception|Warning)\b(?!\w*:? in )|moec failed|<class|object at 0x")
SLOW = 60  # seconds that a command may take; all of them take a second or two
NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "",
    "x", "\0", "é\u2028", "../x", "/etc/passwd", "a" * 10000, "B", "P", "floordiv(P, 0)", "P - 7", "1e9", [], [None],
    [0, 0], ["x"], [[]], {}, {"a": {}}, {"": 0},
)  # fmt: skip
INTEGERS = (0, 1, -1, 2, 7, 13, 23, 128, 2**31, 2**63 - 1, -(2**63))
TEXTS = (
    "[" * 100_000,
    '{"a":' * 100_000,
    "",
    "null",
    "7",
    '"x"',
    "[]",
    "{}",
    '{"a": 1' + "0" * 400 + "}",
    '{"a": "\\ud800"}',
)
WORDS = (
    "{", "}", "(", ")", "[", "]", "%", "@", "=", ",", ":", "..", "-", "0", "1", "-1", "65537", "2147483648", "9" * 400,
    "{0..2147483648}", "f32", "i64", "u4", "int4_g32", "state", "_", "true", "nan", "B", "S", "P", "floordiv(S, 0)",
    '"', '""', '"\\ud800"', "\0", "é", "const", "return", "call", "func", "tensor", "stack", "core.add", "nn.embedding",
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths to all values inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, v in inner for p in places(v, (*path, key)))]


def mutated_json(text: str, rng: random.Random) -> bytes:
    """Return a JSON text with values replaced, keys removed or added, or bytes changed."""
    kind = rng.random()
    if kind < 0.05:
        return rng.choice(TEXTS).encode()
    if kind < 0.12:
        return mutated_bytes(text.encode(), rng)
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path = rng.choice(places(value))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        match rng.randrange(5):
            case 0:
                del holder[path[-1]]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(["", "x", "\0", "../a", "eos_token_id"])] = copy.deepcopy(rng.choice(NASTY))
            case _:
                holder[path[-1]] = copy.deepcopy(rng.choice(NASTY))
    return json.dumps(value, ensure_ascii=rng.random() < 0.9).encode()


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + data[at : at + 40] + data[at:]
    return data[:at] + data[at + rng.randrange(1, 20) :]


def mutated_text(text: str, rng: random.Random) -> bytes:
    """Return IR with words replaced, removed, doubled or put in."""
    if rng.random() < 0.1:
        return mutated_bytes(text.encode(), rng)
    words = re.findall(r'"[^"]*"|[\w.]+|\s+|.', text)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(words))
        other = rng.choice(WORDS) if rng.random() < 0.6 else rng.choice(words)
        words[at : at + rng.randrange(2)] = [other] * rng.choice((1, 1, 1, 0, 2))
    return "".join(words).encode("utf-8", "replace")


def mutated_archive(data: bytes, rng: random.Random) -> bytes:
    """Return a `.pt2` file with one of its JSON texts mutated, or bytes changed."""
    if rng.random() < 0.1:
        return mutated_bytes(data, rng)
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
        wanted = rng.choice([name for name in old.namelist() if name.endswith(".json")])
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, mutated_json(content.decode(), rng) if info.filename == wanted else content)
    return changed.getvalue()


def mutated_onnx(data: bytes, rng: random.Random) -> bytes:
    """Return an ONNX file with nodes, types, attributes, initializers or external data mutated, or bytes changed."""
    if rng.random() < 0.15:
        return mutated_bytes(data, rng)
    model = onnx.load_model_from_string(data)
    graph = model.graph
    for _ in range(rng.choice((1, 1, 2, 4))):
        node, other = rng.choice(graph.node), rng.choice(graph.node)
        tensor, info = rng.choice(graph.initializer), rng.choice([*graph.input, *graph.output])
        match rng.randrange(13):
            case 0 if node.input:
                node.input[rng.randrange(len(node.input))] = rng.choice(
                    [*other.input, *other.output, "", "x", "\u2028{0..9}"]
                )
            case 1:
                node.op_type = rng.choice(
                    [other.op_type, "Loop", "If", "Mod", "NonZero", "Compress", "ReduceL2", "LSTM", "", "é"]
                )
            case 2 if node.attribute:
                attribute = rng.choice(node.attribute)
                attribute.i, attribute.f = rng.choice(INTEGERS), rng.choice((0.0, float("nan"), 1e38))
                attribute.type = rng.randrange(15)
                attribute.ints.extend(rng.choice(((), (2**62,), (-1, 0))))
            case 3:
                del tensor.dims[rng.randrange(len(tensor.dims) + 1) :]
                tensor.dims.extend(rng.choice(((), (0,), (-1,), (2**31,), (2**40, 2**40), (1,) * 40)))
            case 4:
                tensor.data_type = rng.randrange(30)
            case 5:
                tensor.data_location = onnx.TensorProto.EXTERNAL
                tensor.ClearField("raw_data")
                location = rng.choice(("x.onnx", "../secret.bin", "/etc/passwd", ".", "", "\0", "a" * 5000, "link.bin"))
                for key, value in (
                    ("location", location),
                    ("offset", rng.choice(INTEGERS)),
                    ("length", rng.choice(INTEGERS)),
                ):
                    tensor.external_data.add(key=key, value=str(value))
            case 6:
                axes = info.type.tensor_type.shape.dim
                if axes:
                    rng.choice(axes).dim_param = rng.choice(
                        ("", "N", "N + 1", "floordiv(N, 0)", "(" * 5000, "-N", "é", "9" * 50)
                    )
            case 7:
                info.type.tensor_type.elem_type = rng.randrange(30)
            case 8:
                graph.node.remove(node)
            case 9:
                graph.node.add().CopyFrom(node)
            case 10:
                tensor.raw_data = tensor.raw_data[: rng.randrange(8)] or rng.randbytes(8)
            case 11:
                model.opset_import[0].version = rng.choice(INTEGERS)
            case 12:
                function = model.functions.add(domain=node.domain, name=node.op_type)
                function.input.extend(node.input)
                function.output.extend(node.output)
                function.node.add().CopyFrom(node)
                function.node.add().CopyFrom(other)
    return model.SerializeToString()


PROGRAM = """moec 1 stage moe
source "gone"
dim B in 1..8
dim S in 1..64

func @layer(%x: f32[B, S, 32], %ids: i64[B, S])
    -> (f32[B, S, 32]) weights "l.{layer}." {
  const %w : f32[32, 32] = cast(tensor("w", bf16[32, 32]), to=f32)
  const %up : f32[4, 32, 32] = cast(stack(tensor("e.{0..3}.up", bf16[32, 32])), to=f32)
  const %t : f32[40, 32] = concat(tensor("a", f32[20, 32]), tensor("b", f32[20, 32]), axis=0)
  const %b : f32[2] = literal(f32[2], [0.5, -0.25])
  %e = nn.embedding(%ids, %t) : f32[B, S, 32]
  %y = core.linear(%x, %w, _) : f32[B, S, 32] loc("mlp")
  %z = core.add(%y, %e) : f32[B, S, 32]
  return %z
}

func @main(%x: f32[B, S, 32], %ids: i64[B, S])
    -> (f32[B, S, 32]) {
  %a = call @layer(%x, %ids) {layer=0} : f32[B, S, 32]
  %c = call @layer(%a, %ids) {layer=1} : f32[B, S, 32]
  return %c
}
"""
PLAN = json.dumps({
    "quantization": 1, "budget": "4.5bpw", "method": "rtn", "bits_per_weight": 4.5, "bytes": 100, "kl": 0.1,
    "tokens": 10, "weights": [
        {"layers": "0..1", "role": "attention", "experts": None, "format": "int8_g32", "bytes": 10, "kl": 0.1},
        {"layers": "0", "role": "experts", "experts": "0..2,3", "format": "uint4_g32", "bytes": 10, "kl": None},
    ],
})  # fmt: skip
GENERATION = json.dumps(
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "eos_token_id": [3, 4], "pad_token_id": 0}
)
TOKENIZER = json.dumps(
    {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"content": "x"},
        "added_tokens_decoder": {"5": {"content": "x"}},
        "model_max_length": 10**30,
    }
)
CONFIG = json.dumps(
    {"model_type": "x", "eos_token_id": [3, 4], "text_config": {"eos_token_id": 2, "vocab_size": 40}, "hidden_size": 8}
)
RUN = ("run", "{folder}", "--tokens", "5,6", "--max-new-tokens", "2")


class Cases:
    """What is mutated: a file in a folder, how, and the command that reads it."""

    def __init__(self, artifact: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(artifact, folder / "artifact")
        for name, text in (
            ("generation_config.json", GENERATION),
            ("tokenizer_config.json", TOKENIZER),
            ("config.json", CONFIG),
        ):
            (folder / "artifact" / name).write_text(text)
        (folder / "p").mkdir()
        (folder / "p" / "plan.json").write_text(PLAN)
        (folder / "p" / "x.moir").write_text(PROGRAM)
        (folder / "model").mkdir()
        shutil.copy(TINY / "config.json", folder / "model" / "config.json")
        (folder / "t").mkdir()
        torch.manual_seed(0)
        inputs, sizes = (torch.randn(5, WIDTH),), ({0: torch.export.Dim.AUTO},)
        torch.export.save(
            torch.export.export(Einsum(), inputs, dynamic_shapes=sizes, strict=False), folder / "t" / "x.pt2"
        )
        (folder / "o").mkdir()
        (folder / "o" / "x.onnx").write_bytes(filled_model("IndexAdd").SerializeToString())
        plan = ("compile", "{folder}/x.moir", "--quantize", "{folder}/plan.json", "--stop-after", "moe")
        self.files = {
            "moec.json": ("artifact/moec.json", mutated_json, RUN),
            "generation_config.json": ("artifact/generation_config.json", mutated_json, RUN),
            "tokenizer_config.json": ("artifact/tokenizer_config.json", mutated_json, RUN),
            "config.json": ("artifact/config.json", mutated_json, RUN),
            "plan": ("p/plan.json", mutated_json, plan),
            "program": ("p/x.moir", mutated_text, ("opt", "{folder}/x.moir", "-p", "cleanup")),
            "ONNX model": ("o/x.onnx", mutated_onnx, ("inspect", "{folder}/x.onnx", "--json")),
            "torch program": ("t/x.pt2", mutated_archive, ("inspect", "{folder}/x.pt2", "--json")),
            "model": ("model/config.json", mutated_json, ("inspect", "{folder}", "--json")),
        }

    def run(self, name: str, rng: random.Random) -> str | None:
        """Mutate one file and run its command; return what is wrong with the outcome."""
        place, mutate, command = self.files[name]
        path = self.folder / place
        before = path.read_bytes()
        content = mutate(before if mutate in (mutated_archive, mutated_onnx) else before.decode(), rng)
        path.write_bytes(content)
        try:
            start = time.perf_counter()
            result = invoke(*(part.format(folder=path.parent) for part in command))
            seconds = time.perf_counter() - start
        finally:
            path.write_bytes(before)
        shown = f"{name} (exit code {result.exit_code}, {seconds:.1f} s)\n{content[:3000]!r}\n{result.stderr[-1500:]}"
        if result.exit_code not in (0, 1, 2) or PYTHON.search(result.stderr) or seconds > SLOW:
            return shown
        messages = len(re.findall("^error: ", result.stderr, re.MULTILINE))
        return shown if messages != (result.exit_code != 0) else None


COUNTS = {
    "moec.json": 60, "generation_config.json": 40, "tokenizer_config.json": 30, "config.json": 30, "plan": 60, "program": 150, "torch program": 30, "ONNX model": 20, "model": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def cases(tiny_lm, tmp_path_factory) -> Cases:
    return Cases(tiny_lm[1], tmp_path_factory.mktemp("mutated"))


@pytest.mark.parametrize("name", COUNTS)
def test_one_message_whatever_a_file_holds(cases, name):
    rng = random.Random(name)
    found = [problem for _ in range(COUNTS[name]) if (problem := cases.run(name, rng))]
    assert not found, f"{len(found)} of {COUNTS[name]}\n" + "\n\n".join(found[:3])


if __name__ == "__main__":
    import transformers
    from tiny_lm_artifact import write_tiny_lm

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        config = transformers.GPT2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        (Path(temporary) / "a").mkdir()
        write_tiny_lm(transformers.GPT2LMHeadModel(config).eval(), Path(temporary) / "a")
        many = Cases(Path(temporary) / "a", Path(temporary))
        chosen, rng, seen = sys.argv[2:] or list(COUNTS), random.Random(time.time()), 0
        for turn in range(int(sys.argv[1])):
            if problem := many.run(chosen[turn % len(chosen)], rng):
                seen += 1
                print(problem, flush=True)
        print(f"{seen} problems in {sys.argv[1]} files")
