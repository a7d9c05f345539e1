"""What a checkpoint stores for each weight: one tensor, or codes with scales and zero points in one of many layouts.

The config says by which method a checkpoint was quantized, with how many bits and what shares a scale (schemes.py); which
modules were is read off the tensors themselves, since lists of exceptions in configs are patterns that every tool matches in
its own way. Every tensor of a module that has codes is read, or stands in UNUSED, or is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from ...errors import MoecError
from ...ir.recipes import Recipe, Tensor, rename_tensors
from ...ir.types import TensorType
from ...weights.sources.checkpoint import Checkpoint, first_number
from .layouts import FLOATS, Layout, Stored, gpt_oss, packed_integers, scaled_codes
from .layouts import block_scaled_float4 as packed_floats
from .layouts_gptq import gptq_weight
from .schemes import Scheme, SchemesOf, Unquantized, read_schemes

# roles of tensors that nothing here needs -> why
UNUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("input_scale", "activation_scale", "input_global_scale", "input_zero_point", "input_scale_inv", "qscale_act"),
        "says how activations were rounded, which stay floats here",
    ),
    **dict.fromkeys(("output_scale", "k_scale", "v_scale", "q_scale", "prob_scale"), "says how results or caches were rounded"),
    "weight_shape": "says what the codes' shape says too",
}  # fmt: skip
# the role that holds the codes -> the roles that may stand beside it, and how they are decoded
_LAYOUTS: Mapping[str, tuple[tuple[str, ...], Layout]] = {
    "weight_packed": (
        ("weight_scale", "weight_global_scale", "weight_zero_point", "weight_g_idx", "weight_shape"), packed_integers,
    ),
    "qweight": (("scales", "qzeros", "g_idx"), gptq_weight),
    "blocks": (("scales",), gpt_oss),
    "weight": (
        ("weight_scale_inv", "weight_scale", "weight_scale_2", "weight_zero_point", "scale", "qscale_weight"), scaled_codes,
    ),
}  # fmt: skip
_CODES_OF = {r: [c for c, (b, _) in _LAYOUTS.items() if r in b] for beside, _ in _LAYOUTS.values() for r in beside}
_ROLES = {*_LAYOUTS, *_CODES_OF}
# roles that model code has for parameters of its own too: `scale` beside a weight in floats
_AMBIGUOUS = {"weight", "scale", "scales"}
# behind the name of a parameter that is no module's `weight` (the fused experts of a layer) -> the role
_SUFFIXES: Mapping[str, str] = {
    **{f"_{role}": role for role in sorted(_ROLES | UNUSED.keys(), key=len, reverse=True) if role not in ("weight", "scale")},
    "_scale_inv": "weight_scale_inv", "_scale_2": "weight_scale_2", "_global_scale": "weight_global_scale",
    "_packed": "weight_packed", "_zero_point": "weight_zero_point", "_shape": "weight_shape", "_scale": "scale",
}  # fmt: skip
_PLAIN = {"bias"}
_APART = "config.json and the weights do not belong together, or this layout is not supported"


@dataclass(frozen=True)
class Decoded:
    """The weights of a checkpoint by name, and what tells how each is stored: equal for weights stored alike."""

    recipes: Mapping[str, Recipe]
    alike: Mapping[str, Hashable]

    def of_layers(self, wanted: Iterable[str]) -> dict[str, Recipe]:
        """Return the weights that can matter: those of the wanted names' layers and those outside of layers.

        A name that ends with a number may be outside of layers and belong to another layer than that of the number.
        """
        numbers = {first_number(name) for name in wanted} | {None}
        return {
            name: recipe
            for name, recipe in self.recipes.items()
            if first_number(name) in numbers or name.rpartition(".")[2].isdigit()
        }

    def stored_as(self) -> Callable[[int], Hashable]:
        """Return a function that says how the weights of a layer are stored: layers stored alike get the same answer."""
        found: dict[int, list[tuple[str, Hashable]]] = {}
        for name, kind in self.alike.items():
            number = first_number(name)
            if number is not None:
                found.setdefault(number, []).append((name.partition(f"{number}.")[2], kind))
        kinds = {number: tuple(sorted(own, key=lambda item: item[0])) for number, own in found.items()}
        return lambda layer: kinds.get(layer)


def decode_checkpoint(checkpoint: Checkpoint, quantization: Mapping[str, Any] | None) -> Decoded:
    """Return every weight of a checkpoint, made of what is stored; MoecError names a tensor that is not understood.

    Reads the data of small tensors alone: shapes, orders of inputs, zero points.
    """
    try:
        schemes = read_schemes(quantization) if quantization is not None else None
    except ValueError as error:
        raise MoecError(str(error), where=str(checkpoint.folder / "config.json"), todo=_APART) from None
    job = _Decoding(checkpoint, schemes, {}, {}, {})
    recipes: dict[str, Recipe] = {}
    alike: dict[str, Hashable] = {}
    for (owner, _), parts in _tensors_by_owner(checkpoint.tensors).items():
        for name, (recipe, kind) in job.weights(owner, parts).items():
            recipes[name], alike[name] = recipe, kind
    return Decoded(recipes, alike)


@dataclass(frozen=True)
class _Decoding:
    """Decodes the weights of one checkpoint; what was decoded once is used again for weights stored alike.

    `made` holds recipes whose tensors are called by their roles, `reads` the roles whose numbers a layout looked at.
    """

    checkpoint: Checkpoint
    schemes: SchemesOf | None
    made: dict[Hashable, tuple[Recipe, int]]
    reads: dict[Hashable, set[str]]
    numbers: dict[Recipe, int]

    def weights(self, owner: str, parts: Mapping[str, str]) -> dict[str, tuple[Recipe, Hashable]]:
        """Return the weights of a module or of a parameter with suffixes: what its codes make, and plain tensors."""
        types = {role: self.checkpoint.tensors[name].type for role, name in parts.items()}
        codes = _codes_role(types)
        if codes is None:
            self._check_lonely(owner, parts, types)
            return {name: (Tensor(name, types[role]), types[role]) for role, name in parts.items()}
        beside, layout = _LAYOUTS[codes]
        own = {role: name for role, name in parts.items() if role == codes or role in beside}
        plain = {role: name for role, name in parts.items() if role in _PLAIN}
        strange = next((name for role, name in parts.items() if role not in {*own, *plain, *UNUSED}), None)
        if strange:
            raise self._error(
                f"{strange} beside {parts[codes]} is not understood",
                strange,
                "this way of quantizing is not supported: give an unquantized checkpoint",
            )
        if codes == "weight_packed" and types[codes].dtype != "i32":
            layout = packed_floats
        if types[codes].dtype in FLOATS:
            raise self._error(
                f"{parts[codes]} is {types[codes]}, plain numbers, and {next(own[r] for r in beside if r in own)} stands beside it",
                parts[codes],
                "scales belong to codes: if the weight was decoded, remove its scales; else take its codes from the original",
            )
        module = parts[codes] == f"{owner}.{codes}"
        recipe = self._decode_weight(owner, layout, codes, own, types)
        found: dict[str, tuple[Recipe, Hashable]] = {f"{owner}.weight" if module else owner: recipe}
        return {**found, **{name: (Tensor(name, types[role]), types[role]) for role, name in plain.items()}}

    def _decode_weight(
        self, owner: str, layout: Layout, codes: str, parts: Mapping[str, str], types: Mapping[str, TensorType]
    ) -> tuple[Recipe, Hashable]:
        schemes = self._allowed_schemes(owner, parts[codes])
        key: Hashable = (codes, tuple((role, types[role]) for role in sorted(parts)), schemes)
        looked = self.reads.setdefault(key, set())
        stored = _Watched({role: Tensor(name, types[role]) for role, name in parts.items()}, self._read, looked)
        values = tuple(self._digest(parts[role]) for role in sorted(looked))
        if (key, values) not in self.made:
            try:
                recipe = fitting_recipe(layout, stored, schemes)
            except ValueError as error:
                raise self._error(f"{parts[codes]} is not understood: {error}", parts[codes], _APART) from None
            roles = {name: role for role, name in parts.items()}
            values = tuple(self._digest(parts[role]) for role in sorted(looked))
            template = rename_tensors(recipe, roles.__getitem__)
            self.made[key, values] = template, self.numbers.setdefault(template, len(self.numbers))
        template, number = self.made[key, values]
        return rename_tensors(template, parts.__getitem__), number

    def _allowed_schemes(self, owner: str, codes: str) -> tuple[Scheme, ...]:
        """Return how config.json says that a weight may be stored; MoecError if it says that it is not quantized."""
        where = str(self.checkpoint.folder / "config.json")
        if self.schemes is None:
            raise MoecError(
                f"{codes} has scales, but config.json has no quantization_config",
                where=where,
                todo="the config of another checkpoint? Copy the one that belongs to the weights",
            )
        try:
            return self.schemes(owner)
        except Unquantized as reason:
            raise MoecError(
                f"{codes} holds codes, but config.json leaves the module unquantized: {reason}",
                where=where,
                todo=_APART,
            ) from None
        except ValueError as error:
            raise MoecError(f"{codes} is not understood: {error}", where=where, todo=_APART) from None

    def _check_lonely(self, owner: str, parts: Mapping[str, str], types: Mapping[str, TensorType]) -> None:
        """Raise MoecError for what can only stand beside codes, where no codes are."""
        for role, name in parts.items():
            if role in _ROLES and role not in _AMBIGUOUS:
                missing = _LAYOUTS[role][0][:1] if role in _LAYOUTS else _CODES_OF[role]
                lacking = " or ".join(f"{name.removesuffix(role)}{other}" for other in missing)
                what = "are codes without scales" if role in _LAYOUTS else "has no codes beside it"
                todo = "a shard is missing, or a tensor was renamed"
                if elsewhere := self._lacking_elsewhere(name.removesuffix(role), role, missing):
                    todo = f"{elsewhere} is missing: was it renamed?"
                raise self._error(f"{name} {what}: there is no {lacking}", name, todo)

    def _lacking_elsewhere(self, stem: str, role: str, others: Iterable[str]) -> str | None:
        """Return a name that differs in numbers alone and is missing beside tensors that it belongs to."""
        form, known = re.sub(r"\d+", "#", stem), self.checkpoint.tensors
        for name in known:
            own = next((name.removesuffix(o) for o in others if name.endswith(o)), None)
            if own is not None and f"{own}{role}" not in known and re.sub(r"\d+", "#", own) == form:
                return f"{own}{role}"
        return None

    def _error(self, what: str, name: str, todo: str) -> MoecError:
        return MoecError(what, where=str(self.checkpoint.tensors[name].file), todo=todo)

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name)

    def _digest(self, name: str) -> bytes:
        return blake2b(self._read(name).reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


@dataclass(frozen=True)
class _Watched(Stored):
    """Tensors that remember which of them were looked at."""

    looked: set[str]

    def values(self, role: str) -> torch.Tensor:
        self.looked.add(role)
        return super().values(role)


def fitting_recipe(layout: Layout, stored: Stored, schemes: Iterable[Scheme]) -> Recipe:
    """Return what the one scheme makes that fits the tensors; ValueError if none does, or two with other results."""
    found: list[Recipe] = []
    reasons: list[str] = []
    for scheme in schemes:
        try:
            recipe = layout(stored, scheme)
        except ValueError as error:
            reasons.append(str(error))
        else:
            found += [recipe] if recipe not in found else []
    if len(found) > 1:
        raise ValueError(f"config.json allows {len(found)} readings")
    if found:
        return found[0]
    # of several reasons, those that speak of another kind of codes say less, those that name what is missing say more
    raise ValueError(min(reasons, key=lambda text: (text.startswith("codes"), "is missing" not in text)))


def _codes_role(types: Mapping[str, TensorType]) -> str | None:
    """Return the role that holds codes beside which something says what they mean; None for plain tensors."""
    for codes, (beside, _) in _LAYOUTS.items():
        found = set(beside) & types.keys()
        if codes in types and found and not (types[codes].dtype in FLOATS and found <= _AMBIGUOUS):
            return codes
    return None


# --- names: which tensors belong together -----------------------------------------------------------------------------


def _tensors_by_owner(names: Mapping[str, Any]) -> dict[tuple[str, bool], dict[str, str]]:
    """Return the tensors of each weight by their role.

    They belong to a module (its weight is called `.weight`), or (True) to a parameter whose name they begin with.
    """
    found: dict[tuple[str, bool], dict[str, str]] = {}
    for name in names:
        owner, role = _tensor_owner(name, names)
        found.setdefault(owner, {})[role] = name
    for parts in found.values():
        if "weight_packed" in parts and "scale" in parts:
            parts["weight_scale"] = parts.pop("scale")
    return found


def beside_codes(checkpoint: Checkpoint) -> set[str]:
    """Return the tensors that are codes, or stand beside codes of the same module or parameter."""
    found: set[str] = set()
    for parts in _tensors_by_owner(checkpoint.tensors).values():
        if _codes_role({role: checkpoint.tensors[name].type for role, name in parts.items()}):
            found.update(parts.values())
    return found


def _tensor_owner(name: str, names: Mapping[str, Any]) -> tuple[tuple[str, bool], str]:
    module, _, leaf = name.rpartition(".")
    if leaf in _ROLES or leaf in UNUSED or leaf in _PLAIN:
        return (module, False), leaf
    if any(f"{name}{suffix}" in names for suffix in _SUFFIXES):
        return (name, True), "weight"
    for suffix, role in _SUFFIXES.items():
        base = name.removesuffix(suffix)
        if base != name and not base.endswith(".") and _is_parameter(base, names):
            return (base, True), role
    return (module, False), leaf


def _is_parameter(base: str, names: Mapping[str, Any]) -> bool:
    return base in names or any(f"{base}{s}" in names for s in ("_packed", "_weight_packed", "_blocks", "_qweight"))


def layer_types(checkpoint: Checkpoint) -> Callable[[int], Hashable]:
    """Return a function that says how the tensors of a layer are stored: layers stored alike get the same answer."""
    return Decoded({}, {name: info.type for name, info in checkpoint.tensors.items()}).stored_as()
