"""Archives, pickles and tensors made to do harm: a checkpoint that would run code, fill the memory or never
end is refused at once, in one line. Tests that could run out of memory use another process with a memory
limit."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hostile import NAME, Call, checkpoint_of, in_little_memory, refusal, with_weight

from support.checkpoint import KEY, load_model, read_checkpoint
from support.files.safe_archive import check_pickle
from support.weights import first_not_finite


@pytest.fixture
def saved(tmp_path):
    def save(content: object, name: str = "bad.ckpt") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


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
