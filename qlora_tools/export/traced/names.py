"""Which tensor of the checkpoint each weight of a live model is.

Checkpoints may carry older names than the class that reads them, leave out the prefix of the body, or hold one of a tied pair. transformers' own table
of renamings is asked first, then the rules that also serve training (:func:`qlora_tools.live.base.tensor_names`). Weights that transformers
puts together from several tensors while loading have no single source and are not found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from qlora_tools.engine.plan import Source
from qlora_tools.errors import IncompatibleError, MissingError
from qlora_tools.live.base import tensor_names
from qlora_tools.models.family import family_of
from qlora_tools.names import nearest
from qlora_tools.specs import TensorSpec


@dataclass(frozen=True)
class _Named:
    """What :func:`tensor_names` asks of a checkpoint."""

    specs: Mapping[str, TensorSpec]
    ties: Mapping[str, str]


def stored_names(model: Any, source: Source, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Parameter or persistent buffer of ``model`` -> tensor of ``source``; ``None`` where there is none."""
    ties = {name: owner for name, owner in family_of(config).ties(config).items() if name not in source.specs and owner in source.specs}
    found = tensor_names(model, cast("Any", _Named(source.specs, ties)))
    renamed = _renamed(model, source.specs)
    return {name: renamed.get(name) or stored for name, stored in found.items()}


def check_stored(name: str, shape: tuple[int, ...], stored: str | None, source: Source) -> str:
    """``stored`` itself, if it can be the weight ``name`` of this shape.

    Raises:
        MissingError: there is none. IncompatibleError: it has another shape.
    """
    if stored is None:
        close = nearest(name, source.specs)
        raise MissingError(
            f"the model needs `{name}` {list(shape)}, which the checkpoint does not hold",
            hint=f"the nearest names are {', '.join(close)}; a head that was never trained calls for another --task" if close else "choose another --task",
        )
    if source.specs[stored].shape != shape:
        raise IncompatibleError(f"`{stored}` is {list(source.specs[stored].shape)}, config.json makes it {list(shape)}", hint="config.json is another model's")
    return stored


def _renamed(model: Any, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Live name -> stored name, by the renamings that transformers applies on loading."""
    if not hasattr(model, "base_model_prefix"):
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    live = model.state_dict()
    found: dict[str, str] = {}
    for stored in specs:
        name, converted = rename_source_key(stored, renamings, converters, model.base_model_prefix, live)
        if converted is None and name in live:
            found[name] = stored
    return found
