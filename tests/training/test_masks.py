"""What is trained: templates, borders, ends of sequences, cutting, and errors that show the example."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.training import masks
from qlora_tools.training.examples import Records
from qlora_tools.training.masks import Example, encode, encode_labelled, marked, preview

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|stop|>\n\n{{ message['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|start|>system\nBe kind.<|eot|>\n{% endif %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}<|eot|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
DROPS_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|eot|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
STRIPS_THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}<|start|>{{ message['role'] }}\n{{ content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ALTERNATES = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ message['content'] }}]{% endfor %}"
)
UNMARKED = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"

TEXT = "The quick brown fox jumps over the lazy dog. Hello there, general answer! Two and two make four. Be kind.\n\nquestion answer yes no\n" * 4


def byte_level(*, bos: bool = False, eos: bool = True, template: str | None = None, trim: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges; optionally one that puts a BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|start|>", "<|stop|>", "<|eot|>"]
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    elif trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", pad_token="<|pad|>", model_max_length=64, extra_special_tokens=["<|start|>", "<|stop|>", "<|eot|>"]
    )
    if eos:
        made.eos_token = "<|eos|>"
    made.chat_template = template
    return made


def crossing_spaces() -> PreTrainedTokenizerFast:
    """A vocabulary without pre-tokenisation, where ``: y`` is one token whatever lies to its sides."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz :.?!\n"))
    vocab = {"<|eos|>": 0} | {letter: 1 + place for place, letter in enumerate(letters)}
    merges = [(":", " "), (": ", "y"), ("s", "!")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=merges)), eos_token="<|eos|>")


