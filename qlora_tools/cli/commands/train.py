"""``qlt train``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from qlora_tools.cli.options import HeadedCommand, Shared, examples, headed, shared
from qlora_tools.cli.recipes import config_option, write_recipe
from qlora_tools.cli.run_screen import RunScreen, draw_plan
from qlora_tools.cli.screen import Screen
from qlora_tools.cli.words import duration, megabytes
from qlora_tools.errors import CorruptError, Interrupted, UsageError
from qlora_tools.training import config as choices_of
from qlora_tools.training.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

EPILOG = examples(
    "qlt train --base org/model --data train.jsonl --nf4 --rank 16     # then: qlt export --merge --int8",
    "qlt train --base base/ --data train.jsonl --val val.jsonl --patience 3 --dry-run",
    "qlt train --config run.toml --lr 1e-4 -o adapters/mine",
    "qlt train --resume                                                # goes on exactly where the last run stopped",
)
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(TrainConfig)}
_CHOICES = tuple(_DEFAULTS)
#: What an adapter to start from decides.
_FORM = frozenset({"base_format", "rank", "alpha", "targets", "rank_pattern", "rslora", "dora"})
F = TypeVar("F", bound="Callable[..., Any]")


class _RankPattern(click.ParamType[tuple[str, int]]):
    """``REGEX=N``."""

    name = "pattern"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        pattern, sign, rank = str(value).rpartition("=")
        if not sign or not pattern or not rank.isascii() or not rank.isdigit() or len(rank) > 9:
            self.fail(f"{value!r} is not REGEX=N; write something like 'layers\\.[0-3]\\.=4'", param, ctx)
        try:
            re.compile(pattern)
        except re.error as error:
            self.fail(f"{pattern!r} is not a regular expression: {error}", param, ctx)
        return pattern, int(rank)


def _choice(heading: str, flag: str, text: str, kind: Any = None, *, name: str = "", metavar: str | None = None, multiple: bool = False) -> Callable[[F], F]:
    """An option for the field of :class:`TrainConfig` that ``flag`` (or ``name``) is called, with the field's default."""
    name = name or flag.removeprefix("--").partition("/")[0].replace("-", "_")
    default = _DEFAULTS[name]
    shown = default is not None and default is not False and default != ()
    return headed(heading)(flag, name, default=default, type=kind, help=text, metavar=metavar, multiple=multiple, show_default=shown)


