"""What a refinement block by block has learnt so far, kept block by block, so that an interruption costs one block.

Going on means walking through the finished blocks again without learning: what a block is given depends on all before it, and hidden states are
far larger than factors. The errors that a block was judged by are measured again on the way; where they differ, a model or the text is
another one.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tools.checkpoint.folder import sync
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.checkpoint.writer import write_tensors
from qlora_tools.errors import CorruptError, IncompatibleError
from qlora_tools.training.student_blocks import Factors

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"block-(\d+)\.safetensors")
_KEY = "block"
_SAME = 1e-5  # sums of the same products, in another order at most


@dataclass(frozen=True)
class BlockError:
    """Squared distance of a block's output from the teacher's, over the power of the teacher's, on held-out windows. ``start``: the adapter as it was,
    all the way; ``before``: with what earlier blocks learnt; ``after``: with this one's, too. ``kept_start``: it learnt nothing that helped."""

    block: str
    start: float
    before: float
    after: float
    kept_start: bool


class BlockJournal:
    """The finished blocks of a run in ``folder``, one file each; without a folder, nothing is kept.

    Raises:
        CorruptError: a file that :meth:`keep` did not write.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._found: dict[str, tuple[BlockError, Factors]] = {}
        for path in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
            if _NAME.fullmatch(path.name):
                error, factors = _read(path)
                self._found[error.block] = error, factors

    @property
    def blocks(self) -> tuple[str, ...]:
        """The finished ones."""
        return tuple(self._found)

    def find(self, block: str, start: float, before: float) -> tuple[BlockError, Factors] | None:
        """What ``block`` learnt in an earlier part of the run, if it did.

        Raises:
            IncompatibleError: it was another distance from the teacher then.
        """
        found = self._found.get(block)
        if found is None:
            return None
        if not (math.isclose(found[0].start, start, rel_tol=_SAME) and math.isclose(found[0].before, before, rel_tol=_SAME)):
            raise IncompatibleError(
                f"this is not the run that was interrupted: `{block}` was {found[0].before:.6g} away from the teacher's, is {before:.6g}",
                hint="base, teacher or text have changed; start anew with --force",
            )
        return found

    def keep(self, error: BlockError, factors: Factors) -> None:
        """Store what a block learnt; ``factors`` are its own layers' only."""
        if self._folder is None:
            return
        tensors: dict[str, torch.Tensor] = {f"{path}.{side}": value.cpu() for path, pair in factors.items() for side, value in zip("AB", pair, strict=True)}
        path = self._folder / f"block-{len(self._found):05}.safetensors"
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        write_tensors(partial, tensors, {_KEY: json.dumps(asdict(error))})
        sync(partial)
        partial.replace(path)
        self._found[error.block] = error, factors


def _read(path: Path) -> tuple[BlockError, Factors]:
    with SafetensorsFile(path) as file:
        try:
            error = BlockError(**json.loads(file.metadata[_KEY]))
            paths = sorted({name.rpartition(".")[0] for name in file.specs})
            return error, {layer: (file.read(f"{layer}.A"), file.read(f"{layer}.B")) for layer in paths}
        except (KeyError, TypeError, ValueError) as wrong:
            raise CorruptError(f"{path} is no block of an interrupted run: {wrong}", hint="remove the folder and start anew") from wrong
