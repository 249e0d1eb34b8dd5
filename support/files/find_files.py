"""Which files a path means: itself, those in a folder at any depth, or those of a glob. What a file holds
is said by its ending."""

import codecs
import glob
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from support.messages import UserError, inform

ALIASES = {
    ".ndjson": ".jsonl",
    ".yml": ".yaml",
    ".htm": ".html",
    ".tgz": ".gz",
    ".tbz2": ".bz2",
    ".txz": ".xz",
    ".zstd": ".zst",
}

PACKED, DOCUMENT, TABLE = (
    "is packed, and only unpacked files are read; {}",
    "is not plain text; save its text as .txt",
    "is a table; {}",
)
AS_IT_IS = "or name it .txt to read it as it is"
COLUMN = 'write the column with the text as .jsonl, {{"text": "..."}} a line'
OTHER_KINDS = {  # what is said of a file that is not read as text, whatever its name was meant to say
    ".gz": PACKED.format("unpack it first: gunzip -k {file}"),
    ".bz2": PACKED.format("unpack it first: bunzip2 -k {file}"),
    ".xz": PACKED.format("unpack it first: unxz -k {file}"),
    ".zst": PACKED.format("unpack it first: unzstd {file}"),
    ".zip": PACKED.format("unpack it first: unzip {file}"),
    **dict.fromkeys((".7z", ".rar", ".tar", ".lz4"), PACKED.format("unpack it first")),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi", ".ppt", ".pptx"), DOCUMENT),
    **dict.fromkeys((".html", ".xml"), f"holds markup; save its text as .txt, {AS_IT_IS}"),
    **dict.fromkeys((".csv", ".tsv"), TABLE.format(f"{COLUMN}, {AS_IT_IS}")),
    **dict.fromkeys(
        (".xls", ".xlsx", ".ods", ".arrow", ".feather", ".orc", ".avro", ".db", ".sqlite"),
        TABLE.format(COLUMN),
    ),
    **dict.fromkeys(
        (".npy", ".npz", ".bin"), "holds numbers, not text; token files are read with data.source=tokens"
    ),
    **dict.fromkeys(
        (".ckpt", ".pt", ".pth", ".safetensors", ".gguf"),
        "holds a model, not text; name a .txt or .jsonl file",
    ),
    **dict.fromkeys(
        (".pkl", ".pickle"), "is a pickle, which can run code when opened; write its text as .txt or .jsonl"
    ),
}

FIRST_BYTES = {
    b"\x1f\x8b": ".gz",
    b"PK\x03\x04": ".zip",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ": ".xz",
    b"BZh91AY&SY": ".bz2",
    b"%PDF-": ".pdf",
}


def kind_of(path: str | Path) -> str:
    """The ending that says what a file holds, in its usual spelling: `.jsonl` for A.JSONL and for a.ndjson."""
    suffix = Path(path).suffix.lower()
    return ALIASES.get(suffix, suffix)


def walk(folder: str | Path, folders_too: str | None = None) -> tuple[list[Path], Counter]:
    """(the files below a folder, in no order; what is left out, counted by reason). Links to folders are
    followed, each real folder once, so that a circle ends; real folders come first. Names that begin with
    a dot are left out, as by a glob. A folder with the ending `folders_too` is listed among the files."""
    files, left_out, seen, todo = [], Counter(), set(), [Path(folder)]
    links: list[Path] = []
    while todo or links:
        here = todo.pop() if todo else links.pop(0)
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except PermissionError:
            left_out["unreadable folder"] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif entry.is_dir():
                (links if entry.is_symlink() else todo).append(Path(entry.path))
                if folders_too and entry.name.endswith(folders_too):
                    files.append(Path(entry.path))
            else:
                files.append(Path(entry.path))
    return files, left_out


def each_once(files: Iterable[Path]) -> list[Path]:
    """In the order of their names, so that a corpus is the same on every machine; of several names of one
    file (links) the shortest, or its text would be read twice, and what is held out for validation would
    be trained on too."""
    found: dict[tuple[int, int], Path] = {}
    for file in sorted(set(files), key=lambda file: (file.is_symlink(), len(file.parts), file)):
        status = file.stat()
        found.setdefault((status.st_dev, status.st_ino), file)
    return sorted(found.values())


