"""An exported decoder in ONNX Runtime: prompt, single steps, whole-text scoring, greedy text.

Each layer's past and present are one preallocated buffer, bound as both, so that a step neither copies nor
allocates it; the buffer grows by doubling when the text outgrows it. On the device side everything stays an
``OrtValue``; only token ids go in and logits come out. Imports no torch: measuring processes load this file.

Axes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

from qlora_tools.errors import CorruptError, MissingError, UsageError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_KEEP = "num_logits_to_keep"
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_FIRST_CAPACITY = 256
_ERRORS_ONLY = 3


def open_engine(folder: str, *, threads: int, device: str = "cpu") -> DecoderSession:
    """The factory that a benchmark names; see :class:`DecoderSession`."""
    return DecoderSession(Path(folder), threads=threads, device=device)


class DecoderSession:
    """A loaded graph and the past of one batch of sequences.

    Raises:
        MissingError: no graph in ``folder``. UsageError: the device's provider is not in this onnxruntime.
        CorruptError: ONNX Runtime refuses the graph.
    """

    def __init__(self, folder: Path, *, threads: int, device: str = "cpu", file_name: str = "model.onnx") -> None:
        self._path = folder / file_name
        if not self._path.is_file():
            raise MissingError(f"{folder} holds no {file_name}", hint="make an export with `qlt export`")
        if device not in _PROVIDERS or _PROVIDERS[device] not in ort.get_available_providers():
            raise UsageError(f"device `{device}`: this onnxruntime has no provider for it", hint=f"it has {', '.join(ort.get_available_providers())}")
        self._device, self._threads = device, threads
        self._session = _load(self._path, threads, device)
        self._pasts = [value for value in self._session.get_inputs() if value.name.startswith("past_key_values.")]
        self._presents = [value.name.replace("past_key_values", "present") for value in self._pasts]
        self._logits = next(value for value in self._session.get_outputs() if value.name == "logits")
        self._float = _FLOATS[self._logits.type]
        self._cache_float = _FLOATS[self._pasts[0].type] if self._pasts else np.float32
        self._keeps = any(value.name == _KEEP for value in self._session.get_overridable_initializers())
        self._vocab = int(self._logits.shape[-1])
        described = _genai_decoder(folder)
        self._max_length: int | None = described.get("context_length")
        self._cache_sizes = [(value.shape[1], value.shape[3] if isinstance(value.shape[3], int) else described["head_size"]) for value in self._pasts]
        self._cache: list[ort.OrtValue] = []
        self._capacity = self._length = 0

    def prefill(self, ids_BT: NDArray[np.int64]) -> NDArray[Any]:
        """Forget any past, run the prompt, and give the logits [B, V] that follow its last token."""
        batch, length = ids_BT.shape
        self._length = 0
        if not self._cache or self._cache[0].shape()[0] != batch or self._capacity < length:
            self._reserve(batch, length, keep=False)
        return self._step(ids_BT)

    def decode(self, tokens_B: NDArray[np.int64]) -> NDArray[Any]:
        """Append one token per sequence and give the logits [B, V] that follow it."""
        if not self._length:
            raise UsageError("decode before prefill: there is no past to continue")
        if self._length + 1 > self._capacity:
            self._reserve(len(tokens_B), self._length + 1, keep=True)
        return self._step(tokens_B[:, None])

    def score(self, ids_BT: NDArray[np.int64]) -> NDArray[Any]:
        """Logits [B, T, V] of every position, without touching the past that :meth:`decode` continues."""
        batch, length = ids_BT.shape
        feeds: dict[str, Any] = {"input_ids": np.ascontiguousarray(ids_BT, np.int64), "attention_mask": np.ones((batch, length), np.int64)}
        for value, (heads, size) in zip(self._pasts, self._cache_sizes, strict=True):
            feeds[value.name] = np.zeros((batch, heads, 0, size), self._cache_float)
        logits: NDArray[Any] = self._session.run(["logits"], feeds)[0]
        return logits

    def generate(self, ids_BT: NDArray[np.int64], new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[NDArray[np.int64]]:
        """Greedy continuation, one int64 [B] at a time; ends early when every sequence has met a token of ``stop``."""
        logits_BV = self.prefill(ids_BT)
        finished_B = np.zeros(len(ids_BT), bool)
        for step in range(new_tokens):
            tokens_B = logits_BV.argmax(-1).astype(np.int64)
            yield tokens_B
            finished_B |= np.isin(tokens_B, list(stop))
            if finished_B.all() or step + 1 == new_tokens:
                return
            logits_BV = self.decode(tokens_B)

    def info(self) -> Mapping[str, Any]:
        """What a benchmark's record keeps about the engine."""
        data = self._path.with_name(f"{self._path.name}.data")
        facts: dict[str, Any] = {
            "runtime": f"onnxruntime {ort.__version__}",
            "device": self._device,
            "provider": self._session.get_providers()[0],
            "vocab_size": self._vocab,
            "weights_bytes": data.stat().st_size if data.is_file() else self._path.stat().st_size,
            "threads": self._threads,
        }
        return facts | ({"max_length": self._max_length} if self._max_length else {})

    def close(self) -> None:
        """Free the session and its buffers."""
        self._cache = []
        self._session = None

    def _step(self, ids_BT: NDArray[np.int64]) -> NDArray[Any]:
        """Run new positions after the ``_length`` past ones, in place, and return the last position's logits [B, V]."""
        batch, new = ids_BT.shape
        total = self._length + new
        if self._max_length and total > self._max_length:
            raise UsageError(f"{total} positions are more than the model's {self._max_length}", hint="use a shorter prompt or fewer new tokens")
        feeds = {"input_ids": np.ascontiguousarray(ids_BT, np.int64), "attention_mask": np.ones((batch, total), np.int64)}
        if self._keeps:
            feeds[_KEEP] = np.ones(1, np.int64)
        kept = 1 if self._keeps else new
        logits = ort.OrtValue.ortvalue_from_shape_and_type([batch, kept, self._vocab], self._float, self._device, 0)
        inputs, outputs = OrtValueVector(), OrtValueVector()
        alive = [ort.OrtValue.ortvalue_from_numpy(array) for array in feeds.values()]
        for value in (*alive, *self._cache):
            inputs.push_back(value._ortvalue)
        for value in (logits, *self._cache):
            outputs.push_back(value._ortvalue)
        names = ["logits", *self._presents]
        devices = [ort.OrtDevice.make(self._device, 0)._get_c_device()] * len(names)
        self._session.run_with_ortvaluevector(ort.RunOptions(), [*feeds, *(value.name for value in self._pasts)], inputs, names, outputs, devices)
        self._length = total
        last: NDArray[Any] = logits.numpy()[:, -1]
        return last

    def _reserve(self, batch: int, needed: int, *, keep: bool) -> None:
        """Buffers for at least ``needed`` positions, the past copied over if ``keep``."""
        capacity = max(_FIRST_CAPACITY, 2 * needed)
        capacity = max(needed, min(capacity, self._max_length or capacity))
        grown = []
        for position, (heads, size) in enumerate(self._cache_sizes):
            fresh = np.zeros((batch, heads, capacity, size), self._cache_float)
            if keep:
                fresh[:, :, : self._length] = self._cache[position].numpy()[:, :, : self._length]
            grown.append(_owned(fresh, self._device))
        self._cache, self._capacity = grown, capacity


def _load(path: Path, threads: int, device: str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    provider = _PROVIDERS[device]
    providers: list[Any] = [provider] if device == "cpu" else [(provider, {"arena_extend_strategy": "kSameAsRequested"}), _PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(os.fspath(path), options, providers=providers)
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise CorruptError(f"{path} does not load in onnxruntime {ort.__version__}: {error}", hint="export again with this version") from error
        raise
    if session.get_providers()[0] != provider:
        raise UsageError(f"onnxruntime fell back from {provider} to {session.get_providers()[0]}", hint="run `qlt doctor`")
    return session


def _owned(array: NDArray[Any], device: str) -> ort.OrtValue:
    """``array`` in a buffer of the runtime's own: one made from numpy on the CPU would share numpy's memory and alignment."""
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, device, 0)
    value.update_inplace(array)
    return value


def _genai_decoder(folder: Path) -> dict[str, int]:
    """``context_length`` and ``head_size`` from genai_config.json beside the graph; empty without one."""
    path = folder / "genai_config.json"
    if not path.is_file():
        return {}
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        return {"context_length": int(model["context_length"]), "head_size": int(model["decoder"]["head_size"])}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path} holds no context_length and head_size", hint="export again") from error
