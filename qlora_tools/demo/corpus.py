"""Real text that is already on every machine with a full Python: the standard library's source and the language reference.

Two domains. *Code* is the library's own modules; *prose* is the text behind ``help("keywords")``, stored in
``pydoc_data.topics``. Code is split into training and held-out documents by a hash of the document's name, so
that the split does not depend on the order of a folder listing and a file keeps its side from one patch
release to the next; prose is split as every other measurement on it is (``quality/corpus.py``). Tests, vendored
packages and data tables in Python syntax are left out: they are large, repetitive and not programs.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_tools.errors import MissingError
from qlora_tools.quality.corpus import held_out_topics, reference_topics

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings", "ensurepip", "lib2to3"})
_BUILD_CONFIG = "_sysconfigdata"  # generated when Python was compiled: paths of that machine, no program
_HELDOUT_CODE = 0.06
_MIN_BYTES = {"code": 2_000_000, "prose": 100_000}
_HINT = (
    "install Python from python.org, a distribution's full package (Debian: libpython3-stdlib) or conda, or run the demo on a pair of your own: "
    "qlt demo --base DIR --tuned DIR"
)


@dataclass(frozen=True)
class Document:
    """One text of the corpus; ``name`` is its path relative to the library, or the topic."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents of one domain, each sorted by name. ``skipped`` files could not be read."""

    domain: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    skipped: tuple[str, ...] = ()

    @property
    def train_bytes(self) -> int:
        return _bytes(self.train)

    @property
    def heldout_bytes(self) -> int:
        return _bytes(self.heldout)

    def sha256(self) -> str:
        """Hex digest of every name and text on its side: what a trained model depended on."""
        digest = hashlib.sha256()
        for side, documents in (("train", self.train), ("heldout", self.heldout)):
            for document in documents:
                digest.update(f"{side}\0{document.name}\0{len(document.text)}\0{document.text}".encode())
        return digest.hexdigest()


def code_corpus(stdlib: Path | None = None) -> Corpus:
    """The ``.py`` files under ``stdlib`` (default: of the running Python), about 10 MB.

    Raises:
        MissingError: the library's source is not there, as in embedded and zipped distributions.
    """
    folder = stdlib or Path(sysconfig.get_path("stdlib"))
    documents, skipped = [], []
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else ():
        relative = path.relative_to(folder)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith(_BUILD_CONFIG):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            skipped.append(relative.as_posix())
            continue
        if text.strip():
            documents.append(Document(relative.as_posix(), text))
    _require("code", documents, f"the source of Python's standard library is not in {folder}")
    heldout = {document.name for document in documents if _fraction(document.name) < _HELDOUT_CODE}
    return _corpus("code", documents, heldout, skipped)


def prose_corpus(topics: Mapping[str, str] | None = None) -> Corpus:
    """The language reference as ``help()`` shows it, about 370 kB; a paragraph that several topics repeat is kept once.

    ``topics`` maps a topic to its text (default: ``pydoc_data.topics``). Held-out ones are those of
    :func:`~qlora_tools.quality.corpus.held_out_topics`, so that ``qlt eval`` judges a model of the demo on nothing it learnt.

    Raises:
        MissingError: this Python comes without ``pydoc_data``.
    """
    try:
        found = reference_topics() if topics is None else topics
    except MissingError as error:
        raise MissingError(str(error), hint=_HINT) from error
    documents = _without_repeats(found)
    _require("prose", documents, "the language reference (pydoc_data.topics) of this Python is empty")
    return _corpus("prose", documents, held_out_topics(found))


def joined(documents: Iterable[Document]) -> str:
    """The documents as one text, a blank line between two."""
    return "\n\n".join(document.text.strip("\n") for document in documents) + "\n"


def _without_repeats(topics: Mapping[str, str]) -> list[Document]:
    """One document per topic that still says something new; the longest topics, which quote the others, go first."""
    seen: set[str] = set()
    documents = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = topics[name].split("\n\n")
        fresh = [paragraph for paragraph in paragraphs if paragraph.strip() and paragraph.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in fresh)
        if fresh:
            documents.append(Document(name, "\n\n".join(fresh).strip("\n") + "\n"))
    return documents


def _corpus(domain: str, documents: list[Document], heldout: Collection[str], skipped: Iterable[str] = ()) -> Corpus:
    ordered = sorted(documents, key=lambda document: document.name)
    return Corpus(
        domain,
        train=tuple(document for document in ordered if document.name not in heldout),
        heldout=tuple(document for document in ordered if document.name in heldout),
        skipped=tuple(skipped),
    )


def _require(domain: str, documents: list[Document], complaint: str) -> None:
    found = _bytes(documents)
    if found < _MIN_BYTES[domain]:
        raise MissingError(f"{complaint}: found {found:,} bytes of text, the demo needs {_MIN_BYTES[domain]:,}", hint=_HINT)


def _bytes(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _fraction(name: str) -> float:
    """A number in [0, 1) that belongs to ``name``."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
