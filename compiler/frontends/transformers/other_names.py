"""Names that other tools give to the tensors of a model: parts in front, other words for a module, experts otherwise cut.

A checkpoint that transformers' own rules do not map may be one that was converted by hand or saved by another engine.
`canonical_name` brings a checkpoint's name and a parameter's name to the same text where both mean the same. Experts may be
stored one by one or stacked, their gate and up apart or as one matrix; `Experts` makes the one from the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...errors import MoecError
from ...ir.recipes import Recipe
from ...weights.joined import join_recipes
from ...weights.steps.table import step

# parts in front of the names of the model that reads and writes text: of models of text and images, of wrappers
TEXT = {
    "model", "language_model", "text_model", "llm", "thinker", "transformer", "base_model", "backbone", "module",
    "_orig_mod",
}  # fmt: skip
_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe", "sparse_moe")
_LEAVES = {
    "w1": "gate_proj", "w3": "up_proj", "v1": "up_proj", "w2": "down_proj", "w13": "gate_up_proj",
    "gate_and_up_proj": "gate_up_proj", "gate_up_projs": "gate_up_proj", "gate_projs": "gate_proj",
    "up_projs": "up_proj", "down_projs": "down_proj", "input_linear": "gate_up_proj", "output_linear": "down_proj",
}  # fmt: skip
_ROUTERS = ("gate", "router", "gate.wg", "router.gate", "router.proj", "gate.proj", "router.layer")
_MATRICES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
# linear layers that are stored as one or apart; as one, the rows of the parts are concatenated
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_PIECE = re.compile(
    rf"(?P<block>layers\.\d+(?:\.\w+)*?\.experts)\.(?:(?P<before>\d+)\.)?(?P<matrix>{'|'.join(_MATRICES)})"
    r"(?:\.(?P<behind>\d+))?(?P<kind>[._](?:weight|bias))?"
)


def without_text_prefix(name: str) -> str:
    """Return a name without the parts that say that it belongs to the model of text."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in TEXT:
        parts = parts[1:]
    return ".".join(parts)


def canonical_name(name: str) -> str:
    """Return the name that tensors and parameters of one meaning have in common."""
    name = without_text_prefix(name)
    found = _LAYER.fullmatch(name)
    if found is None:
        return name
    parts = found[2].split(".")
    if parts[0] in _BLOCKS:
        parts[0] = "mlp"
    parts = [_LEAVES.get(part, part) for part in parts]
    parts = ["shared_experts" if part in ("shared_expert", "shared_mlp") else part for part in parts]
    inner, leaf = ".".join(parts[1:-1]), parts[-1]
    if leaf == "e_score_correction_bias":
        inner = ""
    elif parts[0] == "mlp" and inner in _ROUTERS:
        inner = "gate"
    elif "experts" in parts and leaf in ("w13_weight", "w2_weight", "w1_weight", "w3_weight"):
        leaf = f"{_LEAVES[leaf.removesuffix('_weight')]}_weight"
    elif parts[0] == "mlp" and inner in _MATRICES and leaf == "weight" and _is_stack(name):
        inner, leaf = f"experts.{inner}", "weight"
    return ".".join(filter(None, ("layers", found[1], parts[0] if len(parts) > 1 else "", inner, leaf)))


def _is_stack(name: str) -> bool:
    """Return whether a name without `experts` is that of a stack of experts: GraniteMoE's, Step 3's."""
    return bool(re.search(r"\.(input_linear|output_linear)\.|\.moe\.", name))


# --- experts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What a tensor holds of a block of experts: which matrix (or bias), of which expert (None: of all, stacked)."""

    block: str
    matrix: str
    bias: bool
    expert: int | None


def piece_of(name: str) -> Piece | None:
    """Return what the tensor of a canonical name holds of a block of experts, None if it is none of experts."""
    found = _PIECE.fullmatch(name)
    if found is None or (found["before"] and found["behind"]):
        return None
    number = found["before"] or found["behind"]
    bias = (found["kind"] or "").endswith("bias")
    return Piece(found["block"], found["matrix"], bias, None if number is None else int(number))


