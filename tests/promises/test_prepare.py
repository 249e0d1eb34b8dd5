"""prepare.py: token files are the ids of the text, whoever encodes them and however often that is
interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from loopback_hub import LoopbackHub, dataset_card, parquet

import prepare
import tokenizer as tokenizer_module
from support.messages import UserError
from support.text.encode_corpus import document_pieces, encode_pieces
from support.text.make_token_files import Source, choose_cut, cut_shards, divided, draws
from tokenizer import EOS_TEXT, ByteTokenizer, FileTokenizer, GPT2Tokenizer

BYTE = ByteTokenizer()
STORIES = [
    f"Story {n}.\n\nThe fox number {n} met {'a hen and ' * (n * 5 % 9)}a dog. Ünïcode {n}!" for n in range(40)
]


@pytest.fixture
def library(tmp_path) -> Path:
    """The stories over four kinds of files, in the order of their names; one document that is long, and
    blank ones."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "a.txt").write_text(
        "\n" + f"\n{EOS_TEXT}\n".join([*STORIES[:10], "  \n", "long " * 3000]) + "\n", encoding="utf-8"
    )
    (folder / "b.txt").write_bytes(STORIES[10].encode())
    (folder / "c.jsonl").write_text(
        "".join(json.dumps({"text": story}) + "\n\n" for story in [*STORIES[11:20], " "])
    )
    (folder / "d.parquet").write_bytes(parquet(STORIES[20:]))
    return folder


def documents(library: Path) -> list[str]:
    return [STORIES[0], *STORIES[1:10], "long " * 3000, *STORIES[10:]]


def tokens(output: Path, *words: str) -> dict:
    """Run prepare.py tokens in this process; what meta.json says."""
    assert prepare.main(["tokens", "--output", str(output), *words]) == 0
    return json.loads((output / "meta.json").read_text())


def parts(output: Path) -> tuple[np.ndarray, np.ndarray]:
    return np.load(output / "train.npy"), np.load(output / "val.npy")


def by_document(row: np.ndarray, eos_id: int) -> list[tuple[int, ...]]:
    return [tuple(ids.tolist()) for ids in np.split(row, np.flatnonzero(row == eos_id) + 1)[:-1]]


@pytest.mark.parametrize("kind", ["byte", "gpt2"])
def test_token_files_hold_every_document_once_in_order(library, tmp_path, kind):
    tokenizer = {"byte": BYTE, "gpt2": GPT2Tokenizer()}[kind]
    meta = tokens(
        tmp_path / "out",
        "--input",
        str(library),
        "--tokenizer",
        kind,
        "--num-proc",
        "1",
        "--shard-chars",
        "5000",
    )
    train, val = parts(tmp_path / "out")
    expected = [(*tokenizer.encode(text), tokenizer.eos_id) for text in documents(library)]
    long = max(expected, key=len)  # most of the text, so its end is held out
    [begun] = [ids for ids in by_document(train, tokenizer.eos_id) if len(ids) > len(long) / 2]
    whole = [ids for ids in by_document(val, tokenizer.eos_id) if ids in set(expected)]
    [end] = [ids for ids in by_document(val, tokenizer.eos_id) if ids not in set(expected)]
    assert begun[:-1] + end == long
    assert sorted(by_document(train, tokenizer.eos_id) + whole + [long]) == sorted([*expected, begun])
    assert [ids for ids in expected if ids in set(by_document(train, tokenizer.eos_id))] == [
        ids for ids in by_document(train, tokenizer.eos_id) if ids != begun
    ], "in their order"
    assert train[-1] == val[-1] == tokenizer.eos_id
    assert train.dtype == np.uint16
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == (len(train), len(val))
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(expected) + 1
    assert meta["bytes"] == sum(len(text.encode()) for text in documents(library))
    assert not (tmp_path / "out" / ".shards").exists()


def test_processes_and_shards_change_nothing(library, tmp_path):
    rows = []
    for words in (
        ("--num-proc", "1"),
        ("--num-proc", "2", "--shard-chars", "700"),
        ("--num-proc", "1", "--shard-chars", "1"),
    ):
        output = tmp_path / str(len(rows))
        tokens(output, "--input", str(library), "--tokenizer", "byte", *words)
        rows.append([row.tobytes() for row in parts(output)])
    assert rows[0] == rows[1] == rows[2]


