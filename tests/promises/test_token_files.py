"""Training on token files: the same samples as from text, exact resume, files of other programs, and
memory that does not grow with the file."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO

import eval_val
import prepare
import train
from data import PackedLMDataset
from support.config.read import load_config
from support.messages import UserError
from support.text import block_order
from support.text.block_order import permuted
from support.text.token_files import TokenFile, open_token_files
from tokenizer import ByteTokenizer, GPT2Tokenizer

BYTE = ByteTokenizer()
TEXT = "the quick brown fox jumps over the lazy dog, and then over the next one.\n" * 60


@pytest.fixture
def texts(tmp_path) -> Path:
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "val.txt").write_text(TEXT[:500])
    return tmp_path


@pytest.fixture
def folder(texts) -> Path:
    """The token files that prepare.py makes from these texts."""
    argv = [
        "--input",
        str(texts / "train.txt"),
        "--val-input",
        str(texts / "val.txt"),
        "--tokenizer",
        "byte",
        "--num-proc",
        "1",
    ]
    assert prepare.main(["tokens", *argv, "--output", str(texts / "tokens")]) == 0
    return texts / "tokens"


def tokens_of(path: Path | str, *words: str) -> tuple[str, ...]:
    return ("data.source=tokens", f"data.path={path}", "tokenizer.kind=byte", *words)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [(), ("data.stride=7",), ("training.seq_len=20", "data.document_mask=true")],
    ids=["blocks", "stride", "short, masked"],
)
def test_token_files_and_their_text_train_the_same_weights(run, folder, texts, tmp_path, words):
    from_text = run(
        tmp_path / "a",
        f"data.path={texts / 'train.txt'}",
        f"data.val_path={texts / 'val.txt'}",
        "tokenizer.kind=byte",
        *words,
    )
    from_tokens = run(tmp_path / "b", *tokens_of(folder), *words)
    assert from_tokens.sha256 == from_text.sha256
    assert [row["val_loss"] for row in from_tokens.val_rows] == [
        row["val_loss"] for row in from_text.val_rows
    ]


@pytest.mark.parametrize("in_memory", [2**22, 0], ids=["order drawn", "order computed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_on_token_files_is_exact(run, folder, tmp_path, monkeypatch, in_memory, workers):
    monkeypatch.setattr(block_order, "MOST_BLOCKS_STORED", in_memory)
    straight = run(tmp_path / "straight", *tokens_of(folder, "data.stride=5"))
    run(tmp_path / "cut", *tokens_of(folder, "data.stride=5", "training.max_steps=4"))
    resumed = run(
        tmp_path / "cut", *tokens_of(folder, "data.stride=5", f"hardware.num_workers={workers}"), "--resume"
    )
    assert "after step 4" in resumed.out
    assert resumed.sha256 == straight.sha256


def test_the_overrides_in_the_docs_replace_the_source_and_the_tokenizer_of_the_config(folder, capsys):
    """config.yaml streams Wikipedia with GPT-2's tokenizer; two overrides make it train on these files
    with their own tokenizer."""
    argv = [
        "--config",
        str(REPO / "config.yaml"),
        "--override",
        "data.source=tokens",
        "--override",
        f"data.path={folder}",
        "--device",
        "cpu",
    ]
    argv += [
        "--override",
        "model.max_seq_len=40",
        "--override",
        "training.max_steps=1",
        "--override",
        "training.warmup_steps=0",
    ]
    with pytest.raises(SystemExit) as end:
        train.main([*argv, "--show-step", "1"])
    said = capsys.readouterr()
    assert end.value.code == 0
    assert "the lazy dog" in said.out
    assert "tokenizer.kind=gpt2, but" in said.err
    with pytest.raises(UserError, match="dataset does not belong to source=tokens"):
        load_config(REPO / "config.yaml", ["data.source=tokens", f"data.path={folder}", "data.dataset=a/b"])


def test_the_run_records_the_tokenizer_of_the_files(run, folder, tmp_path):
    made = run(tmp_path / "run", "data.source=tokens", f"data.path={folder}")  # a config that asks for bpe
    assert made.checkpoint()["tiny_transformer"]["tokenizer"] == {"kind": "byte"}
    assert load_config(tmp_path / "run" / "run_config.yaml").tokenizer.kind == "byte"
    assert f"1 documents, {len(TEXT) + 1:,} tokens" in made.out


def test_scoring_token_files_gives_the_loss_that_training_logged(run, folder, tmp_path, capsys):
    """eval_val.py reads the files again; its bits per byte are those of the text."""
    made = run(tmp_path / "run", *tokens_of(folder))
    capsys.readouterr()
    eval_val.main(["--ckpt", str(made.folder / "final.ckpt"), "--json"])
    from_tokens = json.loads(capsys.readouterr().out)
    assert from_tokens["loss"] == pytest.approx(made.val_rows[-1]["val_loss"], rel=1e-5)
    eval_val.main(
        ["--ckpt", str(made.folder / "final.ckpt"), "--data", str(folder.parent / "val.txt"), "--json"]
    )
    from_text = json.loads(capsys.readouterr().out)
    assert {key: from_tokens[key] for key in ("loss", "bits_per_byte", "n_bytes", "n_documents")} == {
        key: from_text[key] for key in ("loss", "bits_per_byte", "n_bytes", "n_documents")
    }


def test_files_of_another_tokenizer_are_refused(run, folder, tmp_path, tiny_run, capsys):
    """On resume and for scoring, because the ids would mean other text."""
    made = run(tmp_path / "run", *tokens_of(folder, "training.max_steps=4"))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer": GPT2Tokenizer().to_dict()}))
    with pytest.raises(
        UserError, match=r"another tokenizer \(gpt2, 50,257 tokens\) than the model's \(byte, 257 tokens\)"
    ):
        eval_val.main(["--ckpt", str(made.folder / "final.ckpt")])
    with pytest.raises(UserError, match=r"tokenizer\.kind was 'byte' and is now 'gpt2'"):
        run(
            tmp_path / "run",
            "data.source=tokens",
            f"data.path={folder}",
            f"--resume={made.folder / 'final.ckpt'}",
        )


def test_other_tokens_are_refused_on_resume(run, folder, tmp_path):
    run(tmp_path / "run", *tokens_of(folder, "training.max_steps=4"))
    row = np.load(folder / "train.npy")
    row[3] += 1
    np.save(folder / "train.npy", row)
    with pytest.raises(UserError, match="the training text has changed"):
        run(tmp_path / "run", *tokens_of(folder), "--resume")


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", ">u2", "uint8"])
def test_arrays_of_other_programs_are_read_with_any_integer_type(run, tmp_path, dtype):
    np.save(tmp_path / "t.npy", np.frombuffer(TEXT.encode(), np.uint8).astype(dtype))
    files = open_token_files(str(tmp_path / "t.npy"), val_fraction=0.25)
    files.check(BYTE)
    assert BYTE.decode(files.train[:].tolist()) + BYTE.decode(files.val[:].tolist()) == TEXT
    assert len(files.val) == len(TEXT) - int(len(TEXT) * 0.75)


def test_raw_uint16_files_of_other_programs_are_read(run, tmp_path):
    """train.bin and val.bin in a folder, or named one by one. They train the same weights as .npy files."""
    ids = np.array([*TEXT.encode(), BYTE.eos_id], "<u2")
    for name, row in (("train", ids), ("val", ids[:300])):
        row.tofile(tmp_path / f"{name}.bin")
        np.save(tmp_path / f"{name}-as.npy", row)
    ways = [
        (tmp_path, "data.dtype=uint16"),
        (tmp_path / "train.bin", f"data.val_path={tmp_path / 'val.bin'}", "data.dtype=uint16"),
        (tmp_path / "train-as.npy", f"data.val_path={tmp_path / 'val-as.npy'}"),
    ]
    runs = [run(tmp_path / f"run{n}", *tokens_of(*way)) for n, way in enumerate(ways)]
    assert runs[0].sha256 == runs[1].sha256 == runs[2].sha256


def large_id(folder: Path) -> None:
    np.save(folder / "x.npy", np.array([1, 2, 700] * 100, np.uint16))


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (
            lambda f: (f / "x.bin").write_bytes(b"abcd" * 99),
            ("x.bin",),
            r"does not say what it holds; add --override data\.dtype=uint16",
        ),
        (
            lambda f: (f / "x.bin").write_bytes(b"abc" * 99),
            ("x.bin", "data.dtype=uint16"),
            r"297 bytes, and one uint16 takes 2, which leaves a rest",
        ),
        (lambda f: np.save(f / "x.npy", np.zeros((3, 4), int)), ("x.npy",), r"int64 in the shape \(3, 4\)"),
        (lambda f: np.save(f / "x.npy", np.zeros(30)), ("x.npy",), "float64"),
        (lambda f: (f / "x.npy").write_bytes(b"hello"), ("x.npy",), r"not a \.npy file of numpy"),
        (
            lambda f: (np.save(f / "x.npy", np.zeros(999, int)), os.truncate(f / "x.npy", 4000)),
            ("x.npy",),
            "should hold 999 tokens and ends before",
        ),
        (
            lambda f: np.save(f / "x.npy", np.zeros(999, np.uint16)),
            ("x.npy", "data.dtype=uint32"),
            "holds uint16",
        ),
        (large_id, ("x.npy",), r"holds the id 700, and the tokenizer has ids 0 to 256"),
        (lambda f: np.save(f / "x.npy", np.array([5, -1] * 99)), ("x.npy",), "holds the id -1"),
        (
            lambda f: np.save(f / "x.npy", np.zeros(34, np.uint16)),
            ("x.npy",),
            r"fewer than one block of seq_len \+ 1",
        ),
        (lambda f: np.save(f / "x.npy", np.zeros(0, np.uint16)), ("x.npy",), "no tokens to validate on"),
        (
            lambda f: np.save(f / "x.npy", np.zeros(999, np.uint16)),
            ("x.npy", "tokenizer.kind=bpe"),
            "bpe would have to be trained on a text",
        ),
        (
            lambda f: np.save(f / "x.npy", np.zeros(999, np.uint16)),
            ("x.npy", "data.val_path=no.npy"),
            r"data\.val_path=no\.npy: no such file",
        ),
        (lambda f: (f / "x.txt").write_text("text"), ("x.txt",), r"is not a token file \(\.npy, \.bin\)"),
        (lambda f: (f / "x").mkdir(), ("x",), r"no train\.npy or train\.bin there"),
        (lambda f: None, ("x",), "does not exist; python3 prepare.py tokens"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_with_a_reason(run, tmp_path, make, words, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "run", *tokens_of(tmp_path / words[0], *words[1:]))
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("damage", ["{", "[]", '{"format_version": 1}', '{"format_version": 9}', "null"])
def test_a_damaged_meta_json_is_refused(folder, damage):
    (folder / "meta.json").write_text(damage)
    with pytest.raises(UserError, match="make the folder again"):
        open_token_files(str(folder))


def test_a_file_of_another_size_than_its_meta_json_says_is_refused(folder):
    np.save(folder / "val.npy", np.load(folder / "val.npy")[:-1])
    with pytest.raises(UserError, match=r"has 500 tokens, and .*meta\.json says 501"):
        open_token_files(str(folder))


def test_a_wrong_id_outside_the_samples_is_refused_when_it_is_read(tmp_path):
    """Otherwise it would be an IndexError on a CPU, and on a GPU a device-side assert that names nothing."""
    row = np.zeros(3_000_000, np.uint16)
    file_samples = TokenFile(save(tmp_path / "x.npy", row))
    starts = np.linspace(0, len(row) - 4096, 256, dtype=np.int64)
    place = next(i for i in range(5000, len(row)) if not ((starts <= i) & (i < starts + 4096)).any())
    row[place] = 9999
    save(tmp_path / "x.npy", row)
    file_samples.vocab_size = 257
    file_samples.samples()
    blocks = PackedLMDataset(file_samples, 100)
    blocks.batch([0, 1])
    with pytest.raises(UserError, match="holds the id 9999"):
        blocks.batch([place // 100])


def save(path: Path, row: np.ndarray) -> Path:
    np.save(path, row)
    return path


def test_a_part_of_a_file_is_indexed_like_the_array(tmp_path):
    row = np.random.default_rng(0).integers(0, 60_000, 1000).astype(np.uint16)
    file = TokenFile(save(tmp_path / "x.npy", row)).part(100, 900).part(10, 700)
    array = row[100:900][10:700]
    index = np.random.default_rng(1).integers(0, len(array), (5, 7))
    assert len(file) == len(array)
    assert np.array_equal(file[index], array[index])
    assert np.array_equal(file[3:50], array[3:50])


def test_documents_and_bytes_are_counted_by_decoding(tmp_path, monkeypatch):
    texts = ["日本語 text " * n for n in range(40)]
    for tokenizer in (BYTE, GPT2Tokenizer()):
        ids = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.eos_id)]
        file = TokenFile(save(tmp_path / "x.npy", np.array(ids, np.uint16)))
        first = len(tokenizer.decode(ids[:1]).replace("<|endoftext|>", "").encode())
        for size in (2**16, 50, 7):
            monkeypatch.setattr("support.text.token_files.DECODE_TOKENS", size)
            assert file.count(tokenizer) == (40, sum(len(text.encode()) for text in texts) - first)


# ---- order and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_the_computed_order_is_a_permutation(n):
    orders = [[permuted(i, n, key) for i in range(n)] for key in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 64:
        assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_the_computed_order_looks_random():
    """Neighbours are separated, and each quarter of the order visits each quarter of the blocks about
    equally often."""
    n = 2**14 - 5
    order = np.array([permuted(i, n, (42, 3)) for i in range(n)])
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03
    assert (np.abs(np.diff(order)) < n / 100).mean() < 0.03
    counts = np.array([np.histogram(part, 4, (0, n))[0] for part in np.array_split(order, 4)])
    assert np.abs(counts - n / 16).max() < 5 * (n / 16) ** 0.5


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up in /proc")
def test_memory_stays_flat_on_a_file_larger_than_memory(tmp_path):
    """1,000 steps spread over 16 GB take no more than 100 over 1 GB. (A sparse file: it takes no room on
    the disk.)"""
    code = """
