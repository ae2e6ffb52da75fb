"""The library's public face: one keyword-only function per verb, each returning a frozen record.

>>> from qlora_tools import api
>>> api.quantize(model="base", scheme="nf4")  # doctest: +SKIP

Names are imported when they are first used: a quantization does not wait for ONNX to load, nor carry its memory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_tools.bench.record import Case, Workload
    from qlora_tools.demo.flow import DemoResult, demo
    from qlora_tools.stages.extract import ExtractConfig
    from qlora_tools.stages.init_adapter import InitConfig
    from qlora_tools.training.config import TrainConfig
    from qlora_tools.training.distill_config import RefineConfig
    from qlora_tools.verbs.adapters import (
        ComparedAdapters,
        ComparedLayer,
        KeptAdapter,
        ResizeResult,
        SumResult,
        compare_adapters,
        list_adapters,
        resize_adapter,
        sum_adapters,
    )
    from qlora_tools.verbs.bench import BenchPlan, BenchResult, bench, layers_of, sweep
    from qlora_tools.verbs.calibrate import CalibrateResult, HeardInput, calibrate
    from qlora_tools.verbs.convert import ConvertResult, convert
    from qlora_tools.verbs.doctor import Check, Diagnosis, doctor
    from qlora_tools.verbs.estimate import EstimateConfig, EstimateResult, estimate
    from qlora_tools.verbs.evaluate import EvalResult, Judged, evaluate
    from qlora_tools.verbs.evaluate_outputs import JudgedOutputs, OutputsResult
    from qlora_tools.verbs.export import ExportedAdapter, ExportResult, export
    from qlora_tools.verbs.extract import ExtractResult, extract
    from qlora_tools.verbs.generate import Answer, GenerateResult, generate
    from qlora_tools.verbs.heal import HealConfig
    from qlora_tools.verbs.import_adapter import ImportResult, import_adapter
    from qlora_tools.verbs.init import InitResult, init
    from qlora_tools.verbs.inspect import Group, Inspection, inspect
    from qlora_tools.verbs.merge import MergeConfig, MergeResult, TensorRetention, merge
    from qlora_tools.verbs.quantize import QuantizeResult, quantize
    from qlora_tools.verbs.refine import RefineReport, RefineResult, refine
    from qlora_tools.verbs.report import Report, ReportResult, report
    from qlora_tools.verbs.syntax import JudgedSyntax, SyntaxResult, evaluate_syntax
    from qlora_tools.verbs.train import TrainReport, TrainResult, train
    from qlora_tools.verbs.verify import VerifyResult, verify

_HOMES = {
    "qlora_tools.bench.record": ("Case", "Workload"),
    "qlora_tools.demo.flow": (
        "DemoResult",
        "demo",
    ),
    "qlora_tools.stages.extract": ("ExtractConfig",),
    "qlora_tools.stages.init_adapter": ("InitConfig",),
    "qlora_tools.training.config": ("TrainConfig",),
    "qlora_tools.training.distill_config": ("RefineConfig",),
    "qlora_tools.verbs.adapters": (
        "ComparedAdapters",
        "ComparedLayer",
        "KeptAdapter",
        "ResizeResult",
        "SumResult",
        "compare_adapters",
        "list_adapters",
        "resize_adapter",
        "sum_adapters",
    ),
    "qlora_tools.verbs.bench": (
        "BenchPlan",
        "BenchResult",
        "bench",
        "layers_of",
        "sweep",
    ),
    "qlora_tools.verbs.calibrate": (
        "CalibrateResult",
        "HeardInput",
        "calibrate",
    ),
    "qlora_tools.verbs.convert": (
        "ConvertResult",
        "convert",
    ),
    "qlora_tools.verbs.doctor": (
        "Check",
        "Diagnosis",
        "doctor",
    ),
    "qlora_tools.verbs.estimate": (
        "EstimateConfig",
        "EstimateResult",
        "estimate",
    ),
    "qlora_tools.verbs.evaluate": (
        "EvalResult",
        "Judged",
        "evaluate",
    ),
    "qlora_tools.verbs.evaluate_outputs": (
        "JudgedOutputs",
        "OutputsResult",
    ),
    "qlora_tools.verbs.export": (
        "ExportResult",
        "ExportedAdapter",
        "export",
    ),
    "qlora_tools.verbs.extract": (
        "ExtractResult",
        "extract",
    ),
    "qlora_tools.verbs.generate": (
        "Answer",
        "GenerateResult",
        "generate",
    ),
    "qlora_tools.verbs.import_adapter": (
        "ImportResult",
        "import_adapter",
    ),
    "qlora_tools.verbs.init": (
        "InitResult",
        "init",
    ),
    "qlora_tools.verbs.inspect": (
        "Group",
        "Inspection",
        "inspect",
    ),
    "qlora_tools.verbs.heal": ("HealConfig",),
    "qlora_tools.verbs.merge": (
        "MergeConfig",
        "MergeResult",
        "TensorRetention",
        "merge",
    ),
    "qlora_tools.verbs.quantize": (
        "QuantizeResult",
        "quantize",
    ),
    "qlora_tools.verbs.refine": (
        "RefineReport",
        "RefineResult",
        "refine",
    ),
    "qlora_tools.verbs.report": (
        "Report",
        "ReportResult",
        "report",
    ),
    "qlora_tools.verbs.syntax": (
        "JudgedSyntax",
        "SyntaxResult",
        "evaluate_syntax",
    ),
    "qlora_tools.verbs.train": (
        "TrainReport",
        "TrainResult",
        "train",
    ),
    "qlora_tools.verbs.verify": (
        "VerifyResult",
        "verify",
    ),
}

__all__ = [
    "Answer",
    "BenchPlan",
    "BenchResult",
    "CalibrateResult",
    "Case",
    "Check",
    "ComparedAdapters",
    "ComparedLayer",
    "ConvertResult",
    "DemoResult",
    "Diagnosis",
    "EstimateConfig",
    "EstimateResult",
    "EvalResult",
    "ExportResult",
    "ExportedAdapter",
    "ExtractConfig",
    "ExtractResult",
    "GenerateResult",
    "Group",
    "HealConfig",
    "HeardInput",
    "ImportResult",
    "InitConfig",
    "InitResult",
    "Inspection",
    "Judged",
    "JudgedOutputs",
    "JudgedSyntax",
    "KeptAdapter",
    "MergeConfig",
    "MergeResult",
    "OutputsResult",
    "QuantizeResult",
    "RefineConfig",
    "RefineReport",
    "RefineResult",
    "Report",
    "ReportResult",
    "ResizeResult",
    "SumResult",
    "SyntaxResult",
    "TensorRetention",
    "TrainConfig",
    "TrainReport",
    "TrainResult",
    "VerifyResult",
    "Workload",
    "bench",
    "calibrate",
    "compare_adapters",
    "convert",
    "demo",
    "doctor",
    "estimate",
    "evaluate",
    "evaluate_syntax",
    "export",
    "extract",
    "generate",
    "import_adapter",
    "init",
    "inspect",
    "layers_of",
    "list_adapters",
    "merge",
    "quantize",
    "refine",
    "report",
    "resize_adapter",
    "sum_adapters",
    "sweep",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