def metaspace() -> PreTrainedTokenizerFast:
    """As in SentencePiece models: every text is given a leading space."""
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzé🙂:.?!\n"))
    vocab = {"<s>": 0, "</s>": 1} | {letter: 2 + place for place, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def records(kind, *rows, tmp="data.jsonl"):
    from pathlib import Path

    return Records(kind, tuple(rows), tuple(range(1, len(rows) + 1)), "0" * 64, Path(tmp))


def chat(*turns):
    return {
        "messages": [{"role": {"s": "system", "u": "user", "a": "assistant"}[role], "content": content} for role, *rest in turns for content in ["".join(rest)]]
    }


def only(encoded):
    (example,) = encoded.examples
    assert example.ids.dtype == np.int32 and example.trained.dtype == bool and example.ids.shape == example.trained.shape
    return example


def trained_text(example, tokenizer):
    return [text for text, trained in preview(example, tokenizer) if trained]


class TestPlainText:
    def test_everything_but_the_first_token_is_trained_and_the_end_is_marked(self):
        tokenizer = byte_level()
        example = only(encode(records("text", {"text": "Hello there"}), tokenizer, max_len=64))
        assert example.ids.tolist() == [*tokenizer("Hello there")["input_ids"], tokenizer.eos_token_id]
        assert example.trained.tolist() == [False] + [True] * (len(example.ids) - 1)

    def test_a_bos_is_put_once_and_never_trained(self):
        tokenizer = byte_level(bos=True)
        plain = only(encode(records("text", {"text": "Hello"}), tokenizer, max_len=64))
        written = only(encode(records("text", {"text": "<|bos|>Hello<|eos|>"}), tokenizer, max_len=64))
        assert plain.ids.tolist() == [0, *tokenizer("Hello", add_special_tokens=False)["input_ids"], 1] == written.ids.tolist()
        assert plain.trained.tolist() == written.trained.tolist() == [False] + [True] * (len(plain.ids) - 1)

    def test_an_eos_that_the_tokenizer_adds_is_not_doubled(self):
        tokenizer = byte_level()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <|eos|>", special_tokens=[("<|eos|>", 1)])
        assert only(encode(records("text", {"text": "Hello"}), tokenizer, max_len=64)).ids.tolist().count(1) == 1

    def test_without_an_eos_the_report_warns(self):
        tokenizer = byte_level(eos=False)
        encoded = encode(records("text", {"text": "Hello there"}), tokenizer, max_len=64)
        assert only(encoded).ids.tolist() == tokenizer("Hello there")["input_ids"]
        assert "will not learn where to stop" in encoded.report.notes[0]
        assert encode(records("text", {"text": "Hello there"}), byte_level(), max_len=64).report.notes == ()

    def test_answers_cannot_be_asked_of_plain_text(self):
        with pytest.raises(UsageError, match="holds text records"):
            encode(records("text", {"text": "a"}), byte_level(), mask="completion", max_len=8)

    def test_labelled_records_can_be_read_as_text(self):
        assert len(encode(records("labelled", {"text": "Hello there", "label": 1}), byte_level(), max_len=8).examples) == 1


class TestCompletions:
    def test_only_the_completion_and_the_end_are_trained(self):
        tokenizer = byte_level(bos=True)
        row = {"prompt": "question Hello", "completion": " answer yes"}
        example = only(encode(records("completion", row), tokenizer, max_len=64))
        assert preview(example, tokenizer) == [("<|bos|>question Hello", False), (" answer yes<|eos|>", True)]
        everything = only(encode(records("completion", row), tokenizer, mask="all", max_len=64))
        assert preview(everything, tokenizer) == [("<|bos|>", False), ("question Hello answer yes<|eos|>", True)]

    def test_a_completion_of_one_token_and_one_of_none(self):
        tokenizer = byte_level()
        encoded = encode(records("completion", {"prompt": "question", "completion": " yes"}, {"prompt": "question", "completion": ""}), tokenizer, max_len=64)
        assert [int(example.trained.sum()) for example in encoded.examples] == [2, 1]
        assert trained_text(encoded.examples[1], tokenizer) == ["<|eos|>"]

    def test_an_empty_prompt_trains_all_but_the_first_token(self):
        tokenizer = byte_level()
        assert only(encode(records("completion", {"prompt": "", "completion": "Hello there"}), tokenizer, max_len=64)).trained.tolist()[:2] == [False, True]

    def test_a_token_across_the_border_is_trained_and_counted(self):
        """``q: `` + ``yes`` is one token ``: y`` in the middle: the answer's first letter is inside it."""
        tokenizer = crossing_spaces()
        encoded = encode(records("completion", {"prompt": "q: ", "completion": "yes"}), tokenizer, max_len=64)
        example = only(encoded)
        assert tokenizer.convert_ids_to_tokens(example.ids.tolist()) == ["q", ": y", "e", "s", "<|eos|>"]
        assert example.trained.tolist() == [False, True, True, True, True]
        assert encoded.report.straddled == 1

    def test_without_offsets_a_token_across_the_border_is_an_error(self):
        tokenizer = crossing_spaces()

        class Slow:
            is_fast = False
            eos_token_id = 0

            def __call__(self, texts, **options):
                return tokenizer(texts, **options)

        with pytest.raises(IncompatibleError, match="a token joins the end of a prompt with its answer near 'q: yes'"):
            encode(records("completion", {"prompt": "q: ", "completion": "yes"}), Slow(), max_len=64)
        assert len(encode(records("completion", {"prompt": "q:", "completion": "es"}), Slow(), max_len=64).examples) == 1

    def test_a_leading_space_that_the_tokenizer_makes_up_does_not_move_the_border(self):
        tokenizer = metaspace()
        example = only(encode(records("completion", {"prompt": "ask me", "completion": " yes"}), tokenizer, max_len=64))
        assert tokenizer.convert_ids_to_tokens(example.ids[example.trained].tolist()) == ["▁", "y", "e", "s", "</s>"]
        assert example.ids.tolist()[:2] == [0, tokenizer.convert_tokens_to_ids("▁")]

    def test_trimmed_offsets_lose_no_white_space(self):
        """Some tokenizers report empty spans for white space; borders are places between tokens, so nothing falls out."""
        tokenizer = byte_level(trim=True)
        example = only(encode(records("completion", {"prompt": "question", "completion": "   \n   yes"}), tokenizer, max_len=64))
        assert "".join(trained_text(example, tokenizer)) == "   \n   yes<|eos|>"

    @given(prompt=st.text("aé🙂 \n:.ythe", max_size=12), completion=st.text("aé🙂 \n:.ythe", max_size=12))
    @settings(max_examples=120, deadline=None)
    def test_the_pieces_are_the_text_and_cover_the_completion(self, prompt, completion):
        tokenizer = DIFFERENT[1]
        example = only(encode(records("completion", {"prompt": prompt, "completion": completion}), tokenizer, max_len=200))
        pieces = preview(example, tokenizer)
        assert "".join(text for text, _ in pieces) == f"<|bos|>{prompt}{completion}<|eos|>"
        assert "".join(text for text, is_trained in pieces if is_trained).endswith(f"{completion}<|eos|>")

    @given(prompt=st.text("aé🙂 \n:.ythe", min_size=1, max_size=12), completion=st.text("aé🙂 \n:.ythe", max_size=12), made=st.sampled_from(range(4)))
    @settings(max_examples=200, deadline=None)
    def test_borders_from_offsets_are_those_of_prefixes(self, prompt, completion, made):
        """Two routes to one mask: offsets of the whole text, and the tokens of the prompt alone."""
        tokenizer = DIFFERENT[made]
        rows = records("completion", {"prompt": prompt, "completion": completion})
        whole, alone = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt + completion, prompt))
        encoded = encode(rows, tokenizer, max_len=200)
        example = only(encoded)
        if whole[: len(alone)] == alone and completion:
            lead = len(example.ids) - len(whole) - 1
            assert np.flatnonzero(example.trained)[0] == max(lead + len(alone), 1)


