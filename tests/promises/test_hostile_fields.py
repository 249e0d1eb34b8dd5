"""Fields of a checkpoint and configs made to do harm are refused at once, in one line. The newest good
checkpoint is found among damaged ones, and no text controls the terminal."""

import importlib
import io
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from hostile import Call, checkpoint_of, in_little_memory, one_line, refusal, with_weight

from support.checkpoint import KEY
from support.config.read import load_config, read_config_file
from support.config.values import typed
from support.files.safe_yaml import parse_yaml
from support.find_checkpoints import find_latest_checkpoint
from support.messages import UserError
from tokenizer import BPETokenizer

listing = importlib.import_module("list")


@pytest.fixture
def saved(tmp_path):
    def save(content: object, name: str = "bad.ckpt") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


# ---- fields of a checkpoint ----------------------------------------------------------------------

ESCAPE = "\x1b[2J\n\udcff\u202e"  # clear the screen, a new line, no character, right-to-left text
MODEL = checkpoint_of()[KEY]["model"]
HUGE = [
    {"d_model": 10**9},
    {"d_model": 10**18, "d_ff": 10**18, "n_heads": 1},
    {"n_layers": 10**6},
    {"n_heads": 10**9, "d_model": 10**9, "n_kv_heads": 3, "head_dim": None},
    {"vocab_size": 10**12},
    {"max_seq_len": 10**12},
    {"d_ff": 2**2000},
]


def tokenizer_json(**changes) -> dict:
    state = json.loads(BPETokenizer.train(["abc abd"], 257).to_dict()["json"])
    return {"kind": "file", "json": json.dumps(state | changes), "eos": "<|endoftext|>"}


ODD_METRICS = {
    "step": {"step": "3"},
    "bool": {"step": True},
    "negative": {"step": -1},
    "no step": {"step": None},
    "long": {"step": 2**2000},
    "tokens": {"tokens": [1]},
    "loss": {"val_loss": {}},
    "long loss": {"train_loss": 2**2000},
    "escape": {"train_loss": ESCAPE},
}
FIELDS = {
    **{f"metrics {name}": {"metrics": {"step": 3} | change} for name, change in ODD_METRICS.items()},
    **{f"model {' '.join(change)}": {"model": MODEL | change} for change in HUGE},
    "model text": {"model": MODEL | {"d_model": ESCAPE}},
    "model key": {"model": MODEL | {ESCAPE: 1}},
    "model number": {"model": MODEL | {7: 1}},
    "version text": {"format_version": ESCAPE},
    "version newer": {"format_version": 2},
    "version float": {"format_version": 1.0},
}  # fmt: skip
TOKENIZERS = {
    "kind": {"kind": ESCAPE},
    "list": {"kind": ["byte"]},
    "twice": {"kind": "char", "chars": "abca"},
    "surrogate": {"kind": "char", "chars": "ab\ud800"},
    "no text": {"kind": "char", "chars": ["ab", "c"]},
    "missing": {"kind": "char"},
    "json": {"kind": "file", "json": ESCAPE, "eos": "x"},
    "deep json": {"kind": "bpe", "json": "[" * 10**5, "eos": "x"},
    "eos": tokenizer_json() | {"eos": ESCAPE},
    "eos list": tokenizer_json() | {"eos": ["x"]},
    "model": tokenizer_json(model={"type": "BPE", "vocab": {"a": 2**40}, "merges": []}),
    "panic": tokenizer_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "!!!"}),
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_fields_of_the_wrong_type_or_size_are_refused_in_one_line(saved, fields):
    refusal(saved(checkpoint_of(**fields)))


