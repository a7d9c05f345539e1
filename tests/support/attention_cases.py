"""Random uses of attention over a cache: inputs, models of one node, and the numbers that must come out."""

import numpy as np
from hypothesis import strategies as st
from moec.targets.cpu.onnx.attention import WEIGHTLESS
from onnx import helper
from own_kernels import node_model

ORDER = (
    "q", "k", "v", "past_key", "past_value", "last", "total", "cos", "sin", "rows", "bias", "sinks", "", "", "", "",
    "count",
)  # fmt: skip


@st.composite
def attentions(draw, widths=None):
    width = draw(st.sampled_from(widths) if widths else st.integers(1, 70).map(lambda n: 2 * n))
    past = st.sampled_from([0, 1, 5, 63, 64, 200, 1500])
    groups, each = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 8]))
    return {
        "batch": draw(st.integers(1, 2)), "new": draw(st.sampled_from([1, 1, 2, 3, 9, 40, 200])), "past": draw(past),
        "room": draw(st.sampled_from([0, 0, 7, 300])), "width": width, "groups": groups, "heads": groups * each,
        "window": draw(st.sampled_from([0, 0, 1, 17, 130, 2000])), "softcap": draw(st.sampled_from([0.0, 0.0, 3.0])),
        "turned": draw(st.sampled_from([0, width, max(2, width // 4 * 2)])), "packed": draw(st.booleans()),
        "masked": draw(st.booleans()), "sinks": draw(st.booleans()), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def feeds_of(case):
    """Return the inputs of a case; the buffers of the past have room for `room` more tokens, NaN where nothing is."""
    random = np.random.default_rng(case["seed"])
    batch, new, past, width, heads, groups = (case[n] for n in ("batch", "new", "past", "width", "heads", "groups"))

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    feeds = {"q": normal(batch, new, (heads + 2 * groups if case["packed"] else heads) * width)}
    if not case["packed"]:
        feeds |= {"k": normal(batch, new, groups * width), "v": normal(batch, new, groups * width)}
    for name in ("past_key", "past_value"):
        feeds[name] = np.full((batch, groups, past + case["room"], width), np.nan, np.float32)
        feeds[name][:, :, :past] = normal(batch, groups, past, width)
    counts = {"last": np.full(batch, past + new - 1), "total": np.array(past + new), "count": np.full(batch, new)}
    feeds |= {name: count.astype(np.int32) for name, count in counts.items()}
    if case["turned"]:
        angles = random.uniform(0, 6, (batch * new + past, case["turned"] // 2)).astype(np.float32)
        feeds |= {"cos": np.cos(angles), "sin": np.sin(angles), "rows": np.arange(batch * new).reshape(batch, new)}
    if case["masked"]:
        hidden = random.integers(0, past + new + 1, batch)  # padding in front, at times all of it
        bias = np.where(np.arange(past + new) < hidden[:, None], -np.inf, 0).astype(np.float32)
        feeds["bias"] = np.repeat(bias[:, None, None], new, 2)
    if case["sinks"]:
        feeds["sinks"] = normal(heads)
    return feeds


def use_weightless_sinks(case, feeds):
    """Give attention with padding sinks as artifacts have them: of rows that are all padding ONNX Runtime makes NaN."""
    if case["masked"] and not case["sinks"]:
        feeds["sinks"] = np.full(case["heads"], WEIGHTLESS, np.float32)


def node_settings(case):
    return {
        "num_heads": case["heads"], "kv_num_heads": case["groups"], "do_rotary": int(case["turned"] > 0), "scale": 0.3,
        "local_window_size": case["window"] or -1, "softcap": case["softcap"],
    }  # fmt: skip


def model_of(case, feeds):
    inputs = [name if name in feeds else "" for name in ORDER]
    node = helper.make_node(
        "GroupQueryAttention", inputs, ["y", "key", "value"], domain="com.microsoft", **node_settings(case)
    )
    return node_model(node, feeds, {}, {"y": [None] * 3, "key": [None] * 4, "value": [None] * 4})


def expected(case, feeds, present=None):
    """Return y and the present keys and values, in float64; `present` are those that are attended to instead."""
    batch, new, past, width, heads, groups = (case[n] for n in ("batch", "new", "past", "width", "heads", "groups"))
    x = {name: array.astype(np.float64) for name, array in feeds.items()}
    q, k, v = (
        np.split(x["q"], [heads * width, (heads + groups) * width], 2) if case["packed"] else (x["q"], x["k"], x["v"])
    )
    q, k, v = (a.reshape(batch, new, -1, width).transpose(0, 2, 1, 3) for a in (q, k, v))
    if half := case["turned"] // 2:
        cos, sin = (x[name][: batch * new].reshape(batch, 1, new, half) for name in ("cos", "sin"))
        turn = lambda a: np.concatenate(  # noqa: E731
            [a[..., :half] * cos - a[..., half : 2 * half] * sin, a[..., half : 2 * half] * cos + a[..., :half] * sin, a[..., 2 * half :]],
            -1,
        )  # fmt: skip
        q, k = turn(q), turn(k)
    key, value = (np.concatenate([x[n][:, :, :past], a], 2) for n, a in (("past_key", k), ("past_value", v)))
    made = key, value
    key, value = present or made
    scores = 0.3 * q @ key.repeat(heads // groups, 1).transpose(0, 1, 3, 2)
    if case["softcap"]:
        scores = case["softcap"] * np.tanh(scores / case["softcap"])
    place, slot = past + np.arange(new)[:, None], np.arange(past + new)
    seen = (slot <= place) & (slot > place - case["window"] if case["window"] else True)
    scores = np.where(seen, scores, -np.inf) + (x["bias"] if case["masked"] else 0)
    sinks = x["sinks"][:, None, None] if case["sinks"] else np.full((heads, 1, 1), -np.inf)
    most = np.maximum(scores.max(-1, keepdims=True), sinks)
    shares = np.exp(scores - np.where(np.isinf(most), 0, most))
    total = shares.sum(-1, keepdims=True) + np.exp(sinks - np.where(np.isinf(most), 0, most))
    shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    y = (shares @ value.repeat(heads // groups, 1)).transpose(0, 2, 1, 3).reshape(batch, new, -1)
    return y, *made
