"""Every choice of a distillation, checked as a whole. Free of torch: the command line reads its defaults here.

Defaults are what held-out text decided on trained models; the measurements stand in ``benchmarks/LOG.md``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qlora_tools.errors import UsageError
from qlora_tools.training.config import SCHEDULES, TrainConfig

BASE_FORMATS = ("nf4", "int8", "int4", "bf16")
_EVALUATIONS = 4  # each costs about half a step


@dataclass(frozen=True)
class RefineConfig:
    """How an adapter is refined. ``text`` is a file, ``self`` or ``builtin``; lengths in tokens; ``windows``: of self-written text.

    ``by_block``: for models of which only a block at a time fits in memory; ``steps`` are then of each block, and no whole model writes text.

    Raises:
        UsageError: a value out of range.
    """

    base_format: str = "nf4"
    by_block: bool = False
    block_size: int | None = None  # None: the format's own
    double_quant: bool = True
    text: str = "self"
    windows: int = 128
    text_temperature: float = 1.0
    steps: int = 60
    batch: int = 8
    length: int = 256
    lr: float = 3e-3
    schedule: str = "cosine"
    warmup: float = 0.05
    loraplus: float | None = None
    temperature: float = 1.0
    clip: float = 1.0
    patience: int | None = 2
    eval_every: int | None = None
    held_out: int = 16  # windows that judge, at most
    compute: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("base_format", BASE_FORMATS), ("schedule", SCHEDULES), ("compute", ("auto", "bf16", "fp32"))):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        for name, least in (("windows", 2), ("steps", 1), ("batch", 1), ("length", 2), ("held_out", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} {getattr(self, name)} is below {least}")
        for name in ("lr", "temperature", "text_temperature"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UsageError(f"{name} {getattr(self, name)} is not a positive number")
        if self.by_block and self.text == "self":
            raise UsageError("block by block there is never a whole teacher to write text", hint="give --text FILE, or --text builtin")
        if self.by_block and (self.temperature != 1.0 or self.eval_every is not None):
            raise UsageError("block by block no predictions are compared on the way", hint="leave out --temperature and --eval-every")
        self.train_config()

    def train_config(self) -> TrainConfig:
        """The same choices as the training loop knows them."""
        shared = {name: getattr(self, name) for name in ("steps", "batch", "lr", "schedule", "warmup", "loraplus", "clip", "patience", "seed", "compute")}
        every = self.eval_every or max(1, self.steps // _EVALUATIONS)
        return TrainConfig(base_format="bf16", task="language", max_len=self.length, keep=1, eval_every=every, **shared)

    def record(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)
