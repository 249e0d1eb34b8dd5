"""Files on disk: written whole or not at all, and a folder by one process at a time."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from support.cli import UserError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` at the end: complete, or as it was before if anything goes wrong."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` be another name of `source`'s content (a hard link; a copy where links fail), atomically."""
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)  # rename leaves it where both names already were one file


def temporary_folder() -> Path:
    """A new folder where temporary files go, as open to others as the umask says (tempfile's would be for its owner alone)."""
    folder = Path(tempfile.gettempdir()) / f"tiny-transformer-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def claim_folder(folder: Path, flag: str = "--override checkpoint.dir="):
    """Make the folder and hold it for this process; returns the lock to keep. Raises UserError if another run holds it; `flag` is
    the one that names another folder."""
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another run is writing to {folder}; wait for it, or write elsewhere by {flag}{folder}-2") from None
    for leftover in folder.glob("*.tmp-*"):  # of a run that was killed while it wrote
        leftover.unlink()
    return lock
