"""Output folders appear whole or not at all.

Everything is built in a hidden sibling on the same file system, every file and folder is synced, and one
rename is the commit. An exception or Ctrl-C removes the sibling; a killed process leaves only the sibling,
whose name says what it is. ``--force`` replaces only what this package made, by exchanging the two folders.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qlora_tools import manifest as manifests
from qlora_tools.errors import OutputExistsError, StorageError, UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def output_folder(dest: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a hidden folder to fill; on leaving the block without an exception it becomes ``dest``.

    Raises:
        OutputExistsError: ``dest`` is there and may not be replaced. UsageError: ``dest`` is, holds or lies in an
        input. StorageError: not writable, or the disk is full.
    """
    check_output(dest, force=force, inputs=inputs)
    dest = Path(os.path.abspath(dest))  # noqa: PTH100 (resolve() would follow a link that is to be replaced)
    partial = dest.parent / f".{dest.name}.{secrets.token_hex(4)}.partial"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise StorageError(f"{dest} cannot be made: {error.strerror}", hint="choose a folder you may write to with -o") from error
    try:
        with explained_disk_errors(dest):
            yield partial
            _sync_tree(partial)
            _commit(partial, dest, force)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_output(dest: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that must not be written, before any work is done; see :func:`output_folder`."""
    real = dest.resolve()
    for path in (path.resolve() for path in inputs):
        if real == path or real.is_relative_to(path) or path.is_relative_to(real):
            raise UsageError(f"the output {dest} overlaps the input {path}", hint="choose another folder with -o")
    if not os.path.lexists(dest) or _is_empty_folder(dest):
        return
    if not force:
        raise OutputExistsError(f"{dest} is already there", hint="choose another folder with -o, or replace it with --force")
    if not (dest / manifests.FILE_NAME).is_file():
        raise OutputExistsError(f"{dest} was not made by qlt, so --force does not replace it", hint="remove it yourself, or choose another folder with -o")


def seal(folder: Path, manifest: manifests.Manifest) -> manifests.Manifest:
    """Write the manifest, with the hash of every other file, as the last file of ``folder``. Returns what was written."""
    own = folder / manifests.FILE_NAME
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path != own)
    with ThreadPoolExecutor(1) as disk:  # what has reached the disk by the time the hash is known need not be waited for later
        synced = [disk.submit(sync, path) for path in paths]
        files = {path.relative_to(folder).as_posix(): {"sha256": manifests.sha256_file(path), "bytes": path.stat().st_size} for path in paths}
        for waiting in synced:
            waiting.result()
    sealed = replace(manifest, files=files)
    replace_file(own, sealed.to_json())
    return sealed


@contextmanager
def explained_disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's own errors inside the block into a :class:`StorageError` about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, StorageError | OutputExistsError) or hasattr(error, "exit_code"):
            raise
        hint = (
            "free some space or choose another disk with -o"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "check the disk and its permissions"
        )
        raise StorageError(f"writing {path} failed: {error.strerror}", hint=hint) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, sync it, and put it in its place: a reader finds the old file or the new one, whole.

    Raises:
        StorageError: the disk refused.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with explained_disk_errors(path):
        try:
            beside.write_bytes(content)
            sync(beside)
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _commit(partial: Path, dest: Path, force: bool) -> None:
    try:
        partial.rename(dest)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not force:
            raise OutputExistsError(f"{dest} was made by someone else meanwhile", hint="run again with another -o") from error
        _replace(partial, dest)
    sync(dest.parent)


def _replace(partial: Path, dest: Path) -> None:
    """Put ``partial`` in the place of ``dest`` and delete what was there; at no moment is ``dest`` missing where the kernel can exchange."""
    old = partial.with_suffix(".old")
    if _exchange(partial, dest):
        partial.rename(old)
    else:
        try:
            dest.rename(old)
            partial.rename(dest)
        except BaseException:
            if not os.path.lexists(dest):  # else its content would be left under a hidden name
                old.rename(dest)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    return rename is not None and rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            if not (path := Path(root, name)).is_symlink():  # what a link points to is not ours, or not there
                sync(path)
        sync(Path(root))
