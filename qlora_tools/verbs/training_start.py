"""A run that starts from an adapter in a folder: what it says about the run, what must agree with it, and what it hands on.

The adapter decides its own form: ranks, scales, rsLoRA, DoRA and the layers it is on. An option that was given and says otherwise is an error, an option
that was not given follows. Linears and convolutions learn; whole tensors (``modules_to_save``) stand in for the base's while it trains and are written
again, unless the task trains them whole itself. What would be lost is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_tools.adapters.adapter import Adapter, Delta
from qlora_tools.adapters.merged import wrong_base
from qlora_tools.adapters.modified_base import changed_init
from qlora_tools.adapters.peft_config import FILE_NAME
from qlora_tools.adapters.peft_files import WEIGHTS, read_adapter
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.errors import IncompatibleError, UnsupportedError, UsageError
from qlora_tools.manifest import read_manifest, sha256_file
from qlora_tools.names import shortened
from qlora_tools.training.config import BASE_FORMATS, STORED, TrainConfig
from qlora_tools.training.distill_adapter import ranks_in
from qlora_tools.training.lora import choose_modules, rank_of
from qlora_tools.verbs.merging import adapter_folder, correction, made_with
from qlora_tools.verbs.opening import folder_name

#: Share of an adapter's product that a base may still hold: 1 for the weight that the product was taken from, 0 for what is left of it.
_STILL_THERE = 0.5
_OTHER_FORM = "leave the option out, or change the adapter first: `qlt adapters resize` makes one of another rank"


@dataclass(frozen=True, eq=False)
class Start:
    """An adapter to start from. ``asked``: the config as it was given, of which the fields ``spoken`` were meant."""

    folder: Path
    adapter: Adapter
    sha256: str
    asked: TrainConfig
    spoken: frozenset[str]
    command: Mapping[str, Any] = field(default_factory=dict)

    def settled(self) -> TrainConfig:
        """The config of the run: the adapter's form, and for an adapter that corrects a quantizer, that quantizer.

        Raises:
            UsageError: names what was asked for and what the adapter has.
        """
        own, asked = self.adapter.config, self.asked
        if asked.init not in ("default", STORED):
            raise UsageError(f"init {asked.init!r} and the adapter {self.folder} both say where the factors start", hint="leave one of them out")
        ranks = sorted({delta.rank for delta in self.adapter.deltas.values()})
        if "rank" in self.spoken and "rank_pattern" not in self.spoken and ranks != [asked.rank]:
            raise self._contradicted(f"--rank {asked.rank}", f"rank{'s' if len(ranks) > 1 else ''} {shortened(map(str, ranks))}")
        for name, mine in (("alpha", own.alpha), ("rslora", own.use_rslora), ("dora", own.use_dora)):
            theirs = getattr(asked, name)
            if name in self.spoken and theirs != mine:
                raise self._contradicted(f"--{name} {theirs}", f"{name} {mine}")
        form: dict[str, Any] = {"rank": own.rank, "alpha": own.alpha, "rank_pattern": (), "rslora": own.use_rslora, "dora": own.use_dora, "targets": STORED}
        return replace(asked, init=STORED, base_format=self._base_format(), **form)

    def _base_format(self) -> str:
        corrects, wanted = correction(self.folder), self.command.get("base_format")
        if corrects is None or wanted is None or wanted == self.asked.base_format:
            return self.asked.base_format
        if "base_format" in self.spoken or wanted not in BASE_FORMATS:
            raise UsageError(
                f"--{self.asked.base_format}, but {corrects}, for a base in {wanted}: its factors hold what that format lost",
                hint=f"train with --{wanted}"
                if wanted in BASE_FORMATS
                else f"qlt train holds a base in {', '.join(BASE_FORMATS)}: make the adapter for one of these",
            )
        return str(wanted)

    def _contradicted(self, asked: str, found: str) -> UsageError:
        return UsageError(f"{asked}, but the adapter {self.folder} has {found}", hint=_OTHER_FORM)

    def ranks(self, empty: nn.Module, checkpoint: LogicalCheckpoint) -> dict[str, int]:
        """Module path -> rank, as the adapter has them.

        Raises:
            UsageError: other layers or ranks were asked for. UnsupportedError: nothing in the adapter can learn, or something would be lost.
        """
        found = ranks_in(self.adapter, empty)
        self._check_whole(found)
        asked = self.asked
        if "targets" in self.spoken:
            chosen = choose_modules(empty, checkpoint.family, asked.targets)
            if set(chosen) != set(found):
                other = sorted(set(chosen) ^ set(found))
                raise self._contradicted(f"--targets {asked.targets} ({len(chosen)} layers)", f"{len(found)} layers; they differ in {shortened(other)}")
        if "rank_pattern" in self.spoken:
            plain = asked if "rank" in self.spoken else replace(asked, rank=self.adapter.config.rank)
            wanted = rank_of(empty, found, plain)
            if wrong := [path for path in found if wanted[path] != found[path]]:
                raise self._contradicted(f"--rank-pattern with {wanted[wrong[0]]} for `{wrong[0]}`", f"{found[wrong[0]]}")
        return found

    def _check_whole(self, found: Mapping[str, int]) -> None:
        adapter = self.adapter
        lost = sorted({*adapter.biases, *adapter.token_rows, *(name for name, part in adapter.replacements.items() if ".base_layer." in part.key)})
        if len(found) < len(adapter.deltas):
            lost += sorted(name for name, delta in adapter.deltas.items() if "lora_embedding" in delta.a.key)
        if adapter.config.bias != "none":
            lost += sorted(name for name in adapter.replacements if name.endswith(".bias"))
        if lost or (adapter.config.ensure_weight_tying and adapter.replacements):
            named = shortened(lost or sorted(adapter.replacements))
            raise UnsupportedError(
                f"adapter {self.folder} changes {named} in a way that training would not hand on", hint="merge it with `qlt merge` and train on the result"
            )
        if not found:
            raise UnsupportedError(f"adapter {self.folder} holds no factors of linears or convolutions", hint="give another one, or a named --init")

    def check_base(self, sha256_of: Mapping[str, str]) -> None:
        """Compare fingerprints of the base's tensors with what the adapter was made for, as merging does.

        Raises:
            IncompatibleError: names the first tensor that differs.
        """
        for name, expected in sorted(self.adapter.base_tensors.items()):
            if name in sha256_of and sha256_of[name] != expected:
                raise wrong_base(str(self.folder), name, sha256_of[name], expected)

    def hand_on(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Add the whole tensors that did not learn to an adapter's configuration and tensors, in place."""
        kept = {part.key: part.read().contiguous() for part in self.adapter.replacements.values() if part.key not in tensors}
        if kept:
            tensors |= kept
            config["modules_to_save"] = sorted({*(config["modules_to_save"] or ()), *self.adapter.config.modules_to_save})

    def described(self) -> dict[str, str]:
        """What a manifest says about it as an input."""
        return {"name": folder_name(self.folder), "sha256": self.sha256}

    def origin(self) -> dict[str, Any]:
        """How it was made, for the manifest of what is trained from it: a correction stays one."""
        return dict(self.command) if self.command else {"adapter": folder_name(self.folder)}


