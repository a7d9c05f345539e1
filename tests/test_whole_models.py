"""Models of text and images: compiled for text from the checkpoint of the whole; and rows with padding where blocks count."""

from __future__ import annotations

import json
from pathlib import Path

import moec
import numpy as np
import pytest
import torch
from moec.compiler.cli.report import inspect_source, open_source
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from safetensors.torch import load_file, save_file
from tiny_models import padded_batch, random_model, save


def test_towers_are_left_out_and_said_to_be(tmp_path: Path) -> None:
    folder = save(random_model(FAMILIES["qwen3_vl_moe"]), tmp_path / "whole")
    report = inspect_source(open_source(folder))
    assert report["left_out"]["names"] == ["model.visual.*"]
    stored = load_file(folder / "model.safetensors")
    tower = [t for name, t in stored.items() if name.startswith("model.visual.")]
    assert report["left_out"]["tensors"] == len(tower)
    assert report["left_out"]["bytes"] == sum(t.nbytes for t in tower)
    assert report["bytes"]["checkpoint"] + report["left_out"]["bytes"] == sum(t.nbytes for t in stored.values())


def test_the_thinker_of_a_whole_omni_checkpoint(tmp_path: Path) -> None:
    """Its tensors are named after it there, and the config is one of three."""
    model = random_model(FAMILIES["qwen3_omni_moe_thinker"])
    folder = save(model, tmp_path / "thinker")
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "qwen3_omni_moe", "thinker_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    alone = inspect_source(open_source(_without_weights(folder, tmp_path / "config")))
    tensors = load_file(folder / "model.safetensors")
    stored = {f"thinker.{name}": t for name, t in tensors.items()} | {"talker.x": torch.ones(3)}
    save_file(stored, folder / "model.safetensors")
    loaded = load(folder)
    assert "talker.x" in loaded.left_out and loaded.weights is not None
    assert inspect_source(open_source(folder))["parameters"] == alone["parameters"]
    ids, mask, positions = padded_batch(128, 9, batch=2)
    session = moec.compile(folder, out=tmp_path / "artifact").session()
    found, _ = session.step(ids.numpy(), mask.numpy(), positions.numpy(), session.start(2))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
    real = mask.bool().numpy()
    assert np.abs(found - expected)[real].max() <= 1e-4 * np.abs(expected[real]).max()


def _without_weights(folder: Path, to: Path) -> Path:
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


def test_blocks_count_from_the_first_token_behind_padding(tmp_path: Path) -> None:
    """MiniMax-M3: transformers counts from slot 0, so that padding moves its blocks; a row alone is the reference."""
    model = random_model(FAMILIES["minimax_m3_vl"])
    session = moec.compile(model, out=tmp_path / "artifact").session()
    ids, mask, positions = padded_batch(128, 33, batch=2)
    found, _ = session.step(ids.numpy(), mask.numpy(), positions.numpy(), session.start(2))
    for row in range(2):
        own = mask[row].bool()
        assert row == 0 or not own.all()
        with torch.no_grad():
            expected = model(input_ids=ids[row, own][None]).logits[0].numpy()
        assert np.abs(found[row, own.numpy()] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_mask_of_the_prompt_is_refused(tmp_path: Path) -> None:
    """Unlimited OCR: what a token reads depends on where the prompt ended, which no input says."""
    import transformers

    text = {**FAMILIES["deepseek_ocr2"].tiny, "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 4}  # fmt: skip
    vision = FAMILIES["deepseek_ocr2"].whole["vision_config"]
    config = transformers.UnlimitedOcrConfig(text_config=text, vision_config=vision)
    config.save_pretrained(tmp_path)
    with pytest.raises(moec.MoecError, match="adds a mask function of its own") as error:
        moec.compile(tmp_path, stop_after="graph")
    assert error.value.exit_code == 2
