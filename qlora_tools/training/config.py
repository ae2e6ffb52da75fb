"""Every choice of a training run, checked as a whole before anything is read.

A run is a function of this record, the base, the data and the versions: two runs with equal records give the same
adapter, and a resumed one continues only under the record that it was started with. Left out: where files lie
(base, data, output), which belong to the verb.

Defaults follow what holds up in public comparisons of LoRA recipes: all linears, rank 16, alpha twice the rank,
no dropout, AdamW at 2e-4 with 3 % warm-up and a cosine decay, gradients clipped at norm 1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qlora_tools.errors import UsageError

BASE_FORMATS = ("nf4", "int8", "bf16")
TASKS = ("auto", "language", "classification", "image")
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "adamw8bit", "paged-adamw8bit", "paged-adamw")
MASKS = ("auto", "completion", "all")
#: Starting points that have a name; ``STORED`` is another one, of factors that lie in an adapter's folder.
STARTS = ("default", "gaussian", "pissa", "olora", "loftq", "qera")
STORED = "adapter"
INITS = (*STARTS, STORED)
#: Starting points that hold what quantization lost: they belong to the quantized base alone.
CORRECTING = ("loftq", "qera")
CHECKPOINTING = ("auto", "on", "off")


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how. Lengths in tokens, ``lr`` per step of AdamW; see the module docstring for the defaults.

    Raises:
        UsageError: a value out of range, or two that make no sense together; the message holds the value.
    """

    # the frozen base
    base_format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    task: str = "auto"
    merge_aware: bool = False  # compute with the merged weight after ``base_format``'s rounding, over an unquantized base
    # the adapter
    rank: int = 16
    alpha: float | None = None  # None: twice the rank
    dropout: float = 0.0
    targets: str = "all"
    rank_pattern: tuple[tuple[str, int], ...] = ()  # (regular expression over module paths, rank); the first that matches counts
    rank_budget: int | None = None  # ranks by measured need: mean rank over the targets, spread by gradient norm
    start_rank: int | None = None  # progressive rank: grow from here to ``rank`` over the first half of the run
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    # optimization
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03  # below 1: share of the run; otherwise steps
    epochs: float | None = None  # one of epochs and steps; neither means one epoch
    steps: int | None = None
    batch: int = 8  # examples (packed: rows) per micro-batch and process
    accum: int = 1
    optim: str = "adamw"
    loraplus: float | None = None  # learning rate of B as a multiple of A's
    weight_decay: float = 0.0
    clip: float = 1.0  # 0: no clipping
    neftune: float = 0.0  # noise alpha on embeddings; 0: none
    seed: int = 0
    # data
    max_len: int = 1024
    pack: bool = False
    mask: str = "auto"
    val_share: float = 0.0  # held out from the data when no validation file is given
    # evaluation, saving
    eval_every: int | None = None  # steps; None: ten times a run
    patience: int | None = None  # evaluations without a new best before stopping
    save_every: int | None = None  # steps; None: at evaluations
    keep: int = 2
    samples: tuple[str, ...] = ()  # prompts continued at each evaluation
    sample_tokens: int = 48
    # distillation
    teacher_weight: float = 0.5  # share of the loss that follows the teacher, where one is given
    temperature: float = 1.0
    # memory
    checkpointing: str = "auto"
    compute: str = "auto"  # auto | bf16 | fp32

    def __post_init__(self) -> None:
        for name, known in (
            ("base_format", BASE_FORMATS),
            ("task", TASKS),
            ("schedule", SCHEDULES),
            ("optim", OPTIMIZERS),
            ("mask", MASKS),
            ("init", INITS),
            ("checkpointing", CHECKPOINTING),
            ("compute", ("auto", "bf16", "fp32")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in ("rank", "batch", "accum", "max_len", "keep", "sample_tokens"):
            _at_least(name, getattr(self, name), 1)
        for name in ("steps", "eval_every", "save_every", "patience", "start_rank", "rank_budget"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("weight_decay", "clip", "neftune", "warmup"):
            _at_least(name, getattr(self, name), 0)
        for name in ("lr", "temperature"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UsageError(f"{name} {getattr(self, name)} is not a positive number")
        for name in ("dropout", "val_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} is outside [0, 1)")
        if not 0 <= self.teacher_weight <= 1:
            raise UsageError(f"teacher_weight {self.teacher_weight} is outside [0, 1]")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise UsageError(f"epochs {self.epochs} and steps {self.steps} both say how long to train", hint="give one of --epochs and --steps")
        if self.epochs is not None and self.epochs <= 0:
            raise UsageError(f"epochs {self.epochs} is not a positive number")
        if self.start_rank is not None and self.start_rank > self.rank:
            raise UsageError(f"start_rank {self.start_rank} is above rank {self.rank}", hint="ranks only grow")
        if self.start_rank is not None and (self.dora or self.init != "default"):
            raise UsageError("progressive ranks need plain LoRA with the default initialisation", hint="leave out --dora and --init, or --start-rank")
        if self.dora and self.init in ("pissa", "olora", *CORRECTING):
            raise UsageError(f"--dora with --init {self.init} has no defined starting point", hint="leave one of them out")
        if self.merge_aware and self.base_format == "bf16":
            raise UsageError("--merge-aware trains through a quantizer, but the base is bf16", hint="name what will be merged into with --nf4 or --int8")
        if self.merge_aware and (self.dora or self.dropout or self.init not in ("default", "gaussian")):
            raise UsageError("--merge-aware needs plain LoRA without dropout, from --init default", hint="leave out --dora, --dropout and --init")
        if self.init == STORED and self.rank_budget is not None:
            raise UsageError("--rank-budget gives ranks, but the adapter of --init has its own", hint="leave one of them out")
        if self.init in CORRECTING and self.base_format == "bf16":
            raise UsageError(f"--init {self.init} splits weights into a quantized part and a low-rank rest, but the base is bf16", hint="add --nf4 or --int8")

    @property
    def lora_alpha(self) -> float:
        """alpha as PEFT takes it."""
        return float(2 * self.rank) if self.alpha is None else float(self.alpha)

    def record(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def _at_least(name: str, value: float, least: float) -> None:
    if not (value >= least and math.isfinite(value)):
        raise UsageError(f"{name} {value} is below {least}")
