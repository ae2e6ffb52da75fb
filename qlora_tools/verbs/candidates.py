"""Models to judge, as they were named: folders, hub ids, and adapters on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_tools.checkpoint.hub import resolve_model
from qlora_tools.errors import UsageError
from qlora_tools.progress import SILENT, Progress
from qlora_tools.verbs.opening import is_export

#: Stands between a base and the adapter on it, where both are named as one model.
_WITH = " + "


@dataclass(frozen=True)
class Candidate:
    """A model to judge: a checkpoint or export folder, with an adapter on it or none (PEFT's on a checkpoint, its own on an export)."""

    name: str
    folder: Path
    adapter: Path | None = None


def references_of(against: str | Path | Sequence[str | Path] | None, progress: Progress = SILENT) -> list[Candidate]:
    """What is judged against, each once, in order.

    Raises:
        What opening a model, or reading an adapter for it, raises.
    """
    found: dict[str, Candidate] = {}
    for name in [against] if isinstance(against, (str, Path)) else against or ():
        model, plus, adapter = str(name).partition(_WITH)
        found.setdefault(str(name), candidates_of([model.strip()], [adapter.strip()] if plus else [], progress)[-1])
    return list(found.values())


def candidates_of(models: Sequence[str | Path], adapters: Sequence[str | Path], progress: Progress = SILENT) -> list[Candidate]:
    """The models as given, then the first of them under each adapter, checked from headers alone before anything is loaded.

    Raises:
        UsageError: no models, or the first is an export that keeps no adapters. And what reading an adapter for a base raises.
    """
    if not models:
        raise UsageError("no models to judge")
    candidates = [Candidate(str(model), resolve_model(str(model))) for model in models]
    base = candidates[0]
    if adapters and is_export(base.folder):
        return [*candidates, *_kept(base, adapters)]
    for adapter in adapters:
        from qlora_tools.verbs.merging import open_merged
        from qlora_tools.verbs.quantize import codec_for

        merged = open_merged(base.folder, [(adapter, 1.0)], None, codec_for("nf4"), progress)
        merged.check_asked(adapter=adapter)
        candidates.append(Candidate(f"{base.name} + {adapter}", base.folder, merged.adapter_folders[0]))
    return candidates


def _kept(export: Candidate, adapters: Sequence[str | Path]) -> list[Candidate]:
    """An export under each of its own adapters."""
    from qlora_tools.export.runtime.adapters import adapters_beside, find_adapter

    if not adapters_beside(export.folder):
        raise UsageError(
            f"{export.name} is an export that keeps no adapters: none can be put on it",
            hint="give a checkpoint first, or export with `qlt export --adapters` or `qlt export --merge`",
        )
    return [Candidate(f"{export.name} + {adapter}", export.folder, find_adapter(export.folder, adapter)) for adapter in adapters]
