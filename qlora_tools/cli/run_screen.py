"""A training run as the user sees it: the resolved run before its first step, one bar while it goes, lines above it.

A :class:`RunScreen` is the run's listener and its ``Progress`` at once, because both draw on standard error. Without a terminal
there is no bar but a line every few steps, about fifty a run. Nothing is computed here that the events do not hold, save the
time left. Left out: the result, which is the command's to print.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qlora_tools.cli.screen import Screen
from qlora_tools.cli.words import duration, megabytes, percent, plural, printable
from qlora_tools.progress import Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from qlora_tools.training.config import TrainConfig
    from qlora_tools.training.events import Evaluation, Event, Sample, Started, Step

_LINES_PER_RUN = 50
_BAR_WIDTH = 16
_SECONDS_BETWEEN_DRAWINGS = 0.1
_SPEED_WINDOW_SECONDS = 600  # of the time left; a step may take minutes
_PREVIEW_CHARACTERS = 1200
_SHOWN_MODULES = 8


class RunScreen:
    """Draws one run on standard error. ``planned`` is told the plan and the output folder before the first step."""

    def __init__(self, screen: Screen, planned: Callable[[Any, Any], None] = lambda plan, output: None) -> None:
        self._screen = screen
        self._planned = planned
        self._live: Any = None
        self._bar: Any = None
        self._resumed_at = 0
        self._seconds: list[float] = []
        self._judged: str = ""

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """The run's own bar for the task ``train``; others get a bar of their own, or a row beside it while it is up."""
        if self._live is not None:
            number = self._live.add_task(printable(title), total=total, figures="")
            try:
                yield _Row(self._live, number)
            finally:
                self._live.remove_task(number)
        elif title == "train" and not self._screen.quiet and sys.stderr.isatty():
            with self._bars() as live:
                self._live, self._bar = live, live.add_task("train", total=total, figures="")
                try:
                    yield _Row(live, self._bar)
                finally:
                    self._live = None
        else:
            with self._screen.progress.task(title, total, unit) as task:
                yield task

    def note(self, message: str) -> None:
        self._say(message)

    def __call__(self, event: Event) -> None:
        """The run's listener."""
        told: dict[str, Callable[[Any], None]] = {
            "planned": self._on_plan,
            "started": self._on_start,
            "step": self._on_step,
            "evaluation": self._on_evaluation,
            "sample": self._on_sample,
        }
        if event.kind in told:
            told[event.kind](event)

    def _on_plan(self, event: Any) -> None:
        self._planned(event.plan, event.output)
        draw_plan(self._screen, event.plan, event.plan.config, err=True)

    def _on_start(self, event: Started) -> None:
        self._resumed_at = event.resumed_at
        parts = [
            f"{plural(event.steps, 'step')} over {event.epochs:g} epochs" if not event.resumed_at else f"resuming at step {event.resumed_at} of {event.steps}",
            f"base {megabytes(event.base_bytes)}",
            f"checkpointing {'on' if event.checkpointing else 'off'}",
        ]
        if event.estimate_bytes is not None:
            probed = "" if event.probe_bytes is None else f" (two steps measured {megabytes(event.probe_bytes)})"
            parts.append(f"memory estimate {megabytes(event.estimate_bytes)}{probed}")
        self._say(", ".join(parts))

    def _on_step(self, event: Step) -> None:
        self._seconds.append(event.seconds)
        figures = [
            f"loss {event.loss:.4f}",
            self._judged,
            f"{event.tokens_per_s:,.0f} tok/s",
            megabytes(event.peak_bytes),
            f"lr {event.lr:.2e}",
            f"|g| {event.grad_norm:.3g}",
        ]
        if event.rank is not None:
            figures.append(f"rank {event.rank}")
        if self._live is not None:
            self._live.update(self._bar, figures=_fitted(figures, self._live.console.width - 46))
            return
        every = max(1, event.steps // _LINES_PER_RUN)
        if event.step in (self._resumed_at + 1, event.steps) or event.step % every == 0:
            left = duration(sum(self._seconds[-50:]) / len(self._seconds[-50:]) * (event.steps - event.step))
            self._say("  ".join([f"step {event.step}/{event.steps}", f"epoch {event.epoch:.2f}", *filter(None, figures), f"{left} left"]))

    def _on_evaluation(self, event: Evaluation) -> None:
        good = f"accuracy {percent(event.accuracy)}" if event.accuracy is not None else f"perplexity {event.perplexity:.4g}"
        self._judged = f"val {good.replace('perplexity', 'ppl').replace('accuracy', 'acc')}"
        self._say(f"step {event.step}: validation loss {event.loss:.4f}, {good}{', best so far' if event.best else ''}")

    def _on_sample(self, event: Sample) -> None:
        self._say(f"step {event.step}, sample: {printable(event.prompt)}", printable(event.text))

    def _say(self, text: str, coloured: str = "") -> None:
        """One remark, above the bar where there is one; ``coloured`` follows ``text`` as what the model wrote."""
        if self._screen.quiet:
            return
        if self._live is None:
            self._screen.remark(text + (f"[[{coloured}]]" if coloured else ""))
            return
        from rich.text import Text

        console = self._live.console
        console.print(Text(printable(text)).append_text(_marked([(coloured, True)], console) if coloured else Text("")), highlight=False)

    @contextmanager
    def _bars(self) -> Iterator[Any]:
        """Redrawn when something happens, not by a clock: the run keeps every core busy."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False, speed_estimate_period=_SPEED_WINDOW_SECONDS) as live:
            yield live


class _Row:
    """One row of the live display as a ``Task``."""

    def __init__(self, live: Any, number: Any) -> None:
        self._live, self._number, self._drawn = live, number, 0.0

    def advance(self, amount: float = 1, label: str = "") -> None:
        due = time.monotonic() - self._drawn > _SECONDS_BETWEEN_DRAWINGS
        self._live.update(self._number, advance=amount, refresh=due)
        if due:
            self._drawn = time.monotonic()


def draw_plan(screen: Screen, plan: Any, config: TrainConfig, *, err: bool) -> None:
    """The resolved run, one example with its mask, and the memory estimate; on standard error, or on output where it is the result."""
    screen.card("run", plan_rows(plan, config), err=err)
    if screen.quiet or (screen.as_json and not err):
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=err, highlight=False, soft_wrap=False)
    if plan.preview:
        console.print(Text("first example; what is trained on is " + ("coloured" if _has_colour(console) else "in [[ ]]"), style="bold"))
        console.print(_marked(_shortened(plan.preview), console), soft_wrap=True)
    if plan.estimate is not None:
        rows = [(name, megabytes(size)) for name, size in plan.estimate.rows()]
        screen.card("memory, estimated", [*rows, ("total", megabytes(plan.estimate.total_bytes))], err=err)
    if plan.seconds_per_step:
        console.print(Text(f"about {duration(plan.seconds_per_step)} a step, {duration(plan.seconds_per_step * plan.steps)} in all"))


def plan_rows(plan: Any, config: TrainConfig) -> list[tuple[str, str]]:
    """The header: name and value of everything that was resolved."""
    data = plan.data
    share = plan.trainable_parameters / max(1, plan.total_parameters)
    dropped = ", ".join(f"{count} {what}" for count, what in ((data.truncated, "truncated"), (data.dropped, "dropped")) if count)
    per_step = config.batch * config.accum
    base_format = config.base_format
    if base_format == "nf4":
        base_format += f", blocks of {config.block_size}{', double quantization' if config.double_quant else ''}"
    return [
        ("base", f"{plan.base} ({base_format})"),
        ("task", plan.task),
        ("data", f"{plural(data.examples, 'example')}, {data.tokens:,} tokens, {percent(data.trained_tokens / max(1, data.tokens))} trained on{f'; {dropped}' if dropped else ''}"),
        ("trainable", f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters ({percent(share)})"),
        ("targets", _modules(plan.modules)),
        ("adapter", _adapter(plan, config)),
        ("steps", f"{plan.steps:,} ({plan.epochs:.3g} epochs of {plan.rows:,} rows), {config.batch} x {config.accum} rows and about {data.tokens / max(1, plan.rows) * per_step:,.0f} tokens a step"),
        ("schedule", f"{config.schedule}, warm-up {config.warmup:g}{'' if config.warmup >= 1 else ' of the run'}, lr {config.lr:g}, {config.optim}, clip {config.clip:g}"),
    ]  # fmt: skip


def _adapter(plan: Any, config: TrainConfig) -> str:
    ranks = sorted(set(plan.ranks.values())) or [config.rank]
    words = [f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}", f"alpha {config.lora_alpha:g}"]
    words += [name for name, wanted in (("rsLoRA", config.rslora), ("DoRA", config.dora)) if wanted]
    words += [f"start {config.init}"] if config.init != "default" else []
    words += [f"growing from rank {config.start_rank}"] if config.start_rank else []
    words += [f"dropout {config.dropout:g}"] if config.dropout else []
    return ", ".join(words)


def _modules(modules: tuple[str, ...]) -> str:
    """Leaf names with how many there are of each."""
    counts = Counter(module.rpartition(".")[2] for module in modules)
    shown = [f"{name} x {count}" for name, count in list(counts.items())[:_SHOWN_MODULES]]
    return ", ".join(shown + ([f"and {len(counts) - _SHOWN_MODULES} more names"] if len(counts) > _SHOWN_MODULES else []))


def _fitted(figures: list[str], width: int) -> str:
    """As many figures as fit, in order of importance."""
    line = ""
    for figure in filter(None, figures):
        if line and len(line) + 2 + len(figure) > width:
            break
        line += f"  {figure}" if line else figure
    return line


def _shortened(preview: tuple[tuple[str, bool], ...]) -> list[tuple[str, bool]]:
    """The first part of a long example."""
    left, kept = _PREVIEW_CHARACTERS, []
    for text, trained in preview:
        kept.append((text[:left], trained))
        left -= len(text)
        if left <= 0:
            kept.append((" ...", False))
            break
    return kept


def _has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _marked(parts: list[tuple[str, bool]], console: Console) -> Text:
    """Trained text in colour and the rest dim; without colour, trained text in double brackets."""
    from rich.text import Text

    marked = Text()
    for text, trained in parts:
        if _has_colour(console):
            marked.append(printable(text), style="green" if trained else "dim")
        else:
            marked.append(f"[[{printable(text)}]]" if trained else printable(text))
    return marked
