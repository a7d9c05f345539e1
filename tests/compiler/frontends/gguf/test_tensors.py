"""Tensors of GGUF files in other forms than the usual: an expert each, gate and up in one, queries, keys and values in one."""

import re

import gguf_files
import moec
import numpy as np
import pytest
import torch
from gguf_models import ARCHITECTURES, gguf_tensors, metadata
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.frontends.transformers.dequantized import dequantized_model
from quantized_checkpoints import EXACT, difference
from tiny_models import random_model, save


def pieces(kind, shape, raw):
    """Return a tensor's bytes with one row of its own for each row of the tensor."""
    return np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -1)


def of_experts(tensors):
    """Return the tensors with one for each expert, as files of early 2024 have them."""
    found = {}
    for name, (kind, shape, raw) in tensors.items():
        if "_exps." not in name:
            found[name] = kind, shape, raw
            continue
        for i, own in enumerate(pieces(kind, shape, raw)):
            found[name.replace("_exps.", f".{i}.")] = kind, shape[1:], own.tobytes()
    return found


def joined(tensors, parts, whole, axis):
    """Return the tensors with those of some names behind each other along an axis, as current converters can write."""
    found = dict(tensors)
    for name in [n for n in tensors if re.search(rf"\.{parts[0]}\.", n)]:
        each = [found.pop(name.replace(parts[0], part)) for part in parts]
        raw = np.concatenate([pieces(*t) for t in each], axis) if len(each[0][1]) > 1 else b"".join(t[2] for t in each)
        shape = list(each[0][1])
        shape[axis] = sum(t[1][axis] for t in each)
        found[name.replace(parts[0], whole)] = (
            each[0][0],
            tuple(shape),
            raw if isinstance(raw, bytes) else raw.tobytes(),
        )
    return found


QKV = (("attn_q", "attn_k", "attn_v"), "attn_qkv", 0)
GATE_UP = (("ffn_gate_exps", "ffn_up_exps"), "ffn_gate_up_exps", 1)
CASES = {
    "experts, queries, keys and values": ("mixtral", "f32", lambda t: joined(of_experts(t), *QKV)),
    "experts in blocks": ("olmoe", "q8_0", of_experts),
    "gate and up": ("qwen3_moe", "q8_0", lambda t: joined(t, *GATE_UP)),
    "gate and up, and biases": ("qwen2_moe", "f32", lambda t: joined(joined(t, *GATE_UP), *QKV)),
}


def written(folder, family, kind, change):
    """Write a model as GGUF with changed tensors; return it, the file and a checkpoint of what it stands for."""
    with torch.no_grad():
        model = random_model(FAMILIES[family], num_hidden_layers=2)
        tensors = change(gguf_tensors(model, family, lambda name: "f32" if "gate_inp" in name else kind))
    plain = save(model, folder / "plain")
    (folder / "file").mkdir()
    about = metadata(model.config, ARCHITECTURES[family])
    return model, gguf_files.write(folder / "file" / "m.gguf", about, tensors), plain


@pytest.mark.parametrize("name", CASES)
def test_other_forms_are_the_same_model(name, tmp_path):
    model, file, _ = written(tmp_path, *CASES[name])
    found, decoding = dequantized_model(file)
    assert decoding.own == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["experts, queries, keys and values", "experts in blocks"])
def test_other_forms_compile(name, tmp_path):
    _, file, plain = written(tmp_path, *CASES[name])
    assert difference(moec.compile(file, out=tmp_path / "a", accuracy="exact"), plain) <= EXACT


SHAPES = {
    "blk.0.ffn_gate_exps.weight": (4, 64, 96),
    "blk.1.ffn_norm.weight": (1, 64),
    "blk.1.attn_q.weight": (32, 128),
    "output.weight": (64, 128),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_tensor_of_another_shape_is_named(name, tmp_path):
    def change(tensors):
        kind, _, raw = tensors[name]
        return {**tensors, name: (kind, SHAPES[name], raw)}

    _, file, _ = written(tmp_path, "mixtral", "f32", change)
    wanted = re.escape(f"the tensor {name} has the shape {list(SHAPES[name])}; the model wants")
    with pytest.raises(MoecError, match=wanted) as caught:
        load(file)
    assert caught.value.exit_code == 2


MISSING = {name: name for name in ("blk.1.ffn_up.2.weight", "blk.1.ffn_norm.weight")} | {
    "blk.0.attn_qkv.weight": "blk.0.attn_q.weight",
    "token_embd.weight": "token_embd.weight",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_tensor_that_is_missing_is_named(name, tmp_path):
    def change(tensors):
        found = CASES["experts, queries, keys and values"][2](tensors)
        del found[name]
        return found

    _, file, _ = written(tmp_path, "mixtral", "f32", change)
    with pytest.raises(MoecError, match=f"the file has no tensor {re.escape(MISSING[name])}"):
        load(file)
