"""What latent attention is lowered to: no op but attention reads a whole cache, and what layers share is made once."""

import pytest
from moec.compiler.driver import compile_source
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.ops import OPS
from moec.targets.accelerator.lower import module as lowering
from moec.targets.accelerator.select.supported import IMPLEMENTATIONS
from tiny_models import random_model, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(random_model(FAMILIES["deepseek_v3"], num_hidden_layers=2), tmp_path_factory.mktemp("latent"))


def lowered(folder, check=False):
    return compile_source(folder, target="nvidia-h200", stop_after="lower", check=check).module


def readers(module):
    """Return the names of ops that read all tokens of a cache, or copy them to append to it, in any layer."""
    found = set()
    for function in module.functions:
        caches = {v.name for v in function.params if v.type.state}
        for op in (op for op in function.ops if not op.callee):
            read = {name for name, value in op.named if value.name in caches}
            appended = read & set(OPS[op.name].appends)
            copied = appended and not (op.name in IMPLEMENTATIONS and IMPLEMENTATIONS[op.name](op, {}))
            if read - appended or copied:
                found.add(op.name)
            caches |= {v.name for v in op.results if read and (v.type.state or OPS[op.name].view)}
    return found


def test_only_attention_reads_a_whole_cache(folder, monkeypatch):
    module = lowered(folder, check=True)
    assert readers(module) == {"acc.latent_attention"}
    for function in module.functions[:-1]:
        names = [op.name for op in function.ops]
        assert names.count("acc.latent_append") == names.count("acc.latent_attention") == 1
        # angles are cut and doubled once, by the caller
        assert not {"nn.rope", "nn.cache_append", "core.concat", "core.slice"} & set(names)
    # as it was before: keys put together from both caches
    monkeypatch.setattr(lowering, "latent_attention", lambda editor, op, stored: None)
    assert readers(lowered(folder)) == {"core.concat", "nn.attention"}
