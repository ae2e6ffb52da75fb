"""``qlt``: find the verb, run it, turn errors into one line, a hint and an exit code."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import logging
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from qlora_tools import __version__
from qlora_tools.cli.words import printable
from qlora_tools.errors import QltError

#: Verbs in the order in which a newcomer meets them; each is ``cli/commands/<verb>.py`` with a click command named ``command``.
VERBS = {
    "extract": "Take a LoRA adapter out of a full fine-tune.",
    "refine": "Improve an adapter for the base it will live on.",
    "merge": "Merge adapters into a checkpoint, and requantize it if asked.",
    "quantize": "Quantize a checkpoint to NF4 or int8, for stock transformers.",
    "init": "Make a starting adapter for training on a quantized base.",
    "calibrate": "Take statistics of a model's activations, for calibrated verbs.",
    "train": "Train a LoRA adapter on a frozen, quantized base.",
    "import": "Bring in an adapter of any known format as a PEFT folder.",
    "convert": "Write an adapter in another format.",
    "adapters": "List, sum, resize and compare adapters.",
    "export": "Export an ONNX graph: floats to 4 bits.",
    "verify": "Hold an export against its checkpoint again.",
    "generate": "Let an export continue a text, or answer.",
    "bench": "Measure latency, memory and quality of models in several settings.",
    "report": "Draw a benchmark's table, page and plots again; compare; pick a setting.",
    "eval": "Measure perplexity and divergence of checkpoints and exports.",
    "estimate": "Sizes and memory of a model in every setting, from its config alone.",
    "inspect": "Say what a folder or file holds.",
    "doctor": "Check this installation.",
    "demo": "Train a small model and run the whole chain on it.",
}

#: Verbs that Python keeps for itself.
_FILES = {"import": "import_adapter"}

EPILOG = """\b
Examples:
  qlt train --base base/ --data train.jsonl --nf4
  qlt extract --base base/ --tuned tuned/ --rank 16
  qlt export --merge --int8
  qlt bench

Exit codes: 0 done, 1 a check failed, 2 usage, 3 inputs do not fit together, 4 corrupt input,
5 disk, 6 NaN or infinity, 7 output exists, 8 unsupported, 9 missing input, 10 out of memory,
70 a bug, 130 interrupted, 143 terminated.
QLT_DEBUG=1 shows tracebacks.
"""


class Verbs(click.Group):
    """Imports a verb's file only when that verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"qlora_tools.cli.commands.{_FILES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qlt")
def group() -> None:
    """Quantization-aware LoRA compression and export."""


def main() -> NoReturn:
    """Entry point of the ``qlt`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a closed terminal; under nohup it is ignored, and stays so
        signal.signal(signal.SIGHUP, _terminate)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package on every import
    gc.set_threshold(200_000)  # importing torch makes objects that live on; collecting them every 700 costs 0.3 s a start
    arguments = sys.argv[1:]
    try:
        code = run(arguments)
    except BaseException as error:
        if os.environ.get("QLT_DEBUG") and not isinstance(error, (SystemExit, click.exceptions.Exit)):
            raise
        code = report(error, as_json="--json" in arguments)
    _flush()
    gc.freeze()  # nothing is left to collect but what torch imported; walking that once more at exit takes another 0.3 s
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """The exit code of the command that ``arguments`` spell: click hands over, instead of raising, the one that a command leaves with."""
    code = group.main(arguments, prog_name="qlt", standalone_mode=False)
    return code if isinstance(code, int) else 0


def report(error: BaseException, *, as_json: bool = False) -> int:
    """Say what went wrong on standard error (and as JSON on standard output if asked) and return the exit code."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, click.UsageError):
        error.show()
        return 2
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    message, hint, code = explain(error)
    click.echo(f"error: {printable(message)}", err=True)
    if hint:
        click.echo(f"hint: {printable(hint)}", err=True)
    if as_json:
        click.echo(json.dumps({"error": {"kind": type(error).__name__, "message": message, "hint": hint, "exit_code": code}}))
    return code


def explain(error: BaseException) -> tuple[str, str | None, int]:
    """Message, hint and exit code of an exception."""
    if isinstance(error, _Terminated) or (isinstance(error, click.Abort) and isinstance(error.__cause__, _Terminated)):  # click makes an Abort of it
        return "terminated; nothing was left behind", None, 143
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted; nothing was left behind", None, 130
    if isinstance(error, QltError):
        return " ".join([str(error), *(f"({note})" for note in getattr(error, "__notes__", ()))]), error.hint, error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory", "close other programs, or use a smaller model", 10
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO):
        return str(error), "check the disk and its permissions", 5
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"unexpected {type(error).__name__}: {error}{notes}", "this is a bug: run again with QLT_DEBUG=1 and report the traceback", 70


class _Terminated(KeyboardInterrupt):
    """SIGTERM, or the end of the terminal, raised like Ctrl-C so that everything on the way out cleans up and saves."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_plain(value: Any) -> Any:
    """Records (with their derived properties), paths and tuples as what JSON knows."""
    from dataclasses import fields, is_dataclass
    from pathlib import Path

    if is_dataclass(value) and not isinstance(value, type):
        derived = [name for name, member in vars(type(value)).items() if isinstance(member, property) and not name.startswith("_")]
        return {name: as_plain(getattr(value, name)) for name in (*(field.name for field in fields(value)), *derived)}
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
