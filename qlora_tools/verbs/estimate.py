"""``qlt estimate``: sizes and memory of a model in every setting, from its config alone.

Nothing is read but ``config.json``, and nothing is computed with: sizes of files are those of the plans that the verbs would carry out, memory is
that of the very classes that would run, traced on tensors without content (``live/footprint.py``), and of the very graphs that would be drawn
(``export/footprint.py``). On the CPU what resident memory adds to that was measured (``verbs/measured_memory.py``). On CUDA the figures are the
allocator's; what the driver takes for its context comes on top, and none of them has been held against a run on a GPU yet.
"""

from __future__ import annotations

import reprlib
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from qlora_tools.checkpoint.hub import resolve_config
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.errors import CorruptError, UnsupportedError, UsageError
from qlora_tools.live.base import build_empty
from qlora_tools.live.generation import trace_generation
from qlora_tools.live.outline import outline
from qlora_tools.models.sizes import check_sizes
from qlora_tools.progress import SILENT, Progress
from qlora_tools.stages.quantize import plan_quantize
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.distill import WindowRows
from qlora_tools.training.estimate import empty_base, estimator, traced_on
from qlora_tools.training.lora import choose_modules, rank_of
from qlora_tools.verbs.fitting import Candidate, Fit, by_use, fit
from qlora_tools.verbs.graph_memory import Graph, graph_models
from qlora_tools.verbs.measured_memory import Measured, measured_memory
from qlora_tools.verbs.opening import config_json, folder_name, is_export
from qlora_tools.verbs.published import Published, published_for
from qlora_tools.verbs.quantize import base_codec
from qlora_tools.verbs.training_memory import adapter_of, codec_of

#: How transformers holds a base.
FORMATS = ("bf16", "int8", "nf4")
#: A model at least this deep has its highest point where deeper ones have it.
_LAYERS = 2


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
class EstimateResult:
    """``graphs`` is empty, with the reason in ``no_graph``, for a model that is no known decoder. ``published``: what others have reported for a model of
    this shape. ``fits``: what fits into ``limit_bytes``, where that was asked for."""

    model: str
    parameters: int
    device: str
    config: EstimateConfig
    in_memory: tuple[InMemory, ...]
    graphs: tuple[Graph, ...]
    no_graph: str | None
    published: tuple[Published, ...]
    fits: tuple[Fit, ...]
    limit_bytes: int | None
    seconds: float


def estimate(
    *, model: str | Path, config: EstimateConfig | None = None, device: str = "cuda", fits: int | None = None, progress: Progress = SILENT
) -> EstimateResult:
    """``model``: a folder, a ``config.json``, or a hub id, of which nothing but the config is fetched. ``fits``: bytes of memory to fill.

    Raises:
        MissingError, CorruptError: no config. UnsupportedError: not a language model that transformers builds by itself, or an export.
    """
    began = time.perf_counter()
    chosen = config or EstimateConfig()
    if fits is not None and fits < 1:
        raise UsageError(f"{fits} bytes hold nothing")
    with _folder(resolve_config(str(model))) as folder, ExitStack() as open_models, progress.task("estimate", len(FORMATS) + 1, "settings") as task:
        if is_export(folder):
            raise UnsupportedError(f"{model} is an export: what it takes can be measured", hint="run `qlt bench` on it, or give the model it was made from")
        checkpoint = outline(folder)
        bases, rows = list[Base](), list[InMemory]()
        for setting in FORMATS:
            bases.append(open_models.enter_context(opened(checkpoint, setting, device)))
            rows.append(bases[-1].of(chosen))
            task.advance(1, setting)
        graphs, reason = graph_models(checkpoint, bases[0].shallow, "cuda" if device.startswith("cuda") else "cpu")
        drawn = tuple(graph.of(chosen.batch, chosen.prompt, chosen.new) for graph in graphs)
        task.advance(1, "graphs")
        found = []
        if fits is not None:
            longest = int(checkpoint.config.get("max_position_embeddings") or 1 << 20)
            candidates: list[Candidate] = [*bases, *(graph for graph, row in zip(graphs, drawn, strict=True) if row.peak_bytes is not None)]
            with progress.task("what fits", len(candidates), "settings") as fitting:
                for candidate in candidates:
                    found.append(fit(candidate, chosen.prompt, chosen.new, fits, longest))
                    fitting.advance(1, candidate.setting)
        parameters = sum(spec.numel for spec in checkpoint.specs.values())
        others = published_for(checkpoint.config)
    return EstimateResult(
        folder_name(Path(model)), parameters, device, chosen, tuple(rows), drawn, reason, others, by_use(found), fits, time.perf_counter() - began
    )


@contextmanager
def _folder(config: Path) -> Iterator[Path]:
    """A folder that holds ``config`` as config.json.

    Raises:
        CorruptError: not JSON, or sizes that no model has; it names the file that was given.
    """
    check_sizes(read_json(config), config)
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
        (Path(text) / "config.json").write_bytes(config_json(config))
        yield outline(Path(text))


