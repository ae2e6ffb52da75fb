"""The operators a decoder is spelt in: ONNX Runtime's own, which are fast there, or plain ONNX for everybody."""

from qlora_tools.export.dialects.contrib import Contrib
from qlora_tools.export.dialects.dialect import Dialect
from qlora_tools.export.dialects.standard import Standard
from qlora_tools.export.target import Target


def dialect_of(target: Target) -> Dialect:
    """The operators that graphs for ``target`` are spelt in."""
    return Standard() if target.standard else Contrib()
