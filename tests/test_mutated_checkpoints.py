"""Quantized checkpoints with one tensor dropped, renamed, cast or reshaped: right numbers, or an error that names it.

Each mutation goes the whole way of an import, but for the trace of the model's code, which does not look at the checkpoint
and is made once for each layer of a model. What a program's weights then hold is compared with what the unchanged
checkpoint stands for, decoded by the writers in checkpoint_formats.py. Run this file to try more of them than the suite does:
`PYTHONPATH=tests/support python tests/test_mutated_checkpoints.py 50000 [SEED]`.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import checkpoint_formats as formats
import pytest
import torch
from deepseek_v4_checkpoint import official_config, write_official
from deepseek_v4_models import WIDE
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.frontends.transformers import model as importing
from moec.compiler.ir.module import walk_calls
from moec.compiler.ir.recipes import Literal, bind_recipe
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.checkpoint import Checkpoint
from quantized_checkpoints import AWQ, CT4, CT4_ZEROS, GPTQ, quantized
from safetensors.torch import load_file, save_file
from tiny_models import random_model, save

Tensors = dict[str, torch.Tensor]
Numbers = list[dict[str, torch.Tensor]]
LAYERS = 2


def _int8(**more) -> dict:
    return formats.ct_config("int-quantized", type="int", num_bits=8, strategy="channel", **more)


def _blocks(weight):
    return formats.fp8(weight, (32, 32), "weight_scale_inv")


LAYOUTS: dict[str, tuple[str, dict, Callable]] = {
    "gptq": ("mixtral", GPTQ, formats.gptq),
    "gptq v2": ("qwen3_moe", {**GPTQ, "checkpoint_format": "gptq_v2"}, lambda w: formats.gptq(w, version=2)),
    "gptq 3 bits": ("qwen3_moe", {**GPTQ, "bits": 3}, lambda w: formats.gptq(w, bits=3)),
    "gptq act order": ("qwen3_moe", {**GPTQ, "desc_act": True}, lambda w: formats.gptq(w, act_order=True)),
    "awq": ("qwen3_moe", AWQ, formats.awq),
    "ct int4": ("olmoe", CT4, formats.ct_packed),
    "ct int4 zeros": ("qwen2_moe", CT4_ZEROS, lambda w: formats.ct_packed(w, zeros=True)),
    "ct int8": ("mixtral", _int8(), formats.ct_int8),
    "ct int8 zeros": ("qwen3_moe", _int8(symmetric=False), lambda w: formats.ct_int8(w, zeros=True)),
    "fp8 blocks": ("deepseek_v3", {"quant_method": "fp8", "weight_block_size": [32, 32]}, _blocks),
    "fp8 tensor": ("qwen3_moe", {"quant_method": "modelopt", "quant_algo": "FP8"}, formats.fp8),
    "nvfp4 modelopt": ("mixtral", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, formats.nvfp4),
    "nvfp4 ct": (
        "qwen3_moe", formats.ct_config("nvfp4-pack-quantized", type="float", num_bits=4, group_size=16),
        lambda w: formats.nvfp4(w, tool="ct"),
    ),
    "mxfp4 ct": (
        "olmoe", formats.ct_config("mxfp4-pack-quantized", type="float", num_bits=4, group_size=32), formats.mxfp4,
    ),
    "mxfp8": ("mixtral", {"quant_method": "mxfp8"}, formats.mxfp8),
    "gpt_oss": ("gpt_oss", {"quant_method": "mxfp4"}, formats.mxfp4),
    "deepseek_v4": ("deepseek_v4", {}, formats.mxfp4),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A checkpoint of a layout: its folder, its tensors, what the weights of its program hold."""

    folder: Path
    tensors: Tensors
    numbers: Numbers


def _write(folder: Path, tensors: Tensors) -> None:
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors")


def _gpt_oss(folder: Path, plain: Path, config: dict) -> None:
    stored, meant = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = meant[name] = tensor
        if name.endswith(("gate_up_proj", "down_proj")):
            leaves, made = formats.mxfp4(tensor.transpose(1, 2).numpy(), "_blocks", "_scales")
            leaves["_blocks"] = leaves["_blocks"].unflatten(-1, (-1, 16))
            del stored[name]
            stored |= {f"{name}{leaf}": t for leaf, t in leaves.items()}
            meant[name] = torch.from_numpy(made).transpose(1, 2)
    folder.mkdir()
    _write(folder, stored)
    _write(plain, meant)
    settings = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))


