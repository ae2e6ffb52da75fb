"""``qlt bench``."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_tools.cli.commands.report import judging_options, leave, show, tell_judgements
from qlora_tools.cli.options import Shared, adapters_option, examples, shared, weighted
from qlora_tools.cli.words import megabytes
from qlora_tools.errors import MissingError

if TYPE_CHECKING:
    from qlora_tools.verbs.bench import BenchResult

EPILOG = examples(
    "qlt bench                                # the exports of the last model, beside fp32",
    "qlt bench base/ --settings int8,int4,torch-nf4       # exports what is missing",
    "qlt bench base/ --adapter tuned-r16 --settings fp16,int8,nf4,int4 --device cuda --prompt 128,512 --batch 1,8",
    "qlt bench exports/tuned-int8 exports/tuned-int4 --reference exports/tuned-fp32",
    "qlt bench exports/* --compare runs/bench-001 --margin 3%",
    'qlt bench base/ --pick "kl<0.01,file<4GB"',
)


class _Counts(click.ParamType[tuple[int, ...]]):
    """``128`` or ``128,512``."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            self.fail(f"{value!r} is not a list of numbers from 1 up; write 128 or 128,512", param, ctx)
        return tuple(dict.fromkeys(int(word) for word in words))


COUNTS = _Counts()


@click.command("bench", epilog=EPILOG)
@click.argument("models", nargs=-1)
@adapters_option
@click.option(
    "--settings",
    metavar="NAME,...",
    help="Measure a checkpoint so: fp32 fp16 bf16 int8 w8a8 int4 nf4 are exports, made where they are missing; torch-fp32 torch-bf16 torch-fp16 torch-nf4 "
    "torch-int8 are transformers. Default for one checkpoint: fp32,int8,int4, on CUDA fp16,int8,int4,nf4,torch-bf16,torch-nf4.",
)
@click.option(
    "--reference",
    metavar="DIR",
    help="What quality is judged against. Default: the fp32 export of the same model, made if it is missing; on CUDA the checkpoint itself.",
)
@click.option(
    "--untuned", metavar="DIR", help="The one of MODELS that was not fine-tuned: the share of the gain that others keep is shown. With --adapter: the base."
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to judge on. Default: the held-out part of Python's own language reference.",
)
@click.option(
    "--labels", type=click.Path(exists=True, path_type=Path), help="Right answers for a classifier: {text, label} lines, or images in folders of their classes."
)
@click.option("--prompt", type=COUNTS, default="128", show_default=True, help="Prompt tokens; several, by commas, are measured one after the other.")
@click.option("--new", type=COUNTS, default="65", show_default=True, help="New tokens.")
@click.option("--batch", type=COUNTS, default="1", show_default=True, help="Sequences at once.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="Fresh processes per setting and case, interleaved; below 6 a time has no interval, below 5 none is called faster.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads per process. Default: all cores.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=1e6),
    default=600.0,
    show_default=True,
    help="Seconds that a process may take. Judging quality may take an hour, or this if it is longer.",
)
@click.option("--limits", is_flag=True, help="Also look for the smallest limit of GPU memory that each setting runs under. Takes many processes.")
@click.option("--tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens to judge quality on at most.")
@click.option("--quality/--no-quality", default=True, show_default=True, help="Judge quality beside speed.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted benchmark: the same command again.")
@judging_options
@shared
def command(
    common: Shared,
    models: tuple[str, ...],
    adapters: tuple[str, ...],
    settings: str | None,
    reference: str | None,
    text: Path | None,
    prompt: tuple[int, ...],
    new: tuple[int, ...],
    batch: tuple[int, ...],
    tokens: int,
    timeout: float,
    **choices: Any,
) -> None:
    """Measure latency, memory and quality of MODELS: exports, or checkpoints in several settings. Writes JSON, a table, a page and plots."""
    from qlora_tools import api

    known, given = common.session.recall(), weighted(adapters)
    named, chosen, reference = _line_up(common, list(models), given, settings, reference, judged=choices["quality"])
    result = api.bench(
        models=chosen,
        adapters=given,
        settings=named,
        reference=reference,
        text=text,
        workload=api.Workload(cases=api.sweep(prompt=prompt, new=new, batch=batch)),
        timeout_s=timeout,
        quality_tokens=tokens,
        layers=None if models or given else [layer for folder, _ in known.get("adapters") or [] for layer in api.layers_of(Path(folder))],
        command=["qlt", *sys.argv[1:]],
        **choices,
        **common.arguments,
    )
    for path in result.skipped:
        common.screen.remark(f"{path} is not a model, left out")
    if result.record is not None:
        show(common.screen, result.record)
        tell_judgements(common.screen, result.picked, result.compared)
    else:
        _show_plan(common, result)
    _remember(common, result, given)
    where = common.session.relative(result.output)
    common.screen.result(result, f"dry run: would write {where}" if result.dry_run else f"wrote {where}/report.html, report.md, bench.json and plots/")
    leave((result.picked, result.compared))


def _remember(common: Shared, result: BenchResult, given: list[tuple[str, float]]) -> None:
    """Exports that were made or found for this are the last model's from now on, as if `qlt export` had made them."""
    for found in result.exports:
        made = {"path": common.session.relative(found.folder), "scheme": found.scheme, "target": None}
        model = {"base": found.model, "model": None} if given else {"model": found.model, "base": None}
        common.session.add_export({**made, **model, "adapters": [list(pair) for pair in given]})


