"""A byte-level BPE tokenizer trained on the demo's own text and saved the way Hugging Face loads fast tokenizers.

Byte-level: every text can be encoded and decoded without loss, so perplexity per byte is always defined. No
token is added around a text; documents are joined by :data:`EOS` when they are packed for training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tools.demo.corpus import Document
from qlora_tools.manifest import canonical_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2


def train_tokenizer(documents: Iterable[Document], *, vocab_size: int, sample_bytes: int = 3_000_000) -> Tokenizer:
    """Learn ``vocab_size`` tokens (256 bytes and three special ones included) from about ``sample_bytes`` of the documents.

    A part is cut from the front of every document, so that the sample has something of each.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(list(documents), sample_bytes), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``, for ``AutoTokenizer.from_pretrained``."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    config = {
        "backend": "tokenizers",
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_bytes(canonical_json(config))


def pack(tokenizer: Tokenizer, documents: Iterable[Document]) -> list[int]:
    """Token ids of the documents in the given order, each closed by :data:`EOS_ID`."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(EOS_ID)
    return ids


def _sample(documents: list[Document], sample_bytes: int) -> Iterator[str]:
    share = max(sample_bytes // max(len(documents), 1), 1)
    return (document.text[: 2 * share] for document in documents)
