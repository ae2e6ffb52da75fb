"""One measurement in one fresh process: ``python -m qlora_tools.bench.worker CONFIG.json``.

The order matters. Memory is read before anything heavy is imported; the engine's module is imported; the
engine is loaded; the peak is reset; the workload is warmed up and timed; memory is read again. The result is
written beside its final name and renamed, so the parent finds a whole file or none. What went wrong is told by
``status`` in the result and by the exit code alike (:data:`EXIT_CODES`); a worker that dies without a result
is the parent's to explain.

The configuration (plain JSON): ``job``, ``engine`` and ``options`` (see ``engine.py``), ``threads``, ``result`` (the file to write), ``deadline_s``,
``parent`` (the process that waits for it), and where an accelerator is to be read ``meter`` (``open``, the import path of ``open(device)``, and ``device``). Jobs:

* ``"latency"`` times a ``workload``;
* ``"device-memory"`` runs it twice under the eyes of ``arena``, the import path of a context manager that knows the runtime's allocator;
* ``"context"`` loads no model: ``context``, an import path, holds the least that a runtime can and reads the meter meanwhile;
* the import path of a probe ``probe(engine, reference, options) -> dict``, with its ``probe_options`` and a ``reference`` with ``engine`` and ``options``.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_tools.bench.engine import Engine, locate
from qlora_tools.bench.forward import is_forward, time_pass
from qlora_tools.bench.repeats import time_repeats
from qlora_tools.errors import QltError, UnsupportedError
from qlora_tools.process_memory import read_memory, reset_peak

EXIT_CODES = {"ok": 0, "error": 1, "oom": 3, "unsupported": 8}
LATENCY = "latency"
DEVICE_MEMORY = "device-memory"
CONTEXT = "context"
_PR_SET_PDEATHSIG = 1
_OOM_WORDS = (
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "alloc_failed",
    "smaller than requested bytes",
)


def main(arguments: list[str]) -> int:
    """Run the job that the configuration file names; returns the exit code."""
    config = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    if config.get("parent"):
        die_with(config["parent"])
    if config.get("deadline_s"):  # where the system does not end it, a worker whose parent was killed must not stay for ever
        signal.alarm(math.ceil(config["deadline_s"]) + 5)
    try:
        result = {"status": "ok", "reason": None, **run_job(config)}
    except Exception as error:  # noqa: BLE001 - whatever an engine raises becomes the row's reason
        traceback.print_exc()
        result = {"status": status_of(error), "reason": reason_of(error)}
    write_result(Path(config["result"]), result)
    return EXIT_CODES[result["status"]]


def die_with(parent: int) -> None:
    """On Linux this process ends with ``parent`` (prctl(2), ``PR_SET_PDEATHSIG``): left alone it would run beside the benchmark that goes on."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before this was asked for
        raise SystemExit(EXIT_CODES["error"])


def run_job(config: Mapping[str, Any]) -> dict[str, Any]:
    """Load the engine and do the job; the result is plain JSON."""
    if config["job"] == CONTEXT:
        return {"device": dict(locate(config["context"])(config["engine"], open_meter(config), config["options"]))}
    if config["job"] == DEVICE_MEMORY:
        return run_watched(config)
    memory: dict[str, Any] = {"baseline": read_memory().record()}
    started = time.perf_counter()
    factory = locate(config["engine"])
    imported = time.perf_counter()
    memory["imported"] = read_memory().record()
    load_started = time.perf_counter()
    engine: Engine = factory(threads=config["threads"], **config["options"])
    loaded = time.perf_counter()
    memory["loaded"] = read_memory().record()
    try:
        result: dict[str, Any] = {"import_s": imported - started, "load_s": loaded - load_started, "info": dict(engine.info()), "memory": memory}
        if config["job"] == LATENCY:
            meter = open_meter(config)
            memory["peak_was_reset"] = reset_peak()
            result |= measure_latency(engine, config["workload"], result["info"], meter)
            memory["steady"] = read_memory().record()
            result |= _held(meter)
        else:
            result["figures"] = run_probe(engine, config)
    finally:
        engine.close()
    return result