@dataclass
class Experts:
    """The tensors of one block of experts: recipes by piece, and the names that they have in the checkpoint."""

    pieces: dict[Piece, Recipe] = field(default_factory=dict)
    names: dict[Piece, str] = field(default_factory=dict)

    def add(self, piece: Piece, name: str, recipe: Recipe) -> None:
        """Add a tensor; MoecError where another one holds the same."""
        if piece in self.pieces:
            raise duplicate_tensors(name, self.names[piece])
        self.pieces[piece], self.names[piece] = recipe, name

    def assemble(self, wanted: Piece, shape: tuple[int, ...], module: Any) -> Recipe | str:
        """Return a parameter of stacked experts from however the checkpoint cuts it; a text names a missing tensor.

        `module` may say that the model keeps the axes of each expert the other way round, or the rows of gate and up
        interleaved. MoecError for tensors that contradict each other.
        """
        whole = self.pieces.get(wanted)
        turned = bool(getattr(module, "is_transposed", False)) and not wanted.bias
        how = "concat" if getattr(module, "is_concatenated", True) else "interleave"
        halves = [replace(wanted, matrix=part) for part in FUSED.get(wanted.matrix, ())]
        if whole is not None:
            self._check_no_overlap(wanted, halves)
            return whole
        if halves and all(half in self.pieces for half in halves):
            return self._joined_stacks(halves, shape, how)
        each: list[list[Recipe]] = []
        for expert in range(shape[0]):
            own = replace(wanted, expert=expert)
            parts = self._parts(own, [replace(half, expert=expert) for half in halves])
            if any(part not in self.pieces for part in parts):
                return self._name_like_siblings(next(part for part in parts if part not in self.pieces))
            if parts == [own] and (
                other := next((p for p in halves if replace(p, expert=expert) in self.pieces), None)
            ):
                raise duplicate_tensors(self.names[own], self.names[replace(other, expert=expert)])
            each.append([self.pieces[part] for part in parts])
        beyond = next((p for p in self.pieces if p.matrix == wanted.matrix and (p.expert or 0) >= shape[0]), None)
        if beyond is not None:
            todo = "config.json does not belong to the weights"
            raise MoecError(f"{self.names[beyond]} is beyond the {shape[0]} experts of the config", todo=todo)
        if all(len(parts) == len(each[0]) for parts in each):
            stacks = [join_recipes("stack", [parts[i] for parts in each]) for i in range(len(each[0]))]
            made: Recipe = stacks[0] if len(stacks) == 1 else join_recipes(how, stacks, axis=1)
        else:
            made = join_recipes(
                "stack", [parts[0] if len(parts) == 1 else join_recipes(how, parts, axis=0) for parts in each]
            )
        return step("transpose", made, perm=(0, 2, 1)) if turned else made

    def _parts(self, own: Piece, halves: list[Piece]) -> list[Piece]:
        """Return the pieces that make a matrix of one expert; where it lacks all, those that other experts have."""
        if own in self.pieces or not halves:
            return [own]
        if any(half in self.pieces for half in halves):
            return halves
        others = {(piece.matrix, piece.bias) for piece in self.pieces}
        return [own] if (own.matrix, own.bias) in others else halves

    def _check_no_overlap(self, whole: Piece, halves: list[Piece]) -> None:
        """Raise MoecError where another tensor holds a part of what a stack holds."""
        parts = {(p.matrix, p.bias) for p in (whole, *halves)}
        other = next((name for p, name in self.names.items() if p != whole and (p.matrix, p.bias) in parts), None)
        if other is not None:
            raise duplicate_tensors(self.names[whole], other)

    def _joined_stacks(self, halves: list[Piece], shape: tuple[int, ...], how: str) -> Recipe:
        """Return gate and up as one, each stacked; their shape says which of their axes are the rows."""
        recipes = [self.pieces[half] for half in halves]
        sizes = recipes[0].type.sizes
        if len(shape) == 2:
            return join_recipes(how, recipes, axis=1)
        count, *both = shape
        options = {axis: (count, *(n // 2 if i == axis else n for i, n in enumerate(both, 1))) for axis in (1, 2)}
        turned = {axis: (s[0], s[2], s[1]) for axis, s in options.items()}
        straight = next((axis for axis, s in options.items() if s == sizes), None)
        across = next((axis for axis, s in turned.items() if s == sizes), None)
        if straight is None and across is None:
            return join_recipes(how, recipes, axis=1)  # the check of shapes names it
        if straight is not None and across is not None:
            what = f"{self.names[halves[0]]} is square: its shape does not say which of its axes are the rows"
            raise MoecError(what, todo="save the experts one by one, as transformers' save_pretrained does")
        if straight is not None:
            return join_recipes(how, recipes, axis=straight)
        assert across is not None
        return step("transpose", join_recipes(how, recipes, axis=3 - across), perm=(0, 2, 1))

    def first_missing(self, count: int) -> str | None:
        """Return the name of the first tensor that one of `count` experts lacks and others have."""
        kinds = dict.fromkeys((piece.matrix, piece.bias) for piece in self.pieces)
        for matrix, bias in kinds:
            some = next(p for p in self.pieces if (p.matrix, p.bias) == (matrix, bias))
            for expert in range(count):
                piece = replace(some, expert=expert)
                if piece not in self.pieces:
                    return self._name_like_siblings(piece)
        return None

    def _name_like_siblings(self, piece: Piece) -> str:
        """Return the name of a missing tensor, spelled as its siblings are."""
        for other, name in self.names.items():
            if (other.matrix, other.bias) == (piece.matrix, piece.bias) and other.expert is not None:
                return re.sub(rf"(experts(?:\.\w+)?)\.{other.expert}\.", rf"\g<1>.{piece.expert}.", name)
        number = "" if piece.expert is None else f".{piece.expert}"
        return f"{piece.block}{number}.{piece.matrix}{'.bias' if piece.bias else '.weight'}"


def duplicate_tensors(first: str, second: str) -> MoecError:
    """Return the error for two tensors of which both would be one parameter."""
    return MoecError(
        f"the tensors {first} and {second} are two names for the same weight",
        todo="the folder holds two models: keep the tensors of one of them",
    )


def taken_apart(shapes: Mapping[str, torch.Size], canonical_name: str, sources: Mapping[str, Recipe]) -> Recipe | None:
    """Return the parameter of a canonical name from tensors that hold more or less than it; None if there are none.

    `shapes` are those of the model's parameters by canonical name, `sources` the checkpoint's tensors likewise.
    """
    module, _, kind = canonical_name.rpartition(".")
    owner, _, leaf = module.rpartition(".")
    if kind not in ("weight", "bias") or not owner:
        return None
    for fused, parts in FUSED.items():
        names = [f"{owner}.{part}.{kind}" for part in parts]
        if leaf == fused and all(name in sources for name in names):
            return step("concat", *(sources[name] for name in names), axis=0)
        whole = sources.get(f"{owner}.{fused}.{kind}")
        if leaf in parts and whole is not None and all(name in shapes for name in names):
            rows = [shapes[name][0] for name in names]
            if sum(rows) != whole.type.sizes[0]:
                return None
            start = sum(rows[: parts.index(leaf)])
            return step("slice", whole, axis=0, start=start, stop=start + rows[parts.index(leaf)])
    return None
