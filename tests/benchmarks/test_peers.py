"""The other tools' environments: pinned, made once, never where one is given."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest


@pytest.mark.parametrize("peer", peers.PACKAGES)
def test_every_package_is_pinned(peer):
    assert all("==" in package for package in peers.PACKAGES[peer])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """What pip was asked for; an environment is an empty folder."""
    found = []
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers.venv, "create", lambda folder, with_pip: folder.mkdir(exist_ok=True))
    monkeypatch.setattr(peers.subprocess, "run", lambda command, check: found.append(command[5:]))
    return found


def test_an_environment_is_made_on_first_use_alone(installed, tmp_path):
    assert peers.python_of("olive") == peers.python_of("olive") == str(tmp_path / "olive/bin/python")
    assert installed == [list(peers.PACKAGES["olive"])]
    assert peers.python_of("genai", Path("given")) == "given" and len(installed) == 1


def test_one_that_was_left_half_made_is_finished(installed, monkeypatch):
    def breaks_off(command, check):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(peers.subprocess, "run", breaks_off)
        peers.python_of("olive")
    peers.python_of("olive")
    monkeypatch.setitem(peers.PACKAGES, "olive", ("olive-ai==9",))
    peers.python_of("olive")
    assert installed[-1] == ["olive-ai==9"] and len(installed) == 2