def open_start(source: str | Path, checkpoint: LogicalCheckpoint, config: TrainConfig, spoken: Iterable[str] | None = None) -> Start:
    """Read the adapter in ``source`` from headers. ``spoken``: the fields of ``config`` that were asked for; ``None``: those that are not the default.

    Raises:
        IncompatibleError: it is for a base that its own start changed, and ``checkpoint`` is the unchanged one. And what ``read_adapter`` raises.
    """
    folder = adapter_folder(source)
    if init := changed_init(read_json(folder / FILE_NAME), str(folder)):
        raise IncompatibleError(
            f"{folder} began with {init}, inside a base that it changed", hint=f"make it an adapter of the base as it was: qlt import {folder} --base MODEL"
        )
    adapter = read_adapter(folder, checkpoint.specs, checkpoint.family, ties=checkpoint.ties)
    manifest = read_manifest(folder)
    command = manifest.command if manifest else {}
    if made_with(folder, "method", ("pissa",)) and _still_holds(adapter, checkpoint):
        raise IncompatibleError(
            f"{folder} was made with method 'pissa': its factors are a part of the weights that {folder_name(checkpoint.folder)} still has",
            hint="give what is left of the base without it as --base: qlt init --method pissa --residual FOLDER writes it",
        )
    meant = spoken if spoken is not None else (item.name for item in fields(TrainConfig) if getattr(config, item.name) != item.default)
    return Start(folder, adapter, sha256_file(folder / WEIGHTS), config, frozenset(meant), command)


def _still_holds(adapter: Adapter, checkpoint: LogicalCheckpoint) -> bool:
    """Whether the base has the adapter's product in its weight, looked up in the smallest tensor."""
    names = [name for name in adapter.deltas if name in checkpoint.specs]
    if not names:
        return False
    name = min(names, key=lambda name: (checkpoint.specs[name].numel, name))
    return _share_in(checkpoint.read(name), adapter.deltas[name]) > _STILL_THERE


def _share_in(weight: torch.Tensor, delta: Delta) -> float:
    """<W, D> / <D, D> for the adapter's D = scale B A."""
    weight_OI = (weight.T if delta.transposed else weight.flatten(1)).float()
    a_RI, b_OR = delta.a.read().float().flatten(1), delta.scale * delta.b.read().float().flatten(1)
    energy = ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum()
    return float(((b_OR.T @ weight_OI) * a_RI).sum() / energy) if energy > 0 else 0.0
