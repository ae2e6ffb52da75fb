"""``qlt estimate``: sizes and memory of a model in every setting, from its config alone.

Nothing is read but ``config.json``, and nothing is computed with: sizes of files are those of the plans that the verbs would carry out, memory is
that of the very classes that would run, traced on tensors without content (``live/footprint.py``). On CUDA the figures are the allocator's; what the
driver takes for its context comes on top. No figure for CUDA has been held against a run on a GPU yet.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tools.checkpoint.hub import resolve_config
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.export.decoder.export import plan_export
from qlora_tools.export.schemes import target_for
from qlora_tools.live.base import build_empty
from qlora_tools.live.generation import trace_generation
from qlora_tools.live.outline import outline
from qlora_tools.manifest import canonical_json
from qlora_tools.progress import SILENT, Progress
from qlora_tools.stages.quantize import plan_quantize
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.distill import WindowRows
from qlora_tools.training.estimate import empty_base, estimator, traced_on
from qlora_tools.training.lora import choose_modules, rank_of
from qlora_tools.verbs.opening import folder_name
from qlora_tools.verbs.quantize import base_codec
from qlora_tools.verbs.training_memory import adapter_of, codec_of

#: How transformers holds a base.
FORMATS = ("bf16", "int8", "nf4")
#: What `qlt export` draws for each provider.
SCHEMES = {"cpu": ("fp32", "int8", "int4"), "cuda": ("fp16", "int8", "int4", "nf4")}
#: A model at least this deep has its highest point where deeper ones have it.
_LAYERS = 3


@dataclass(frozen=True)
class EstimateConfig:
    """What is run: ``batch`` sequences, ``new`` tokens behind ``prompt``; trained with rank ``rank`` on all linears, ``train_batch`` rows of ``length``.

    Raises:
        UsageError: a number below one.
    """

    batch: int = 1
    prompt: int = 512
    new: int = 128
    rank: int = 16
    train_batch: int = 1
    length: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UsageError(f"{name} {value} is below 1")


@dataclass(frozen=True)
class InMemory:
    """transformers with the base in ``setting``. ``running_bytes``: the highest point of writing text. ``training_bytes``: of a LoRA step with
    gradient checkpointing, ``plain_training_bytes`` without it."""

    setting: str
    file_bytes: int
    weights_bytes: int
    cache_bytes: int
    running_bytes: int
    training_bytes: int
    plain_training_bytes: int


@dataclass(frozen=True)
class Graph:
    """An ONNX export: its data file, and the keys and values of all positions."""

    setting: str
    device: str
    file_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class EstimateResult:
    """``graphs`` is empty, with the reason in ``no_graph``, for a model that is no known decoder."""

    model: str
    parameters: int
    device: str
    config: EstimateConfig
    in_memory: tuple[InMemory, ...]
    graphs: tuple[Graph, ...]
    no_graph: str | None
    seconds: float


def estimate(*, model: str | Path, config: EstimateConfig | None = None, device: str = "cuda", progress: Progress = SILENT) -> EstimateResult:
    """``model``: a folder, a ``config.json``, or a hub id, of which nothing but the config is fetched.

    Raises:
        MissingError, CorruptError: no config. UnsupportedError: not a language model that transformers builds by itself.
    """
    began = time.perf_counter()
    chosen = config or EstimateConfig()
    with _folder(resolve_config(str(model))) as folder:
        checkpoint = outline(folder)
        with progress.task("estimate", len(FORMATS), "settings") as task:
            rows = []
            for setting in FORMATS:
                rows.append(_in_memory(checkpoint, setting, chosen, device))
                task.advance(1, setting)
        graphs, reason = _graphs(checkpoint, chosen)
        parameters = sum(spec.numel for spec in checkpoint.specs.values())
    return EstimateResult(folder_name(Path(model)), parameters, device, chosen, tuple(rows), graphs, reason, time.perf_counter() - began)


@contextmanager
def _folder(config: Path) -> Iterator[Path]:
    """A folder that holds ``config`` as config.json."""
    if config.name == "config.json":
        yield config.parent
        return
    with tempfile.TemporaryDirectory() as text:
        shutil.copyfile(config, Path(text) / "config.json")
        yield Path(text)


@contextmanager
def _shallow(checkpoint: LogicalCheckpoint, layers: int) -> Iterator[LogicalCheckpoint]:
    """The same model with its first ``layers`` layers only."""
    config = {**checkpoint.config, "num_hidden_layers": layers}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    with tempfile.TemporaryDirectory() as text:
        (Path(text) / "config.json").write_bytes(canonical_json(config))
        yield outline(Path(text))


def _period(config: Mapping[str, Any]) -> int:
    """After how many layers their kinds come again; all of them where they do not."""
    layers = int(config.get("num_hidden_layers") or 1)
    kinds = list(config.get("layer_types") or [None] * layers)[:layers]
    return next(period for period in range(1, layers + 1) if all(kind == kinds[index % period] for index, kind in enumerate(kinds)))


def _whole(checkpoint: LogicalCheckpoint, trace: Callable[[LogicalCheckpoint], Sequence[int]]) -> list[int]:
    """What ``trace`` gives for the model, from two shallow ones where layers repeat: every further round of layers adds the same."""
    layers, period = int(checkpoint.config.get("num_hidden_layers") or 1), _period(checkpoint.config)
    first = period * max(1, -(-_LAYERS // period))
    first += (layers - first) % period if layers > first else 0
    if layers <= first + period:
        return list(trace(checkpoint))
    with _shallow(checkpoint, first) as one, _shallow(checkpoint, first + period) as two:
        start, more = trace(one), trace(two)
    rounds = (layers - first) // period
    return [low + (high - low) * rounds for low, high in zip(start, more, strict=True)]


def _in_memory(checkpoint: LogicalCheckpoint, setting: str, workload: EstimateConfig, device: str) -> InMemory:
    codec = base_codec(setting)
    stored = sum(spec.nbytes for spec in plan_quantize(checkpoint, checkpoint.family, codec).outputs)

    def trace(model: LogicalCheckpoint) -> Sequence[int]:
        running = trace_generation(
            empty_base(model, "language", codec, torch.bfloat16),
            batch=workload.batch,
            prompt=workload.prompt,
            new=workload.new,
            device=traced_on(device),
        )
        return running.weights, running.cache, running.reading, running.writing, *_training_bytes(model, setting, workload, device)

    weights, cache, reading, writing, lean, plain = _whole(checkpoint, trace)
    return InMemory(setting, stored, weights, cache, max(reading, writing), lean, plain)


def _training_bytes(checkpoint: LogicalCheckpoint, setting: str, workload: EstimateConfig, device: str) -> tuple[int, int]:
    """A step of ``qlt train`` on rows that are full: with gradient checkpointing, and without."""
    config = TrainConfig(base_format=setting, task="language", rank=workload.rank, batch=workload.train_batch, max_len=workload.length, steps=1)
    model = build_empty(checkpoint, "language", dtype=torch.bfloat16)
    ranks = rank_of(model, choose_modules(model, checkpoint.family, "all"), config)
    adapt = adapter_of(checkpoint, "language", ranks, torch.bfloat16, None)
    batch = WindowRows(torch.zeros(1, workload.length, dtype=torch.int64)).batch([0] * workload.train_batch)
    made = estimator(checkpoint, "language", batch, config, adapt=adapt, codec_of=codec_of, dtype=torch.bfloat16, device=device)
    return made.of(True).total_bytes, made.of(False).total_bytes


def _graphs(checkpoint: LogicalCheckpoint, config: EstimateConfig) -> tuple[tuple[Graph, ...], str | None]:
    positions = config.batch * (config.prompt + config.new)
    found = []
    for provider, schemes in SCHEMES.items():
        for scheme in schemes:
            target = target_for(scheme, provider)
            try:
                planned = plan_export(checkpoint, checkpoint.config, scheme, target)
            except UnsupportedError as error:
                return (), str(error)
            values = 2 * planned.decoder.layers * planned.decoder.kv_size * positions
            found.append(Graph(scheme, provider, planned.file_bytes, values * target.float_type.itemsize))
    return tuple(found), None
