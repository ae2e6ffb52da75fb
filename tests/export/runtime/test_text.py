"""Text as it comes: its pieces are the whole, no character is broken, and stop texts end it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qlora_tools.export.runtime.text import TextStream

SENTENCE = "Wörter wie »naïve« ☕ kosten 3 €, 🙂🏽👍🏽🎈 und 日本語 auch. "


def byte_level():
    """GPT-2's way: every byte is a letter; without merges each token is one byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    return tokenizer


def sentencepiece():
    """Llama's way: spaces are ▁, the first of a text is stripped, unknown letters become bytes."""
    words = ["▁", "▁the", "▁cat", "s", "a", "▁a", ".", "<unk>", *"bcdefghijklmnopqrtuvwxyz"]
    vocab = {word: number for number, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)])
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


def pieces(tokenizer, ids, context=(), stops=()):
    stream = TextStream(tokenizer.decode, context, stops)
    found = [stream.push(token) for token in ids]
    return [*found, stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁\ufffd"), max_size=60), split=st.integers(0, 20))
def test_pieces_are_the_text_and_hold_whole_characters(name, text, split):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text).ids
    context, rest = ids[:split], ids[split:]
    if tokenizer.decode(context).endswith("\ufffd"):
        return  # a prompt never ends within a character
    found = pieces(tokenizer, rest, context)
    assert tokenizer.decode(context) + "".join(found) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_texts_stay_whole_over_every_window(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(SENTENCE * 20).ids
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert max(map(len, found)) <= 2  # text comes as soon as it is certain


def test_the_space_before_the_first_new_word_is_not_lost():
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [tokenizer.token_to_id(word) for word in ("▁the", "▁cat", "s")]
    assert pieces(tokenizer, ids[1:], ids[:1]) == [" cat", "s", ""] and pieces(tokenizer, ids) == ["the", " cat", "s", ""]


def test_what_never_becomes_a_character_is_told_at_the_end():
    tokenizer = TOKENIZERS["byte level"]
    cut = tokenizer.encode("a€").ids[:-1]
    assert pieces(tokenizer, cut) == ["a", "", "", "\ufffd"]


def test_bytes_that_are_no_text_do_not_hold_it_up():
    tokenizer = TOKENIZERS["byte level"]
    broken = tokenizer.encode("€").ids[1]
    found = pieces(tokenizer, [broken] * 20)
    assert len("".join(found[:-1])) >= 17 and "".join(found) == "\ufffd" * 20


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "wo"], "one t"),
        ("one twt", ["two"], "one twt"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("one", ["", "x"], "one"),
        ("\n\nend", ["\n\n"], ""),
    ],
)
def test_stop_texts_end_it_and_are_not_part_of_it(text, stops, expected):
    tokenizer = TOKENIZERS["byte level"]
    stream = TextStream(tokenizer.decode, (), stops)
    found = []
    for token in tokenizer.encode(text).ids:
        found.append(stream.push(token))
        if stream.stopped:
            break
    found.append(stream.finish())
    assert "".join(found) == expected and stream.stopped == (expected != text)


def test_nothing_of_a_stop_text_is_told_before_it_is_complete():
    tokenizer = TOKENIZERS["byte level"]
    assert pieces(tokenizer, tokenizer.encode("a</s").ids, stops=["</s>"]) == ["a", "", "", "", "</s"]
