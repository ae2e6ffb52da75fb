"""An exported decoder in ONNX Runtime: prompts, single steps, whole-text scoring, and text as it comes.

Everything but token ids and logits stays on the device, and steps reuse their buffers. Prompts of different lengths are padded on the
right: GroupQueryAttention counts a sequence's positions from its mask alone, and the next token overwrites the padding; plain ONNX
attention, whose past grows by what it is given, takes prompts of one length only. A graph without a past (a traced one) reads the whole
text again for each token. On CUDA a step is captured as a graph once and then replayed (see ``loading.py``): its inputs are updated in
place, and its mask has the length of the buffer from the beginning.

Axes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qlora_tools.errors import CorruptError, UnsupportedError, UsageError
from qlora_tools.export.placement import Placed, assigned
from qlora_tools.export.runtime.adapters import Adapter, adapters_beside, factor_inputs, find_adapter, read_adapter
from qlora_tools.export.runtime.cache import Cache, GrowingCache, SharedCache, Slot
from qlora_tools.export.runtime.description import Description, describe
from qlora_tools.export.runtime.loading import is_runtime_error, load, named_failure
from qlora_tools.export.runtime.sampling import GREEDY, Sampler, Sampling
from qlora_tools.export.runtime.stored import initializer_bytes
from qlora_tools.export.runtime.values import INTEGERS, empty, filled, kind_of, on_host, read, vector, widened

_KEEP = "num_logits_to_keep"
_PAST, _PRESENT = "past_key_values.", "present."
_IDS, _MASK, _POSITIONS, _LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
_NOT_CAPTURED = -1
#: Metadata of graphs that turn queries and keys at other frequencies once a sequence is longer than this.
_SWITCH = "rotary_switch"


class DecoderSession:
    """A loaded graph, the past of one batch of sequences, and the adapter in use. ``device``: ``cpu``, ``cuda``, or ``auto``, the graph's own.

    ``memory``, ``memory_limit``: how the device's memory is taken, see ``loading.Allocation``.

    Raises:
        MissingError: no graph in ``folder``. UsageError: the device's provider is not in this onnxruntime.
        CorruptError: ONNX Runtime refuses the graph. UnsupportedError: not a decoder.
    """

    def __init__(
        self, folder: Path, *, threads: int, device: str = "cpu", file_name: str = "model.onnx", memory: str = "runtime", memory_limit: int | None = None
    ) -> None:
        described = describe(folder)
        device = described.device if device == "auto" else device
        self._folder, self._path, self._device, self._threads = folder, folder / file_name, device, threads
        self._loaded = load(self._path, threads, device, described, memory=memory, memory_limit=memory_limit)
        self._session = self._loaded.session
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        _check_decoder(self._path, self._inputs, outputs)
        self._logits_kind = kind_of(outputs[_LOGITS])
        self._vocab = int(outputs[_LOGITS].shape[-1])
        slots = _slots(list(self._inputs.values()), described)
        self._presents = [slot.present for slot in slots]
        self._pasts = [slot.past for slot in slots]
        self._cache: Cache = SharedCache(slots, device, described.context_length) if described.shared_buffer else GrowingCache(slots, device)
        self._shared, self._max_length = described.shared_buffer, described.context_length
        self._slots = slots
        self._keeps = any(value.name == _KEEP for value in self._session.get_overridable_initializers())
        self._switch = int(self._session.get_modelmeta().custom_metadata_map.get(_SWITCH, 0))
        self._text: list[NDArray[np.int64]] = []
        self._factor_inputs = factor_inputs(self._session)
        self._adapter: Adapter | None = None
        self._lengths_B: NDArray[np.int64] = np.zeros(0, np.int64)
        self._logits: ort.OrtValue | None = None
        self._fixed: dict[str, ort.OrtValue] = {}
        self._graph_ids: dict[Path | None, int] = {}
        self._last_graph_id = 0
        self._device_handle = ort.OrtDevice.make(device, 0)._get_c_device()

    # ---- what a reader of logits asks ----

    def prefill(self, ids_BT: NDArray[np.int64], lengths_B: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Forget any past, run the prompts, and give the logits [B, V] that follow the last token of each.

        ``lengths_B``: how many of each row's ids are prompt; what lies behind them is padding of any value.
        """
        batch, width = ids_BT.shape
        lengths_B = np.full(batch, width, np.int64) if lengths_B is None else np.asarray(lengths_B, np.int64)
        if not width or lengths_B.min() < 1 or lengths_B.max() > width:
            raise UsageError(f"prompts of {lengths_B.min()} to {lengths_B.max()} tokens in rows of {width}: each needs one at least")
        if not self._shared and self._slots and lengths_B.min() != width:
            raise UnsupportedError("this graph's past only grows, so prompts of one batch must have one length", hint="run them one by one")
        self._check_room(width)
        self._restart(batch, width, 2 * width)
        self._lengths_B = lengths_B
        if self._switch or not self._slots:
            self._text = [row[:length] for row, length in zip(ids_BT, lengths_B, strict=True)]
        return self._step(ids_BT, lengths_B, started=False)

    def decode(self, tokens_B: NDArray[np.int64]) -> NDArray[Any]:
        """Append one token per sequence and give the logits [B, V] that follow it."""
        if not self._lengths_B.size:
            raise UsageError("decode before prefill: there is no past to continue")
        longest = int(self._lengths_B.max())
        self._check_room(longest + 1)
        if longest <= self._switch or not self._slots:
            self._text = [np.append(row, token) for row, token in zip(self._text, tokens_B, strict=True)]
            if longest == self._switch or not self._slots:
                return self._read_again()
        if self._cache.make_room(longest + 1, longest):
            self._forget_captures()
        self._lengths_B = self._lengths_B + 1
        return self._step(tokens_B[:, None], np.ones(len(tokens_B), np.int64), started=True)

    def score(self, ids_BT: NDArray[np.int64]) -> NDArray[Any]:
        """Logits [B, T, V] of every position, without touching the past that :meth:`decode` continues."""
        batch, width = ids_BT.shape
        self._check_room(width)
        feeds = self._whole_inputs(ids_BT, np.ones((batch, width), np.int64), np.zeros(batch, np.int64))
        feeds |= {slot.past: empty(slot.kind, slot.shape(batch, 0), self._device) for slot in self._slots}
        logits = empty(self._logits_kind, (batch, width, self._vocab), self._device)
        self._run(feeds, {_LOGITS: logits}, _NOT_CAPTURED)
        return self._on_host(logits)

    def generate(
        self,
        ids_BT: NDArray[np.int64],
        new_tokens: int,
        stop: frozenset[int] = frozenset(),
        *,
        sampling: Sampling = GREEDY,
        lengths_B: NDArray[np.int64] | None = None,
    ) -> Iterator[NDArray[np.int64]]:
        """Continuation, one int64 [B] at a time; ends early when every sequence has met a token of ``stop``."""
        prompts = [row[: None if lengths_B is None else int(lengths_B[number])] for number, row in enumerate(ids_BT)]
        sampler = Sampler(sampling, prompts)
        batch, width = ids_BT.shape
        room = min(width + new_tokens - 1, self._max_length or width + new_tokens)
        self._restart(batch, room, room)
        logits_BV = self.prefill(ids_BT, lengths_B)
        finished_B = np.zeros(len(ids_BT), bool)
        for step in range(new_tokens):
            tokens_B = sampler.choose(logits_BV)
            yield tokens_B
            finished_B |= np.isin(tokens_B, list(stop))
            if finished_B.all() or step + 1 == new_tokens:
                return
            logits_BV = self.decode(tokens_B)

    def _read_again(self) -> NDArray[Any]:
        """The whole text anew: the graph keeps no past, or the longest sequence outgrew the frequencies at which its past was turned."""
        lengths_B = np.array([len(row) for row in self._text], np.int64)
        ids_BT = np.zeros((len(lengths_B), lengths_B.max()), np.int64)
        for row, ids in zip(ids_BT, self._text, strict=True):
            row[: len(ids)] = ids
        return self.prefill(ids_BT, lengths_B)

    # ---- adapters ----

    @property
    def adapters(self) -> Mapping[str, Path]:
        """The export's own adapter files, by name."""
        return adapters_beside(self._folder)

    def use(self, adapter: str | Path | None) -> None:
        """Put an adapter on the model in place of the one before, or none; the weights stay as they are, the past is forgotten.

        Raises:
            MissingError: no such name or file. CorruptError: not an adapter. IncompatibleError: it is not for this graph; the one before stays.
        """
        found = None if adapter is None else read_adapter(find_adapter(self._folder, adapter), self._factor_inputs, self._device)
        if found is not None and found.path in self._graph_ids:
            self._forget_captures()  # the same name, but other buffers
        self._adapter = found
        self._lengths_B = np.zeros(0, np.int64)

    # ---- the rest ----

    @property
    def max_length(self) -> int | None:
        """Positions that a text may have, if the export says so."""
        return self._max_length

    @property
    def vocab_size(self) -> int:
        return self._vocab

    def nodes(self) -> tuple[Placed, ...]:
        """Which provider runs each node. On the CPU there is no choice, and no record of it."""
        return () if self._device == "cpu" else assigned(self._session)

    def info(self) -> Mapping[str, Any]:
        """What a benchmark's record keeps about the engine."""
        facts: dict[str, Any] = {
            "runtime": f"onnxruntime {ort.__version__}",
            "device": self._device,
            "provider": self._session.get_providers()[0],
            "vocab_size": self._vocab,
            "weights_bytes": initializer_bytes(self._path),
            "threads": self._threads,
            "max_length": self._max_length,
            "nodes": dict(Counter(node.provider for node in self.nodes())) or None,
            "adapter": None if self._adapter is None else self._adapter.path.name,
            "memory": self._loaded.memory,
            "graph_capture": None if self._device == "cpu" else self._loaded.uncaptured or ("on" if self._loaded.captures else "off"),
        }
        return {name: value for name, value in facts.items() if value is not None}

    def close(self) -> None:
        """Free the session and its buffers."""
        self._cache.pasts = []
        self._fixed, self._logits, self._adapter, self._session = {}, None, None, None
        self._loaded = replace(self._loaded, session=None)

    # ---- one run ----

    def _step(self, ids_BT: NDArray[np.int64], new_B: NDArray[np.int64], *, started: bool) -> NDArray[Any]:
        """Run new positions, of which ``new_B`` count, after the past ones, and return the logits [B, V] of the last that counts."""
        batch, width = ids_BT.shape
        total = int(self._lengths_B.max())
        captured = self._loaded.captures and started
        seen_BT = (np.arange(self._cache.capacity if captured else total) < self._lengths_B[:, None]).astype(np.int64)
        past_B = self._lengths_B - new_B
        kept = width - int(new_B.min()) + 1 if self._keeps else width
        logits = self._logits_buffer(batch, kept)
        feeds = self._fixed_inputs(ids_BT, seen_BT, past_B) if captured else self._whole_inputs(ids_BT, seen_BT, past_B)
        if self._keeps:
            feeds[_KEEP] = on_host(np.array([kept], np.int64))
        feeds |= dict(zip(self._pasts, self._cache.pasts, strict=True))
        presents = self._cache.presents(total)
        self._run(feeds, {_LOGITS: logits, **dict(zip(self._presents, presents, strict=True))}, self._graph_id() if captured else _NOT_CAPTURED)
        self._cache.accept(presents)
        last_BV: NDArray[Any] = self._on_host(logits)[np.arange(batch), new_B - 1 - (width - kept)]
        return last_BV

    def _whole_inputs(self, ids_BT: NDArray[np.int64], mask_BT: NDArray[np.int64], past_B: NDArray[np.int64]) -> dict[str, ort.OrtValue]:
        return {name: on_host(content) for name, content in self._contents(ids_BT, mask_BT, past_B).items()}

    def _fixed_inputs(self, ids_BT: NDArray[np.int64], mask_BT: NDArray[np.int64], past_B: NDArray[np.int64]) -> dict[str, ort.OrtValue]:
        """The same in buffers on the device that a captured step reads each time."""
        contents = self._contents(ids_BT, mask_BT, past_B)
        if not self._fixed:
            self._fixed = {name: filled(kind_of(self._inputs[name]), content, self._device) for name, content in contents.items()}
        else:
            for name, content in contents.items():
                self._fixed[name].update_inplace(content)
        return dict(self._fixed)

    def _contents(self, ids_BT: NDArray[np.int64], mask_BT: NDArray[np.int64], past_B: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What the graph reads beside pasts, in its own integer types."""
        contents = {_IDS: ids_BT, _MASK: mask_BT, _POSITIONS: past_B[:, None] + np.arange(ids_BT.shape[1])}
        return {name: np.ascontiguousarray(content, INTEGERS[self._inputs[name].type].carrier) for name, content in contents.items() if name in self._inputs}

    def _run(self, feeds: dict[str, ort.OrtValue], outputs: dict[str, ort.OrtValue], graph_id: int) -> None:
        if self._adapter is not None:
            feeds = {**feeds, **self._adapter.factors}
        options = ort.RunOptions()
        if self._loaded.captures:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        devices = [self._device_handle] * len(outputs)
        try:
            self._session.run_with_ortvaluevector(options, list(feeds), vector(list(feeds.values())), list(outputs), vector(list(outputs.values())), devices)
        except Exception as error:
            if not is_runtime_error(error):
                raise
            raise named_failure(error, self._path) from error

    def _logits_buffer(self, batch: int, kept: int) -> ort.OrtValue:
        """Steps write into one buffer, again and again; a whole prompt's logits get their own."""
        if kept > 1:
            return empty(self._logits_kind, (batch, kept, self._vocab), self._device)
        if self._logits is None or self._logits.shape()[0] != batch:
            self._forget_captures()
            self._logits = empty(self._logits_kind, (batch, 1, self._vocab), self._device)
        return self._logits

    def _on_host(self, logits: ort.OrtValue) -> NDArray[Any]:
        """On the CPU the buffer itself: what is kept of a step must be copied."""
        return widened(self._logits_kind, read(self._logits_kind, logits))

    # ---- room and captured graphs ----

    def _restart(self, batch: int, needed: int, wanted: int) -> None:
        before = self._cache.pasts[:1]
        self._cache.start(batch, needed, wanted)
        if self._cache.pasts[:1] != before:
            self._forget_captures()

    def _check_room(self, positions: int) -> None:
        if self._max_length and positions > self._max_length:
            raise UsageError(f"{positions} positions are more than the model's {self._max_length}", hint="use a shorter prompt or fewer new tokens")

    def _graph_id(self) -> int:
        """The number of the captured step for the buffers in use and the adapter; a new one for each combination."""
        key = None if self._adapter is None else self._adapter.path
        if key not in self._graph_ids:
            self._last_graph_id += 1
            self._graph_ids[key] = self._last_graph_id
        return self._graph_ids[key]

    def _forget_captures(self) -> None:
        """After a buffer was replaced: captured steps would write into the old one."""
        self._fixed = {}
        for graph_id in self._graph_ids.values():
            if hasattr(self._session, "release_captured_graph"):
                self._session.release_captured_graph(graph_id)
        self._graph_ids = {}


def _check_decoder(path: Path, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Raises:
    UnsupportedError: the graph does not go from tokens to logits of a vocabulary, or wants something that a text does not give.
    """
    foreign = [name for name in inputs if name not in (_IDS, _MASK, _POSITIONS) and not name.startswith(_PAST)]
    logits = list(outputs[_LOGITS].shape) if _LOGITS in outputs else None
    if _IDS not in inputs:
        wrong = f"it has no `{_IDS}`"
    elif logits is None:
        wrong = f"it has no `{_LOGITS}`"
    elif foreign:
        wrong = f"it reads `{foreign[0]}`"
    elif len(logits) != 3 or not isinstance(logits[2], int):
        wrong = f"its logits are {logits}, expected [sequences, positions, vocabulary]"
    else:
        return
    raise UnsupportedError(f"{path} is no decoder of text: {wrong}", hint="give an export of a language model")


def _slots(inputs: list[Any], described: Description) -> list[Slot]:
    """The graph's pasts. Sizes are the inputs' own, a head size left open is the model's.

    Raises:
        CorruptError: sizes that nothing tells.
    """
    slots = []
    for value in inputs:
        if value.name.startswith(_PAST):
            heads, size = value.shape[1], value.shape[3] if isinstance(value.shape[3], int) else described.head_size
            if not isinstance(heads, int) or size is None:
                raise CorruptError(f"input `{value.name}` is {value.shape}: heads and their size must be numbers", hint="export again")
            slots.append(Slot(value.name, value.name.replace(_PAST, _PRESENT), kind_of(value), heads, size))
    return slots


def open_engine(
    folder: str, *, threads: int, device: str = "cpu", adapter: str | None = None, memory: str = "runtime", memory_limit: int | None = None
) -> DecoderSession:
    """The factory that a benchmark names; see :class:`DecoderSession`. ``adapter``: a name or file for :meth:`DecoderSession.use`.

    ``memory`` and ``memory_limit`` (bytes): how the device's memory is taken, see :class:`~qlora_tools.export.runtime.loading.Allocation`.
    """
    session = DecoderSession(Path(folder), threads=threads, device=device, memory=memory, memory_limit=memory_limit)
    if adapter is not None:
        session.use(adapter)
    return session