def _options(function: F) -> F:
    """All of the verb's own options, in the order in which the help lists them."""
    run, adapter, steps, watch, teach, memory = "Model and data", "Adapter", "Optimization", "Evaluation and saving", "Distillation", "Memory"
    one_of = click.Choice
    decorators = [
        headed(run)("--base", metavar="MODEL", help="The model to adapt: folder or hub id. It stays as it is."),
        headed(run)("--data", metavar="PATH", help="Text; jsonl of text, prompt and completion, messages, or text and label; a folder of a saved dataset, or of images in a folder per class."),
        headed(run)("--nf4", "base_format", flag_value="nf4", help=f"Hold the base in 4 bits{_default_mark('nf4')}."),
        headed(run)("--int8", "base_format", flag_value="int8", help=f"Hold it in 8 bits{_default_mark('int8')}."),
        headed(run)("--bf16", "base_format", flag_value="bf16", help=f"Hold it unquantized{_default_mark('bf16')}."),
        _choice(run, "--block-size", "Weights per NF4 block.", int, metavar="N"),
        _choice(run, "--double-quant/--no-double-quant", "Quantize the NF4 block scales to 8 bits."),
        _choice(run, "--merge-aware/--no-merge-aware", "Train for `qlt merge --nf4|--int8`: compute with the merged weight, rounded. The base stays unquantized."),
        _choice(run, "--task", "What to train. auto: as config.json and data say.", one_of(choices_of.TASKS)),
        _choice(run, "--max-len", "Tokens of an example at most; what is longer is cut and counted.", int, metavar="N"),
        _choice(run, "--pack/--no-pack", "Fill rows with several examples that do not see each other."),
        _choice(run, "--mask", "Which tokens to learn. auto: completions and answers, where the data tell them apart.", one_of(choices_of.MASKS)),
        headed(run)("--val", metavar="PATH", help="Held-out data for evaluations."),
        _choice(run, "--val-share", "Without --val: the share of the data to hold out.", float, metavar="SHARE"),
        _choice(adapter, "--rank", "Rank of the factors.", int, metavar="N"),
        _choice(adapter, "--alpha", "Scale: the update is alpha / rank times B A. Default: twice the rank.", float, metavar="X"),
        _choice(adapter, "--dropout", "Dropout before A.", float, metavar="SHARE"),
        _choice(adapter, "--targets", "Which layers get factors.", metavar="minimal|qkv|attn|mlp|all|REGEX"),
        _choice(adapter, "--rank-pattern", "Rank of the layers whose path matches; repeat, the first that matches counts.", _RankPattern(), metavar="REGEX=N", multiple=True),
        _choice(adapter, "--rank-budget", "Give layers ranks by measured need, with this mean.", int, metavar="N"),
        _choice(adapter, "--start-rank", "Grow from this rank to --rank over the first half of the run.", int, metavar="N"),
        _choice(adapter, "--rslora/--no-rslora", "Scale by alpha / sqrt(rank)."),
        _choice(adapter, "--dora/--no-dora", "Learn lengths and directions of weight rows apart."),
        _choice(adapter, "--init", "Where the factors start: one of these words, or the folder of an adapter, whose ranks and targets they then have.", metavar=f"{'|'.join(choices_of.STARTS)}|FOLDER"),
        headed(adapter)("--calib", metavar="TEXT", help="For --init qera: a text, a file of `qlt calibrate`, self or builtin."),
        _choice(steps, "--lr", "Highest learning rate.", float, metavar="X"),
        _choice(steps, "--schedule", "Course of the rate after the warm-up.", one_of(choices_of.SCHEDULES)),
        _choice(steps, "--warmup", "Steps of rising rate; below 1, a share of the run.", float, metavar="X"),
        _choice(steps, "--epochs", "Passes over the data. Default: 1, unless --steps is given.", float, metavar="X"),
        _choice(steps, "--steps", "Optimizer steps, in place of --epochs.", int, metavar="N"),
        _choice(steps, "--batch", "Rows at once in each process.", int, metavar="N"),
        _choice(steps, "--accum", "Batches per step; the loss is weighted by tokens, so 8 x 1 equals 1 x 8.", int, metavar="N"),
        _choice(steps, "--optim", "Optimizer.", one_of(choices_of.OPTIMIZERS)),
        _choice(steps, "--loraplus", "Learning rate of B as a multiple of A's.", float, metavar="X"),
        _choice(steps, "--neftune", "Noise on the embeddings.", float, metavar="ALPHA"),
        _choice(steps, "--weight-decay", "Decay of A and B.", float, metavar="X"),
        _choice(steps, "--clip", "Largest norm of the gradient; 0 for no limit.", float, metavar="X"),
        _choice(steps, "--seed", "Seed of everything random.", int, metavar="N"),
        _choice(watch, "--eval-every", "Steps between evaluations. Default: ten a run.", int, metavar="N"),
        _choice(watch, "--patience", "Stop after this many evaluations without a new best.", int, metavar="N"),
        _choice(watch, "--save-every", "Steps between checkpoints. Default: at evaluations.", int, metavar="N"),
        _choice(watch, "--keep", "Checkpoints to keep, the best one aside.", int, metavar="N"),
        _choice(watch, "--sample", "Continue this prompt at each evaluation; repeat for several.", name="samples", metavar="PROMPT", multiple=True),
        _choice(watch, "--sample-tokens", "Length of a continuation.", int, metavar="N"),
        headed(teach)("--teacher", metavar="MODEL", help="Learn from this model's predictions too."),
        _choice(teach, "--teacher-weight", "Share of the loss that follows the teacher.", float, metavar="SHARE"),
        _choice(teach, "--temperature", "Softening of both models' predictions.", float, metavar="X"),
        _choice(memory, "--checkpointing", "Recompute activations in the backward pass. auto: where memory asks for it.", one_of(choices_of.CHECKPOINTING)),
        _choice(memory, "--compute", "Dtype of the computation.", one_of(("auto", "bf16", "fp32"))),
    ]  # fmt: skip
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def _default_mark(name: str) -> str:
    return " (default)" if _DEFAULTS["base_format"] == name else ""


