"""Checkpoints of a run: all that is needed to go on bit for bit, in folders that appear whole or not at all.

A checkpoint holds the fp32 masters, the optimizer's state, the step, the position in the data, the best evaluation so far, and what the run was
started with: its config, and hashes of base and data. Random numbers need no state: before every micro-batch all generators are seeded from
(seed, step, micro-batch, process), so neither evaluations nor samples nor an interruption can shift them. Tensors are safetensors,
everything else JSON.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_tools.checkpoint.folder import replace_file, sync
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.checkpoint.writer import write_tensors
from qlora_tools.errors import CorruptError, IncompatibleError, MissingError
from qlora_tools.manifest import canonical_json

RUN = "run.json"
TENSORS, STATE = "state.safetensors", "state.json"
SCHEMA = "qlt.train/1"
_RECENT = 20
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunIdentity:
    """What a run is: it may be continued only where all of this is equal. Data are hashed as encoded rows; ``world``: processes."""

    config: Mapping[str, Any]
    base_sha256: str
    data_sha256: str
    val_sha256: str | None = None
    teacher_sha256: str | None = None
    world: int = 1

    def check(self, other: RunIdentity) -> None:
        """Refuse to continue ``self`` (the stored run) as ``other``.

        Raises:
            IncompatibleError: names every difference; for base and data with both hashes.
        """
        wrong = [
            f"{what} changed: sha256 was {(mine or 'none')[:16]}, is {(theirs or 'none')[:16]}"
            for what, mine, theirs in (
                ("the base has", self.base_sha256, other.base_sha256),
                ("the data have", self.data_sha256, other.data_sha256),
                ("the validation data have", self.val_sha256, other.val_sha256),
                ("the teacher has", self.teacher_sha256, other.teacher_sha256),
            )
            if mine != theirs
        ]
        mine, theirs = json.loads(canonical_json(dict(self.config))), json.loads(canonical_json(dict(other.config)))
        wrong += [
            f"{name} was {mine.get(name)!r}, is {theirs.get(name)!r}" for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)
        ]
        if self.world != other.world:
            wrong.append(f"it ran on {self.world} processes, now on {other.world}")
        if wrong:
            raise IncompatibleError(
                f"this is not the run that was interrupted: {'; '.join(wrong)}", hint="resume with what it was started with, or start anew with --force"
            )


@dataclass
class Progressed:
    """Where a run stands. ``step``: optimizer steps done. ``best``: lowest evaluation loss and its step."""

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    recent_losses: list[float] = field(default_factory=list)

    def note_loss(self, loss: float) -> None:
        """Remember the first loss and the last few."""
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.recent_losses = [*self.recent_losses[1 - _RECENT :], loss]


def save_state(folder: Path, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any], progressed: Progressed, keep: int) -> str:
    """Write ``step-NNNNNN`` under ``folder`` and remove all but the newest ``keep`` and the best. Returns its name."""
    name = f"step-{progressed.step:06}"
    partial, final = folder / f".{name}.partial", folder / name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial / TENSORS, {key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    (partial / STATE).write_bytes(canonical_json({"schema": SCHEMA, "progressed": asdict(progressed), "optimizer": dict(plain)}))
    for path in (partial / TENSORS, partial / STATE, partial):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(folder)
    for old in checkpoints(folder)[:-keep]:
        if old.name != f"step-{progressed.best_step or -1:06}":
            shutil.rmtree(old)
    return name


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under ``folder``, oldest first."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name)) and (path / STATE).is_file()}
    return [found[step] for step in sorted(found)]


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Progressed]:
    """(tensors, the optimizer's plain values, where the run stood).

    Raises:
        MissingError, CorruptError: not there, or not what :func:`save_state` wrote.
    """
    content = read_json(path / STATE)
    try:
        if content["schema"] != SCHEMA:
            raise CorruptError(f"{path / STATE}: schema is {content['schema']!r}, expected {SCHEMA!r}")
        progressed = Progressed(**content["progressed"])
        plain = dict(content["optimizer"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CorruptError):
            raise
        raise CorruptError(f"{path / STATE} does not hold a training state: {error}", hint="resume from an older checkpoint: remove this one") from error
    with SafetensorsFile(path / TENSORS) as file:
        return {name: file.read(name) for name in file.specs}, plain, progressed


def run_folder(output: Path) -> Path:
    """Where the run that will become ``output`` keeps its checkpoints: beside it."""
    return output.with_name(f"{output.name}.run")


def write_run(output: Path, identity: RunIdentity, words: Mapping[str, Any], ranks: Mapping[str, int] | None = None) -> None:
    """``run.json``: what the run is, the words that started it (for ``--resume`` without any), and ranks that were measured for it."""
    folder = run_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "identity": asdict(identity), "words": dict(words), **({"ranks": dict(ranks)} if ranks else {})}
    replace_file(folder / RUN, canonical_json(content))


def read_run(output: Path) -> tuple[RunIdentity, dict[str, Any]]:
    """The identity and the words in ``run.json`` of the run that will become ``output``.

    Raises:
        MissingError: there is none. CorruptError: it is not what :func:`write_run` wrote.
    """
    content = _read_run(output)
    try:
        return RunIdentity(**content["identity"]), dict(content["words"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{run_folder(output) / RUN} does not describe a run: {error}", hint="start it anew with --force") from error


def read_ranks(output: Path) -> dict[str, int] | None:
    """Module path -> rank, as measured when the run was started; ``None`` where nothing was.

    Raises:
        MissingError, CorruptError: as :func:`read_run`.
    """
    found = _read_run(output).get("ranks")
    if found is None:
        return None
    if not isinstance(found, dict) or not all(type(rank) is int and rank > 0 for rank in found.values()):
        raise CorruptError(f"{run_folder(output) / RUN}: `ranks` does not give each module a rank", hint="start it anew with --force")
    return dict(found)


def _read_run(output: Path) -> dict[str, Any]:
    folder = run_folder(output)
    if not (folder / RUN).is_file():
        raise MissingError(f"{output} has no interrupted run beside it ({folder.name})", hint="start one without --resume, or name its output with -o")
    content = read_json(folder / RUN)
    if not isinstance(content, dict):
        raise CorruptError(f"{folder / RUN} does not describe a run", hint="start it anew with --force")
    return content


def seed_everything(*parts: object) -> None:
    """Seed python, numpy and torch (all devices) from ``parts``."""
    number = int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little") >> 1
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
