"""What ``cuda.py`` does: its parts, its budget of seconds and its result file.

In a module of its own since that file only has its name for the command line (see there). Whether a bar is held is ``judging.py``'s to judge.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from judging import judge
from measured import RESULTS, machine, measure, public_arguments, versions
from synthetic import config_of, specs_of

from qlora_tools.bench.device import open_meter
from qlora_tools.bench.device.energy import LEAST_S
from qlora_tools.bench.pairs import compare, round_ratios
from qlora_tools.bench.record import BenchRecord, Case, Row, Setting, Workload
from qlora_tools.bench.run import run_bench
from qlora_tools.errors import MissingError
from qlora_tools.names import slug

GRAPH, TORCH = "qlora_tools.export.runtime:open_engine", "qlora_tools.bench.hf_engine:load"
#: Group -> (ours, torch with bitsandbytes or alone, the builder's), by device.
GROUPS = {
    "cuda": {
        "4 bits": (("int4", "nf4"), "nf4", "int4"),
        "8 bits": (("int8",), "int8", "int8"),
        "16 bits": (("fp16", "bf16"), "bf16", "fp16"),
    },
    "cpu": {"4 bits": (("int4",), "nf4", "int4"), "8 bits": (("int8",), "int8", "int8"), "16 bits": (("fp32",), "bf16", "fp32")},
}
#: A small model that decodes with the attention kernel of the large ones: XQA takes 1, 2, 4, 5, 8, 16 or 32 heads to one of the past; 11m has 3.
CHECKED = {"cuda": "350m", "cpu": "tiny"}
BITS = {"int4": 4.5, "nf4": 4.5, "int8": 8.5, "fp16": 16, "bf16": 16, "fp32": 32}
BUDGET = "not measured: budget"
#: Guesses in seconds, corrected by what the parts before took: a process that imports and loads, per gigabyte of its weights, a step of 32 layers, per
#: gigabyte of models made.
_PROCESS_S, _PER_GB_S, _MADE_PER_GB_S = 8.0, 0.7, 1.5
_STEP_S = {"torch nf4": 0.035, "torch int8": 0.1, "torch bf16": 0.025}
_OUR_STEP_S = 0.01
_CONTEXT_S = 5.0
_REPEATS, _WARMUP = 2, 3
_SLACK_S = 10.0


#: What a part has found so far, once or more often, each time all of it.
Part = Callable[[], Iterable[dict[str, Any]]]


class Clock:
    """Seconds that are left, how far the guesses were off so far, and what the first figures of the groups to come will take by those guesses.

    ``contexts``: empty processes for the next group: what one takes does not depend on the model, so five in the first group, one in each later.
    """

    def __init__(self, budget_s: float) -> None:
        self.began, self.budget_s, self.pace, self.later_s = time.monotonic(), budget_s, 1.0, 0.0
        self.contexts = 5

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.began) - _SLACK_S

    def learn(self, guessed_s: float, took_s: float) -> None:
        """``guessed_s``: without the pace."""
        self.pace = min(max(0.5 * self.pace + 0.5 * took_s / guessed_s, 0.02), 4.0)


def parser_of(description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(GROUPS), default="cuda")
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batch", default="1", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per setting; an interval needs five")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--only", help="parts to run, comma-separated")
    parser.add_argument("--skip", default="", help="parts to leave out")
    parser.add_argument("--missing", action="store_true", help="only parts that the result file has no figures of")
    parser.add_argument("--train-shape", default="1b")
    parser.add_argument("--genai-python", type=Path, help="python that holds onnxruntime-genai; without one the builder is left out")
    parser.add_argument("--work", type=Path)
    return parser


def main(arguments: list[str] | None = None, *, description: str | None = None) -> None:
    options = parser_of(description).parse_args(arguments)
    clock, results = Clock(options.budget), Results(options, gpu_of(options.device))
    with tempfile.TemporaryDirectory(dir=options.work) as text:
        wanted = [(name, part) for name, part in parts_of(options, Path(text), clock) if not (options.missing and results.has(name))]
        for number, (name, part) in enumerate(wanted):
            clock.later_s = sum(first_round_s(*later.split(maxsplit=1), options, 1, has_base=True) for later, _ in wanted[number + 1 :] if " " in later)
            began = time.monotonic()
            try:
                for found in part():
                    results.put(name, {**found, "seconds": round(time.monotonic() - began, 1)})
            except Exception as error:  # noqa: BLE001 - one part's failure must not lose the others, nor the rounds it had
                results.fail(name, f"{type(error).__name__}: {str(error)[-600:]}")
            print(f"{name}: {results.line(name)}  ({time.monotonic() - clock.began:.0f} s of {options.budget:.0f})", flush=True)
    for line in results.verdicts():
        print(line)
    print("wrote", results.path)


def parts_of(options: argparse.Namespace, work: Path, clock: Clock) -> Iterator[tuple[str, Part]]:
    """Name and what to call, most important first; ``--only`` and ``--skip`` applied."""
    shapes = options.shapes.split(",")
    parts: dict[str, Part] = {"checks": lambda: checks(work, options, clock)}
    for group in GROUPS[options.device]:
        for shape in shapes:
            parts[f"{shape} {group}"] = lambda shape=shape, group=group: measured_group(work, shape, group, options, clock)  # type: ignore[misc]
    suffix = "_cuda" if options.device == "cuda" else ""
    where = ["--device", options.device, "--work", work]
    trained = [*where, "--shape", options.train_shape, "--batch", 4, "--length", 1024, "--steps", 8, "--pairs", 1]
    parts |= {
        "tests": lambda: gpu_tests(clock),
        "train": lambda: other_script("train_vs_peft.py", trained, 120.0, f"train_vs_peft{suffix}", clock),
        "estimate": lambda: other_script("estimate.py", [*where, "--shapes", "350m"], 120.0, f"estimate{suffix}", clock),
    }
    wanted = options.only.split(",") if options.only else list(parts)
    for name in {*wanted, *filter(None, options.skip.split(","))} - parts.keys():
        raise SystemExit(f"there is no part `{name}`; there are: {', '.join(parts)}")
    return ((name, part) for name, part in parts.items() if name in wanted and name not in options.skip.split(","))


def gpu_of(device: str) -> dict[str, Any] | None:
    """What the GPU says of itself before anything runs on it; ``None`` for the CPU, or where nobody can be asked."""
    if device == "cpu":
        return None
    try:
        meter = open_meter(device)
    except MissingError as error:
        print(f"note: {error}", file=sys.stderr)
        return None
    return None if meter is None else meter.describe()


class Results:
    """``cuda.json``: parts of this run over those of an earlier one on the same kind of device (``gpu``); of another kind they are put aside in a file with that
    one's name. Written whole after each part."""

    def __init__(self, options: argparse.Namespace, gpu: dict[str, Any] | None = None) -> None:
        self.path = RESULTS / ("cuda.json" if options.device == "cuda" else f"cuda_{options.device}.json")
        before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        known = before.get("gpu")
        if gpu and known and gpu["name"] != known["name"]:  # figures of two kinds of device do not belong in one table
            self.path.replace(self.path.with_name(f"{self.path.stem}_{slug(known['name'].lower())}.json"))
            before = {}
        self.content: dict[str, Any] = {"parts": before.get("parts", {}), "gpu": gpu or before.get("gpu")}
        self.content |= {"command": f"python benchmarks/cuda.py {public_arguments()}".strip(), "machine": machine(), "device": options.device}
        self.content["versions"] = versions("qlora-tools", "torch", "numpy", "onnxruntime-gpu", "bitsandbytes", "transformers", "peft")

    def has(self, name: str) -> bool:
        """True if a part was measured, in this run or an earlier one; where nothing of it ran, it was not."""
        found = self.content["parts"].get(name, {})
        nothing_ran = found.get("rows") and all("failed" in row for row in found["rows"].values())
        return bool(found) and not {"failed", "reason"} & found.keys() and not nothing_ran and found.get("passed") is not False

    def put(self, name: str, found: dict[str, Any]) -> None:
        parts = self.content["parts"]
        if found.get("reason") == BUDGET and self.has(name):
            return  # what was measured before is worth more than that it was not measured now
        parts[name] = found
        self.content["gpu"] = found.pop("gpu", None) or self.content["gpu"]
        self.path.parent.mkdir(exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, sort_keys=True, separators=(",", ":")) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def fail(self, name: str, why: str) -> None:
        """Why a part ended, beside the rounds it had or in their place."""
        before = self.content["parts"].get(name, {})
        self.put(name, {**before, "stopped": why} if self.has(name) else {"failed": why})

    def line(self, name: str) -> str:
        found = self.content["parts"].get(name, {})
        if reason := found.get("failed") or found.get("reason"):
            return str(reason)
        return ", ".join(f"{row} {figures['decode_ms']:.2f} ms" for row, figures in found.get("rows", {}).items() if figures.get("decode_ms")) or found.get(
            "said", "done"
        )

    def verdicts(self) -> list[str]:
        return [
            f"{name}: {item['ours']} against {item['theirs']}, {item['figure']}: {item['times_better']:.2f} times better: "
            f"{judge(item['times_better'], 1.0, least=True, ci95=item['ci95'])}"
            for name, part in self.content["parts"].items()
            for item in part.get("ratios", ())
        ]