SHARED = byte_level()
DIFFERENT = (SHARED, byte_level(bos=True), byte_level(trim=True), metaspace())


class TestConversations:
    def test_a_llama_like_template_trains_answers_with_their_end(self):
        tokenizer = byte_level(bos=True, template=LLAMA3)
        example = only(encode(records("messages", chat("uHello", "ayes", "uTwo", "afour")), tokenizer, max_len=200))
        assert trained_text(example, tokenizer) == ["yes<|eot|>", "four<|eot|>"]
        assert example.ids.tolist().count(tokenizer.bos_token_id) == 1
        wanted = tokenizer.apply_chat_template(chat("uHello", "ayes", "uTwo", "afour")["messages"], tokenize=True)["input_ids"]
        assert example.ids.tolist() == list(wanted)

    def test_chatml_with_a_system_turn_of_its_own(self):
        tokenizer = byte_level(template=CHATML)
        encoded = encode(records("messages", chat("uHello", "ayes", "uno", "aanswer")), tokenizer, max_len=200)
        assert trained_text(only(encoded), tokenizer) == ["yes<|eot|>\n", "answer<|eot|>\n"]
        assert encoded.report.notes == ()

    def test_a_template_may_drop_the_system_turn(self):
        tokenizer = byte_level(template=DROPS_SYSTEM)
        example = only(encode(records("messages", chat("sBe kind", "uHello", "ayes")), tokenizer, max_len=200))
        assert preview(example, tokenizer) == [("<|start|>user\nHello<|eot|>\n<|start|>assistant\n", False), ("yes<|eot|>\n", True)]

    def test_two_answers_in_a_row_and_a_last_question(self):
        tokenizer = byte_level(template=CHATML)
        example = only(encode(records("messages", chat("uHello", "ayes", "ano", "uTwo")), tokenizer, max_len=200))
        assert trained_text(example, tokenizer) == ["yes<|eot|>\n", "no<|eot|>\n"]

    def test_what_the_model_is_prompted_with_is_exactly_what_precedes_the_answer(self):
        tokenizer = byte_level(template=CHATML)
        row = chat("uHello there", "ayes")
        example = only(encode(records("messages", row), tokenizer, max_len=200))
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
        assert example.ids[: int(example.trained.argmax())].tolist() == list(prompt)

    def test_mask_all_trains_questions_too(self):
        tokenizer = byte_level(template=CHATML)
        example = only(encode(records("messages", chat("uHello", "ayes")), tokenizer, mask="all", max_len=200))
        assert example.trained.tolist() == [False] + [True] * (len(example.ids) - 1)

    def test_a_template_that_rewrites_earlier_answers_is_an_error_that_shows_where(self):
        tokenizer = byte_level(template=STRIPS_THINKING)
        one = records("messages", chat("uHello", "ahm</think>yes"))
        assert trained_text(only(encode(one, tokenizer, max_len=200)), tokenizer) == ["hm</think>yes<|eot|>\n"]
        with pytest.raises(IncompatibleError, match=r"data\.jsonl:1: .*rewrites what precedes or follows turn 2") as caught:
            encode(records("messages", chat("uHello", "ahm</think>yes", "uTwo", "afour")), tokenizer, max_len=200)
        assert "'hm</think>yes<|eot|>\\n' with the later turns left out" in str(caught.value)
        assert "<|start|>user\nTwo" in str(caught.value) and "a record of its own" in caught.value.hint

    def test_mask_all_needs_no_prefixes(self):
        tokenizer = byte_level(template=STRIPS_THINKING)
        assert encode(records("messages", chat("uHello", "ahm</think>yes", "uTwo", "afour")), tokenizer, mask="all", max_len=200).examples

    def test_a_template_that_raises_is_quoted_with_the_line(self):
        tokenizer = byte_level(template=ALTERNATES)
        with pytest.raises(IncompatibleError, match=r"data\.jsonl:2: .*refuses this conversation \(user, user\): roles must alternate"):
            encode(records("messages", chat("uHello", "ayes"), chat("uHello", "uTwo")), tokenizer, mask="all", max_len=200)

    @pytest.mark.parametrize(
        "template",
        ["{{ messages[0]['content'] + 1 }}", "{{ messages[9].content.x.y }}", "{% for %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 1 // 0 }}"],
    )
    def test_a_broken_or_hostile_template_is_an_error_of_ours(self, template):
        with pytest.raises(IncompatibleError, match=r"data\.jsonl:1: the base's chat template refuses"):
            encode(records("messages", chat("uHello", "ayes")), byte_level(template=template), max_len=200)

    def test_without_a_template_the_way_out_is_told(self):
        with pytest.raises(IncompatibleError, match="no chat template") as caught:
            encode(records("messages", chat("uHello", "ayes")), byte_level(), max_len=200)
        assert "instruction-tuned" in caught.value.hint

    def test_nothing_to_train_is_an_error_that_shows_the_example(self):
        with pytest.raises(IncompatibleError, match=r"data\.jsonl:2: nothing of this example would be trained\n.*<\|start\|>user\nTwo and two"):
            encode(records("messages", chat("uHello", "ayes"), chat("uTwo and two")), byte_level(template=DROPS_SYSTEM), max_len=200)

    def test_answers_that_end_in_no_special_token_are_noted(self):
        encoded = encode(records("messages", chat("uHello", "ayes")), byte_level(template=UNMARKED), max_len=200)
        assert "will not learn where to stop" in encoded.report.notes[0]

    def test_tools_reach_the_template(self):
        tokenizer = byte_level(template="{% if tools %}{{ tools[0]['name'] }}{% endif %}" + DROPS_SYSTEM)
        row = {**chat("uHello", "ayes"), "tools": [{"name": "lookup"}]}
        assert preview(only(encode(records("messages", row), tokenizer, max_len=200)), tokenizer)[0][0].startswith("lookup<|start|>")


