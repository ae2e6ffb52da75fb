"""What calibration is worth in an exported graph: KL to the model in full precision, for the same bytes.

    python benchmarks/export_calibrated.py --model DIR --calib TEXT|STATS [--calib ...] --text FILE [--text ...] [--peers-python PATH]

Graphs: ``qlt export`` as fp32 (the reference), int4 and int8, plain and once per ``--calib``; onnxruntime-genai's builder as int4 (its default, round to
nearest) and with ``algo_config=k_quant``. All run in this process's onnxruntime. Judged on windows of 256 tokens, evenly spaced over each ``--text`` and over
the held-out part of Python's language reference; calibration texts must not overlap them. Per graph: bytes, mean KL(fp32 || graph) in nats, top-1
agreement; ratios pair windows (median, 95 % bootstrap interval). Bars: calibrated int4 at most 0.6 of the KL of both of the builder's graphs; int8 at most
0.001 and at least 98.5 %. Writes ``benchmarks/results/export_calibrated.json``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from graphs import graph_bytes, log_softmax
from measured import ratio, write_result
from peers import python_of
from tokenizers import Tokenizer

from qlora_tools import api
from qlora_tools.export.runtime import DecoderSession
from qlora_tools.quality.corpus import python_reference

BARS = {"int4_kl_share": 0.6, "int8_kl": 1e-3, "int8_top1": 0.985}
WINDOW = 256
PEERS = {"builder int4": (), "builder int4 k_quant": ("--extra_options", "algo_config=k_quant")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", action="append", required=True)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--windows", type=int, default=12, help="of each text")
    parser.add_argument("--peers-python", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        graphs = {**ours(work, options.model, options.calib), **theirs(work, options.model, python_of("genai", options.peers_python))}
        texts = {"python-reference-heldout": python_reference("heldout").text} | {path.name: path.read_text() for path in options.text}
        windows = {name: windows_of(options.model, text, options.windows) for name, text in texts.items()}
        quality = judge({name: folder for name, (folder, _) in graphs.items()}, windows)
        rows = {name: {**facts, "graph_bytes": graph_bytes(folder), **quality[name]} for name, (folder, facts) in graphs.items()}
    result = {"bars": BARS, "windows": {name: list(found.shape) for name, found in windows.items()}, "graphs": rows, "shares": shares(rows)}
    for name, row in rows.items():
        print(
            f"{name:28s} {row['graph_bytes']:>11,} bytes",
            *(f"{text[:12]}: KL {found['kl']:.6f} top-1 {found['top1']:.2%}" for text, found in row["texts"].items()),
        )
    for pair, found in result["shares"].items():
        print(pair, *(f"{text[:12]} {share['median']:.3f} {share['ci95']}" for text, share in found.items()))
    command = f"python benchmarks/export_calibrated.py --model {options.model.name} " + " ".join(f"--calib {Path(text).name}" for text in options.calib)
    print("wrote", write_result("export_calibrated", f"{command} {' '.join(f'--text {path.name}' for path in options.text)}", result))


def ours(work: Path, model: Path, calibs: list[str]) -> dict[str, tuple[Path, dict]]:
    """Statistics are taken once per calibration text, as ``qlt calibrate`` does, and serve both schemes."""
    statistics: dict[str, Path | None] = {"": None}
    for calib in calibs:
        given = calib.endswith(".safetensors")
        statistics[Path(calib).stem] = Path(calib) if given else api.calibrate(model=model, data=calib, output=work / f"{Path(calib).stem}.safetensors").output
    made = {}
    for scheme, calib in [("fp32", ""), *((scheme, calib) for scheme in ("int4", "int8") for calib in statistics)]:
        name = f"{scheme} {calib}".strip()
        done = api.export(model=model, scheme=scheme, calib=statistics[calib], verify=False, output=work / name.replace(" ", "-"))
        facts = {} if done.calibration is None else {"output_error_share": done.calibration.share, "rows": dict(done.calibration.rows)}
        made[name] = done.output, facts
    return made


def theirs(work: Path, model: Path, python: str) -> dict[str, tuple[Path, dict]]:
    made = {}
    for name, extra in PEERS.items():
        folder = work / name.replace(" ", "-")
        command = [python, "-m", "onnxruntime_genai.models.builder", "-m", model, "-o", folder, "-p", "int4", "-e", "cpu", "-c", work / "cache", *extra]
        subprocess.run(command, check=True, capture_output=True)
        made[name] = folder, {}
    return made


def windows_of(model: Path, text: str, count: int) -> np.ndarray:
    """[count, WINDOW] token ids, evenly spaced over the text."""
    ids = np.asarray(Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids, np.int64)
    whole = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return whole[np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)]


def judge(folders: dict[str, Path], windows: dict[str, np.ndarray]) -> dict[str, dict]:
    """Per graph and text: KL and top-1 agreement of every window against fp32, and their means."""
    sessions = {name: DecoderSession(folder, threads=1) for name, folder in folders.items()}
    found: dict = {name: {text: ([], []) for text in windows} for name in sessions}
    for text, rows in windows.items():
        for window in rows:
            reference = log_softmax(sessions["fp32"].score(window[None])[0])
            for name, session in sessions.items():
                scores = log_softmax(session.score(window[None])[0])
                kls, agreed = found[name][text]
                kls.append(float((np.exp(reference) * (reference - scores)).sum(-1).mean()))
                agreed.append(float((reference.argmax(-1) == scores.argmax(-1)).mean()))
    for session in sessions.values():
        session.close()
    return {
        name: {"texts": {text: {"kl": float(np.mean(kls)), "top1": float(np.mean(agreed)), "kl_windows": kls} for text, (kls, agreed) in texts.items()}}
        for name, texts in found.items()
    }


def shares(rows: dict[str, dict]) -> dict[str, dict]:
    """KL of every calibrated int4 graph over that of each plain one, window by window."""
    plain = [name for name in rows if name in ("int4", *PEERS)]
    calibrated = [name for name in rows if name.startswith("int4 ")]
    return {
        f"{name} / {other}": {text: ratio(found["kl_windows"], rows[other]["texts"][text]["kl_windows"]) for text, found in rows[name]["texts"].items()}
        for name in calibrated
        for other in plain
    }


if __name__ == "__main__":
    main()
