"""The library's public face: one keyword-only function per verb, each returning a frozen record.

>>> from qlora_tools import api
>>> api.quantize(model="base", scheme="nf4")  # doctest: +SKIP

Names are imported when they are first used: a quantization does not wait for ONNX to load, nor carry its memory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_tools.bench.record import Workload
    from qlora_tools.demo.flow import DemoResult, demo
    from qlora_tools.stages.extract import ExtractConfig
    from qlora_tools.verbs.bench import BenchResult, bench, layers_of
    from qlora_tools.verbs.doctor import Check, Diagnosis, doctor
    from qlora_tools.verbs.evaluate import EvalResult, Judged, evaluate
    from qlora_tools.verbs.export import ExportResult, export
    from qlora_tools.verbs.extract import ExtractResult, extract
    from qlora_tools.verbs.inspect import Group, Inspection, inspect
    from qlora_tools.verbs.merge import MergeResult, TensorRetention, merge
    from qlora_tools.verbs.quantize import QuantizeResult, quantize

_HOMES = {
    "qlora_tools.bench.record": ("Workload",),
    "qlora_tools.demo.flow": (
        "DemoResult",
        "demo",
    ),
    "qlora_tools.stages.extract": ("ExtractConfig",),
    "qlora_tools.verbs.bench": (
        "BenchResult",
        "bench",
        "layers_of",
    ),
    "qlora_tools.verbs.doctor": (
        "Check",
        "Diagnosis",
        "doctor",
    ),
    "qlora_tools.verbs.evaluate": (
        "EvalResult",
        "Judged",
        "evaluate",
    ),
    "qlora_tools.verbs.export": (
        "ExportResult",
        "export",
    ),
    "qlora_tools.verbs.extract": (
        "ExtractResult",
        "extract",
    ),
    "qlora_tools.verbs.inspect": (
        "Group",
        "Inspection",
        "inspect",
    ),
    "qlora_tools.verbs.merge": (
        "MergeResult",
        "TensorRetention",
        "merge",
    ),
    "qlora_tools.verbs.quantize": (
        "QuantizeResult",
        "quantize",
    ),
}

__all__ = [
    "BenchResult",
    "Check",
    "DemoResult",
    "Diagnosis",
    "EvalResult",
    "ExportResult",
    "ExtractConfig",
    "ExtractResult",
    "Group",
    "Inspection",
    "Judged",
    "MergeResult",
    "QuantizeResult",
    "TensorRetention",
    "Workload",
    "bench",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "extract",
    "inspect",
    "layers_of",
    "merge",
    "quantize",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