class TestCutting:
    def test_long_examples_are_cut_counted_and_named(self):
        tokenizer = byte_level()
        long = "Hello there " * 30
        rows = [{"text": "Hello there"}, {"text": long}, {"text": "Hello"}] + [{"text": long}] * 6
        encoded = encode(records("text", *rows), tokenizer, max_len=20)
        report = encoded.report
        assert (report.examples, report.truncated, report.truncated_lines, report.dropped) == (9, 7, (2, 4, 5, 6, 7), 0)
        assert report.longest == 20 == len(encoded.examples[1].ids)
        assert report.tokens == sum(len(example.ids) for example in encoded.examples)
        assert report.trained_tokens == sum(int(example.trained.sum()) for example in encoded.examples)
        assert report.trained_share == report.trained_tokens / report.tokens

    def test_an_example_whose_target_is_cut_off_is_dropped_and_counted(self):
        rows = [{"prompt": "Hello there " * 30, "completion": " yes"}, {"prompt": "Hello", "completion": " yes"}]
        encoded = encode(records("completion", *rows), byte_level(), max_len=20)
        assert (encoded.report.examples, encoded.report.dropped, encoded.report.dropped_lines, encoded.report.truncated) == (1, 1, (1,), 0)
        assert encoded.examples[0].line == 2

    def test_nothing_left_is_an_error(self):
        with pytest.raises(IncompatibleError, match="of 1 records none has a target within 20 tokens") as caught:
            encode(records("completion", {"prompt": "Hello there " * 30, "completion": " yes"}), byte_level(), max_len=20)
        assert "--max-len" in caught.value.hint

    def test_a_length_without_room_for_a_target_is_refused(self):
        with pytest.raises(UsageError, match="examples of 1 tokens"):
            encode(records("text", {"text": "a"}), byte_level(), max_len=1)

    def test_many_chunks_keep_the_order(self, monkeypatch):
        monkeypatch.setattr(masks, "_CHUNK_RECORDS", 2)
        rows = [{"prompt": "Hello", "completion": f" {number}"} for number in range(7)]
        encoded = encode(records("completion", *rows), byte_level(), max_len=20)
        assert [example.line for example in encoded.examples] == [1, 2, 3, 4, 5, 6, 7]
        assert trained_text(encoded.examples[5], SHARED) == [" 5<|eos|>"]


