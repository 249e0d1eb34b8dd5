"""Text of a size or a kind that nobody planned for is trained on in bounded memory, or refused in one line
that says why.

Long documents are encoded in pieces. Here the pieces are a few characters long, so that every rule about
them applies often. The slow tests run train.py on lines of 200 MB and measure its memory.
"""

import itertools
import json
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import data as data_module
import support.device as hardware
import support.text.encode_corpus as encoding
import tokenizer as tokenizer_module
from data import Step, StepShape, StreamingPackedLMDataset, load_corpus, pack_corpus, tokenize
from support.config.read import validate_config
from support.config.schema import DataConfig
from support.messages import UserError
from support.text.documents import DocumentStream, text_documents
from support.text.sources import load_dataset
from tokenizer import (
    EOS_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    GPT2Tokenizer,
    Tokenizer,
)

REPO = Path(__file__).resolve().parents[2]
CORPUS = (REPO / "data" / "tiny_corpus.txt").read_text(encoding="utf-8")

# ---- pieces --------------------------------------------------------------------------------------

ATOMS = [
    *" \n\t\r" * 4,
    "     ",
    "\n\n",
    "\r\n",
    "\0",
    "a",
    "word",
    "Don't",
    "'s",
    "'",
    "1234567",
    "٣٤",
    "Ⅷ",
    "é",
    "e\u0301",
    "日本語。",
    "한국",
    "🙂",
]
ATOMS += ["👩‍👩‍👧", "🇩🇪", "!?", "...", "_", "ﬁ", "\ufeff", "\ufffd", "<|endoftext|>", "</s>"]
# Blank for one library and not for another.
ATOMS += list("\x0b\x0c\x1b\x1c\x1d\x1f\x85\u00a0\u1680\u180e\u200b\u2003\u2028\u2029\u3000")
# Digits in groups of three; line ends stay with the punctuation before them.
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def mixture(seed: int, n: int) -> str:
    return "".join(random.Random(seed).choices(ATOMS, k=n))


def file_tokenizer(pre_tokenizer=None, normalizer=None) -> FileTokenizer:
    """A tokenizer.json with rules of its own, trained on the bundled corpus and on Chinese with a full
    stop at each line's end."""
    backend = Backend(models.BPE())
    backend.normalizer, bytes_ = normalizer, pre_tokenizers.ByteLevel.alphabet()
    backend.decoder = decoders.ByteLevel()
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[EOS_TEXT], initial_alphabet=bytes_, show_progress=False
    )
    backend.train_from_iterator([*CORPUS[:20000].splitlines(), "语言。\n模型。\n" * 50], trainer)
    return FileTokenizer(backend.to_str(), EOS_TEXT)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    bytes_only, bpe = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        BPETokenizer.train([CORPUS], 600),
    )
    return {
        "byte": ByteTokenizer(),
        "char": CharTokenizer.train(ATOMS),
        "bpe": bpe,
        "gpt2": GPT2Tokenizer(),
        "file": FileTokenizer(bpe.backend.to_str(), EOS_TEXT),
        "like gpt4": file_tokenizer(
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT4), "isolated"), bytes_only])
        ),
        "space before": file_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "sentencepiece": file_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first"), normalizers.NFKC()),
        "one word": file_tokenizer(
            None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        ),
    }


KINDS = ["byte", "char", "bpe", "gpt2", "file", "like gpt4", "space before", "sentencepiece", "one word"]


def joined(tokenizer: Tokenizer, pieces: list[str]) -> list[int]:
    return [i for piece in pieces for i in tokenizer.encode(piece)]