import re, sys
import numpy as np
from data import IndexedSteps, PackedLMDataset, StepShape
from support.text.token_files import TokenFile
path, gigabytes, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(path, "wb") as file:
    file.truncate(gigabytes << 30)
blocks = PackedLMDataset(TokenFile(path, "uint16"), 256)
steps = IndexedSteps(blocks, StepShape(8, 2), 1, True, n)
def rss():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
before = rss()
for i in range(0, n):
    steps[i]
print(rss() - before)
"""
    grown = []
    for gigabytes, n in ((1, 100), (16, 1000)):
        found = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "big.bin"), str(gigabytes), str(n)],
            cwd=REPO,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stderr
        grown.append(int(found.stdout))
    assert grown[1] < grown[0] + 40, grown


def test_file_endings_of_token_files_ignore_case(folder, tmp_path):
    (tmp_path / "copy").mkdir()
    for name in ("train", "val"):
        (tmp_path / "copy" / f"{name.upper()}.NPY").write_bytes((folder / f"{name}.npy").read_bytes())
    files, before = open_token_files(str(tmp_path / "copy")), open_token_files(str(folder))
    assert np.array_equal(files.train[:], before.train[:]) and np.array_equal(files.val[:], before.val[:])
    assert len(open_token_files(str(tmp_path / "copy" / "VAL.NPY")).train) < len(files.val)
