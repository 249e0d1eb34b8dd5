"""Text to token ids and back.

Five kinds of tokenizer, one interface:

    byte   the 256 bytes of UTF-8
    char   the characters of the corpus
    bpe    byte-pair encoding, trained on the corpus
    gpt2   the published vocabulary of GPT-2
    file   any tokenizer.json of Hugging Face's `tokenizers` library

Each has an end-of-document token, EOS, that no text can spell: `<|endoftext|>` inside a document is plain
text.

To add a kind: subclass `Tokenizer`, add the class to `KINDS`, and add the kind's name to `TokenizerConfig` in
support/config/schema.py.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path

from support.files.cut_text import WORD_END_OR_LINE, cut_at_word, cut_pieces, last_places
from support.files.tokenizer_files import (
    gpt2_encoding,
    join_files,
    mark_special_tokens,
    open_tokenizer_json,
    read_tokenizer_file,
)
from support.messages import UserError

EOS_TEXT = "<|endoftext|>"
PIECE_CHARS = 2**16  # a longer text is encoded in pieces of about this many characters
TRAIN_CHARS = 2**24  # a bpe tokenizer is trained on at most about this many characters
WHOLE_CHARS = 2**22  # kind `file` refuses a longer document in which it finds no place to cut


class Tokenizer:
    """What every kind offers.

    `vocab_size` counts all ids, with EOS. `eos_id` ends a document. `bos_ids` begin a document for the models
    that need that (Llama, Mistral); only kind `file` has any, where its tokenizer.json asks for them.
    `unknown_id` stands for text that the vocabulary lacks; None for a kind that has no such token.
    """

    kind: str
    vocab_size: int
    eos_id: int
    bos_ids: tuple[int, ...] = ()
    unknown_id: int | None = None
    is_trained = True  # whether `train` needs a text; byte and gpt2 need none, and file is read

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without EOS. `ByteTokenizer().encode("Hi")` is `[72, 105]`."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD, EOS becomes `<|endoftext|>`."""
        raise NotImplementedError

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> "Tokenizer":
        """A tokenizer for these documents. Kinds with a fixed vocabulary ignore both arguments."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """Plain strings and numbers from which `from_dict` makes an equal tokenizer. Every checkpoint holds
        them."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, state: dict) -> "Tokenizer":
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 of `to_dict()`: two tokenizers with the same fingerprint give the same ids."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    # What follows is built on the methods above; a kind overrides it where its rules are different.

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """The ids of each text, as lists, or as arrays where a library makes those faster."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that begins a document, such as a prompt: BOS, if there is one, then the text."""
        return [*self.bos_ids, *self.encode(text)]

    def encode_inside(self, text: str) -> list[int]:
        """Ids of `text` inside another text: without the space that some tokenizers put before each text."""
        return self.encode(text)

    @property
    def special_ids(self) -> dict[str, int]:
        """The tokens that no text can spell: {the name that a template can write: id}."""
        return {EOS_TEXT: self.eos_id}

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of a text that has special tokens in it, which are given as ids.

        `ByteTokenizer().encode_parts(["Hi", 256, "!"])` is `[72, 105, 256, 33]`.
        """
        ids: list[int] = []
        for kind, run in groupby(parts, type):
            if kind is str:
                ids += self.encode("".join(run))
            else:
                ids += run
        return ids

    def pieces(self, text: str) -> Iterator[str]:
        """`text` in pieces of about PIECE_CHARS characters. Their ids, one after another, are the ids of the
        whole text: so a document of any length is encoded in little memory."""
        return cut_pieces(text, self.cut, PIECE_CHARS)

    def cut(self, text: str, start: int, end: int) -> int:
        """Where a piece that begins at `start` ends: at `end`, or near it where `end` is no place to cut. A
        kind that encodes each character on its own can cut anywhere."""
        return end

    @staticmethod
    def from_files(
        vocab: str | Path, merges: str | Path, special_tokens: Sequence[str] = (EOS_TEXT,)
    ) -> "FileTokenizer":
        """The byte-level BPE of a GPT-2 style vocab.json and merges.txt. EOS is `<|endoftext|>` if that is
        one of the special tokens, else the first of them. Raises UserError."""
        tokenizer_json = join_files(vocab, merges, special_tokens)
        return FileTokenizer(tokenizer_json, EOS_TEXT if EOS_TEXT in special_tokens else special_tokens[0])


# ---- byte and char -------------------------------------------------------------------------------


class ByteTokenizer(Tokenizer):
    """One token for each byte of UTF-8. Nothing to train, nothing unknown, long sequences."""

    kind = "byte"
    vocab_size = 257
    eos_id = 256
    is_trained = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        parts = (EOS_TEXT.encode() if id == self.eos_id else bytes([id]) for id in ids)
        return b"".join(parts).decode(errors="replace")

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> "ByteTokenizer":
        return cls()

    def to_dict(self) -> dict:
        return {"kind": self.kind}

    @classmethod
    def from_dict(cls, state: dict) -> "ByteTokenizer":
        return cls()


class CharTokenizer(Tokenizer):
    """One token for each character of the corpus, in the order of their code points; EOS is the last id."""

    kind = "char"

    def __init__(self, chars: str):
        self.chars = chars
        self.ids = {char: id for id, char in enumerate(chars)}
        self.eos_id = len(chars)
        self.vocab_size = len(chars) + 1

    def encode(self, text: str) -> list[int]:
        """Raises UserError that lists the characters that the vocabulary lacks."""
        try:
            return [self.ids[char] for char in text]
        except KeyError:
            unknown = sorted(set(text) - set(self.chars))
            shown = " ".join(repr(char) for char in unknown[:10])
            if len(unknown) > 10:
                shown += f" and {len(unknown) - 10} more"
            raise UserError(
                f"unknown characters {shown}: the char tokenizer knows only the {len(self.chars)} characters "
                "of its training corpus; leave them out, or train with tokenizer.kind=byte or bpe"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(EOS_TEXT if id == self.eos_id else self.chars[id] for id in ids)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> "CharTokenizer":
        chars: set[str] = set()
        for document in documents:  # one at a time: all of them together may not fit into memory
            chars.update(document)
        return cls("".join(sorted(chars)))

    def to_dict(self) -> dict:
        return {"kind": self.kind, "chars": self.chars}

    @classmethod
    def from_dict(cls, state: dict) -> "CharTokenizer":
        return cls(state["chars"])


# ---- bpe -----------------------------------------------------------------------------------------


class LibraryTokenizer(Tokenizer):
    """What `bpe` and `file` share: Hugging Face's `tokenizers` library does the work, by the rules of a
    tokenizer.json. `eos_text` is the name of the token that ends a document."""

    def __init__(self, tokenizer_json: str, eos_text: str):
        self.backend, self.unknown_id = open_tokenizer_json(tokenizer_json, eos_text)
        self.eos_text = eos_text
        self.eos_id = self.backend.token_to_id(eos_text)
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Raises UserError for characters that the vocabulary lacks, if it has no token for unknown text."""
        return encode_by(self.backend, text)

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        try:
            return [
                found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            ]
        except Exception:  # the library raises plain Exception; `encode` says what is wrong
            return super().encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "json": self.backend.to_str(), "eos": self.eos_text}

    @classmethod
    def from_dict(cls, state: dict) -> "LibraryTokenizer":
        return cls(state["json"], state["eos"])