@pytest.mark.parametrize("limit", [20, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_the_pieces_equal_the_ids_of_the_whole(tokenizers, monkeypatch, kind, limit):
    """If a word ends within the limit. bpe and gpt2 also cut longer stretches; the next test shows what
    that costs."""
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", limit)
    tokenizer, compared = tokenizers[kind], 0
    for seed in range(300):
        text = mixture(seed, 1 + seed % 97)
        pieces = list(tokenizer.pieces(text))
        assert "".join(pieces) == text
        assert all(pieces), "no piece is empty"
        at_words = all(not a[-1].isspace() and b[0] in " \t\n\r" for a, b in itertools.pairwise(pieces))
        if kind not in ("bpe", "gpt2") or at_words:
            assert joined(tokenizer, pieces) == tokenizer.encode(text), (seed, list(map(ascii, pieces)))
            compared += len(pieces) > 1
    assert compared > 30 or (kind == "one word" and compared == 0), (
        "a file that puts a sign before every text cannot be cut"
    )


@pytest.mark.parametrize(
    "stretch",
    ["x" * 5000, "语言模型" * 1000, " " * 5000, "\0" * 5000, "🙂" * 3000, "YWJj" * 2000],
    ids=lambda s: ascii(s[:2]),
)
@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2", "file", "like gpt4"])
def test_a_stretch_without_words_is_cut_anywhere_and_still_the_same_text(
    tokenizers, monkeypatch, kind, stretch
):
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 100)
    tokenizer = tokenizers[kind]
    pieces = list(tokenizer.pieces(stretch))
    ids, whole = joined(tokenizer, pieces), tokenizer.encode(stretch)
    assert tokenizer.decode(ids) == stretch
    assert len(whole) <= len(ids) <= len(whole) + 3 * len(pieces), (
        "at most a few more tokens where it was cut"
    )
    if kind in ("file", "like gpt4"):
        assert ids == whole


def test_lines_of_chinese_are_cut_where_a_line_begins(tokenizers, monkeypatch):
    """If a tokenizer has a token for a full stop with the line's end, no word ends before a blank."""
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 100)
    tokenizer, text = tokenizers["like gpt4"], "语言模型。\n" * 400
    assert tokenizer.encode("言。\n模") != tokenizer.encode("言。") + tokenizer.encode("\n模")
    pieces = list(tokenizer.pieces(text))
    assert len(pieces) >= 20
    assert joined(tokenizer, pieces) == tokenizer.encode(text)


def test_a_document_that_a_tokenizer_file_cannot_cut_is_refused_if_it_is_too_long(tokenizers, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 10)
    monkeypatch.setattr(tokenizer_module, "WHOLE_CHARS", 500)
    tokenizer = tokenizers["space before"]
    assert list(tokenizer.pieces("x" * 500)) == ["x" * 500]
    with pytest.raises(
        UserError,
        match=r"a document of 6,000 characters is too long for this tokenizer\.json.*at most 500, or train "
        r"with",
    ):
        list(tokenizer.pieces("x" * 6000))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_document_is_one_empty_piece_and_one_eos(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert list(tokenizer.pieces("")) == [""]
    assert tokenize(["", ""], tokenizer).tolist() == [tokenizer.eos_id] * 2


@pytest.mark.parametrize("kind", ["byte", "char", "like gpt4", "sentencepiece"])
def test_a_corpus_gives_the_same_ids_for_any_size_of_pieces_and_batches(tokenizers, monkeypatch, kind):
    tokenizer, documents = tokenizers[kind], [mixture(seed, seed * 7 % 200) for seed in range(60)]
    witness = [i for document in documents for i in [*tokenizer.encode(document), tokenizer.eos_id]]
    for pieces, chars, batch in ((2**16, 2**20, 1000), (13, 50, 1000), (50, 2**20, 3), (9, 1, 1)):
        monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", pieces)
        monkeypatch.setattr(encoding, "BATCH_CHARS", chars)
        monkeypatch.setattr(encoding, "BATCH_PIECES", batch)
        assert tokenize(documents, tokenizer).tolist() == witness


def test_bpe_learns_from_evenly_spread_parts_of_a_corpus_that_is_too_long(monkeypatch):
    """Both halves of this corpus are used, and the merges are nearly those of the whole."""
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 500)
    whole = BPETokenizer.train([CORPUS, "qzqzqz " * 4000], 500)
    monkeypatch.setattr(tokenizer_module, "TRAIN_CHARS", 30000)
    part = BPETokenizer.train([CORPUS, "qzqzqz " * 4000], 500)
    assert len(part.encode(" qzqzqz")) == 1
    vocabularies = [set(t.backend.get_vocab()) for t in (whole, part)]
    assert len(vocabularies[0] & vocabularies[1]) > 0.8 * 500
    assert vocabularies[0] != vocabularies[1]


