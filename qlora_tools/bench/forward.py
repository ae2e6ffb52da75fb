"""Models that look once and are done: encoders, classifiers of text and images, denoising networks.

What is timed is one forward pass over inputs that lie on the device already, until its outputs lie there too; a caller that wants them on the host reads
them afterwards. Such an engine says ``"work": "forward"`` in its ``info``. It has no past and no tokens to count: decoding has no samples at all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from qlora_tools.models.work import DECODER, FORWARD

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Why the rows of such a model have no figures of decoding.
LOOKS_ONCE = "this model looks once"


class ForwardEngine(Protocol):
    """A loaded model that looks once. Every engine of one model makes the same inputs of one case and seed."""

    def feed(self, case: Mapping[str, Any], seed: int, given: Mapping[str, NDArray[np.generic]] | None = None) -> Any:
        """Inputs on the device: ``case["batch"]`` of them, of ``case["prompt_tokens"]`` tokens where text is read; ``given`` ones as they are, all others drawn."""

    def forward(self, feed: Any) -> Any:
        """One pass, waited for; the outputs stay on the device, until the next pass at least."""

    def read(self, outputs: Any) -> Mapping[str, NDArray[np.generic]]:
        """Copies of a pass's outputs by name, on the host, floats of 32 bits or more."""

    def info(self) -> Mapping[str, Any]:
        """As in ``engine.py``, with ``work``; ``prompt`` is ``ignored`` where nothing that is read has a length to choose."""

    def close(self) -> None:
        """Free the model."""


def is_forward(info: Mapping[str, Any]) -> bool:
    """Whether an engine's ``info`` says that it looks once."""
    return bool(info.get("work", DECODER) == FORWARD)


def time_pass(engine: ForwardEngine, feed: Any) -> dict[str, Any]:
    """One pass in seconds: ``prefill_s``, ``ttft_s`` and ``total_s`` are all of them it, and there is no ``decode_s``."""
    started = time.perf_counter()
    engine.forward(feed)
    took = time.perf_counter() - started
    return {"prefill_s": took, "ttft_s": took, "decode_s": [], "total_s": took}
