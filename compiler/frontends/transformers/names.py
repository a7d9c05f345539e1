"""From a model's parameter names to recipes over checkpoint tensors, by transformers' own conversion rules.

transformers loads a checkpoint by renaming tensors and by running small operations on them (stack the experts,
concatenate gate and up, ...). The same rules are run here on `RecipeTensor`s, which hold no data and write down
what is done to them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import MoecError
from ...ir.dtypes import dtype_name
from ...ir.recipes import Recipe, Step, Tensor, rename_tensors, tensors_of, written_tensors
from ...ir.types import TensorType, expand_range
from ...weights.steps.table import STEPS, step
from ..stored.layouts import FLOATS
from .config_names import keys_of
from .other_names import Experts, canonical_name, duplicate_tensors, piece_of, taken_apart, without_text_prefix
from .recipe_tensor import RecipeTensor


@dataclass(frozen=True)
class Claim:
    """A tensor of the checkpoint that goes into a parameter.

    `resolved` is its name as the family spells it, `pattern` the conversion's pattern that it matches (None: it is the
    parameter itself).
    """

    name: str
    resolved: str
    pattern: str | None


class Rules:
    """Transformers' rules for the names of a model's tensors."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.state = model.state_dict()
        self._base = model.base_model_prefix
        rules = get_model_conversion_mapping(model)
        self._renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        self._converters = [r for r in rules if isinstance(r, WeightConverter)]
        self.by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._prefixes = sorted({key.removesuffix(without_text_prefix(key)) for key in self.state})

    def find(self, name: str) -> tuple[str, Claim] | None:
        """Return the parameter that a tensor goes into, None if there is none.

        What stands in front of the model of text may be other than what the family writes there.
        """
        rest = without_text_prefix(name)
        for resolved in dict.fromkeys((name, *(prefix + rest for prefix in self._prefixes))):
            target, pattern = self._rename(resolved)
            if target not in self.state and resolved in self.state:
                target, pattern = resolved, None
            if target in self.state:
                return target, Claim(name, resolved, pattern)
        return None

    def _rename(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, self._renamings, self._converters, self._base, self.state)

    def deals_out(self, pattern: str | None) -> bool:
        """Return whether a conversion makes several parameters."""
        return pattern is not None and len(self.by_pattern[pattern].target_patterns) > 1

    def keeps_orientation(self, pattern: str | None) -> bool | None:
        """Return whether a conversion leaves the axes of a tensor as they are; None if it decides by the shape."""
        if pattern is None:
            return True
        operations = self.by_pattern[pattern].operations
        by_shape = len(operations) == 1 and getattr(operations[0], "check_dims", False)
        return None if by_shape else False


def _no_tensor(name: str) -> MoecError:
    return MoecError(f"the checkpoint has no tensor {name}")


def map_parameters(
    model: Any,
    wanted: Iterable[str],
    available: Mapping[str, Recipe],
    lacks: Callable[[str], MoecError] = _no_tensor,
) -> dict[str, Recipe]:
    """Return a recipe for each wanted parameter name of a transformers model on the meta device.

    `available` are the checkpoint's tensors by name, as recipes, since a stored tensor may need dequantizing first.
    `lacks` returns the error for a tensor that is missing.
    """
    return _Mapping(model, set(wanted), available, lacks).recipes()