# ---- streams -------------------------------------------------------------------------------------


def long_documents(seed: int) -> list[str]:
    """Texts: most take many pieces, some take one, some hold no words."""
    random_ = random.Random(seed)
    return [mixture(100 * seed + i, random_.choice([1, 5, 60, 400])) or "x" for i in range(9)]


def stream(
    texts: list[str], tokenizer: Tokenizer, state: str | None = None, stride: int = 7, shuffle: bool = True
) -> Iterator[Step]:
    documents = DocumentStream(datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(), "text")
    return iter(
        StreamingPackedLMDataset(
            documents,
            tokenizer,
            seq_len=7,
            stride=stride,
            shape=StepShape(2, 2),
            seed=42,
            shuffle=shuffle,
            state=state,
        )
    )


def tokens_of(steps: list[Step]) -> list[int]:
    return [
        i for step in steps for batch in step.micro_batches for i in batch["input_ids"].flatten().tolist()
    ]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 23)
    monkeypatch.setattr(data_module, "SHUFFLE_GROUP_CHARS", 1500)
    monkeypatch.setattr(data_module, "SHUFFLE_GROUP", 4)


@pytest.mark.parametrize(
    ("kind", "stride", "seed"), [("byte", 7, 1), ("byte", 3, 2), ("file", 7, 3), ("file", 2, 4)]
)
def test_a_stream_of_long_documents_resumes_from_any_step(tokenizers, small_pieces, kind, stride, seed):
    """In the middle of a piece, at its end, and between documents, groups and epochs; and the state stays
    small."""
    texts, tokenizer = long_documents(seed), tokenizers[kind]
    n = 2 * sum(len(tokenizer.encode(text)) + 1 for text in texts) // (4 * stride)
    whole = list(itertools.islice(stream(texts, tokenizer, stride=stride), n))
    states = [step.stream_state for step in whole]
    assert {json.loads(state)["epoch"] for state in states} >= {0, 1}
    assert max(json.loads(state)["piece"] for state in states) >= 5
    assert max(len(json.loads(state)["tokens"]) for state in states) <= 3 * stride + 8
    for at in sorted(random.Random(seed).sample(range(n - 1), 40)):
        resumed = list(itertools.islice(stream(texts, tokenizer, states[at], stride), min(3, n - at - 1)))
        assert tokens_of(resumed) == tokens_of(whole[at + 1 : at + 4]), states[at]
        assert [step.stream_state for step in resumed] == states[at + 1 : at + 4]


