"""Text to token ids and back.

Five kinds of tokenizer, one interface:

    byte   the 256 bytes of UTF-8
    char   the characters of the corpus
    bpe    byte-pair encoding, trained on the corpus
    gpt2   the published vocabulary of GPT-2
    file   any tokenizer.json of Hugging Face's `tokenizers` library

Each has a token that ends a document, EOS. No text can spell it: `<|endoftext|>` inside a document is plain
text.

To add a kind: subclass `Tokenizer`, add the class to `KINDS`, and add the kind's name to `TokenizerConfig` in
support/config/schema.py.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path

from support.files.cut_text import WORD_END_OR_LINE, cut_at_word, cut_pieces, last_places
from support.files.fast_bpe import FastBPE, encode_in_threads
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
GPT2_CHARS = 2**19  # kind `gpt2` encodes a longer text in pieces: a million blanks are too many for tiktoken
WHOLE_CHARS = 2**22  # kind `file` refuses a longer document in which it finds no place to cut


class Tokenizer:
    """What every kind offers.

    `vocab_size` counts all ids, with EOS. `eos_id` ends a document. `bos_ids` begin a document for the models
    that need that (Llama, Mistral); only kind `file` has any, if its tokenizer.json asks for them.
    `unknown_id` stands for text that the vocabulary lacks; None if there is no such token.
    """

    kind: str
    vocab_size: int
    eos_id: int
    bos_ids: tuple[int, ...] = ()
    unknown_id: int | None = None
    is_trained = True  # whether `train` needs a text; byte, gpt2 and file need none: file is loaded

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without EOS. `ByteTokenizer().encode("Hi")` is `[72, 105]`."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD, and EOS becomes its name."""
        raise NotImplementedError

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> "Tokenizer":
        """A tokenizer for these documents. `byte` and `gpt2` are always the same, and ignore both arguments;
        `char` ignores `vocab_size`; `file` cannot be trained (it has `from_file`)."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """The tokenizer as plain strings and numbers. Every checkpoint holds them."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, state: dict) -> "Tokenizer":
        """An equal tokenizer from what `to_dict` returned."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 of `to_dict()`. Two tokenizers with the same fingerprint give the same ids."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    # The methods below use those above. A kind overrides one if its rules are different.

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """The ids of each text: lists, or arrays if the library makes those faster."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that begins a document, such as a prompt: BOS, if there is one, then its ids."""
        return [*self.bos_ids, *self.encode(text)]

    def encode_inside(self, text: str) -> list[int]:
        """Ids of `text` in the middle of a text: without the space that some tokenizers put at its start."""
        return self.encode(text)

    @property
    def special_ids(self) -> dict[str, int]:
        """The tokens that no text can spell: {the name that a template can write: id}."""
        return {EOS_TEXT: self.eos_id}

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of a text with special tokens in it. Each part is text, or the id of a special token.

        `ByteTokenizer().encode_parts(["Hi", 256, "!"])` is `[72, 105, 256, 33]`.
        """
        ids: list[int] = []
        for kind, neighbours in groupby(parts, type):  # texts, ids, texts, ids, ...
            if kind is str:
                ids += self.encode("".join(neighbours))
            else:
                ids += neighbours
        return ids

    def pieces(self, text: str) -> Iterator[str]:
        """`text` in pieces of about PIECE_CHARS characters. Their ids, one after another, are the ids of the
        whole text. So encoding takes little memory, however long the text is."""
        return cut_pieces(text, self.cut, PIECE_CHARS)

    def cut(self, text: str, start: int, end: int) -> int:
        """Where to end a piece that begins at `start`: at `end`, or near it, if a cut at `end` would change
        ids. A kind that encodes each character on its own can cut anywhere."""
        return end

    @staticmethod
    def from_files(
        vocab: str | Path, merges: str | Path, special_tokens: Sequence[str] = (EOS_TEXT,)
    ) -> "FileTokenizer":
        """A shortcut: makes a FileTokenizer, whichever class it is called on, from the byte-level BPE of a
        GPT-2 style vocab.json and merges.txt. EOS is `<|endoftext|>` if that is one of the special tokens,
        else the first of them. Raises UserError if the files are not such a BPE, or if `special_tokens` is
        empty."""
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
        return b"".join(parts).decode(errors="replace")  # all at once: a character can be several bytes

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
        """The id of each character. Raises UserError that lists the characters that the vocabulary lacks."""
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
    tokenizer.json; or tiktoken, where it gives the same ids. `eos_text` is the name of the token that ends a
    document."""

    def __init__(self, tokenizer_json: str, eos_text: str):
        self.backend, self.unknown_id = open_tokenizer_json(tokenizer_json, eos_text)
        self.fast = FastBPE(self.backend)
        self.eos_text = eos_text
        self.eos_id = self.backend.token_to_id(eos_text)
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises UserError if a character is not in the vocabulary, and the vocabulary has no
        token for unknown text."""
        ids = self.fast.encode(text) if self.fast.pays_off(len(text)) else None
        return encode_by(self.backend, text) if ids is None else ids.tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        if self.fast.pays_off(sum(map(len, texts))):
            return encode_in_threads(self._encode_fast, texts)
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        except Exception:  # the library raises plain Exception; `encode` says what is wrong
            return super().encode_batch(texts)

    def _encode_fast(self, text: str) -> Sequence[int]:
        ids = self.fast.encode(text)
        return encode_by(self.backend, text) if ids is None else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "json": self.backend.to_str(), "eos": self.eos_text}

    @classmethod
    def from_dict(cls, state: dict) -> "LibraryTokenizer":
        return cls(state["json"], state["eos"])

    def __reduce__(self):
        # For pickle. The library's own pickle forgets that text which spells a special token stays text.
        return type(self).from_dict, (self.to_dict(),)


def encode_by(backend, text: str) -> list[int]:
    """The ids that `backend` gives `text`. Raises UserError if it cannot encode the text."""
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
        """Train on the documents. If they are longer than TRAIN_CHARS, use every second piece only (every
        third, ... if they are much longer): the frequent pairs stay the same, and memory stays small."""
        documents = list(documents)
        every = max(1, math.ceil(sum(map(len, documents)) / TRAIN_CHARS))
        pieces = (piece for document in documents for piece in cut_pieces(document, cut_at_word, PIECE_CHARS))
        return cls.train_on(islice(pieces, 0, None, every), vocab_size)  # pieces[::every], for a generator

    @classmethod
    def train_on(cls, pieces: Iterable[str], vocab_size: int | None) -> "BPETokenizer":
        """A tokenizer trained on these pieces of text, each read once. Raises UserError if `vocab_size` is
        too small."""
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
        backend.decoder = decoders.ByteLevel()  # ids back to bytes, bytes to text
        # Despite its name: special tokens in a text are encoded as ordinary text.
        backend.encode_special_tokens = True
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS_TEXT],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, also those not in the text
        )
        backend.train_from_iterator(pieces, trainer)
        return cls(backend.to_str(), EOS_TEXT)

    def cut(self, text: str, start: int, end: int) -> int:
        return cut_at_word(text, start, end)


# ---- gpt2 ----------------------------------------------------------------------------------------


class GPT2Tokenizer(Tokenizer):
    """GPT-2's published vocabulary of 50,257 tokens, through tiktoken: a BPE that OpenAI has trained."""

    kind = "gpt2"
    vocab_size = 50257
    eos_id = 50256
    is_trained = False

    def __init__(self):
        self.backend = gpt2_encoding()

    def encode(self, text: str) -> list[int]:
        pieces = self.pieces(text) if len(text) > GPT2_CHARS else [text]
        return [id for piece in pieces for id in self.backend.encode_ordinary(piece)]

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return encode_in_threads(partial(self.backend.encode_to_numpy, disallowed_special=()), texts)

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
    """Any tokenizer.json of Hugging Face's `tokenizers` library. Its rules can be any: some files put a space
    before each text, or BOS before each document, or have special tokens besides EOS."""

    kind = "file"
    is_trained = False

    def __init__(self, tokenizer_json: str, eos_text: str):
        super().__init__(tokenizer_json, eos_text)
        self.bos_ids = self._bos_ids()
        # What `encode_parts` has prepared: {mark: (a backend whose special tokens begin with this mark, {its
        # id: our id})}. See `mark_special_tokens`.
        self._marked = {}

    @classmethod
    def from_file(cls, path: str | Path) -> "FileTokenizer":
        """A tokenizer from a tokenizer.json, from vocab.json and merges.txt, or from a folder that holds
        them. Raises FileNotFoundError, or UserError if the files are not a tokenizer."""
        return cls(*read_tokenizer_file(path))

    def _bos_ids(self) -> tuple[int, ...]:
        """The special tokens that the file's own rules put before a text (its "post-processor" does)."""
        try:
            encoded = self.backend.encode("a")
        except Exception:  # the library raises plain Exception: a vocabulary without this character
            return ()
        # The mask is 1 for an added token, 0 for the text. The 0 at the end: a text may have no ids at all.
        first_of_text = [*encoded.special_tokens_mask, 0].index(0)
        return tuple(encoded.ids[:first_of_text])

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """As in `Tokenizer`: the tokens of the file that are marked as special and have a text."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special and token.content}

    def encode_inside(self, text: str) -> list[int]:
        """The ids that `text` has after a line end, if the line end keeps its own token; else the ids that it
        has alone."""
        try:
            line_end = self.encode("\n")
            both = self.encode("\n" + text)
        except UserError:  # this vocabulary has no line end
            return self.encode(text)
        if both[: len(line_end)] == line_end:
            return both[len(line_end) :]
        return self.encode(text)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Here the ids of a text can depend on the text before it (a file may put a space before the very
        first text only). So all parts are encoded together, as one text in which each special token is
        written as a mark, which no part contains, and its name."""
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
        """The last good place before `end`: the end of a word or the start of a line, where the text around
        it has the same ids in two parts as in one. If there is none, the search continues after `end`.

        With some files no place is good (if they put a space before every text, say). Then the document stays
        whole. Raises UserError if it is too long for that.
        """
        while True:
            places = last_places(WORD_END_OR_LINE, text, start, min(end, len(text)))
            for place in islice(places, 16):  # each try costs time, so not too many
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
    """The class of this kind. Raises UserError for an unknown kind."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"unknown tokenizer kind {kind!r}; this version knows {', '.join(KINDS)}")
    return KINDS[kind]


def tokenizer_from_dict(state: dict) -> Tokenizer:
    """The tokenizer that `to_dict` of any kind has described. Raises UserError for an unknown kind."""
    return class_of_kind(state.get("kind")).from_dict(state)


def build_tokenizer(
    kind: str, documents: Iterable[str], vocab_size: int | None = None, path: str | None = None
) -> Tokenizer:
    """The tokenizer that the config asks for: `file` is loaded from `path`, `bpe` and `char` are trained on
    `documents`, the others need nothing. Raises UserError for an unknown kind."""
    cls = class_of_kind(kind)
    if cls is FileTokenizer:
        return FileTokenizer.from_file(path)
    return cls.train(documents, vocab_size)
