"""Runs exported decoders. Imports no torch: measuring processes load this room.

``session.py`` is the whole of it for a caller; behind it lie ``loading.py`` (provider, options, graph capture), ``cache.py`` (keys and
values), ``adapters.py`` (LoRA factors as inputs), ``description.py`` (the files beside a graph) and ``values.py`` (tensors on a device).
``sampling.py`` and ``text.py`` turn logits into tokens and tokens into text.
"""

from __future__ import annotations

from qlora_tools.export.runtime.sampling import Sampling
from qlora_tools.export.runtime.session import DecoderSession, open_engine

__all__ = ["DecoderSession", "Sampling", "open_engine"]
