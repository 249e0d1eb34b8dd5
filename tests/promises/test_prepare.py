"""prepare.py: token files hold the ids of the text, whichever processes encode it and however often they are
stopped."""

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
from support.messages import UserError
from tokenizer import EOS_TEXT, ByteTokenizer, FileTokenizer, GPT2Tokenizer

BYTE = ByteTokenizer()
STORIES = [
    f"Story {n}.\n\nThe fox number {n} met {'a hen and ' * (n * 5 % 9)}a dog. Ünïcode {n}!" for n in range(40)
]
LONG_DOCUMENT = "long " * 3000


@pytest.fixture
def library(tmp_path) -> Path:
    """The stories and one long document in four files of three kinds, with blank documents among them."""
    folder = tmp_path / "library"
    folder.mkdir()
    in_text_file = [*STORIES[:10], "  \n", LONG_DOCUMENT]
    text = "\n" + f"\n{EOS_TEXT}\n".join(in_text_file) + "\n"
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "b.txt").write_bytes(STORIES[10].encode())
    rows = [json.dumps({"text": story}) + "\n\n" for story in [*STORIES[11:20], " "]]
    (folder / "c.jsonl").write_text("".join(rows))
    (folder / "d.parquet").write_bytes(parquet(STORIES[20:]))
    return folder


# The documents of the library, in the order of its files.
DOCUMENTS = [*STORIES[:10], LONG_DOCUMENT, *STORIES[10:]]


def flags_for(text: Path, tokenizer: object = "byte") -> list[str]:
    """Flags that encode this text with one process."""
    return ["--input", str(text), "--tokenizer", str(tokenizer), "--num-proc", "1"]


def tokens(output: Path, *flags: str) -> dict:
    """Run `prepare.py tokens` in this process. Returns what meta.json says."""
    assert prepare.main(["tokens", "--output", str(output), *flags]) == 0
    return json.loads((output / "meta.json").read_text())


