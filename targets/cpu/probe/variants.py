"""The variants that the probe tries: what moec could emit, and variants that look right and are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ....compiler.formats.table import GROUPS
from ..capabilities import INT8_ACTIVATIONS, ODD_HEADS, ODD_TURNED, PLAIN, Variant, plain_variant

BITS = (4, 8, 2)
INTEGERS = tuple(f"{sign}int{bits}_g{group}" for bits in BITS for group in GROUPS for sign in ("", "u"))
ONE_GROUP = tuple(f"{sign}int{bits}_g32" for bits in BITS for sign in ("", "u"))
LEVELS = (0, INT8_ACTIVATIONS)
# of moe.experts; relu2 and a gated gelu exist on other devices
ACTIVATIONS = (
    "swiglu_clamped",
    "silu",
    "relu",
    "identity",
    "gelu",
    "gelu_tanh",
    "relu2",
    "gated_gelu",
    "gated_gelu_tanh",
)

# how experts are chosen and mixed; experts.py says what each means
QMOE_ROUTINGS = ("softmax", "negative weights", "normalized weights", "softmax over all experts")
MOE_ROUTINGS = ("zero weights", "negative weights")
PREPACKED = ("weights_prepacked=0", "weights_prepacked=1")
QMOE_OPTIONS = ("swiglu_fusion=2", "one scale a row without block_size", "blocks of 24")
QUANT_TYPES = {"mxfp4": "fp4", "nvfp4": "nvfp4", "fp8_b128": "fp8"}  # format -> what QMoE calls it
ATTENTION = (
    "",
    "bias",
    "window",
    "sinks",
    "softcap",
    "packed",
    "rotary",
    "rotary of a part",
    "packed rotary",
    ODD_HEADS,
    ODD_TURNED,
    "norms of heads",
)


def all_variants() -> list[Variant]:
    """Return the variants in the order in which they are listed and tried."""
    return [*_qmoe_variants(), *_moe_variants(), *_linear_variants(), *_lookup_variants(), *_other_variants()]


def has_speed(variant: Variant) -> bool:
    """Return whether the speed of a variant is worth taking: it reads the weights, and in its own way."""
    plain = Variant(variant.operator, variant.format, accuracy=variant.accuracy, **PLAIN.get(variant.operator, {}))
    return variant == plain and variant.operator in ("QMoE", "MoE", "MatMulNBits")


def _qmoe_variants() -> Iterator[Variant]:
    plain = plain_variant("QMoE")
    for accuracy in LEVELS:
        for name in INTEGERS:
            yield replace(plain, format=name, accuracy=accuracy)
        for name in ONE_GROUP:
            yield replace(plain, format=name, one_group=True, accuracy=accuracy)
    for name in QUANT_TYPES:
        yield replace(plain, format=name)
    for activation in ACTIVATIONS:
        yield replace(plain, activation=activation)
    for routing in QMOE_ROUTINGS:
        yield replace(plain, routing=routing)
    for dtype in ("f16", "bf16"):
        yield replace(plain, dtype=dtype)
    for option in PREPACKED:  # other rows are refused
        yield replace(plain, format="int4_g64", option=option)
    for option in QMOE_OPTIONS:
        yield replace(plain, option=option)


def _moe_variants() -> Iterator[Variant]:
    plain = plain_variant("MoE")
    yield plain
    for activation in ACTIVATIONS:
        yield replace(plain, activation=activation)
    for routing in MOE_ROUTINGS:
        yield replace(plain, routing=routing)
    yield replace(plain, dtype="f16")
    yield replace(plain, option="swiglu_fusion=2")


def _linear_variants() -> Iterator[Variant]:
    yield from (Variant("MatMulNBits", name) for name in QUANT_TYPES)
    for accuracy in LEVELS:
        for name in INTEGERS:
            yield Variant("MatMulNBits", name, accuracy=accuracy)
        for name in ONE_GROUP:
            yield Variant("MatMulNBits", name, one_group=True, accuracy=accuracy)


def _lookup_variants() -> Iterator[Variant]:
    yield from (Variant("GatherBlockQuantized", name) for name in QUANT_TYPES)
    for name in INTEGERS:
        yield Variant("GatherBlockQuantized", name)
    for name in ONE_GROUP:
        yield Variant("GatherBlockQuantized", name, option="experts")


def _other_variants() -> Iterator[Variant]:
    for option in ATTENTION:
        yield Variant("GroupQueryAttention", option=option)
    yield Variant("RotaryEmbedding")
    yield Variant("RotaryEmbedding", option="one row of angles")
    yield Variant("SkipSimplifiedLayerNormalization")
    yield Variant("QuickGelu")
    yield Variant("QuickGelu", option="alpha=1.702")
