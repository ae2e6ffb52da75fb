"""Make the calibration text that comes with the package, from this folder's own prose and from grammars.

Usage: ``python calibration/make.py`` writes ``qlora_tools/calibrate/builtin.txt`` and prints its sha256; with ``--check`` it only compares.
Fourteen kinds of text in turn, so that every stretch of a few thousand tokens has most of them: prose in English and in thirteen other
languages (``prose.txt``), stories, letters, questions and answers, sums, programs in several languages, records, tables, logs, commands.
Everything is written for this purpose; nothing is taken from elsewhere. The same sources give the same bytes on every Python.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import programs
import records
import sentences
from dealing import Dealer

HERE = Path(__file__).parent
TARGET = HERE.parent / "qlora_tools" / "calibrate" / "builtin.txt"
SEED = 20261121
ROUNDS = 30
KINDS = [
    sentences.story,
    programs.python,
    records.json_lines,
    sentences.answers,
    records.table,
    sentences.phrases,
    programs.other_languages,
    records.log,
    sentences.letter,
    records.sums,
    sentences.encyclopedia,
    programs.commands,
    sentences.manual,
    records.settings,
]


def main() -> int:
    text = builtin_text().encode()
    digest = hashlib.sha256(text).hexdigest()
    if "--check" in sys.argv[1:]:
        same = TARGET.is_file() and TARGET.read_bytes() == text
        print(f"{TARGET.name}: {'the same as' if same else 'differs from'} what these sources make (sha256 {digest})")
        return 0 if same else 1
    TARGET.write_bytes(text)
    print(f"{TARGET.name}: {len(text):,} bytes, sha256 {digest}")
    return 0


def builtin_text() -> str:
    """A paragraph of the prose, then two or three generated pieces, and so on."""
    dealer = Dealer(SEED)
    prose = (HERE / "prose.txt").read_text(encoding="utf-8").strip().split("\n\n")
    order = dealer.shuffled(range(ROUNDS * len(KINDS)))
    pieces = [KINDS[number % len(KINDS)](dealer) for number in order]
    share = len(pieces) / len(prose)
    parts = []
    for number, paragraph in enumerate(dealer.shuffled(prose)):
        parts += [paragraph, *pieces[round(number * share) : round((number + 1) * share)]]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
