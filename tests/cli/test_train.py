"""``qlt train``: words become a config, the run is drawn on standard error, the result and the next command on standard output."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from qlora_tools import api
from qlora_tools.cli import main as cli
from qlora_tools.cli import run_screen
from qlora_tools.cli.commands.train import command
from qlora_tools.cli.recipes import read_recipe
from qlora_tools.cli.run_screen import RunScreen
from qlora_tools.cli.screen import Screen
from qlora_tools.cli.words import duration, printable
from qlora_tools.errors import Interrupted, UsageError
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.events import Evaluation, Event, Sample, Saved, Started, Step
from qlora_tools.training.state import RunIdentity, write_run


@dataclass(frozen=True)
class Data:
    examples: int = 120
    tokens: int = 9600
    trained_tokens: int = 4800
    truncated: int = 3
    dropped: int = 0


class Estimate:
    total_bytes = 3_500_000

    def rows(self):
        return [("weights", 3_000_000), ("adapters", 500_000)]


@dataclass(frozen=True)
class Plan:
    base: str = "base"
    task: str = "language"
    modules: tuple[str, ...] = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.v_proj")
    ranks: dict[str, int] = field(default_factory=lambda: {"model.layers.0.q_proj": 4, "model.layers.1.q_proj": 16})
    trainable_parameters: int = 1234
    total_parameters: int = 123_400
    steps: int = 100
    epochs: float = 2.0
    rows: int = 120
    data: Data = Data()
    preview: tuple[tuple[str, bool], ...] = (("question ", False), ("answer\x1b[2J", True))
    config: TrainConfig = field(default_factory=TrainConfig)
    estimate: Any = field(default_factory=Estimate)
    seconds_per_step: float | None = 0.5


@dataclass(frozen=True)
class Report:
    steps: int = 100
    best_loss: float | None = 2.0
    best_step: int | None = 60
    first_loss: float = 4.0
    final_loss: float = 2.25
    val_perplexity: float | None = 7.389
    tokens: int = 19_200
    seconds: float = 187.0
    tokens_per_s: float = 102.7
    peak_bytes: int = 2_000_000_000
    estimate_bytes: int | None = 1_900_000_000
    stopped: str = "done"


@dataclass(frozen=True)
class Result:
    output: Path
    seconds: float
    report: Report | None
    plan: Plan


@dataclass(frozen=True)
class Planned(Event):
    kind: ClassVar[str] = "planned"
    plan: Any = None
    output: str = ""


STARTED = Started(
    steps=100, resumed_at=0, trainable_parameters=1, total_parameters=2, rows=120, tokens_per_epoch=9600, epochs=2.0, base_bytes=3_000_000,
    checkpointing=False, estimate_bytes=3_500_000, probe_bytes=3_400_000,
)  # fmt: skip


def step(number: int) -> Step:
    return Step(
        step=number, steps=100, epoch=number / 50, loss=4 / number, lr=1e-4, grad_norm=0.25, tokens=64, trained_tokens=32, tokens_per_s=1234.0,
        peak_bytes=2_000_000_000, seconds=2.0,
    )  # fmt: skip


def told(output: Path, plan: Plan) -> list[Event]:
    judged = [Evaluation(step=50, loss=2.0, best=True), Sample(step=50, prompt="To be", text=" or\x1b]0;x\x07not"), Saved(step=50, name="step-000050")]
    return [Planned(plan, str(output)), STARTED, *map(step, range(1, 51)), *judged, *map(step, range(51, 101))]


class Training:
    """Stands in for ``api.train``: notes the words, tells a run's events, and ends as it is told to."""

    def __init__(self, ending: Exception | None = None, report: Report | None = None, plan: Plan | None = None) -> None:
        self.ending, self.report, self.plan, self.words = ending, report or Report(), plan or Plan(), {}

    def __call__(self, **words: Any) -> Result:
        self.words = words
        self.plan = replace(self.plan, config=words.get("config", TrainConfig()))
        output = words["output"] or Path("adapters/base-r16")
        if words["dry_run"]:
            return Result(output, 1.0, None, self.plan)
        with words["progress"].task("read", 3, "tensors") as task:
            task.advance(3)
        events = told(output, self.plan)
        for event in events[:2]:
            words["listen"](event)
        with words["progress"].task("train", 100, "steps") as task:
            for event in events[2:]:
                words["listen"](event)
                if isinstance(event, Step):
                    task.advance(1, "loss")
                if isinstance(event, Evaluation):
                    with words["progress"].task("evaluate", 2, "rows") as inner:
                        inner.advance(2)
        words["progress"].note("the run is over")
        if self.ending is not None:
            raise self.ending
        return Result(output, 190.0, self.report, self.plan)

    @property
    def config(self) -> TrainConfig:
        return self.words["config"]


