"""Documents to one row of token ids. This takes little memory, however long they are. No torch here.

documents  "aaa", "bb"  ->  pieces of text that are encoded at once  ->  a a a EOS b b EOS
"""

from collections.abc import Iterable, Iterator

import numpy as np

from tokenizer import Tokenizer

Piece = tuple[str, bool]  # a piece of text, and whether its document ends with it
BATCH_CHARS = 2**20  # about this many characters are encoded at once,
BATCH_PIECES = 1000  # in at most this many pieces


def ids_around_document(tokenizer: Tokenizer, *, begins: bool, ends: bool) -> tuple[list[int], list[int]]:
    """(ids before a piece of text, ids after it): BOS where a document begins, if the tokenizer has one, and
    EOS where it ends. This is the only place that puts them there."""
    before = list(tokenizer.bos_ids) if begins else []
    after = [tokenizer.eos_id] if ends else []
    return before, after


def join_pieces(parts: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Documents that come in parts of any size, cut again where the tokenizer allows a cut. So the ids of the
    pieces, one after another, are the ids of the whole document."""
    text = ""
    for part, ends in parts:
        *pieces, text = tokenizer.pieces(text + part)  # the last piece waits: the next part may continue it
        for piece in pieces:
            yield piece, False
        if ends:
            yield text, True
            text = ""


def document_pieces(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Whole documents cut into pieces, so that a long document is not encoded all at once."""
    return join_pieces(((document, True) for document in documents), tokenizer)


def batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in batches of about BATCH_CHARS characters. With a fixed number of pieces in a batch, long
    pieces would make a large batch."""
    batch, n_chars = [], 0
    for piece, ends in pieces:
        batch.append((piece, ends))
        n_chars += len(piece)
        if n_chars >= BATCH_CHARS or len(batch) == BATCH_PIECES:
            yield batch
            batch, n_chars = [], 0
    yield batch


def id_type(vocab_size: int) -> type[np.unsignedinteger]:
    """The smaller of these two types, if it holds every id of the vocabulary; else the larger."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_pieces(pieces: Iterable[Piece], tokenizer: Tokenizer, begins: bool = True) -> np.ndarray:
    """Pieces of documents as one row of ids; `begins` says whether the first piece begins a document.

    A Python list would take 36 bytes a token. So only one batch at a time is held as lists, and the row is an
    array of bytes that grows.
    """
    dtype = id_type(tokenizer.vocab_size)
    row = bytearray()
    for batch in batched(pieces):
        batch_ids = tokenizer.encode_batch([piece for piece, _ in batch])
        for ids, (_, ends) in zip(batch_ids, batch, strict=True):
            before, after = ids_around_document(tokenizer, begins=begins, ends=ends)
            for part in (before, ids, after):
                row += np.asarray(part, dtype).tobytes()
            begins = ends  # after the end of a document, the next one begins
    return np.frombuffer(row, dtype)
