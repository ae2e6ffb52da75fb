"""A base with its adapters merged in, as a source: what ``merge`` stores and ``export --merge`` draws.

``target`` says what the merged model should compute. ``original`` is W + B A, the change on the 16-bit weights. ``trained`` is Q(W) + B A, what an
adapter trained on a quantized base has really been: the quantized weights made dense again, simulated by a round trip when the base
at hand is the 16-bit one. An adapter that began as what quantization lost (LoftQ, QERA, an extraction of the total difference) carries
that correction in its factors; on the original weights it would count twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_tools.adapters.adapter import Adapter
from qlora_tools.adapters.merged import MergedSource, base_fingerprint
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.renamed import RenamedCheckpoint, as_stored
from qlora_tools.engine.plan import Source
from qlora_tools.errors import IncompatibleError, MissingError, UsageError
from qlora_tools.manifest import read_manifest
from qlora_tools.names import split_tensor
from qlora_tools.progress import Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import TensorSpec, spec_of
from qlora_tools.stages.quantize import quantized_names, stored_spec
from qlora_tools.verbs.heads import Head, labelled, labels_of, live_names, with_head
from qlora_tools.verbs.opening import folder_name, open_model, plain_config
from qlora_tools.verbs.origins import describe_adapter, describe_checkpoint

TARGETS = ("original", "trained")
_CODECS: Mapping[str, Codec] = {"nf4": NF4(), "int8": Int8()}
#: Starting points and objectives that put what quantization lost into the factors.
_CORRECTING = {"method": ("loftq", "qera"), "init": ("loftq", "qera"), "objective": ("total", "split")}


@dataclass(frozen=True)
class Merged:
    """A merged model ready to be stored: ``source`` is merged, ``base`` what it was merged onto. ``simulated``: the codec that a 16-bit checkpoint was put
    through to get there. ``head``: the one that an adapter brings; ``checkpoint`` is then named as its class names tensors."""

    checkpoint: LogicalCheckpoint
    base: Source
    source: MergedSource
    adapters: tuple[tuple[Adapter, float], ...]
    adapter_folders: tuple[Path, ...]
    target: str
    simulated: Codec | None = None
    head: Head | None = None

    @property
    def name(self) -> str:
        """Base and adapters, joined by plus signs."""
        return "+".join(folder_name(folder) for folder in (self.checkpoint.folder, *self.adapter_folders))

    @property
    def config(self) -> dict[str, Any]:
        """The merged model's config.json: untied where the adapter parted a tied pair, with the vocabulary and the classes it now has."""
        config = plain_config(self.checkpoint.config)
        if labels := self._new_labels():
            config = labelled(config, labels)
        if self.source.untied:
            config["tie_word_embeddings"] = False
        for name, spec in self.source.specs.items():
            grown = name in self.base.specs and spec.shape != self.base.specs[name].shape
            if grown and self.checkpoint.family.role(name.removesuffix(".weight")) in ("embedding", "head") and "vocab_size" in config:
                config["vocab_size"] = spec.shape[0]
        return config

    def _new_labels(self) -> tuple[str, ...]:
        """Classes that a head of the base's own size was trained to tell apart; a new head's are in the checkpoint's config."""
        found = {labels_of(folder) for folder in self.adapter_folders} - {()}
        if self.head is not None or len(found) != 1:
            return ()
        labels, role = found.pop(), self.checkpoint.family.role
        replaced = (part for adapter, _ in self.adapters for name, part in adapter.replacements.items() if role(split_tensor(name)[0]) == "head")
        return labels if any(part.spec.shape[:1] == (len(labels),) for part in replaced) else ()

    @property
    def report(self) -> dict[str, Any]:
        """What a manifest says about a head that the base did not have."""
        return {"head": self.head.record()} if self.head else {}

    def of_first(self, count: int) -> Merged:
        """The same with the first ``count`` of its adapters alone."""
        if count == len(self.adapters):
            return self
        adapters, folders = self.adapters[:count], self.adapter_folders[:count]
        return replace(self, source=_merged(self.checkpoint, self.base, adapters, self.head), adapters=adapters, adapter_folders=folders)

    def check_asked(self, **asked: object) -> None:
        """Raises UsageError where one of ``asked`` (option -> its value) needs the base to run, and its head comes with the adapter."""
        named = [f"--{option}" for option, value in asked.items() if value is not None]
        if self.head is not None and named:
            raise UsageError(
                f"{', '.join(named)} would run {self.checkpoint.folder}, which has not the head that {self.head.adapter} brings",
                hint="merge it dense first, then go on with the merged checkpoint: qlt merge, then qlt quantize, qlt export or qlt eval",
            )

    def inputs(self, dest: Path) -> dict[str, dict[str, str]]:
        """What the manifest of ``dest`` says about base and adapters."""
        adapters = {f"adapter{number or ''}": describe_adapter(folder, dest) for number, folder in enumerate(self.adapter_folders)}
        return {"base": describe_checkpoint(as_stored(self.checkpoint), dest), **adapters}


