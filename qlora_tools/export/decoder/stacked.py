"""A checkpoint that stacks all experts of a layer in one tensor, seen as one that holds them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qlora_tools.engine.plan import Source
from qlora_tools.errors import IncompatibleError
from qlora_tools.models.decoder import Decoder
from qlora_tools.models.experts import Place
from qlora_tools.specs import TensorSpec


@dataclass(frozen=True)
class SeparateExperts:
    """A :class:`~qlora_tools.engine.plan.Source`: reading an expert's weight reads that expert alone."""

    source: Source
    places: Mapping[str, Place]
    specs: Mapping[str, TensorSpec]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        place = self.places.get(name)
        if place is None:
            return self.source.read(name, rows)
        first, last = rows or (0, place.stop - place.start)
        if place.expert is None:
            return self.source.read(place.tensor, (place.start + first, place.start + last))
        return self.source.read(place.tensor, (place.expert, place.expert + 1))[0, place.start + first : place.start + last]


def separate_experts(source: Source, decoder: Decoder) -> Source:
    """``source`` with every weight of a mixture under the name ``decoder`` knows it by; itself where none is stacked.

    Raises:
        IncompatibleError: a stacked tensor has another shape than config.json makes it.
    """
    places = {name: place for name, place in decoder.stacked_places().items() if name not in source.specs and place.tensor in source.specs}
    if not places:
        return source
    specs = {name: spec for name, spec in source.specs.items() if name not in {place.tensor for place in places.values()}}
    expected = decoder.expected_shapes()
    ends = {place.tensor: max(other.stop for other in places.values() if other.tensor == place.tensor) for place in places.values()}
    for name, place in places.items():
        stored = source.specs[place.tensor]
        rows, columns = expected[name]
        wanted = (ends[place.tensor], columns) if place.expert is None or decoder.experts is None else (decoder.experts.count, ends[place.tensor], columns)
        if stored.shape != wanted:
            raise IncompatibleError(
                f"`{place.tensor}` is {list(stored.shape)}, config.json makes it {list(wanted)}", hint="the config.json does not describe these weights"
            )
        specs[name] = TensorSpec(name, stored.dtype, (rows, columns))
    return SeparateExperts(source, places, specs)
