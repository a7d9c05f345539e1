"""Writes the artifact of a GPT-2 of transformers, its ONNX by hand, without the compiler."""

import hashlib
import json

import numpy as np


def write_tiny_lm(model, folder):
    """Write the artifact of a GPT-2: model.onnx with external data, and moec.json."""
    import onnx
    from onnx import TensorProto, helper

    heads, width, layers = model.config.n_head, model.config.n_embd, model.config.n_layer
    size = width // heads
    nodes, weights = [], {name: p.detach().numpy() for name, p in model.named_parameters()}
    numbers = {"split": [0, 0, heads, size], "merge": [0, 0, width], "zero": 0, "one": 1, "axis1": [1]}
    weights |= {name: np.array(value, np.int64) for name, value in numbers.items()}
    weights |= {"scale": np.array(size**-0.5, np.float32), "minus": np.array(-3e38, np.float32)}
    weights["head"] = model.lm_head.weight.detach().numpy().T.copy()

    def node(op, inputs, output, **attributes):
        nodes.append(helper.make_node(op, inputs, output if isinstance(output, list) else [output], **attributes))
        return output

    def norm(x, name):
        return node("LayerNormalization", [x, f"{name}.weight", f"{name}.bias"], f"{name}.y", epsilon=1e-5)

    def dense(x, name):
        return node("Add", [node("MatMul", [x, f"{name}.weight"], f"{name}.m"), f"{name}.bias"], f"{name}.y")

    # what each new token sees: slots up to its own that are not padding
    node("Shape", ["input_ids"], "new", start=1, end=2)
    node("Shape", ["attention_mask"], "total", start=1, end=2)
    node("Squeeze", ["new"], "new0")
    node("Squeeze", ["total"], "total0")
    node("Sub", ["total0", "new0"], "past0")
    node("Range", ["past0", "total0", "one"], "rows")
    node("Range", ["zero", "total0", "one"], "columns")
    node("LessOrEqual", ["columns", node("Unsqueeze", ["rows", "axis1"], "rows1")], "causal")
    node("Cast", ["attention_mask"], "real", to=TensorProto.BOOL)
    node("Unsqueeze", [node("Unsqueeze", ["real", "axis1"], "real1"), "axis1"], "real2")
    node("And", ["causal", "real2"], "visible")

    node("Gather", ["transformer.wte.weight", "input_ids"], "tokens")
    node("Gather", ["transformer.wpe.weight", "position_ids"], "places")
    h = node("Add", ["tokens", "places"], "h")
    for i in range(layers):
        name = f"transformer.h.{i}"
        qkv = dense(norm(h, f"{name}.ln_1"), f"{name}.attn.c_attn")
        node("Split", [qkv], [f"{i}.q", f"{i}.k", f"{i}.v"], axis=2, num_outputs=3)
        for part in "qkv":
            node("Reshape", [f"{i}.{part}", "split"], f"{i}.{part}4")
            node("Transpose", [f"{i}.{part}4"], f"{i}.{part}t", perm=[0, 2, 1, 3])
        node("Concat", [f"past_key_values.{i}.key", f"{i}.kt"], f"present.{i}.key", axis=2)
        node("Concat", [f"past_key_values.{i}.value", f"{i}.vt"], f"present.{i}.value", axis=2)
        node("Transpose", [f"present.{i}.key"], f"{i}.kk", perm=[0, 1, 3, 2])
        node("Mul", [node("MatMul", [f"{i}.qt", f"{i}.kk"], f"{i}.s"), "scale"], f"{i}.scaled")
        node("Where", ["visible", f"{i}.scaled", "minus"], f"{i}.masked")
        node("MatMul", [node("Softmax", [f"{i}.masked"], f"{i}.p", axis=-1), f"present.{i}.value"], f"{i}.mixed")
        node("Reshape", [node("Transpose", [f"{i}.mixed"], f"{i}.back", perm=[0, 2, 1, 3]), "merge"], f"{i}.flat")
        h = node("Add", [h, dense(f"{i}.flat", f"{name}.attn.c_proj")], f"{i}.h1")
        up = node("Gelu", [dense(norm(h, f"{name}.ln_2"), f"{name}.mlp.c_fc")], f"{i}.g", approximate="tanh")
        h = node("Add", [h, dense(up, f"{name}.mlp.c_proj")], f"{i}.h2")
    node("MatMul", [norm(h, "transformer.ln_f"), "head"], "logits")

    def info(name, kind, *shape):
        return helper.make_tensor_value_info(name, kind, shape)

    states = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    integers = {"input_ids": ["B", "S"], "attention_mask": ["B", "P + S"], "position_ids": ["B", "S"]}
    inputs = [info(name, TensorProto.INT64, *shape) for name, shape in integers.items()]
    inputs += [info(f"past_key_values.{s}", TensorProto.FLOAT, "B", heads, "P", size) for s in states]
    outputs = [info("logits", TensorProto.FLOAT, "B", "S", model.config.vocab_size)]
    outputs += [info(f"present.{s}", TensorProto.FLOAT, "B", heads, "P + S", size) for s in states]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=512)
    shape = ["B", heads, "P", size]
    files = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("model.onnx", "model.onnx.data")}
    manifest = {
        "schema": 1, "moec": "0", "source": {"name": "python:GPT2LMHeadModel"}, "target": "cpu", "pipeline": "",
        "precision": {}, "lossy": False, "dims": {"B": [1, 8], "S": [1, 64], "P": [0, 64]}, "figures": {},
        "inputs": [{"name": n, "dtype": "i64", "shape": shape} for n, shape in integers.items()],
        "outputs": [{"name": "logits", "dtype": "f32", "shape": ["B", "S", model.config.vocab_size]}],
        "states": [
            {"past": f"past_key_values.{s}", "present": f"present.{s}", "axis": 2, "dtype": "f32", "shape": shape}
            for s in states
        ],
        "files": files,
    }  # fmt: skip
    (folder / "moec.json").write_text(json.dumps(manifest))