def open_merged(
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    target: str | None,
    simulate: Codec,
    progress: Progress,
    *,
    anyway: bool = False,
) -> Merged:
    """Read the base and its adapters from headers and check that they fit.

    ``target=None``: ``trained`` for a quantized base and for adapters that correct a quantized one, else ``original``. ``simulate`` is the codec of the
    round trip when ``trained`` is wanted on a 16-bit base and no adapter says which one it was trained on. ``anyway``: do not refuse what counts a correction twice.
    A head that the base does not have is taken from an adapter that brings it (``verbs/heads.py``).

    Raises:
        UsageError: ``original`` is asked of a quantized base, or of an adapter that corrects a quantized one. And what ``with_head``, ``read_adapter`` and
        ``MergedSource`` raise.
    """
    opened = open_model(base, progress)
    folders = tuple(adapter_folder(path) for path, _ in adapters)
    checkpoint, head = with_head(opened, folders)
    if head is not None:
        progress.note(head.note)
    correcting = next((said for folder in folders if (said := correction(folder))), None)
    target = target or ("trained" if checkpoint.quantized or correcting else "original")
    if target == "original" and checkpoint.quantized:
        raise UsageError(
            f"{base} is quantized, so the original weights are not at hand", hint="give the 16-bit model as --base, or merge with --target trained"
        )
    if target == "original" and correcting and not anyway:
        raise UsageError(
            f"{correcting}: its factors hold what quantization lost, which the original weights still have: it would count twice",
            hint="merge with --target trained, or give the quantized model as --base (--anyway merges all the same)",
        )
    simulated = None if target == "original" or checkpoint.quantized else next((codec for folder in folders if (codec := trained_on(folder))), simulate)
    view: Source = RoundTripped(checkpoint, simulated) if simulated else checkpoint
    bound = tuple((bound_to(checkpoint, folder, head), weight) for folder, (_, weight) in zip(folders, adapters, strict=True))
    return Merged(checkpoint, view, _merged(checkpoint, view, bound, head), bound, folders, target, simulated, head)


def _merged(checkpoint: LogicalCheckpoint, view: Source, bound: Sequence[tuple[Adapter, float]], head: Head | None) -> MergedSource:
    return MergedSource(view, bound, ties=checkpoint.ties, fingerprint=base_fingerprint(checkpoint), added=head.added if head else None)


def bound_to(checkpoint: LogicalCheckpoint, folder: Path, head: Head | None = None) -> Adapter:
    """The adapter in ``folder`` bound to ``checkpoint``, by the names of its tensors or by those that transformers gives them; with ``head``, it may replace
    what that adds.

    Raises:
        IncompatibleError: it fits neither way. And what else ``read_adapter`` raises.
    """
    specs = {**checkpoint.specs, **(head.added if head else {})}
    try:
        adapter = read_adapter(folder, specs, checkpoint.family, ties=checkpoint.ties)
    except IncompatibleError as error:
        live = head.live if head else live_names(checkpoint, folder)
        if not live:
            raise
        try:
            adapter = _by_live_names(folder, specs, live, checkpoint)
        except IncompatibleError:
            raise error from None
    if not isinstance(checkpoint, RenamedCheckpoint):
        return adapter
    names = checkpoint.new_names
    return replace(adapter, base_tensors={names[name]: sha256 for name, sha256 in adapter.base_tensors.items() if name in names})


