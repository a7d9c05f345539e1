"""Random metadata of GGUF files: a config, or one message with exit code 2 that names a key or a tensor."""

import math

import pytest
import torch
from gguf_models import ARCHITECTURES, gguf_tensors, metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.gguf import metadata as keys
from moec.compiler.frontends.gguf.config import gguf_config
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.sources.gguf import Gguf, LongArray
from moec.compiler.weights.sources.safetensors_header import TensorInfo
from moec.compiler.weights.sources.source import ModuleSource
from tiny_models import random_model

VALUES = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1, 2**63, -(2**63)]), st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0, 4.0, -1.0, 1e-30, 1e30, math.nan, math.inf]), st.text(max_size=4),
    st.sampled_from(["yarn", "linear", "none", "longrope"]), st.just(LongArray(5000)),
    st.lists(st.integers(-1, 5), max_size=3).map(tuple), st.lists(st.text(max_size=2), max_size=3).map(tuple),
)  # fmt: skip
FURTHER = (
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear",
    "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "vocab_size",
    "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "attention.value_length", "rope.dimension_count",
    "expert_weights_norm", "attention.sliding_window", "expert_shared_count", "expert_shared_feed_forward_length",
    "never_heard_of", *keys._NEUTRAL, *keys._HARMLESS,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return, by family, what an opened file of a tiny model has, and a path in an empty folder."""
    found = {}
    for family, architecture in ARCHITECTURES.items():
        with torch.no_grad():
            model = random_model(FAMILIES[family], num_hidden_layers=2)
            tensors = gguf_tensors(model, family, lambda name: "f32")
        source = ModuleSource({})
        source.tensors = {name: TensorInfo(TensorType.of("f32", *shape)) for name, (_, shape, _) in tensors.items()}
        found[family] = source, metadata(model.config, architecture)
    return found, tmp_path_factory.mktemp("empty") / "m.gguf"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_metadata(files, data):
    found, path = files
    family = data.draw(st.sampled_from(list(ARCHITECTURES)))
    source, about = found[family]
    prefix = about["general.architecture"]
    names = [*about, *(f"{prefix}.{key}" for key in FURTHER)]
    changes = data.draw(st.dictionaries(st.sampled_from(names), st.one_of(st.none(), VALUES), min_size=1, max_size=3))
    given_ = {k: v for k, v in {**about, **changes}.items() if v is not None}
    try:
        config = gguf_config(Gguf(source, given_, {}), path)
    except MoecError as error:
        assert error.exit_code == 2 and error.where and error.todo
        assert any(word in error.what for word in (*names, "general.", "tokenizer.", "architecture", "blk."))
    else:
        assert config.num_hidden_layers == 2 and math.isfinite(config.rms_norm_eps)
        assert 1 <= config.num_experts_per_tok <= 8 and config.num_attention_heads * config.head_dim == 64