@pytest.fixture
def training(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_screen, "_LINES_PER_RUN", 10)
    fake = Training()
    monkeypatch.setattr(api, "train", fake, raising=False)
    monkeypatch.setattr(api, "TrainConfig", TrainConfig, raising=False)
    return fake


def qlt(capsys, monkeypatch, *words: object) -> tuple[int, str, str]:
    """The command as ``main`` runs it, in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["qlt", "train", *map(str, words)])
    monkeypatch.setattr(cli.gc, "freeze", lambda: None)
    monkeypatch.setattr(cli.gc, "set_threshold", lambda *numbers: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *handler: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def run(training, capsys, monkeypatch):
    return lambda *words: qlt(capsys, monkeypatch, *words)


WORDS = ("--base", "base", "--data", "train.jsonl")


# words


def test_help_lists_every_choice_under_a_heading_with_three_examples():
    text = CliRunner().invoke(command, ["-h"], prog_name="qlt train").output + CliRunner().invoke(command, ["--help"]).output
    named = {"base_format": "--nf4", "samples": "--sample"}
    for choice in fields(TrainConfig):
        assert named.get(choice.name, "--" + choice.name.replace("_", "-")) in text, choice.name
    for flag in [
        "--base",
        "--data",
        "--val",
        "--teacher",
        "--resume",
        "--config",
        "--save-config",
        "--int8",
        "--bf16",
        "--dry-run",
        "--json",
        "--quiet",
        "--output",
        "--force",
        "--device",
    ]:
        assert flag in text
    for heading in ("Model and data:", "Adapter:", "Optimization:", "Evaluation and saving:", "Distillation:", "Memory:", "Run:", "Options:"):
        assert heading in text
    assert len(re.findall(r"^    qlt train ", text, re.MULTILINE)) >= 3


def test_the_flags_of_the_interface_are_there():
    wanted = [
        "--nf4",
        "--int8",
        "--rank",
        "--alpha",
        "--dropout",
        "--targets",
        "--rank-pattern",
        "--rslora",
        "--dora",
        "--init",
        "--lr",
        "--schedule",
        "--warmup",
        "--epochs",
        "--steps",
        "--batch",
        "--accum",
        "--max-len",
        "--pack",
        "--mask",
        "--optim",
        "--loraplus",
        "--neftune",
        "--weight-decay",
        "--clip",
        "--seed",
        "--val",
        "--eval-every",
        "--patience",
        "--save-every",
        "--keep",
        "--sample",
        "--teacher",
        "--resume",
        "--dry-run",
        "--config",
    ]
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert set(wanted) <= known


def test_without_words_the_choices_are_the_config_s_own(run, training):
    code, _, err = run(*WORDS)
    assert code == 0, err
    assert training.config == TrainConfig() and training.words["base"] == "base" and training.words["data"] == "train.jsonl"
    assert training.words["resume"] is False and training.words["val"] is None and training.words["output"] is None


def test_words_become_the_config(run, training):
    code, _, err = run(
        *WORDS, "--int8", "--rank", 8, "--alpha", 4, "--rank-pattern", r"layers\.[0-3]\.=4", "--rank-pattern", "a=b=2", "--rslora", "--pack", "--lr", "1e-3", "--steps",
        7, "--sample", "To be", "--sample", "x", "--val", "v.jsonl", "--teacher", "big", "--no-double-quant", "--loraplus", 16,
    )  # fmt: skip
    assert code == 0, err
    assert training.config == TrainConfig(
        base_format="int8", rank=8, alpha=4.0, rank_pattern=((r"layers\.[0-3]\.", 4), ("a=b", 2)), rslora=True, pack=True, lr=1e-3, steps=7,
        samples=("To be", "x"), double_quant=False, loraplus=16.0,
    )  # fmt: skip
    assert training.words["val"] == "v.jsonl" and training.words["teacher"] == "big"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--data", "d"), "no --base given"),
        (("--base", "b"), "no --data given"),
        ((*WORDS, "--rank", "0"), "rank 0 is below 1"),
        ((*WORDS, "--rank", "many"), "is not a valid integer"),
        ((*WORDS, "--steps", "3", "--epochs", "1"), "both say how long"),
        ((*WORDS, "--rank-pattern", "x"), "is not REGEX=N"),
        ((*WORDS, "--rank-pattern", "x=-1"), "is not REGEX=N"),
        ((*WORDS, "--rank-pattern", "x=" + "9" * 5000), "is not REGEX=N"),
        ((*WORDS, "--rank-pattern", "(=4"), "not a regular expression"),
        ((*WORDS, "--init", "magic"), "is not one of"),
        ((*WORDS, "--config", "nowhere.toml"), "does not exist"),
        ((*WORDS, "--lr", "nan"), "not a positive number"),
        (("--resume",), "no run given, and none remembered"),
    ],
)
def test_words_that_make_no_sense_are_usage_errors(run, training, words, complaint):
    code, out, err = run(*words)
    assert code == 2 and complaint in err and out == "" and training.words == {}


# recipes


def recipe(text: str) -> str:
    Path("run.toml").write_text(text, encoding="utf-8")
    return "run.toml"


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(run, training):
    path = recipe('base = "base"\ndata = "d.jsonl"\nrank = 4\nlr = 1e-3\nbase-format = "int8"\nrslora = true\nmax_len = 32\noutput = "there"\ndevice = "cpu"\n')
    code, _, err = run("--config", path, "--rank", 32, "--no-rslora")
    assert code == 0, err
    assert training.config == TrainConfig(rank=32, lr=1e-3, base_format="int8", max_len=32)
    assert training.words["output"] == Path("there") and training.words["device"] == "cpu" and training.words["data"] == "d.jsonl"
    assert run("--nf4", "--config", path)[0] == 0 and training.config.base_format == "nf4"


def test_lists_come_from_a_recipe_and_are_replaced_whole(run, training):
    path = recipe('sample = ["a", "b"]\nrank-pattern = ["q=2", "v=4"]\n')
    assert run(*WORDS, "--config", path)[0] == 0
    assert training.config.samples == ("a", "b") and training.config.rank_pattern == (("q", 2), ("v", 4))
    assert run(*WORDS, "--config", path, "--sample", "c")[0] == 0 and training.config.samples == ("c",)


def test_steps_on_the_command_line_replace_the_recipe_s_epochs(run, training):
    path = recipe("epochs = 3\n")
    assert run(*WORDS, "--config", path, "--steps", 5)[0] == 0
    assert training.config.steps == 5 and training.config.epochs is None
    assert run(*WORDS, "--config", recipe("epochs = 3\nsteps = 5\n"))[0] == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rnak = 3", "`rnak` is not an option of qlt train"),
        ("[adapter]\nrank = 3", "is not an option"),
        ("[rank]\nvalue = 3", "`rank` is a table, expected a whole number"),
        ("rank = 16.7", "`rank` is 16.7, expected a whole number"),
        ("rank = true", "expected a whole number"),
        ('lr = "fast"', "expected a number"),
        ("lr = false", "expected a number"),
        ("rslora = 1", "expected true or false"),
        ("schedule = 3", "expected a text in quotes"),
        ('sample = "a"', "expected a list of texts"),
        ("sample = [1]", "expected a list of texts"),
        ('schedule = "zigzag"', "is not one of"),
        ('base-format = "int3"', "base_format 'int3' is not one of"),
        ("rank = 0", "rank 0 is below 1"),
        ("max-len = 3\nmax_len = 4", "given twice"),
        ("rank 3", "is not TOML"),
        ("nf4 = true", "`nf4` is not an option"),
        ("dry-run = true", "is not an option"),
        ("resume = true", "is not an option"),
        ("quiet = true", "is not an option"),
        ("x = " + "[" * 100_000, "is not TOML"),
        ("# " + "x" * (2 << 20), "too many for a recipe"),
    ],
)
def test_recipes_are_doubted(run, training, text, complaint):
    code, _, err = run(*WORDS, "--config", recipe(text))
    assert code == 2 and complaint in err and training.words == {}


def test_an_unknown_key_names_the_nearest(run, training):
    assert "did you mean warmup" in run(*WORDS, "--config", recipe("warm_up = 3"))[2]


def test_bytes_that_are_not_text_are_no_recipe(run, training):
    Path("run.toml").write_bytes(b"\xff\xfe")
    assert "is not TOML" in run(*WORDS, "--config", "run.toml")[2]


def test_a_saved_recipe_gives_the_same_run(run, training):
    words = ("--int8", "--rank", 8, "--lr", "2e-05", "--rank-pattern", 'a\\d="=4', "--sample", 'é "quoted"\n\x7f\\', "--steps", 9, "--rslora", "--val", "v")
    code, _, err = run(*WORDS, *words, "--save-config", "saved.toml")
    assert code == 0, err
    first, where = training.config, {name: training.words[name] for name in ("base", "data", "val", "teacher")}
    assert run("--config", "saved.toml")[0] == 0
    assert training.config == first and {name: training.words[name] for name in where} == where
    assert set(read_recipe(Path("saved.toml"), command)) <= {parameter.name for parameter in command.params}


def test_a_saved_recipe_is_not_replaced_unless_forced(run, training):
    recipe("rank = 3\n")
    code, _, err = run(*WORDS, "--save-config", "run.toml")
    assert code == 7 and "already there" in err and Path("run.toml").read_text() == "rank = 3\n"
    assert run(*WORDS, "--save-config", "saved.toml")[0] == 0
    assert run(*WORDS, "--rank", 5, "--save-config", "saved.toml")[0] == 7
    assert run(*WORDS, "--rank", 5, "--save-config", "saved.toml", "--force")[0] == 0
    assert Path("saved.toml").read_text().startswith("# qlt recipe\n") and "rank = 5\n" in Path("saved.toml").read_text()
    assert run(*WORDS, "--save-config", "nowhere/run.toml")[0] == 5


@pytest.mark.parametrize("text", ["rank = 3\n", "# qlt recipes of mine\nrank = 3\n", "", "[tool]\nname = 'x'\n"])
def test_what_is_no_saved_recipe_is_not_replaced_even_if_forced(run, training, text):
    recipe(text)
    code, _, err = run(*WORDS, "--save-config", "run.toml", "--force")
    assert code == 7 and "does not begin with `# qlt recipe`" in err and Path("run.toml").read_text() == text and training.words == {}


def test_a_recipe_that_cannot_be_written_leaves_the_one_before(run, training, monkeypatch):
    assert run(*WORDS, "--save-config", "saved.toml")[0] == 0
    before = Path("saved.toml").read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert run(*WORDS, "--rank", 5, "--save-config", "saved.toml", "--force")[0] == 5
    assert Path("saved.toml").read_bytes() == before and [path.name for path in Path().iterdir() if "saved" in path.name] == ["saved.toml"]


# what is seen


def test_standard_output_holds_the_closing_card_and_the_next_command(run, training):
    code, out, err = run(*WORDS)
    assert code == 0, err
    lines = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    found = {name.strip(): value.strip() for name, value in lines.items()}
    assert found["loss"] == "4.0000 -> 2.2500" and found["best validation"] == "loss 2.0000, perplexity 7.389 at step 60"
    assert found["peak memory"] == "2.0 GB, 1.9 GB estimated (-5 %)" and found["speed"] == "19,200 tokens in 3:07, 103 tokens/s"
    assert found["next"] == "qlt export --merge --int8" and found["adapter"] == "adapters/base-r16"
    assert out.splitlines()[-1] == "wrote adapters/base-r16 in 190.0 s"


def test_an_early_end_and_another_task_are_told(run, training):
    training.report, training.plan = Report(stopped="early", best_loss=None, estimate_bytes=None), Plan(task="image")
    _, out, _ = run(*WORDS)
    assert "evaluations no longer improved" in out and "best validation" not in out and "estimated" not in out and "qlt merge" in out


def test_the_resolved_run_is_shown_before_the_first_step(run, training):
    _, _, err = run(*WORDS)
    head = err[: err.index("step 1/100")]
    for text in (
        "base (nf4, blocks of 64, double quantization)", "1,234 of 123,400 parameters (1.00 %)", "q_proj x 2, v_proj x 1", "ranks 4 to 16, alpha 32",
        "100 (2 epochs of 120 rows), 8 x 1 rows and about 640 tokens a step", "cosine, warm-up 0.03 of the run, lr 0.0002, adamw, clip 1",
        "120 examples, 9,600 tokens, 50.00 % trained on; 3 truncated", "weights   3.0 MB", "total     3.5 MB", "about 0.5 s a step, 50 s in all",
        "memory estimate 3.5 MB (two steps measured 3.4 MB)",
    ):  # fmt: skip
        assert text in head, text


def test_the_example_marks_what_is_trained_on_and_cannot_steer_the_terminal(run, training):
    _, out, err = run(*WORDS)
    assert "question [[answer\\x1b[2J]]" in err and "\x1b" not in out + err


def test_without_a_terminal_there_is_a_line_every_few_steps(run, training):
    _, _, err = run(*WORDS)
    numbers = [int(number) for number in re.findall(r"^step (\d+)/100", err, re.MULTILINE)]
    assert numbers == [1, *range(10, 101, 10)]
    assert "step 100/100  epoch 2.00  loss 0.0400  val ppl 7.389  1,234 tok/s  2.0 GB  lr 1.00e-04  |g| 0.25  0.0 s left" in err
    assert "step 50: validation loss 2.0000, perplexity 7.389, best so far" in err and "step 50, sample: To be[[ or\\x1b]0;x\\x07not]]" in err
    assert "the run is over" in err


def test_json_is_one_object_on_standard_output(run, training):
    code, out, err = run(*WORDS, "--json")
    found = json.loads(out)
    assert code == 0 and found["report"]["steps"] == 100 and found["plan"]["data"]["examples"] == 120 and "step 1/100" in err
    assert json.loads(run(*WORDS, "--json", "--dry-run")[1])["report"] is None


def test_quiet_leaves_one_line(run, training):
    assert run(*WORDS, "-q") == (0, "wrote adapters/base-r16 in 190.0 s\n", "")


def test_a_dry_run_prints_the_plan_as_its_result_and_remembers_nothing(run, training):
    code, out, err = run(*WORDS, "--dry-run")
    assert code == 0 and "1,234 of 123,400 parameters" in out and "[[answer" in out and "total     3.5 MB" in out and err == ""
    assert out.splitlines()[-1] == "dry run: would write adapters/base-r16" and not Path(".qlt").exists()


def test_of_several_processes_one_speaks(run, training, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(*WORDS) == (0, "", "")
    assert not Path(".qlt").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("width", "colour"), [("200", True), ("200", False), ("60", True)])
def test_on_a_terminal_there_is_a_bar_with_lines_above_it(training, monkeypatch, width, colour):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", width)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    screen = RunScreen(Screen())
    training(output=Path("there"), dry_run=False, listen=screen, progress=screen)
    seen = terminal.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
    assert "100/100" in plain and "loss 0.0400" in plain and "validation loss 2.0000" in plain and "evaluate" in plain
    assert ("|g| 0.25" in plain) == (width == "200")
    assert ("[[answer" in plain) != colour and "\x1b[2J" not in seen and "\x07" not in seen
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", seen)) == colour
    assert all(len(line) <= int(width) for line in plain.replace("\r", "\n").splitlines() if "tok/s" in line and "%" not in line)


def test_an_accuracy_takes_the_place_of_the_perplexity(capsys):
    screen = RunScreen(Screen())
    screen(Evaluation(step=3, loss=0.5, best=False, accuracy=0.75))
    screen(replace(step(4), rank=6))
    screen(step(100))
    err = capsys.readouterr().err
    assert "accuracy 75.00 %" in err and "perplexity" not in err and "val acc 75.00 %" in err and "best" not in err


def test_resuming_says_where(capsys):
    RunScreen(Screen())(replace(STARTED, resumed_at=40))
    assert "resuming at step 40 of 100" in capsys.readouterr().err


# memory of the session


def remembered():
    return json.loads(Path(".qlt/last.json").read_text())


def test_the_next_verb_finds_base_and_adapter(run, training):
    Path(".qlt").mkdir()
    Path(".qlt/last.json").write_text('{"tuned": "old", "exports": [{"path": "x"}]}')
    assert run(*WORDS)[0] == 0
    assert remembered() == {"base": "base", "adapters": [["adapters/base-r16", 1.0]]}


def test_an_interruption_has_its_own_code_and_names_the_way_on(run, training):
    training.ending = Interrupted("stopped at step 50 of 100; the state is saved", hint="qlt train --resume", folder=Path("adapters/base-r16"))
    code, out, err = run(*WORDS)
    assert code == 130 and err.endswith("error: stopped at step 50 of 100; the state is saved\nhint: qlt train --resume\n") and out == ""
    assert remembered() == {"run": "adapters/base-r16"}


def test_a_killed_run_is_remembered_too(run, training):
    training.ending = RuntimeError("killed")
    assert run(*WORDS)[0] == 70 and remembered() == {"run": "adapters/base-r16"}


def test_a_second_interruption_points_to_the_last_checkpoint(run, training):
    training.ending = KeyboardInterrupt()
    code, _, err = run(*WORDS)
    assert code == 130 and "at once" in err and "qlt train --resume" in err


@pytest.fixture
def stored(run, training):
    config = TrainConfig(rank=8, rank_pattern=(("q", 2),), samples=("a",), epochs=2.0)
    write_run(Path("adapters/mine"), RunIdentity(config.record(), "1" * 64, "2" * 64), {"base": "base", "data": "d.jsonl"})
    return config


def test_resume_alone_goes_on_with_what_the_run_was_started_with(run, training, stored):
    Path(".qlt").mkdir()
    Path(".qlt/last.json").write_text('{"run": "adapters/mine"}')
    code, _, err = run("--resume")
    assert code == 0, err
    assert training.config == stored and training.words["resume"] is True
    assert (training.words["base"], training.words["data"], training.words["output"]) == ("base", "d.jsonl", Path("adapters/mine"))
    assert "resuming adapters/mine: base base, data d.jsonl" in err and "run" not in remembered()


def test_resume_takes_the_folder_of_o_and_hands_contradictions_to_the_verb(run, training, stored):
    code, _, err = run("--resume", "-o", "adapters/mine", "--rank", 4, "--steps", 3, "--data", "other")
    assert code == 0, err
    assert training.config == replace(stored, rank=4, steps=3, epochs=None) and training.words["data"] == "other"


def test_resume_where_no_run_is_says_so(run, training):
    code, _, err = run("--resume", "-o", "nowhere")
    assert code == 9 and "nowhere" in err


def test_damaged_options_of_a_stored_run_are_refused(run, training):
    write_run(Path("there"), RunIdentity({"rank_pattern": ["q"]}, "1", "2"), {})
    assert run("--resume", "-o", "there")[0] == 4
    write_run(Path("there"), RunIdentity({"rank": "many"}, "1", "2"), {})
    assert run("--resume", "-o", "there")[0] == 4


# words for people


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (59.6, "1:00"), (187, "3:07"), (7387, "2:03:07")])
def test_durations_read_as_clocks(seconds, text):
    assert duration(seconds) == text


def test_control_characters_are_spelt_out():
    assert printable("a\tb\nc\x1b[31m\x07\r\x9b\u202e\udc80é") == "a\tb\nc\\x1b[31m\\x07\\r\\x9b\\u202e\\udc80é"


def test_usage_errors_of_recipes_need_no_run(tmp_path):
    (tmp_path / "r.toml").write_text("nonsense = 1")
    with pytest.raises(UsageError, match="nonsense"):
        read_recipe(tmp_path / "r.toml", command)
