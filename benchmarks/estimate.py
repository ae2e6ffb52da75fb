"""What `qlt estimate` foretells for running a model, beside the peaks that fresh processes then had.

    python benchmarks/estimate.py [--work DIR] [--calibrate] [--large] [--published] [--device cuda]

Random Llamas are exported and quantized, and each runs twice in a process of its own, as `qlt bench` starts them; the peak is that of the resident
set (``VmHWM``). ``--calibrate`` fits the constants of ``qlora_tools/verbs/measured_memory.json`` to the rows marked as fitted and writes them first; the others
were never fitted. Bar: every row within 10 %. With ``--device cuda`` the rows are those of a GPU, beside the runtime's own count of its arena; nothing is
fitted to them. ``--large``: a model of 1 B too, quantized only (7 GB of disk). Writes ``benchmarks/results/estimate.json`` (``estimate_cuda.json``).

``--published`` measures nothing: it puts the nf4 estimates of the models in ``benchmarks/shapes`` beside what others published about them, and writes
``benchmarks/results/estimate_published.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measured import machine, public_arguments, versions, write_result
from synthetic import write_base

from qlora_tools import api
from qlora_tools.bench.accelerator import Instruments
from qlora_tools.bench.launch import run_worker
from qlora_tools.bench.record import Case, Workload
from qlora_tools.bench.worker import DEVICE_MEMORY, LATENCY
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.live.outline import outline
from qlora_tools.verbs import estimate as verb
from qlora_tools.verbs import measured_memory
from qlora_tools.verbs.graph_memory import SCHEMES, GraphModel, graph_models
from qlora_tools.verbs.published import published_for

BAR = 0.10
GRAPH, BASE = "qlora_tools.export.runtime.session:open_engine", "qlora_tools.bench.hf_engine:load"
SHORT, LONG, MANY = Case(128, 8, 1), Case(512, 8, 1), Case(512, 8, 4)
#: (shape, tied, cases, whether constants are fitted to them)
RUNS = (
    ("tiny", True, (Case(16, 4, 1),), True),
    ("110m", True, (SHORT, LONG, MANY), True),
    ("350m", True, (SHORT,), True),
    ("110m", False, (Case(300, 8, 2), Case(700, 4, 1)), False),
    ("350m", True, (LONG,), False),
)
#: Large enough that only quantized weights are run.
LARGE = ("1b", True, (Case(128, 4, 1),), False)


@dataclass(frozen=True)
class Row:
    """One process. ``kind``: ``graph`` or ``transformers``; bytes."""

    shape: str
    tied: bool
    kind: str
    setting: str
    case: str
    fitted: bool
    peak_bytes: int
    loaded_bytes: int
    anonymous_bytes: int
    file_bytes: int
    estimate_bytes: int = 0

    @property
    def error(self) -> float:
        return self.estimate_bytes / self.peak_bytes - 1


class Foretold:
    """The estimates of one config, traced once however often the constants change."""

    def __init__(self, checkpoint: LogicalCheckpoint, device: str) -> None:
        self.graphs: dict[str, GraphModel] = {graph.setting: graph for graph in graph_models(checkpoint, checkpoint, device)[0]}
        self.bases = {name: verb.Base(checkpoint, name, device, (checkpoint,), 0) for name in verb.FORMATS}

    def of(self, kind: str, setting: str, case: Case) -> int:
        shape = case.batch, case.prompt_tokens, case.new_tokens
        candidate = self.graphs[setting] if kind == "graph" else self.bases[setting]
        return candidate.peak_bytes(*shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--device", choices=SCHEMES, default="cpu")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--shapes", default=None, help="comma-separated; default: all")
    options = parser.parse_args()
    if options.published:
        write_result("estimate_published", "python benchmarks/estimate.py --published", {"rows": beside_published()})
        return
    found: list[tuple[Row, Case, Foretold]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as text:
        for shape, tied, cases, fitted in (*RUNS, LARGE) if options.large else RUNS:
            if options.shapes is None or shape in options.shapes.split(","):
                found += list(measured_rows(Path(text), shape, tied, cases, fitted, options.device))
        if options.calibrate and options.device == "cpu":
            calibrate(found)
        rows = [replace(row, estimate_bytes=foretold.of(row.kind, row.setting, case)) for row, case, foretold in found]
    for row in rows:
        mark = "fitted" if row.fitted else "      "
        print(
            f"{row.shape:>5} {'tied' if row.tied else '    '} {row.kind:<12} {row.setting:<5} {row.case:<12} {mark} "
            f"estimate {row.estimate_bytes / 1e6:7.0f} MB  peak {row.peak_bytes / 1e6:7.0f} MB  {100 * row.error:+5.1f} %"
        )
    largest = max(abs(row.error) for row in rows)
    print(f"largest error {100 * largest:.1f} % (wanted {100 * BAR:.0f} %)")
    content = {"rows": [{**asdict(row), "error": row.error} for row in rows], "largest_error": largest, "bars_met": {"estimate": largest <= BAR}}
    name = "estimate" if options.device == "cpu" else "estimate_cuda"
    write_result(name, f"python benchmarks/estimate.py {public_arguments()}", content)


def measured_rows(work: Path, shape: str, tied: bool, cases: tuple[Case, ...], fitted: bool, device: str) -> Iterator[tuple[Row, Case, Foretold]]:
    """Make the model in every setting, one after the other, and run each case of each in a fresh process."""
    base = work / f"{shape}-{tied}"
    if not base.exists():
        write_base(base, shape, tied=tied)
    foretold = Foretold(outline(base), device)
    large = shape == LARGE[0]
    settings = [("graph", name) for name in SCHEMES[device] if not large or name in ("int8", "int4")]
    settings += [] if shape == "tiny" else [("transformers", name) for name in verb.FORMATS if not large or name == "nf4"]
    for kind, setting in settings:
        folder = made(work, base, kind, setting, device)
        for case in cases:
            row = one_run(folder, kind, Row(shape, tied, kind, setting, case.name, fitted, 0, 0, 0, 0), case, device)
            if row is not None:
                print(f"{shape:>5} {kind:<12} {setting:<5} {case.name:<12} peak {row.peak_bytes / 1e6:7.0f} MB", file=sys.stderr, flush=True)
                yield row, case, foretold
        if folder != base:
            shutil.rmtree(folder)


def made(work: Path, base: Path, kind: str, setting: str, device: str) -> Path:
    """The export or the quantized checkpoint; bf16 is the base itself."""
    folder = work / f"{kind}-{setting}"
    if kind == "graph":
        api.export(model=base, scheme=setting, output=folder, verify=False, device=device)
    elif setting == "bf16":
        return base
    else:
        api.quantize(model=base, scheme=setting, output=folder, device="cpu")
    return folder


def one_run(folder: Path, kind: str, row: Row, case: Case, device: str) -> Row | None:
    """Two generations in a fresh process: the second finds the allocator as the first left it."""
    options = {"folder" if kind == "graph" else "path": str(folder), "device": device}
    job = Workload(cases=(case,), repeats=1, warmup=1, most_warmup=1).job(case)
    engine = GRAPH if kind == "graph" else BASE
    if device == "cuda":
        return on_gpu(run_worker(gpu_job(engine, options, job), timeout_s=300), row)
    found = run_worker({"job": LATENCY, "engine": engine, "options": options, "threads": 1, "workload": job}, timeout_s=300)
    if found["status"] != "ok":
        raise SystemExit(f"{row.shape} {row.setting} {row.case}: {found['reason']}")
    memory = found["memory"]
    if not memory["peak_was_reset"]:
        print("note: this kernel does not reset peaks: what loading took is in them", file=sys.stderr)
    steady = memory["steady"]
    peak = max(memory["loaded"]["peak_bytes"], steady["peak_bytes"])
    return replace(row, peak_bytes=peak, loaded_bytes=memory["loaded"]["rss_bytes"], anonymous_bytes=steady["anon_bytes"], file_bytes=steady["file_bytes"])


def gpu_job(engine: str, options: dict, job: dict) -> dict:
    """A job that has the runtime count its own arena, taken as it is asked for."""
    return {
        "job": DEVICE_MEMORY, "engine": engine, "options": {**options, "memory": "lean"}, "threads": 1, "workload": job, "arena": Instruments().arena,
    }  # fmt: skip


def on_gpu(found: dict, row: Row) -> Row | None:
    """The arena's peak, or no row where it could not be told."""
    peak = found.get("arena", {}).get("peak_bytes")
    if found["status"] != "ok" or not peak:
        print(f"note: {row.shape} {row.setting} {row.case}: {found.get('reason') or 'the arena was not told'}", file=sys.stderr)
        return None
    return replace(row, peak_bytes=int(peak))