def _by_live_names(folder: Path, specs: Mapping[str, TensorSpec], live: Mapping[str, str], checkpoint: LogicalCheckpoint) -> Adapter:
    """The adapter bound to tensors under their ``live`` names, and then called as they are stored."""
    called = {live.get(name, name): spec for name, spec in specs.items()}
    ties = {live.get(tied, tied): live.get(owner, owner) for tied, owner in checkpoint.ties.items()}
    adapter, stored = read_adapter(folder, called, checkpoint.family, ties=ties), {loaded: name for name, loaded in live.items()}
    fields = ("deltas", "biases", "replacements", "token_rows")
    renamed: dict[str, Any] = {field: {stored.get(name, name): part for name, part in getattr(adapter, field).items()} for field in fields}
    return replace(adapter, **renamed)


def correction(folder: Path) -> str | None:
    """A sentence on how the adapter in ``folder`` came to hold what quantization lost; ``None`` where nothing says so."""
    return next((said for key, values in _CORRECTING.items() if (said := made_with(folder, key, values))), None)


def made_with(folder: Path, key: str, values: Sequence[str]) -> str | None:
    """A sentence that names the one of ``values`` which the command behind the adapter, or behind what it was trained from, has under ``key``."""
    manifest = read_manifest(folder)
    command: Any = manifest.command if manifest else None
    while isinstance(command, Mapping):
        if command.get(key) in values:
            return f"{folder} was made with {key} {command[key]!r}"
        command = command.get("start")
    return None


def trained_on(folder: Path) -> Codec | None:
    """The codec of the base that the adapter in ``folder`` is for, as its manifest says; ``None`` where that does not tell, or says 16 bits."""
    manifest = read_manifest(folder)
    return _CODECS.get(str(manifest.command.get("base_format"))) if manifest else None


class Tensors:
    """Tensors in memory as a source."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.specs: Mapping[str, TensorSpec] = {name: spec_of(name, tensor) for name, tensor in tensors.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The tensor, or its rows."""
        return self._tensors[name] if rows is None else self._tensors[name][rows[0] : rows[1]]


class RoundTripped:
    """A checkpoint whose linears have been through a codec and back: the base that an adapter on a quantized model saw."""

    def __init__(self, checkpoint: LogicalCheckpoint, codec: Codec) -> None:
        self._checkpoint, self._codec = checkpoint, codec
        self._chosen = frozenset(quantized_names(checkpoint, checkpoint.family, codec))
        self.specs: Mapping[str, TensorSpec] = checkpoint.specs

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The tensor (or its rows) after encoding and decoding the whole of it."""
        if name not in self._chosen:
            return self._checkpoint.read(name, rows)
        stored = stored_spec(self.specs[name], self._checkpoint.family)
        dense = self._checkpoint.read(name)
        turned = self._checkpoint.family.stores_inputs_first(name, dense.shape)
        decoded = self._codec.decode(stored, self._codec.encode(stored, dense.T.contiguous() if turned else dense))
        decoded = decoded.T if turned else decoded
        return decoded if rows is None else decoded[rows[0] : rows[1]]


def adapter_folder(path: str | Path) -> Path:
    """An adapter's folder, or the snapshot of a hub id."""
    from qlora_tools.checkpoint.hub import resolve_model

    folder = resolve_model(str(path))
    if not (folder / "adapter_config.json").exists():
        raise MissingError(
            f"{folder} holds no adapter_config.json: it is not a PEFT adapter", hint="make one with `qlt extract`, or give the adapter's own folder"
        )
    return folder