def run_watched(config: Mapping[str, Any]) -> dict[str, Any]:
    """Load the engine and let it work twice, its allocator watched: what a case takes of an accelerator."""
    with locate(config["arena"])() as watch:
        engine: Engine = locate(config["engine"])(threads=config["threads"], **config["options"])
        try:
            info = dict(engine.info())
            time_repeats(one_run(engine, config["workload"], info), {**config["workload"], "warmup": 1, "most_warmup": 1, "repeats": 1})
            held = _held(open_meter(config))
        finally:
            engine.close()
    return {"info": info, "arena": dict(watch.record()), **held}


def open_meter(config: Mapping[str, Any]) -> Any | None:
    """The reader of the accelerator that ``config["meter"]`` names, ``None`` where there is none to read."""
    wanted = config.get("meter")
    return locate(wanted["open"])(wanted["device"]) if wanted else None


def _held(meter: Any | None) -> dict[str, Any]:
    """What the process holds of the device now. An arena that never shrinks makes one look at the end the peak."""
    return {} if meter is None else {"device": dict(meter.read(os.getpid()))}


def run_probe(engine: Engine, config: Mapping[str, Any]) -> dict[str, Any]:
    """A probe by name, with a second engine as its reference. The reference is loaded even where it is the same model: a floor is measured, not assumed."""
    reference: Engine = locate(config["reference"]["engine"])(threads=config["threads"], **config["reference"]["options"])
    try:
        return dict(locate(config["job"])(engine, reference, config["probe_options"]))
    finally:
        reference.close()


def measure_latency(engine: Engine, workload: Mapping[str, Any], info: Mapping[str, Any], meter: Any | None = None) -> dict[str, Any]:
    """Warm up until steady, then time ``repeats`` runs of the engine's work. Every setting is fed the same. With a ``meter`` the runs' energy, too."""
    return time_repeats(one_run(engine, workload, info), workload, None if meter is None else meter.read)


def one_run(engine: Engine, workload: Mapping[str, Any], info: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """One run of what the engine does: a generation, or one forward where ``info`` says that it looks once."""
    if is_forward(info):
        feed = engine.feed(workload, int(workload["seed"]))  # type: ignore[attr-defined]
        return lambda: time_pass(engine, feed)  # type: ignore[arg-type]
    prompt_BT, continuation_NB = workload_tokens(workload, int(info["vocab_size"]))
    return lambda: time_generation(engine, prompt_BT, continuation_NB)


def time_generation(engine: Engine, prompt_BT: Any, continuation_NB: Any) -> dict[str, Any]:
    """One generation in seconds: ``prefill_s``, ``ttft_s`` (prefill and the choice of a token), one ``decode_s`` per further token, ``total_s``."""
    clock = time.perf_counter
    decode_s = []
    started = clock()
    logits = engine.prefill(prompt_BT)
    prefilled = clock()
    logits.argmax(-1)
    first = last = clock()
    for tokens_B in continuation_NB:
        engine.decode(tokens_B)
        now = clock()
        decode_s.append(now - last)
        last = now
    return {"prefill_s": prefilled - started, "ttft_s": first - started, "decode_s": decode_s, "total_s": last - started}


def workload_tokens(workload: Mapping[str, Any], vocab_size: int) -> tuple[Any, Any]:
    """(prompt i64[B, T], the tokens fed afterwards i64[N, B]): given ids, or seeded random ones."""
    import numpy as np

    batch, length, steps = workload["batch"], workload["prompt_tokens"], workload["new_tokens"] - 1
    given = workload.get("ids")
    if given is None:
        ids = np.random.Generator(np.random.PCG64(workload["seed"])).integers(0, vocab_size, (batch, length + steps))
    else:
        row = np.asarray(given, dtype=np.int64)
        ids = np.tile(np.resize(row, length + steps), (batch, 1))
    ids = np.ascontiguousarray(ids.astype(np.int64))
    return ids[:, :length], np.ascontiguousarray(ids[:, length:].T)


def status_of(error: BaseException) -> str:
    """``oom``, ``unsupported`` or ``error``: allocators of the various runtimes share words, not classes."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(word in str(error).lower() for word in _OOM_WORDS):
        return "oom"
    return "unsupported" if isinstance(error, UnsupportedError) else "error"


def reason_of(error: BaseException) -> str:
    """One line: the class, unless the message speaks for itself, and the message's first line, with the way out where the error knows one."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if isinstance(error, QltError):
        return lines[0] if error.hint is None else f"{lines[0]}; {error.hint}"
    return f"{type(error).__name__}: {lines[0]}"


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(result, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
