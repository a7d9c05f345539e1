"""Random packed weights of every format, with the plain numbers that they stand for."""

import ml_dtypes
import numpy as np
from moec.compiler.formats.table import find_format
from moec.targets.accelerator.tile.packing import Packing

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def random_weight(packing: Packing, generator: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the parts of a random weight [experts, N, K] and its numbers in f32."""
    shape = (packing.experts, packing.rows, packing.columns)
    f = find_format(packing.format)
    if f is None:
        plain = (generator.standard_normal(shape) * 0.1).astype(ml_dtypes.bfloat16)
        return packing.pack(plain), plain.astype(np.float32)
    groups = -(-packing.columns // f.group)
    scales = (*shape[:2], groups)

    def spread(a):
        return np.repeat(a, f.group, 2)[:, :, : packing.columns].astype(np.float32)

    if f.element == "int":
        low, high = (0, 2**f.bits) if f.zeros else (-(2 ** (f.bits - 1)), 2 ** (f.bits - 1))
        codes = generator.integers(low, high, shape).astype(np.uint8 if f.zeros else np.int8)
        scale = (generator.random(scales) * 0.02).astype(np.float32)
        if not f.zeros:
            return packing.pack(codes=codes, scales=scale), codes.astype(np.float32) * spread(scale)
        zeros = generator.integers(0, 2**f.bits, scales).astype(np.uint8)
        plain = (codes.astype(np.float32) - spread(zeros)) * spread(scale)
        return packing.pack(codes=codes, scales=scale, zeros=zeros), plain
    if f.element == "e4m3":
        codes = generator.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
        scale = (generator.random((shape[0], -(-shape[1] // f.rows), groups)) * 0.1).astype(np.float32)
        rows = np.repeat(scale, f.rows, 1)[:, : shape[1]]
        return packing.pack(codes=codes, scales=scale), codes.astype(np.float32) * spread(rows)
    codes = generator.integers(0, 16, shape).astype(np.uint8)
    if f.scale == "f8e8m0":
        scale = generator.integers(120, 126, scales).astype(np.uint8)
        return packing.pack(codes=codes, scales=scale), E2M1[codes] * spread(2.0 ** (scale.astype(np.float32) - 127))
    scale = (generator.random(scales) * 4 + 0.5).astype(ml_dtypes.float8_e4m3fn)
    whole = (generator.random(shape[0]) * 0.02 + 0.01).astype(np.float32)
    plain = E2M1[codes] * spread(scale.astype(np.float32) * whole[:, None, None])
    return packing.pack(codes=codes, scales=scale, tensor_scale=whole), plain
