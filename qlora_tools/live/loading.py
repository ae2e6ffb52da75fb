"""What transformers calls a stored tensor when it loads it into a model: older names, a prefix of the body that the checkpoint leaves out or has too
much, and tensors that are put together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def loaded_names(model: Any, stored: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Stored name -> (name that ``model`` would have it under, if it has it at all; whether it becomes part of a tensor made of several)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    found: dict[str, tuple[str, bool]] = {}
    for name in stored:
        loaded, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        found[name] = (loaded, converted is not None)
    return found
