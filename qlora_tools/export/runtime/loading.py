"""From a graph's file to a session of ONNX Runtime: provider, options, and whether decoding can be captured.

On CUDA a session is asked for graph capture first: a step of decoding is then replayed as one launch. ONNX Runtime refuses such a
session when a node is not CUDA's; it is then loaded again without, and says so in ``Loaded.uncaptured``.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from qlora_tools.errors import CorruptError, MissingError, OutOfMemory, UsageError
from qlora_tools.export.placement import RECORD
from qlora_tools.export.runtime.description import Description

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CAPTURE = "enable_cuda_graph"
_ERRORS_ONLY = 3
_FIELDS = {"enable_cpu_mem_arena": "enable_cpu_mem_arena", "enable_mem_pattern": "enable_mem_pattern"}
_LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_LAYOUT", "ORT_ENABLE_ALL")


@dataclass(frozen=True)
class Loaded:
    """``captures``: runs with a graph id are captured and replayed. ``uncaptured``: why not, where it was asked for."""

    session: Any
    captures: bool = False
    uncaptured: str | None = None


def load(path: Path, threads: int, device: str, description: Description) -> Loaded:
    """Load the graph at ``path``.

    Raises:
        MissingError: no such file. UsageError: the device's provider is not in this onnxruntime, or does not start. CorruptError: ONNX
        Runtime refuses the graph. OutOfMemory: it does not fit.
    """
    if not path.is_file():
        raise MissingError(f"{path.parent} holds no {path.name}", hint="make an export with `qlt export`")
    check_device(device)
    options = {"arena_extend_strategy": "kSameAsRequested", **description.providers.get(device, {})} if device != "cpu" else {}
    wanted = device == "cuda" and description.shared_buffer and options.get(_CAPTURE, "1") == "1"
    if not wanted:
        return Loaded(_open(path, threads, device, options, description))
    try:
        return Loaded(_open(path, threads, device, {**options, _CAPTURE: "1"}, description), captures=True)
    except CorruptError as error:
        plain = _open(path, threads, device, {**options, _CAPTURE: "0"}, description)  # raises anew if capture was not the reason
        return Loaded(plain, uncaptured=str(error))


def check_device(device: str) -> None:
    """Raises:
    UsageError: a device without a provider in this onnxruntime.
    """
    if device not in PROVIDERS or PROVIDERS[device] not in ort.get_available_providers():
        raise UsageError(f"device `{device}`: this onnxruntime has no provider for it", hint=f"it has {', '.join(ort.get_available_providers())}")


def named_failure(error: Exception, path: Path, did: str = "run") -> Exception:
    """The error to raise for one of ONNX Runtime's while it loads or runs ``path``."""
    text = str(error)
    if "llocate memory" in text or "out of memory" in text.lower() or "bad_alloc" in text:
        return OutOfMemory(f"{path} does not fit into the device's memory: {text[:300]}", hint="use a smaller scheme, a shorter text or a smaller batch")
    return CorruptError(f"{path} does not {did} in onnxruntime {ort.__version__}: {text}", hint="export again with this version")


def is_runtime_error(error: Exception) -> bool:
    """True for exceptions of ONNX Runtime's own."""
    return type(error).__module__.startswith("onnxruntime")


def _open(path: Path, threads: int, device: str, options: Mapping[str, str], description: Description) -> Any:
    provider = PROVIDERS[device]
    if device == "cuda":
        _find_libraries()
    providers: list[Any] = [provider] if device == "cpu" else [(provider, dict(options)), PROVIDERS["cpu"]]
    session_options = _session_options(threads, device, description)
    try:
        # its own way of falling back speaks on standard output and drops the options
        session = ort.InferenceSession(os.fspath(path), session_options, providers=providers, enable_fallback=0)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"device `{device}`: {provider} does not start here: {error}", hint="run `qlt doctor`") from error
    except Exception as error:
        if not is_runtime_error(error):
            raise
        raise named_failure(error, path, "load") from error
    if session.get_providers()[0] != provider:
        raise UsageError(
            f"device `{device}`: {provider} does not start here, onnxruntime fell back to {session.get_providers()[0]}",
            hint="run `qlt doctor`; for CUDA, a GPU and the libraries that onnxruntime names above are needed",
        )
    return session


def _find_libraries() -> None:
    """CUDA and cuDNN out of installed packages, without importing torch. It speaks on standard output, which is not ours to use."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _session_options(threads: int, device: str, description: Description) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    if device != "cpu":
        options.add_session_config_entry(*RECORD)
    for name, value in description.session_options.items():
        if name in _FIELDS:
            setattr(options, _FIELDS[name], bool(value))
        elif name == "graph_optimization_level":
            if value not in _LEVELS:
                raise CorruptError(f"{name} is {value!r} in genai_config.json, expected one of {', '.join(_LEVELS)}", hint="export again")
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, value)
        else:
            options.add_session_config_entry(name, str(int(value)) if isinstance(value, bool) else str(value))
    return options
