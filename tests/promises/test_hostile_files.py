"""Files made to do harm: a checkpoint or a config that would run code, fill the memory, never end or write
to the terminal is refused at once, in one line. Tests that could run out of memory use another process
with a memory limit."""

import importlib
import io
import json
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from model import GPTConfig, GPTMini
from support.checkpoint import KEY, load_model, read_checkpoint
from support.config.read import load_config, read_config_file
from support.config.values import typed
from support.files.safe_archive import check_pickle
from support.files.safe_yaml import parse_yaml
from support.find_checkpoints import find_latest_checkpoint
from support.messages import UserError
from support.weights import first_not_finite
from tokenizer import BPETokenizer, ByteTokenizer

listing = importlib.import_module("list")
REPO = Path(__file__).parents[2]
NAME = "net.layers.1.self_attn.k_proj.weight"


def checkpoint_of(**changes) -> dict:
    """The smallest checkpoint of ours; `changes` go into our fields."""
    torch.manual_seed(0)
    model = GPTMini(
        GPTConfig(vocab_size=257, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16)
    )
    ours = {
        "format_version": 1,
        "model": model.config.model_dump(),
        "tokenizer": ByteTokenizer().to_dict(),
        "metrics": {"step": 3, "tokens": 9},
    }
    return {
        "state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()},
        KEY: ours | changes,
    }


def with_weight(weight: object, name: object = NAME) -> dict:
    checkpoint = checkpoint_of()
    checkpoint["state_dict"][name] = weight
    return checkpoint


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message.isprintable(), message  # one line, without control characters
    assert len(message) < 500
    return message


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = one_line(caught.value)
    assert str(path) in message
    return message


@pytest.fixture
def saved(tmp_path):
    def save(content: object, name: str = "bad.ckpt") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


OPENS = """
import sys
from support.checkpoint import load_model
from support.cli import UserError
for path in sys.argv[1:]:
    try:
        load_model(path)
        print("opened")
    except UserError as error:
        print(error)
"""


def in_little_memory(*paths: Path) -> list[str]:
    """What a process with 8 GiB of address space and a minute of computing says about each file."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    command, environment = (
        [sys.executable, "-c", OPENS, *map(str, paths)],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, preexec_fn=limit, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")  # no signal, no traceback
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    return lines


# ---- archives ------------------------------------------------------------------------------------


def entries_of(checkpoint: dict) -> list[tuple[str, bytes]]:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def write_archive(
    path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def test_an_archive_written_by_another_zip_writer_opens(tmp_path):
    """The tests below change such archives. They are refused because of the change, and not because of
    their writer."""
    assert (
        load_model(write_archive(tmp_path / "plain.ckpt", entries_of(checkpoint_of())))[2]["metrics"]["step"]
        == 3
    )


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path):
    """256 MB of weights, or of pickle, in less than a megabyte."""
    entries = entries_of(checkpoint_of())
    bomb = write_archive(
        tmp_path / "bomb.ckpt", [*entries, ("archive/data/99", bytes(2**28))], zipfile.ZIP_DEFLATED
    )
    header = tmp_path / "header.ckpt"
    with zipfile.ZipFile(header, "w") as archive:
        for name, content in entries:
            if name.endswith("data.pkl"):
                archive.writestr(name, content + bytes(2**28), zipfile.ZIP_DEFLATED)
            else:
                archive.writestr(name, content)
    assert bomb.stat().st_size < 10**6
    assert header.stat().st_size < 10**6
    for line in in_little_memory(bomb, header):
        assert "an entry of it is compressed" in line


def test_the_format_of_torch_before_1_6_follows_the_same_rules(tmp_path):
    """A length claims to be two billion; a function takes the place of a tensor; a tuple of tuples would
    be hashed forever; the file is cut off."""
    torch.save(with_weight(torch.zeros(777)), tmp_path / "whole.ckpt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "whole.ckpt").read_bytes()
    assert "expected (12, 24), provided (777,)" in refusal(tmp_path / "whole.ckpt"), (
        "the whole file opens, so the others are refused for their change"
    )
    (tmp_path / "long.ckpt").write_bytes(whole.replace(b"M\x09\x03", b"J" + struct.pack("<i", 2**31 - 1)))
    torch.save(with_weight(os.system), tmp_path / "code.ckpt", _use_new_zipfile_serialization=False)
    start = [place for place in range(len(whole)) if whole[place : place + 2] == b"\x80\x02"][3]
    (tmp_path / "tuples.ckpt").write_bytes(whole[:start] + tuples_of_tuples(60) + whole[start:])
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "short.ckpt").write_bytes(whole[:30])
    expected = {"code": "would run code when opened", "tuples": "unfold without end"}
    names = ("long", "code", "tuples", "half", "short")
    for name, line in zip(
        names, in_little_memory(*(tmp_path / f"{name}.ckpt" for name in names)), strict=True
    ):
        assert expected.get(name, "truncated or damaged") in line and len(line) < 500, line


def changed(path: Path, place: int, form: str, value: int) -> Path:
    """A copy of the file with one number in it changed."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, place, value)
    copy = path.with_name(f"{path.stem}-{place}{form[1:]}.ckpt")
    copy.write_bytes(content)
    return copy


