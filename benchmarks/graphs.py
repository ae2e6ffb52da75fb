"""What exported decoders cost and what they lose, many graphs alike: milliseconds of a prompt and of a step, KL to a reference graph.

A graph is anything with the methods of :class:`~qlora_tools.export.runtime.DecoderSession`. :class:`PlainGraph` gives them to graphs that take
``position_ids`` and hand out new present tensors at every step, as Optimum's do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from measured import against_itself, median

from qlora_tools.bench.pairs import compare
from qlora_tools.export.runtime import DecoderSession

PROMPT, STEPS, WINDOWS = 128, 16, 8
#: Below six loads a ratio of times has no interval worth the name.
_WARM_UP, _LOADS = 1, 6
#: Above this much data the graphs are loaded one after another instead of side by side.
_TOGETHER_BYTES = 4 << 30


#: Phase -> graph -> for every load its rounds, in milliseconds.
Times = dict[str, dict[str, list[list[float]]]]


class Graph(Protocol):
    """A loaded decoder; ids are i64 [B, T], tokens i64 [B], logits fp32."""

    def prefill(self, ids_BT: np.ndarray) -> np.ndarray: ...
    def decode(self, tokens_B: np.ndarray) -> np.ndarray: ...
    def score(self, ids_BT: np.ndarray) -> np.ndarray: ...
    def close(self) -> None: ...


class PlainGraph:
    """A decoder graph run as its inputs ask, each step's presents bound as the next step's pasts without a copy."""

    def __init__(self, folder: Path, *, threads: int, file_name: str = "model.onnx") -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._session = ort.InferenceSession(str(folder / file_name), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in self._session.get_inputs()]
        self._pasts = [name for name in names if name.startswith("past_key_values.")]
        self._positioned = "position_ids" in names
        config = json.loads((folder / "config.json").read_text())
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        self._empty = np.zeros((1, heads, 0, config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]), np.float32)
        self._past: list[ort.OrtValue] = []
        self._length = 0

    def prefill(self, ids_BT: np.ndarray) -> np.ndarray:
        self._past, self._length = [], 0
        return self._run(ids_BT)[:, -1]

    def decode(self, tokens_B: np.ndarray) -> np.ndarray:
        return self._run(tokens_B[:, None])[:, -1]

    def score(self, ids_BT: np.ndarray) -> np.ndarray:
        """Also starts a new past: the logits of all positions are computed in any case."""
        self._past, self._length = [], 0
        return self._run(ids_BT)

    def close(self) -> None:
        self._past, self._session = [], None

    def _run(self, ids_BT: np.ndarray) -> np.ndarray:
        batch, new = ids_BT.shape
        total = self._length + new
        feeds: dict[str, Any] = {"input_ids": np.ascontiguousarray(ids_BT, np.int64), "attention_mask": np.ones((batch, total), np.int64)}
        if self._positioned:
            feeds["position_ids"] = np.arange(self._length, total)[None].repeat(batch, 0)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        past = self._past or [ort.OrtValue.ortvalue_from_numpy(self._empty.repeat(batch, 0)) for _ in self._pasts]
        values |= dict(zip(self._pasts, past, strict=True))
        presents = [name.replace("past_key_values", "present") for name in self._pasts]
        logits, *self._past = self._session.run_with_ort_values(["logits", *presents], values)
        self._length = total
        return logits.numpy()


def open_ours(folder: Path, threads: int) -> Graph:
    return DecoderSession(folder, threads=threads)


def graph_bytes(folder: Path) -> int:
    """Graph and weights; the onnxruntime caches and configs beside them do not count."""
    return sum(path.stat().st_size for pattern in ("*.onnx", "*.onnx.data", "*.onnx_data") for path in folder.glob(pattern))


def tokens_of(model: Path, *, random: bool) -> np.ndarray:
    """[WINDOWS, PROMPT]: Python's language reference through a real model's tokenizer, else random ids."""
    if random:
        vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        return np.random.default_rng(0).integers(3, vocab, (WINDOWS, PROMPT))
    import pydoc_data.topics

    from tokenizers import Tokenizer

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text[:200_000]).ids
    return np.asarray(ids[: WINDOWS * PROMPT], np.int64).reshape(WINDOWS, PROMPT)


def latency(openers: Mapping[str, Callable[[], Graph]], ids: np.ndarray, rounds: int, total_bytes: int) -> Times:
    """Milliseconds of every graph: all positions' logits, the last one's, a step after the prompt.

    Graphs that fit in memory together are run in turn, so that a busy moment hits all; larger ones each for itself. All are loaded :data:`_LOADS` times, in
    turning order: where a session's memory comes to lie makes a step up to a tenth faster or slower for as long as it lives.
    """
    found: Times = {phase: {name: [[] for _ in range(_LOADS)] for name in openers} for phase in ("prefill_ms", "prefill_last_logits_ms", "decode_ms")}
    groups = [list(openers)] if total_bytes <= _TOGETHER_BYTES else [[name] for name in openers]
    for group in groups:
        for load in range(_LOADS):
            order = group if load % 2 else group[::-1]
            graphs = {name: openers[name]() for name in order}
            for turn in range(-_WARM_UP, len(range(load, rounds, _LOADS))):
                for name in order if turn % 2 else order[::-1]:
                    row = one_round(graphs[name], ids)
                    for phase, value in row.items() if turn >= 0 else ():
                        found[phase][name][load].append(value)
            for graph in graphs.values():
                graph.close()
    return found


def times_faster(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> dict[str, Any]:
    """theirs / ours: in each load the median of its rounds' ratios, of these the median; the interval resamples whole loads, since rounds of one are alike."""
    ratios = [median([other / own for other, own in zip(*load, strict=True)]) for load in zip(theirs, ours, strict=True) if load[0]]
    found = compare(ratios)
    return {"median": found["effect"], "ci95": found["ci95"] or [min(ratios), max(ratios)], "pairs": found["n_pairs"]}


