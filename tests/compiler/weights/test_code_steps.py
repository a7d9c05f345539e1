"""Codes, scales and zero points of quantized checkpoints: every layout against a definition of its own, in boxes."""

import numpy as np
import pytest
import torch
from gguf_files import random_blocks
from moec.compiler.errors import MoecError
from moec.compiler.ir.dtypes import dtype_name
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.ggml import BLOCKS
from moec.compiler.weights.rows import encode_rows
from moec.compiler.weights.sources.source import ModuleSource, slice_box
from moec.compiler.weights.steps.table import step


def leaf(name, tensor):
    return Tensor(name, TensorType.of(dtype_name(tensor.dtype), *tensor.shape))


def evaluate(recipe, tensors, boxes=4):
    """Return what a recipe makes, having seen that boxes of it are the same."""
    source = ModuleSource(tensors)
    whole = evaluate_recipe(recipe, source)
    assert tuple(whole.shape) == recipe.type.sizes
    generator = np.random.default_rng(0)
    for _ in range(boxes):
        box = tuple(tuple(sorted(generator.choice(n + 1, 2, replace=False))) for n in whole.shape)
        assert torch.equal(evaluate_recipe(recipe, source, box), slice_box(whole, box))
    return whole


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_codes_are_one_stream_of_bits(bits, axis, dtype):
    """The first code in the lowest bits; three bits run across the ends of words; the last word may be half full."""
    word = torch.iinfo(dtype).bits
    count, lines = 37, 5
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (lines, count))
    words = np.zeros((lines, -(-count * bits // word)), dtype=np.uint64)
    for line in range(lines):
        stream = sum(int(c) << (i * bits) for i, c in enumerate(codes[line]))
        words[line] = [(stream >> (i * word)) & ((1 << word) - 1) for i in range(words.shape[1])]
    packed = torch.from_numpy(words.astype(np.uint32).view(np.int32) if word == 32 else words.astype(np.uint8))
    packed, wanted = (packed, codes) if axis else (packed.T.contiguous(), codes.T)
    recipe = step("unpack", leaf("w", packed), bits=bits, axis=axis, size=count)
    assert np.array_equal(evaluate(recipe, {"w": packed}).numpy(), wanted)


def test_codes_in_another_order():
    codes = np.random.default_rng(0).integers(0, 16, (6, 16))
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AWQ's: nibble i holds column order[i]
    words = np.zeros((6, 2), dtype=np.uint32)
    for i, column in enumerate(order):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    packed = torch.from_numpy(words.view(np.int32))
    recipe = step("unpack", leaf("w", packed), bits=4, axis=1, order=(0, 4, 1, 5, 2, 6, 3, 7))
    assert np.array_equal(evaluate(recipe, {"w": packed}).numpy(), codes)


def test_zero_points_minimums_and_division():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (5, 14), generator=generator).to(torch.uint8)
    scales, minimums = (torch.rand(5, 4, generator=generator) + 0.5 for _ in range(2))
    zeros = torch.randint(0, 16, (5, 4), generator=generator).to(torch.uint8)
    tensors = {"q": codes, "s": scales, "z": zeros, "m": minimums}
    q, s, z, m = (leaf(n, t) for n, t in tensors.items())
    wide = {n: t.float().repeat_interleave(4, 1)[:, :14] for n, t in tensors.items() if n != "q"}
    made = {
        (s, z): (codes - wide["z"]) * wide["s"],
        (s,): (codes - 8.0) * wide["s"],
        (s, m): codes * wide["s"] - wide["m"],
    }
    for others, wanted in made.items():
        recipe = step("dequantize", q, *others, block=(1, 4), bits=4)
        assert torch.equal(evaluate(recipe, tensors), wanted)
    divided = step("dequantize", m, s, block=(1, 1), divide=True)
    assert torch.equal(evaluate(divided, tensors), minimums / scales)


def test_scales_by_the_order_of_activations():
    scales, index = torch.rand(3, 4), torch.tensor([3, 0, 0, 2, 1, 3, 2], dtype=torch.int32)
    tensors = {"s": scales, "i": index}
    recipe = step("gather", leaf("s", scales), leaf("i", index), axis=1)
    assert torch.equal(evaluate(recipe, tensors), scales[:, index.long()])
    index[2] = 4
    with pytest.raises(MoecError, match="i points outside the 4 groups"):
        evaluate_recipe(recipe, ModuleSource(tensors))


def test_affine_view_and_repeat():
    signed = torch.arange(-6, 6, dtype=torch.int8).reshape(2, 6)
    x = leaf("x", signed)
    assert torch.equal(
        evaluate(step("affine", x, to="u8", add=128), {"x": signed}), (signed.int() + 128).to(torch.uint8)
    )
    wrapped = evaluate(step("affine", x, to="u8", add=1, bits=4), {"x": signed})
    assert torch.equal(wrapped.int(), (signed.int() + 1) % 16)
    assert torch.equal(evaluate(step("view", x, to="u8"), {"x": signed}), signed.view(torch.uint8))
    assert torch.equal(evaluate(step("repeat", x, axis=1, times=3), {"x": signed}), signed.repeat_interleave(3, 1))


@pytest.mark.parametrize("name", ["int4_g16", "uint4_g16", "int8_g16", "mxfp4"])
def test_packed_parts_hold_the_codes(name):
    generator = torch.Generator().manual_seed(1)
    bits, group = (8 if "8" in name else 4), (32 if name == "mxfp4" else 16)
    codes = torch.randint(0, 1 << bits, (3, 6, 96), generator=generator).to(torch.uint8)
    exponents = torch.randint(120, 130, (3, 6, 96 // group), generator=generator).to(torch.uint8)
    scales = (
        exponents.view(torch.float8_e8m0fnu) if name == "mxfp4" else torch.rand(3, 6, 6, generator=generator).half()
    )
    tensors = {"q": codes, "s": scales}
    if name.startswith("u"):
        tensors["z"] = torch.randint(0, 16, (3, 6, 6), generator=generator).to(torch.uint8)
    items = [leaf(n, t) for n, t in tensors.items()]
    packed = step("packed", *items, to=name)
    decoded = step("decode", items[0], of="e2m1") if name == "mxfp4" else items[0]
    attributes = {} if name == "mxfp4" else {"bits": bits}
    numbers = step("dequantize", decoded, *items[1:], block=(1, 1, group), **attributes)
    assert torch.equal(evaluate(packed, tensors), evaluate(numbers, tensors))
    parts = encode_rows(packed, ModuleSource(tensors), ((1, 3), (2, 5)))
    for part, made in parts.items():
        whole = evaluate(step(part, packed), tensors)
        assert whole.dtype == made.dtype and torch.equal(whole[1:3, 2:5], made)


def test_scales_that_are_no_numbers_are_found():
    tensors = {"q": torch.zeros(2, 32, dtype=torch.uint8), "s": torch.tensor([[1.0], [float("nan")]])}
    packed = step("packed", *(leaf(n, t) for n, t in tensors.items()), to="int8_g32")
    with pytest.raises(MoecError, match="some scales are infinite or not numbers"):
        evaluate_recipe(step("codes", packed), ModuleSource(tensors))


@pytest.mark.parametrize(
    ("name", "sizes", "options", "message"),
    [
        ("unpack", (4, 4), {"bits": 4, "axis": 1, "size": 40}, "40 codes of 4 bits take 5 words"),
        ("unpack", (4, 4), {"bits": 4, "axis": 2}, "axis 2"),
        ("unpack", (4, 4), {"bits": 4, "axis": 1, "order": (0, 1)}, "does not order"),
        ("view", (4, 4), {"to": "f8e4m3"}, "elements of another size"),
        ("decode", (4, 4), {"of": "e2m1"}, "codes u8"),
        ("blocks", (4, 4), {"of": "q9_0", "part": "codes"}, "have no codes"),
    ],
)
def test_wrong_steps_are_refused(name, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        step(name, Tensor("w", TensorType.of("i32", *sizes)), **options)


# --- GGUF ----------------------------------------------------------------------------------------------------------


def block_recipe(name, raw):
    kind, tensor = BLOCKS[name], Tensor("w", TensorType.of("u8", *raw.shape))
    codes, scales = (step("blocks", tensor, of=name, part=part) for part in ("codes", "scales"))
    minimums = [step("blocks", tensor, of=name, part="minimums")] if kind.minimums else []
    if kind.element != "int":
        return step("dequantize", step("decode", codes, of=kind.element), scales, block=(1, kind.group))
    return step("dequantize", codes, scales, *minimums, block=(1, kind.group), bits=kind.bits)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_blocks_decode_as_gguf_does(name):
    from gguf import GGMLQuantizationType, quants

    raw = random_blocks(name, 5, 3)
    wanted = quants.dequantize(raw, GGMLQuantizationType[name.upper()])
    assert np.array_equal(evaluate(block_recipe(name, raw), {"w": torch.from_numpy(raw)}).numpy(), wanted)


def half(block, start):
    return float(block[start : start + 2].view("<f2")[0])


def q4_0(b):
    return [((int(b[2 + i % 16]) >> (4 * (i // 16)) & 15) - 8) * half(b, 0) for i in range(32)]


def q8_0(b):
    return [int(b[2 + i].view(np.int8)) * half(b, 0) for i in range(32)]


def mxfp4(b):
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = [int(b[1 + i % 16]) >> (4 * (i // 16)) & 15 for i in range(32)]
    return [(-1 if c & 8 else 1) * numbers[c & 7] * 2.0 ** (int(b[0]) - 127) for c in codes]


def q4_k(b):
    found, packed = [], b[4:16].astype(int)
    for i in range(256):
        j = i // 32
        if j < 4:
            scale, least = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4)
            least = (packed[j + 4] >> 4) | (packed[j] >> 6 << 4)
        code = int(b[16 + 32 * (i // 64) + i % 32]) >> (4 * (i // 32 % 2)) & 15
        found.append(half(b, 0) * scale * code - half(b, 2) * least)
    return found


def q6_k(b):
    found = []
    for i in range(256):
        n, r = divmod(i, 128)
        low = int(b[64 * n + r % 64]) >> (4 * (r // 64)) & 15
        high = int(b[128 + 32 * n + r % 32]) >> (2 * (r // 32)) & 3
        scale = int(b[192 + i // 16].view(np.int8))
        found.append(half(b, 208) * scale * ((low | high << 4) - 32))
    return found


@pytest.mark.parametrize("definition", [q4_0, q8_0, mxfp4, q4_k, q6_k], ids=lambda d: d.__name__)
def test_blocks_decode_as_defined(definition):
    raw = random_blocks(definition.__name__, 2, 2)
    blocks = raw.reshape(4, -1)
    wanted = np.array([definition(b) for b in blocks]).astype(np.float32).reshape(2, -1)
    made = evaluate(block_recipe(definition.__name__, raw), {"w": torch.from_numpy(raw)}).numpy()
    assert np.allclose(made, wanted, rtol=1e-6, atol=0 if definition in (q4_0, q8_0, mxfp4) else 1e-5)
