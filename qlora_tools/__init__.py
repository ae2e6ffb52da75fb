"""Quantization-aware LoRA compression and export.

The verbs live in :mod:`qlora_tools.api`; the command line, ``qlt``, is a thin layer over it.
Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