def all_rounds(loads: Sequence[Sequence[float]]) -> list[float]:
    return [value for load in loads for value in load]


def medians_of(times: Times, name: str) -> dict[str, float]:
    """Of all rounds of one graph, by phase."""
    return {phase: median(all_rounds(values[name])) for phase, values in times.items()}


def noise_of(times: Times, name: str) -> dict[str, Any]:
    """How far a graph strays from itself in :func:`latency`'s rounds, by phase; empty where there were too few."""
    return {phase: found for phase, values in times.items() if (found := against_itself(all_rounds(values[name]))) is not None}


def one_round(graph: Graph, ids: np.ndarray) -> dict[str, float]:
    row = {"prefill_ms": timed(graph.score, ids[:1]), "prefill_last_logits_ms": timed(graph.prefill, ids[:1])}
    return row | {"decode_ms": median([timed(graph.decode, ids[0, :1]) for _ in range(STEPS)])}


def timed(action: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    action(*arguments)
    return 1e3 * (time.perf_counter() - began)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def quality(openers: Mapping[str, Callable[[], Graph]], reference: Callable[[], Graph], ids: np.ndarray) -> dict[str, dict[str, Any]]:
    """Per graph: KL(reference || graph) in nats and top-1 agreement, of every window and their means. One graph is loaded at a time."""
    wanted = [logits.astype(np.float32) for logits in scores(reference, ids)]
    found = {}
    for name, opener in openers.items():
        kl, agreed = [], []
        for right, given in zip(wanted, scores(opener, ids), strict=True):
            p, q = log_softmax(right), log_softmax(given)
            kl.append(float((np.exp(p) * (p - q)).sum(-1).mean()))
            agreed.append(float((p.argmax(-1) == q.argmax(-1)).mean()))
        found[name] = {"kl_windows": kl, "kl_mean": float(np.mean(kl)), "top1": float(np.mean(agreed))}
    return found


def scores(opener: Callable[[], Graph], ids: np.ndarray) -> list[np.ndarray]:
    """Logits [PROMPT, V] of every window."""
    graph = opener()
    try:
        return [graph.score(window[None])[0] for window in ids]
    finally:
        graph.close()
