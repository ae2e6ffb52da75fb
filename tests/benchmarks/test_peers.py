"""The other tools' environments: pinned, made once, never where one is given."""

from __future__ import annotations

import subprocess
from pathlib import Path

import peers
import pytest


@pytest.mark.parametrize("peer", peers.PACKAGES)
def test_every_package_is_pinned(peer):
    assert all("==" in package for package in peers.PACKAGES[peer])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """What pip and npm were asked for; an environment is an empty folder, in which everything runs."""
    found = []

    def run(command, check, **options):
        if "install" in command:  # the others try what was installed
            found.append(command[5:] if "pip" in command else command[-len(peers.JS_PACKAGES) :])

    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers.venv, "create", lambda folder, with_pip: folder.mkdir(exist_ok=True))
    monkeypatch.setattr(peers.subprocess, "run", run)
    return found


def test_an_environment_is_made_on_first_use_alone(installed, tmp_path):
    assert peers.python_of("olive") == peers.python_of("olive") == str(tmp_path / "olive/bin/python")
    assert installed == [list(peers.PACKAGES["olive"])]
    assert peers.python_of("genai", Path("given")) == "given" and len(installed) == 1


def test_one_that_was_left_half_made_is_finished(installed, monkeypatch):
    def breaks_off(command, check, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(peers.subprocess, "run", breaks_off)
        peers.python_of("olive")
    peers.python_of("olive")
    monkeypatch.setitem(peers.PACKAGES, "olive", ("olive-ai==9",))
    peers.python_of("olive")
    assert installed[-1] == ["olive-ai==9"] and len(installed) == 2


def test_an_environment_that_does_not_run_what_it_is_for_is_not_made(installed, monkeypatch, tmp_path):
    """A package may forget what it needs."""
    assert peers.CHECKS.keys() == peers.PACKAGES.keys()
    real = peers.subprocess.run

    def lacks(command, check, **options):
        if "-c" in command:
            raise subprocess.CalledProcessError(1, command)
        real(command, check)

    with monkeypatch.context() as patched, pytest.raises(subprocess.CalledProcessError):
        patched.setattr(peers.subprocess, "run", lacks)
        peers.python_of("genai")
    assert not (tmp_path / "genai/installed.txt").exists()
    peers.python_of("genai")
    assert len(installed) == 2 and (tmp_path / "genai/installed.txt").exists()


def test_transformers_js_is_installed_once_where_there_is_node(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(peers.shutil, "which", lambda name: f"/bin/{name}")
    assert peers.js_of() == peers.js_of() == tmp_path / "js" and installed == [list(peers.JS_PACKAGES)]
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    assert peers.js_of() is None and peers.js_of(Path("given")) == Path("given")
