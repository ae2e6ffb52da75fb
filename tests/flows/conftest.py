"""Run ``qlt`` in this process, in an empty working folder, as a user would type it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_tools.cli import main as cli

#: The files of a decoder's export.
EXPORT = {
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "model.onnx",
    "model.onnx.data",
    "qlt-manifest.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, made current."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def qlt(here, capfd):
    """``qlt("quantize", model, "--nf4")`` -> exit code and output."""

    def call(*words) -> Done:
        capfd.readouterr()
        arguments = [str(word) for word in words]
        try:
            code = cli.run(arguments)
        except BaseException as error:
            code = cli.report(error, as_json="--json" in arguments)
            if code == 70:
                raise
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return call


def files(folder: Path) -> set[str]:
    """Relative paths of everything below ``folder`` but the session's own memory."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and ".qlt" not in path.parts}