# ---- parts, in the parent ----


def checks(work: Path, options: argparse.Namespace, clock: Clock) -> Iterator[dict[str, Any]]:
    """Parity of every scheme on the device, and the device's copy speed."""
    schemes = [scheme for ours, _, _ in GROUPS[options.device].values() for scheme in ours]
    found = ask({"do": "checks", "work": str(work / "checks"), "shape": CHECKED[options.device], "device": options.device, "schemes": schemes}, clock.left_s)
    bad = [name for name, row in found["schemes"].items() if "failed" in row]
    yield {
        **found,
        "said": f"{len(schemes) - len(bad)} of {len(schemes)} schemes compute what their checkpoints do" + (f", not {', '.join(bad)}" if bad else ""),
    }


def measured_group(work: Path, shape: str, group: str, options: argparse.Namespace, clock: Clock) -> Iterator[dict[str, Any]]:
    """Make the models of a group and run them beside each other, a round at a time while there is time; delete them."""
    ours, theirs, built = GROUPS[options.device][group]
    first_s = first_round_s(shape, group, options, clock.contexts, has_base=(work / f"base-{shape}").exists())
    if first_s * clock.pace > clock.left_s:
        yield {"reason": BUDGET}
        return
    folder, began = work / f"{shape}-{group.replace(' ', '-')}", time.monotonic()
    try:
        wanted = {"shape": shape, "ours": ours, "theirs": theirs, "base": str(work / f"base-{shape}"), "folder": str(folder), "device": options.device}
        made = ask({"do": "make", **wanted}, clock.left_s)
        if options.genai_python:
            made[f"builder {built}"] = build(work / f"base-{shape}", folder, built, options, clock.left_s)
        for number, record in enumerate(rounds_of(settings_of(made, options.device), shape, folder / "journal.jsonl", options, clock), 1):
            if number == 1:
                clock.learn(first_s, time.monotonic() - began)
            yield report_of(record, made)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rounds_of(settings: list[Setting], shape: str, journal: Path, options: argparse.Namespace, clock: Clock) -> Iterator[BenchRecord]:
    """The benchmark after one round, after two, ...: each goes on from the journal of the last. No second round at the cost of another group's first."""
    cases = tuple(Case(options.prompt, options.new, int(batch)) for batch in options.batch.split(","))
    workload = Workload(cases=cases, repeats=_REPEATS, warmup=_WARMUP, most_warmup=_WARMUP)
    timeout_s, took_s, contexts = max(min(clock.left_s / 2, 240.0), 30.0), 0.0, clock.contexts
    for number in range(1, options.rounds + 1):
        if number > 1 and took_s > clock.left_s - clock.pace * clock.later_s:
            return
        began = time.monotonic()
        title = f"Random Llama of {shape} shape"
        yield run_bench(settings, workload, rounds=number, threads=options.threads, timeout_s=timeout_s, journal=journal, contexts=contexts, title=title)
        took_s = (time.monotonic() - began) / (1 if number > 1 else 2)  # the first measures memory too, in as many processes again
        clock.contexts = 1


