"""``qlt bench``: latency, memory and quality of models in several settings side by side, as JSON, a table, a page and plots.

``bench_plan.py`` decides what runs and what has to be made for it, ``bench_settings.py`` makes it, ``bench/`` measures, ``quality/`` judges, and
``report.py`` draws.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_tools.bench.accelerator import Accelerators, Instruments
from qlora_tools.bench.attempts import QualityTask
from qlora_tools.bench.compare import MARGIN, Compared, check_comparable
from qlora_tools.bench.pick import Picked, parse_wishes
from qlora_tools.bench.record import BenchRecord, Layer, Workload
from qlora_tools.bench.record_file import read_record
from qlora_tools.bench.run import run_bench
from qlora_tools.checkpoint.folder import check_output, output_folder
from qlora_tools.cores import allowed_cores
from qlora_tools.errors import Interrupted, MissingError, OutputExistsError, UsageError
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.outputs import PROBE as OUTPUTS_PROBE
from qlora_tools.quality.probe import PROBE, probe_options
from qlora_tools.quality.ranking import comparisons, with_retention
from qlora_tools.verbs.bench_layers import layers_of, layers_of_models
from qlora_tools.verbs.bench_names import RUNS, interrupted_run, journal_of, next_run
from qlora_tools.verbs.bench_plan import BenchPlan, Exported, LineUp, check_room, line_up, sweep
from qlora_tools.verbs.engines import ONNX_FORWARD, TORCH_FORWARD
from qlora_tools.verbs.exporting import Given
from qlora_tools.verbs.reading import read_text
from qlora_tools.verbs.report import compared, picked, write_report

#: Seconds that judging one setting may take at least: two models read a whole text.
JUDGING_S = 3600.0
__all__ = ["BenchPlan", "BenchResult", "Exported", "bench", "layers_of", "sweep"]


@dataclass(frozen=True)
class BenchResult:
    """Where the results lie and what they are. ``reference`` is the setting that quality is judged against, ``plan`` what had to be done, ``skipped``
    arguments that are no models, ``exports`` the graphs of the given checkpoints that lie there now. ``record`` is ``None`` in a dry run; ``picked`` and
    ``compared`` are what was asked for with it."""

    output: Path
    dry_run: bool
    settings: tuple[str, ...]
    reference: str | None
    plan: BenchPlan
    skipped: tuple[str, ...]
    record: BenchRecord | None
    exports: tuple[Exported, ...] = ()
    picked: Picked | None = None
    compared: Compared | None = None


def bench(
    *,
    models: Sequence[str | Path],
    adapters: Given = (),
    settings: Sequence[str] | None = None,
    reference: str | Path | None = None,
    untuned: str | Path | None = None,
    text: Path | None = None,
    labels: Path | None = None,
    workload: Workload | None = None,
    rounds: int = 6,
    threads: int | None = None,
    timeout_s: float = 600.0,
    limits: bool = False,
    quality: bool = True,
    quality_tokens: int = 4096,
    context: int = 256,
    layers: Sequence[Layer] | None = None,
    title: str = "Benchmark",
    compare: str | Path | None = None,
    margin: float = MARGIN,
    pick: str | None = None,
    resume: bool = False,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    command: Sequence[str] = (),
    progress: Progress = SILENT,
) -> BenchResult:
    """Measure ``models``, each setting in fresh processes.

    Exports, and without ``settings`` checkpoints, are measured as they are. With ``settings`` (``fp32 fp16 bf16 int8 w8a8 int4 nf4``: exports;
    ``torch-fp32 torch-bf16 torch-fp16 torch-nf4 torch-int8``: transformers) a checkpoint, or a base with ``adapters`` merged, is measured in each;
    what is missing for that is exported first, and an export that fails leaves a row with its reason. ``workload``: what each is asked to do, by default
    128 tokens in and 65 out. ``reference``: the model that KL, agreement and the perplexity ratio refer to; without one it is the fp32 export of the
    first checkpoint, on a GPU that checkpoint itself; for exports alone quality is left out. ``untuned``: one of ``models`` that is the base before
    fine-tuning, with ``adapters`` the base itself; the others then show how much of the gain they keep. ``text``: to judge on; ``labels``: right answers for a
    classifier. ``limits``: also look for the smallest limit of GPU memory that each runs under. ``layers``: of the report, by default what manifests say.
    ``compare``: an older run, ``margin`` the share up to which a change is none; ``pick``: wishes (see ``bench/pick.py``). ``resume`` goes on with a benchmark that was interrupted, ``output`` or the last one.

    Raises:
        UsageError: no models, unknown settings or wishes, work that is longer than a model's positions. MissingError: a model that is none, or nothing to
        resume. What a child does wrong becomes its row's reason.
    """
    chosen = workload or Workload()
    if pick is not None:
        parse_wishes(pick)  # before hours are spent
    before = read_record(Path(compare)) if compare is not None else None
    found = line_up(models, adapters=adapters, settings=settings, reference=reference, untuned=untuned, device=device, judged=quality, progress=progress)
    check_room(found, chosen)
    if before is not None:  # before hours are spent, as above
        check_comparable([item.setting for item in found.planned], chosen.cases, before, margin)
    dest = _destination(output, resume, force)
    inputs = [*found.inputs, *(path for path in (text, labels) if path is not None)]
    check_output(dest, force=force, inputs=inputs)
    names, plan = tuple(item.setting.id for item in found.planned), found.described(chosen, rounds)
    if dry_run:
        return BenchResult(dest, True, names, found.reference.setting.id if found.reference else None, plan, found.skipped, None)
    accelerators = Accelerators([item.setting for item in found.everything], Instruments())  # before exports hold a device themselves
    found = found.made()
    task, ids, notes = _judging(found, quality, text, labels, quality_tokens, context, max(timeout_s, JUDGING_S))
    chosen = replace(chosen, ids=tuple(ids[: chosen.longest])) if ids and chosen.ids is None else chosen
    with _journal(dest, resume) as journal:
        record = run_bench(
            [item.setting for item in found.planned],
            chosen,
            rounds=rounds,
            threads=threads or allowed_cores(),
            timeout_s=timeout_s,
            quality=task,
            limits=limits,
            accelerators=accelerators,
            journal=journal,
            command=command,
            title=title,
            progress=progress,
        )
    known = layers if layers is not None else _layers(found)
    record = _judged(replace(record, notes=(*found.notes, *record.notes, *notes), layers=tuple(known)), found.untuned)
    stored = _store(record, dest, force, inputs, elsewhere=output is None)
    journal.unlink(missing_ok=True)
    return BenchResult(
        output=stored,
        dry_run=False,
        settings=names,
        reference=task.reference.id if task else None,
        plan=plan,
        skipped=found.skipped,
        record=record,
        exports=found.exports,
        picked=picked(record, pick),
        compared=compared(record, before, margin, compare),
    )


def _destination(output: Path | None, resume: bool, force: bool) -> Path:
    """``output``, or a new run, or with ``resume`` the one that was interrupted.

    Raises:
        MissingError: nothing was interrupted. OutputExistsError: beginning anew would lose what an unfinished benchmark has measured.
    """
    if not resume and output is not None and not force and (journal := journal_of(output)).exists() and journal.stat().st_size:
        raise OutputExistsError(f"{output}: an unfinished benchmark of that name is there", hint="go on with --resume, or begin anew with --force")
    if not resume:
        return output or next_run(RUNS)
    found = output or interrupted_run(RUNS)
    if found is None or not journal_of(found).exists():
        where = found if found is not None else RUNS
        raise MissingError(f"{where}: there is no interrupted benchmark to go on with", hint="run without --resume, or name its output with -o")
    return found


@contextmanager
def _journal(dest: Path, resume: bool) -> Iterator[Path]:
    """The file that keeps what is finished. It outlives an interruption.

    Raises:
        UsageError: another benchmark is writing it. Interrupted: Ctrl-C or SIGTERM.
    """
    journal = journal_of(dest)
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{dest}: another benchmark is running for it", hint="let it end, or name another folder with -o") from None
        if not resume:
            stream.truncate(0)
        try:
            yield journal
        except KeyboardInterrupt:
            raise Interrupted("the benchmark was interrupted", hint="the same command with --resume goes on from what is finished", folder=dest) from None
        finally:
            if journal.exists() and not journal.stat().st_size:  # nothing was begun
                journal.unlink()


def _store(record: BenchRecord, dest: Path, force: bool, inputs: Sequence[Path], *, elsewhere: bool) -> Path:
    """Write the results. ``elsewhere``: take the next free run where another benchmark was faster; what took hours to measure is not lost to a name."""
    while True:
        try:
            with output_folder(dest, force=force, inputs=inputs) as folder:
                write_report(record, folder)
        except OutputExistsError:
            if not elsewhere:
                raise
            dest = next_run(RUNS)
        else:
            return dest


def _judging(
    found: LineUp, quality: bool, text: Path | None, labels: Path | None, tokens: int, context: int, patience: float
) -> tuple[QualityTask | None, list[int], list[str]]:
    """The task of judging quality within ``patience`` seconds a setting, the tokens of the text, and why there is none of it."""
    if not quality:
        return None, [], ["Quality was not judged: it was not asked for."]
    if found.reference is None:
        return None, [], ["Quality was not judged: there is no reference."]
    judge = found.reference.setting
    if judge.unavailable is not None:
        return None, [], [f"Quality was not judged: the reference is not there ({judge.unavailable})."]
    folder = Path(str(judge.path))
    if judge.engine in (ONNX_FORWARD, TORCH_FORWARD):
        from qlora_tools.verbs.evaluate_outputs import inputs_for

        return QualityTask(OUTPUTS_PROBE, judge, inputs_for(folder, text=text, labels=labels, tokens=tokens, context=context), patience), [], []
    if labels is not None:
        raise UsageError("labels are right answers for a classifier, and this model writes text", hint="leave out --labels")
    try:
        reading = read_text(folder, text, tokens=tokens, context=context)
    except MissingError as error:
        return None, [], [f"Quality was not judged: {error}"]
    options = probe_options(reading.corpus, reading.method, reading.windows)
    return QualityTask(PROBE, judge, options, patience), [int(token) for window in reading.windows for token in window.ids], []


def _layers(found: LineUp) -> list[Layer]:
    """What manifests say about the models and about the adapters that were merged for this."""
    folders = [Path(item.setting.path) for item in found.everything if item.setting.path]
    parts = [part.folder for item in found.planned if item.subject is not None for part in item.subject.drawn.adapters]
    return layers_of_models(folders, list(dict.fromkeys(parts)))


def _judged(record: BenchRecord, untuned: str | None) -> BenchRecord:
    """The record with pairwise verdicts and, where the untuned model was measured too, the share of the gain that is kept."""
    good: Mapping[str, Mapping[str, Any]] = {item.setting: item.figures for item in record.quality if item.status == "ok"}
    if len(good) < 2:
        return record
    if untuned is not None and untuned in good:
        good = with_retention(good, untuned)
    quality = tuple(replace(item, figures=good.get(item.setting, item.figures)) for item in record.quality)
    return replace(record, quality=quality, comparisons=(*record.comparisons, *comparisons(good)))
