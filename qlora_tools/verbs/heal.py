"""Healing: A and B move, before they are merged, so that the *rounded* merged weights predict what a teacher predicts.

The linears compute with Q(L + scale B A), gradients pass the rounding straight through (``training/merge_aware.py``), and the loss is the divergence
from the teacher's own predictions (``training/distill.py``); no labels. The teacher is the original fine-tune if it is given, else base and
adapters unmerged. L is the base's weight; where only quantized weights are at hand, which sit on their grid where small steps change
nothing, L comes from error feedback (``quant/keep_grid.py: unrounded``): weights that round to what keep-grid chose, between the points.

What comes out is never worse than the start on held-out windows, and goes into the checkpoint as it was judged. Models must fit in memory.

Axes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tools.engine.plan import Source
from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.live.base import Base, load_base
from qlora_tools.live.self_text import written_by
from qlora_tools.live.text import TextWindows, evenly
from qlora_tools.progress import Progress
from qlora_tools.quant.codec import Stored
from qlora_tools.quant.floats import judging_dtype
from qlora_tools.quant.keep_grid import grid_of, keep_grid, nearest, unrounded
from qlora_tools.specs import TensorSpec
from qlora_tools.stages.merge import Storing
from qlora_tools.stages.merge_units import Directions, OnGrid, Parts
from qlora_tools.training.distill import DivergenceLoss, RefineConfig, WindowRows, distill
from qlora_tools.training.distill_adapter import put_adapter
from qlora_tools.training.loop import Run
from qlora_tools.training.lora import ADAPTER, PREFIX, lora_layers, trainable_parameters
from qlora_tools.training.merge_aware import quantize_in_forward
from qlora_tools.training.optimizers import Masters
from qlora_tools.verbs.calibrate import SELF, windows_for
from qlora_tools.verbs.merge_gain import place
from qlora_tools.verbs.merging import Merged, Tensors
from qlora_tools.verbs.opening import folder_name, open_model


@dataclass(frozen=True)
class HealConfig:
    """``teacher``: a model; ``None``: base and adapters, unmerged. ``text``: a file, ``builtin``, or ``self``, what the teacher writes. ``windows``: of text
    it writes; lengths in tokens.

    Raises:
        UsageError: a number out of range.
    """

    steps: int = 60
    teacher: str | Path | None = None
    text: str | Path = SELF
    windows: int = 256
    length: int = 256
    batch: int = 8
    lr: float = 1e-3
    held_out: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        self.refine_config()

    def record(self) -> dict[str, Any]:
        """JSON-ready fields, without the places of files."""
        named = {"teacher": None if self.teacher is None else folder_name(Path(self.teacher)), "text": Path(self.text).name}
        return {**asdict(self), **named}

    def refine_config(self) -> RefineConfig:
        """The same choices as distillation knows them."""
        shared = {name: getattr(self, name) for name in ("steps", "windows", "length", "batch", "lr", "held_out", "seed")}
        return RefineConfig(base_format="bf16", compute="fp32", patience=None, **shared)


@dataclass(frozen=True)
class Healed:
    """Divergences in nats a token from the teacher, of the rounded model, on held-out windows. ``best_step`` 0: nothing was better than the start."""

    start_kl: float
    end_kl: float
    best_step: int
    text: str


def heal(merged: Merged, storing: Storing, config: HealConfig, *, device: str, progress: Progress) -> tuple[Source, Healed]:
    """The merged weights to round, as a source of the names that ``storing`` quantizes and the adapter changes ([out, in], fp32), and what it took.

    Raises:
        UsageError: several adapters, or a weighted one. UnsupportedError: an adapter that is more than LoRA on linears.
    """
    (adapter, weight), *others = merged.adapters
    if others or weight != 1.0:
        raise UsageError("healing moves the factors of one adapter of weight 1", hint="sum the adapters first with `qlt adapters sum`")
    forms = {name: form for name, form in storing.forms(merged.source, merged.checkpoint.family).items() if name in adapter.deltas}
    unfit = [name for name, form in forms.items() if len(form.spec.shape) != 2 or adapter.deltas[name].magnitude is not None]
    if unfit or not forms:
        raise UnsupportedError(
            f"{adapter.name}: {unfit[0] if unfit else 'no quantized weight'} cannot be healed", hint="only plain LoRA on quantized linears can"
        )
    dtype = judging_dtype(device)
    guide = _teacher(merged, config, dtype, device, progress)
    text = _text(merged, guide, config, device, progress)
    base = load_base(merged.checkpoint, "language", merged.checkpoint.codec or storing.codec, dtype=dtype, device=device, progress=progress)
    latent, grids = _latents(merged, storing, forms, progress)
    place(base, Tensors(latent), forms, oriented=True)
    learner = put_adapter(base, adapter, dtype)
    name_of = {path: base.tensor_of.get(path, f"{path}.weight") for path in lora_layers(learner.model)}
    for path, layer in lora_layers(learner.model).items():
        layer.requires_grad_(False)
        for factor in (layer.lora_A, layer.lora_B):
            factor.requires_grad_(name_of[path] in forms)

    def rounded(path: str, dense_OI: torch.Tensor) -> torch.Tensor:
        name = name_of[path]
        return _rounded(forms[name], grids.get(name), dense_OI) if name in forms else dense_OI

    quantize_in_forward(learner.model, rounded)
    refine = config.refine_config()
    run = Run(
        model=learner.model,
        masters=Masters(trainable_parameters(learner.model)),
        rows=WindowRows(text.learn_NL),
        loss=DivergenceLoss(base.model, guide.model),
        config=refine.train_config(),
        steps=config.steps,
        held_out=WindowRows(evenly(text.held_out_NL, config.held_out)),
    )
    made = distill(run, progress=progress)
    layers = lora_layers(learner.model)
    with torch.no_grad():
        for path, name in name_of.items():
            if name in forms:
                latent[name] = latent[name] + _product(layers[path], path, made.values).cpu()
    return Tensors(latent), Healed(made.start_kl, made.end_kl, made.best_step, text.name)


def _teacher(merged: Merged, config: HealConfig, dtype: torch.dtype, device: str, progress: Progress) -> Base:
    source = open_model(config.teacher, progress) if config.teacher is not None else merged.checkpoint
    guide = load_base(source, "language", source.codec, dtype=dtype, device=device, progress=progress)
    if config.teacher is None:
        place(guide, merged.source, merged.source.specs.keys() if merged.target == "trained" else merged.source.changed, untied=merged.source.untied)
    return guide


def _text(merged: Merged, guide: Base, config: HealConfig, device: str, progress: Progress) -> TextWindows:
    if str(config.text) != SELF:
        tokens = (config.steps * config.batch + config.held_out) * config.length * 5 // 4
        return windows_for(merged.checkpoint, config.text, tokens=tokens, context=config.length, device=device, progress=progress)
    return written_by(guide.model, merged.checkpoint.folder, windows=config.windows, length=config.length, seed=config.seed, progress=progress)


def _latents(merged: Merged, storing: Storing, forms: Mapping[str, Stored], progress: Progress) -> tuple[dict[str, torch.Tensor], dict[str, Parts]]:
    """(weight -> L, fp32 [O, I], to which scale B A is added; weight -> the parts whose grid is kept)."""
    latent, grids = {}, {}
    family, onto = merged.checkpoint.family, storing.rounding
    directions = Directions(merged.adapters, {name: (form.spec.shape[0], form.spec.shape[1]) for name, form in forms.items()})
    with progress.task("weights between the points", len(forms), "layers") as task:
        for name, form in forms.items():
            turn = family.stores_inputs_first(name, form.spec.shape)
            base, target = (source.read(name).float() for source in (merged.base, merged.source))
            base_OI, target_OI = (base.T.contiguous(), target.T.contiguous()) if turn else (base, target)
            latent[name] = base_OI
            if isinstance(onto, OnGrid):
                read = [(merged.checkpoint if item.source == "original" else merged.checkpoint.stored).read(item.name) for item in onto.grid_reads(form)]
                grids[name] = onto.grid_parts(form, *read)
                kept = keep_grid(target_OI, form, grids[name], directions.read(name), strength=onto.strength)
                latent[name] = base_OI + (unrounded(target_OI, kept) - target_OI)
            task.advance(1, name)
    return latent, grids


def _rounded(form: Stored, parts: Parts | None, dense_OI: torch.Tensor) -> torch.Tensor:
    """``dense_OI`` as a reader of the stored model will see it, fp32."""
    spec = TensorSpec(form.spec.name, "F32", form.spec.shape)
    dense = dense_OI.float().cpu()
    if parts is None:
        return form.codec.decode(spec, form.codec.encode(spec, dense)).to(dense_OI.device)
    grid = grid_of(form, parts)
    return grid.values(nearest(grid, dense)).to(dense_OI.device)


def _product(layer: Any, path: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """scale B A with the values that distillation chose, fp32 [O, I]."""
    a_RI, b_OR = (next(value for name, value in values.items() if name == f"{PREFIX}{path}.lora_{side}.weight") for side in "AB")
    return float(layer.scaling[ADAPTER]) * (b_OR.float() @ a_RI.float())