def settings_of(made: dict[str, dict[str, Any]], device: str) -> list[Setting]:
    """Theirs first: ratios are to the first."""
    found = []
    for name, row in sorted(made.items(), key=lambda item: not item[0].startswith("torch")):
        folder = row["folder"]
        options = {"path": folder, "dtype": "stored", "device": device} if name.startswith("torch") else {"folder": folder, "device": device}
        engine = TORCH if name.startswith("torch") else GRAPH
        found.append(Setting(id=name, engine=engine, options=options, path=folder, scheme=name.split()[-1], unavailable=row.get("failed")))
    return found


def build(base: Path, folder: Path, precision: str, options: argparse.Namespace, timeout_s: float) -> dict[str, Any]:
    """The builder's graph, in its own process."""
    dest = folder / f"builder-{precision}"
    arguments = ["-m", base, "-o", dest, "-p", precision, "-e", options.device, "-c", folder / "cache"]
    done = measure("onnxruntime_genai.models.builder", arguments, python=str(options.genai_python), cwd=folder, timeout_s=max(timeout_s, 1.0))
    shutil.rmtree(folder / "cache", ignore_errors=True)
    row = {"folder": str(dest), "seconds": done["wall_s"]}
    said = [*done["stderr"].strip().splitlines(), f"exit status {done['returncode']}"] if done["returncode"] != 0 else []
    return row | ({"failed": f"the builder: {said[max(len(said) - 2, 0)][:300]}"} if said else {})


