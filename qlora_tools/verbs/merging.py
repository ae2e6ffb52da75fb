"""A base with its adapters merged in, as a source: what ``merge`` stores and ``export --merge`` draws.

``onto`` says which base the change is added to. ``original`` is the checkpoint as given. ``dequantized`` is
what an adapter trained on a quantized base has really seen: the quantized weights made dense again, simulated
by a round trip when the base at hand is the 16-bit one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tools.adapters.merged import MergedSource, base_fingerprint
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.engine.plan import Source
from qlora_tools.errors import MissingError, UsageError
from qlora_tools.manifest import sha256_file
from qlora_tools.progress import Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.specs import TensorSpec
from qlora_tools.stages.quantize import quantized_names, stored_spec
from qlora_tools.verbs.opening import folder_name, open_model, plain_config

ONTO = ("original", "dequantized")


@dataclass(frozen=True)
class Merged:
    """A merged model ready to be stored: ``source`` is merged, ``base`` what it was merged onto."""

    checkpoint: LogicalCheckpoint
    base: Source
    source: MergedSource
    adapter_folders: tuple[Path, ...]
    onto: str

    @property
    def name(self) -> str:
        """Base and adapters, joined by plus signs."""
        return "+".join(folder_name(folder) for folder in (self.checkpoint.folder, *self.adapter_folders))

    @property
    def config(self) -> dict[str, Any]:
        """The merged model's config.json: untied where the adapter parted a tied pair, with the vocabulary it now has."""
        config = plain_config(self.checkpoint.config)
        if self.source.untied:
            config["tie_word_embeddings"] = False
        for name, spec in self.source.specs.items():
            grown = name in self.base.specs and spec.shape != self.base.specs[name].shape
            if grown and self.checkpoint.family.role(name.removesuffix(".weight")) in ("embedding", "head") and "vocab_size" in config:
                config["vocab_size"] = spec.shape[0]
        return config

    def inputs(self) -> dict[str, dict[str, str]]:
        """What a manifest says about base and adapters."""
        described = {"base": {"name": folder_name(self.checkpoint.folder), "headers_sha256": self.checkpoint.stored.headers_sha256()}}
        for number, folder in enumerate(self.adapter_folders):
            described[f"adapter{number or ''}"] = {"name": folder_name(folder), "sha256": sha256_file(folder / "adapter_model.safetensors")}
        return described


def open_merged(base: str | Path, adapters: Sequence[tuple[str | Path, float]], onto: str | None, simulate: Codec, progress: Progress) -> Merged:
    """Read the base and its adapters from headers and check that they fit.

    ``onto=None`` means the base as given. ``simulate`` is the codec of the round trip when ``dequantized`` is asked
    of a 16-bit base.

    Raises:
        UsageError: ``original`` is asked of a quantized base. And what ``read_adapter`` and ``MergedSource`` raise.
    """
    checkpoint = open_model(base, progress)
    onto = onto or ("dequantized" if checkpoint.quantized else "original")
    if onto == "original" and checkpoint.quantized:
        raise UsageError(
            f"{base} is quantized, so the original weights are not at hand", hint="give the 16-bit model as --base, or merge with --onto dequantized"
        )
    view: Source = RoundTripped(checkpoint, simulate) if onto == "dequantized" and not checkpoint.quantized else checkpoint
    folders = tuple(_adapter_folder(path) for path, _ in adapters)
    bound = [(read_adapter(folder, view.specs, checkpoint.family, ties=checkpoint.ties), weight) for folder, (_, weight) in zip(folders, adapters, strict=True)]
    source = MergedSource(view, bound, ties=checkpoint.ties, fingerprint=base_fingerprint(checkpoint))
    return Merged(checkpoint, view, source, folders, onto)


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


def _adapter_folder(path: str | Path) -> Path:
    """An adapter's folder, or the snapshot of a hub id."""
    from qlora_tools.checkpoint.hub import resolve_model

    folder = resolve_model(str(path))
    if not (folder / "adapter_config.json").exists():
        raise MissingError(
            f"{folder} holds no adapter_config.json: it is not a PEFT adapter", hint="make one with `qlt extract`, or give the adapter's own folder"
        )
    return folder
