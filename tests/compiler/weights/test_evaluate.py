"""Recipes evaluated in parts: a box of the result is the slice of the whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from boxes import boxes_of, same
from hypothesis import given, settings
from hypothesis import strategies as st
from moec.compiler.ir.dtypes import DTYPES, dtype_name
from moec.compiler.ir.recipes import Literal, Recipe, Tensor, bind_recipe, spread_items
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.checkpoint import open_checkpoint
from moec.compiler.weights.sources.source import ModuleSource, RandomSource, slice_box
from moec.compiler.weights.steps.table import STEPS, step
from moec.compiler.weights.tiles import tile_boxes
from safetensors.torch import save_file


def reference(recipe: Recipe, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate a recipe whole, each step in the plainest torch."""
    match recipe:
        case Tensor():
            return tensors[recipe.name]
        case Literal():
            return torch.tensor(recipe.values, dtype=torch.float32).reshape(recipe.type.sizes)
    a: dict[str, Any] = recipe.attributes
    items = [reference(item, tensors) for item in (spread_items(recipe) if recipe.spreads else recipe.items)]
    match recipe.name:
        case "stack":
            return torch.stack(items)
        case "concat":
            return torch.cat(items, dim=a["axis"])
        case "interleave":
            return torch.stack(items, dim=a["axis"] + 1).flatten(a["axis"], a["axis"] + 1)
        case "transpose":
            return items[0].permute(a["perm"])
        case "slice":
            rows = range(a["start"], a["stop"], a.get("step", 1))
            return items[0].movedim(a["axis"], 0)[list(rows)].movedim(0, a["axis"])
        case "reshape":
            return items[0].reshape([int(n) for n in a["shape"]])
        case "cast":
            return items[0].to(DTYPES[a["to"]].torch)
        case "unpack":
            codes = torch.stack([items[0].int() & 15, items[0].int() >> 4 & 15], a["axis"] + 1)
            return codes.flatten(a["axis"], a["axis"] + 1).to(torch.uint8)
        case "decode":  # of e2m1: sign, two bits of exponent, one of mantissa
            codes = items[0].int()
            return (1 - (codes >> 3) * 2.0) * torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7]
    codes, scales = (item.float() for item in items)
    for axis, block in enumerate(a["block"]):
        scales = scales.repeat_interleave(block, dim=axis).narrow(axis, 0, codes.shape[axis])
    return codes * scales


def split_size(draw: st.DrawFn, elements: int) -> list[int]:
    """Draw a shape with that many elements."""
    shape = []
    while elements > 1 and len(shape) < 4:
        factor = draw(st.sampled_from([n for n in range(1, elements + 1) if elements % n == 0]))
        shape.append(factor)
        elements //= factor
    return [*shape, elements] if elements > 1 or draw(st.booleans()) else shape


