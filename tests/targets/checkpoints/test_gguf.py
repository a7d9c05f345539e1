"""GGUF files that target gguf writes: read by llama.cpp's own package, by llama.cpp where it is installed, and by moec."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize
from moec.compiler import driver
from moec.compiler.errors import MoecError
from moec.compiler.formats.table import format_of
from moec.compiler.frontends.families import FAMILIES
from moec.targets.checkpoints.gguf_blocks import block_type, pack_blocks
from moec.targets.checkpoints.gguf_names import find_architecture
from places import ROOT
from tiny_models import random_model, save

TINY = ROOT / "examples" / "tiny-moe"
AS_NUMBERS = "experts=f32,attention=f32,shared=f32,dense=f32,head=f32,embedding=f32"
# what llama.cpp's architectures have no key for
CHANGES = {"qwen3_moe": {"norm_topk_prob": True}, "olmoe": {"num_key_value_heads": 4}}


def written(tmp_path, family, spec):
    plain = save(random_model(FAMILIES[family], **CHANGES.get(family, {})), tmp_path / "plain")
    return plain, driver.compile(plain, "gguf", tmp_path / "out", quantize=spec).folder


def logits_of(artifact, ids):
    tokens = np.array([ids])
    session = artifact.session(spinning=False, accuracy="exact")
    return session.step(tokens, np.ones_like(tokens), np.arange(len(ids))[None])[0][0]


@pytest.mark.parametrize("name", ["int4_g32", "int4_g128", "uint4_g64", "int8_g32", "mxfp4"])
def test_blocks_are_what_the_package_of_llama_cpp_reads(name):
    format = format_of(name)
    parts = format.encode(torch.randn(6, 256, generator=torch.Generator().manual_seed(0)))
    kind = gguf.GGMLQuantizationType[block_type(format).upper()]
    found = dequantize(pack_blocks(parts, format, 256).numpy(), kind)
    wanted = format.decode(parts, 256).numpy()
    assert np.abs(found - wanted).max() <= (0 if name == "mxfp4" else 1e-3) * np.abs(wanted).max()  # f16 scales


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("mixtral", "experts=int4_g32,attention=int8_g32,head=uint4_g32,embedding=f32"),
        pytest.param("qwen2_moe", "experts=uint4_g32,attention=int8_g32,shared=f32,head=f32,embedding=f32", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_moec_reads_the_same_numbers(tmp_path, family, spec):
    """Rows of q and k that llama.cpp has in another order, experts in one tensor, codes with zero points as minimums."""
    plain, out = written(tmp_path, family, spec)
    again = driver.compile(out, "cpu", tmp_path / "again", quantize=AS_NUMBERS)
    wanted = logits_of(driver.compile(plain, "cpu", tmp_path / "cpu", quantize=spec), range(3, 20))
    assert np.abs(logits_of(again, range(3, 20)) - wanted).max() < 1e-2 * np.abs(wanted).max()
    reader = gguf.GGUFReader(out / "model.gguf")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.1.ffn_gate_exps.weight"] == ("Q4_0" if family == "mixtral" else "Q4_1")
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["blk.0.ffn_gate_inp.weight"] == "F32"


def llama_logits(path, ids, text=""):
    """Return what llama.cpp computes for tokens, and the tokens that it makes of a text."""
    llama = pytest.importorskip("llama_cpp")
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model
    settings = llama.llama_context_default_params()
    settings.n_threads = settings.n_threads_batch = 1
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama.llama_decode(context, batch) == 0
    vocabulary = llama.llama_model_get_vocab(model)
    size = (llama.llama_vocab_n_tokens(vocabulary),)
    found = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), size).copy() for i in range(len(ids))]
    tokens = (llama.llama_token * 2048)()
    count = llama.llama_tokenize(vocabulary, text.encode(), len(text.encode()), tokens, 2048, True, True) if text else 0
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return np.stack(found).astype(np.float64), list(tokens[:count])


def divergence(wanted, found):
    wanted, found = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (wanted, found))
    return (np.exp(wanted) * (wanted - found)).sum(-1).mean()


@pytest.mark.long
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_llama_cpp_computes_the_model(tmp_path, family):
    pytest.importorskip("llama_cpp")
    plain, out = written(tmp_path, family, AS_NUMBERS)
    ids = list(range(3, 27))
    found, _ = llama_logits(out / "model.gguf", ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].double().numpy()
    assert np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()  # llama.cpp keeps keys and values in f16


@pytest.mark.long
def test_llama_cpp_loses_what_the_artifact_loses(tmp_path):
    """llama.cpp rounds activations to 8 bits beside codes, as the artifact does at its accuracy `fast`."""
    pytest.importorskip("llama_cpp")
    spec = "int4,embedding=f32"
    text = (TINY / "heldout.txt").read_text("utf-8")[:800]
    out = driver.compile(TINY, "gguf", tmp_path / "out", quantize=spec).folder
    ids = transformers.AutoTokenizer.from_pretrained(TINY)(text).input_ids[:200]
    found, tokens = llama_logits(out / "model.gguf", ids, text)
    assert tokens[:200] == ids
    cpu = driver.compile(TINY, "cpu", tmp_path / "cpu", quantize=spec)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].double().numpy()
    assert divergence(wanted, found) == pytest.approx(
        divergence(wanted, logits_of(cpu, ids).astype(np.float64)), rel=0.05
    )


@pytest.mark.parametrize(
    ("family", "spec", "what"),
    [
        ("mixtral", "experts=int4_g16", "no block type of GGUF has the codes of int4_g16"),
        ("qwen2_moe", f"{AS_NUMBERS},layers=1.experts[0]=int4_g32", "would be stored as"),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(tmp_path, family, spec, what):
    with pytest.raises(MoecError, match=what):
        written(tmp_path, family, spec)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (transformers.DeepseekV3Config(), "GGUF files of deepseek_v3 are not written"),
        (transformers.Qwen3MoeConfig(norm_topk_prob=False), "norm_topk_prob of config.json is False"),
        (transformers.OlmoeConfig(num_key_value_heads=4), "num_key_value_heads of config.json is 4"),
        (transformers.Qwen2MoeConfig(decoder_sparse_step=2), "decoder_sparse_step of config.json is 2"),
    ],
)
def test_configs_that_llama_cpp_computes_otherwise_are_refused(config, what):
    with pytest.raises(MoecError, match=what):
        find_architecture(config)


def test_it_has_no_options():
    from moec.targets import open_target

    with pytest.raises(MoecError, match="target gguf has no option layout"):
        open_target("gguf", {"layout": "gptq"})
