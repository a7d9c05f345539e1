"""What engines take of a plan: the command that starts each one, and the files of expert placement that it reads.

The formats are those of the engines' sources: SGLang's `--init-expert-location` (a JSON object with `physical_to_logical_map`, a row for
each decoder layer, dense ones too), vllm-ascend's `expert_map_path` and MindIE's `expert_map_file` (`layer_list` of `device_list` of
`device_expert`, a row for each layer with experts), llama.cpp's `--override-tensor` (a regular expression on tensors' names).
vLLM takes no map: it places copies itself and is told how many.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

Plan = Mapping[str, Any]
Files = dict[str, str]
SGLANG_MAP, ASCEND_MAP = "sglang-experts.json", "ascend-experts.json"


def export_files(plan: Plan, model: str) -> tuple[Files, list[str]]:
    """Return the files for all engines that can follow a plan, by name, and notes on those that cannot."""
    files: Files = {}
    notes: list[str] = []
    for make in (_vllm_files, _sglang_files, _ascend_files, _mindie_files, _llama_files):
        made = make(plan, model)
        if isinstance(made, str):
            notes.append(made)
        else:
            files |= made
    return files, notes


def _group(plan: Plan) -> int:
    return plan["degrees"]["tp"] * plan["degrees"]["attention_dp"]


def _context(plan: Plan) -> int:
    return plan["load"]["input"] + plan["load"]["output"]


def _copies(plan: Plan) -> int:
    return plan["experts"]["copies"] if plan["experts"] else 0


def expert_map(plan: Plan) -> list[list[int]]:
    """Return the expert of each slot, a row for each layer with experts; none for a model without."""
    placed = plan["experts"]
    if placed is None:
        return []
    if placed["physical_to_logical"] is not None:
        return [list(row) for row in placed["physical_to_logical"]]
    return [list(range(placed["experts"])) for _ in placed["layers"]]


def _command(*words: object, options: Mapping[str, object]) -> str:
    """Return a shell script of one command; an option with True has no value, one with None or False is left out."""
    lines = [" ".join(shlex.quote(str(word)) for word in words)]
    for name, value in options.items():
        if value is not None and value is not False:
            lines.append(f"  {name}" if value is True else f"  {name} {shlex.quote(str(value))}")
    return "#!/bin/sh\nexec " + " \\\n".join(lines) + "\n"


def _offload_note(plan: Plan, engine: str) -> str | None:
    if plan["offload"]:
        return f"{engine}: no file, since it does not leave single experts in host memory as this plan does; llama.cpp does"
    return None


def _ep_note(plan: Plan) -> str | None:
    """Return why vLLM cannot divide experts so: it gives whole ones to all ranks of tp and dp, or divides each over all of them."""
    ep = plan["degrees"]["ep"]
    if ep in (1, _group(plan)):
        return None
    return f"vllm: no file, since its experts lie whole on all {_group(plan)} ranks or divided over them, not on {ep}"


def _vllm_options(plan: Plan) -> dict[str, object]:
    degrees = plan["degrees"]
    return {
        "--tensor-parallel-size": degrees["tp"],
        "--data-parallel-size": degrees["attention_dp"] if degrees["attention_dp"] > 1 else None,
        "--pipeline-parallel-size": degrees["pp"] if degrees["pp"] > 1 else None,
        "--enable-expert-parallel": degrees["ep"] > 1,
        "--max-model-len": _context(plan),
        "--max-num-seqs": plan["load"]["batch"],
        "--kv-cache-dtype": "fp8" if plan["cache"] == "fp8" else "auto",
        "--quantization": _online_format(plan),
    }


def _online_format(plan: Plan) -> str | None:
    """Return the format that vLLM and SGLang make of a checkpoint in bf16 while they load it."""
    formats = set(plan["formats"].values())
    return "fp8" if formats and formats <= {"fp8_b128", "bf16"} else None


def _vllm_files(plan: Plan, model: str) -> Files | str:
    if note := _offload_note(plan, "vllm") or _ep_note(plan):
        return note
    options = _vllm_options(plan)
    if copies := _copies(plan):
        options |= {"--enable-eplb": True, "--eplb-config": json.dumps({"num_redundant_experts": copies})}
    return {"vllm.sh": _command("vllm", "serve", model, options=options)}


def _sglang_files(plan: Plan, model: str) -> Files | str:
    if note := _offload_note(plan, "sglang"):
        return note
    degrees, load = plan["degrees"], plan["load"]
    ranks, copies = _group(plan), _copies(plan)
    options: dict[str, object] = {
        "--model-path": model,
        "--tp-size": ranks,
        "--dp-size": degrees["attention_dp"] if degrees["attention_dp"] > 1 else None,
        "--enable-dp-attention": degrees["attention_dp"] > 1,
        "--pp-size": degrees["pp"] if degrees["pp"] > 1 else None,
        "--ep-size": degrees["ep"] if degrees["ep"] > 1 else None,
        "--context-length": _context(plan),
        "--max-running-requests": load["batch"] * degrees["attention_dp"],
        "--kv-cache-dtype": "fp8_e4m3" if plan["cache"] == "fp8" else "auto",
        "--quantization": _online_format(plan),
    }
    files: Files = {}
    if degrees["ep"] > 1 and plan["experts"]:
        options |= {"--ep-num-redundant-experts": copies or None, "--init-expert-location": SGLANG_MAP}
        files[SGLANG_MAP] = _json_text({"physical_to_logical_map": _rows_of_all_layers(plan)})
    files["sglang.sh"] = _command("python", "-m", "sglang.launch_server", options=options)
    return files


def _rows_of_all_layers(plan: Plan) -> list[list[int]]:
    """Return the map with a row for each decoder layer: those without experts have the order of numbers, which nobody reads."""
    placed, rows = plan["experts"], expert_map(plan)
    slots = len(rows[0])
    own = dict(zip(placed["layers"], rows, strict=True))
    trivial = [slot % placed["experts"] for slot in range(slots)]
    return [own.get(layer, trivial) for layer in range(placed["of_layers"])]


def _is_ascend(plan: Plan) -> bool:
    return str(plan["system"]["device"]).startswith("ascend-")


def _device_lists(plan: Plan) -> dict[str, Any]:
    ranks = plan["degrees"]["ep"]
    layers = []
    for number, row in enumerate(expert_map(plan)):
        each = len(row) // ranks
        devices = [{"device_id": r, "device_expert": row[r * each : (r + 1) * each]} for r in range(ranks)]
        layers.append({"layer_id": number, "device_count": ranks, "device_list": devices})
    return {"moe_layer_count": len(layers), "layer_list": layers}


def _ascend_files(plan: Plan, model: str) -> Files | str:
    if not _is_ascend(plan):
        return {}
    if note := _offload_note(plan, "vllm-ascend") or _ep_note(plan):
        return note
    options = _vllm_options(plan)
    options |= {"--kv-cache-dtype": None, "--quantization": "ascend" if plan["formats"] else None}
    files: Files = {}
    if plan["degrees"]["ep"] > 1 and plan["experts"]:
        files[ASCEND_MAP] = _json_text(_device_lists(plan))
        options["--additional-config"] = json.dumps({"eplb_config": {"expert_map_path": ASCEND_MAP}})
    files["vllm-ascend.sh"] = _command("vllm", "serve", model, options=options)
    return files


def _mindie_files(plan: Plan, model: str) -> Files | str:
    if not _is_ascend(plan):
        return {}
    if note := _offload_note(plan, "mindie"):
        return note
    degrees = plan["degrees"]
    if degrees["pp"] > 1 and degrees["attention_dp"] > 1:
        return "mindie: no file, since it has no pipeline stages beside copies of attention"
    entry: dict[str, Any] = {
        "modelWeightPath": model, "worldSize": _group(plan) * degrees["pp"], "tp": degrees["tp"],
        "dp": degrees["attention_dp"], "pp": degrees["pp"], "moe_ep": degrees["ep"], "moe_tp": degrees["moe_tp"],
    }  # fmt: skip
    if degrees["ep"] > 1 and plan["experts"]:
        eplb = {"level": 1, "expert_map_file": ASCEND_MAP}
        entry["models"] = {"deepseekv2": {"ep_level": 2, "eplb": eplb}}
    deploy = {"maxSeqLen": _context(plan), "maxInputTokenLen": plan["load"]["input"]}
    content = {"BackendConfig": {"ModelDeployConfig": {**deploy, "ModelConfig": [entry]},
                                 "ScheduleConfig": {"maxBatchSize": plan["load"]["batch"]}}}  # fmt: skip
    files = {"mindie-config.json": _json_text(content)}
    if "models" in entry:
        files[ASCEND_MAP] = _json_text(_device_lists(plan))
    return files


def host_layers(plan: Plan) -> list[int]:
    """Return the layers whose experts lie in host memory: the last ones, as many whole layers as the plan leaves there."""
    placed = plan["experts"]
    if not plan["offload"] or not placed:
        return []
    layers: Sequence[int] = placed["layers"]
    held = int(plan["offload"]["device"] * len(layers) + 1e-9)
    return list(layers[held:])


def _llama_files(plan: Plan, model: str) -> Files | str:
    if plan["degrees"]["attention_dp"] > 1 or plan["degrees"]["ep"] > 1:
        return "llama.cpp: no file, since it neither copies attention nor places whole experts on devices"
    cache = "q8_0" if plan["cache"] == "fp8" else "f16"
    layers = host_layers(plan)
    pattern = rf"blk\.({'|'.join(map(str, layers))})\.ffn_(up|down|gate|gate_up)_exps=CPU" if layers else None
    parallel = plan["load"]["running"]
    options: dict[str, object] = {
        "--model": "model.gguf", "--n-gpu-layers": 999, "--ctx-size": _context(plan) * parallel, "--parallel": parallel,
        "--cache-type-k": cache, "--cache-type-v": cache, "--flash-attn": "on", "--override-tensor": pattern,
        "--split-mode": "row" if plan["degrees"]["tp"] > 1 else "layer" if plan["degrees"]["pp"] > 1 else None,
    }  # fmt: skip
    return {"llama.cpp.sh": _command("llama-server", options=options)}


def _json_text(data: Any) -> str:
    return json.dumps(data, indent=1) + "\n"