@click.command("train", cls=HeadedCommand, epilog=EPILOG)
@_options
@headed("Run")("--resume", is_flag=True, help="Go on with an interrupted run: the last one, or the one of -o. It says itself what it was started with.")
@config_option
@headed("Run")("--save-config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.toml", help="Write the resolved options to a file for --config.")
@shared
def command(
    common: Shared,
    base: str | None,
    data: str | None,
    val: str | None,
    teacher: str | None,
    calib: str | None,
    resume: bool,
    save_config: Path | None,
    **values: Any,
) -> None:
    """Train LoRA factors in bf16 over a frozen base in NF4, int8 or bf16. Writes a PEFT folder."""
    from qlora_tools import api

    if not _speaks():
        common = replace(common, screen=Screen(quiet=True))
    paths: dict[str, Any] = {"base": base, "data": data, "val": val, "teacher": teacher, "start": None, "calib": calib}
    given = {name: value for name, value in values.items() if value is not None and _source(name) is not ParameterSource.DEFAULT}
    if (start := given.get("init", "default")) not in choices_of.STARTS:
        if "/" not in start and not Path(start).exists():
            raise UsageError(
                f"--init {start} is not one of {', '.join(choices_of.STARTS)}, and there is no such folder", hint="give a word or an adapter's folder"
            )
        paths["start"], given["init"] = start, choices_of.STORED
    spoken = frozenset(given) - {"init"}
    if resume:
        common = replace(common, output=common.output or Path(common.session.pick("run", "-o")))
        stored_paths, stored = _stored(common)
        paths = {name: stored_paths.get(name) if path is None else path for name, path in paths.items()}
        given = {**_without_rivals(stored, given), **given}
        paths["start"] = paths["start"] if given.get("init") == choices_of.STORED else None
    else:
        given = _settled(given)
    for name in ("base", "data"):
        if not paths[name]:
            raise UsageError(f"no --{name} given", hint=f"give it with --{name}, or continue a run with --resume")
    config = TrainConfig(**given)
    if save_config is not None:
        write_recipe(save_config, _recipe(paths, config, spoken), force=common.force)
    began: list[str] = []
    run = RunScreen(common.screen, lambda plan, output: began.append(_remember_run(common, output)))
    try:
        result = api.train(**paths, spoken=spoken, config=config, resume=resume, listen=run, **{**common.arguments, "progress": run})
    except Interrupted as stopped:
        if not _speaks():  # the first process tells it
            raise SystemExit(stopped.exit_code) from stopped
        if stopped.folder is not None:
            _remember_run(common, stopped.folder)
        raise
    except KeyboardInterrupt as stopped:  # the second one, which does not wait for the step to end
        if not began:
            raise
        raise Interrupted(f"stopped at once; {began[0]} keeps the last checkpoint, if there was one", hint="to go on from it: qlt train --resume") from stopped
    if _speaks():
        _tell(common, result, str(paths["base"]))


def _tell(common: Shared, result: Any, base: str) -> None:
    """The closing card, or the plan of a dry run; and what the next verbs pick up."""
    screen, session, report = common.screen, common.session, result.report
    if report is None:
        draw_plan(screen, result.plan, result.plan.config, err=False)
    else:
        folder = session.relative(result.output)
        session.remember(base=base, tuned=None, adapters=[[folder, 1.0]], exports=None, run=None)
        screen.card("done" if report.stopped == "done" else "stopped early", _closing(report, folder, result.plan.task))
    screen.result(result, common.written(result.output, result.seconds))


