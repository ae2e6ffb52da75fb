"""What settings and runs are called: ids that tell folders apart, labels short enough for a table, and ``runs/bench-001`` for the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

#: Where results lie unless another place is named.
RUNS = Path("runs")


def unique_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder's shortest tail that no other folder has: ``int8``, or ``run1/int8`` beside ``run2/int8``."""
    parts = {folder: folder.resolve().parts for folder in folders}
    depth = 1
    while parts and depth < max(map(len, parts.values())) and len({found[-depth:] for found in parts.values()}) < len(parts):
        depth += 1
    return {folder: "/".join(found[-depth:]) for folder, found in parts.items()}


def subject_names(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """``names`` of models in ``folders``; where two are the same, the folders' shortest tails that differ."""
    if len(set(names)) == len(names):
        return list(names)
    tails = unique_names(folders)
    return [tails[folder] for folder in folders]


def short_labels(names: Sequence[str]) -> list[str]:
    """Names without the words that all of them begin with: ``fp32`` and ``int8`` for ``base-tuned-r16-fp32`` and ``base-tuned-r16-int8``."""
    words = [name.split("-") for name in names]
    shared = 0
    while len(words) > 1 and all(len(found) > shared + 1 for found in words) and len({found[shared] for found in words}) == 1:
        shared += 1
    return ["-".join(found[shared:]) for found in words]


def next_run(folder: Path) -> Path:
    """The first of ``bench-001``, ``bench-002``, ... that is neither there nor being measured, or waiting to be resumed."""
    number = 1
    while (place := folder / f"bench-{number:03}").exists() or journal_of(place).exists():
        number += 1
    return place


def journal_of(output: Path) -> Path:
    """Where a benchmark keeps what it has measured so far, until ``output`` is whole."""
    return output.with_name(f".{output.name}.journal")


def interrupted_run(folder: Path) -> Path | None:
    """The output of the last benchmark below ``folder`` that was begun and not finished."""
    found = [path for path in folder.glob(".*.journal") if not path.with_name(path.name[1:].removesuffix(".journal")).exists()]
    last = max(found, key=lambda path: (path.stat().st_mtime, path.name), default=None)
    return last.with_name(last.name[1:].removesuffix(".journal")) if last is not None else None
