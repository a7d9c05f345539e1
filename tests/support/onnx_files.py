"""ONNX models of other exporters: kept as graphs without their weights, which are made from their names.

`python tests/support/onnx_files.py` writes tests/files/onnx again. Modules need onnxscript, language models
onnxruntime-genai 0.18 (its builder) and mobius-onnx 0.1, which nothing else of moec does.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
import transformers
import written_experts as written
from onnx import TensorProto, numpy_helper
from places import FILES, TINY

GRAPHS = FILES / "onnx"
_LARGE = 16  # numbers: what has more is a weight


def filled_model(name):
    """Return a kept graph with weights: normal numbers, as large as those of a layer."""
    model = onnx.load(GRAPHS / f"{name}.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and not tensor.raw_data and not tensor.float_data:
            seed = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:4], "little")
            sizes = tuple(tensor.dims)
            numbers = np.random.default_rng(seed).standard_normal(sizes) / max(sizes) ** 0.5
            tensor.CopyFrom(numpy_helper.from_array(numbers.astype(np.float32), tensor.name))
    return model


def stripped_model(model):
    """Return a model without weights and without what the exporter says of lines of code."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) > _LARGE:
            tensor.ClearField("raw_data")
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        copies = [(entry.key, entry.value) for entry in kept]
        del node.metadata_props[:]
        for key, value in copies:
            node.metadata_props.add(key=key, value=value)
        node.ClearField("doc_string")
    for info in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del info.metadata_props[:]
    del model.graph.metadata_props[:]
    return model


def export_graph(kind):
    """Return what torch exports of a module, whose tokens are of any number."""
    torch.manual_seed(0)
    batched = kind is written.EinsumOverBatches
    x = torch.randn(*((2,) if batched else ()), 5, written.WIDTH)
    sizes = {axis: torch.export.Dim.DYNAMIC for axis in range(x.dim() - 1)}
    return torch.onnx.export(kind().eval(), (x,), dynamo=True, dynamic_shapes=(sizes,), verbose=False).model_proto


def tiny_config(model_type, head_dim=16, **options):
    """Return the config of a tiny causal LM with experts."""
    return transformers.AutoConfig.for_model(
        model_type, vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, **options,
    )  # fmt: skip


LANGUAGE_MODELS = {
    "genai_gpt_oss": (
        {"model_type": "gpt_oss", "num_local_experts": 4, "layer_types": ["full_attention"] * 2},
        ("onnxruntime_genai.models.builder", "-i", "{model}", "-o", "{out}", "-p", "fp32", "-e", "cpu", "-c", "{out}"),
    ),
    "mobius_qwen3_moe": (
        {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 16, "norm_topk_prob": True},
        ("mobius", "build", "--config", "{model}", "{out}"),
    ),
}


def write_language_model(name, folder):
    """Build a tiny model with another exporter and keep its graph."""
    options, command = LANGUAGE_MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(**options))
    model.save_pretrained(folder / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, folder / "model")
    places = {"model": folder / "model", "out": folder / "out"}
    subprocess.run([sys.executable, "-m", *(part.format(**places) for part in command)], check=True)
    raw = stripped_model(onnx.load(folder / "out" / "model.onnx")).SerializeToString(deterministic=True)
    (GRAPHS / f"{name}.onnx").write_bytes(raw)


class WithCaches(torch.nn.Module):
    """A causal LM that takes its caches as tensors, as exporters want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = transformers.DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        options = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": cache}
        found = self.model(input_ids=input_ids, use_cache=True, **options)
        states = [state for layer in found.past_key_values.layers for state in (layer.keys, layer.values)]
        return found.logits, *states


def export_language_model():
    """Return what torch exports of a tiny OLMoE whose experts are gathered for each token."""
    torch.manual_seed(0)
    config = tiny_config("olmoe", head_dim=8, num_experts=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("batched_mm")
    past = [torch.randn(2, 2, 5, 8) for _ in range(4)]
    ids, mask, places = (
        torch.randint(0, 90, (2, 3)),
        torch.ones(2, 8, dtype=torch.int64),
        torch.arange(5, 8).repeat(2, 1),
    )
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    caches = tuple({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC} for _ in past)
    names = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    return torch.onnx.export(
        WithCaches(model), (ids, mask, places, *past), dynamo=True, dynamic_shapes=(free, free, free, caches),
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
        output_names=["logits", *(f"present.{n}" for n in names)], verbose=False, opset_version=23,
    ).model_proto  # fmt: skip


if __name__ == "__main__":
    GRAPHS.mkdir(exist_ok=True)
    if sys.argv[1:] in ([], ["torch_olmoe"]):
        raw = stripped_model(export_language_model()).SerializeToString(deterministic=True)
        (GRAPHS / "torch_olmoe.onnx").write_bytes(raw)
    for chosen in LANGUAGE_MODELS:
        if sys.argv[1:] in ([], [chosen]):
            with tempfile.TemporaryDirectory() as temporary:
                write_language_model(chosen, Path(temporary))
    for chosen in written.RAISED:
        if sys.argv[1:] in ([], [chosen.__name__]):
            raw = stripped_model(export_graph(chosen)).SerializeToString(deterministic=True)
            (GRAPHS / f"{chosen.__name__}.onnx").write_bytes(raw)
