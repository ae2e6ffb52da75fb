"""What a setting takes of a GPU's memory: five numbers, each measured in fresh processes and checked against the others.

``meter`` reads the driver; ``bracket`` judges what the whole device lost where the driver does not show our process; ``arena`` reads the
runtime's own allocator; ``context`` is what a process costs before it holds a model; ``limit`` looks for the least limit under which a case
runs; ``summary`` puts it together. Importing this imports neither torch nor onnxruntime: the parent of the measurements comes here too, and a
CUDA context of its own would be part of what it measures.
"""

from __future__ import annotations

from qlora_tools.bench.device.bracket import Bracket, Figure, bracket, figure
from qlora_tools.bench.device.energy import energy_j
from qlora_tools.bench.device.limit import LimitSearch, kept_within, smallest_limit
from qlora_tools.bench.device.meter import Meter, open_meter
from qlora_tools.bench.device.summary import summarise_device

__all__ = ["Bracket", "Figure", "LimitSearch", "Meter", "bracket", "energy_j", "figure", "kept_within", "open_meter", "smallest_limit", "summarise_device"]