def directory_record(path: Path, number: int) -> int:
    """The position in the file of record `number` of the central directory."""
    content, place = path.read_bytes(), -1
    for _ in range(number + 1):
        place = content.find(b"PK\x01\x02", place + 1)
    return place


def test_a_directory_that_lies_about_a_size_is_refused(saved):
    """About the size in the file (field at 20) or unpacked (at 24), of the pickle or of a weight."""
    path = saved(checkpoint_of())
    places = [directory_record(path, number) + field for number in (0, 5) for field in (20, 24)]
    for line in in_little_memory(*(changed(path, place, "<I", 2**31 - 1) for place in places)):
        assert "cannot be opened" in line


def test_entries_that_overlap_are_refused(saved):
    """A hundred names for one stretch of the file would be read a hundred times."""
    path = saved(checkpoint_of())
    with zipfile.ZipFile(path) as archive:
        first = archive.infolist()[4]
    assert "entries overlap" in refusal(
        changed(path, directory_record(path, 6) + 42, "<I", first.header_offset)
    )


def test_a_local_header_that_lies_does_no_harm(saved):
    """torch finds a weight after its local header. A longer name (26) or extra field (28) moves that
    place: the numbers are wrong or there are none, but nothing crashes."""
    path = saved(checkpoint_of())
    with zipfile.ZipFile(path) as archive:
        offsets = [archive.infolist()[number].header_offset for number in (0, 6, -3)]
    paths = [changed(path, offset + field, "<H", 65535) for offset in offsets for field in (26, 28)]
    for line in in_little_memory(*paths):
        assert line == "opened" or "cannot be opened" in line or "NaN" in line


def test_two_headers_are_refused(tmp_path):
    entries = entries_of(checkpoint_of())
    path = write_archive(tmp_path / "two.ckpt", [*entries, ("archive/DATA.PKL", entries[0][1])])
    assert "damaged" in refusal(path)


def test_an_archive_of_thousands_of_entries_opens(tmp_path):
    path = write_archive(
        tmp_path / "many.ckpt",
        entries_of(checkpoint_of()) + [(f"archive/data/x{i}", b"") for i in range(20_000)],
    )
    assert in_little_memory(path) == ["opened"]


# ---- pickles -------------------------------------------------------------------------------------