def test_a_stream_in_pieces_equals_the_row_of_tokenize(tokenizers, small_pieces):
    texts, tokenizer = long_documents(5), tokenizers["byte"]
    row = tokenize(texts, tokenizer).tolist()
    steps = list(itertools.islice(stream(texts, tokenizer, shuffle=False), len(row) // 28))
    assert tokens_of(steps) == row[: 28 * len(steps)]


def test_the_state_of_an_older_checkpoint_still_loads(tokenizers, small_pieces):
    """Such a state holds the tokens left over and a count of whole documents, and no position within a
    document."""
    texts, tokenizer = long_documents(6), tokenizers["byte"]
    old = {"epoch": 0, "group": 0, "source": None, "used": 2, "tokens": [7, 8, 9]}
    row = [7, 8, 9, *tokenize(texts[2:], tokenizer).tolist()]
    assert (
        tokens_of(list(itertools.islice(stream(texts, tokenizer, json.dumps(old), shuffle=False), 5)))
        == row[:140]
    )


# ---- reading -------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path, **keys) -> list[str]:
    return text_documents(str(path), DataConfig(path=str(path), **keys))


def refusal(path: Path, **keys) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **keys)
    message = str(caught.value)
    assert message.isprintable(), "one line, without control characters"
    return message


@pytest.mark.parametrize("offset", [0, 70_000, 139_999])
@pytest.mark.parametrize(
    ("byte", "what"), [(b"\xff", "byte 0xff at offset {} is not UTF-8"), (b"\0", "NUL byte at offset {}")]
)
@pytest.mark.parametrize("name", ["a.txt", "folder", "rows.jsonl"])
def test_a_bad_byte_is_named_with_file_and_offset_and_replaced_on_request(tmp_path, name, byte, what, offset):
    """As the first, a middle or the last byte of a long line. In a .jsonl too, the offset counts from the
    start of the file."""
    text = b"x" * offset + byte + b"x" * (139_999 - offset)
    first = b'{"text": "good"}\n' if name == "rows.jsonl" else b"good\n"
    path = tmp_path / name
    path.mkdir() if name == "folder" else None
    file = path / "b.txt" if name == "folder" else path
    row = (b'{"text": "' + text + b'"}', len(b'{"text": "')) if name == "rows.jsonl" else (text, 0)
    write(file, first + row[0])
    message = refusal(path)
    assert str(file) in message
    assert what.format(len(first) + row[1] + offset) in message
    assert "data.errors=replace" in message
    if name == "rows.jsonl" and byte == b"\0":
        assert "rows.jsonl, line 2 is not JSON" in refusal(path, errors="replace")
    else:
        expected = text.decode(errors="replace")
        assert read(path, errors="replace")[-1] == (expected if name == "rows.jsonl" else "good\n" + expected)


def test_text_that_only_looks_broken_is_read_as_it_is(tmp_path):
    """A byte order mark, line separators, no line end, a NUL and a pair of surrogates as JSON writes them,
    a long row."""
    assert read(
        write(tmp_path / "a.txt", "\ufeffone\u2028two\u2029\x85three\r\n<|endoftext|> four".encode())
    ) == ["one\u2028two\u2029\x85three\n<|endoftext|> four"]
    rows = [
        r'{"text": "a\u0000b \ud83d\ude42 \u2028"}',
        json.dumps({"text": "long " * 400_000}),
        '{"text": "no end"}',
    ]
    assert read(write(tmp_path / "a.jsonl", "\r\n".join(rows).encode())) == [
        "a\0b 🙂 \u2028",
        "long " * 400_000,
        "no end",
    ]


@pytest.mark.parametrize("text", [r"\ud800", r"a \udc00 b", r"\ude42\ud83d"])
def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path, text):
    message = refusal(write(tmp_path / "a.jsonl", b'{"text": "fine"}\n{"text": "%s"}\n' % text.encode()))
    assert "a.jsonl, line 2 holds half a character" in message


