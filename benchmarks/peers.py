"""The other tools, each in an environment of its own under ``benchmarks/.peers``: their pins do not agree with each other or with ours.

A script that is not given a peer's Python asks :func:`python_of`, which makes the environment on first use. Versions are pinned: a result names the release
it was taken against.
"""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parent / ".peers"
PACKAGES = {
    "mergekit": ("torch==2.13.0", "mergekit==0.1.5"),
    "genai": ("torch==2.13.0", "transformers==5.23.0", "onnxruntime==1.31.1", "onnxruntime-genai==0.18.0", "peft==0.21.2"),
    "optimum": ("torch==2.13.0", "onnxruntime==1.31.1", "optimum-onnx==0.1.0"),  # brings transformers 4.57 and optimum 2.1 along
}


def python_of(peer: str, given: Path | None = None) -> str:
    """The Python of ``peer``'s environment: ``given``, or one that is made now if it is not there yet."""
    if given is not None:
        return str(given)
    python = ROOT / peer / "bin" / "python"
    if not python.exists():
        print(f"installing {peer} into {python.parents[1]}", flush=True)
        venv.create(ROOT / peer, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[peer]], check=True)
    return str(python)


def versions_of(python: str, *packages: str) -> dict[str, str]:
    """Versions of ``packages`` in another environment."""
    code = "import json, sys; from importlib.metadata import version; print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout)
    return found