class _Mapping:
    """From parameters to recipes: by transformers' rules, and for what those leave over by the names of other tools."""

    def __init__(
        self, model: Any, wanted: set[str], available: Mapping[str, Recipe], lacks: Callable[[str], MoecError]
    ) -> None:
        self.model, self.wanted, self.available, self.lacks = model, wanted, available, lacks
        self.rules = Rules(model)
        self.state = self.rules.state
        self.claims: dict[str, list[Claim]] = {}
        self.stacks: dict[
            str, tuple[Recipe, bool | None]
        ] = {}  # stacked experts as the checkpoint has them, see _transpose_stored

    def recipes(self) -> dict[str, Recipe]:
        """Return the recipes by parameter."""
        left = self._claim_tensors()
        own = {key: canonical_name(key) for key in self.state}
        counts = Counter(own.values())
        by_name = {name: key for key, name in own.items() if counts[name] == 1}
        blocks = self._expert_blocks(left, by_name)
        found: dict[str, Recipe] = {}
        for target, claims in self.claims.items():
            if target in self.wanted or any(claim.pattern is not None for claim in claims):
                found |= self._converted_recipes(target, claims)
        for block, experts in blocks.items():
            found |= self._expert_recipes(block, experts, by_name)
        missing = self.wanted - found.keys()
        if missing and left:
            shapes = {name: self.state[key].shape for name, key in by_name.items()}
            sources = {canonical_name(name): self.available[name] for name in left}
            for name in missing:
                made = sources.get(own[name]) if by_name.get(own[name]) == name else None
                made = made if made is not None else taken_apart(shapes, own[name], sources)
                if made is not None:
                    found[name] = made
        self._transpose_stored(found)
        for name, recipe in found.items():
            self._check_shape(name, recipe)
        return {name: recipe for name, recipe in found.items() if name in self.wanted}

    def _claim_tensors(self) -> list[str]:
        """Assign every tensor to the parameter that it goes into; return the names of those that no rule knows."""
        resolved: dict[str, str] = {}
        left = []
        for name in sorted(self.available, key=_natural_order):
            found = self.rules.find(name)
            if found is None:
                left.append(name)
                continue
            target, claim = found
            own = without_text_prefix(claim.resolved)
            if own in resolved:
                raise duplicate_tensors(name, resolved[own])
            resolved[own] = name
            self.claims.setdefault(target, []).append(claim)
        for claims in self.claims.values():
            claims.sort(key=lambda claim: _natural_order(without_text_prefix(claim.resolved)))
        return left

    def _converted_recipes(self, target: str, claims: list[Claim]) -> dict[str, Recipe]:
        """Return what transformers' conversion makes of the tensors of a parameter: it, and others with it."""
        from transformers.core_model_loading import WeightRenaming

        first = claims[0]
        entry: Any = WeightRenaming(first.resolved, target)
        if first.pattern is not None:
            entry = deepcopy(self.rules.by_pattern[first.pattern])
        elif len(claims) > 1:
            raise duplicate_tensors(claims[1].name, first.name)
        for claim in claims:
            recipe = self.available[claim.name]
            entry.add_tensor(target, claim.resolved, claim.pattern or first.resolved, RecipeTensor.of(recipe))
        try:
            made = entry.convert(target, model=self.model, config=self.model.config)
        except ValueError as error:
            for claim in claims:
                check_numbers(self.available[claim.name], self.state[target].is_floating_point())
            raise self._incomplete_error(target, claims) or MoecError(
                f"the tensors of {target} do not fit together: {error}", where=self._odd_one(claims)
            ) from None
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        found = {name: value.recipe for name, value in found.items()}
        # experts are stacked in the order of their numbers: with a gap, each would take the place of another
        if first.pattern is not None and (incomplete := self._incomplete_error(target, claims)) is not None:
            raise incomplete
        if len(claims) == 1:
            piece, own = piece_of(canonical_name(first.name)), self.available[first.name]
            keeps = self.rules.keeps_orientation(first.pattern)
            if piece and piece.expert is None and keeps is not False and target.endswith(f".{piece.matrix}"):
                self.stacks[target] = own, keeps
        return found

    def _incomplete_error(self, target: str, claims: list[Claim]) -> MoecError | None:
        """Return the error for an expert that lacks a tensor, None if all have theirs."""
        experts = Experts()
        for claim in claims:
            piece = piece_of(canonical_name(claim.name))
            if piece is None or piece.expert is None:
                return None
            experts.add(piece, claim.name, self.available[claim.name])
        counts = self.state[target].shape[0]
        name = experts.first_missing(counts)
        return None if name is None else self.lacks(name)

    def _odd_one(self, claims: list[Claim]) -> str:
        """Return what the checkpoint stores for the weight whose type is the rarest, which is the one that does not fit."""
        recipes = [self.available[claim.name] for claim in claims]
        types = [str(recipe.type) for recipe in recipes]
        odd = min(recipes, key=lambda recipe: types.count(str(recipe.type)))
        return ", ".join(dict.fromkeys(tensor.name for tensor in tensors_of(odd)))

    def _expert_blocks(self, left: list[str], by_name: Mapping[str, str]) -> dict[str, Experts]:
        """Return the blocks of experts of which tensors are left, with all their tensors; their claims fall away."""
        odd = {piece.block for name in left if (piece := piece_of(canonical_name(name)))}
        known = {piece.block for name in by_name if (piece := piece_of(name))}
        blocks: dict[str, Experts] = {}
        for name in sorted(self.available, key=_natural_order) if odd & known else ():
            piece = piece_of(canonical_name(name))
            if piece and piece.block in odd & known:
                blocks.setdefault(piece.block, Experts()).add(piece, name, self.available[name])
        for target in list(self.claims):
            piece = piece_of(canonical_name(target))
            if piece and piece.block in blocks:
                del self.claims[target]
        return blocks

    def _expert_recipes(self, block: str, experts: Experts, by_name: Mapping[str, str]) -> dict[str, Recipe]:
        """Return the parameters of a block of experts whose tensors have names that transformers' rules do not know."""
        found = {}
        for own, target in by_name.items():
            piece = piece_of(own)
            if piece is None or piece.block != block or target not in self.wanted:
                continue
            module = self.model.get_submodule(target.rpartition(".")[0])
            made = experts.assemble(piece, tuple(self.state[target].shape), module)
            if isinstance(made, str):
                raise self.lacks(made)
            found[target] = made
            whole = experts.pieces.get(piece)
            if whole is not None and not piece.bias:
                self.stacks[target] = whole, None
        return found

    def _transpose_stored(self, found: dict[str, Recipe]) -> None:
        """Transpose stacked experts that are stored the other way round; a square one is stored as its sibling is.

        The shape of a square matrix does not say which of its axes is which.
        """
        for target, (stack, _) in self.stacks.items():
            if target in found and (turned := self._is_turned(target)) is not None:
                found[target] = step("transpose", stack, perm=(0, 2, 1)) if turned else stack

    def _is_turned(self, target: str) -> bool | None:
        """Return whether a stack has its axes the other way round than the model; None if its shape fits neither way."""
        turned = self._by_shape(target)
        if turned is not None or len(set(self.stacks[target][0].type.sizes[1:])) != 1:
            return turned
        block = target.rpartition(".")[0]
        siblings = [self._by_shape(other) for other in self.stacks if other.rpartition(".")[0] == block]
        decided = {turned for turned in siblings if turned is not None}
        stack, keeps = self.stacks[target]
        if len(decided) == 1:
            return decided.pop()
        if keeps:
            return None
        name = next(claim.name for claim in self.claims[target]) if target in self.claims else target
        raise MoecError(
            f"{name} is square ({stack.type}) and no other matrix of its experts says which of its axes are the rows",
            todo="save the experts one by one, as transformers' save_pretrained does",
        )

    def _by_shape(self, target: str) -> bool | None:
        """Return whether the shape of a stack is the model's with the axes of each expert exchanged; None: no answer."""
        sizes, wanted = tuple(self.stacks[target][0].type.sizes), tuple(self.state[target].shape)
        if len(sizes) != 3 or sizes[1] == sizes[2]:
            return None
        return {wanted: False, (wanted[0], wanted[2], wanted[1]): True}.get(sizes) if len(wanted) == 3 else None

    def _check_shape(self, name: str, recipe: Recipe) -> None:
        parameter = self.state[name]
        if tuple(recipe.type.sizes) != tuple(parameter.shape):
            if hole := _missing_number([tensor.name for tensor in tensors_of(recipe)]):
                raise MoecError(
                    f"the checkpoint has no tensor {hole}, which {name} is made of",
                    todo="a shard is missing, or config.json and the weights do not belong together",
                )
            first = recipe
            while isinstance(first, Step):
                first = first.items[0]
            raise MoecError(
                f"the checkpoint's tensors give {name} the shape {list(recipe.type.sizes)}, "
                f"the config wants {list(parameter.shape)}",
                where=first.name if isinstance(first, Tensor) else "",
                todo="config.json and the weights do not belong together, or a tensor is incomplete"
                + keys_of(self.model.config, recipe.type.sizes, parameter.shape),
            )