@pytest.mark.parametrize(
    "broken", [b'{"text": "\xff"}', rb'{"text": "\ud800"}', b'{"text": "a\0"}'], ids=ascii
)
@pytest.mark.parametrize("streaming", [True, False])
def test_rows_of_a_local_dataset_without_text_give_one_line_of_error(
    tmp_path, monkeypatch, broken, streaming
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' * 3 + broken + b"\n")
    config = DataConfig(source="hf", dataset="json", path=str(path), streaming=streaming, val_docs=1)
    try:
        train, _ = load_dataset(config, 0)
        texts = train.take(10) if streaming else train
        "".join(texts).encode()  # what is read can be encoded
    except UserError as error:
        assert str(error).isprintable()


def test_a_million_empty_documents_are_left_out(tmp_path, monkeypatch):
    """Between two texts they are ignored; alone they are an error; and none is kept in memory."""
    marks = b"<|endoftext|>\n" * 1_000_000
    assert read(write(tmp_path / "a.txt", b"one\n" + marks + b"two")) == ["one", "two"]
    assert refusal(write(tmp_path / "b.txt", marks[:1_400_000])).startswith(
        f"{tmp_path / 'b.txt'} holds no text (1 file, 1400000 bytes)"
    )
    assert read(write(tmp_path / "c.jsonl", b'{"text": ""}\n' * 50_000 + b'{"text": "one"}')) == ["one"]
    assert "holds no text" in refusal(write(tmp_path / "d.jsonl", b'{"text": " "}\n' * 50_000))


@pytest.mark.parametrize("last", [b"", b'{"text": "one"}\n'])
def test_empty_rows_of_a_stream_are_left_out_and_a_stream_of_only_such_rows_is_refused(
    tmp_path, monkeypatch, last
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(tmp_path / "a.jsonl", b'{"text": "val"}\n' + b'{"text": ""}\n' * 20_000 + last)
    config = DataConfig(source="hf", dataset="json", path=str(path), streaming=True, val_docs=1)
    if last:
        assert load_dataset(config, 0)[0].take(5) == ["one"]
    else:
        with pytest.raises(UserError, match="no document is left to train on"):
            load_dataset(config, 0)


# ---- memory --------------------------------------------------------------------------------------


def test_text_larger_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", b"")
    os.truncate(path, 2**40)  # a terabyte that takes no room on the disk
    monkeypatch.setattr(hardware, "memory_total", lambda device: 24 * 2**30)
    message = refusal(path)
    assert (
        f"data.path={path}: 1,048,576 MB of text need at least 2,097,152 MB of memory, and there are "
        "24,576 MB" in message
    )
    assert "data.streaming=true" in message


def test_the_memory_is_no_more_than_a_container_or_a_ulimit_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(
        hardware, "CONTAINER_LIMIT_FILES", (str(tmp_path / "nowhere"), str(tmp_path / "limit"))
    )
    machine = hardware.memory_total("cpu")
    assert machine > 2**28
    for written, amount in (("max\n", machine), (f"{2**62}\n", machine), (f"{2**28}\n", 2**28)):
        (tmp_path / "limit").write_text(written)
        assert hardware.memory_total("cpu") == amount
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**27, resource.RLIM_INFINITY))
    assert hardware.memory_total("cpu") == 2**27


def test_running_out_of_memory_while_preparing_text_is_reported_in_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", b"text " * 100)
    config = validate_config(
        {
            "data": {"path": str(path)},
            "tokenizer": {"kind": "byte"},
            "training": {"max_steps": 1},
            "model": {"max_seq_len": 16},
        }
    )
    corpus = load_corpus(config)
    for part, work in (
        ("load_documents", lambda: load_corpus(config)),
        ("tokenize", lambda: pack_corpus(corpus, ByteTokenizer(), config)),
    ):
        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match=r"^the text is too large for the [0-9,]+ MB of memory") as caught,
        ):
            patch.setattr(data_module, part, lambda *args: np.empty(2**58))
            work()
        assert str(caught.value).isprintable()


MB = 2**20
SMALL = [
    "model.d_model=32",
    "model.n_layers=1",
    "training.micro_batch_size=2",
    "training.max_steps=1",
    "training.warmup_steps=0",
]


# The peak that the kernel counts since the program was loaded. The peak that wait4 reports includes the
# memory of the process that forked it.
TRAIN_AND_PRINT_PEAK = """
import sys, train
from support.cli import guarded
code = guarded(train.main, sys.argv[1:])
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("peak", peak)
sys.exit(code)
"""


def train_process(folder: Path, *overrides: str) -> tuple[int, str, int]:
    """(exit status, output, peak memory in bytes) of train.py with the smoke config and a very small
    model."""
    argv = ["--config", "config_smoke.yaml", "--device", "cpu", "--fresh"]
    for override in (*SMALL, "training.val_batches=1", f"checkpoint.dir={folder}", *overrides):
        argv += ["--override", override]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_AND_PRINT_PEAK, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPO,
    )
    peak = re.search(r"^peak (\d+)$", done.stdout, re.M)
    return done.returncode, done.stdout, int(peak[1]) * 1024 if peak else 0