def gpu_tests(clock: Clock) -> Iterator[dict[str, Any]]:
    """``pytest -m gpu`` with what it said last."""
    if clock.left_s < 40:
        yield {"reason": BUDGET}
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--no-header", "-rf"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=clock.left_s, check=False)
    except subprocess.TimeoutExpired:
        yield {"reason": BUDGET}
        return
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield {"said": lines[-1] if lines else f"exit status {done.returncode}", "failures": failed, "passed": done.returncode == 0}


def other_script(script: str, words: list[Any], least_s: float, result: str, clock: Clock) -> Iterator[dict[str, Any]]:
    """A script with a result file of its own, if so many seconds are left."""
    done = None if clock.left_s < least_s else measure(str(Path(__file__).with_name(script)), words, timeout_s=clock.left_s)
    if done is None or done["returncode"] is None:
        yield {"reason": BUDGET}
    elif done["returncode"]:
        yield {"failed": done["stderr"][-600:]}
    else:
        yield {"said": f"see {result}.json"}


def first_round_s(shape: str, group: str, options: argparse.Namespace, contexts: int, *, has_base: bool) -> float:
    """Seconds until a group has its first figures, roughly: models made, run (on a GPU long enough for its counter of energy), and run again for their
    memory, beside empty processes. ``has_base``: the bf16 weights are there."""
    ours, theirs, built = GROUPS[options.device][group]
    made = [
        *ours,
        *([] if theirs == "bf16" else [theirs]),
        *([built] if options.genai_python else []),
        *([] if has_base else ["bf16"]),
    ]
    names = [f"torch {theirs}", *ours, *([f"builder {built}"] if options.genai_python else [])]
    one_round_s = sum(process_s(shape, name, options) for name in names)
    energy_s = LEAST_S * len(names) * len(options.batch.split(",")) if options.device == "cuda" else 0.0
    return _MADE_PER_GB_S * sum(weights_gb(shape, scheme) for scheme in made) + 2 * one_round_s + energy_s + 2 * contexts * _CONTEXT_S


