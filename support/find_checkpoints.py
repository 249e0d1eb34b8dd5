"""Finds checkpoints: the newest one of a run, or all that the files, folders and globs on a command line
name.

A run writes step files, such as step-0000500.ckpt. `last.ckpt`, `best.ckpt` and `final.ckpt` are further
names of step files: hard links (two names of one file), or copies if the file system has no links.
"""

import glob
import os
import zipfile
from collections import defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path

from support.checkpoint import read_metadata
from support.files.find_files import count_each, kind_of, walk
from support.foreign.model_files import what_is
from support.messages import UserError, printable, warn

FURTHER_NAMES = ("last", "best", "final")

# ---- the checkpoints of one run ------------------------------------------------------------------


def step_of(path: Path) -> int:
    """The step in the name of a step file: 500 for step-0000500.ckpt."""
    return int(path.stem.removeprefix("step-"))


def step_files(folder: str | Path) -> list[Path]:
    """The step files in the folder of a run, oldest first."""
    files = [file for file in Path(folder).glob("step-*.ckpt") if file.stem.removeprefix("step-").isdecimal()]
    return sorted(files, key=step_of)


def find_latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest readable checkpoint of a run; None if there is none. Damaged files are skipped with a
    warning."""
    named = [Path(folder) / f"{name}.ckpt" for name in ("last", "final", "best")]
    newest_first = step_files(folder)[::-1] + [file for file in named if file.exists()]
    for path in newest_first:
        try:
            read_metadata(path)
        except UserError as error:
            warn(f"{printable(error)}; skipped")
            continue
        return path
    return None


def other_names(path: Path) -> list[str]:
    """The names, without `.ckpt`, of other checkpoints in the same folder that are this very file or a copy
    of it."""
    if not path.is_file():
        return []
    size, content = path.stat().st_size, _content(path)
    same = []
    for file in path.parent.glob("*.ckpt"):
        if file.name == path.name or not file.is_file() or file.stat().st_size != size:
            continue
        if file.samefile(path) or (content and content == _content(file)):
            same.append(file.stem)
    places = {name: place for place, name in enumerate(FURTHER_NAMES)}
    return sorted(same, key=lambda name: (places.get(name, len(places)), name))


# ---- the checkpoints that a command line names ---------------------------------------------------


def find_checkpoints(paths: list[str]) -> list[Path]:
    """All checkpoints that these files, folders (at any depth) and globs name. Each is listed once: a step
    file stands for its further names and for copies in the same folder. Raises UserError if there is no
    checkpoint at a path."""
    names_of_file: dict[Hashable, list[Path]] = defaultdict(list)
    for path in paths:
        for file in _checkpoints_at(path):
            names_of_file[_identity(file)].append(file)
    return _each_content_once(min(names, key=_step_files_first) for names in names_of_file.values())


def _checkpoints_at(path: str) -> list[Path]:
    """The checkpoints that one path names. Raises UserError if there is none.

    A link to nothing, and a folder with a name that ends in .ckpt (a sharded checkpoint, for example), are
    listed too, so that the user hears about them when they cannot be read.
    """
    left_out_note = ""
    if os.path.isdir(path):
        files, left_out = walk(path, folders_too=".ckpt")
        found = [file for file in files if kind_of(file) == ".ckpt"]
        if left_out:
            left_out_note = f" ({count_each(left_out)} left out)"
        if not found and (foreign := what_is(Path(path))):
            raise UserError(f"{path} is {foreign}")
    else:
        found = [file for file in map(Path, [*glob.glob(path, recursive=True), path]) if file.is_file()]
    if not found:
        raise UserError(
            f"{path}: no checkpoint (.ckpt) there{left_out_note}; python3 train.py --config "
            "config_smoke.yaml makes some"
        )
    return found


def _identity(file: Path) -> Hashable:
    """A value that is equal for two names of the same file."""
    if not file.exists():  # a link to nothing
        return file
    status = file.stat()
    return status.st_dev, status.st_ino


def _each_content_once(files: Iterable[Path]) -> list[Path]:
    """One file for each content. When a run's folder is copied, its hard links may become separate files with
    the same content."""
    by_size: dict[Hashable, list[Path]] = defaultdict(list)
    for file in files:
        by_size[file.parent, file.stat().st_size if file.exists() else file].append(file)
    kept: dict[Hashable, Path] = {}
    for (folder, _), alike in by_size.items():
        for file in sorted(alike, key=_step_files_first):
            content = _content(file) if len(alike) > 1 else None
            kept.setdefault((folder, content) if content else file, file)
    return sorted(kept.values())


def _step_files_first(file: Path) -> tuple[bool, int, Path]:
    """The key to sort the names of one checkpoint by: step files first, then short paths."""
    return not file.name.startswith("step-"), len(file.parts), file


def _content(path: Path) -> tuple | None:
    """A value that is equal for checkpoints with the same content; None for a damaged file. It holds name,
    size and checksum of each part of the archive. These are in the archive's table, so no weight is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            return tuple((part.filename.partition("/")[2], part.file_size, part.CRC) for part in parts)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None