@cache
def case_of(name: str) -> Case:
    """Write the checkpoint of a layout, and find what its program's weights hold from the plain one beside it."""
    family, config, write = LAYOUTS[name]
    root = Path(tempfile.mkdtemp(prefix="mutated-"))
    changes = WIDE if family == "deepseek_v4" else {"num_hidden_layers": LAYERS}
    model = random_model(FAMILIES[family], **changes)
    folder = root / "quantized"
    if family == "deepseek_v4":
        settings = official_config(model)
        write_official(model, folder, settings, mtp=False)
        plain = save(model, root / "plain")
    else:
        plain = save(model, root / "plain")
        if family == "gpt_oss":
            _gpt_oss(folder, plain, config)
        else:
            formats.quantize_folder(folder, plain, config, quantized(write))
    tensors = load_file(folder / "model.safetensors")
    return Case(folder, tensors, numbers_of(plain))


def numbers_of(folder: Path) -> Numbers:
    """Return what the weights of a folder's program hold: for each call of a function, by the name in the program."""
    loaded = load(folder)
    assert isinstance(loaded.weights, Checkpoint)
    found: Numbers = []
    with loaded.weights as weights:
        for function, bound in walk_calls(loaded.module):
            own = {}
            for const in function.consts:
                if not isinstance(const.recipe, Literal):
                    own[const.value.name] = evaluate_recipe(
                        bind_recipe(const.recipe, function.weights, bound), weights
                    ).float()
            found.append(own)
    return found


# --- mutations -----------------------------------------------------------------------------------------------------

WIDER = {
    torch.float16: (torch.float32, torch.float64), torch.bfloat16: (torch.float32,), torch.float32: (torch.float64,),
    torch.int32: (torch.int64,), torch.uint8: (torch.int16, torch.int32), torch.int8: (torch.int16, torch.int32),
    torch.float8_e4m3fn: (torch.float16, torch.bfloat16, torch.float32), torch.float8_e8m0fnu: (torch.float32,),
}  # fmt: skip
SAME_BITS = {
    torch.uint8: (torch.int8,), torch.int8: (torch.uint8,), torch.int32: (torch.float32,),
    torch.float8_e4m3fn: (torch.uint8, torch.int8, torch.float8_e5m2), torch.float8_e8m0fnu: (torch.uint8,),
    torch.float16: (torch.int16,), torch.float32: (torch.int32,), torch.bfloat16: (torch.int16,),
}  # fmt: skip


def _drop(tensors: Tensors, name: str, rng: random.Random) -> str:
    del tensors[name]
    return "dropped"


def _rename(tensors: Tensors, name: str, rng: random.Random) -> str:
    owner, _, leaf = name.rpartition(".")
    parts = owner.split(".")
    ways = [
        f"{name}s",
        f"{owner}.{leaf[:-1]}",
        f"{owner}.x{leaf}",
        f"{owner}x.{leaf}",
        f"x{name}",
        f"{owner}.old.{leaf}",
    ]
    if numbers := [i for i, part in enumerate(parts) if part.isdigit()]:
        parts[rng.choice(numbers)] = "77"
        ways.append(".".join([*parts, leaf]))
    new = rng.choice([way for way in ways if way not in tensors])
    tensors[new] = tensors.pop(name)
    return f"renamed to {new}"


def _cast(tensors: Tensors, name: str, rng: random.Random) -> str:
    """Cast to a dtype that holds all of the numbers, or read the same bits as another dtype.

    Not f16 as bf16: nothing in a checkpoint says that such numbers are wrong.
    """
    tensor = tensors[name]
    wider = [("cast", d) for d in WIDER.get(tensor.dtype, ())]
    viewed = [("viewed as", d) for d in SAME_BITS.get(tensor.dtype, ()) if tensor.dim()]
    how, dtype = rng.choice(wider + viewed or [("cast", torch.float64)])
    tensors[name] = tensor.to(dtype) if how == "cast" else tensor.view(dtype)
    return f"{how} {dtype}"