def encode_by(backend, text: str) -> list[int]:
    """The ids that this backend gives `text`. Raises UserError."""
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"this tokenizer.json cannot encode the text ({str(error)[:150]})") from None


class BPETokenizer(LibraryTokenizer):
    """Byte-level byte-pair encoding, trained on the corpus: start from the 256 bytes, merge the most frequent
    pair into one token, repeat. `BPE` in from_scratch.py does the same in plain Python.

    Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016); bytes as in GPT-2.
    """

    kind = "bpe"

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = 1024) -> "BPETokenizer":
        """Of a corpus longer than TRAIN_CHARS, only every second (third, ...) piece is read. The memory that
        training needs grows with the number of different words, and the most frequent pairs are the same in a
        part of the text."""
        documents = list(documents)
        every = max(1, math.ceil(sum(map(len, documents)) / TRAIN_CHARS))
        pieces = (piece for document in documents for piece in cut_pieces(document, cut_at_word, PIECE_CHARS))
        return cls.train_on(islice(pieces, 0, None, every), vocab_size)

    @classmethod
    def train_on(cls, pieces: Iterable[str], vocab_size: int | None) -> "BPETokenizer":
        """A tokenizer for all these pieces of text, each read once."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size is None or vocab_size < 257:
            raise UserError(
                f"tokenizer.vocab_size={vocab_size} is too small for byte-level BPE; it needs 256 bytes "
                "and EOS, so at least 257"
            )
        backend = Backend(models.BPE())
        # GPT-2's pattern splits the text into words; no token reaches from one word into the next.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.encode_special_tokens = True
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS_TEXT],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator(pieces, trainer)
        return cls(backend.to_str(), EOS_TEXT)

    def cut(self, text: str, start: int, end: int) -> int:
        return cut_at_word(text, start, end)


# ---- gpt2 ----------------------------------------------------------------------------------------


class GPT2Tokenizer(Tokenizer):
    """GPT-2's published vocabulary, 50,257 tokens, through tiktoken: a BPE that somebody else has trained."""

    kind = "gpt2"
    vocab_size = 50257
    eos_id = 50256
    is_trained = False

    def __init__(self):
        self.backend = gpt2_encoding()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        # Set in processes that encode side by side: no threads then, and arrays, which take less time.
        if os.environ.get("TOKENIZERS_PARALLELISM") == "false":
            return [self.backend.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return self.backend.encode_ordinary_batch(list(texts), num_threads=2)

    def cut(self, text: str, start: int, end: int) -> int:
        return cut_at_word(text, start, end)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), errors="replace")

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> "GPT2Tokenizer":
        return cls()

    def to_dict(self) -> dict:
        return {"kind": self.kind}

    @classmethod
    def from_dict(cls, state: dict) -> "GPT2Tokenizer":
        return cls()