def parts(output: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ids of train.npy and of val.npy."""
    return np.load(output / "train.npy"), np.load(output / "val.npy")


def part_bytes(output: Path) -> list[bytes]:
    return [row.tobytes() for row in parts(output)]


def by_document(row: np.ndarray, eos_id: int) -> list[tuple[int, ...]]:
    """The ids of each document in the row, with its EOS."""
    return [tuple(ids.tolist()) for ids in np.split(row, np.flatnonzero(row == eos_id) + 1)[:-1]]


# ---- token files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte", "gpt2"])
def test_token_files_hold_every_document_once_in_order(library, tmp_path, kind):
    tokenizer = {"byte": BYTE, "gpt2": GPT2Tokenizer()}[kind]
    meta = tokens(tmp_path / "out", *flags_for(library, kind), "--shard-chars", "5000")
    train, val = parts(tmp_path / "out")
    in_train, in_val = (by_document(row, tokenizer.eos_id) for row in (train, val))
    expected = [(*tokenizer.encode(text), tokenizer.eos_id) for text in DOCUMENTS]

    # The long document is most of the text, so it is cut, and its end is held out.
    long = max(expected, key=len)
    [first_part] = [ids for ids in in_train if len(ids) > len(long) / 2]
    [second_part] = [ids for ids in in_val if ids not in set(expected)]
    assert first_part[:-1] + second_part == long

    whole_in_val = [ids for ids in in_val if ids in set(expected)]
    assert sorted(in_train + whole_in_val + [long]) == sorted([*expected, first_part])
    whole_in_train = [ids for ids in in_train if ids != first_part]
    assert [ids for ids in expected if ids in set(in_train)] == whole_in_train, "in their order"

    assert train[-1] == val[-1] == tokenizer.eos_id
    assert train.dtype == np.uint16
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == (len(train), len(val))
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(expected) + 1
    assert meta["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert not (tmp_path / "out" / ".shards").exists()


def test_processes_and_shards_change_nothing(library, tmp_path):
    found = []
    for n_workers, shard_chars in (("1", "16777216"), ("2", "700"), ("1", "1")):
        output = tmp_path / str(len(found))
        tokens(output, *flags_for(library), "--num-proc", n_workers, "--shard-chars", shard_chars)
        found.append(part_bytes(output))
    assert found[0] == found[1] == found[2]


def test_the_seed_draws_what_is_held_out(library, tmp_path):
    held = []
    for seed in ("1", "1", "2"):
        output = tmp_path / str(len(held))
        meta = tokens(output, *flags_for(library), "--val-fraction", "0.2", "--seed", seed)
        held.append(parts(output)[1].tobytes())
        assert 0.2 <= meta["val"]["tokens"] / (meta["val"]["tokens"] + meta["train"]["tokens"]) < 0.4
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize("text", ["word " * 400, "日本語" * 300], ids=["words", "three bytes a character"])
def test_of_a_single_document_the_end_is_held_out_and_no_character_is_cut(tmp_path, text):
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    for shard_chars in ("10000", "37"):
        output = tmp_path / f"out-{shard_chars}"
        tokens(output, *flags_for(tmp_path / "one.txt"), "--shard-chars", shard_chars)
        train, val = parts(output)
        assert BYTE.decode(train[:-1].tolist()) + BYTE.decode(val[:-1].tolist()) == text
        assert train[-1] == val[-1] == BYTE.eos_id
        assert len(val) / (len(train) + len(val)) == pytest.approx(0.1, abs=0.01)


def test_validation_text_of_its_own(library, tmp_path):
    (tmp_path / "val.txt").write_text("never trained on")
    tokens(tmp_path / "out", *flags_for(library / "b.txt"), "--val-input", str(tmp_path / "val.txt"))
    train, val = parts(tmp_path / "out")
    assert BYTE.decode(train.tolist()) == STORIES[10] + EOS_TEXT
    assert BYTE.decode(val.tolist()) == "never trained on" + EOS_TEXT


# ---- tokenizers ----------------------------------------------------------------------------------


def test_a_tokenizer_and_token_files_made_with_it_and_what_is_printed_of_both(library, tmp_path, capsys):
    made = tmp_path / "t" / "tokenizer.json"
    texts = [str(library / "*.txt"), str(library / "c.jsonl")]
    argv = ["tokenizer", "--input", *texts, "--vocab-size", "300", "--output", str(made)]
    assert prepare.main(argv) == 0
    assert f"{made}: bpe, 300 tokens" in capsys.readouterr().out

    meta = tokens(tmp_path / "t", *flags_for(library / "*.txt", made))
    printed = capsys.readouterr().out
    tokenizer = FileTokenizer.from_file(made)
    train, val = parts(tmp_path / "t")
    assert tokenizer.decode(train.tolist()).count(EOS_TEXT) == meta["train"]["documents"]
    used = {*train.tolist(), *val.tolist()} - {tokenizer.eos_id}
    longest = [text for _, text, _ in meta["longest_tokens"]]
    assert len(longest) == 10
    assert len(longest[0]) == max(len(tokenizer.decode([id])) for id in used)
    assert f"{meta['bytes_per_token']:.2f} bytes per token" in printed
    assert "0 unknown" in printed
    assert repr(longest[0]) in printed


def test_a_char_tokenizer_knows_every_character_and_refuses_others(library, tmp_path):
    made = tmp_path / "chars.json"
    argv = ["tokenizer", "--kind", "char", "--input", str(library / "a.txt"), "--output", str(made)]
    assert prepare.main(argv) == 0
    tokenizer = FileTokenizer.from_file(made)
    text = "".join(STORIES[:10])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    (tmp_path / "other.txt").write_text("a snowman: ☃")
    with pytest.raises(UserError, match="cannot encode the text"):
        tokens(tmp_path / "out", *flags_for(tmp_path / "other.txt", made))


def test_unknown_tokens_are_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([EOS_TEXT])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text("the cat sat on the mat today and the dog did not\n" * 4)
    meta = tokens(tmp_path / "out", *flags_for(tmp_path / "t.txt", tmp_path))
    assert meta["unknown"] == 4 * 8


def test_the_tokenizer_of_a_checkpoint_can_be_used(tiny_run, library, tmp_path):
    meta = tokens(tmp_path / "out", *flags_for(library / "a.txt", tiny_run.folder / "final.ckpt"))
    assert meta["tokenizer"]["kind"] == "bpe"
    assert meta["train"]["documents"] + meta["val"]["documents"] == 12


# ---- stopped and resumed --------------------------------------------------------------------------------


def start(output: Path, *words: str, **options) -> subprocess.Popen:
    """`prepare.py tokens` as a process, in a process group of its own."""
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
    """Whether no process of the group is alive. A zombie, which nobody has collected, is not alive."""
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
    """5 MB: some seconds of work in shards of 20,000 characters."""
    path = tmp_path_factory.mktemp("corpus") / "c.txt"
    documents = [f"{n} " + "It was a dark and stormy night. " * (n % 50 * 8) for n in range(800)]
    path.write_text(f"\n{EOS_TEXT}\n".join(documents))
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
def test_a_stopped_process_resumes_to_the_same_bytes(corpus, tmp_path, signum):
    flags = ("--input", str(corpus), "--shard-chars", "20000", "--num-proc", "2")
    output = tmp_path / "out"
    shards = output / ".shards"
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
    tokens(tmp_path / "straight", *flags_for(corpus))
    assert part_bytes(output) == part_bytes(tmp_path / "straight")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_a_killed_worker_is_reported(corpus, tmp_path):
    process = start(tmp_path / "out", "--input", str(corpus), "--shard-chars", "20000", "--num-proc", "1")
    wait_for(lambda: len(list((tmp_path / "out" / ".shards").glob("*.json"))) > 20)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    worker = next(pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(int(worker), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process has ended" in err
    assert "Traceback" not in err


def unfinished(output: Path, library: Path, monkeypatch) -> list[str]:
    """Makes a folder whose shards are all there, but not joined. Returns the flags that made it."""
    flags = [*flags_for(library), "--shard-chars", "700"]

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "join_shards", interrupt)
        with pytest.raises(SystemExit):
            tokens(output, *flags)
    return flags


def test_what_is_done_is_not_done_again(library, tmp_path, monkeypatch):
    flags = unfinished(tmp_path / "out", library, monkeypatch)
    shards = tmp_path / "out" / ".shards"
    before = {path: path.stat().st_mtime_ns for path in shards.glob("train-*")}
    assert len(before) > 10
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "rmtree", lambda *args, **kwargs: None)
        tokens(tmp_path / "out", *flags)
    assert {path: path.stat().st_mtime_ns for path in shards.glob("train-*")} == before


CHANGES = {
    "a word": "text has changed",
    "shorter": "text has changed",
    "tokenizer": "--tokenizer was byte",
    "field": "--text-field was text and is now title",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_another_text_or_tokenizer_is_refused_not_mixed(library, tmp_path, monkeypatch, change, finished):
    output = tmp_path / "out"
    flags = unfinished(output, library, monkeypatch)
    if finished:
        tokens(output, *flags)
        before = (output / "train.npy").read_bytes()
    if change == "a word":
        (library / "b.txt").write_text("another")
    elif change == "shorter":
        (library / "d.parquet").unlink()
    elif change == "tokenizer":
        flags += ["--tokenizer", "gpt2"]
    else:
        flags += ["--text-field", "title"]
    with pytest.raises(UserError, match=r"--fresh") as error:
        tokens(output, *flags)
    assert CHANGES[change] in str(error.value)
    if finished:
        assert (output / "train.npy").read_bytes() == before
    if change != "field":
        assert tokens(output, *flags, "--fresh")["train"]["documents"] > 0


def test_a_finished_folder_is_left_as_it_is(library, tmp_path, capsys):
    output = tmp_path / "out"
    tokens(output, *flags_for(library))
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("[!.]*")}
    capsys.readouterr()
    tokens(output, *flags_for(library))
    assert "is up to date: nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("[!.]*")} == before


def test_a_second_process_in_the_same_folder_is_refused(library, tmp_path):
    from support.files.atomic import claim_folder

    lock = claim_folder(tmp_path / "out")
    with pytest.raises(UserError, match=r"another run is writing to .*with --output "):
        tokens(tmp_path / "out", *flags_for(library))
    lock.release()


# ---- the hub -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_streamed_and_a_killed_process_resumes(tmp_path):
    """The shards of a process that was killed and started again are the same as without the kill."""
    stories = [f"Story {n}: " + "the moon rose again. " * (n % 7 * 30) for n in range(300)]
    splits = {"train": "data/train-*.parquet", "validation": "data/val.parquet"}
    files = {f"data/train-{k}.parquet": parquet(stories[k * 50 : k * 50 + 50]) for k in range(5)}
    files |= {"data/val.parquet": parquet(stories[250:]), "README.md": dataset_card({"default": splits})}
    flags = ["--dataset", "some/stories", "--val-split", "validation"]
    flags += ["--shard-chars", "4000", "--num-proc", "1"]
    online = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    found = []
    with LoopbackHub("some/stories", files) as hub:
        for name in ("straight", "stopped"):
            env = online | hub.environment(tmp_path / name)
            output = tmp_path / name / "out"
            if name == "stopped":
                process = start(output, *flags, env=env)
                wait_for(lambda output=output: len(list((output / ".shards").glob("train-*.json"))) > 15)
                process.kill()
                process.communicate()
            process = start(output, *flags, env=env)
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            found.append(part_bytes(output))
        train, val = parts(output)
    assert found[0] == found[1]
    assert BYTE.decode(train.tolist()) == "".join(story + EOS_TEXT for story in stories[:250])
    assert BYTE.decode(val.tolist()) == "".join(story + EOS_TEXT for story in stories[250:])


# ---- mistakes ------------------------------------------------------------------------------------


TOKENS_MISTAKES = {
    "--input nowhere/*.txt": r"--input=nowhere/\*.txt: no .txt, .jsonl or .parquet file",
    "--input t.txt --tokenizer nope.json": "--tokenizer nope.json: no such file",
    "--input empty.txt": "there is no text to train on",
    "--input t.txt --output t.txt": "--output t.txt is a file",
    "--input t.txt --num-proc 0": "--num-proc 0 must be at least 1",
    "--input t.txt --val-fraction 1.5": "--val-fraction 1.5 must be between",
    "--input t.txt --val-split test": "--val-split goes with --dataset",
    "--input binary.txt": "NUL byte at offset 2",
    "--input bad.parquet": "bad.parquet cannot be read as a parquet file",
    "--input r.jsonl": r"line 1 has no text in field 'text' \(fields: body\)",
}
TOKENIZER_MISTAKES = {
    "--input t.txt --output t.txt": "--output t.txt is there already",
    "--input t.txt --vocab-size 12 --output x.json": "vocab_size=12 is too small",
    "--dataset a/b --kind char --output x.json": "--kind char needs all of the text",
}


@pytest.fixture
def folder_of_mistakes(tmp_path, monkeypatch) -> None:
    """The current folder, with the files that the mistakes name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("a text of a few words")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "binary.txt").write_bytes(b"ab\0\xff")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "r.jsonl").write_text('{"body": "x"}\n')


