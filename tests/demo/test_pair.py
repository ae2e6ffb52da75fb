from __future__ import annotations

import dataclasses
import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.demo import pair as pair_module
from qlora_tools.demo.pair import STANDARD, TINY, make_pair
from qlora_tools.errors import OutputExistsError, UsageError

LIBRARY_BYTES = 2_300_000


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A part of the installed library, just large enough."""
    folder, size = tmp_path_factory.mktemp("library"), 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size < LIBRARY_BYTES:
            shutil.copy(path, folder)
            size += path.stat().st_size
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, library):
    return make_pair(tmp_path_factory.mktemp("work") / "pair", recipe=TINY, stdlib=library)


def test_both_folders_hold_exactly_the_files_of_a_model(made):
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in made.base.iterdir()} == expected
    assert {path.name for path in made.tuned.iterdir()} == expected


def test_stock_transformers_loads_both_and_they_generate(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (made.base, made.tuned):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
        prompt = tokenizer("def f(", return_tensors="pt")
        assert model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == prompt.input_ids.shape[1] + 4


def test_tied_head_is_stored_once_and_all_is_bf16(made):
    specs = open_checkpoint(made.base).specs
    assert "lm_head.weight" not in specs and "model.embed_tokens.weight" in specs
    assert {spec.dtype for spec in specs.values()} == {"BF16"}


def test_fine_tune_moves_every_matrix_at_full_rank(made):
    base, tuned = open_checkpoint(made.base), open_checkpoint(made.tuned)
    for name, spec in base.specs.items():
        if len(spec.shape) == 2 and ".layers." in name:
            delta = tuned.read(name).float() - base.read(name).float()
            assert torch.linalg.matrix_rank(delta) > min(delta.shape) // 2, name
    assert 0 < made.scores.delta_share < 0.5


def test_fine_tune_gains_on_held_out_prose(made):
    assert made.scores.tuned_prose < made.scores.base_prose


def test_scores_are_those_of_the_stored_weights(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_tools.demo.training import perplexity

    model = AutoModelForCausalLM.from_pretrained(made.tuned, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(made.tuned)(made.heldout_prose.read_text(encoding="utf-8")).input_ids
    # the text file has a blank line where the token stream has an end-of-text token, hence only nearly equal
    assert perplexity(model, ids, context=64, windows=8) == pytest.approx(made.scores.tuned_prose, rel=0.2)


def test_second_call_returns_the_pair_without_training(made, library, monkeypatch):
    monkeypatch.setattr(pair_module, "_train_pair", lambda *_: pytest.fail("trained again"))
    again = make_pair(made.base.parent, recipe=TINY, stdlib=library)
    assert again.reused and again == dataclasses.replace(made, reused=True)


def test_another_seed_replaces_the_pair_and_a_damaged_file_is_not_reused(made, library, tmp_path, monkeypatch):
    folder = tmp_path / "pair"
    shutil.copytree(made.base.parent, folder)
    monkeypatch.setattr(pair_module, "_train_pair", stand_in_training)
    assert not make_pair(folder, recipe=TINY, seed=5, stdlib=library).reused
    assert make_pair(folder, recipe=TINY, seed=5, stdlib=library).reused
    (folder / "base" / "config.json").write_text("{}")
    assert not make_pair(folder, recipe=TINY, seed=5, stdlib=library).reused


def test_same_seed_gives_the_same_bytes(made, library, tmp_path):
    again = make_pair(tmp_path / "pair", recipe=TINY, stdlib=library)
    files = [json.loads((pair.base.parent / "qlt-manifest.json").read_text())["files"] for pair in (made, again)]
    assert files[0] == files[1]


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"qlt-manifest.json": '{"schema": "qlt.manifest/1", "kind": "export"}'}])
def test_folder_of_something_else_is_left_alone(tmp_path, library, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(OutputExistsError):
        make_pair(tmp_path, recipe=TINY, stdlib=library)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content


def test_interrupted_training_leaves_nothing(tmp_path, library, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pair_module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_pair(tmp_path / "pair", recipe=TINY, stdlib=library)
    assert list(tmp_path.iterdir()) == []


def test_every_width_of_the_standard_recipe_is_a_multiple_of_64():
    assert all(width % 64 == 0 for width in (STANDARD.vocab_size, STANDARD.hidden, STANDARD.feed_forward))
    assert STANDARD.heads * 64 == STANDARD.hidden and STANDARD.heads > STANDARD.kv_heads


def test_scaling_keeps_at_least_one_step_and_refuses_nonsense():
    assert TINY.scaled(1e-6).pretrain.steps == 1
    assert STANDARD.scaled(2).finetune.steps == 2 * STANDARD.finetune.steps
    with pytest.raises(UsageError):
        TINY.scaled(0)


def stand_in_training(folder, *_):
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    return pair_module.Scores(2.0, 2.0, 2.0, 1.0, 0.1)