# ---- file ----------------------------------------------------------------------------------------


class FileTokenizer(LibraryTokenizer):
    """Any tokenizer.json of Hugging Face's `tokenizers` library. Nothing is known of its rules: some files
    put a space before each text, BOS before a document, or have special tokens besides EOS."""

    kind = "file"
    is_trained = False

    def __init__(self, tokenizer_json: str, eos_text: str):
        super().__init__(tokenizer_json, eos_text)
        self.bos_ids = self._bos_ids()
        self._marked = {}  # for each mark that `encode_parts` needed: what `mark_special_tokens` returned

    @classmethod
    def from_file(cls, path: str | Path) -> "FileTokenizer":
        """From a tokenizer.json, from vocab.json and merges.txt, or from a folder that holds them. Raises
        UserError or FileNotFoundError."""
        return cls(*read_tokenizer_file(path))

    def _bos_ids(self) -> tuple[int, ...]:
        """What the file's own rules put before a text (its post-processor adds them; no text can spell
        them)."""
        try:
            encoded = self.backend.encode("a")
        except Exception:  # the library raises plain Exception: a vocabulary without this character
            return ()
        first_of_text = [*encoded.special_tokens_mask, 0].index(0)
        return tuple(encoded.ids[:first_of_text])

    @cached_property
    def special_ids(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special and token.content}

    def encode_inside(self, text: str) -> list[int]:
        """As after a line end, if that stays a token of its own; else as a text of its own."""
        try:
            line_end = self.encode("\n")
            both = self.encode("\n" + text)
        except UserError:  # this vocabulary has no line end
            return self.encode(text)
        if both[: len(line_end)] == line_end:
            return both[len(line_end) :]
        return self.encode(text)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of a text can depend on what comes before it (a space only before the very first, say). So
        all parts are encoded together: each special token is written as a mark that occurs in no text here,
        then its name."""
        texts = "".join(part for part in parts if isinstance(part, str))
        if all(isinstance(part, str) for part in parts):
            return self.encode(texts)
        not_a_character = "\U0010ffff"
        mark = not_a_character
        while mark in texts:
            mark += not_a_character
        if mark not in self._marked:
            self._marked[mark] = mark_special_tokens(self.backend, mark)
        backend, token_of = self._marked[mark]
        marked_names = {id: mark + name for name, id in self.special_ids.items()}
        ids = encode_by(backend, "".join(marked_names.get(part, part) for part in parts))
        return [token_of.get(id, id) for id in ids]

    def cut(self, text: str, start: int, end: int) -> int:
        """At the end of a word or the start of a line, where the text around the place has the same ids in
        two parts as in one, whatever the rules of this file. If there is none before `end`, the search goes
        further.

        A file may have no such place (one that puts a space before every text, say); then the document stays
        whole. Raises UserError for a document that is too long for that.
        """
        while True:
            places = last_places(WORD_END_OR_LINE, text, start, min(end, len(text)))
            for place in islice(places, 16):
                before, after = text[max(start, place - 100) : place], text[place : place + 100]
                if self.encode(before) + self.encode(after) == self.encode(before + after):
                    return place
            if end >= len(text):
                return len(text)
            if end - start >= WHOLE_CHARS:
                raise UserError(
                    f"a document of {len(text):,} characters is too long for this tokenizer.json, which "
                    f"gives other ids to parts of it; divide it by lines that are {EOS_TEXT}, into documents "
                    f"of at most {WHOLE_CHARS:,}, or train with tokenizer.kind=bpe"
                )
            end += 7 * (end - start)


# ---- the table of kinds --------------------------------------------------------------------------

KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (ByteTokenizer, CharTokenizer, BPETokenizer, GPT2Tokenizer, FileTokenizer)
}


def class_of_kind(kind: object) -> type[Tokenizer]:
    """The class of this kind. An unknown kind is never taken for another: it raises UserError."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"unknown tokenizer kind {kind!r}; this version knows {', '.join(KINDS)}")
    return KINDS[kind]


def tokenizer_from_dict(state: dict) -> Tokenizer:
    """The tokenizer that `to_dict` described. Raises UserError for an unknown kind."""
    return class_of_kind(state.get("kind")).from_dict(state)


def build_tokenizer(
    kind: str, documents: Iterable[str], vocab_size: int | None = None, path: str | None = None
) -> Tokenizer:
    """The tokenizer that the config asks for: trained on `documents` if its kind is trained, else made or
    read from `path`. Raises UserError for an unknown kind."""
    cls = class_of_kind(kind)
    if cls is FileTokenizer:
        return FileTokenizer.from_file(path)
    return cls.train(documents, vocab_size)
