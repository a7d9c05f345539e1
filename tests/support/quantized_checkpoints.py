"""Tiny checkpoints of every quantized layout beside the plain ones with the same numbers, and artifacts compared with these."""

import checkpoint_formats as formats
import torch
import transformers
from moec.compiler.frontends.families import FAMILIES
from tiny_models import padded_batch, random_model, save

EXACT = 1e-4
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
CT4 = formats.ct_config("pack-quantized", type="int", num_bits=4, group_size=32)
CT4_ZEROS = formats.ct_config("pack-quantized", type="int", num_bits=4, group_size=32, symmetric=False)


def quantized(write, skipped=("lm_head", "embed_tokens", ".gate", "norm")):
    """Return a function that quantizes linears and experts, as the tools do."""
    return lambda name, weight: None if name.endswith(skipped) else write(weight)


def checkpoint(tmp_path, family, config, write, **changes):
    """Return (a quantized checkpoint folder, the plain one with the numbers that its codes stand for)."""
    plain = save(random_model(FAMILIES[family], **changes), tmp_path / "plain")
    return formats.quantize_folder(tmp_path / "quantized", plain, config, write)


def difference(artifact, plain, of=torch.max):
    """Return the largest difference of logits from transformers, relative to the largest of them, in two steps.

    With `of` the median: where weights are not the same, a token may go to another expert, and differ far.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    ids, mask, positions = padded_batch(128, 9)
    session = artifact.session(spinning=False, accuracy="exact")
    first, states = session.step(ids[:, :6].numpy(), mask[:, :6].numpy(), positions[:, :6].numpy())
    second, _ = session.step(ids[:, 6:].numpy(), mask.numpy(), positions[:, 6:].numpy(), states)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    found = torch.cat([torch.from_numpy(first), torch.from_numpy(second)], 1)
    return float(of((found - wanted)[real].abs()) / wanted[real].abs().max())


CASES = {
    "gptq": (GPTQ, formats.gptq, "mixtral", "uint4_g"),
    "gptq 3 bits": ({**GPTQ, "bits": 3}, lambda w: formats.gptq(w, bits=3), "qwen3_moe", "uint4_g"),
    "awq": (AWQ, formats.awq, "qwen3_moe", "uint4_g"),
    "ct int4": (CT4, formats.ct_packed, "qwen3_moe", "int4_g"),
    "ct int4 zeros": (CT4_ZEROS, lambda w: formats.ct_packed(w, zeros=True), "qwen2_moe", "uint4_g"),
    "ct int8 rows": (
        formats.ct_config("int-quantized", type="int", num_bits=8, strategy="channel"), formats.ct_int8, "mixtral", "int8_g",
    ),
    "nvfp4": ({"quant_method": "modelopt"}, formats.nvfp4, "mixtral", "int8_g16"),
    "mxfp4": (formats.ct_config("mxfp4-pack-quantized", type="float", num_bits=4, group_size=32), formats.mxfp4, "olmoe", "int8_g"),
}  # fmt: skip