def process_s(shape: str, name: str, options: argparse.Namespace) -> float:
    """Seconds of one process of a setting at every case, roughly: LLM.int8 spends most of its time in steps, a graph in loading."""
    step_s = _STEP_S.get(name, _OUR_STEP_S) * config_of(shape)["num_hidden_layers"] / 32
    running_s = (_REPEATS + _WARMUP) * options.new * step_s
    return (_PROCESS_S + _PER_GB_S * weights_gb(shape, name.split()[-1]) + running_s) * len(options.batch.split(","))


def weights_gb(shape: str, scheme: str) -> float:
    """Gigabytes of a model's weights, roughly."""
    return sum(spec.numel for spec in specs_of(config_of(shape))) * BITS[scheme] / 8e9


def report_of(record: BenchRecord, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rows in short, the ratios, and the whole record."""
    rows = {f"{row.setting}{'' if row.case.batch == 1 else f', batch {row.case.batch}'}": short(row, made[row.setting]) for row in record.rows}
    ratios = [item for row in record.rows if not row.setting.startswith(("torch", "builder")) for other in record.rows for item in beside(row, other)]
    return {"rows": rows, "ratios": ratios, "rounds": record.rounds, "gpu": record.machine.get("gpu"), "record": json.loads(record.to_json())}


def short(row: Row, made: dict[str, Any]) -> dict[str, Any]:
    """One row's figures in milliseconds and bytes; what is not known is left ``None``."""
    if row.status != "ok":
        return {"failed": row.reason, "status": row.status}
    memory = row.device_memory
    return {
        "prefill_ms": None if row.prefill is None or row.prefill.p50_s is None else 1e3 * row.prefill.p50_s,
        "decode_ms": None if row.decode is None or row.decode.p50_s is None else 1e3 * row.decode.p50_s,
        "energy_j": row.energy_j,
        "weights_bytes": row.weights_bytes,
        "memory": None if memory is None else {name: value for name, value in vars(memory).items() if name.endswith("_bytes")},
        "host_peak_bytes": None if row.memory is None else row.memory.peak_bytes,
        "made_s": made.get("seconds"),
        "unknown": dict(row.unknown),
    }


def beside(row: Row, other: Row) -> Iterator[dict[str, Any]]:
    """How many times better a row of ours is than one of theirs at the same work, by figure."""
    if other.case != row.case or not other.setting.startswith(("torch", "builder")) or {row.status, other.status} != {"ok"}:
        return
    head = {"ours": row.setting, "theirs": other.setting, "batch": row.case.batch}
    for metric in ("prefill", "decode"):
        if ratios := round_ratios(other.attempts, row.attempts, metric):
            found = compare(ratios)
            yield {**head, "figure": metric, "times_better": found["effect"], "ci95": found["ci95"], "pairs": found["n_pairs"]}
    if row.device_memory is None or other.device_memory is None:
        return
    for name in ("process_peak_bytes", "as_deployed_peak_bytes"):
        left, right = getattr(row.device_memory, name), getattr(other.device_memory, name)
        if left and right:
            yield {**head, "figure": name.removesuffix("_bytes"), "times_better": right / left, "ci95": None, "pairs": 1}


def ask(job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Have a fresh process do ``job`` and give its answer."""
    with tempfile.TemporaryDirectory() as text:
        answer = Path(text, "answer.json")
        job = {**job, "answer": str(answer)}
        done = measure(str(Path(__file__).with_name("cuda_child.py").resolve()), [json.dumps(job)], timeout_s=max(timeout_s, 1.0))
        if not answer.exists():
            raise RuntimeError(f"{job['do']}: {'out of time' if done['returncode'] is None else done['stderr'][-500:]}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found
