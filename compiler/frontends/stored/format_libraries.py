"""Decodes one stored weight with the library of its format: gguf, compressed-tensors or transformers.

These decodings are independent of moec's recipes, which is what a reference needs. Scales are widened to float32 first:
the libraries round numbers to the dtype of the scales otherwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

Leaves = Mapping[str, torch.Tensor]  # the tensors of a module by their last name
Decode = Callable[[], torch.Tensor]
_FP8_SCALES = ("weight_scale_inv", "scale", "weight_scale", "qscale_weight")


@dataclass(frozen=True)
class Library:
    """A package, and the function that makes f32 numbers of a weight with it; `name` says which version it is."""

    package: str
    decode: Decode

    @property
    def name(self) -> str:
        """The package with its version."""
        return f"{self.package} {version(self.package)}"


def is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    try:
        version(package)
        importlib.import_module(package.replace("-", "_"))
    except (PackageNotFoundError, ImportError):
        return False
    return True


def gguf_library(kind: str, blocks: torch.Tensor) -> Library | str:
    """Return how the gguf package decodes a tensor of blocks; a string says why it does not."""
    if not is_installed("gguf"):
        return "the package gguf is not installed"

    def decode() -> torch.Tensor:
        from gguf import GGMLQuantizationType, quants

        return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[kind.upper()]))

    return Library("gguf", decode)


def library_of(module: str, leaves: Leaves, quantization: Mapping[str, Any]) -> Library | str:
    """Return how the library of a quantization method decodes a module's weight; a string says why none does."""
    method = quantization["quant_method"]
    if "_blocks" in leaves and "_scales" in leaves:
        return Library("transformers", lambda: _gpt_oss(leaves))
    if method in ("fp8", "mxfp8", "modelopt") and "weight" in leaves and "weight_scale_2" not in leaves:
        return _decode_float8(leaves, quantization)
    if method in ("compressed-tensors", "awq", "modelopt"):
        if not is_installed("compressed-tensors"):
            return "the package compressed-tensors is not installed"
        decode = {"awq": _decode_awq, "modelopt": _decode_modelopt}.get(method, _decode_compressed_tensors)
        return Library("compressed-tensors", lambda: decode(module, leaves, quantization))
    return f"no library is known that decodes {method} on a CPU"


# --- transformers --------------------------------------------------------------------------------------------------


def _gpt_oss(leaves: Leaves) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(leaves["_blocks"], leaves["_scales"], dtype=torch.float32)


def _decode_float8(leaves: Leaves, quantization: Mapping[str, Any]) -> Library | str:
    """Return transformers' decoding where its blocks are those of the config, else that of compressed-tensors.

    transformers divides a weight evenly among its scales, which is wrong where blocks are cut at the edges.
    """
    name = next((n for n in _FP8_SCALES if n in leaves), None)
    if name is None:
        return "no scale is known beside the codes"
    codes, scales = leaves["weight"], _float32_scales(leaves[name])
    if codes.dim() == 2 and scales.dim() == 1 and scales.shape == codes.shape[:1]:
        scales = scales[:, None]
    packed = codes.dtype in (torch.int8, torch.uint8)
    block = [1, 32] if packed else quantization.get("weight_block_size")
    sizes = [codes.shape[-2], codes.shape[-1] * (2 if packed else 1)]
    if block is None or scales.numel() == 1 or _are_even(sizes, list(scales.shape[-2:]), block):
        return Library("transformers", lambda: _by_transformers(codes, scales))
    if not is_installed("compressed-tensors"):
        return "transformers takes blocks that are cut at the edges for smaller ones, and compressed-tensors is not installed"
    return Library("compressed-tensors", lambda: _cut_blocks(codes, scales, tuple(block)))


def _are_even(sizes: list[int], counts: list[int], block: list[int]) -> bool:
    return all(n == 1 or size == n * b for size, n, b in zip(sizes, counts, block, strict=True))


