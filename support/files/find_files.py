"""Finds the files that a path means: one file, all files in a folder at any depth, or all that match a glob.
The ending of a file's name says what it holds: its *kind*, such as `.txt`."""

import codecs
import glob
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from support.messages import UserError, inform

USUAL_SPELLING = {
    ".ndjson": ".jsonl",
    ".yml": ".yaml",
    ".htm": ".html",
    ".tgz": ".gz",
    ".tbz2": ".bz2",
    ".txz": ".xz",
    ".zstd": ".zst",
}

ARCHIVES = (".7z", ".rar", ".tar", ".lz4")
OFFICE_FILES = (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi", ".ppt", ".pptx")
TABLES = (".xls", ".xlsx", ".ods", ".arrow", ".feather", ".orc", ".avro", ".db", ".sqlite")
MODELS = (".ckpt", ".pt", ".pth", ".safetensors", ".gguf")

IS_PACKED = "is packed, and only unpacked files are read; unpack it first"
WRITE_JSONL = 'write the column with the text as .jsonl, {{"text": "..."}} a line'
OR_NAME_IT_TXT = "or name it .txt to read it as it is"

# Kinds that are never read as text, and what is said to the user. The file's name comes before each sentence,
# and in place of `{file}`.
REFUSED_KINDS = {
    ".gz": f"{IS_PACKED}: gunzip -k {{file}}",
    ".bz2": f"{IS_PACKED}: bunzip2 -k {{file}}",
    ".xz": f"{IS_PACKED}: unxz -k {{file}}",
    ".zst": f"{IS_PACKED}: unzstd {{file}}",
    ".zip": f"{IS_PACKED}: unzip {{file}}",
    **dict.fromkeys(ARCHIVES, IS_PACKED),
    **dict.fromkeys(OFFICE_FILES, "is not plain text; save its text as .txt"),
    **dict.fromkeys((".html", ".xml"), f"holds markup; save its text as .txt, {OR_NAME_IT_TXT}"),
    **dict.fromkeys((".csv", ".tsv"), f"is a table; {WRITE_JSONL}, {OR_NAME_IT_TXT}"),
    **dict.fromkeys(TABLES, f"is a table; {WRITE_JSONL}"),
    **dict.fromkeys(
        (".npy", ".npz", ".bin"), "holds numbers, not text; token files are read with data.source=tokens"
    ),
    **dict.fromkeys(MODELS, "holds a model, not text; name a .txt or .jsonl file"),
    **dict.fromkeys(
        (".pkl", ".pickle"), "is a pickle, which can run code when opened; write its text as .txt or .jsonl"
    ),
}

KIND_OF_FIRST_BYTES = {
    b"\x1f\x8b": ".gz",
    b"PK\x03\x04": ".zip",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ": ".xz",
    b"BZh91AY&SY": ".bz2",
    b"%PDF-": ".pdf",
}


def kind_of(path: str | Path) -> str:
    """The kind of a file: its ending in the usual spelling, such as `.jsonl` for A.JSONL and a.ndjson."""
    ending = Path(path).suffix.lower()
    return USUAL_SPELLING.get(ending, ending)


# ---- which files there are -----------------------------------------------------------------------


def walk(folder: str | Path, folders_too: str | None = None) -> tuple[list[Path], Counter]:
    """(the files in a folder at any depth, in no particular order; how many were left out for each reason).

    Links to folders are followed, after all other folders. Each real folder is read only once, so that a
    circle of links comes to an end. Names that begin with a dot are left out, as in a glob. A folder whose
    name ends with `folders_too` is also listed among the files.
    """
    files: list[Path] = []
    left_out: Counter = Counter()
    seen: set[str] = set()
    folders, links = [Path(folder)], []
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        real_path = os.path.realpath(here)
        if real_path in seen:
            continue
        seen.add(real_path)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except PermissionError:
            left_out["unreadable folder"] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                left_out["hidden"] += 1
                continue
            if not entry.is_dir() or (folders_too and entry.name.endswith(folders_too)):
                files.append(Path(entry.path))
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(Path(entry.path))
    return files, left_out


def each_once(files: Iterable[Path]) -> list[Path]:
    """Each file once, sorted by name, so that a corpus is the same on every machine.

    If a file has several names (links), only the shortest is kept. Otherwise its text would be in the corpus
    twice, and what is held out for validation could be trained on as well.
    """
    found: dict[tuple[int, int], Path] = {}
    for file in sorted(set(files), key=lambda file: (file.is_symlink(), len(file.parts), file)):
        status = file.stat()
        found.setdefault((status.st_dev, status.st_ino), file)
    return sorted(found.values())


# ---- which of them are read ----------------------------------------------------------------------


def find_files(
    path: str, key: str = "data.path", kinds: tuple[str, ...] = (".txt", ".jsonl"), strict: bool = False
) -> list[Path]:
    """The files that `path` means: one file, the files of these `kinds` in a folder at any depth, or the
    files that match a glob. A line on standard error says what was left out. `key` is the config key or flag
    that holds the path, for messages.

    If a single file or a glob is named, other endings are read too, unless they are among REFUSED_KINDS or
    `strict` is set. Raises UserError if no file is left, or if the one file named is not read.
    """
    if os.path.isfile(path):
        why = why_not_read(Path(path), kinds, key, strict)
        if why:
            raise UserError(why)
        return [Path(path)]
    is_folder = os.path.isdir(path)
    if is_folder:
        there, left_out = walk(path)
    else:
        there = [Path(name) for name in glob.glob(path, recursive=True)]
        left_out = Counter()
    files: list[Path] = []
    for file in there:
        if file.is_dir():
            if "**" not in path:  # `**` matches the files in the folder too, so nothing is left out
                left_out["folder"] += 1
        elif not file.is_file():
            left_out["broken link" if file.is_symlink() else "not a file"] += 1
        elif kind_of(file) in kinds or not (is_folder or why_not_read(file, kinds, key, strict)):
            files.append(file)
        else:
            left_out[file.suffix or "without an ending"] += 1
    if not files:
        found = f" (found: {count_each(left_out)})" if left_out.total() else ""
        advice = " give a file, a folder or a quoted glob"
        if not strict:
            named = (why_not_read(file, kinds, key, strict) for file in sorted(there) if file.is_file())
            first_reason = next((why for why in named if why), None)
            advice = f"\n       {first_reason}" if first_reason else advice
        raise UserError(f"{key}={path}: no {any_of(kinds)} file there{found};{advice}")
    files = each_once(files)
    if left_out.total():
        label = key.partition(".")[0].strip("-")
        inform(
            f"{label}: {len(files):,} file{'s' * (len(files) > 1)} read from {path}, "
            f"{left_out.total():,} left out ({count_each(left_out)})"
        )
    return files


def why_not_read(file: Path, kinds: tuple[str, ...], key: str, strict: bool) -> str | None:
    """The reason why a file that the user named is not read, and what to do; None if it is read."""
    kind = kind_of(file)
    refused = REFUSED_KINDS.get(kind)
    if kind in kinds:
        return None
    if strict and not (refused and refused.startswith(IS_PACKED)):
        return (
            f"{key}={file}: {any_of(kinds)} files are read here, and this is not one by its name; save it as "
            "one of them"
        )
    if kind in (".parquet", ".json"):
        if key.startswith("data."):
            return (
                f"{file} is read with --override data.source=hf --override data.dataset={kind[1:]}; "
                "prepare.py reads .jsonl"
            )
        return f'{key} {file}: write it as .jsonl, {{"text": "..."}} a line'
    return f"{file} {refused.format(file=file)}" if refused else None


def refuse_disguised(file: Path, first_bytes: bytes) -> None:
    """Raise UserError if the first bytes of a file show that it is not text, whatever its name says."""
    if first_bytes.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(
            f"{file} is UTF-16 text, as some Windows programs save it; convert it: iconv -f UTF-16 -t UTF-8 "
            f"{file} > utf8.txt"
        )
    for magic, kind in KIND_OF_FIRST_BYTES.items():
        if first_bytes.startswith(magic):
            what = REFUSED_KINDS[kind].format(file=file)
            raise UserError(f"{file} {what} (by its first bytes it is a {kind} file)")


# ---- lists in words ------------------------------------------------------------------------------


def any_of(kinds: tuple[str, ...]) -> str:
    """A list in words: `.txt, .jsonl or .parquet`."""
    *others, last = kinds
    return f"{', '.join(others)} or {last}" if others else last


def count_each(left_out: Counter) -> str:
    """Counts in words, the most frequent first: `3 .pdf, 2 broken links, 1 hidden`."""
    words = []
    for reason, n in sorted(left_out.items(), key=lambda item: (-item[1], item[0])):
        plural = "s" if n > 1 and reason.endswith(("folder", "link")) else ""
        words.append(f"{n:,} {reason}{plural}")
    return ", ".join(words)
