"""``qlt bench``: latency, memory and quality of exports side by side, as JSON, a table, a page and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_tools.bench.page import bench_page
from qlora_tools.bench.plots import write_plots
from qlora_tools.bench.record import FILE_NAME, BenchRecord, Layer, Setting, Workload
from qlora_tools.bench.run import QualityTask, run_bench
from qlora_tools.bench.table import to_markdown
from qlora_tools.checkpoint.folder import check_output, output_folder, seal
from qlora_tools.cores import allowed_cores
from qlora_tools.errors import MissingError, UsageError
from qlora_tools.manifest import Manifest, read_manifest
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.probe import PROBE, probe_options
from qlora_tools.quality.ranking import comparisons, with_retention
from qlora_tools.verbs.evaluate import engine_of, positions_of, read_text


@dataclass(frozen=True)
class BenchResult:
    """Where the results lie and what they are. ``reference`` is the setting that quality is judged against."""

    output: Path
    dry_run: bool
    settings: tuple[str, ...]
    reference: str | None
    record: BenchRecord | None


def bench(
    *,
    models: Sequence[str | Path],
    reference: str | Path | None = None,
    untuned: str | Path | None = None,
    text: Path | None = None,
    workload: Workload | None = None,
    rounds: int = 3,
    threads: int | None = None,
    quality_tokens: int = 4096,
    context: int = 256,
    layers: Sequence[Layer] = (),
    title: str = "Benchmark",
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    command: Sequence[str] = (),
    progress: Progress = SILENT,
) -> BenchResult:
    """Measure ``models`` (exports and checkpoints), each in fresh processes.

    ``workload``: what each is asked to do, by default 128 tokens in and 65 out. ``reference``: the folder that KL, agreement and the perplexity ratio refer to; without one quality is left out.
    ``untuned``: one of ``models`` that is the base before fine-tuning; the others then show how much of the gain they keep.

    Raises:
        UsageError: no models. MissingError: a folder that is none. What a child does wrong becomes its row's reason.
    """
    folders = [Path(model) for model in models]
    if not folders:
        raise UsageError("nothing to measure", hint="give exports, or make one with `qlt export`")
    for folder in folders:
        engine_of(folder, device)
    ids, labels = unique_names(folders), short_labels(folders)
    settings = [setting_of(folder, device, ids[folder], labels[folder]) for folder in folders]
    dest = output or next_run(Path("runs"))
    check_output(dest, force=force, inputs=folders)
    if dry_run:
        return BenchResult(dest, True, tuple(setting.id for setting in settings), Path(reference).name if reference else None, None)
    workload, task, notes = workload or Workload(), None, []
    _check_room(folders, workload)
    if reference is None:
        notes.append("Quality was not judged: there is no reference.")
    else:
        try:
            reading = read_text(Path(reference), text, tokens=quality_tokens, context=context)
            judge = setting_of(Path(reference), device, ids.get(Path(reference), Path(reference).name), None)
            task = QualityTask(PROBE, judge, probe_options(reading.corpus, reading.method, reading.windows))
            workload = replace(workload, ids=tuple(int(token) for window in reading.windows for token in window.ids)[: workload.longest])
        except MissingError as error:
            notes.append(f"Quality was not judged: {error}")
    record = run_bench(settings, workload, rounds=rounds, threads=threads or allowed_cores(), quality=task, command=command, title=title, progress=progress)
    record = _judged(replace(record, notes=(*record.notes, *notes), layers=tuple(layers)), ids.get(Path(untuned)) if untuned else None)
    _write(record, dest, force=force, inputs=folders)
    return BenchResult(dest, False, tuple(setting.id for setting in settings), task.reference.id if task else None, record)


def _check_room(folders: Sequence[Path], workload: Workload) -> None:
    for folder in folders:
        room = positions_of(folder)
        if room is not None and workload.longest > room:
            raise UsageError(f"{folder} has {room} positions, {workload.longest} tokens were asked for", hint="lower --prompt or --new")


def setting_of(folder: Path, device: str, name: str, label: str | None) -> Setting:
    """How ``folder`` is run; ``name`` tells it apart, ``label`` is what tables show."""
    engine, options = engine_of(folder, device)
    manifest = read_manifest(folder)
    scheme = str(manifest.command.get("scheme")) if manifest and manifest.command.get("scheme") else None
    return Setting(id=name, engine=engine, options=options, scheme=scheme, path=str(folder), label=label)


def unique_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder's shortest tail that no other folder has: ``int8``, or ``run1/int8`` beside ``run2/int8``."""
    parts = {folder: folder.resolve().parts for folder in folders}
    depth = 1
    while depth < max(map(len, parts.values())) and len({found[-depth:] for found in parts.values()}) < len(parts):
        depth += 1
    return {folder: "/".join(found[-depth:]) for folder, found in parts.items()}


def short_labels(folders: Sequence[Path]) -> dict[Path, str]:
    """Names without the words that all of them begin with: ``fp32`` and ``int8`` for ``base-tuned-r16-fp32`` and ``base-tuned-r16-int8``."""
    words = {folder: name.split("-") for folder, name in unique_names(folders).items()}
    shared = 0
    while len(words) > 1 and all(len(found) > shared + 1 for found in words.values()) and len({found[shared] for found in words.values()}) == 1:
        shared += 1
    return {folder: "-".join(found[shared:]) for folder, found in words.items()}


def layers_of(adapter: Path) -> list[Layer]:
    """The extraction's report of an adapter folder, for the page's own section; empty for adapters made elsewhere."""
    manifest = read_manifest(adapter)
    rows = manifest.report.get("rows", []) if manifest else []
    return [_layer(row) for row in rows]


def next_run(folder: Path) -> Path:
    """The first of ``bench-001``, ``bench-002``, ... that is not there."""
    number = 1
    while (folder / f"bench-{number:03}").exists():
        number += 1
    return folder / f"bench-{number:03}"


def _layer(row: Mapping[str, Any]) -> Layer:
    found = row["certificate"]
    kept, best = 1 - found["error"] ** 2, 1 - found["optimum"] ** 2
    return Layer(row["name"], tuple(row["shape"]), found["rank"], kept_energy=kept, best_energy=best, relative_error=found["error"])


def _judged(record: BenchRecord, untuned: str | None) -> BenchRecord:
    """The record with pairwise verdicts and, where the untuned model was measured too, the share of the gain that is kept."""
    good = {quality.setting: quality.figures for quality in record.quality if quality.status == "ok"}
    if len(good) < 2:
        return record
    if untuned in good:
        good = dict(with_retention(good, untuned))
    quality = tuple(replace(item, figures=good.get(item.setting, item.figures)) for item in record.quality)
    return replace(record, quality=quality, comparisons=tuple(comparisons(good)))


def _write(record: BenchRecord, dest: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    with output_folder(dest, force=force, inputs=inputs) as folder:
        (folder / FILE_NAME).write_bytes(record.to_json())
        (folder / "report.html").write_text(bench_page(record), encoding="utf-8")
        (folder / "report.md").write_text(to_markdown(record), encoding="utf-8")
        (folder / "plots").mkdir()
        write_plots(record, folder / "plots")
        seal(folder, Manifest("bench", {"verb": "bench"}))