def _by_transformers(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = codes.view(torch.int8) if codes.dtype == torch.uint8 else codes
    made: Any = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": scales})["weight"]
    return made.float()


def _cut_blocks(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    tool = FP8BlockDequantizer(targets=["module"], weight_block_size=block, dtype=torch.float32)
    return tool.process({"module.weight": codes, "module.weight_scale_inv": scales})["module.weight"]


# --- compressed-tensors --------------------------------------------------------------------------------------------


def _decode_compressed_tensors(module: str, leaves: Leaves, quantization: Mapping[str, Any]) -> torch.Tensor:
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(dict(quantization))
    scheme = _scheme_of_module(module, config)
    return _decompress_module(leaves, scheme, _compression_format(scheme, config))


def _scheme_of_module(module: str, config: Any) -> Any:
    """Return the scheme of the group of modules that a module belongs to: a named one before that of a class."""
    from compressed_tensors.utils.match import match_name

    schemes = config.config_groups.values()
    named = [s for s in schemes if any(match_name(module, target) for target in s.targets)]
    found = named or [s for s in schemes if "Linear" in s.targets] or list(schemes)
    if len(found) != 1:
        raise ValueError(f"{len(found)} groups of modules have {module}")
    return found[0]


def _compression_format(scheme: Any, config: Any) -> str:
    found = scheme.format or config.format
    if found is None or str(getattr(found, "value", found)) in ("dense", "mixed-precision"):
        from compressed_tensors.compressors.format import infer_module_format

        found = infer_module_format(torch.nn.Linear, scheme)
    return str(getattr(found, "value", found))


def _decompress_module(leaves: Leaves, scheme: Any, form: str) -> torch.Tensor:
    """Return what a compressor makes of a module, in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    state = dict(leaves)
    if form not in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        if form != "mxfp8-quantized":
            state["weight_scale"] = _float32_scales(state["weight_scale"])
        return BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"].float()
    # the compressors of FP4 round to bfloat16 in between: the same in float32
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    packed, scale = state["weight_packed"], state["weight_scale"]
    rows, columns = packed.shape
    return dequantize(
        x_q=unpack_fp4_from_uint8(packed, rows, 2 * columns, dtype=torch.float32),
        scale=decompress_mx_scale(scale).float() if scale.dtype == torch.uint8 else scale.float(),
        args=scheme.weights,
        global_scale=state.get("weight_global_scale"),
        dtype=torch.float32,
    )


def _decode_awq(module: str, leaves: Leaves, quantization: Mapping[str, Any]) -> torch.Tensor:
    from compressed_tensors.entrypoints.convert import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    zero = "qzeros" in leaves
    tool = AutoAWQConverter(
        bits=int(quantization.get("bits", 4)),
        group_size=int(quantization.get("group_size", 128)),
        zero_point=zero,
        ignore=(),
        targets=("Linear",),
    )
    made = tool.process({f"{module}.{leaf}": tensor for leaf, tensor in leaves.items()})
    width = made[f"{module}.weight_shape"][1] // made[f"{module}.weight_scale"].shape[1]
    weights = QuantizationArgs(num_bits=tool.bits, strategy="group", group_size=int(width), symmetric=not zero)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return _decompress_module({k.removeprefix(f"{module}."): v for k, v in made.items()}, scheme, "pack-quantized")


def _decode_modelopt(module: str, leaves: Leaves, quantization: Mapping[str, Any]) -> torch.Tensor:
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4

    tool = ModelOptNvfp4Converter(targets=[module])
    own = ("weight", "weight_scale", "weight_scale_2")
    made = tool.process({f"{module}.{leaf}": leaves[leaf] for leaf in own})
    state = {k.removeprefix(f"{module}."): v for k, v in made.items()}
    scheme = QuantizationScheme(**NVFP4, targets=[module])
    return _decompress_module(state, scheme, "nvfp4-pack-quantized")


def _float32_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in float32; bytes of exponents stay."""
    return scales if scales.dtype == torch.uint8 else scales.float()
