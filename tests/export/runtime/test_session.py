"""The session: its pasts, shared or growing, in any float type; prompts of different lengths; steps that reuse their buffers; refusals."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from qlora_tools.errors import CorruptError, MissingError, UnsupportedError, UsageError
from qlora_tools.export.runtime import DecoderSession, Sampling, cache, open_engine
from tests.export.runtime.small_graphs import VOCAB, held_bytes, pastless, summed, summing, table, write_genai
from tests.export.tiny_decoders import build, export, tokens


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    tiny = build("llama")
    export(tiny, folder)
    return tiny, folder


def test_the_past_survives_every_growth_of_its_buffer(exported, monkeypatch):
    tiny, folder = exported
    monkeypatch.setattr(cache, "_FIRST_CAPACITY", 4)
    session = DecoderSession(folder, threads=1)
    ids = tokens(tiny, 2, 30)
    found = [session.prefill(ids[:, :3])] + [session.decode(ids[:, position]) for position in range(3, 30)]
    np.testing.assert_allclose(np.stack(found, 1), tiny.logits(ids)[:, 2:], atol=3e-4, rtol=3e-4)


def test_steps_work_in_place_on_one_buffer(exported):
    tiny, folder = exported
    session = DecoderSession(folder, threads=1)
    ids = tokens(tiny, 1, 6)
    session.prefill(ids[:, :4])
    before = [value.data_ptr() for value in session._cache.pasts]
    session.decode(ids[:, 4])
    session.prefill(ids[:, :2])
    assert [value.data_ptr() for value in session._cache.pasts] == before


def test_a_text_of_known_length_gets_its_room_at_once(exported, monkeypatch):
    tiny, folder = exported
    monkeypatch.setattr(cache, "_FIRST_CAPACITY", 4)
    session = DecoderSession(folder, threads=1)
    tokens_of_text = session.generate(tokens(tiny, 1, 3), 20)
    next(tokens_of_text)
    assert session._cache.capacity == 22  # the last token is written, not read
    assert len(list(tokens_of_text)) == 19 and session._cache.capacity == 22


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


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_pasts_of_any_float_type_and_size_grow(tmp_path, kind):
    session = DecoderSession(summing(tmp_path / "e", kind), threads=1)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 12))
    np.testing.assert_array_equal(session.score(ids), summed(ids))
    found = [session.prefill(ids[:, :4])] + [session.decode(ids[:, position]) for position in range(4, 12)]
    np.testing.assert_array_equal(np.stack(found, 1), summed(ids)[:, 3:])
    np.testing.assert_array_equal(session.prefill(ids[:1, :3]), summed(ids[:1])[:, 2])
    assert [value.shape() for value in session._cache.pasts] == [[1, 1, 3, VOCAB], [1, 2, 3, 3]]


def test_positions_are_fed_where_a_graph_reads_them_in_its_own_integers(tmp_path):
    session = DecoderSession(summing(tmp_path / "e", mask=ir.DataType.INT32, positions=True), threads=1)
    ids = np.array([[1, 2, 3, 4]])
    wanted = summed(ids) + np.arange(4)[:, None]
    np.testing.assert_array_equal(session.score(ids), wanted)
    np.testing.assert_array_equal(session.prefill(ids[:, :3]), wanted[:, 2])
    np.testing.assert_array_equal(session.decode(ids[:, 3]), wanted[:, 3])


def test_prompts_of_different_lengths_are_padded_on_the_right(exported):
    tiny, folder = exported
    session = DecoderSession(folder, threads=1)
    ids, lengths = tokens(tiny, 3, 12), np.array([12, 5, 9])
    padded = np.where(np.arange(12) < lengths[:, None], ids, 1)
    found = [session.prefill(padded, lengths)] + [session.decode(np.array([7, 8, 9]) + step) for step in range(3)]
    for row, length in enumerate(lengths):
        alone = np.concatenate([ids[row, :length], 7 + row + np.arange(3)])[None]
        np.testing.assert_allclose(np.stack(found, 1)[row], tiny.logits(alone)[0, length - 1 :], atol=3e-4, rtol=3e-4)


def test_a_past_that_only_grows_takes_prompts_of_one_length(tmp_path):
    session = DecoderSession(summing(tmp_path / "e"), threads=1)
    with pytest.raises(UnsupportedError, match="must have one length"):
        session.prefill(np.array([[1, 2], [1, 0]]), np.array([2, 1]))
    with pytest.raises(UsageError, match="each needs one at least"):
        session.prefill(np.array([[1, 2], [1, 0]]), np.array([2, 0]))


def test_a_graph_without_a_past_reads_the_text_again(tmp_path):
    session = DecoderSession(pastless(tmp_path / "e"), threads=1)
    ids, lengths = np.random.default_rng(0).integers(0, VOCAB, (2, 5)), np.array([5, 3])
    found = [session.prefill(ids, lengths)] + [session.decode(np.array([1, 2]) + step) for step in range(3)]
    for row, length in enumerate(lengths):
        alone = np.concatenate([ids[row, :length], 1 + row + np.arange(3)])[None]
        np.testing.assert_array_equal(np.stack(found, 1)[row], summed(alone)[0, length - 1 :])
    assert [token.tolist() for token in session.generate(ids[:1], 2)] == [[int(summed(ids[:1])[0, -1].argmax())]] * 1 + [
        [int((summed(ids[:1])[0, -1] + table()[summed(ids[:1])[0, -1].argmax()]).argmax())]
    ]


def test_steps_made_for_capture_compute_the_same_from_buffers_that_stay(exported):
    """Without a device that captures, the way there: inputs updated in place, a mask as long as the buffer, one number per adapter."""
    tiny, folder = exported
    session = DecoderSession(folder, threads=1)
    session._loaded = replace(session._loaded, captures=True)
    ids, lengths = tokens(tiny, 2, 20), np.array([9, 6])
    session.prefill(np.where(np.arange(9) < lengths[:, None], ids[:, :9], 0), lengths)
    seen = []
    for step in range(6):
        found = session.decode(ids[:, 9 + step])
        seen.append({name: value.data_ptr() for name, value in session._fixed.items()})
    assert set(seen[0]) == {"input_ids", "attention_mask"} and all(row == seen[0] for row in seen) and session._graph_ids == {None: 1}
    np.testing.assert_allclose(found[0], tiny.logits(ids[:1, :15])[0, -1], atol=3e-4, rtol=3e-4)
    np.testing.assert_allclose(found[1], tiny.logits(np.concatenate([ids[1:, :6], ids[1:, 9:15]], 1))[0, -1], atol=3e-4, rtol=3e-4)


def test_captured_steps_are_forgotten_when_a_buffer_is_replaced(exported, monkeypatch):
    tiny, folder = exported
    monkeypatch.setattr(cache, "_FIRST_CAPACITY", 4)
    session = DecoderSession(folder, threads=1)
    session._loaded = replace(session._loaded, captures=True)
    ids, numbers = tokens(tiny, 1, 20), []
    found = [session.prefill(ids[:, :2])]
    for position in range(2, 20):
        found.append(session.decode(ids[:, position]))
        numbers += list(session._graph_ids.values())
    np.testing.assert_allclose(np.stack(found, 1), tiny.logits(ids)[:, 1:], atol=3e-4, rtol=3e-4)
    assert numbers == sorted(numbers) and set(numbers) == {1, 2, 3}  # room for 4, then 10, then 22


def test_logits_of_a_step_stay_when_the_next_is_taken(exported):
    tiny, folder = exported
    session = DecoderSession(folder, threads=1)
    ids = tokens(tiny, 1, 6)
    first = session.prefill(ids[:, :5])
    kept = first.copy()
    session.decode(ids[:, 5])
    np.testing.assert_array_equal(first, kept)


def test_sampled_text_depends_on_the_seed_alone(exported):
    tiny, folder = exported
    session = DecoderSession(folder, threads=1)
    ids = tokens(tiny, 1, 6)
    texts = [np.stack(list(session.generate(ids, 15, sampling=Sampling(temperature=1.0, seed=seed)))).tolist() for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_the_room_is_the_context_to_the_last_position(tmp_path):
    folder = summing(tmp_path / "e")
    write_genai(folder)
    session = DecoderSession(folder, threads=1)
    session.prefill(np.zeros((1, 39), np.int64))
    session.decode(np.array([1]))
    with pytest.raises(UsageError, match="41 positions are more than the model's 40"):
        session.decode(np.array([1]))


def test_only_the_last_position_is_computed_in_a_prompt(exported):
    tiny, folder = exported
    session = DecoderSession(folder, threads=1)
    assert session._keeps and session.prefill(tokens(tiny, 3, 5)).shape == (3, 96)


def test_info_holds_plain_facts(exported):
    _, folder = exported
    info = open_engine(str(folder), threads=1).info()
    assert info["vocab_size"] == 96 and info["max_length"] == 64 and info["provider"] == "CPUExecutionProvider"
    assert info["weights_bytes"] == held_bytes(folder / "model.onnx") < (folder / "model.onnx.data").stat().st_size


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


def for_cuda(folder, scheme, compute):
    from qlora_tools.export.decoder.export import plan_export, write_graph
    from qlora_tools.export.decoder.genai import write_genai_config
    from qlora_tools.export.target import Target

    tiny = build("llama")
    planned = plan_export(tiny.source, tiny.config, scheme, Target("cuda", compute))
    write_graph(planned, tiny.source, folder)
    write_genai_config(planned, tiny.config, folder)
    return tiny


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("scheme", "compute", "capture"), [("fp16", "F16", "on"), ("bf16", "BF16", "on"), ("int8", "F16", "on"), ("int4", "BF16", "on"), ("nf4", "F16", "off")]
)
def test_steps_on_cuda_are_captured_where_they_may_be_and_continue_the_prompt(tmp_path, scheme, compute, capture):
    tiny = for_cuda(tmp_path, scheme, compute)
    session = DecoderSession(tmp_path, threads=1, device="auto")
    assert session.info()["graph_capture"].startswith(capture), session.info()
    ids = tokens(tiny, 2, 12)
    found = np.stack([session.prefill(ids[:, :4])] + [session.decode(ids[:, position]) for position in range(4, 12)], 1)
    whole = session.score(ids)[:, 3:]
    assert np.linalg.norm(found - whole) < 0.05 * np.linalg.norm(whole)
    again = np.stack([session.prefill(ids[:, :4])] + [session.decode(ids[:, position]) for position in range(4, 12)], 1)
    np.testing.assert_array_equal(again, found)  # replayed from the same buffers


@pytest.mark.gpu
def test_captured_steps_follow_prompts_of_other_lengths_and_batches(tmp_path):
    tiny = for_cuda(tmp_path, "fp16", "F16")
    session, fresh = (DecoderSession(tmp_path, threads=1, device="cuda") for _ in range(2))
    ids = tokens(tiny, 3, 12)
    for batch, length in ((1, 4), (3, 6), (1, 9), (3, 2)):
        session.prefill(ids[:batch, :length])
        found = session.decode(ids[:batch, length])
        np.testing.assert_allclose(found, fresh.score(ids[:batch, : length + 1])[:, -1], atol=0.2, rtol=0.05)


@pytest.mark.gpu
def test_a_cuda_session_says_which_provider_runs_it(exported):
    _, folder = exported
    assert DecoderSession(folder, threads=1, device="cuda").info()["provider"] == "CUDAExecutionProvider"