def wrap(draw: st.DrawFn, item: Recipe, leaf: Callable[[tuple[int, ...], str], Recipe]) -> Recipe:
    """Draw one step around an item; steps of several items get leaves of the same type beside it."""
    sizes, rank = item.type.sizes, len(item.type.sizes)
    kinds = ["stack", "reshape", "cast"] + ["concat", "interleave", "transpose", "slice", "dequantize"] * (rank > 0)
    kinds += ["e2m1"] * 3 * (rank > 0 and item.type.dtype == "i8")
    kind = draw(st.sampled_from(kinds))
    axis = draw(st.integers(0, rank - 1)) if rank else 0
    others = [leaf(sizes, item.type.dtype) for _ in range(draw(st.integers(0, 2)))]
    items = draw(st.permutations([item, *others]))
    match kind:
        case "stack":
            return step("stack", *items)
        case "concat" | "interleave":
            return step(kind, *items, axis=axis)
        case "transpose":
            return step("transpose", item, perm=tuple(draw(st.permutations(range(rank)))))
        case "slice":
            ((start, stop),) = draw(boxes_of([sizes[axis]]))
            return step("slice", item, axis=axis, start=start, stop=stop, step=draw(st.integers(1, 3)))
        case "reshape":
            return step("reshape", item, shape=tuple(split_size(draw, item.type.elements)))
        case "e2m1":
            return step("decode", step("unpack", item, bits=4, axis=axis), of="e2m1")
        case "cast":
            return step("cast", item, to=draw(st.sampled_from(["f32", "bf16", "f16", "i32", "f64"])))
    block = tuple(draw(st.integers(1, 5)) for _ in sizes)
    scales = tuple(-(-n // b) for n, b in zip(sizes, block, strict=True))
    return step("dequantize", item, leaf(scales, draw(st.sampled_from(["f32", "bf16", "f8e8m0"]))), block=block)


@st.composite
def programs(draw: st.DrawFn) -> tuple[Recipe, dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    source = RandomSource(draw(st.integers(0, 1000)))

    def leaf(sizes: tuple[int, ...], dtype: str) -> Recipe:
        made = Tensor(f"t{len(tensors)}", TensorType.of(dtype, *sizes))
        tensors[made.name] = source.read(made.name, None, made.type)
        return made

    sizes = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    recipe = leaf(sizes, draw(st.sampled_from(["f32", "bf16", "i8", "f8e4m3", "i64"])))
    for _ in range(draw(st.integers(0, 5))):
        if recipe.type.elements <= 600:
            recipe = wrap(draw, recipe, leaf)
    return recipe, tensors


@given(programs(), st.data())
@settings(max_examples=400, deadline=None)
def test_a_box_is_the_slice_of_the_whole(program: tuple[Recipe, dict[str, torch.Tensor]], data: st.DataObject) -> None:
    recipe, tensors = program
    source = ModuleSource(tensors)
    whole = reference(recipe, tensors)
    assert whole.dtype == DTYPES[recipe.type.dtype].torch and tuple(whole.shape) == recipe.type.sizes
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    assert same(evaluate_recipe(recipe, source), whole)
    for _ in range(3):
        box = data.draw(boxes_of(recipe.type.sizes, allow_empty=True))
        part = evaluate_recipe(recipe, source, box)
        assert (
            part.is_contiguous()
            and (not part.numel() or part.view(-1).stride() == (1,))
            and same(part, slice_box(whole, box))
        )
    limit = data.draw(st.integers(1, 4 * whole.numel() + 8))
    parts = [evaluate_recipe(recipe, source, box).reshape(-1) for box in tile_boxes(recipe.type, limit)]
    assert same(torch.cat(parts), whole.reshape(-1))
    assert all(same(kept[name], tensor) for name, tensor in tensors.items())  # nothing was written to the source


def test_every_step_says_what_it_does() -> None:
    assert not [name for name, declared in STEPS.items() if not declared.evaluate.__doc__ or declared.name != name]
    assert all(declared.moves for declared in STEPS.values() if declared.spreads)


def test_partial_edge_blocks(tmp_path: Path) -> None:
    """DeepSeek V3's kv_a projection: 576 rows in blocks of 128 have five rows of scales."""
    codes = torch.randn(576, 192).to(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e8m0fnu):
        scales = torch.rand(5, 2).add(0.5).to(dtype)
        save_file({"w": codes, "w_scale_inv": scales}, tmp_path / "model.safetensors")
        scale = Tensor("w_scale_inv", TensorType.of(dtype_name(dtype), 5, 2))
        recipe = step("dequantize", Tensor("w", TensorType.of("f8e4m3", 576, 192)), scale, block=(128, 128))
        whole = codes.float() * scales.float().repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :192]
        with open_checkpoint(tmp_path) as checkpoint:
            assert same(evaluate_recipe(recipe, checkpoint), whole)
            for box in (((500, 576), (0, 192)), ((100, 300), (120, 140)), ((128, 256), (0, 128))):
                assert same(evaluate_recipe(recipe, checkpoint, box), slice_box(whole, box))


def test_templates_are_spread(tmp_path: Path) -> None:
    """The recipe of fused experts, bound to a layer as the emitter does."""
    kind = TensorType.of("bf16", 6, 4)
    leaves = [step("stack", Tensor(f"experts.{{0..4}}.{part}.weight", kind)) for part in ("gate", "up")]
    recipe = bind_recipe(step("cast", step("interleave", *leaves, axis=1), to="f32"), "layers.{layer}.", {"layer": "3"})
    names = [f"layers.3.experts.{e}.{part}.weight" for part in ("gate", "up") for e in range(5)]
    tensors = {name: torch.randn(6, 4).to(torch.bfloat16) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    whole = reference(recipe, tensors)
    assert same(whole[2, 7], tensors["layers.3.experts.2.up.weight"][3].float())
    with open_checkpoint(tmp_path) as checkpoint:
        assert same(evaluate_recipe(recipe, checkpoint), whole)
        assert same(evaluate_recipe(recipe, checkpoint, ((2, 3), (3, 9), (0, 4))), whole[2:3, 3:9])


def test_only_the_box_is_read() -> None:
    """A tile of a stacked, cast, transposed tensor asks its leaves for no more than it needs."""
    asked: list[tuple[str, Any]] = []

    class Watch(RandomSource):
        def read(self, name: str, box: Any = None, expected: Any = None) -> torch.Tensor:
            asked.append((name, box))
            return super().read(name, box, expected)

    stacked = step("stack", Tensor("e.{0..9}", TensorType.of("bf16", 6, 8)))
    flat = step("reshape", step("transpose", stacked, perm=(0, 2, 1)), shape=(80, 6))
    evaluate_recipe(step("cast", flat, to="f32"), Watch(), ((13, 19), (0, 6)))
    assert asked == [("e.1", ((0, 6), (5, 8))), ("e.2", ((0, 6), (0, 3)))]


def test_literals() -> None:
    values = (1.0, -0.0, float("inf"), 0.1, 3.0, -2.5)
    for dtype in ("f32", "bf16", "f16", "f64", "f8e4m3"):
        recipe = Literal(TensorType.of(dtype, 2, 3), values if dtype != "f8e4m3" else (1.0, 2.0, 0.5, -1.0, 0.0, 4.0))
        whole = torch.tensor(recipe.values, dtype=torch.float64).to(DTYPES[dtype].torch).reshape(2, 3)
        assert same(evaluate_recipe(recipe, RandomSource(), ((0, 2), (1, 3))), whole[:, 1:])
    big = Literal(TensorType.of("i64", 2), (2**62 + 1, -(2**63)))
    assert evaluate_recipe(big, RandomSource()).tolist() == list(big.values)
    assert evaluate_recipe(Literal(TensorType.of("bool", 2), (True, False)), RandomSource()).tolist() == [True, False]


def test_tiles() -> None:
    kind = TensorType.of("f32", 3, 1000, 64)
    found = list(tile_boxes(kind, 100_000))
    assert found[:2] == [((0, 1), (0, 384), (0, 64)), ((0, 1), (384, 768), (0, 64))]  # whole blocks of 128 rows
    assert all((b - a) * 64 * 4 <= 100_000 for _, (a, b), _ in found) and len(found) == 9
    assert list(tile_boxes(TensorType.of("f32"), 1)) == [()]
    assert list(tile_boxes(TensorType.of("f32", 0, 5), 100)) == []
    assert list(tile_boxes(TensorType.of("i64", 2, 2), 16)) == [((0, 1), (0, 2)), ((1, 2), (0, 2))]


def test_a_part_of_the_spread_items_makes_no_other_names(monkeypatch):
    """Tiles of one expert among many: what they cost does not grow with the number of experts."""
    from moec.compiler.ir import recipes

    numbered = Tensor("a.{3..258}.w", TensorType.of("f32", 2))
    stacked = step("stack", Tensor("b", TensorType.of("f32", 2)), numbered, Tensor("c", TensorType.of("f32", 2)))
    assert [t.name for t in spread_items(stacked)] == ["b", *(f"a.{i}.w" for i in range(3, 259)), "c"]
    made: list[int] = []
    counted = recipes.range_at
    monkeypatch.setattr(recipes, "range_at", lambda name, index: made.append(index) or counted(name, index))
    whole = spread_items(stacked)
    for low, high in ((0, 1), (0, 2), (100, 101), (255, 258), (257, 258), (4, 4)):
        made.clear()
        assert spread_items(stacked, low, high) == whole[low:high]
        assert len(made) <= high - low