def one_line(path: Path, size: int, before: bytes = b"", after: bytes = b"") -> Path:
    words = CORPUS.encode("ascii", "ignore").replace(b"\n", b" ").replace(b'"', b"'").replace(b"\\", b"/")
    return write(path, before + (words * (size // len(words) + 1))[:size] + after)


# For a moment memory holds the text and the two parts it is cut into: 2 bytes for each byte of text. Then it
# holds one part and the ids, 2 bytes each, and a quarter more while their row grows: 3.5 for `byte`, which
# has one token a byte, and less for the others. The library that reads a stream holds the row several times:
# as bytes, as a table and as text.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "multiple", "overrides"),
    [
        (200 * MB, 4, ["tokenizer.kind=byte"]),
        (200 * MB, 4, ["tokenizer.kind=gpt2"]),
        (32 * MB, 4, ["tokenizer.kind=bpe"]),
        (
            64 * MB,
            10,
            [
                "tokenizer.kind=byte",
                "data.source=hf",
                "data.dataset=json",
                "data.streaming=true",
                "data.val_docs=1",
            ],
        ),
    ],
    ids=["byte", "gpt2", "bpe", "stream"],
)
def test_a_single_line_of_hundreds_of_megabytes_trains_in_bounded_memory(tmp_path, size, multiple, overrides):
    """Compared with the same run on little text, because the memory of PyTorch and other libraries differs
    between versions."""
    peaks = {}
    for n_bytes in (MB // 10, size):
        if "data.dataset=json" in overrides:
            path = one_line(
                tmp_path / "a.jsonl", n_bytes, b'{"text": "%s"}\n{"text": "' % (b"val " * 200), b'"}\n'
            )
        else:
            path = one_line(tmp_path / "a.txt", n_bytes)
        code, said, peaks[n_bytes] = train_process(tmp_path / "run", f"data.path={path}", *overrides)
        assert code == 0, said
    base = peaks[MB // 10] + 400 * MB * (
        "tokenizer.kind=bpe" in overrides or "tokenizer.kind=gpt2" in overrides
    )
    assert peaks[size] < base + multiple * size, {
        n_bytes: f"{peak / MB:,.0f} MB" for n_bytes, peak in peaks.items()
    }


LITTLE = """
import os, resource, sys
import train
from support.cli import guarded
for extra in map(int, sys.argv[1].split(",")):
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + extra * 2**20, resource.RLIM_INFINITY))
    try:
        guarded(lambda: train.plan_or_answer(sys.argv[2:]))
    except SystemExit as stop:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(extra, stop.code, file=sys.stderr)
"""


@pytest.mark.slow
def test_a_process_with_too_little_memory_says_so_in_one_line(tmp_path):
    """At each stage: reading, cutting off validation, encoding."""
    path = one_line(tmp_path / "a.txt", 40 * MB)
    argv = [
        "--config",
        "config_smoke.yaml",
        "--override",
        f"data.path={path}",
        "--override",
        "tokenizer.kind=byte",
    ]
    argv += ["--override", f"checkpoint.dir={tmp_path / 'run'}", "--show-step", "1"]
    amounts = "30,60,110,1000"
    done = subprocess.run(
        [sys.executable, "-c", LITTLE, amounts, *argv], cwd=REPO, capture_output=True, text=True
    )
    said = done.stderr.splitlines()
    assert "Traceback" not in done.stderr, done.stderr
    assert [line.split() for line in said if not line.startswith("error")] == [
        ["30", "2"],
        ["60", "2"],
        ["110", "2"],
        ["1000", "0"],
    ]
    assert sum(line.startswith("error: the text is too large for the ") for line in said) == 3
