"""An adapter between formats: factors by the module path of the Hugging Face checkpoint, in one orientation, with their scale.

Every importer ends here and every exporter starts here, so that n formats need n readers and n writers and no pair of them
knows another. Tensors are held whole: an adapter is small. Left out: files (``formats/``), merging (``merged.py``).

The update of a layer's weight is ``scale * b @ a``::

    linear      a [R, I]           b [O, R]              weight [O, I], or [I, O] where the model stores inputs first
    conv        a [R, I, k...]     b [O, R, 1...]        weight [O, I, k...] (grouped: I and R per group as PEFT has it)
    embedding   a [R, V]           b [D, R]              weight [V, D] += scale (b a)^T

Axes: O outputs, I inputs, R rank, V vocabulary, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

LINEAR, CONV, EMBEDDING = "linear", "conv", "embedding"


@dataclass(frozen=True, eq=False)
class Layer:
    """What an adapter does to one module. ``bias`` [O] is added to the layer's bias as it stands (any scale is already in it);
    ``magnitude`` [O] makes it DoRA: rows of ``W + scale b a`` are rescaled to these lengths."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    kind: str = LINEAR
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class Portable:
    """A whole adapter. ``layers``: module path (as in the checkpoint of the base, without ``.weight``) -> what is done to it.

    ``replacements``: tensor name -> whole tensor. ``token_rows``: tensor name -> (row indices, rows [n, D]). ``base_name``: what
    the source says it was trained on. ``notes``: what the user should know about the conversion. ``inputs_first``: the base stores
    its linears as [I, O] (GPT-2), which a square weight does not tell. ``tied``: what is done to a tensor is done to those tied to
    it too (PEFT's ``ensure_weight_tying``).
    """

    layers: Mapping[str, Layer]
    replacements: Mapping[str, torch.Tensor] = field(default_factory=dict)
    token_rows: Mapping[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    base_name: str | None = None
    notes: tuple[str, ...] = ()
    inputs_first: bool = False
    tied: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of everything it holds."""
        kept = [tensor for layer in self.layers.values() for tensor in (layer.a, layer.b, layer.bias, layer.magnitude) if tensor is not None]
        kept += [*self.replacements.values(), *(rows for _, rows in self.token_rows.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)
