"""Files on disk: written whole or not at all, and a folder by one process at a time."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from support.messages import UserError, warn


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` at the end. If anything goes wrong, `path` stays as it was."""
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
    """Make `target` another name of `source`: a hard link, or a copy where links fail. Atomic, as above."""
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
        temporary.unlink(missing_ok=True)  # a rename leaves it if both names were one file already


def temporary_folder() -> Path:
    """A new folder for temporary files, as open to others as the umask says; one made by `tempfile` would be
    for its owner alone."""
    folder = Path(tempfile.gettempdir()) / f"tiny-transformer-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def claim_folder(folder: Path, flag: str = "--override checkpoint.dir="):
    """Make the folder and lock it for this process; returns the lock, which must be kept. Where the file
    system has no locks, a warning says so.

    Raises UserError if another run holds the folder, or if it cannot be written; `flag` is how the user names
    another folder.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, flag)
    except OSError as error:
        with contextlib.suppress(OSError):
            if made:
                (folder / ".lock").unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); name another folder with {flag}PATH"
        ) from None
    for leftover in folder.glob("*.tmp-*"):  # of a run that was killed while it wrote
        leftover.unlink()
    return lock


def _lock(folder: Path, flag: str):
    """The lock on this folder, held, or with a warning not held where locks fail. Raises OSError if nothing
    can be written to the folder."""
    import filelock

    lock = filelock.FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another run is writing to {folder}; wait for it, or write elsewhere with {flag}{folder}-2"
        ) from None
    except OSError as error:
        open(folder / ".lock", "ab").close()  # if the folder were at fault, this would fail too
        warn(
            f"{folder} cannot be locked ({error.strerror}): its file system has no locks, so do not start a "
            "second run there"
        )
    return lock


def why_no_lock(folder: Path) -> str | None:
    """Why files in this folder cannot be locked; None if they can be. Leaves no file."""
    try:
        import fcntl
    except ImportError:  # Windows, where every file system has locks
        return None
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror
    return None
