"""What only a look at the graph or at single runs shows: batches of different lengths, long masks, rotations that switch, fused norms."""

import numpy as np
import onnx
import pytest

from qlora_tools.export.decoder.export import plan_export, write_graph
from qlora_tools.export.runtime.session import DecoderSession
from qlora_tools.export.target import Target
from tests.export.decoder.families import LONGROPE, MODELS, PROMPT
from tests.export.tiny_decoders import build, export, tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3-longrope-short", "smollm3", "gemma2-window"])
def test_sequences_of_different_lengths_share_a_batch(name, tmp_path):
    """Padded on the right; the next token takes the place of the first padding, as the attention operator counts, and learned positions with it."""
    family, changes = MODELS[name]
    tiny = build(family, **changes)
    export(tiny, tmp_path)
    session = DecoderSession(tmp_path, threads=1)._session
    ids, lengths = tokens(tiny, 2, 8), (5, 3)
    mask = np.array([[1] * length + [0] * (5 - length) for length in lengths])
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    empty = {value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32) for value in pasts}
    names = [value.name for value in session.get_outputs()]
    prompt = dict(zip(names, session.run(names, {"input_ids": ids[:, :5], "attention_mask": mask, **empty}), strict=True))
    kept = {value.name: prompt[value.name.replace("past_key_values", "present")] for value in pasts}
    step = session.run(["logits"], {"input_ids": ids[:, 5:6], "attention_mask": np.pad(mask, ((0, 0), (0, 1)), constant_values=1), **kept})[0]
    for row, length in enumerate(lengths):
        alone = tiny.logits(np.concatenate([ids[row, :length], ids[row, 5:6]])[None])[0]
        np.testing.assert_allclose(prompt["logits"][row, :length], alone[:length], atol=3e-5)
        np.testing.assert_allclose(step[row, 0], alone[-1], atol=3e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi3-longrope-short"])
def test_a_mask_as_long_as_the_buffer_changes_nothing(name, tmp_path):
    """Captured steps have one: only what it marks counts as text, however long the buffer is."""
    family, changes = MODELS[name]
    tiny = build(family, **changes)
    export(tiny, tmp_path)
    session, capacity = DecoderSession(tmp_path, threads=1)._session, 48
    ids = tokens(tiny, 1, PROMPT + 1)
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    empty = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in pasts}
    names = [value.name for value in session.get_outputs()]
    prompt = dict(zip(names, session.run(names, {"input_ids": ids[:, :PROMPT], "attention_mask": np.ones((1, PROMPT), np.int64), **empty}), strict=True))
    room = {value.name: np.pad(prompt[value.name.replace("past_key_values", "present")], ((0, 0), (0, 0), (0, capacity - PROMPT), (0, 0))) for value in pasts}
    mask = (np.arange(capacity) < PROMPT + 1)[None].astype(np.int64)
    step = session.run(["logits"], {"input_ids": ids[:, PROMPT:], "attention_mask": mask, **room})[0]
    np.testing.assert_allclose(step[:, 0], tiny.logits(ids)[:, -1], atol=3e-5)


@pytest.mark.parametrize("prompt", [9, 16, 20])
def test_text_that_outgrows_the_short_frequencies_goes_on_as_in_transformers(prompt, tmp_path):
    """The cache was turned at the short ones: the runtime runs the text again, as transformers does."""
    tiny = build("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    export(tiny, tmp_path)
    session = DecoderSession(tmp_path, threads=1)
    ids = tokens(tiny, 2, prompt)
    found = np.concatenate([ids, *(row[:, None] for row in session.generate(ids, 12))], axis=1)
    for length in range(prompt, prompt + 12):
        logits = tiny.logits(found[:, :length])[:, -1]
        assert (logits.max(-1) - logits[np.arange(2), found[:, length]] < 1e-4).all()


def test_graphs_say_where_their_rotation_switches(tmp_path):
    for name, expected_entry in (("phi3-longrope-short", {"rotary_switch": "32"}), ("phi3", {})):
        family, changes = MODELS[name]
        (tmp_path / name).mkdir()
        export(build(family, **changes), tmp_path / name)
        model = onnx.load(tmp_path / name / "model.onnx", load_external_data=False)
        assert {entry.key: entry.value for entry in model.metadata_props} == expected_entry


def test_a_norm_is_fused_with_the_sum_only_where_it_follows_it(tmp_path):
    for family, fused in {"llama": 4, "gemma2": 4, "olmo2": 1, "gpt2": 4}.items():
        folder = tmp_path / family
        folder.mkdir()
        export(build(family, **({"head_dim": 16} if family == "gemma2" else {})), folder)
        kinds = [node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]
        assert sum(kind.startswith("Skip") for kind in kinds) == fused, family


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3-longrope-short", "gemma2-window"])
def test_no_node_is_drawn_that_nobody_reads(name, tmp_path):
    family, changes = MODELS[name]
    tiny = build(family, **changes)
    for target, scheme in ((Target(), "int4"), (Target(), "int8"), (Target("cpu", "F32", standard=True), "int4")):
        folder = tmp_path / f"{scheme}-{target.standard}"
        folder.mkdir()
        write_graph(plan_export(tiny.source, tiny.config, scheme, target), tiny.source, folder)
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        read = {value for node in graph.node for value in node.input} | {value.name for value in graph.output}
        assert [node.name for node in graph.node if not read & set(node.output)] == []