def _period(config: Mapping[str, Any]) -> int:
    """After how many layers their kinds come again; all of them where they do not.

    Raises:
        CorruptError: kinds of layers that are no list.
    """
    layers = int(config.get("num_hidden_layers") or 1)
    kinds = config.get("layer_types") or [None] * layers
    if not isinstance(kinds, list):
        raise CorruptError(f"config.json: `layer_types` is {reprlib.repr(kinds)}, expected a list", hint="take the config.json of the model itself")
    kinds = kinds[:layers]
    return next(period for period in range(1, layers + 1) if all(kind == kinds[index % period] for index, kind in enumerate(kinds)))


@contextmanager
def opened(checkpoint: LogicalCheckpoint, setting: str, device: str) -> Iterator[Base]:
    """The model in ``setting`` with the shallow models that stand for it: where layers repeat, every further round of them adds the same."""
    layers, period = int(checkpoint.config.get("num_hidden_layers") or 1), _period(checkpoint.config)
    first = period * max(1, -(-_LAYERS // period))
    first += (layers - first) % period if layers > first else 0
    if layers <= first + period:
        yield Base(checkpoint, setting, device, (checkpoint,), 0)
        return
    with _shallow(checkpoint, first) as one, _shallow(checkpoint, first + period) as two:
        yield Base(checkpoint, setting, device, (one, two), (layers - first) // period)


@dataclass
class Base:
    """One setting in memory. ``depths``: the model, or two shallow ones of which the second has one round of layers more; ``rounds`` of it are missing."""

    checkpoint: LogicalCheckpoint
    setting: str
    device: str
    depths: tuple[LogicalCheckpoint, ...]
    rounds: int
    kind: ClassVar[str] = "transformers"
    _known: dict[object, list[int]] = field(default_factory=dict, init=False, repr=False)

    @property
    def shallow(self) -> LogicalCheckpoint:
        """A model whose activations are the whole one's."""
        return self.depths[0]

    @cached_property
    def file_bytes(self) -> int:
        return sum(spec.nbytes for spec in plan_quantize(self.checkpoint, self.checkpoint.family, base_codec(self.setting)).outputs)

    @cached_property
    def measured(self) -> Measured | None:
        return measured_memory() if self.device == "cpu" else None

    def of(self, workload: EstimateConfig) -> InMemory:
        """Every figure of the setting."""
        weights, cache, running = self.running(workload.batch, workload.prompt, workload.new)
        lean, plain = self._whole(lambda model: _training_bytes(model, self.setting, workload, self.device), ("training", workload))
        return InMemory(self.setting, self.file_bytes, weights, cache, running, lean, plain)

    def running(self, batch: int, prompt: int, new: int) -> tuple[int, int, int]:
        """(weights, cache, peak) of writing text, in bytes."""
        weights, cache, reading, writing = self._traced(batch, prompt, new)
        peak = max(reading, writing)
        return weights, cache, peak if self.measured is None else self.measured.transformers(self.setting, weights, peak - weights)

    def peak_bytes(self, batch: int, prompt: int, new: int) -> int:
        """The highest point of writing text."""
        return self.running(batch, prompt, new)[2]

    def live(self, batch: int, prompt: int, new: int) -> tuple[int, int]:
        """(weights, what lives beside them at the highest point), traced: bytes of tensors."""
        weights, _, reading, writing = self._traced(batch, prompt, new)
        return weights, max(reading, writing) - weights

    def _traced(self, batch: int, prompt: int, new: int) -> list[int]:
        """Weights, cache, and the highest points of reading the prompt and of writing."""

        def trace(model: LogicalCheckpoint) -> Sequence[int]:
            base = empty_base(model, "language", base_codec(self.setting), torch.bfloat16)
            found = trace_generation(base, batch=batch, prompt=prompt, new=new, device=traced_on(self.device))
            return found.weights, found.cache, found.reading, found.writing

        return self._whole(trace, ("running", batch, prompt, new))

    def _whole(self, trace: Callable[[LogicalCheckpoint], Sequence[int]], key: tuple[object, ...]) -> list[int]:
        """What ``trace`` gives for the whole model. Each question is traced once."""
        if key not in self._known:
            start, *more = (list(trace(model)) for model in self.depths)
            self._known[key] = [low + (high - low) * self.rounds for low, high in zip(start, more[0], strict=True)] if more else start
        return self._known[key]


def _training_bytes(checkpoint: LogicalCheckpoint, setting: str, workload: EstimateConfig, device: str) -> tuple[int, int]:
    """A step of ``qlt train`` on rows that are full: with gradient checkpointing, and without."""
    config = TrainConfig(base_format=setting, task="language", rank=workload.rank, batch=workload.train_batch, max_len=workload.length, steps=1)
    model = build_empty(checkpoint, "language", dtype=torch.bfloat16)
    ranks = rank_of(model, choose_modules(model, checkpoint.family, "all"), config)
    adapt = adapter_of(checkpoint, "language", ranks, torch.bfloat16, None)
    batch = WindowRows(torch.zeros(1, workload.length, dtype=torch.int64)).batch([0] * workload.train_batch)
    made = estimator(checkpoint, "language", batch, config, adapt=adapt, codec_of=codec_of, dtype=torch.bfloat16, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames the switch of checkpointing; the step traced is the same
        return made.of(True).total_bytes, made.of(False).total_bytes
