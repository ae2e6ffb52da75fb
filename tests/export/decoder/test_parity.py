"""The parity check: passes on what is right, and finds what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from qlora_tools.errors import CheckFailed
from qlora_tools.export.decoder import parity
from qlora_tools.export.decoder.parity import check_parity, relative_error
from qlora_tools.export.external import place
from tests.export.tiny_decoders import build, export


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4", "nf4"])
def test_a_right_export_passes_and_leaves_no_trace(scheme, tmp_path):
    tiny = build("qwen3", head_dim=16, tie_word_embeddings=True)
    planned = export(tiny, tmp_path, scheme)
    before = sorted(path.name for path in tmp_path.iterdir())
    found = check_parity(planned, tiny.source, tiny.config, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert found.error_carried < 0.03 and (found.layers, found.of_layers) == (2, 2)
    assert (found.error_dense < 1e-5) == (scheme == "fp32")
    assert "top-1" in found.summary


def test_a_large_model_is_checked_on_its_first_layers_and_words(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_LAYER_BYTES", 1)
    monkeypatch.setattr(parity, "_VOCAB", 50)
    tiny = build("qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    for scheme in ("fp32", "int8", "int4"):
        folder = tmp_path / scheme
        folder.mkdir()
        found = check_parity(export(tiny, folder, scheme), tiny.source, tiny.config, folder)
        assert (found.layers, found.of_layers) == (1, 3) and "first 1 of 3 layers" in found.summary


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_damaged_bytes_fail_loudly(scheme, tmp_path):
    tiny = build("llama")
    planned = export(tiny, tmp_path, scheme)
    offset = place(planned.plan.outputs)[0]["layers.0.qkv"]
    with (tmp_path / "model.onnx.data").open("r+b") as stream:
        stream.seek(offset)
        block = stream.read(4096)
        stream.seek(offset)
        stream.write(block[::-1])
    with pytest.raises(CheckFailed, match=r"parity, prefill: the \w+ graph is [\d.e+naif]+ away from the weights it carries"):
        check_parity(planned, tiny.source, tiny.config, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["genai_config.json", "model.onnx", "model.onnx.data"]


def test_a_wrong_wiring_fails_loudly(tmp_path):
    tiny = build("llama")
    planned = export(tiny, tmp_path)
    for wrong in (
        replace(planned.decoder, norm=replace(planned.decoder.norm, epsilon=0.5)),
        replace(planned.decoder, heads=2, head_size=32, kv_heads=1),
        replace(planned.decoder, windows=(2, 2)),
    ):
        with pytest.raises(CheckFailed, match="parity"):
            check_parity(replace(planned, decoder=wrong), tiny.source, tiny.config, tmp_path)


def test_relative_error_ignores_a_shift_of_all_logits():
    logits = np.random.default_rng(0).standard_normal((2, 3, 7))
    assert relative_error(logits + 5, logits) < 1e-12
    assert relative_error(2 * logits, logits) == pytest.approx(1)
    assert not relative_error(np.full_like(logits, np.nan), logits) <= 1


def test_what_lies_in_the_folder_under_any_name_is_left_alone(tmp_path):
    tiny, folder, elsewhere = build("llama"), tmp_path / "export", tmp_path / "elsewhere"
    folder.mkdir()
    planned = export(tiny, folder)
    elsewhere.write_text("the user's")
    (folder / "parity.onnx").symlink_to(elsewhere)
    (folder / "parity.onnx_adapter").write_text("the user's, too")
    before = sorted(path.name for path in folder.iterdir())
    check_parity(planned, tiny.source, tiny.config, folder)
    assert elsewhere.read_text() == "the user's" and (folder / "parity.onnx").is_symlink()
    assert (folder / "parity.onnx_adapter").read_text() == "the user's, too"
    assert sorted(path.name for path in folder.iterdir()) == before
