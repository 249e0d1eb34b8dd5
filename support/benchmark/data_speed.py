"""The speed of the way to a batch: tokenizing text, and taking batches from token files."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import load_corpus, make_dataloaders, pack_token_files, tokenizer_documents
from support.benchmark.opponents import Opponents
from support.benchmark.rounds import Side
from support.benchmark.subject import BUNDLED_TEXT, Subject, overrides_of, read_subject
from support.config.read import load_config
from support.exchange.tokenizer_json import tokenizer_json
from support.files.fast_bpe import encoding_of
from support.files.tokenizer_files import gpt2_encoding
from support.messages import UserError
from support.text.encode_corpus import document_pieces
from support.text.token_files import open_token_files
from tokenizer import ByteTokenizer, Tokenizer

MOST_CHARS = 2**22  # of the text that is tokenized
N_FILE_TOKENS = 2**22  # of the token file that is made if the user names none
N_BATCHES = 100  # that one run takes

# ---- tokenizing ----------------------------------------------------------------------------------


def text_pieces(args: argparse.Namespace, tokenizer: Tokenizer) -> list[str]:
    """The training text of --config, or the bundled text, in the pieces in which it is encoded for
    training."""
    if args.config:
        corpus = load_corpus(load_config(args.config, overrides_of(args)))
        documents = list(tokenizer_documents(corpus, "bpe"))
    else:
        documents = [BUNDLED_TEXT.read_text(encoding="utf-8")]
    pieces, n_chars = [], 0
    for piece, _ in document_pieces(documents, tokenizer):
        pieces.append(piece)
        n_chars += len(piece)
        if n_chars > MOST_CHARS:
            break
    return pieces


def tokenizing_sides(
    args: argparse.Namespace, against: Opponents
) -> tuple[Tokenizer, list[Callable[[], Side]]]:
    """(our tokenizer, builders of the sides that encode one text with the same vocabulary)."""
    subject = read_subject(args, "m1")
    tokenizer = subject.some_tokenizer()
    pieces = text_pieces(args, tokenizer)
    ours = tokenizer.encode_batch(pieces)

    def side(name: str, encode: Callable[[list[str]], list]) -> Side:
        same = all(np.array_equal(a, b) for a, b in zip(ours, encode(pieces), strict=True))
        note = "" if name == "ours" else "the same ids" if same else "OTHER IDS"
        return Side(name, lambda: encode(pieces) and None, units=sum(map(len, ours)), note=note)

    builders = [lambda: side("ours", tokenizer.encode_batch)]
    encoders = {"tokenizers": tokenizers_encoder, "tiktoken": tiktoken_encoder}
    for name in against or {"tokenizers": None}:
        encode = encoders[name](tokenizer)
        builders.append(lambda name=name, encode=encode: side(name, encode))
    return tokenizer, builders


def tokenizers_encoder(tokenizer: Tokenizer) -> Callable[[list[str]], list]:
    """The `encode_batch` of Hugging Face's tokenizers, with the same rules and vocabulary."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(tokenizer_json(tokenizer))
    backend.encode_special_tokens = True  # names of special tokens in a text are plain text, as for us

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]

    return encode


def tiktoken_encoder(tokenizer: Tokenizer) -> Callable[[list[str]], list]:
    """tiktoken's own `encode_ordinary_batch`, with the same vocabulary. Raises UserError if tiktoken cannot
    hold it."""
    from tokenizers import Tokenizer as Backend

    is_gpt2 = tokenizer.kind == "gpt2"
    encoding = gpt2_encoding() if is_gpt2 else encoding_of(Backend.from_str(tokenizer_json(tokenizer)))
    if encoding is None:
        raise UserError(
            f"--against tiktoken: it cannot hold a vocabulary of kind {tokenizer.kind}; take bpe or gpt2"
        )
    return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=torch.get_num_threads())


# ---- batches -------------------------------------------------------------------------------------


def batch_sides(subject: Subject, folder: Path) -> list[Callable[[], Side]]:
    """Builders of the sides that take batches from a token file: the loader of train.py, and nanoGPT's way.
    Without a config on token files, a file of random bytes is made in `folder`."""
    config, tokenizer = subject.config, subject.tokenizer
    if config.data.source != "tokens":
        path = folder / "train.bin"
        np.random.default_rng(config.seed).integers(256, size=N_FILE_TOKENS).astype("<u2").tofile(path)
        files, tokenizer = open_token_files(str(path), dtype="uint16"), ByteTokenizer()
        data = pack_token_files(files, tokenizer, config)
    else:
        data = subject.data
    n_tokens = N_BATCHES * subject.tokens_per_step

    def from_loader() -> None:
        loader, _ = make_dataloaders(config, data, tokenizer, N_BATCHES)
        for _ in loader:
            pass

    def from_get_batch() -> None:
        for _ in range(N_BATCHES * config.training.grad_accum_steps):
            get_batch(
                data.train.tokens.path, data.train.tokens, config.training.micro_batch_size, config.seq_len
            )

    return [
        lambda: Side("ours", from_loader, units=n_tokens),
        lambda: Side("get_batch", from_get_batch, units=n_tokens, note="as nanoGPT does it"),
    ]


def get_batch(path: Path, tokens, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """A batch as nanoGPT's training takes it: map the file anew, draw places, copy each row, stack them."""
    mapped = np.memmap(path, tokens.dtype, mode="r", offset=tokens.offset)
    starts = torch.randint(len(tokens) - seq_len, (batch_size,)).tolist()
    rows = [torch.from_numpy(mapped[start : start + seq_len].astype(np.int64)) for start in starts]
    labels = [torch.from_numpy(mapped[start + 1 : start + 1 + seq_len].astype(np.int64)) for start in starts]
    return torch.stack(rows), torch.stack(labels)
