"""The other tools, each in an environment of its own under ``benchmarks/.peers``: their pins do not agree with each other or with ours.

A script that is not given a peer's Python asks :func:`python_of`, which makes the environment on first use, and :func:`js_of` for transformers.js. Versions
are pinned: a result names the release it was taken against.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parent / ".peers"
PACKAGES = {
    "mergekit": ("torch==2.13.0", "mergekit==0.1.5"),
    # the builder needs onnx-ir, and its package does not say so
    "genai": (
        "torch==2.13.0",
        "transformers==5.23.0",
        "onnxruntime==1.31.1",
        "onnxruntime-genai==0.18.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "peft==0.21.2",
    ),
    "optimum": ("torch==2.13.0", "onnxruntime==1.31.1", "optimum-onnx==0.1.0"),  # brings transformers 4.57 and optimum 2.1 along
    # the last builder that has the module Olive's ModelBuilder pass asks for; its telemetry asks for requests, Gptq for datasets
    "olive": (
        "torch==2.13.0",
        "transformers==5.23.0",
        "onnxruntime==1.31.1",
        "onnxruntime-genai==0.14.1",
        "olive-ai==0.13.0",
        "peft==0.21.2",
        "requests==2.34.2",
        "datasets==5.2.0",
    ),
}
#: What each environment is there for: it counts as made once this runs in it.
CHECKS = {
    "mergekit": "import mergekit.scripts.extract_lora",
    "genai": "import onnxruntime_genai.models.builder, peft",
    "optimum": "import optimum.exporters.onnx, optimum.onnxruntime",
    "olive": "import olive.cli.launcher, onnxruntime_genai.models.builder, peft",
}
JS_PACKAGES = ("@huggingface/transformers@4.3.1",)
JS_CHECK = 'await import("@huggingface/transformers")'


def python_of(peer: str, given: Path | None = None) -> str:
    """The Python of ``peer``'s environment: ``given``, or one that is made now if it is not there yet, was left half made, or holds other versions."""
    if given is not None:
        return str(given)
    folder = ROOT / peer
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(PACKAGES[peer])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"installing {peer} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[peer]], check=True)
        subprocess.run([python, "-c", CHECKS[peer]], check=True, stdout=subprocess.DEVNULL)
        stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def js_of(given: Path | None = None) -> Path | None:
    """A folder with transformers.js in its ``node_modules``: ``given``, or one that is made now; ``None`` where there is no Node."""
    if given is not None or shutil.which("node") is None or shutil.which("npm") is None:
        return given
    folder = ROOT / "js"
    stamp, wanted = folder / "installed.txt", "\n".join(JS_PACKAGES)
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"installing transformers.js into {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        # onnxruntime-node's install script fetches CUDA libraries; the CPU's come with the package
        subprocess.run(["npm", "install", "--ignore-scripts", "--silent", "--no-audit", "--no-fund", "--prefix", folder, *JS_PACKAGES], check=True)
        subprocess.run(["node", "--input-type=module", "-e", JS_CHECK], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        stamp.write_text(wanted, encoding="utf-8")
    return folder


def versions_of(python: str, *packages: str) -> dict[str, str]:
    """Versions of ``packages`` in another environment."""
    code = "import json, sys; from importlib.metadata import version; print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout)
    return found