def check_numbers(recipe: Recipe, floats: bool) -> None:
    """Raise MoecError if a weight is made of stored integers or FP8 as they are: without scales they are no numbers.

    `floats` is false for a parameter of integers, which may be stored in any kind of integers.
    """
    if isinstance(recipe, Step) and not STEPS[recipe.name].reads_codes:
        for item in recipe.items:
            check_numbers(item, floats)
    elif isinstance(recipe, Tensor) and (recipe.type.dtype in FLOATS) != floats:
        name = expand_range(recipe.name)[0]
        what = "codes beside which no scale is found" if floats else "where integers are wanted"
        todo = f"{name}_scale or {name}_scale_inv is missing, or the scale has another name" if floats else ""
        raise MoecError(f"the tensor {name} is {recipe.type}: {what}", todo=todo)


def _missing_number(names: list[str]) -> str | None:
    """Return the first name that is missing among names that count up, None if there is none."""
    split = [re.split(r"(\d+)", name) for name in names]
    for parts in split[:1]:
        for at in range(1, len(parts), 2):
            numbers = {int(p[at]) for p in split if len(p) == len(parts)}
            missing = next((n for n in range(max(numbers)) if n not in numbers), None)
            if len(numbers) > 1 and missing is not None:
                return "".join([*parts[:at], str(missing), *parts[at + 1 :]])
    return None


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def expected_tensors(model: Any, state: Mapping[str, torch.Tensor], dtype: str) -> dict[str, Recipe]:
    """Return the tensors that transformers would save the model's state as, with floats of a dtype.

    This is what a config without weights is imported with.
    """
    from transformers.core_model_loading import revert_weight_conversion

    reverted = revert_weight_conversion(model, dict(state))
    found: dict[str, Recipe] = {}
    for name, tensor in reverted.items():
        kind = dtype if tensor.is_floating_point() else dtype_name(tensor.dtype)
        found[name] = Tensor(name, TensorType.of(kind, *tensor.shape))
    return found


