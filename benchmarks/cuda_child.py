"""The part of ``cuda.py`` that opens the device: makes a group's models, or checks every scheme on a small one.

One job per process, given as JSON, answered in the file it names.

A model that cannot be made becomes a reason beside its name; the others are made all the same.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import SHAPES, write_base, write_tokenizer


def main(argument: str) -> None:
    job = json.loads(argument)
    found = {"make": make, "checks": check}[job["do"]](job)
    Path(job["answer"]).write_text(json.dumps(found), encoding="utf-8")


def make(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Setting -> its folder and the seconds it took, or why it could not be made."""
    base, folder, device = Path(job["base"]), Path(job["folder"]), job["device"]
    if not base.exists():
        write_model(base, job["shape"], device)
    folder.mkdir()
    found = {f"torch {job['theirs']}": timed(base, lambda: of_torch(base, folder, job["theirs"], device))}
    for scheme in job["ours"]:
        # NF4 graphs carry the very codes that torch runs
        source = folder / "bitsandbytes-nf4" if scheme == "nf4" and (folder / "bitsandbytes-nf4").exists() else base
        found[scheme] = timed(folder / scheme, lambda source=source, scheme=scheme: graph(source, folder / scheme, scheme, device, verify=False))
    return found


def timed(folder: Path, action: Callable[[], Path]) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        return {"folder": str(action()), "seconds": time.perf_counter() - began}
    except Exception as error:  # noqa: BLE001 - one model's failure must not lose the others
        return {"folder": str(folder), "failed": f"{type(error).__name__}: {str(error)[:300]}"}


def write_model(dest: Path, shape: str, device: str) -> None:
    write_base(dest, shape, device=device)
    write_tokenizer(dest, SHAPES[shape]["vocab_size"])


def of_torch(base: Path, folder: Path, scheme: str, device: str) -> Path:
    if scheme == "bf16":
        return base
    from qlora_tools import api

    return api.quantize(model=base, scheme=scheme, device=device, output=folder / f"bitsandbytes-{scheme}").output


def graph(source: Path, dest: Path, scheme: str, device: str, *, verify: bool) -> Path:
    from qlora_tools import api

    return api.export(model=source, scheme=scheme, device=device, verify=verify, output=dest).output


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Every scheme of a small model, exported with the exporter's own check on; bytes per second of a copy."""
    work, device = Path(job["work"]), job["device"]
    write_model(work / "model", job["shape"], device)
    rows = {scheme: timed(work / scheme, lambda scheme=scheme: graph(work / "model", work / scheme, scheme, device, verify=True)) for scheme in job["schemes"]}
    for row in rows.values():
        row.pop("folder")
    return {"schemes": rows, "shape": job["shape"], "copy_bytes_per_s": copy_speed(device)}


def copy_speed(device: str) -> float:
    """Bytes read and written per second by a large copy: no step of decoding can be faster than its weights over half of this."""
    import torch

    source = torch.randint(0, 255, ((1 << 30) if device == "cuda" else (1 << 24),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() / median(seconds[2:])


if __name__ == "__main__":
    main(sys.argv[1])
