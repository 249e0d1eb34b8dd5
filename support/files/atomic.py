"""Writes files *atomically*, that is, whole or not at all, and keeps two runs from writing to one folder."""

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
    """`with atomic_write(path) as file: ...` writes a temporary file and renames it to `path` at the end. If
    anything goes wrong before, `path` stays as it was."""
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
    """Make sure that renames in `folder` survive a power cut, if the system can do that."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source` (a hard link), or a copy if the file system has no
    hard links. Like `atomic_write`, it replaces `target` in one go."""
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
        temporary.unlink(missing_ok=True)  # if `target` was the same file already, os.replace leaves it there


def temporary_folder() -> Path:
    """A new folder for temporary files. Who may read it is decided by the umask (the user's default for new
    files), as for any other folder; a folder made by `tempfile` would be closed to all but its owner."""
    folder = Path(tempfile.gettempdir()) / f"tiny-transformer-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def claim_folder(folder: Path, flag: str = "--override checkpoint.dir="):
    """Make the folder and lock it for this process. Returns the lock. Keep it: the folder is unlocked when
    nothing refers to it any more. If the file system has no locks, that is only a warning.

    Raises UserError if another run has locked the folder, or if it cannot be written; `flag` is how the user
    can name another folder.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, flag)
    except OSError as error:
        with contextlib.suppress(OSError):  # remove what this call has made
            if made:
                (folder / ".lock").unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); name another folder with {flag}PATH"
        ) from None
    for leftover in folder.glob("*.tmp-*"):  # from a run that was killed while it was writing
        leftover.unlink()
    return lock


def _lock(folder: Path, flag: str):
    """Lock this folder; returns the lock. If locks fail here, it is not held, and a warning says so. Raises
    OSError if nothing can be written to the folder."""
    import filelock

    lock = filelock.FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another run is writing to {folder}; wait for it, or write elsewhere with {flag}{folder}-2"
        ) from None
    except OSError as error:
        open(folder / ".lock", "ab").close()  # raises OSError if not only locks, but also writing fails
        warn(
            f"{folder} cannot be locked ({error.strerror}): its file system has no locks, so do not start a "
            "second run there"
        )
    return lock


def why_no_lock(folder: Path) -> str | None:
    """The reason why files in this folder cannot be locked; None if they can be. Leaves no file behind."""
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
