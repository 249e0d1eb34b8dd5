"""Documents to one row of token ids, each closed by EOS, in little memory however long they are. No torch
here."""

from collections.abc import Iterable, Iterator

import numpy as np

from tokenizer import Tokenizer

Piece = tuple[str, bool]  # a piece of text, and whether its document ends with it
BATCH_CHARS, BATCH_PIECES = 2**20, 1000  # what is encoded at once


def join_pieces(parts: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Documents that come in parts, cut anew into pieces whose ids, one after another, are the ids of the
    whole document."""
    text = ""
    for part, ends in parts:
        *pieces, text = tokenizer.pieces(text + part)
        yield from ((piece, False) for piece in pieces)
        if ends:
            yield text, True
            text = ""


def document_pieces(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[Piece]:
    """(piece, whether its document ends with it): what is encoded at once is short, however long a
    document is."""
    return join_pieces(((document, True) for document in documents), tokenizer)


def batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in batches of about BATCH_CHARS characters: counting documents would let a batch grow with
    their length."""
    batch, n_chars = [], 0
    for piece, ends in pieces:
        batch.append((piece, ends))
        n_chars += len(piece)
        if n_chars >= BATCH_CHARS or len(batch) == BATCH_PIECES:
            yield batch
            batch, n_chars = [], 0
    yield batch


def around(begins: bool, ends: bool, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands around the ids of a piece: BOS before the first of a document, where the tokenizer has
    one, EOS behind the last."""
    return list(tokenizer.bos_ids) if begins else [], [tokenizer.eos_id] if ends else []


def id_type(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds every id of the vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_pieces(pieces: Iterable[Piece], tokenizer: Tokenizer, begins: bool = True) -> np.ndarray:
    """Pieces of documents, one behind another, as one row of ids; `begins` says whether the first begins a
    document.

    A Python list would take 36 bytes a token: only one batch is ever held as lists, and the row grows in
    place.
    """
    dtype, row = id_type(tokenizer.vocab_size), bytearray()
    for batch in batched(pieces):
        for ids, (_, ends) in zip(tokenizer.encode_batch([piece for piece, _ in batch]), batch, strict=True):
            before, behind = around(begins, ends, tokenizer)
            row += (
                np.array(before, dtype).tobytes()
                + np.asarray(ids, dtype).tobytes()
                + np.array(behind, dtype).tobytes()
            )
            begins = ends
    return np.frombuffer(row, dtype)


def tokenize(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one row of ids, EOS behind each (and BOS before, where the tokenizer has one);
    uint16 where the vocabulary allows."""
    return encode_pieces(document_pieces(documents, tokenizer), tokenizer)