class Call:
    """Its pickle is the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def with_pickle(path: Path, data: bytes) -> Path:
    return write_archive(
        path, [("archive/data.pkl", data), ("archive/byteorder", b"little"), ("archive/version", b"3\n")]
    )


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (lambda: Call(os.system, "true"), "system"),
        (lambda: Call(eval, "1"), "eval"),
        (lambda: Call(bytearray, 10**12), "bytearray"),
        (lambda: Call(torch.Tensor, 10**6, 10**6), "Tensor"),
        (lambda: torch.sparse_coo_tensor([[0]], [1.0], (3,)), "_rebuild_sparse_tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "_rebuild_qtensor"),
        (lambda: torch.ones(3, dtype=torch.complex64), "ComplexFloatStorage"),
        (lambda: torch.ones(3, device="meta"), "_rebuild_meta_tensor"),
        (lambda: {1, 2}, "set"),
    ],
    ids=["system", "eval", "bytearray", "size", "sparse", "quantized", "complex", "meta", "set"],
)
@pytest.mark.filterwarnings("ignore")  # some of these kinds are deprecated
def test_a_name_that_no_checkpoint_of_ours_holds_is_refused_and_named(saved, content, name):
    """torch's own list of safe names is longer: even with weights_only=True a file can ask for a terabyte."""
    message = refusal(saved(with_weight(content())))
    assert "it would run code when opened" in message
    assert name in message


def tuples_of_tuples(levels: int) -> bytes:
    """The pickle of a dict whose key is a pair of pairs of pairs ...: 4 bytes a level, and 2**levels steps
    to hash it."""
    pickled = b"\x80\x02}K\x01"
    for level in range(levels):
        pickled += b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86"
    return pickled + b"K\x01s."


def test_a_tuple_of_tuples_that_takes_forever_to_hash_is_refused(tmp_path):
    assert pickle.loads(tuples_of_tuples(3)) == {(((1, 1), (1, 1)), ((1, 1), (1, 1))): 1}
    assert "unfold without end" in refusal(with_pickle(tmp_path / "tuples.ckpt", tuples_of_tuples(60)))


def test_the_size_of_a_pickle_is_counted_as_if_everything_were_printed():
    text = "x" * 2**16
    check_pickle(pickle.dumps([text] * 1000, protocol=2))  # 65 MB if printed
    with pytest.raises(ValueError, match="unfold"):
        check_pickle(pickle.dumps([text] * 2000, protocol=2))


def lists_in_lists(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def test_very_deep_nesting_is_refused(tmp_path):
    paths = [with_pickle(tmp_path / f"{depth}.ckpt", lists_in_lists(depth)) for depth in (10**3, 10**6)]
    assert all("no 'tiny_transformer' in it" in line for line in in_little_memory(*paths))


NO_PICKLES = [
    b"",
    b".",
    b"\x80\x02",
    b"\x80\x02(.",
    b"\x80\x02K\x01s.",
    b"\x80\x02t.",
    b"\x80\x02h\x07.",
    b"\xff" * 9,
]


@pytest.mark.parametrize("data", NO_PICKLES, ids=repr)
def test_a_broken_pickle_is_refused(tmp_path, data):
    assert "truncated or damaged" in refusal(with_pickle(tmp_path / "none.ckpt", data))


def shared_lists(levels: int) -> list:
    tree = ["x"]
    for _ in range(levels):
        tree = [tree] * 10
    return tree


def holds_itself() -> list:
    loop: list = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    "value",
    [shared_lists(12), holds_itself(), [[[]]], torch.ones(2)],
    ids=["shared", "loop", "nested", "tensor"],
)
@pytest.mark.parametrize("field", ["format_version", "run", "config", "extra"])
def test_fields_that_are_not_a_plain_tree_are_refused(saved, value, field):
    """Printing such a field would turn a hundred bytes into 10**12 characters."""
    if value == [[[]]] and field != "format_version":
        for _ in range(200):
            value = [value]
    refusal(saved(checkpoint_of(**{field: value})))


