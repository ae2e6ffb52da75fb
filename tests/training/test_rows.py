"""Batches: shifted targets, padding that nothing sees, packing that changes no loss, classes, and the held-out part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.training.examples import Records
from qlora_tools.training.masks import Example
from qlora_tools.training.rows import IGNORED, LabelledRows, LanguageRows, class_numbers, pad_id_of, split

X = IGNORED


def example(ids, trained=None, line=1, label=None):
    mask = [False] + [True] * (len(ids) - 1) if trained is None else [bool(flag) for flag in trained]
    return Example(np.array(ids, dtype=np.int32), np.array(mask), line, label)


def tiny(name: str):
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=2, n_positions=32, bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32
    )
    return transformers.LlamaForCausalLM(config).eval()


def draw(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [example(generator.integers(3, 64, length), generator.integers(0, 2, length) * (np.arange(length) > 0)) for length in lengths]


class TestLanguageRows:
    def test_targets_are_shifted_and_stay_inside_their_example(self):
        rows = LanguageRows([example([5, 6, 7]), example([8, 9], [0, 1])], max_len=5, pack=True, pad_id=2)
        assert rows.bins == [(0, 1)]
        batch = rows.batch([0])
        assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
        assert batch.targets.tolist() == [[6, 7, X, 9, X]]
        assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
        assert (batch.count, batch.tokens) == (3, 5)
        assert batch.inputs.keys() == {"input_ids", "position_ids"}
        assert {tensor.dtype for tensor in (*batch.inputs.values(), batch.targets)} == {torch.int64}

    def test_only_trained_tokens_are_targets(self):
        batch = LanguageRows([example([5, 6, 7, 8], [0, 0, 1, 0])], max_len=9).batch([0])
        assert batch.targets.tolist() == [[X, 7, X, X]]

    def test_padding_lies_right_and_is_no_target_even_when_it_is_the_eos(self):
        rows = LanguageRows([example([5, 6, 1]), example([7, 1])], max_len=9, pad_id=1)
        batch = rows.batch([1, 0])
        assert batch.inputs["input_ids"].tolist() == [[7, 1, 1], [5, 6, 1]]
        assert batch.targets.tolist() == [[1, X, X], [6, 1, X]]
        assert batch.inputs["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
        assert (batch.count, batch.tokens) == (3, 5)

    def test_padding_of_a_packed_row_is_a_stretch_of_its_own(self):
        rows = LanguageRows([example([5, 6, 7, 8]), example([9, 10]), example([11, 12])], max_len=6, pack=True)
        assert rows.bins == [(0, 1), (2,)]
        assert rows.batch([0, 1]).inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]]
        rows = LanguageRows([example([5, 6]), example([7, 8]), example([9, 10, 11, 12, 13])], max_len=5, pack=True)
        assert rows.batch([0, 1]).inputs["position_ids"].tolist() == [[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]]

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_padding_changes_no_logit_of_a_real_token(self, name):
        model, rows = tiny(name), LanguageRows(draw(9, 4, 1 + 1), max_len=9)
        batch = rows.batch([0, 1, 2])
        with torch.no_grad():
            together = model(**batch.inputs, use_cache=False).logits
            for place, one in enumerate(rows.examples):
                alone = model(input_ids=torch.tensor(one.ids[None], dtype=torch.long), use_cache=False).logits[0]
                torch.testing.assert_close(together[place, : len(one.ids)], alone, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_packed_and_separate_rows_have_the_same_loss_and_gradient(self, name):
        examples = draw(7, 3, 5, 2, 6, 4)
        model = tiny(name)
        found = []
        for packed in (False, True):
            rows = LanguageRows(examples, max_len=10, pack=packed)
            batch = rows.batch(range(len(rows)))
            model.zero_grad()
            loss = functional.cross_entropy(model(**batch.inputs, use_cache=False).logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
            loss.backward()
            found.append((batch.count, batch.tokens, loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        assert found[0][:2] == found[1][:2]
        torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-6, atol=0)
        for left, right in zip(found[0][3], found[1][3], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=2e-6)

    @given(st.lists(st.integers(2, 12), min_size=1, max_size=20), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_every_target_of_every_example_appears_once(self, lengths, packed):
        examples = draw(*lengths, seed=len(lengths))
        rows = LanguageRows(examples, max_len=12, pack=packed)
        batch = rows.batch(np.arange(len(rows)))
        assert batch.tokens == rows.tokens_per_epoch == sum(lengths)
        assert batch.count == sum(int(one.trained.sum()) for one in examples)
        wanted = sorted(int(token) for one in examples for token in one.ids[one.trained])
        assert sorted(batch.targets[batch.targets != X].tolist()) == wanted
        assert rows.lengths[rows.longest()] == rows.lengths.max()
        assert 0 < rows.fill <= 1

    def test_the_hash_follows_ids_masks_and_packing(self):
        base = [example([5, 6, 7]), example([8, 9])]
        same = LanguageRows([example([5, 6, 7], line=9), example([8, 9])], max_len=5).sha256
        found = {
            LanguageRows(base, max_len=5).sha256,
            LanguageRows(base, max_len=5, pack=True).sha256,
            LanguageRows([example([5, 6, 7], [0, 1, 0]), base[1]], max_len=5).sha256,
            LanguageRows([example([5, 6]), example([7, 8, 9])], max_len=5).sha256,
            LanguageRows(base[::-1], max_len=5).sha256,
        }
        assert len(found) == 5 and same in found

    def test_a_batch_moves_as_a_whole(self):
        moved = LanguageRows([example([5, 6])], max_len=5).batch([0]).to("meta")
        assert {tensor.device.type for tensor in (*moved.inputs.values(), moved.targets)} == {"meta"}


class TestLabelledRows:
    def rows(self, **options):
        return LabelledRows([example([1, 5, 2], label="sad"), example([1, 5, 6, 7, 2], label="glad"), example([1, 6, 2], label="sad")], pad_id=0, **options)

    def test_classes_are_the_sorted_labels(self):
        rows = self.rows()
        assert rows.names == ("glad", "sad")
        batch = rows.batch([0, 1])
        assert batch.targets.tolist() == [1, 0]
        assert batch.inputs["input_ids"].tolist() == [[1, 5, 2, 0, 0], [1, 5, 6, 7, 2]]
        assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
        assert (batch.count, batch.tokens, rows.tokens_per_epoch, rows.longest()) == (2, 8, 11, 1)

    def test_without_padding_there_is_no_mask(self):
        assert self.rows().batch([0, 2]).inputs.keys() == {"input_ids"}

    def test_padding_changes_no_logit_of_an_encoder(self):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16
        )
        model, rows = transformers.BertForSequenceClassification(config).eval(), self.rows()
        with torch.no_grad():
            together = model(**rows.batch([0, 1]).inputs).logits
            alone = torch.cat([model(**rows.batch([number]).inputs).logits for number in (0, 1)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)

    def test_the_held_out_rows_take_the_classes_of_the_trained_ones(self):
        held_out = LabelledRows([example([1, 2], label="sad")], id2label=dict(enumerate(self.rows().names)))
        assert held_out.batch([0]).targets.tolist() == [1]

    def test_the_hash_follows_labels(self):
        renamed = LabelledRows([example([1, 5, 2], label="glad"), example([1, 5, 6, 7, 2], label="sad"), example([1, 6, 2], label="glad")])
        assert renamed.sha256 != self.rows().sha256 == self.rows(id2label={0: "glad", 1: "sad"}).sha256


class TestClassNumbers:
    @pytest.mark.parametrize(
        ("labels", "id2label", "names", "numbers"),
        [
            (["b", "a", "b"], None, ("a", "b"), [1, 0, 1]),
            ([10, 9, 10], None, ("9", "10"), [1, 0, 1]),
            (["b", "a"], {1: "a", 0: "b", 2: "c"}, ("b", "a", "c"), [0, 1]),
            (["Positive"], {0: "NEGATIVE", 1: "POSITIVE"}, ("NEGATIVE", "POSITIVE"), [1]),
            ([0, 1], {0: "no", 1: "yes"}, ("no", "yes"), [0, 1]),
            ([1, 2], {0: "1", 1: "2"}, ("1", "2"), [0, 1]),
            ([1, 0], {0: "LABEL_0", 1: "LABEL_1"}, ("LABEL_0", "LABEL_1"), [1, 0]),
            (["yes", "no"], {0: "LABEL_0", 1: "LABEL_1"}, ("no", "yes"), [1, 0]),
            ([1, "1", "x"], None, ("1", "x"), [0, 0, 1]),
        ],
    )
    def test_labels_become_numbers(self, labels, id2label, names, numbers):
        found_names, found = class_numbers(labels, id2label)
        assert (found_names, found.tolist(), found.dtype) == (names, numbers, np.int64)

    def test_labels_that_the_head_lacks_are_listed(self):
        with pytest.raises(IncompatibleError, match="knows the classes no, yes, but the data holds maybe, never"):
            class_numbers(["yes", "never", "maybe"], {0: "no", 1: "yes"})
        with pytest.raises(IncompatibleError, match="the data holds 2"):
            class_numbers([0, 2], {0: "no", 1: "yes"})
        with pytest.raises(IncompatibleError, match="knows 2 classes, but the data holds 3"):
            class_numbers(["a", "b", "c"], {0: "LABEL_0", 1: "LABEL_1"})

    def test_one_class_is_nothing_to_learn(self):
        with pytest.raises(UsageError, match="one class only, 'a'"):
            class_numbers(["a", "a"])


def texts(n):
    return Records("text", tuple({"text": str(number)} for number in range(n)), tuple(range(1, n + 1)), "0" * 64, Path("d.jsonl"))


class TestSplit:
    @given(n=st.integers(2, 60), share=st.floats(0.01, 0.9), seed=st.integers(0, 9))
    @settings(max_examples=60, deadline=None)
    def test_every_record_lies_on_one_side_in_order(self, n, share, seed):
        held_wanted = max(1, round(share * n))
        if held_wanted >= n:
            with pytest.raises(UsageError, match="leaves nothing"):
                split(texts(n), share, seed)
            return
        train, held = split(texts(n), share, seed)
        assert len(held) == held_wanted and sorted(train.lines + held.lines) == list(range(1, n + 1))
        assert list(train.lines) == sorted(train.lines) and list(held.lines) == sorted(held.lines)
        assert split(texts(n), share, seed) == (train, held)

    def test_another_seed_holds_out_other_records(self):
        assert len({split(texts(50), 0.1, seed)[1].lines for seed in range(8)}) == 8

    def test_of_a_text_the_end_is_held_out_from_a_line_break(self):
        stream = Records("stream", ({"text": "one\ntwo\nthree\nfour\n"},), (1,), "0" * 64, Path("d.txt"))
        train, held = split(stream, 0.3, 0)
        assert (train.rows[0]["text"], held.rows[0]["text"], held.lines) == ("one\ntwo\n", "three\nfour\n", (3,))
        with pytest.raises(UsageError, match="leaves nothing"):
            split(Records("stream", ({"text": "one line"},), (1,), "0" * 64, Path("d.txt")), 0.3, 0)

    def test_a_share_of_nothing_is_refused(self):
        with pytest.raises(UsageError, match="leaves nothing"):
            split(texts(5), 0.0, 0)


def test_the_padding_token_falls_back_to_the_end_and_then_to_zero():
    class Tokenizer:
        def __init__(self, pad, eos):
            self.pad_token_id, self.eos_token_id = pad, eos

    assert [pad_id_of(Tokenizer(*ids)) for ids in ((3, 1), (0, 1), (None, 1), (None, None))] == [3, 0, 1, 0]
