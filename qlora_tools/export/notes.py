"""What an export does otherwise than its scheme's name says, in sentences: weights that are carried in another form, and matrices that miss the fast kernels.

Read off the plan, so that nothing which falls back does so silently. What stays in floats in every scheme (norms, biases, the routers of experts) is not
worth a word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qlora_tools.engine.plan import Plan
from qlora_tools.export.calibrated import STATISTICS
from qlora_tools.export.decoder.layout import Layout
from qlora_tools.export.decoder.matrices import Matrix, Mixture
from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.schemes import CUDA_COLUMNS, Scheme
from qlora_tools.names import shortened

_DECIDING = ("router", "shared_scale")


@dataclass(frozen=True)
class Carried:
    """A weight of ``elements`` in the form ``carried``; ``what`` is its kind, in words, ``name`` tells it from the others of its kind."""

    what: str
    carried: str
    elements: int
    name: str


def carried_otherwise(weights: Iterable[Carried], scheme: Scheme) -> Iterator[str]:
    """For each form that is not the scheme's: which weights have it, and how much of the model they are."""
    weights = list(weights)
    nominal = {"w8a8": "int8"}.get(scheme.carried, scheme.carried)
    total = max(sum(weight.elements for weight in weights), 1)
    for form in sorted({weight.carried for weight in weights} - {nominal}):
        found = [weight for weight in weights if weight.carried == form]
        share = sum(weight.elements for weight in found) / total
        yield f"{form}, not {nominal}: {shortened(sorted({weight.what for weight in found}))} ({share:.0%} of the weights)"


def decoder_notes(layout: Layout, scheme: Scheme) -> list[str]:
    """The notes of a decoder's graph."""
    matrices = [matrix for matrix in layout.matrices() if matrix.name.rpartition(".")[2] not in _DECIDING]
    tied = layout.head is layout.embedding
    weights = (Carried(_kind(matrix, tied=tied), matrix.format.carried, matrix.total_rows * matrix.columns, matrix.name) for matrix in matrices)
    notes = list(carried_otherwise(weights, scheme))
    apart = [index for index, layer in enumerate(layout.layers) if isinstance(layer.feed, Mixture) and not layer.feed.together]
    if apart:
        reason = "plain ONNX has no node for all of them" if scheme.target.standard else "no node for all of them takes their sizes, or their activation"
        notes.append(f"the experts of {len(apart)} layers are multiplied one by one, which is slower: {reason}")
    slow = {matrix.columns for matrix in matrices if _misses_tensor_cores(matrix, scheme)}
    if slow:
        columns = ", ".join(map(str, sorted(slow)))
        notes.append(f"matrices with {columns} inputs miss CUDA's fast kernels, which take {CUDA_COLUMNS} of them at a time: they are slower than fp16")
    return notes


def calibration_notes(layout: Layout, plan: Plan) -> list[str]:
    """The note of a decoder that was to be calibrated: which of the matrices that are multiplied by were not, as the experts of a mixture never are."""
    described, tied = calibrated_weights(plan), layout.head is layout.embedding
    rounded = [matrix for matrix in (layout.head, *(one for layer in layout.layers for one in layer.matrices())) if not isinstance(matrix.format, Dense)]
    every = [Carried(_kind(matrix, tied=tied), matrix.format.carried, matrix.total_rows * matrix.columns, matrix.name) for matrix in rounded]
    plain = {matrix.name for matrix in rounded if not all(f"{module}.weight" in described for module in matrix.modules)}
    return list(left_plain(every, plain))


def calibrated_weights(plan: Plan) -> set[str]:
    """Names of the weights that ``plan`` encodes under statistics of their inputs."""
    calibrated = [unit.reads for unit in plan.units if any(read.source == STATISTICS for read in unit.reads)]
    return {read.name for reads in calibrated for read in reads if read.source != STATISTICS}


def left_plain(rounded: Sequence[Carried], plain: Collection[str]) -> Iterator[str]:
    """The note on those of the ``rounded`` weights whose names are in ``plain``, if any is."""
    found = [weight for weight in rounded if weight.name in plain]
    if found:
        share = sum(weight.elements for weight in found) / sum(weight.elements for weight in rounded)
        names = shortened(sorted({weight.what for weight in found}))
        yield f"rounded without calibration: {names} ({share:.0%} of the weights that are multiplied by): the statistics hold no inputs of theirs"


def _kind(matrix: Matrix, *, tied: bool) -> str:
    """``embedding``, ``head``, ``experts``, or the matrix's name in its layer."""
    if ".experts." in matrix.name:
        return "experts"
    return "embedding and head in one" if tied and matrix.name == "head" else matrix.name.rpartition(".")[2]


def _misses_tensor_cores(matrix: Matrix, scheme: Scheme) -> bool:
    form = matrix.format
    return scheme.target.provider == "cuda" and not scheme.target.standard and isinstance(form, Blocks) and bool(matrix.columns % CUDA_COLUMNS)


def joined(*notes: str | None) -> str | None:
    """Those that say something, as one; ``None`` where none does."""
    return "; ".join(note for note in notes if note) or None