@pytest.mark.parametrize("state", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_damaged_tokenizer_is_refused_in_one_line(saved, state):
    """A panic of the tokenizers library is not an Exception."""
    refusal(saved(checkpoint_of(tokenizer=state)))


def test_a_model_of_absurd_size_is_refused_in_little_memory(saved):
    for line in in_little_memory(
        *(saved(checkpoint_of(model=MODEL | sizes), f"{number}.ckpt") for number, sizes in enumerate(HUGE))
    ):
        assert "but its weights allow" in line


def test_escape_sequences_in_the_names_of_weights_are_shown_as_escapes(saved):
    for checkpoint in (
        with_weight(torch.ones(2), f"net.{ESCAPE}"),
        with_weight("no tensor", f"net.{ESCAPE}"),
    ):
        assert "x1b[2J" in refusal(saved(checkpoint))


def test_list_shows_a_row_for_each_hostile_file(saved, tmp_path, capsys):
    """Two lines for each file, its row and the reason, without control characters."""
    for number, fields in enumerate(FIELDS.values()):
        saved(checkpoint_of(**fields), f"{number}.ckpt")
    saved(with_weight(torch.ones(1).expand(10**12)), "wide.ckpt")
    saved(with_weight(Call(os.system, "true")), "call.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "nothing.ckpt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.ckpt")
    saved(checkpoint_of(), "name \x1b[2J.ckpt")
    saved(checkpoint_of(tokenizer={"kind": ESCAPE}), "kind.ckpt")
    assert listing.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    n_files = len(list(tmp_path.iterdir()))
    whole = [line for line in out.splitlines() if "name \\x1b[2J.ckpt" in line or "kind.ckpt" in line]
    assert len(whole) == 2  # the two that have no error
    assert len(out.splitlines()) == 1 + 2 * n_files - 2
    assert listing.main([str(tmp_path), "--json"]) == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == n_files


def test_generated_text_cannot_control_the_terminal(monkeypatch):
    import infer

    text = "a\x1b[2J\nb\té\r\u202e"
    assert infer.safe_to_show(text) == text  # a pipe or a file gets the text unchanged
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert infer.safe_to_show(text) == "a\\x1b[2J\nb\té\\r\\u202e"


# ---- the newest checkpoint -----------------------------------------------------------------------


def make(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "text":
        path.write_text("Attention is all you need.")


@pytest.mark.parametrize(
    "kind", ["folder", "link to nothing", "link to itself", "pipe", "socket", "device", "text"]
)
@pytest.mark.parametrize("name", ["step-0000009.ckpt", "last.ckpt"])
def test_the_newest_checkpoint_is_found_among_files_that_are_not_checkpoints(
    saved, tmp_path, capsys, monkeypatch, kind, name
):
    good = saved(checkpoint_of(), "step-0000003.ckpt" if name.startswith("step") else "final.ckpt")
    monkeypatch.chdir(tmp_path)
    make(kind, tmp_path / name)
    assert find_latest_checkpoint(tmp_path) == good
    err = capsys.readouterr().err
    if name.startswith("step") or not kind.startswith("link"):  # a broken link named last counts as missing
        [line] = err.splitlines()
        assert line.startswith("warning: ")
        assert name in line
        assert line.endswith("; skipped")


def test_a_checkpoint_that_may_not_be_read_is_skipped(saved, tmp_path, capsys):
    good, shut = saved(checkpoint_of(), "step-0000003.ckpt"), saved(checkpoint_of(), "step-0000009.ckpt")
    shut.chmod(0)
    if os.access(shut, os.R_OK):
        pytest.skip("root may write everywhere")
    assert find_latest_checkpoint(tmp_path) == good
    assert "Permission denied" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_is_skipped(saved, tmp_path, capsys, monkeypatch):
    """As above, but the disk fails, which also stops a user who may read everything."""
    good, broken = saved(checkpoint_of(), "step-0000003.ckpt"), saved(checkpoint_of(), "step-0000009.ckpt")

    def failing(path, *args, **kwargs):
        if path == broken:
            raise OSError(5, "Input/output error", str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr("support.checkpoint.open", failing, raising=False)
    assert find_latest_checkpoint(tmp_path) == good
    assert "step-0000009.ckpt cannot be read (Input/output error)" in capsys.readouterr().err


def test_names_that_only_look_like_steps_are_left_alone(saved, tmp_path):
    good = saved(checkpoint_of(), "step-0000003.ckpt")
    for name in ("step-²", "step-", "step-1e9", "step--1", "step-0000009.ckpt.tmp-1"):
        saved(checkpoint_of(), f"{name}.ckpt")
    assert find_latest_checkpoint(tmp_path) == good


# ---- YAML ----------------------------------------------------------------------------------------


def laughs(form: str, first: str) -> str:
    """YAML of ten levels of ten aliases each: a kilobyte that stands for ten billion values."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {form.format(', '.join([f'*a{i - 1}'] * 10))}" for i in range(1, 11)]
    return "\n".join(lines)


INLINE = (
    "[" + ", ".join(["&a0 [x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11))]) + "]"
)
YAML = {
    "laughs": laughs("[{}]", "[x]"),
    "laughs in dicts": laughs("{{k: [{}]}}", "{k: x}"),
    "laughs in merges": laughs("{{<<: [{}]}}", "{k: 1}"),
    "in one line": f"training: {INLINE}",
    "itself": "a: &a [*a]",
    "itself in a dict": "a: &a {b: *a}",
    "itself as key": "a: &a {*a : 1}",
    "deep list": "[" * 10_000,
    "deep dict": "{a: " * 10_000,
    "deep lines": "- " * 10_000 + "a",
    "call": "a: !!python/object/apply:os.system [touch made]",
    "new": "a: !!python/object/new:os.system [touch made]",
    "name": "a: !!python/name:os.system",
    "module": "a: !!python/module:os",
    "tag": "a: !" + "x" * 100_000 + " 1",
    "number": "seed: !!int 0x" + "f" * 10_000,
    "sixties": "seed: !!int 1" + ":1" * 100_000,
    "surrogate": 'a: "\\ud800"',
    "escape": "\x1b[2J: 1",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML.keys())
def test_yaml_made_to_do_harm_is_refused_in_one_line(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_config_file("bad.yaml")
    assert "bad.yaml" in one_line(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("key", ["training", "training.lr", "nothing.there", "seed"])
def test_an_override_made_to_do_harm_is_refused_in_one_line(key):
    base = {"data": {"path": "x"}, "training": {"max_steps": 1}}
    for value in (INLINE, "&a [*a]", "0x" + "f" * 10_000, "[" * 10_000):
        with pytest.raises(UserError, match=rf"--override|config: {key}=|unknown key {key}") as caught:
            load_config(None, [f"{key}={value}"], base)
        one_line(caught.value)


def test_a_config_of_megabytes_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "big.yaml", "wb") as file:
        file.truncate(50 * 10**6)
    with pytest.raises(UserError, match=r"has 50,000,000 bytes, and at most 1,048,576 are read") as caught:
        read_config_file(tmp_path / "big.yaml")
    one_line(caught.value)


def test_a_pipe_is_refused_as_a_config_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError):
        read_config_file(tmp_path / "pipe.yaml")


@pytest.mark.parametrize(
    "number",
    ["0x" + "f" * 10_000, "1" + ":1" * 100_000, "9" * 100_000],
    ids=["hexadecimal", "sixties", "decimal"],
)
def test_a_number_of_thousands_of_digits_is_refused_without_computing_it(tmp_path, number):
    (tmp_path / "c.yaml").write_text(f"data: {{path: x}}\ntraining: {{max_steps: 1}}\nseed: {number}")
    with pytest.raises(UserError, match="seed=") as caught:
        load_config(tmp_path / "c.yaml")
    one_line(caught.value)


def test_plain_aliases_stay_allowed():
    assert typed(parse_yaml("a: &x [1, 2]\nb: *x\nc: {d: *x}", "text")) == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": [1, 2]},
    }
