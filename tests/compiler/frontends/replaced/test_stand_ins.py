"""What stands in the place of transformers' code: which code it was checked against, and what is said of other code."""

import ast
import inspect
import json
import linecache
import sys
import textwrap
from importlib import metadata

import moec
import pytest
import transformers
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.frontends.replaced.replace import replace_model_code
from moec.compiler.frontends.replaced.stand_ins import UNREADABLE, source_fingerprint, strip_comments
from moec_command import invoke
from tiny_models import INSTALLED, random_model, save

ALWAYS = ("minimax", "deepseek_v32", "deepseek_v2", "deepseek_v4")  # the others belong to the long matrix
CHECKED = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.long) for name in INSTALLED]
LIGHTNING = "moec's replaced.recurrent._lightning stands for MiniMaxLightningAttention.forward of transformers"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a tiny MiniMax-01 checkpoint."""
    return save(random_model(FAMILIES["minimax"]), tmp_path_factory.mktemp("minimax"))


def stand_ins(model):
    """Return what stands in the place of a model's code while it is imported."""
    if model.config.model_type == "deepseek_v4":  # built, not traced
        return load(model).replaced
    with replace_model_code(model) as found:
        return found


@pytest.mark.parametrize("name", CHECKED)
def test_code_of_the_installed_transformers_was_checked(name):
    """A new version of transformers fails here: compare its numbers (test_parity.py), then add the hashes."""
    found = stand_ins(random_model(FAMILIES[name]))
    assert not [(s.replaces, s.source) for s in found if not s.checked]
    assert bool(found) or name not in ALWAYS


def edited(original, tmp_path, change):
    """Return a function of a modelling file as if its file had other text; `change` maps the source to a new one."""
    function = inspect.unwrap(original)
    text = change(source := textwrap.dedent(inspect.getsource(function)))
    assert text != source
    file = tmp_path / f"{function.__name__}.py"
    file.write_text(text)
    linecache.checkcache(str(file))
    made = {}
    exec(compile(text, str(file), "exec"), function.__globals__, made)
    return made[function.__name__]


def compiled(checkpoint, tmp_path, *options):
    """Compile with the command; return what it says on standard error, and moec.json."""
    out = tmp_path / "artifact"
    result = invoke("compile", checkpoint, "-o", out, *options)
    assert result.exit_code == 0, result.output
    return result.stderr, json.loads((out / "moec.json").read_text())


def minimax():
    return sys.modules["transformers.models.minimax.modeling_minimax"]


def test_what_was_checked_is_recorded_and_said_on_demand(checkpoint, tmp_path):
    said, manifest = compiled(checkpoint, tmp_path, "--why")
    assert f"note: import: {LIGHTNING}\n" in said and "warning:" not in said
    found = {entry["replaces"]: entry for entry in manifest["replaced"]}
    assert {e["moec"] for e in found.values()} >= {"replaced.recurrent._lightning", "transformers.cache.TraceCache"}
    assert all(entry["checked"] and len(entry["source"]) == 16 for entry in found.values())
    names = ("torch", "transformers", "onnx", "onnxruntime")
    assert manifest["packages"] == {name: metadata.version(name) for name in names}
    assert manifest["packages"]["transformers"] == transformers.__version__


def test_changed_code_is_said_on_every_compile(checkpoint, tmp_path, monkeypatch):
    attention = minimax().MiniMaxLightningAttention
    changed = edited(attention.forward, tmp_path, lambda text: text.replace("torch.exp(-self.slope_rate", "torch.exp(-2 * self.slope_rate"))  # fmt: skip
    monkeypatch.setattr(attention, "forward", changed)
    warning = f"warning: {LIGHTNING}, whose source changed since it was checked\n"
    said, manifest = compiled(checkpoint, tmp_path)
    assert warning in said
    entry = next(e for e in manifest["replaced"] if e["replaces"] == "MiniMaxLightningAttention.forward")
    assert entry["checked"] is False
    with pytest.warns(UserWarning, match="changed since it was checked"):
        moec.compile(checkpoint, stop_after="graph")


def test_a_changed_helper_counts_and_a_comment_does_not(tmp_path, monkeypatch):
    attention = minimax().MiniMaxLightningAttention
    before = source_fingerprint(attention.forward, attention)
    commented = edited(attention.forward, tmp_path, lambda text: text.replace("\n", "  # as it was\n", 1))
    assert source_fingerprint(commented, attention) == before != UNREADABLE
    name = "apply_mask_to_padding_states"  # what the forward pass calls
    helper = edited(getattr(minimax(), name), tmp_path, lambda text: text.replace("hidden_states *", "2 * hidden_states *"))  # fmt: skip
    monkeypatch.setattr(minimax(), name, helper)
    assert source_fingerprint(attention.forward, attention) != before


def test_what_does_not_count_in_a_source():
    source = '''
    class A:
        """Says é."""

        def f(self, x):  # the function
            """Return a number."""
            return f"{x} # no comment" "\\"\\"\\"kept"
    '''
    found = strip_comments(textwrap.dedent(source))
    assert found == 'classA:deff(self,x):returnf"{x}#nocomment""\\"\\"\\"kept"'
    assert strip_comments(ast.unparse(ast.parse("def f():\n    'only'\n    x = 1"))) == "deff():x=1"


def test_an_indexer_that_nobody_knows():
    """Every class whose name ends so is taken for one; of a new one moec says that it was never checked."""
    model = random_model(FAMILIES["deepseek_v32"])
    known = sys.modules[type(model).__module__].DeepseekV32Indexer
    new = type("NewIndexer", (known,), {"__module__": known.__module__})
    for module in model.modules():
        if isinstance(module, known):
            module.__class__ = new
    warning = "moec's replaced.indexer.under_topk stands for NewIndexer.forward of transformers, whose source was never checked"
    assert [str(s.note()) for s in stand_ins(model) if not s.checked] == [f"warning: {warning}"]
