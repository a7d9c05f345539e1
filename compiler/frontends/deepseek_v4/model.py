"""DeepSeek-V4, built from its config and the tensors of its checkpoint.

It is not traced: exports of transformers' code hold for some lengths of the prompt only. What is built here is one
program for a prompt of any length and for one new token. Rows have no padding: positions count from 0 in all of them.
Formulas: the technical report (arXiv 2606.19348) and transformers' modeling_deepseek_v4.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from ...ir.dims import Size, dim, floordiv, size
from ...ir.module import Dim, Function, Module, Value
from ...ir.recipes import Literal, Recipe, tensors_of
from ...ir.types import TensorType
from ...ops.builder import IRBuilder
from ...ops.compressed import pending_tokens
from ...weights.steps.table import step
from .config import LayerKind, Settings, read_settings
from .weights import EXTRA, Weights

MODEL_TYPE = "deepseek_v4"
B, S, P = dim("B"), dim("S"), dim("P")
TOTAL = P + S


def build(config: Any, weights: Weights, source: str) -> Module:
    """Return the module (stage moe) of a transformers config; MoecError names what is not understood."""
    settings = read_settings(config)
    kinds: dict[Hashable, Function] = {}
    layers, stored_as = [], weights.stored_as()  # layers may differ in nothing but how they are stored
    for number, layer in enumerate(settings.layers):
        kind = layer, stored_as(number)
        if kind not in kinds:
            kinds[kind] = _LayerBuilder(settings, layer, number, weights, f"layer_{len(kinds)}").build()
        layers.append(kinds[kind])
    main = _build_main(settings, layers, weights)
    dims = (Dim("B", 1, 1024), Dim("S", 1, settings.context), Dim("P", 0, settings.context))
    return Module("moe", dims, (*kinds.values(), main), source)


def left_out(config: Any, weights: Weights) -> dict[str, TensorType]:
    """Return the tensors that the program does not read: those of multi-token prediction.

    Where there is only a config, they are those of the released models: a block without compressed entries, whose
    input is made of a token and of the streams.
    """
    if weights.types is not None:
        return {name: type_ for name, type_ in weights.types.items() if name.startswith(EXTRA)}
    s, weights = read_settings(config), weights.of_drafting()
    block = _LayerBuilder(s, LayerKind(0, False, False), 0, weights, "mtp").build()
    recipes = [c.recipe for c in block.consts]
    n = s.streams
    recipes += [weights.layer_weight(0, f"{name}_proj.weight", s.hidden, s.hidden) for name in ("e", "h")]
    recipes += [weights.layer_weight(0, f"{name}.weight", s.hidden) for name in ("enorm", "hnorm", "norm")]
    for leaf, shape in {"fn": (n, n * s.hidden), "base": (n,), "scale": (1,)}.items():
        recipes.append(weights.layer_weight(0, f"hc_head_{leaf}", *shape))
    each = {tensor.name: tensor.type for recipe in recipes for tensor in tensors_of(recipe)}
    blocks = range(config.num_nextn_predict_layers or 0)
    return {f"{EXTRA}{i}.{name}": type_ for i in blocks for name, type_ in each.items()}


# --- states ----------------------------------------------------------------------------------------------------


def state_types(settings: Settings, layer: LayerKind, tokens: Size) -> dict[str, TensorType]:
    """Return the states of a layer after so many tokens, by name."""
    s, ratio = settings, layer.ratio
    found = {"window": (sympy.Min(tokens, s.window - 1), s.head)}
    if ratio:
        wide = 2 if layer.sparse else 1
        found["pending"] = (pending_tokens(tokens, ratio, layer.sparse), 2 * wide * s.head)
        found["entries"] = (floordiv(tokens, ratio), s.head)
    if layer.sparse:
        found["index_pending"] = (pending_tokens(tokens, ratio, True), 4 * s.index_head)
        found["index_entries"] = (floordiv(tokens, ratio), s.index_head)
    return {name: TensorType.of("f32", B, *shape, state=True) for name, shape in found.items()}


# --- one kind of layer -----------------------------------------------------------------------------------------


@dataclass
class _LayerBuilder:
    """Writes the function of one kind of layer with the weights of its first layer, their names behind a prefix."""

    settings: Settings
    layer: LayerKind
    number: int
    weights: Weights
    name: str

    def __post_init__(self) -> None:
        self.b = IRBuilder(self.name)

    def build(self) -> Function:
        """Return (hidden, what the layer needs, states) -> (hidden, states)."""
        s, b = self.settings, self.b
        given: dict[str, Value] = {}
        for name, type_ in layer_params(s, self.layer).items():
            given[name] = b.param(name, type_)
        states = {n: b.param(f"past_{n}", t) for n, t in state_types(s, self.layer, P).items()}
        hidden, presents = self._attention_sublayer(given, states)
        hidden = self._moe_sublayer(hidden, given)
        return b.build([hidden, *(presents[n] for n in states)], self.weights.prefix)

    def _weight(self, name: str, *sizes: int) -> Value:
        """Return a weight by its official name."""
        return self.b.const(_short_name(name), self.weights.layer_weight(self.number, name, *sizes))

    def _concatenated_weights(self, hint: str, *names: str, rows: int, width: int) -> Value:
        """Return weights [rows, width] concatenated along their rows."""
        parts = [self.weights.layer_weight(self.number, name, rows, width) for name in names]
        return self.b.const(hint, step("concat", *parts, axis=0))

    def _linear(self, x: Value, name: str, rows: int, width: int, hint: str) -> Value:
        return self.b.add("core.linear", x, self._weight(f"{name}.weight", rows, width), None, hint=hint)

    def _norm(self, x: Value, name: str, width: int, hint: str) -> Value:
        return self.b.add("nn.rms_norm", x, self._weight(f"{name}.weight", width), hint=hint, eps=self.settings.eps)

    def _collapse_streams(self, streams: Value, part: str) -> tuple[Value, Value, Value]:
        """Return (a sublayer's input, post, mix)."""
        s, n = self.settings, self.settings.streams
        self.b.loc = (f"hc_{part}",)
        sizes = {"fn": ((2 + n) * n, n * s.hidden), "base": ((2 + n) * n,), "scale": (3,)}
        given = [self._weight(f"hc_{part}_{leaf}", *shape) for leaf, shape in sizes.items()]
        y, post, mix = self.b.add_all(
            "nn.hyper_connection_pre", streams, *given, hints=f"{part}_in",
            eps=s.eps, floor=s.stream_eps, iterations=s.sinkhorn,
        )  # fmt: skip
        return y, post, mix

    # --- attention ---------------------------------------------------------------------------------------------

    def _attention_sublayer(
        self, given: Mapping[str, Value], states: Mapping[str, Value]
    ) -> tuple[Value, dict[str, Value]]:
        s, b, layer = self.settings, self.b, self.layer
        collapsed, post, mix = self._collapse_streams(given["hidden"], "attn")
        b.loc = ("attn",)
        x = self._norm(collapsed, "attn_norm", s.hidden, "x")
        turn = {"cos": given["cos"], "sin": given["sin"]}
        latent = self._norm(self._linear(x, "attn.wq_a", s.q_rank, s.hidden, "q_a"), "attn.q_norm", s.q_rank, "latent")
        q = self._linear(latent, "attn.wq_b", s.heads * s.head, s.q_rank, "q_b")
        q = b.add("core.reshape", q, hint="q_heads", shape=(B, S, s.heads, s.head))
        ones = b.add("core.full", hint="ones", shape=(s.head,), value=1.0, dtype="f32")
        q = b.add("nn.rms_norm", q, ones, hint="q_normed", eps=s.eps)
        q = b.add("nn.rope_pairs", q, turn["cos"], turn["sin"], hint="q")
        kv = self._norm(self._linear(x, "attn.wkv", s.head, s.hidden, "kv_in"), "attn.kv_norm", s.head, "kv_normed")
        kv = self._rotated_rows(kv, turn, 1, s.head, "kv")
        kv = b.add("core.reshape", kv, hint="kv", shape=(B, S, s.head))
        presents: dict[str, Value] = {}
        entries = selected = None
        if layer.ratio:
            entries = self._append_entries(x, given, states, presents, "", s.head)
        if layer.sparse:
            selected = self._select_entries(x, latent, given, states, presents, turn)
        b.loc = ("attn",)
        sinks = self._weight("attn.attn_sink", s.heads)
        y, presents["window"] = b.add_all(
            "nn.compressed_attention", q, kv, states["window"], entries, selected, sinks, hints="attended",
            scale=s.head**-0.5, window=s.window, past=P, ratio=layer.ratio,
        )  # fmt: skip
        y = b.add("nn.rope_pairs", y, turn["cos"], turn["sin"], hint="turned_back", inverse=True)
        part = s.heads * s.head // s.groups
        y = b.add("core.reshape", y, hint="grouped", shape=(B, S, s.groups, part))
        y = b.add("nn.block_linear", y, self._weight("attn.wo_a.weight", s.groups * s.o_rank, part), hint="o_a")
        y = self._linear(y, "attn.wo_b", s.hidden, s.groups * s.o_rank, "attn_out")
        return b.add("nn.hyper_connection_post", y, given["hidden"], post, mix, hint="after_attn"), presents

    def _rotated_rows(self, x: Value, turn: Mapping[str, Value], heads: int, width: int, hint: str) -> Value:
        heads_of = self.b.add("core.reshape", x, hint=f"{hint}_heads", shape=(B, S, heads, width))
        return self.b.add("nn.rope_pairs", heads_of, turn["cos"], turn["sin"], hint=f"{hint}_turned")

    def _append_entries(
        self, x: Value, given: Mapping[str, Value], states: Mapping[str, Value], presents: dict[str, Value],
        part: str, head: int,
    ) -> Value:  # fmt: skip
        """Append the entries of the attention (part "") or of the indexer ("index_"), and return all of them."""
        s, b, layer = self.settings, self.b, self.layer
        place = "attn.indexer.compressor" if part else "attn.compressor"
        b.loc = (place,)
        width = head * (2 if layer.sparse else 1)
        names = (f"{place}.wkv.weight", f"{place}.wgate.weight")
        both = self._concatenated_weights(f"{part}compressor", *names, rows=width, width=s.hidden)
        tokens = b.add("core.linear", x, both, None, hint=f"{part}tokens")
        bias = self._weight(f"{place}.ape", layer.ratio, width)
        norm = self._weight(f"{place}.norm.weight", head)
        presents[f"{part}pending"], presents[f"{part}entries"] = b.add_all(
            "nn.compress_tokens", tokens, states[f"{part}pending"], states[f"{part}entries"], bias, norm,
            given["entry_cos"], given["entry_sin"], hints=f"{part}compressed",
            ratio=layer.ratio, past=P, overlap=layer.sparse, eps=s.eps,
        )  # fmt: skip
        return presents[f"{part}entries"]

    def _select_entries(
        self, x: Value, latent: Value, given: Mapping[str, Value], states: Mapping[str, Value],
        presents: dict[str, Value], turn: Mapping[str, Value],
    ) -> Value:  # fmt: skip
        """Return the entries that the indexer chooses for every token."""
        s, b = self.settings, self.b
        keys = self._append_entries(x, given, states, presents, "index_", s.index_head)
        b.loc = ("attn.indexer",)
        q = self._linear(latent, "attn.indexer.wq_b", s.index_heads * s.index_head, s.q_rank, "index_q_b")
        q = self._rotated_rows(q, turn, s.index_heads, s.index_head, "index_q")
        weights = self._linear(x, "attn.indexer.weights_proj", s.index_heads, s.hidden, "index_weights")
        scale = b.add("core.constant", hint="index_scale", value=(s.index_head * s.index_heads) ** -0.5, dtype="f32")
        weights = b.add("core.mul", weights, scale, hint="index_weights")
        return b.add(
            "nn.select_entries", q, keys, weights, hint="selected", k=s.index_topk, ratio=self.layer.ratio, past=P
        )

    # --- experts -----------------------------------------------------------------------------------------------

    def _moe_sublayer(self, streams: Value, given: Mapping[str, Value]) -> Value:
        s, b = self.settings, self.b
        collapsed, post, mix = self._collapse_streams(streams, "ffn")
        b.loc = ("ffn",)
        x = self._norm(collapsed, "ffn_norm", s.hidden, "x")
        rows = b.add("core.reshape", x, hint="rows", shape=(B * S, s.hidden))
        ids, gates = self._route_rows(rows, given)
        b.loc = ("ffn.experts",)
        up, down = self.weights.expert_weights(self.number, s.experts, s.hidden, s.inner)
        y = b.add(
            "moe.experts", rows, ids, gates, b.const("experts_up", up), b.const("experts_down", down), None, None,
            hint="routed", **s.activation,
        )  # fmt: skip
        y = b.add("core.reshape", y, hint="routed", shape=(B, S, s.hidden))
        b.loc = ("ffn.shared_experts",)
        names = ("ffn.shared_experts.w1.weight", "ffn.shared_experts.w3.weight")
        both = self._concatenated_weights("shared_up", *names, rows=s.inner, width=s.hidden)
        shared = b.add(
            "nn.gated_mlp", x, both, self._weight("ffn.shared_experts.w2.weight", s.hidden, s.inner), None, None, None,
            hint="shared", **s.activation,
        )  # fmt: skip
        b.loc = ("ffn",)
        y = b.add("core.add", y, shared, hint="ffn_out")
        return b.add("nn.hyper_connection_post", y, streams, post, mix, hint="after_ffn")

    def _route_rows(self, rows: Value, given: Mapping[str, Value]) -> tuple[Value, Value]:
        """Return (ids, gates) of the chosen experts."""
        s, b = self.settings, self.b
        b.loc = ("ffn.gate",)
        logits = self._linear(rows, "ffn.gate", s.experts, s.hidden, "logits")
        bias = known = None
        if self.layer.hashed:
            table = self._weight("ffn.gate.tid2eid", s.vocabulary, s.chosen)
            flat = b.add("core.reshape", given["input_ids"], hint="flat_ids", shape=(B * S,))
            known = b.add("core.take", table, flat, hint="known", axis=0)
        else:
            bias = self._weight("ffn.gate.bias", s.experts)
        gates, ids = b.add_all(
            "moe.route", logits, bias, known, None, hints="route",
            k=s.chosen, score=s.score, renorm="sum", eps=1e-20, scale=s.routed_scale,
        )  # fmt: skip
        return ids, gates


def layer_params(settings: Settings, layer: LayerKind) -> dict[str, TensorType]:
    """Return what a kind of layer takes besides its states: streams, token ids for hash routing, and angles."""
    s, half = settings, settings.rope // 2
    found = {"hidden": TensorType.of("f32", B, S, s.streams, s.hidden)}
    if layer.hashed:
        found["input_ids"] = TensorType.of("i64", B, S)
    found |= dict.fromkeys(("cos", "sin"), TensorType.of("f32", 1, S, half))
    if layer.ratio:
        new = size(floordiv(TOTAL, layer.ratio) - floordiv(P, layer.ratio))
        found |= dict.fromkeys(("entry_cos", "entry_sin"), TensorType.of("f32", new, half))
    return found


# --- the whole program -----------------------------------------------------------------------------------------


def _build_main(settings: Settings, layers: Sequence[Function], weights: Weights) -> Function:
    s, b = settings, IRBuilder("main")
    ids = b.param("input_ids", TensorType.of("i64", B, S))
    b.param("attention_mask", TensorType.of("i64", B, TOTAL))  # says how many tokens are past; all of it is 1
    pasts = {
        (number, name): b.param(f"past_key_values.{number}.{name}", type_)
        for number, layer in enumerate(s.layers)
        for name, type_ in state_types(s, layer, P).items()
    }
    table = b.const("embed", weights.top_level_weight("embed.weight", s.vocabulary, s.hidden))
    b.loc = ("embed",)
    x = b.add("nn.embedding", ids, table, hint="embedded")
    x = b.add("core.reshape", x, hint="one_stream", shape=(B, S, 1, s.hidden))
    x = b.add("core.expand", x, hint="streams", shape=(B, S, s.streams, s.hidden))
    angles = _rotary_tables(s, b)
    presents: list[Value] = []
    for number, layer in enumerate(s.layers):
        given = {"hidden": x, "input_ids": ids, **angles[layer.ratio]}
        operands = [given[name] for name in layer_params(s, layer)]
        operands += [pasts[number, name] for name in state_types(s, layer, P)]
        hints = [f"hidden.{number}", *(f"present.{number}.{name}" for name in state_types(s, layer, P))]
        x, *kept = b.call(layers[number], operands, hints, layer=number)
        presents += kept
    b.loc = ("head",)
    n = s.streams
    sizes = {"fn": (n, n * s.hidden), "base": (n,), "scale": (1,)}
    given_head = [b.const(f"hc_head_{k}", weights.top_level_weight(f"hc_head_{k}", *v)) for k, v in sizes.items()]
    x = b.add("nn.hyper_connection_head", x, *given_head, hint="collapsed", eps=s.eps, floor=s.stream_eps)
    x = b.add(
        "nn.rms_norm", x, b.const("norm", weights.top_level_weight("norm.weight", s.hidden)), hint="normed", eps=s.eps
    )
    head = b.const("head", weights.top_level_weight("head.weight", s.vocabulary, s.hidden))
    logits = b.add("core.linear", x, head, None, hint="logits")
    return b.build([logits, *presents])


def _rotary_tables(settings: Settings, b: IRBuilder) -> dict[int, dict[str, Value]]:
    """Return what layers of each ratio turn by: `cos` and `sin` of the new tokens, `entry_*` of the new entries."""
    positions = _count_range(b, TOTAL, P, TOTAL, "positions")
    tables: dict[bool, dict[str, Value]] = {}
    found: dict[int, dict[str, Value]] = {}
    for ratio in sorted({layer.ratio for layer in settings.layers}):
        label = "compressed" if ratio else "plain"
        if bool(ratio) not in tables:
            frequencies = b.const(f"{label}_frequencies", _literal_of_floats(settings.frequencies[bool(ratio)]))
            cos, sin = _cos_and_sin(b, positions, frequencies, label)
            shape = (1, *cos.type.shape)
            tables[bool(ratio)] = {
                "cos": b.add("core.reshape", cos, hint=f"{label}_cos", shape=shape),
                "sin": b.add("core.reshape", sin, hint=f"{label}_sin", shape=shape),
                "frequencies": frequencies,
            }
        found[ratio] = dict(tables[bool(ratio)])
        if ratio:
            before, after = floordiv(P, ratio), floordiv(TOTAL, ratio)
            windows = _count_range(b, after, before, after, f"windows_{ratio}")
            each = b.add("core.constant", hint="ratio", value=ratio, dtype="i64")
            starts = b.add("core.mul", windows, each, hint=f"starts_{ratio}")
            cos, sin = _cos_and_sin(b, starts, found[ratio]["frequencies"], f"entry_{ratio}")
            found[ratio] |= {"entry_cos": cos, "entry_sin": sin}
    return found


def _count_range(b: IRBuilder, length: Size, start: Size, stop: Size, hint: str) -> Value:
    numbers = b.add("core.iota", hint=f"{hint}_all", size=length)
    return b.add("core.slice", numbers, hint=hint, axis=0, start=start, stop=stop)


def _cos_and_sin(b: IRBuilder, positions: Value, frequencies: Value, label: str) -> tuple[Value, Value]:
    """Return cos and sin [N, R] of the angles at N positions."""
    numbers = b.add("core.cast", positions, hint=f"{label}_at", to="f32")
    column = b.add("core.reshape", numbers, hint=f"{label}_at", shape=(*positions.type.shape, 1))
    angles = b.add("core.mul", column, frequencies, hint=f"{label}_angles")
    return b.add("core.cos", angles, hint=f"{label}_cos"), b.add("core.sin", angles, hint=f"{label}_sin")


def _literal_of_floats(numbers: tuple[float, ...]) -> Recipe:
    return Literal(TensorType.of("f32", len(numbers)), numbers)


def _short_name(name: str) -> str:
    return "_".join(name.removesuffix(".weight").split(".")[-2:])
