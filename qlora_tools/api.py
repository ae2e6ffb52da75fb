"""The library's public face: one keyword-only function per verb, each returning a frozen record.

>>> from qlora_tools import api
>>> api.quantize(model="base", scheme="nf4")  # doctest: +SKIP
"""

from qlora_tools.stages.extract import ExtractConfig
from qlora_tools.verbs.doctor import Check, Diagnosis, doctor
from qlora_tools.verbs.extract import ExtractResult, extract
from qlora_tools.verbs.inspect import Group, Inspection, inspect
from qlora_tools.verbs.merge import MergeResult, TensorRetention, merge
from qlora_tools.verbs.quantize import QuantizeResult, quantize

__all__ = ["Check", "Diagnosis", "ExtractConfig", "ExtractResult", "Group", "Inspection", "MergeResult", "QuantizeResult", "TensorRetention", "doctor", "extract", "inspect", "merge", "quantize"]