class TestStreams:
    def test_a_text_file_becomes_windows_that_hold_every_token_once(self):
        tokenizer = byte_level()
        encoded = encode(records("stream", {"text": TEXT}), tokenizer, max_len=16)
        joined = [int(token) for example in encoded.examples for token in example.ids]
        assert joined == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert all(example.trained.tolist() == [False] + [True] * (len(example.ids) - 1) for example in encoded.examples)
        assert all(len(example.ids) == 16 for example in encoded.examples[:-1])

    def test_a_bos_leads_every_window_where_the_tokenizer_adds_one(self):
        encoded = encode(records("stream", {"text": TEXT}), byte_level(bos=True), max_len=16)
        assert all(example.ids[0] == 0 and not example.trained[0] and example.trained[1:].all() for example in encoded.examples)

    def test_no_token_of_a_longer_lead_is_trained(self):
        tokenizer = byte_level()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> <|start|> $A <|stop|>", special_tokens=[("<|bos|>", 0), ("<|start|>", 3), ("<|stop|>", 4)]
        )
        window = encode(records("stream", {"text": TEXT}), tokenizer, max_len=16).examples[0]
        assert window.ids[:2].tolist() == [0, 3] and window.trained.tolist() == [False] * 2 + [True] * 14
        example = only(encode(records("text", {"text": "yes"}), tokenizer, max_len=16))
        assert example.ids.tolist()[:2] + example.ids.tolist()[-2:] == [0, 3, 4, 1] and example.trained.tolist()[:3] == [False, False, True]

    def test_cutting_a_long_text_for_the_tokenizer_changes_no_token(self, monkeypatch):
        text = "".join(f"{word}\n" * (1 + place % 3 == 0) + f"{word} \n\n  and\t{word}\n" for place, word in enumerate(TEXT.split()))
        whole = encode(records("stream", {"text": text}), SHARED, max_len=32)
        monkeypatch.setattr(masks, "_PIECE_CHARS", 40)
        pieces = encode(records("stream", {"text": text}), SHARED, max_len=32)
        assert all(np.array_equal(left.ids, right.ids) for left, right in zip(whole.examples, pieces.examples, strict=True))

    def test_a_stream_has_no_answers(self):
        with pytest.raises(UsageError, match="stream records"):
            encode(records("stream", {"text": TEXT}), byte_level(), mask="completion", max_len=16)

    def test_a_text_of_one_token_is_refused(self):
        with pytest.raises(IncompatibleError, match="none has a target"):
            encode(records("stream", {"text": "a"}), byte_level(), max_len=16)


class TestLabelled:
    def wordpiece(self):
        vocab = {word: place for place, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film"])}
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")

    def test_special_tokens_survive_the_cut(self):
        encoded = encode_labelled(records("labelled", {"text": "good film", "label": "yes"}, {"text": "bad " * 9, "label": "no"}), self.wordpiece(), max_len=5)
        assert [example.ids.tolist() for example in encoded.examples] == [[1, 4, 6, 2], [1, 5, 5, 5, 2]]
        assert [example.label for example in encoded.examples] == ["yes", "no"]
        assert (encoded.report.truncated, encoded.report.truncated_lines, encoded.report.tokens) == (1, (2,), 9)

    def test_records_without_labels_are_refused(self):
        with pytest.raises(IncompatibleError, match=r"needs \{text, label\} records, but data.jsonl holds text records"):
            encode_labelled(records("text", {"text": "a"}), self.wordpiece(), max_len=5)


def test_a_character_across_two_tokens_is_shown_whole():
    """The bytes of an emoji may fall on both sides of a border; the later piece shows it."""
    ids = np.array(SHARED("a🙂b", add_special_tokens=False)["input_ids"], dtype=np.int32)
    assert len(ids) == 6
    assert preview(Example(ids, np.arange(6) >= 3, 1), SHARED) == [("a", False), ("🙂b", True)]


def test_marked_text_is_short_and_bracketed():
    assert marked([("ask ", False), ("yes", True)]) == "ask ⟦yes⟧"
    assert len(marked([("x" * 5000, True)])) < 700
