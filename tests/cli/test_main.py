"""The command line: fast help, one-line errors with a hint, documented exit codes, clean interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import click
import pytest

from qlora_tools import errors
from qlora_tools.cli import main as cli
from qlora_tools.errors import Interrupted, QltError


def classes(base=QltError):
    for child in base.__subclasses__():
        yield child
        yield from classes(child)


def qlt(*words, cwd=None, **options):
    return subprocess.run([sys.executable, "-m", "qlora_tools.cli", *map(str, words)], capture_output=True, text=True, cwd=cwd, **options)


def test_help_imports_nothing_heavy():
    script = "import sys; from qlora_tools.cli.main import group; group.main(['--help'], standalone_mode=False); print([m for m in ('torch','numpy','rich','scipy','onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("[]")


def test_help_starts_in_under_three_tenths_of_a_second():
    times = []
    for _ in range(7):
        began = time.perf_counter()
        assert qlt("--help").returncode == 0
        times.append(time.perf_counter() - began)
    assert min(times) < 0.3


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_examples_and_the_common_options(verb):
    words = [verb, "sum"] if verb == "adapters" else [verb]  # a group: its verbs have the options
    done = qlt(*words, "-h")
    assert done.returncode == 0, done.stderr
    for text in ("Examples:", f"qlt {verb}", "--output", "--force", "--device", "--json", "--dry-run", "--quiet"):
        assert text in done.stdout


def test_every_error_class_is_its_builtin_and_has_a_documented_exit_code():
    for kind in classes():
        assert len(kind.__mro__) > 4, kind
        assert f"{kind.exit_code} " in cli.EPILOG


def test_exit_codes_tell_bad_inputs_apart():
    codes = {kind: kind.exit_code for kind in classes()}
    assert len(set(codes.values())) == len(codes)


@pytest.mark.parametrize("kind", list(classes()), ids=lambda kind: kind.__name__)
def test_an_error_is_one_line_and_a_hint(kind, capsys):
    assert cli.report(kind("weights.safetensors: `x` is wrong", hint="do this")) == kind.exit_code
    assert capsys.readouterr().err == "error: weights.safetensors: `x` is wrong\nhint: do this\n"


def test_the_unit_that_failed_is_part_of_the_line(capsys):
    error = errors.NonFiniteError("`w` holds NaN")
    error.add_note("while running: nf4 w")
    cli.report(error)
    assert capsys.readouterr().err == "error: `w` holds NaN (while running: nf4 w)\n"


def test_an_error_about_a_foreign_name_does_not_steer_the_terminal(capsys):
    error = errors.CorruptError("`x\x1b[2J`", hint="see \x9b")
    error.add_note("\x1b]0;title\x07")
    cli.report(error, as_json=True)
    out, err = capsys.readouterr()
    assert err == "error: `x\\x1b[2J` (\\x1b]0;title\\x07)\nhint: see \\x9b\n"
    assert json.loads(out)["error"]["hint"] == "see \x9b" and "\x1b" not in out


def test_json_errors_are_json(tmp_path):
    done = qlt("inspect", tmp_path / "nowhere", "--json")
    found = json.loads(done.stdout)["error"]
    assert done.returncode == 9 and found["kind"] == "MissingError" and found["exit_code"] == 9 and found["hint"]


def test_unknown_words_are_usage_errors():
    assert qlt("quantise").returncode == 2
    assert qlt("quantize").returncode == 2


def test_a_bug_is_called_one_and_asks_for_the_traceback(capsys):
    assert cli.report(KeyError("x")) == 70
    assert "QLT_DEBUG=1" in capsys.readouterr().err


def test_interruption_has_its_own_code(capsys):
    assert cli.report(KeyboardInterrupt()) == 130 and cli.report(click.Abort()) == 130


def test_what_was_saved_on_the_way_out_is_told_after_a_signal_too():
    stopped = Interrupted("stopped after 3 blocks", hint="qlt refine --resume")
    stopped.__cause__ = cli._Terminated()
    assert cli.explain(stopped) == ("stopped after 3 blocks", "qlt refine --resume", 130)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_during_work_leaves_nothing_behind(tmp_path, number, code):
    script = (
        "import os, pathlib, signal, sys, time, click\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # who runs the tests may ignore it, as under nohup
        "from qlora_tools.cli import main as cli\n"
        "from qlora_tools.checkpoint.folder import output_folder\n"
        "@click.command('slow')\n"
        "def slow():\n"
        f"    with output_folder(pathlib.Path({str(tmp_path / 'out')!r})) as folder:\n"
        "        (folder / 'half').write_text('x'); print('ready', flush=True); time.sleep(300)\n"
        "cli.group.get_command = lambda ctx, name: slow\n"
        "sys.argv = ['qlt', 'slow']\n"
        "cli.main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "ready\n"
            os.kill(child.pid, number)
            _, err = child.communicate(timeout=40)
        finally:
            child.kill()  # else the block waits for it
    assert child.returncode == code and "nothing was left behind" in err and list(tmp_path.iterdir()) == []