def _closing(report: Any, folder: str, task: str) -> list[tuple[str, str]]:
    estimate = ""
    if report.estimate_bytes:
        estimate = f", {megabytes(report.estimate_bytes)} estimated ({100 * (report.estimate_bytes / max(1, report.peak_bytes) - 1):+.0f} %)"
    best = ""
    if report.best_loss is not None:
        best = (
            f"loss {report.best_loss:.4f}"
            + (f", perplexity {report.val_perplexity:.4g}" if report.val_perplexity is not None else "")
            + f" at step {report.best_step}"
        )
    return [
        ("steps", f"{report.steps:,}{' (evaluations no longer improved)' if report.stopped == 'early' else ''}"),
        ("loss", f"{report.first_loss:.4f} -> {report.final_loss:.4f}"),
        ("best validation", best),
        ("speed", f"{report.tokens:,} tokens in {duration(report.seconds)}, {report.tokens_per_s:,.0f} tokens/s"),
        ("peak memory", f"{megabytes(report.peak_bytes)}{estimate}"),
        ("adapter", folder),
        ("next", "qlt export --merge --int8" if task == "language" else "qlt merge"),
    ]


def _speaks() -> bool:
    """Of torchrun's processes the first one."""
    return os.environ.get("RANK", "0") == "0"


def _source(name: str) -> ParameterSource | None:
    return click.get_current_context().get_parameter_source(name)


def _settled(given: dict[str, Any]) -> dict[str, Any]:
    """Of --epochs and --steps the one on the command line, where the recipe holds the other."""
    spoken = {name for name in ("epochs", "steps") if name in given and _source(name) is ParameterSource.COMMANDLINE}
    return {name: value for name, value in given.items() if name not in {"epochs", "steps"} or len(spoken) != 1 or name in spoken}


def _without_rivals(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    rival = {"epochs": "steps", "steps": "epochs"}
    return {name: value for name, value in stored.items() if rival.get(name) not in given}


def _stored(common: Shared) -> tuple[dict[str, Any], dict[str, Any]]:
    """(paths, choices) that the run in the output folder was started with."""
    from qlora_tools.training.state import read_run

    assert common.output is not None
    identity, words = read_run(common.output)
    choices = {name: value for name, value in identity.config.items() if name in _CHOICES and value is not None}
    try:
        choices["rank_pattern"] = tuple((str(pattern), int(rank)) for pattern, rank in choices.get("rank_pattern", ()))
        choices["samples"] = tuple(str(prompt) for prompt in choices.get("samples", ()))
        TrainConfig(**choices)
    except (TypeError, ValueError) as error:
        raise CorruptError(f"{common.output}: the run's options are damaged: {error}", hint="start it anew with --force") from error
    paths = {name: words.get(name) for name in ("base", "data", "val", "teacher", "start", "calib")}
    common.screen.remark(f"resuming {common.session.relative(common.output)}: base {paths['base']}, data {paths['data']}")
    return paths, choices


def _remember_run(common: Shared, folder: Path | str) -> str:
    """Let --resume find the run in ``folder``; returns the folder as the user would type it."""
    name = common.session.relative(folder)
    if _speaks() and not common.dry_run:
        common.session.remember(run=name)
    return name


def _recipe(paths: Mapping[str, Any], config: TrainConfig, spoken: frozenset[str]) -> dict[str, Any]:
    """Paths and config under the options' names; without what follows the adapter that the run starts from."""
    values = {**{name: path for name, path in paths.items() if name != "start"}, **config.record()}
    values["sample"] = list(values.pop("samples"))
    values["rank_pattern"] = [f"{pattern}={rank}" for pattern, rank in values["rank_pattern"]]
    if paths["start"] is not None:
        values["init"] = str(paths["start"])
        values = {name: value for name, value in values.items() if name not in _FORM or name in spoken}
    return values