def _show_plan(common: Shared, result: BenchResult) -> None:
    """What a dry run found."""
    plan = result.plan
    rows = [
        [
            step.name,
            step.action + ("" if step.measured else ", judges only"),
            step.reason or step.export or "",
            megabytes(step.bytes) if step.bytes is not None else "n/a",
        ]
        for step in plan.steps
    ]
    common.screen.table("", ["Setting", "Weights", "Command", "Size"], rows, left=3)
    cases = ", ".join(case.name for case in plan.cases)
    common.screen.say(f"{cases} (sequences x tokens in + out), {plan.rounds} rounds: {plan.processes} processes; exports to make: {megabytes(plan.new_bytes)}")


def _line_up(
    common: Shared, models: list[str], adapters: list[tuple[str, float]], settings: str | None, reference: str | None, *, judged: bool
) -> tuple[list[str] | None, list[str], str | None]:
    """Settings, models and reference: as typed, or what the session remembers, or what one checkpoint alone asks for."""
    from qlora_tools.verbs.opening import is_export

    named = [word.strip() for word in settings.split(",") if word.strip()] if settings is not None else None
    if not models and (adapters or named):
        models = [str(common.session.pick("base" if adapters else "model", "MODEL"))]
        common.screen.remark(f"using {'base' if adapters else 'model'} {models[0]}")
    if named is None and len(models) == 1 and not is_export(Path(models[0])):
        named = ["default"]
    if named is not None or adapters or (models and not judged):
        return named, models, reference
    chosen, reference = _with_reference(common, models, reference, judged=judged)
    return None, chosen, reference


def _with_reference(common: Shared, models: list[str], reference: str | None, *, judged: bool = True) -> tuple[list[str], str | None]:
    """What to measure, the reference first. Without words: the exports of the last model; its fp32 export is made where it is missing."""
    exports = common.session.recall().get("exports") or []
    if not models:
        models = _of_last_model(common, exports)
    if not judged:
        return models, reference
    if reference is None:
        reference = _of_scheme(common, models, "fp32") or _fp32_beside(common, models[0], exports) or _of_scheme(common, models, "bf16", "fp16")
    if reference is None:
        if common.dry_run:
            return models, None
        common.screen.remark("note: no fp32 reference among these, quality is not judged; name one with --reference")
        return models, None
    return [reference, *(model for model in models if Path(model) != Path(reference))], reference


def _of_last_model(common: Shared, exports: list[dict[str, Any]]) -> list[str]:
    """The remembered exports of the last model, as far as they are there and of the model as it was for the last of them."""
    from qlora_tools.verbs.bench_reference import of_one_model

    last = common.session.pick("exports", "MODELS")[-1]
    fields = ("model", "base", "adapters", "target")
    known = [item["path"] for item in exports if all(item.get(field) == last.get(field) for field in fields) and Path(item["path"]).is_dir()]
    if last["path"] not in known:
        raise MissingError(f"the last export, {last['path']}, is not there any more", hint="name what to measure: qlt bench MODEL")
    models = [path for path in known if path == last["path"] or of_one_model(Path(path), Path(last["path"])) is not False]
    if older := [path for path in known if path not in models]:
        common.screen.remark(f"note: {', '.join(older)}: made of another state of the model than {last['path']}, or in another way; left out")
    common.screen.remark(f"using {', '.join(models)}")
    return models


def _of_scheme(common: Shared, models: list[str], *schemes: str) -> str | None:
    return next((model for scheme in schemes for model in models if common.session.scheme_of(model) == scheme), None)


def _fp32_beside(common: Shared, model: str, exports: list[dict[str, Any]]) -> str | None:
    """The fp32 export of what ``model`` was made of: one that lies there, or made now."""
    from qlora_tools import api
    from qlora_tools.verbs.bench_reference import SCHEME, is_made_of, judges, places_beside
    from qlora_tools.verbs.exporting import open_drawn

    own = next((item for item in exports if Path(item["path"]) == Path(model)), None)
    if own is None:
        return None
    beside = itertools.takewhile(Path.exists, places_beside(Path(model), own["scheme"]))
    for path in (*(Path(item["path"]) for item in exports if item["scheme"] == SCHEME), *beside):
        if judges(path, Path(model)):
            return str(path)
    merged = [(path, weight) for path, weight in own["adapters"]]
    drawn = open_drawn(own["model"], own["base"], merged, (), (), own.get("target"), True, common.screen.progress)
    if not is_made_of(Path(model), drawn):
        common.screen.remark(
            f"note: {own['model'] or own['base']} is not what {model} was made of any more, or another way was taken; no fp32 export is made of it"
        )
        return None
    if common.dry_run:
        common.screen.remark("the fp32 export of the same model would be made, as the reference")
        return None
    common.screen.remark("making the fp32 export of the same model, as the reference")
    dest = next(path for path in places_beside(Path(model), own["scheme"]) if not path.exists())
    api.export(
        model=own["model"],
        base=own["base"],
        adapters=merged,
        target=own.get("target"),
        scheme=SCHEME,
        output=dest,
        progress=common.screen.progress,
    )
    common.session.add_export({**own, "path": str(dest), "scheme": SCHEME}, last=False)
    return str(dest)
