"""Writes weights in the layouts of quantized checkpoints, in numpy, from the layouts' definitions.

Every function takes f32[N, K] and returns the tensors of the module by their leaf and the numbers that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

Made = tuple[dict[str, torch.Tensor], np.ndarray]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def stream(codes: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """Pack codes along an axis into i32, the first in the lowest bits, across the ends of words."""
    lines = np.moveaxis(codes, axis, -1).astype(object)
    words = np.zeros((*lines.shape[:-1], -(-lines.shape[-1] * bits // 32)), dtype=np.uint32)
    for at in np.ndindex(*lines.shape[:-1]):
        whole = sum(int(c) << (i * bits) for i, c in enumerate(lines[at]))
        words[at] = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(words.shape[-1])]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def groups_of(weight: np.ndarray, bits: int, group: int, zeros: bool) -> tuple[np.ndarray, ...]:
    """Return codes [N, K], scales f16 [N, G] and zero points [N, G] of groups along the rows; the last may be short."""
    rows, columns = weight.shape
    count, top = -(-columns // group), (1 << bits) - 1
    codes, scales = np.zeros((rows, columns), np.int64), np.zeros((rows, count), np.float16)
    points = np.full((rows, count), 1 << (bits - 1), np.int64)
    for g in range(count):
        part = weight[:, g * group : (g + 1) * group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        spread = (high - low) / top if zeros else np.abs(part).max(1) / (top // 2)
        scales[:, g] = np.maximum(spread, 1e-3)
        scale = scales[:, g].astype(np.float32)
        if zeros:
            points[:, g] = np.clip(np.round(-low / scale), 0, top)
        codes[:, g * group : (g + 1) * group] = np.clip(np.round(part / scale[:, None]) + points[:, g : g + 1], 0, top)
    return codes, scales, points


def numbers(codes: np.ndarray, scales: np.ndarray, points: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return (code - zero) scale, with the group of each column."""
    return ((codes - points[:, index]) * scales.astype(np.float32)[:, index]).astype(np.float32)


def gptq(weight: np.ndarray, bits: int = 4, group: int = 32, version: int = 1, act_order: bool = False) -> Made:
    rows, columns = weight.shape
    index = np.arange(columns) // group
    if act_order:
        index = np.random.default_rng(0).permutation(index)
    order = np.argsort(index, kind="stable")
    codes = np.empty((rows, columns), np.int64)
    codes[:, order], scales, points = groups_of(weight[:, order], bits, group, zeros=True)
    stored = (points - 1) % (1 << bits) if version == 1 else points
    leaves = {
        "qweight": stream(codes.T, bits, 0), "qzeros": stream(stored.T, bits, 1),
        "scales": torch.from_numpy(scales.T.copy()), "g_idx": torch.from_numpy(index.astype(np.int32)),
    }  # fmt: skip
    return leaves, numbers(codes, scales, points, index)


