"""Make ``mixed.txt``, a small calibration text, from the Python installation that runs this script.

Usage: ``python calibration/make.py`` writes the text and prints its sha256; with ``--check`` it only compares.
Five kinds of text in turn, so that every stretch of a few thousand tokens has all of them: programs, prose
about the language, documentation strings, JSON records and tables of sums. Only documents on the training side
of the demo's corpus are used, so that nothing measured on its held-out side has been calibrated on. The same
Python release gives the same bytes; the text is not tracked, its digest belongs beside whatever was calibrated on it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from qlora_tools.demo.corpus import code_corpus, prose_corpus

SEED = 20240229
PIECE_CHARS = 1_500
ROUNDS = 22
TARGET = Path(__file__).parent / "mixed.txt"
MODULES = [
    "argparse",
    "bisect",
    "calendar",
    "csv",
    "difflib",
    "fractions",
    "heapq",
    "json/decoder",
    "mailbox",
    "pathlib",
    "random",
    "shlex",
    "statistics",
    "textwrap",
]


def main() -> int:
    text = mixed_text().encode()
    digest = hashlib.sha256(text).hexdigest()
    if "--check" in sys.argv[1:]:
        same = TARGET.is_file() and TARGET.read_bytes() == text
        print(f"{TARGET.name}: {'the same as' if same else 'differs from'} what Python {sys.version.split()[0]} makes (sha256 {digest})")
        return 0 if same else 1
    TARGET.write_bytes(text)
    print(f"{TARGET.name}: {len(text):,} bytes, Python {sys.version.split()[0]}, sha256 {digest}")
    return 0


def mixed_text() -> str:
    """``ROUNDS`` pieces of each kind, dealt in turn, an empty line between two."""
    rng = random.Random(SEED)
    sources = {document.name: document.text for document in code_corpus().train}
    programs = [sources[f"{name}.py"] for name in MODULES if f"{name}.py" in sources]
    reference = [document.text for document in prose_corpus().train]
    kinds = [_pieces(texts, rng) for texts in (programs, reference, docstrings(programs))]
    parts = []
    for index in range(ROUNDS):
        parts += [pieces[index % len(pieces)] for pieces in kinds]
        parts += [records(rng), table(rng)]
    return "\n\n".join(parts) + "\n"


def docstrings(programs: list[str]) -> list[str]:
    """The longer documentation strings of modules, classes and functions: prose with the code taken away."""
    found = []
    for program in programs:
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append(ast.get_docstring(node) or "")
    return [text for text in found if len(text) > 100]


def records(rng: random.Random) -> str:
    """JSON objects, one a line."""
    tags = ["new", "open", "late", "paid"]
    rows = [{"id": rng.randrange(10**6), "name": rng.choice(MODULES), "ratio": round(rng.random(), 4), "tags": rng.sample(tags, 2)} for _ in range(10)]
    return "\n".join(json.dumps(row) for row in rows)


def table(rng: random.Random) -> str:
    """Comma-separated sums that are right: a, b, a + b."""
    rows = [(a, b, a + b) for a, b in ((rng.randrange(1000), rng.randrange(1000)) for _ in range(30))]
    return "\n".join(["a,b,sum", *(f"{a},{b},{total}" for a, b, total in rows)])


def _pieces(texts: list[str], rng: random.Random) -> list[str]:
    """The texts cut at line ends into pieces of about ``PIECE_CHARS``, in a random order."""
    pieces = list(_cut("\n\n".join(texts)))
    rng.shuffle(pieces)
    return pieces


def _cut(text: str) -> Iterator[str]:
    held: list[str] = []
    for line in text.splitlines():
        held.append(line)
        if sum(map(len, held)) >= PIECE_CHARS:
            yield "\n".join(held).strip("\n")
            held = []


if __name__ == "__main__":
    raise SystemExit(main())