def relative_to_layer(recipe: Recipe, layer: int) -> tuple[str, Recipe] | None:
    """Return (prefix with {layer}, recipe with names behind that prefix) if every name has the layer's number first."""
    prefixes = set()
    for tensor in written_tensors(recipe):
        found = re.match(rf"(?:[^.\d][^.]*\.)*?{layer}\.", tensor.name)
        if not found:
            return None
        prefixes.add(found[0])
    if len(prefixes) != 1:
        return None
    prefix = prefixes.pop()
    return prefix[: -len(f"{layer}.")] + "{layer}.", rename_tensors(recipe, lambda n: n[len(prefix) :])


def apart_from_layer(recipe: Recipe, layer: int) -> Recipe | None:
    """Return the recipe with absolute names where one part is the layer's number, or the number before it, if all have one.

    They become `{layer}` and `{before}`: tensors that lie outside of their layers (`attn_res.attn_queries.0` is layer 1's).
    """
    made: dict[str, str] = {}
    for tensor in written_tensors(recipe):
        parts = tensor.name.split(".")
        for number, label in ((layer, "{layer}"), (layer - 1, "{before}")):
            if parts.count(str(number)) == 1 and tensor.name not in made:
                parts[parts.index(str(number))] = label
                made[tensor.name] = "/" + ".".join(parts)
        if tensor.name not in made:
            return None
    return rename_tensors(recipe, made.__getitem__)


def names_before(recipe: Recipe) -> bool:
    """Return whether a name of the recipe holds the number of the layer before."""
    return any("{before}" in tensor.name for tensor in written_tensors(recipe))
