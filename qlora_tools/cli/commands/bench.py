"""``qlt bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from qlora_tools.cli.options import Shared, examples, shared

EPILOG = examples(
    "qlt bench                                # the exports of the last model, beside fp32",
    "qlt bench exports/tuned-int8 exports/tuned-int4 --reference exports/tuned-fp32",
    "qlt bench exports/* --prompt 512 --new 128 --rounds 5",
)


@click.command("bench", epilog=EPILOG)
@click.argument("models", nargs=-1)
@click.option("--reference", metavar="DIR", help="What quality is judged against. Default: the fp32 export of the same model, made if it is missing.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to judge on. Default: the held-out part of Python's own language reference.",
)
@click.option("--prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Prompt tokens.")
@click.option("--new", type=click.IntRange(min=1), default=65, show_default=True, help="New tokens.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Fresh processes per setting, interleaved.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads per process. Default: all cores.")
@click.option("--tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens to judge quality on at most.")
@shared
def command(
    common: Shared,
    models: tuple[str, ...],
    reference: str | None,
    text: Path | None,
    prompt: int,
    new: int,
    batch: int,
    rounds: int,
    threads: int | None,
    tokens: int,
) -> None:
    """Measure latency, memory and quality of MODELS: exports or checkpoints. Writes JSON, a table, a page and plots."""
    from qlora_tools import api

    known = common.session.recall()
    chosen, reference = _with_reference(common, list(models), reference)
    if text is None and known.get("text"):
        text = Path(known["text"])
        common.screen.remark(f"using text {text}")
    result = api.bench(
        models=chosen,
        reference=reference,
        text=text,
        workload=api.Workload(cases=(api.Case(prompt, new, batch),)),
        rounds=rounds,
        threads=threads,
        quality_tokens=tokens,
        layers=[layer for folder, _ in known.get("adapters") or [] for layer in api.layers_of(Path(folder))] if not models else (),
        command=["qlt", *sys.argv[1:]],
        **common.arguments,
    )
    if result.record is not None:
        show(common.screen, result.record)
    where = common.session.relative(result.output)
    lines = (
        f"wrote {where}/report.html, report.md, bench.json and plots/"
        if not result.dry_run
        else f"dry run: would measure {', '.join(result.settings)} and write {where}"
    )
    common.screen.result(result, lines)


def show(screen: Any, record: Any) -> None:
    """The table of a record, and what must be said beside it."""
    from qlora_tools.bench.table import bench_table, failures, method, ties

    table = bench_table(record)
    screen.table(record.title, [column.heading for column in table.columns], [[cell.text for cell in row] for row in table.rows])
    for remark in (*failures(record), *ties(record), *record.notes, method(record)):
        screen.say(remark)


def _with_reference(common: Shared, models: list[str], reference: str | None) -> tuple[list[str], str | None]:
    """What to measure, fp32 first. Without words: the exports of the last model; its fp32 export is made where it is missing."""
    exports = common.session.recall().get("exports") or []
    if not models:
        last = common.session.pick("exports", "MODELS")[-1]
        same = [
            item
            for item in exports
            if all(item.get(field) == last.get(field) for field in ("model", "base", "adapters", "target")) and Path(item["path"]).is_dir()
        ]
        models = [item["path"] for item in same]
        common.screen.remark(f"using {', '.join(models)}")
    if reference is None:
        reference = next((model for model in models if common.session.scheme_of(model) == "fp32"), None) or _fp32_beside(common, models[0], exports)
    if reference is None:
        common.screen.remark("note: no fp32 reference among these, quality is not judged; name one with --reference")
        return models, None
    return [reference, *(model for model in models if Path(model) != Path(reference))], reference


def _fp32_beside(common: Shared, model: str, exports: list[dict[str, Any]]) -> str | None:
    """The fp32 export of the same model as ``model``: found among the remembered ones, or made now."""
    from qlora_tools import api

    own = next((item for item in exports if Path(item["path"]) == Path(model)), None)
    if own is None:
        return None
    for item in exports:
        if (
            item["scheme"] == "fp32"
            and all(item.get(field) == own.get(field) for field in ("model", "base", "adapters", "target"))
            and Path(item["path"]).is_dir()
        ):
            return str(item["path"])
    common.screen.remark("making the fp32 export of the same model, as the reference")
    dest = Path(model).parent / f"{Path(model).name.removesuffix('-' + own['scheme'])}-fp32"
    if common.dry_run or dest.exists():
        return str(dest)
    api.export(
        model=own["model"],
        base=own["base"],
        adapters=[(path, weight) for path, weight in own["adapters"]],
        target=own.get("target"),
        scheme="fp32",
        output=dest,
        progress=common.screen.progress,
    )
    common.session.add_export({**own, "path": str(dest), "scheme": "fp32"}, last=False)
    return str(dest)