def awq(weight: np.ndarray, group: int = 32) -> Made:
    codes, scales, points = groups_of(weight, 4, group, zeros=True)

    def packed(values: np.ndarray) -> torch.Tensor:
        words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
        return torch.from_numpy(words.view(np.int32))

    leaves = {"qweight": packed(codes.T), "qzeros": packed(points.T), "scales": torch.from_numpy(scales.T.copy())}
    return leaves, numbers(codes, scales, points, np.arange(weight.shape[1]) // group)


def ct_packed(weight: np.ndarray, bits: int = 4, group: int = 32, zeros: bool = False) -> Made:
    group = group or weight.shape[1]
    codes, scales, points = groups_of(weight, bits, group, zeros)
    leaves = {
        "weight_packed": stream(codes, bits, 1), "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    if zeros:
        leaves["weight_zero_point"] = stream(points, bits, 0)
    return leaves, numbers(codes, scales, points, np.arange(weight.shape[1]) // group)


def ct_int8(weight: np.ndarray, zeros: bool = False) -> Made:
    codes, scales, points = groups_of(weight, 8, weight.shape[1], zeros)
    leaves = {"weight": torch.from_numpy((codes - 128).astype(np.int8)), "weight_scale": torch.from_numpy(scales)}
    if zeros:
        leaves["weight_zero_point"] = torch.from_numpy((points - 128).astype(np.int8))
    return leaves, numbers(codes, scales, points, np.zeros(weight.shape[1], np.int64))


def _e4m3(values: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    made = values.astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(made.view(np.uint8)).view(torch.float8_e4m3fn), made.astype(np.float32)


def fp8(
    weight: np.ndarray, block: tuple[int, int] = (0, 0), leaf: str = "weight_scale", shape: tuple | None = None
) -> Made:
    """FP8 in blocks; 0 stands for the whole axis. `shape` is that of the stored scales."""
    size = [b or n for b, n in zip(block, weight.shape, strict=True)]
    count = [-(-n // b) for n, b in zip(weight.shape, size, strict=True)]
    scales = np.zeros(count, np.float32)
    for at in np.ndindex(*count):
        part = weight[tuple(slice(i * b, (i + 1) * b) for i, b in zip(at, size, strict=True))]
        scales[at] = np.abs(part).max() / 448
    wide = scales.repeat(size[0], 0)[: weight.shape[0]].repeat(size[1], 1)[:, : weight.shape[1]]
    codes, values = _e4m3(weight / wide)
    return {"weight": codes, leaf: torch.from_numpy(scales.reshape(count if shape is None else shape))}, values * wide


def _nearest_e2m1(values: np.ndarray) -> np.ndarray:
    codes = np.abs(np.abs(values)[..., None] - E2M1[:8]).argmin(-1)
    return codes | np.where(values < 0, 8, 0)


def _low_first(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8))


def nvfp4(weight: np.ndarray, tool: str = "modelopt") -> Made:
    parts = weight.reshape(weight.shape[0], -1, 16)
    whole = np.float32(np.abs(weight).max() / (6 * 448))
    stored, scales = _e4m3(np.abs(parts).max(-1) / 6 / whole)
    if tool == "modelopt":
        scales, leaf, names = scales * whole, {"weight_scale_2": torch.tensor(whole)}, "weight"
    else:
        whole = np.float32(1 / whole)
        scales, leaf, names = scales / whole, {"weight_global_scale": torch.tensor([whole])}, "weight_packed"
    codes = _nearest_e2m1(parts / scales[..., None])
    made = (E2M1[codes] * scales[..., None]).reshape(weight.shape)
    return {names: _low_first(codes.reshape(weight.shape)), "weight_scale": stored, **leaf}, made


def mxfp4(weight: np.ndarray, codes_leaf: str = "weight_packed", scale_leaf: str = "weight_scale") -> Made:
    """E2M1 with E8M0: of compressed-tensors, or of DeepSeek V4 (I8 and F8_E8M0)."""
    parts = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = np.ceil(np.log2(np.abs(parts).max(-1) / 6)).astype(np.int64)
    codes = _nearest_e2m1(parts / np.exp2(exponents)[..., None])
    made = (E2M1[codes] * np.exp2(exponents).astype(np.float32)[..., None]).reshape(weight.shape)
    packed, stored = _low_first(codes.reshape(weight.shape)), torch.from_numpy((exponents + 127).astype(np.uint8))
    if scale_leaf == "scale":
        packed, stored = packed.view(torch.int8), stored.view(torch.float8_e8m0fnu)
    return {codes_leaf: packed, scale_leaf: stored}, made


def mxfp8(weight: np.ndarray) -> Made:
    parts = weight.reshape(weight.shape[0], -1, 32)
    exponents = np.ceil(np.log2(np.abs(parts).max(-1) / 448)).astype(np.int64)
    scale = np.exp2(exponents).astype(np.float32)[..., None]
    codes, values = _e4m3((parts / scale).reshape(weight.shape))
    made = (values.reshape(parts.shape) * scale).reshape(weight.shape)
    return {"weight": codes, "weight_scale": torch.from_numpy((exponents + 127).astype(np.uint8))}, made


def ct_config(format: str, **weights) -> dict:
    """Return a quantization_config of compressed-tensors with one group of modules."""
    group = {"targets": ["Linear"], "weights": weights, "format": format}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


def quantize_folder(
    folder: Path, plain: Path, config: dict, write: Callable[[str, np.ndarray], Made | None]
) -> tuple[Path, Path]:
    """Rewrite a checkpoint: quantized into `folder`, and what its codes stand for into `plain`.

    `write` returns None for a weight that stays as it is. Names are those of the modules.
    """
    stored, meant = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        owner = name.removesuffix(".weight")
        made = write(owner, tensor.numpy()) if tensor.dim() == 2 and owner != name else None
        leaves, meaning = made or ({"weight": tensor}, tensor.numpy())
        if made is None:
            stored[name] = tensor
        else:
            stored |= {f"{owner}.{leaf}": t.contiguous() for leaf, t in leaves.items()}
        meant[name] = torch.from_numpy(np.ascontiguousarray(meaning, dtype=np.float32))
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    return folder, plain
