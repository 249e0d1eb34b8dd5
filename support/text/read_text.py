"""Reads UTF-8 files piece by piece, and refuses text that is too large for the memory."""

import codecs
import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from support.files.find_files import refuse_disguised
from support.messages import UserError

PART_CHARS = 2**20  # characters of a long document that are held at once
# Bytes of memory for each byte of a file, at least: a file is held as bytes and as text, later as text and as
# token ids.
MEMORY_PER_BYTE = 2
SMALLER_TEXT_HINT = (
    "give data.path a part of it, or stream it as .jsonl: --override data.source=hf --override "
    "data.dataset=json --override data.streaming=true"
)


@contextlib.contextmanager
def memory_for_text() -> Iterator[None]:
    """`with memory_for_text(): ...` around reading and encoding text: if there is no memory left, the error
    says what the user can do."""
    try:
        yield
    except MemoryError:
        from support.device import memory_total

        raise UserError(
            f"the text is too large for the {memory_total('cpu') / 2**20:,.0f} MB of memory that this "
            f"process may use; {SMALLER_TEXT_HINT}"
        ) from None


def refuse_larger_than_memory(
    files: list[Path], path: str, key: str, advice: str = SMALLER_TEXT_HINT
) -> None:
    """Raise UserError if the files need more memory than there is. It is called before anything is read,
    because the system kills a process that takes too much memory, without any message."""
    from support.device import memory_total

    size = sum(file.stat().st_size for file in files)
    has = memory_total("cpu")
    if size * MEMORY_PER_BYTE > has:
        raise UserError(
            f"{key}={path}: {size / 2**20:,.0f} MB of text need at least "
            f"{size * MEMORY_PER_BYTE / 2**20:,.0f} MB of memory, and there are "
            f"{has / 2**20:,.0f} MB; {advice}"
        )


def read_blocks(file: Path, errors: str) -> Iterator[str]:
    """The text of a UTF-8 file, in blocks of about PART_CHARS characters. Raises UserError for a byte that is
    not valid text, with its offset in the file."""
    offset, raw, decoder = 0, b"", codecs.getincrementaldecoder("utf-8")(errors)
    with open(file, "rb") as stream:
        while True:
            raw = stream.read(PART_CHARS)
            if offset == 0:
                refuse_disguised(file, raw)
            if b"\0" in raw and errors == "strict":
                raise UserError(
                    f"{file}: NUL byte at offset {offset + raw.index(0)}, a byte of value 0, so this looks "
                    "like binary or UTF-16, not UTF-8 text; convert it, or read it as it is with --override "
                    "data.errors=replace (prepare.py: --errors replace)"
                )
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the block before
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}: byte {error.object[error.start]:#04x} at offset "
                    f"{offset - pending + error.start} is not UTF-8; convert the file, or put U+FFFD in its "
                    "place with --override data.errors=replace (prepare.py: --errors replace)"
                ) from None
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(raw)
            if not raw:
                return


def unix_lines(blocks: Iterable[str]) -> Iterator[str]:
    r"""The blocks with \n for each \r\n, even if one block ends with \r and the next begins with \n."""
    held = ""
    for block in blocks:
        block = held + block
        held = "\r" if block.endswith("\r") else ""
        yield block[: len(block) - len(held)].replace("\r\n", "\n")
    yield held


def read_lines(file: Path, errors: str) -> Iterator[str]:
    r"""The lines of a UTF-8 file, each with its \n. Raises UserError like `read_blocks`."""
    begun = ""
    for block in unix_lines(read_blocks(file, errors)):
        *lines, begun = (begun + block).split("\n")
        for line in lines:
            yield line + "\n"
    if begun:
        yield begun