def _reshape(tensors: Tensors, name: str, rng: random.Random) -> str:
    """Give it another shape: with the same numbers in order, or with some of them gone or there twice."""
    tensor = tensors[name]
    sizes = list(tensor.shape)
    ways = [[*sizes, 1], [1, *sizes], [-1]]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        ways.append(sizes[::-1])
    if sizes and sizes[0] % 2 == 0:
        ways.append([2, sizes[0] // 2, *sizes[1:]])
    if len(sizes) > 1 and sizes[0] % 2 == 0:
        ways.append([sizes[0] // 2, *sizes[1:-1], 2 * sizes[-1]])
    made = [tensor.reshape(way) for way in ways if list(tensor.reshape(way).shape) != sizes]
    if sizes and sizes[0] > 1:
        made += [tensor[:-1], tensor[: sizes[0] // 2], torch.cat([tensor, tensor[:1]])]
    if len(sizes) > 1 and sizes[-1] > 1:
        made += [tensor[..., :-1], tensor[..., : sizes[-1] // 2]]
    tensors[name] = rng.choice(made)
    return f"reshaped {sizes} to {list(tensors[name].shape)}"


MUTATIONS = {"drop": _drop, "rename": _rename, "cast": _cast, "reshape": _reshape}


# what a checkpoint does without: implied by the rest, or about something else than weights
def _implied(layout: str, name: str) -> bool:
    return name.endswith(("weight_shape", "input_scale")) or (name.endswith("g_idx") and "act" not in layout)


def fault_of(layout: str, rng: random.Random) -> tuple[str, str]:
    """Mutate a checkpoint once; return what was done, and what is wrong with the outcome (nothing if all is well)."""
    case = case_of(layout)
    tensors = dict(case.tensors)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(sorted(MUTATIONS))
    what = f"{layout}: {name} {MUTATIONS[kind](tensors, name, rng)}"
    with tempfile.TemporaryDirectory(prefix="mutated-") as folder:
        _write(Path(folder), tensors)
        (Path(folder) / "config.json").write_bytes((case.folder / "config.json").read_bytes())
        try:
            found = numbers_of(Path(folder))
        except MoecError as error:
            names = [name, *(tensors.keys() - case.tensors.keys())]
            if error.exit_code != 2:
                return what, f"exit code {error.exit_code}: {error}"
            return what, "" if any(n in str(error) for n in names) else f"the error does not name it: {error}"
        except Exception as error:
            return what, f"{type(error).__name__}: {error}"
    wrong = list(_differences(found, case.numbers))
    return what, f"wrong without a word: {', '.join(wrong[:3])}" if wrong else ""


def _differences(found: Numbers, wanted: Numbers) -> Iterator[str]:
    if [own.keys() for own in found] != [own.keys() for own in wanted]:
        yield "the weights of the program"
        return
    for call, (own, right) in enumerate(zip(found, wanted, strict=True)):
        for name, numbers in own.items():
            if numbers.shape != right[name].shape or not torch.allclose(numbers, right[name], rtol=1e-5, atol=1e-7):
                yield f"%{name} of call {call}"


class TracedOnce:
    """Traces of layers by what tells them apart in these models, for imports that differ in their weights alone."""

    def __init__(self, trace: Callable) -> None:
        self.trace, self.known = trace, {}

    def __call__(self, program, inputs, place):
        model = (self.layout, place, tuple((tuple(i.shape), i.dtype) for i in inputs))
        if model not in self.known:
            self.known[model] = self.trace(program, inputs, place)
        return self.known[model]


@pytest.fixture
def traced_once(monkeypatch):
    once = TracedOnce(importing.trace_module)
    monkeypatch.setattr(importing, "trace_module", once)
    return once


def faults(once: TracedOnce, layouts: list[str], count: int, seed: int) -> dict[str, str]:
    rng, found = random.Random(seed), {}
    for i in range(count):
        once.layout = layouts[i % len(layouts)]
        what, fault = fault_of(once.layout, rng)
        if fault:
            found[what] = fault
            print(f"{what}\n    {fault.splitlines()[0]}", flush=True)
        if i % 1000 == 999:
            print(f"{i + 1} of {count}", flush=True)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unchanged_checkpoint_is_right(layout, traced_once):
    traced_once.layout = layout
    case = case_of(layout)
    assert not list(_differences(numbers_of(case.folder), case.numbers))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_changed_tensor(layout, traced_once):
    assert not faults(traced_once, [layout], 12, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_changed_tensor_many_times(layout, traced_once):
    assert not faults(traced_once, [layout], 120, seed=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    once = TracedOnce(importing.trace_module)
    importing.trace_module = once
    number, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    only = sys.argv[3:] or list(LAYOUTS)
    found = faults(once, only, number, first)
    print(f"{number} mutations, {len(found)} faults", Counter(what.partition(":")[0] for what in found))