def assert_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        prepare.main(argv)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("flags", TOKENS_MISTAKES)
def test_a_mistake_in_the_flags_for_token_files_is_a_clear_error(folder_of_mistakes, flags):
    usual = ["--tokenizer", "byte", "--output", "o", "--num-proc", "1"]
    assert_refused(["tokens", *usual, *flags.split()], TOKENS_MISTAKES[flags])


@pytest.mark.parametrize("flags", TOKENIZER_MISTAKES)
def test_a_mistake_in_the_flags_for_a_tokenizer_is_a_clear_error(folder_of_mistakes, flags):
    assert_refused(["tokenizer", *flags.split()], TOKENIZER_MISTAKES[flags])


# ---- what it costs -------------------------------------------------------------------------------


def test_prepare_needs_no_torch():
    """It starts in a fraction of the time, and each of its processes takes a fraction of the memory."""
    code = "import sys, prepare; print({'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr


MEASURE = """
import re, resource, sys, prepare
if __name__ == "__main__":
    text, output = sys.argv[1:]
    prepare.main(["tokens", "--input", text, "--tokenizer", "byte", "--output", output,
                  "--shard-chars", "1000000", "--num-proc", "1"])
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())  # since the program was loaded
    print(int(peak[1]) // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up in /proc")
def test_a_long_document_takes_little_memory(tmp_path):
    """One line of 48 MB, against one of 12 MB: no process needs more than a third of the difference."""
    (tmp_path / "measure.py").write_text(MEASURE)
    peaks = []
    for megabytes in (12, 48):
        (tmp_path / "line.txt").write_text("all work and no play " * (megabytes * 50_000))
        found = subprocess.run(
            [sys.executable, "measure.py", "line.txt", str(megabytes)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPO)},
            cwd=tmp_path,
        )
        peaks.append([int(value) for value in found.stdout.splitlines()[-1].split()])
    for small, large in zip(*peaks, strict=True):
        assert large - small < 36 / 3, peaks
