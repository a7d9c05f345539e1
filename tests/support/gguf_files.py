"""Writes GGUF files: the header as gguf.md of llama.cpp describes it, and blocks of Q4_0, Q8_0 and MXFP4."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from moec.compiler.weights.ggml import BLOCKS

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "q4_k": 12, "q6_k": 14, "mxfp4": 39}
ELEMENTS = {"q4_k": 256, "q6_k": 256}


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(given: Any) -> bytes:
    """Return a value of the metadata with its type before it."""
    match given:
        case bool():
            return struct.pack("<I?", 7, given)
        case int():
            return struct.pack("<II", 4, given)
        case float():
            return struct.pack("<If", 6, given)
        case str():
            return struct.pack("<I", 8) + string(given)
    inner = [value(v) for v in given]
    return struct.pack("<I", 9) + inner[0][:4] + struct.pack("<Q", len(inner)) + b"".join(v[4:] for v in inner)


def write(
    file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], version: int = 3
) -> Path:
    """Write tensors (type, shape, bytes) and metadata."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(string(key) + value(v) for key, v in metadata.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        header += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", TYPES[kind], len(data))
        data += raw + bytes(-len(raw) % 32)
    file.write_bytes(header + bytes(-len(header) % 32) + data)
    return file


def q4_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks u8[..., bytes] of f32[..., K], and what they stand for."""
    parts = x.reshape(*x.shape[:-1], -1, 32)
    scale = (np.abs(parts).max(-1, keepdims=True) / 7).astype("<f2")
    codes = np.clip(np.round(parts / scale.astype(np.float32)) + 8, 0, 15).astype(np.uint8)
    raw = np.concatenate([scale.view(np.uint8), codes[..., :16] | codes[..., 16:] << 4], -1)
    meant = (codes.astype(np.float32) - 8) * scale.astype(np.float32)
    return raw.reshape(*x.shape[:-1], -1), meant.reshape(x.shape)


def q8_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = x.reshape(*x.shape[:-1], -1, 32)
    scale = (np.abs(parts).max(-1, keepdims=True) / 127).astype("<f2")
    codes = np.clip(np.round(parts / scale.astype(np.float32)), -127, 127).astype(np.int8)
    raw = np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], -1)
    return raw.reshape(*x.shape[:-1], -1), (codes * scale.astype(np.float32)).reshape(x.shape)


def mxfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    parts = x.reshape(*x.shape[:-1], -1, 32)
    exponent = np.ceil(np.log2(np.abs(parts).max(-1, keepdims=True) / 6))
    scale = np.exp2(exponent).astype(np.float32)
    codes = np.abs(np.abs(parts / scale)[..., None] - numbers).argmin(-1).astype(np.uint8)
    meant = np.sign(parts) * numbers[codes] * scale
    codes |= (parts < 0).astype(np.uint8) << 3
    raw = np.concatenate([(exponent + 127).astype(np.uint8), codes[..., :16] | codes[..., 16:] << 4], -1)
    return raw.reshape(*x.shape[:-1], -1), meant.reshape(x.shape)


def random_blocks(name, rows, count):
    """Return u8[rows, bytes] of random blocks whose f16 scales are finite."""
    kind, generator = BLOCKS[name], np.random.default_rng(3)
    raw = generator.integers(0, 256, (rows, count, kind.bytes), dtype=np.uint8)
    halves = {
        "q4_1": (0, 2), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2),
        "q6_k": (208,), "mxfp4": (),
    }.get(name, (0,))  # fmt: skip
    for start in halves:
        made = generator.normal(size=(rows, count, 1)).astype("<f2")
        raw[:, :, start : start + 2] = made.view(np.uint8).reshape(rows, count, 2)
    if name == "mxfp4":
        raw[:, :, 0] = generator.integers(100, 140, (rows, count))
    return raw.reshape(rows, -1)
