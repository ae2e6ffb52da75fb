"""What the benchmark asks of a runtime: six methods, found by import path.

A runtime is reached through a factory ``"package.module:name"``, called inside the worker process as
``factory(threads=..., **options)``; it returns a loaded engine. The options are the setting's own JSON and hold
whatever the factory needs (a folder, a dtype, the longest sequence). No base class: any object with these
methods is an engine.

Axes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from qlora_tools.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Engine(Protocol):
    """A loaded decoder. Token ids are i64, logits any float, numpy or torch, on the host once returned."""

    def prefill(self, ids_BT: NDArray[np.int64]) -> Any:
        """Forget any past, run the prompt, and give the logits [B, V] that follow its last token."""

    def decode(self, tokens_B: NDArray[np.int64]) -> Any:
        """Append one token per sequence and give the logits [B, V] that follow it."""

    def score(self, ids_BT: NDArray[np.int64]) -> Any:
        """Logits [B, T, V] of every position, without touching the past that ``decode`` continues."""

    def info(self) -> Mapping[str, Any]:
        """Facts in plain JSON types.

        Read by name: ``vocab_size`` (needed), ``weights_bytes`` (exact sum of the stored weights), ``runtime``,
        ``device``, ``provider``, ``nodes`` (provider -> count), ``max_length``. A fact the engine cannot know
        is left out, never 0.
        """

    def close(self) -> None:
        """Free the model."""


def locate(path: str) -> Callable[..., Any]:
    """The callable behind ``package.module:name``.

    Raises:
        UsageError: no such module or name.
    """
    module, colon, name = path.partition(":")
    if not (colon and module and name):
        raise UsageError(f"`{path}` is not an import path", hint="write it as package.module:name")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # the module is there; something that it needs is not
        raise UsageError(f"`{path}`: there is no module `{error.name}`") from error
    except AttributeError as error:
        raise UsageError(f"`{path}`: module `{module}` has no `{name}`") from error
    if not callable(found):
        raise UsageError(f"`{path}` is a {type(found).__name__}, not something to call")
    return found  # type: ignore[no-any-return]