def counted(left_out: Counter) -> str:
    """`3 .pdf, 1 hidden`."""
    most_first = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(
        f"{n:,} {reason}{'s' * (n > 1 and reason.endswith(('folder', 'link')))}" for reason, n in most_first
    )


def refusal(file: Path, kinds: tuple[str, ...], key: str, strict: bool) -> str | None:
    """Why a file that is named is not read, and what to do; None for one that is."""
    kind = kind_of(file)
    if kind in kinds:
        return None
    if strict and "is packed" not in OTHER_KINDS.get(kind, ""):
        return (
            f"{key}={file}: {listed(kinds)} files are read here, and this is none by its name; save it as "
            "one of them"
        )
    if kind in (".parquet", ".json") and key.startswith("data."):
        return (
            f"{file} is read by --override data.source=hf --override data.dataset={kind[1:]}; prepare.py "
            "reads .jsonl"
        )
    if kind in (".parquet", ".json"):
        return f'{key} {file}: write it as .jsonl, {{"text": "..."}} a line'
    return f"{file} {OTHER_KINDS[kind].format(file=file)}" if kind in OTHER_KINDS else None


def refuse_disguised(file: Path, begins: bytes) -> None:
    """Raise UserError for a file whose first bytes are those of a kind that is not read, whatever its name
    says."""
    if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(
            f"{file} is UTF-16 text, as some programs of Windows save it; convert it: iconv -f UTF-16 -t "
            f"UTF-8 {file} > utf8.txt"
        )
    kind = next((kind for magic, kind in FIRST_BYTES.items() if begins.startswith(magic)), None)
    if kind:
        raise UserError(
            f"{file} {OTHER_KINDS[kind].format(file=file)} (by its first bytes it is a {kind} file)"
        )


def find_files(
    path: str, key: str = "data.path", kinds: tuple[str, ...] = (".txt", ".jsonl"), strict: bool = False
) -> list[Path]:
    """The files a path means: itself, those in a folder (at any depth) that are of these kinds, or those
    of a glob. `strict`: a file that is named must be of these kinds too; otherwise one of an unknown
    ending is read. One line says what was left out. Raises UserError for none, and for a file that is
    named and not read."""
    if os.path.isfile(path):
        if why := refusal(Path(path), kinds, key, strict):
            raise UserError(why)
        return [Path(path)]
    folder = os.path.isdir(path)
    there, left_out = walk(path) if folder else (list(map(Path, glob.glob(path, recursive=True))), Counter())
    files: list[Path] = []
    for file in there:
        kind = kind_of(file)
        if file.is_dir():
            left_out["folder"] += "**" not in path  # whose files are there by their own names
        elif not file.is_file():
            left_out["broken link" if file.is_symlink() else "not a file"] += 1
        elif kind in kinds or not (folder or refusal(file, kinds, key, strict)):
            files.append(file)
        else:
            left_out[file.suffix or "without an ending"] += 1
    if not files:
        found = f" (found: {counted(left_out)})" if left_out.total() else ""
        why_not = (
            refusal(file, kinds, key, False) for file in sorted(there) if file.is_file() and not strict
        )
        advice = next(
            (f"\n       {why}" for why in why_not if why), " give a file, a folder or a quoted glob"
        )
        raise UserError(f"{key}={path}: no {listed(kinds)} file there{found};{advice}")
    files = each_once(files)
    if n := left_out.total():
        label = key.partition(".")[0].strip("-")
        inform(
            f"{label}: {len(files):,} file{'s' * (len(files) > 1)} read from {path}, {n:,} left out "
            f"({counted(left_out)})"
        )
    return files


def listed(kinds: tuple[str, ...]) -> str:
    """`.txt, .jsonl or .parquet`."""
    *some, last = kinds
    return f"{', '.join(some)} or {last}" if some else last
