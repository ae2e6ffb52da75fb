"""From a graph's file to a session of ONNX Runtime: provider, options, and whether decoding can be captured.

On CUDA a session is asked for graph capture first: a step of decoding is then replayed as one launch. ONNX Runtime refuses such a
session when a node is not CUDA's; it is then loaded again without, and says so in ``Loaded.uncaptured``.

How the runtime takes memory of the device is an :class:`Allocation`. There are two allocators: the session's arena for weights and
everything between, and the Python module's own for values made outside a session (keys and values of the past, logits); both follow it.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as bindings

from qlora_tools.errors import CorruptError, MissingError, OutOfMemory, UsageError
from qlora_tools.export.placement import RECORD
from qlora_tools.export.runtime.description import Description, as_text
from qlora_tools.export.runtime.stored import initializer_bytes

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
#: An environment variable: 0 runs every step without capture, whatever the files say.
SWITCH = "QLT_CUDA_GRAPH"
_CAPTURE = "enable_cuda_graph"
_INFORMATION, _ERRORS_ONLY = 1, 3
_EXTEND, _LIMIT, _WEIGHTS_OUTSIDE = "arena_extend_strategy", "gpu_mem_limit", "session.use_device_allocator_for_initializers"
_EXACT, _DOUBLING = "kSameAsRequested", "kNextPowerOfTwo"
#: What a folder's files may say about taking memory, left out where the runtime's defaults are asked for.
_ALLOCATING = {_EXTEND, _LIMIT, _WEIGHTS_OUTSIDE, "cudnn_conv_use_max_workspace", "enable_mem_pattern", "enable_cpu_mem_arena"}
_MODES = ("runtime", "deployed", "lean")
#: What allocators say; the last is an arena's at its limit.
_NO_ROOM = ("allocate memory", "out of memory", "bad_alloc", "is smaller than requested bytes")
_FIELDS = {"enable_cpu_mem_arena": "enable_cpu_mem_arena", "enable_mem_pattern": "enable_mem_pattern"}
_LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_LAYOUT", "ORT_ENABLE_ALL")


@dataclass(frozen=True)
class Allocation:
    """How memory of a device is taken; nothing changes on the CPU.

    ``runtime``: what texts are generated with: arenas grow by what is asked for, unless the folder's files say otherwise. ``deployed``: the
    defaults of ONNX Runtime, whose arenas grow by doubling, whatever the files say. ``lean``: by what is asked for, weights outside the arena,
    and every step of the arenas logged on standard error, for measuring. ``limit_bytes``: the most that the session's arena may hold.

    Raises:
        UsageError: another mode, or a limit below 1.
    """

    mode: str = "runtime"
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise UsageError(f"memory {self.mode!r}: expected one of {', '.join(_MODES)}")
        if self.limit_bytes is not None and self.limit_bytes < 1:
            raise UsageError(f"memory_limit is {self.limit_bytes} bytes, expected 1 or more")

    def provider_options(self, given: Mapping[str, str]) -> dict[str, str]:
        """The options of the device's provider; ``given`` are the files'."""
        if self.mode == "deployed":
            options = {name: value for name, value in given.items() if name not in _ALLOCATING}
        else:
            options = {_EXTEND: _EXACT, **given, **({_EXTEND: _EXACT} if self.mode == "lean" else {})}
        return {**options, _LIMIT: str(self.limit_bytes)} if self.limit_bytes is not None else options

    def session_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        if self.mode == "deployed":
            return {name: value for name, value in given.items() if name not in _ALLOCATING}
        return {**given, **({_WEIGHTS_OUTSIDE: "1"} if self.mode == "lean" else {})}

    def prepare(self) -> None:
        """The module's own allocator, which takes effect with its first value, and the log."""
        ort.set_default_logger_severity(_ERRORS_ONLY)  # the next call warns on standard error that it is deprecated; nothing else reaches this allocator
        if hasattr(bindings, "set_arena_extend_strategy"):
            bindings.set_arena_extend_strategy(getattr(bindings.ArenaExtendStrategy, _DOUBLING if self.mode == "deployed" else _EXACT))
        if self.mode == "lean":
            ort.set_default_logger_severity(_INFORMATION)

    def told(self, device: str) -> str | None:
        """For a record: what was asked for, ``None`` where it is the usual."""
        if self == Allocation():
            return None
        words = self.mode if self.limit_bytes is None else f"{self.mode}, at most {self.limit_bytes} bytes"
        return f"{words}: changes nothing on the CPU" if device == "cpu" else words


@dataclass(frozen=True)
class Loaded:
    """``captures``: runs with a graph id are captured and replayed. ``uncaptured``: why not, where it was asked for. ``memory``: :meth:`Allocation.told`."""

    session: Any
    captures: bool = False
    uncaptured: str | None = None
    memory: str | None = None