def beside_published() -> list[dict]:
    """The published figures of every shape beside ours: nf4, a LoRA of rank 16 on all linears, as many tokens as theirs where that is told, else 1 x 512."""
    rows = []
    for path in sorted((Path(__file__).parent / "shapes").glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as text:
            shutil.copyfile(path, Path(text) / "config.json")
            with verb.opened(outline(Path(text)), "nf4", "cuda") as base:
                for published in published_for(config):
                    found = base.of(verb.EstimateConfig(**published.asked))
                    ours = {"weights": found.weights_bytes, "running": found.running_bytes, "training": found.training_bytes}.get(published.column or "")
                    rows.append({**asdict(published), "ours_bytes": ours})
                    said = "n/a" if ours is None else f"{ours / 1e9:.2f} GB"
                    print(f"{published.model:<14} {published.about:<68} {published.nbytes / 1e9:8.2f} GB  ours {said}")
    return rows


# ---- constants ----


def calibrate(found: list[tuple[Row, Case, Foretold]]) -> None:
    """Fit the constants to the fitted rows, least squares of relative errors, and write the file that the package reads."""
    fitted = [(row, case, foretold) for row, case, foretold in found if row.fitted]
    content = {
        "graph": fit_graphs([entry for entry in fitted if entry[0].kind == "graph"]),
        "transformers": {name: fit_base([entry for entry in fitted if entry[0].kind == "transformers" and entry[0].setting == name]) for name in verb.FORMATS},
        "measured": {
            "by": "python benchmarks/estimate.py --calibrate",
            "on": machine(),
            "rows": len(fitted),
            "shapes": sorted({row.shape for row, _, _ in fitted}),
            "versions": versions("onnxruntime-gpu", "torch", "transformers", "bitsandbytes"),
        },
    }
    measured_memory.FILE.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    measured_memory.measured_memory.cache_clear()
    for _, _, foretold in found:
        for base in foretold.bases.values():
            base.__dict__.pop("measured", None)


def fit_graphs(entries: list[tuple[Row, Case, Foretold]]) -> dict[str, float]:
    """The five constants of :class:`GraphConstants`, from sessions loaded and sessions run."""
    import numpy as np
    from scipy.optimize import least_squares

    names = ("process_bytes", "node_bytes", "integer_share", "scale_copies", "plan_copies")
    scale = np.array([1e8, 1e4, 0.1, 1.0, 1.0])

    def errors(values: np.ndarray) -> list[float]:
        known = measured_memory.GraphConstants(**dict(zip(names, (values * scale).tolist(), strict=True)))
        return [
            foretold.graphs[row.setting].peak(case.batch, case.prompt_tokens, case.new_tokens, known) / row.peak_bytes - 1 for row, case, foretold in entries
        ]

    found = least_squares(errors, [0.7, 1.0, 0.5, 2.0, 2.0], bounds=(0, [5, 10, 2, 4, 4]), loss="soft_l1", f_scale=0.02)
    return {name: float(f"{value:.4g}") for name, value in zip(names, found.x * scale, strict=True)}


def fit_base(entries: list[tuple[Row, Case, Foretold]]) -> dict[str, float]:
    """The three constants of :class:`BaseConstants`."""
    import numpy as np
    from scipy.optimize import lsq_linear

    rows, peaks = [], []
    for row, case, foretold in entries:
        weights, live = foretold.bases[row.setting].live(case.batch, case.prompt_tokens, case.new_tokens)
        rows.append([1e9, weights, live])
        peaks.append(row.peak_bytes)
    by_peak = np.array(peaks)[:, None]
    found = lsq_linear(np.array(rows) / by_peak, np.ones(len(rows)), bounds=([0, 0.9, 0.9], [5, 3, 12]))
    return dict(zip(("process_bytes", "weight_copies", "live_share"), (float(f"{value:.4g}") for value in found.x * [1e9, 1, 1]), strict=True))


if __name__ == "__main__":
    main()
