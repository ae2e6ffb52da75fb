"""Models of diffusers as they are traced: built from config.json alone, with a call that gives a graph's outputs by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qlora_tools.errors import UnsupportedError


def class_of(name: str) -> Any:
    """The class ``name`` of diffusers.

    Raises:
        UnsupportedError: diffusers is not there.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedError("a model of diffusers needs the package diffusers", hint="pip install diffusers") from error
    return getattr(diffusers, name)


def build_as(derived: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model of ``config`` as the class ``derived``, whose base is the class that the config names; it takes that one's name.

    Raises:
        UnsupportedError: diffusers builds none from it.
    """
    derived.__name__ = derived.__base__.__name__
    model = derived.from_config(dict(config))
    if model is None:
        raise UnsupportedError(f"diffusers builds no {derived.__name__} from this config.json", hint="check it against the model it came from")
    return torch.nn.Module.to(model, dtype)  # diffusers' own warns of layers it keeps in fp32, and has none here