def load(path: Path, threads: int, device: str, description: Description, *, memory: str = "runtime", memory_limit: int | None = None) -> Loaded:
    """Load the graph at ``path``. ``memory``, ``memory_limit``: the mode and the bytes of an :class:`Allocation`.

    Raises:
        MissingError: no such file. UsageError: another mode; the device's provider is not in this onnxruntime, or does not start. CorruptError: ONNX
        Runtime refuses the graph. OutOfMemory: it does not fit.
    """
    if not path.is_file():
        raise MissingError(f"{path.parent} holds no {path.name}", hint="make an export with `qlt export`")
    check_device(device)
    allocation, options = Allocation(memory, memory_limit), dict[str, str]()
    told = allocation.told(device)
    if device != "cpu":
        options = allocation.provider_options(description.providers.get(device, {}))
        description = replace(description, session_options=allocation.session_options(description.session_options))
        allocation.prepare()
        _check_limit(path, memory_limit)
    if device == "cuda" and os.environ.get(SWITCH) == "0":
        options = {**options, _CAPTURE: "0"}
    wanted = device == "cuda" and description.shared_buffer and options.get(_CAPTURE, "1") == "1"
    if not wanted:
        return Loaded(_open(path, threads, device, options, description), memory=told)
    try:
        return Loaded(_open(path, threads, device, {**options, _CAPTURE: "1"}, description), captures=True, memory=told)
    except CorruptError as error:
        plain = _open(path, threads, device, {**options, _CAPTURE: "0"}, description)  # raises anew if capture was not the reason
        return Loaded(plain, uncaptured=str(error), memory=told)


def open_one_operator(*, device: str, memory: str = "lean") -> Any:
    """A session of one small product of matrices, run once: what the runtime takes of a device before it holds a model.

    Raises:
        As :func:`load`.
    """
    import numpy as np
    from onnx import TensorProto, helper

    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [16, 16]) for name in "xy")
    model = helper.make_model(helper.make_graph([node], "one", [x], [y]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with tempfile.TemporaryDirectory(prefix="qlt-") as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model.SerializeToString())
        session = load(path, 1, device, Description(), memory=memory).session
    session.run(None, {"x": np.ones((16, 16), np.float32)})
    return session


def _check_limit(path: Path, limit_bytes: int | None) -> None:
    """An arena whose weights exceed its limit has none: ONNX Runtime 1.31 takes the difference without a sign.

    Raises:
        OutOfMemory: the weights alone are more than the limit. CorruptError: not a graph.
    """
    if limit_bytes is not None and (found := initializer_bytes(path)) > limit_bytes:
        raise OutOfMemory(f"{path} holds {found} bytes of weights, more than the limit of {limit_bytes}", hint="raise memory_limit")


def check_device(device: str) -> None:
    """Raises:
    UsageError: a device without a provider in this onnxruntime.
    """
    if device not in PROVIDERS or PROVIDERS[device] not in ort.get_available_providers():
        raise UsageError(f"device `{device}`: this onnxruntime has no provider for it", hint=f"it has {', '.join(ort.get_available_providers())}")


def named_failure(error: Exception, path: Path, did: str = "run") -> Exception:
    """The error to raise for one of ONNX Runtime's while it loads or runs ``path``."""
    text = str(error)
    if any(words in text.lower() for words in _NO_ROOM):
        return OutOfMemory(f"{path} does not fit into the device's memory: {text[:300]}", hint="use a smaller scheme, a shorter text or a smaller batch")
    return CorruptError(f"{path} does not {did} in onnxruntime {ort.__version__}: {text}", hint="export again with this version")


def is_runtime_error(error: Exception) -> bool:
    """True for exceptions of ONNX Runtime's own."""
    return type(error).__module__.startswith("onnxruntime")


def _open(path: Path, threads: int, device: str, options: Mapping[str, str], description: Description) -> Any:
    provider = PROVIDERS[device]
    said = _find_libraries() if device == "cuda" else ""
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
            hint="run `qlt doctor`; for CUDA, a GPU and the libraries that onnxruntime names above are needed" + (f". It said: {said}" if said else ""),
        )
    return session


def _find_libraries() -> str:
    """CUDA and cuDNN out of installed packages, without importing torch; what could not be loaded. It speaks on standard output, which is not ours to use."""
    if not hasattr(ort, "preload_dlls"):
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as heard:
        ort.preload_dlls()
    return "; ".join(line.strip() for line in heard.getvalue().splitlines() if "ail" in line)[:500]


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
            _add_entry(options, name, as_text(value))
    return options


def _add_entry(options: Any, name: str, text: str) -> None:
    """Raises:
    CorruptError: ONNX Runtime takes no such text: it is too long, or half of a character.
    """
    try:
        options.add_session_config_entry(name, text)
    except (RuntimeError, TypeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise CorruptError(f"onnxruntime refuses {name} = {text[:40]!r}, from genai_config.json: {said}", hint="export again") from error