def test_the_seed_draws_what_is_held_out(library, tmp_path):
    flags = ("--input", str(library), "--tokenizer", "byte", "--num-proc", "1", "--val-fraction", "0.2")
    held = []
    for seed in ("1", "1", "2"):
        output = tmp_path / str(len(held))
        meta = tokens(output, *flags, "--seed", seed)
        held.append(parts(output)[1].tobytes())
        assert 0.2 <= meta["val"]["tokens"] / (meta["val"]["tokens"] + meta["train"]["tokens"]) < 0.4
    assert held[0] == held[1] != held[2]
    assert len(np.unique(draws(0, 100_000, 7))) == 100_000
    assert np.array_equal(draws(5000, 9000, 7), draws(0, 20_000, 7)[5000:14_000])


@pytest.mark.parametrize("text", ["word " * 400, "日本語" * 300], ids=["words", "three bytes a character"])
def test_of_a_single_document_the_end_is_held_out_and_no_character_is_cut(tmp_path, text):
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    for n, chars in enumerate(("10000", "37")):
        tokens(
            tmp_path / f"out{n}",
            "--input",
            str(tmp_path / "one.txt"),
            "--tokenizer",
            "byte",
            "--num-proc",
            "1",
            "--shard-chars",
            chars,
        )
        train, val = parts(tmp_path / f"out{n}")
        assert BYTE.decode(train[:-1].tolist()) + BYTE.decode(val[:-1].tolist()) == text
        assert train[-1] == val[-1] == BYTE.eos_id
        assert len(val) / (len(train) + len(val)) == pytest.approx(0.1, abs=0.01)


LONG = {
    "a book beside two notes": [6000, 150, 150],
    "two books beside notes": [3000, 100, 2600, *[60] * 20],
    "six chapters": [1000, 1100, 900, 1200, 800, 1000],
    "many notes": [*range(80, 120), 500],
}


