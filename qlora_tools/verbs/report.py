"""``qlt report``: the table, the Markdown, the page and the plots of benchmarks that have run, drawn again from ``bench.json``. Nothing is measured.

A run is the folder that `qlt bench` wrote, or a ``bench.json`` wherever it lies now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tools.bench.compare import MARGIN, Compared, compare_records
from qlora_tools.bench.page import bench_page
from qlora_tools.bench.pick import Picked, pick
from qlora_tools.bench.plots import write_plots
from qlora_tools.bench.record import FILE_NAME, BenchRecord
from qlora_tools.bench.record_file import read_record
from qlora_tools.bench.table import to_markdown
from qlora_tools.checkpoint.folder import check_output, output_folder, replace_file, seal
from qlora_tools.errors import CorruptError, IncompatibleError, MissingError, OutputExistsError, QltError
from qlora_tools.manifest import FILE_NAME as MANIFEST
from qlora_tools.manifest import Manifest, read_manifest
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.intervals import compare as compare_quality
from qlora_tools.quality.outputs import best_metric, compare_outputs, is_outputs
from qlora_tools.quality.probe import divergence_of
from qlora_tools.verbs.bench_names import RUNS, unique_names

PAGE, TABLE, PLOTS = "report.html", "report.md", "plots"


@dataclass(frozen=True)
class Report:
    """One run: where its record lies, and where its pages were drawn; ``None`` where they were not, since the run's folder is not one of `qlt bench`."""

    run: Path
    output: Path | None
    record: BenchRecord
    picked: Picked | None
    compared: Compared | None


@dataclass(frozen=True)
class ReportResult:
    reports: tuple[Report, ...]
    dry_run: bool


def report(
    *,
    runs: Sequence[str | Path] = (),
    compare: str | Path | None = None,
    margin: float = MARGIN,
    pick: str | None = None,
    output: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> ReportResult:
    """Draw ``runs`` again, without any the latest below ``runs/``: in their own folders, or with ``output`` into that folder, by name where there are several.

    ``compare``: an older run that each is held against, up to ``margin``; ``pick``: wishes (see ``bench/pick.py``).

    Raises:
        MissingError: no such run. CorruptError: its ``bench.json`` is none, of another version, or not to be drawn. IncompatibleError: nothing to compare.
    """
    places = [Path(run) for run in runs] or [latest_run(RUNS, progress)]
    old = read_record(Path(compare)) if compare is not None else None
    records = [(place, read_record(place)) for place in places]
    homes = [place if place.is_dir() else place.parent for place in places]
    names = unique_names(list(dict.fromkeys(homes)))
    found = []
    for (place, record), home in zip(records, homes, strict=True):
        dest = (output / names[home] if output is not None and len(places) > 1 else output) or None
        if dest is not None:
            check_output(dest, force=force, inputs=[home])
        with _foreign_figures(place, *([Path(compare)] if compare is not None else [])):
            judged = picked(record, pick), compared(record, old, margin, compare)
            to_markdown(record)  # before anything is written
        found.append(Report(place, dest or (home if (home / MANIFEST).is_file() else None), record, *judged))
    if not dry_run:
        with progress.task("report", len(found), "runs") as task:
            for item in found:
                if item.output is not None:
                    with _foreign_figures(item.run):
                        _draw(item.record, item.output, force=force, anew=output is not None)
                task.advance(label=item.record.title)
    return ReportResult(tuple(found), dry_run)


@contextmanager
def _foreign_figures(*places: Path) -> Iterator[None]:
    """What fails in the block for figures that no benchmark writes is told as the fault of the records in ``places``, whoever made them.

    Raises:
        CorruptError: names them.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, StopIteration, ArithmeticError, RecursionError) as error:
        if isinstance(error, QltError):
            raise
        files = " or ".join(str(place / FILE_NAME if place.is_dir() else place) for place in places)
        raise CorruptError(f"{files} holds figures that cannot be drawn: {type(error).__name__}: {str(error)[:200]}", hint="measure again") from error


def latest_run(folder: Path, progress: Progress = SILENT) -> Path:
    """The run below ``folder`` that was measured last. One that cannot be read does not hide the others; a note names it.

    Raises:
        MissingError: there is none. CorruptError, OSError: there are some, and none that can be read.
    """
    found = [path.parent for path in folder.glob(f"*/{FILE_NAME}")]
    if not found:
        raise MissingError(f"{folder} holds no benchmark", hint="run `qlt bench` first, or name a run")
    readable = []
    for path in found:
        try:
            readable.append((read_record(path).created, path.name, path))
        except (CorruptError, OSError) as error:
            refused = error
            progress.note(f"left out: {error}")
    if not readable:
        raise refused
    return max(readable)[2]


def write_report(record: BenchRecord, folder: Path) -> None:
    """All files of a run, into a new folder."""
    (folder / FILE_NAME).write_bytes(record.to_json())
    (folder / PAGE).write_text(bench_page(record), encoding="utf-8")
    (folder / TABLE).write_text(to_markdown(record), encoding="utf-8")
    (folder / PLOTS).mkdir()
    write_plots(record, folder / PLOTS)
    seal(folder, Manifest("bench", {"verb": "bench"}))


def _draw(record: BenchRecord, dest: Path, *, force: bool, anew: bool) -> None:
    """A new folder; or, in a run's own, every file in the place of the one before, whatever else lies there untouched.

    Raises:
        OutputExistsError: what is called ``plots`` there is a link or no folder.
    """
    if anew:
        with output_folder(dest, force=force) as folder:
            write_report(record, folder)
        return
    plots = dest / PLOTS
    if plots.is_symlink() or (plots.exists() and not plots.is_dir()):
        raise OutputExistsError(f"{plots} is not the run's own folder, so nothing is drawn into it", hint="remove it, or give another folder with -o")
    replace_file(dest / PAGE, bench_page(record).encode())
    replace_file(dest / TABLE, to_markdown(record).encode())
    plots.mkdir(exist_ok=True)
    write_plots(record, plots)
    seal(dest, read_manifest(dest) or Manifest("bench", {"verb": "bench"}))


def picked(record: BenchRecord, wishes: str | None) -> Picked | None:
    """The setting of ``record`` that meets ``wishes``."""
    return pick(record, wishes) if wishes is not None else None


def compared(new: BenchRecord, old: BenchRecord | None, margin: float, name: str | Path | None = None) -> Compared | None:
    """``new`` against ``old``, quality window by window, or input by input."""
    return compare_records(new, old, margin=margin, paired=quality_ratio, baseline=str(name or "")) if old is not None else None


def quality_ratio(new: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[float, tuple[float, float] | None] | None:
    """The ratio of two stored KLs, or of errors where a model chooses no classes, with its paired interval; ``None`` where not judged on the same windows."""
    if is_outputs(new) != is_outputs(old):
        return None
    try:
        if is_outputs(new):
            found = compare_outputs("new", new, "old", old, best_metric((new, old)))
        else:
            found = compare_quality("new", divergence_of(new), "old", divergence_of(old), "kl")
    except (IncompatibleError, KeyError, TypeError):  # other windows, or figures of an older kind
        return None
    return found.effect.value, found.effect.bounds
