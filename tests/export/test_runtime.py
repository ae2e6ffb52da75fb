"""The session: its buffer of past keys and values, greedy text, and how it refuses."""

import numpy as np
import pytest

from qlora_tools.errors import CorruptError, MissingError, UsageError
from qlora_tools.export import runtime
from qlora_tools.export.runtime import DecoderSession, open_engine
from tests.export.tiny_decoders import build, export, tokens


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    tiny = build("llama")
    export(tiny, folder)
    return tiny, folder


def test_the_past_survives_every_growth_of_its_buffer(exported, monkeypatch):
    tiny, folder = exported
    monkeypatch.setattr(runtime, "_FIRST_CAPACITY", 4)
    session = DecoderSession(folder, threads=1)
    ids = tokens(tiny, 2, 30)
    found = [session.prefill(ids[:, :3])] + [session.decode(ids[:, position]) for position in range(3, 30)]
    np.testing.assert_allclose(np.stack(found, 1), tiny.logits(ids)[:, 2:], atol=3e-4, rtol=3e-4)


def test_steps_work_in_place_on_one_buffer(exported):
    tiny, folder = exported
    session = DecoderSession(folder, threads=1)
    ids = tokens(tiny, 1, 6)
    session.prefill(ids[:, :4])
    before = [value.data_ptr() for value in session._cache]
    session.decode(ids[:, 4])
    session.prefill(ids[:, :2])
    assert [value.data_ptr() for value in session._cache] == before


def test_scoring_leaves_the_past_alone(exported):
    tiny, folder = exported
    session = DecoderSession(folder, threads=1)
    ids = tokens(tiny, 1, 6)
    session.prefill(ids[:, :5])
    np.testing.assert_allclose(session.score(ids[:, :3]), tiny.logits(ids[:, :3]), atol=3e-4, rtol=3e-4)
    np.testing.assert_allclose(session.decode(ids[:, 5]), tiny.logits(ids)[:, -1], atol=3e-4, rtol=3e-4)


def test_greedy_text_is_transformers_greedy_text(exported):
    import torch

    tiny, folder = exported
    ids = tokens(tiny, 1, 7)
    expected = tiny.model.generate(
        torch.from_numpy(ids), attention_mask=torch.ones_like(torch.from_numpy(ids)), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    session = DecoderSession(folder, threads=1)
    found = np.stack(list(session.generate(ids, 12)), 1)
    assert found.tolist() == expected[:, 7:].tolist()
    stop = int(found[0, 4])
    first = found[0].tolist().index(stop)
    assert len(list(session.generate(ids, 12, stop=frozenset({stop})))) == first + 1


def test_only_the_last_position_is_computed_in_a_prompt(exported):
    tiny, folder = exported
    session = DecoderSession(folder, threads=1)
    assert session._keeps and session.prefill(tokens(tiny, 3, 5)).shape == (3, 96)


def test_info_holds_plain_facts(exported):
    _, folder = exported
    info = open_engine(str(folder), threads=1).info()
    assert info["vocab_size"] == 96 and info["max_length"] == 64 and info["provider"] == "CPUExecutionProvider"
    assert info["weights_bytes"] == (folder / "model.onnx.data").stat().st_size


def test_refusals_name_what_is_wrong(exported, tmp_path):
    _, folder = exported
    with pytest.raises(MissingError, match=r"model\.onnx"):
        DecoderSession(tmp_path, threads=1)
    with pytest.raises(UsageError, match="device `abacus`"):
        DecoderSession(folder, threads=1, device="abacus")
    session = DecoderSession(folder, threads=1)
    with pytest.raises(UsageError, match="decode before prefill"):
        session.decode(np.array([3]))
    with pytest.raises(UsageError, match="65 positions are more than the model's 64"):
        session.prefill(np.zeros((1, 65), np.int64))
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(CorruptError, match="does not load"):
        DecoderSession(tmp_path, threads=1)


def test_importing_the_runtime_brings_no_torch():
    import subprocess
    import sys

    script = "import sys, qlora_tools.export.runtime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.gpu
def test_a_cuda_session_says_which_provider_runs_it(exported):
    _, folder = exported
    assert DecoderSession(folder, threads=1, device="cuda").info()["provider"] == "CUDAExecutionProvider"
