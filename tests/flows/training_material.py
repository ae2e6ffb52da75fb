"""Small data and models for training flows, and what is compared between runs."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_tools.training.metrics import TIMED_FIELDS

PROMPTS = 20


def write_pairs(path: Path, count: int = PROMPTS, shift: int = 0) -> Path:
    """Prompts with completions of 1 to 9 letters, so that rows have different numbers of targets."""
    rows = ({"prompt": f"say {number}: ", "completion": "abcd"[(number + shift) % 4] * (1 + number % 9)} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def untimed(path: Path) -> list[dict]:
    """The lines of a metrics file without what the clock and the allocator did."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED_FIELDS} for line in lines]


def adapter_bytes(folder: Path) -> tuple[bytes, bytes]:
    """Both PEFT files."""
    return (folder / "adapter_model.safetensors").read_bytes(), (folder / "adapter_config.json").read_bytes()


def manifest(folder: Path) -> dict:
    """What the run says about itself, without the hash of the metrics, whose times differ, and of the picture."""
    content = json.loads((folder / "qlt-manifest.json").read_text())
    for name in ("metrics.jsonl", "loss.png"):
        content["files"].pop(name)
    return content