@pytest.mark.parametrize("name", LONG)
def test_about_nine_tenths_are_trained_on_whatever_the_seed_and_the_shards(tmp_path, name, monkeypatch):
    """By shards that are far shorter than a document, and longer than all; no text is on both sides, and
    none is lost."""
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 23)
    texts = [
        "".join(chr(0x4E00 + 251 * i + j % 250) for j in range(length)) for i, length in enumerate(LONG[name])
    ]
    for seed in range(10):
        found = set()
        for chars in (50, 100_000):
            for old in tmp_path.glob("*.npy"):
                old.unlink()
            for n, (pieces, begins) in enumerate(cut_shards(document_pieces(texts, BYTE), BYTE, chars)):
                np.save(tmp_path / f"train-{n:06}.npy", encode_pieces(pieces, BYTE, begins))
            cut = choose_cut(
                tmp_path, len(texts), sum(len(text.encode()) + 1 for text in texts), 0.1, seed, BYTE.eos_id
            )
            train, val = map(np.concatenate, zip(*divided(tmp_path, cut, seed, BYTE), strict=True))
            found.add((train.tobytes(), val.tobytes()))
        assert len(found) == 1
        assert 0.8 <= len(train) / (len(train) + len(val)) <= 0.95
        sides = [BYTE.decode(row.tolist()).split(EOS_TEXT)[:-1] for row in (train, val)]
        assert "\ufffd" not in "".join(sides[0] + sides[1]), "no character is cut"
        begun = {
            text[0]: text for text in sides[0]
        }  # a document is known by its first character, or by where its characters lie
        for text in sides[1]:
            first = chr(ord(text[0]) - (ord(text[0]) - 0x4E00) % 251)
            assert begun.pop(first, "") + text == texts[(ord(first) - 0x4E00) // 251]
        assert all(text == texts[(ord(first) - 0x4E00) // 251] for first, text in begun.items())


def test_validation_text_of_its_own(library, tmp_path):
    (tmp_path / "val.txt").write_text("never trained on")
    tokens(
        tmp_path / "out",
        "--input",
        str(library / "b.txt"),
        "--val-input",
        str(tmp_path / "val.txt"),
        "--tokenizer",
        "byte",
        "--num-proc",
        "1",
    )
    train, val = parts(tmp_path / "out")
    assert (BYTE.decode(train.tolist()), BYTE.decode(val.tolist())) == (
        STORIES[10] + EOS_TEXT,
        "never trained on" + EOS_TEXT,
    )


def test_a_vocabulary_beyond_16_bits_takes_32(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("some text to read")
    source = Source([tmp_path / "t.txt"])
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 2**16 + 1)
    ((pieces, begins),) = cut_shards(source.parts(), BYTE, 1000)
    assert encode_pieces(pieces, BYTE, begins).dtype == np.uint32


# ---- tokenizers ----------------------------------------------------------------------------------


def test_the_issue_in_one_go(library, tmp_path, capsys):
    """A tokenizer, token files by it; what is said of both."""
    made = tmp_path / "t" / "tokenizer.json"
    assert (
        prepare.main(
            [
                "tokenizer",
                "--input",
                str(library / "*.txt"),
                str(library / "c.jsonl"),
                "--vocab-size",
                "300",
                "--output",
                str(made),
            ]
        )
        == 0
    )
    assert f"{made}: bpe, 300 tokens" in capsys.readouterr().out
    tokenizer = FileTokenizer.from_file(made)
    meta = tokens(
        tmp_path / "t", "--input", str(library / "*.txt"), "--tokenizer", str(made), "--num-proc", "1"
    )
    said = capsys.readouterr().out
    assert tokenizer.decode(parts(tmp_path / "t")[0].tolist()).count(EOS_TEXT) == meta["train"]["documents"]
    texts = [text for _, text, _ in meta["longest_tokens"]]
    assert len(texts) == 10
    assert len(texts[0]) == max(
        len(tokenizer.decode([i]))
        for row in parts(tmp_path / "t")
        for i in np.unique(row)
        if i != tokenizer.eos_id
    )
    assert f"{meta['bytes_per_token']:.2f} bytes per token" in said
    assert "0 unknown" in said
    assert repr(texts[0]) in said


def test_a_char_tokenizer_knows_every_character_and_refuses_others(library, tmp_path):
    made = tmp_path / "chars.json"
    assert (
        prepare.main(
            ["tokenizer", "--kind", "char", "--input", str(library / "a.txt"), "--output", str(made)]
        )
        == 0
    )
    tokenizer = FileTokenizer.from_file(made)
    text = "".join(STORIES[:10])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    (tmp_path / "other.txt").write_text("a snowman: ☃")
    with pytest.raises(UserError, match="cannot encode the text"):
        tokens(
            tmp_path / "out",
            "--input",
            str(tmp_path / "other.txt"),
            "--tokenizer",
            str(made),
            "--num-proc",
            "1",
        )


def test_unknown_tokens_are_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([EOS_TEXT])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text("the cat sat on the mat today and the dog did not\n" * 4)
    meta = tokens(
        tmp_path / "out", "--input", str(tmp_path / "t.txt"), "--tokenizer", str(tmp_path), "--num-proc", "1"
    )
    assert meta["unknown"] == 4 * 8


def test_a_checkpoint_lends_its_tokenizer(tiny_run, library, tmp_path):
    meta = tokens(
        tmp_path / "out",
        "--input",
        str(library / "a.txt"),
        "--tokenizer",
        str(tiny_run.folder / "final.ckpt"),
        "--num-proc",
        "1",
    )
    assert (meta["tokenizer"]["kind"], meta["train"]["documents"] + meta["val"]["documents"]) == ("bpe", 12)


# ---- interrupted ---------------------------------------------------------------------------------


def start(output: Path, *words: str, **options) -> subprocess.Popen:
    """prepare.py as a process, in a group of its own."""
    argv = [sys.executable, "prepare.py", "tokens", "--tokenizer", "byte", "--output", str(output), *words]
    return subprocess.Popen(
        argv,
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def group_is_gone(pgid: int) -> bool:
    """No process of the group is alive; a zombie nobody collects is not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pgid and fields[0] != "Z":
            return False
    return True


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """12 MB: some seconds of work, by shards of 20,000 characters."""
    path = tmp_path_factory.mktemp("corpus") / "c.txt"
    path.write_text(
        f"\n{EOS_TEXT}\n".join(
            f"{n} " + "It was a dark and stormy night. " * (n % 50 * 8) for n in range(2000)
        )
    )
    return path


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=lambda s: s.name,
)
def test_a_stopped_preparation_goes_on_to_the_same_bytes(corpus, tmp_path, signum):
    flags = ("--input", str(corpus), "--shard-chars", "20000", "--num-proc", "2")
    output, shards = tmp_path / "out", tmp_path / "out" / ".shards"
    process = start(output, *flags)
    wait_for(lambda: process.poll() is not None or len(list(shards.glob("*.json"))) > 40)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # a terminal sends it to all of them
    else:
        process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if signum == signal.SIGINT else -signum), err
    assert "Traceback" not in err
    wait_for(lambda: group_is_gone(process.pid))
    assert not (output / "meta.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in shards.glob("train-*.json")}
    with pytest.raises(UserError, match="unfinished preparation"):
        from support.text.token_files import open_token_files

        open_token_files(str(output))
    again = start(output, *flags, "--num-proc", "1")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert f"resuming: {len(kept)} shards are there already" in err
    tokens(tmp_path / "straight", *flags[:2], "--tokenizer", "byte", "--num-proc", "1")
    assert [row.tobytes() for row in parts(output)] == [row.tobytes() for row in parts(tmp_path / "straight")]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_a_worker_that_is_killed_is_told_and_nothing_is_lost(corpus, tmp_path):
    process = start(tmp_path / "out", "--input", str(corpus), "--shard-chars", "20000", "--num-proc", "1")
    wait_for(lambda: len(list((tmp_path / "out" / ".shards").glob("*.json"))) > 20)
    children = [
        int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    worker = next(pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process has ended" in err
    assert "Traceback" not in err


def unfinished(output: Path, library: Path, monkeypatch) -> tuple[str, ...]:
    """A folder whose shards are all there, but not joined; the flags that made it."""
    flags = ("--input", str(library), "--tokenizer", "byte", "--num-proc", "1", "--shard-chars", "700")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "join_shards", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            tokens(output, *flags)
    return flags


def test_what_is_done_is_not_done_again(library, tmp_path, monkeypatch):
    flags = unfinished(tmp_path / "out", library, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".shards").glob("train-*")}
    assert len(before) > 10, len(before)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "rmtree", lambda *args, **kwargs: None)
        tokens(tmp_path / "out", *flags)
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".shards").glob("train-*")
    } == before


@pytest.mark.parametrize("change", ["a word", "shorter", "tokenizer", "field"])
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_another_text_or_tokenizer_is_refused_not_mixed(library, tmp_path, monkeypatch, change, finished):
    output = tmp_path / "out"
    flags = list(unfinished(output, library, monkeypatch))
    if finished:
        tokens(output, *flags)
        before = (output / "train.npy").read_bytes()
    if change == "a word":
        (library / "b.txt").write_text("another")
    elif change == "shorter":
        (library / "d.parquet").unlink()
    elif change == "tokenizer":
        flags[flags.index("byte")] = "gpt2"
    else:
        flags += ["--text-field", "title"]
    with pytest.raises(UserError, match=r"--fresh") as error:
        tokens(output, *flags)
    assert {"tokenizer": "--tokenizer was byte", "field": "--text-field was text and is now title"}.get(
        change, "text has changed"
    ) in str(error.value)
    if finished:
        assert (output / "train.npy").read_bytes() == before
    if change != "field":
        assert tokens(output, *flags, "--fresh")["train"]["documents"] > 0


def test_a_finished_folder_is_left_as_it_is(library, tmp_path, capsys):
    flags = ("--input", str(library), "--tokenizer", "byte", "--num-proc", "1")
    tokens(tmp_path / "out", *flags)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*")}
    capsys.readouterr()
    tokens(tmp_path / "out", *flags)
    assert "is up to date: nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*")} == before


def test_two_at_once_in_one_folder_are_one_too_many(library, tmp_path):
    from support.files.atomic import claim_folder

    lock = claim_folder(tmp_path / "out")
    with pytest.raises(UserError, match=r"another run is writing to .*by --output "):
        tokens(tmp_path / "out", "--input", str(library), "--tokenizer", "byte")
    lock.release()


# ---- the hub -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_streamed_and_gone_on_with_where_it_was(tmp_path):
    """Killed and started again: the shards are the same, and what was done is not read again."""
    stories = [f"Story {n}: " + "the moon rose again. " * (n % 7 * 30) for n in range(300)]
    files = {f"data/train-{k}.parquet": parquet(stories[k * 50 : k * 50 + 50]) for k in range(5)} | {
        "data/val.parquet": parquet(stories[250:])
    }
    files["README.md"] = dataset_card(
        {"default": {"train": "data/train-*.parquet", "validation": "data/val.parquet"}}
    )
    flags = (
        "--dataset",
        "some/stories",
        "--val-split",
        "validation",
        "--shard-chars",
        "4000",
        "--num-proc",
        "1",
    )
    rows = []
    with LoopbackHub("some/stories", files) as hub:
        for name in ("straight", "stopped"):
            env = {key: value for key, value in os.environ.items() if "OFFLINE" not in key} | hub.environment(
                tmp_path / name
            )
            output = tmp_path / name / "out"
            if name == "stopped":
                process = start(output, *flags, env=env)
                wait_for(lambda output=output: len(list((output / ".shards").glob("train-*.json"))) > 15)
                process.kill()
                process.communicate()
            process = start(output, *flags, env=env)
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            rows.append([row.tobytes() for row in parts(output)])
        train, val = parts(output)
    assert rows[0] == rows[1]
    assert BYTE.decode(train.tolist()) == "".join(story + EOS_TEXT for story in stories[:250])
    assert BYTE.decode(val.tolist()) == "".join(story + EOS_TEXT for story in stories[250:])


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["tokens", "--input", "nowhere/*.txt", "--tokenizer", "byte", "--output", "o"],
            r"--input=nowhere/\*.txt: no .txt, .jsonl or .parquet file",
        ),
        (
            ["tokens", "--input", "t.txt", "--tokenizer", "nope.json", "--output", "o"],
            "--tokenizer nope.json: no such file",
        ),
        (
            ["tokens", "--input", "empty.txt", "--tokenizer", "byte", "--output", "o"],
            "there is no text to train on",
        ),
        (
            ["tokens", "--input", "t.txt", "--tokenizer", "byte", "--output", "t.txt"],
            "--output t.txt is a file",
        ),
        (
            ["tokens", "--input", "t.txt", "--tokenizer", "byte", "--output", "o", "--num-proc", "0"],
            "--num-proc 0 must be at least 1",
        ),
        (
            ["tokens", "--input", "t.txt", "--tokenizer", "byte", "--output", "o", "--val-fraction", "1.5"],
            "--val-fraction 1.5 must be between",
        ),
        (
            ["tokens", "--input", "t.txt", "--tokenizer", "byte", "--output", "o", "--val-split", "test"],
            "--val-split goes with --dataset",
        ),
        (["tokens", "--input", "binary.txt", "--tokenizer", "byte", "--output", "o"], "NUL byte at offset 2"),
        (["tokens", "--input", "bad.parquet", "--tokenizer", "byte", "--output", "o"], "is no parquet file"),
        (
            ["tokens", "--input", "r.jsonl", "--tokenizer", "byte", "--output", "o"],
            r"line 1 has no text in field 'text' \(fields: body\)",
        ),
        (["tokenizer", "--input", "t.txt", "--output", "t.txt"], "--output t.txt is there already"),
        (
            ["tokenizer", "--input", "t.txt", "--vocab-size", "12", "--output", "x.json"],
            "vocab_size=12 is too small",
        ),
        (
            ["tokenizer", "--dataset", "a/b", "--kind", "char", "--output", "x.json"],
            "--kind char needs all of the text",
        ),
        (["tokens", "--dataset", "a/b", "--tokenizer", "byte", "--output", "o"], "--dataset a/b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_answered_in_words(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("a text of a few words")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "binary.txt").write_bytes(b"ab\0\xff")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "r.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match=message) as error:
        prepare.main(
            words + (["--num-proc", "1"] if words[0] == "tokens" and "--num-proc" not in words else [])
        )
    assert len(str(error.value).splitlines()) <= 3


def test_prepare_needs_no_torch():
    """It starts in a fraction of the time, and each of its processes takes a fraction of the memory."""
    code = "import sys, prepare; print({'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up in /proc")
def test_a_long_document_takes_little_memory(tmp_path):
    """One line of 48 MB without an end, against 12 MB: no process takes a third of the difference more."""
    peaks = []
    for megabytes in (12, 48):
        (tmp_path / "line.txt").write_text("all work and no play " * (megabytes * 50_000))
        code = f"""
import re, resource, sys, prepare
if __name__ == "__main__":
    prepare.main(["tokens", "--input", r"{tmp_path / "line.txt"}", "--tokenizer", "byte", "--output", r"{tmp_path / str(megabytes)}",
                  "--shard-chars", "1000000", "--num-proc", "1"])
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())  # since the program was loaded
    print(int(peak[1]) // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""
        (tmp_path / "run.py").write_text(code)
        found = subprocess.run(
            [sys.executable, str(tmp_path / "run.py")],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPO)},
            cwd=tmp_path,
        )
        peaks.append([int(value) for value in found.stdout.splitlines()[-1].split()])
    for small, large in zip(*peaks, strict=True):
        assert large - small < 36 / 3, peaks