def test_lists_that_are_filled_only_after_they_were_shared_are_refused(tmp_path):
    """A pickle written by hand may put an empty list ten times into the list above it, and fill it later:
    no part of it is large."""

    def text(word: str) -> bytes:
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    lists = b"".join(b"]q" + bytes([i]) for i in range(12))
    filled = b"".join(b"h" + bytes([i]) + b"(" + (b"h" + bytes([i + 1])) * 10 + b"e" for i in range(11))
    data = (
        b"\x80\x02}("
        + text("state_dict")
        + b"}"
        + text(KEY)
        + b"}"
        + text("extra")
        + b"("
        + lists
        + filled
        + b"tsu."
    )
    check_pickle(data)
    assert "nested without end" in refusal(with_pickle(tmp_path / "above.ckpt", data))


class Covered(dict):
    """Its pickle is an OrderedDict with an attribute `items`, which hides the method from the next loop
    over it."""

    def __reduce__(self):
        return OrderedDict, (), {"items": "no method"}, None, iter(self.items())


@pytest.mark.parametrize("name", ["state_dict", KEY, "optimizer_states"])
def test_a_dict_whose_methods_are_hidden_is_refused(saved, name):
    checkpoint = checkpoint_of() | {"optimizer_states": {"x": torch.ones(2)}}
    path = saved(checkpoint | {name: Covered(checkpoint[name])})
    if name == "optimizer_states":
        assert first_not_finite(read_checkpoint(path)) is None
    else:
        refusal(path)


# ---- tensors -------------------------------------------------------------------------------------


def lengthened(checkpoint: dict, numel: int) -> bytes:
    """The pickle of a checkpoint whose first weight has 12 * 24 = 288 elements, with `numel` instead of
    288."""
    [data] = [content for name, content in entries_of(checkpoint) if name.endswith("data.pkl")]
    old, new = b"M" + struct.pack("<H", 288), b"J" + struct.pack("<i", numel)
    assert data.count(old) >= 1
    return data.replace(old, new)


@pytest.mark.parametrize("numel", [289, 2**31 - 1])
def test_a_tensor_that_claims_a_longer_storage_does_no_harm(tmp_path, numel):
    checkpoint = with_weight(torch.ones(288))
    entries = [
        (name, lengthened(checkpoint, numel) if name.endswith("data.pkl") else content)
        for name, content in entries_of(checkpoint)
    ]
    [line] = in_little_memory(write_archive(tmp_path / "longer.ckpt", entries))
    assert "longer.ckpt" in line


def test_a_tensor_of_one_number_that_claims_to_be_a_terabyte_is_refused(saved):
    assert f"{NAME} claims more elements than the file holds" in refusal(
        saved(with_weight(torch.ones(1).expand(10**6, 10**6)))
    )
    checkpoint = checkpoint_of() | {
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(1).expand(10**12)}}}]
    }
    assert "optimizer_states.0.state.0.exp_avg claims" in refusal(saved(checkpoint))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_nan_or_infinite_are_refused(saved, bad, dtype):
    checkpoint = checkpoint_of()
    checkpoint["state_dict"] = {name: weight.to(dtype) for name, weight in checkpoint["state_dict"].items()}
    load_model(saved(checkpoint))
    checkpoint["state_dict"][NAME][7, 3] = bad
    message = refusal(saved(checkpoint))
    assert NAME.removeprefix("net.") in message
    assert "take an earlier checkpoint" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_any_single_float_type_open_and_answer(saved, dtype):
    checkpoint = checkpoint_of()
    checkpoint["state_dict"] = {name: weight.to(dtype) for name, weight in checkpoint["state_dict"].items()}
    model = load_model(saved(checkpoint))[0]
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model(torch.arange(7).view(1, 7)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_weights_of_mixed_types_are_refused(saved, dtype):
    message = refusal(saved(with_weight(torch.ones(12, 24, dtype=dtype))))
    assert str(dtype).removeprefix("torch.") in message


@pytest.mark.parametrize("name", [7, ("net", "norm"), None], ids=str)
def test_a_weight_without_a_name_is_refused(saved, name):
    assert repr(name) in refusal(saved(with_weight(torch.ones(3), name)))


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
    with pytest.raises(UserError, match=r"has 50,000,000 bytes, and 1,048,576 at most") as caught:
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
