"""The rows of a file of instructions become pairs, and are divided into training and validation."""

import codecs
import json
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from instructions import config_of

from instruct import IGNORE, Pair, load_instructions, pairs_of, split_pairs
from support.messages import UserError
from support.text.instruction_files import read_files
from tokenizer import ByteTokenizer

BYTE = ByteTokenizer()
KINDS = pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict]) -> Path:
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(
            "\n".join(map(json.dumps, rows))
            if path.suffix.lower() in (".jsonl", ".ndjson")
            else json.dumps(rows, indent=1)
        )
    return path


def read(path: Path, **fields: str) -> list[Pair]:
    return pairs_of(read_files(str(path), "data.path"), fields, str(path))


def refusal(path: Path, **fields: str) -> str:
    with pytest.raises(UserError) as error:
        read(path, **fields)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


# ---- reading -------------------------------------------------------------------------------------

ROWS = [
    {"instruction": "Name a color.", "input": "", "output": "Red."},
    {"instruction": "Übersetze\nbitte ∑", "input": "{output}", "output": " two\nlines \U0001f600\n"},
    {"instruction": "third", "input": None, "output": "<|endoftext|>"},
]


@KINDS
def test_each_kind_of_file_gives_its_rows_in_order_with_their_row_or_line_numbers(tmp_path, kind):
    path = write(tmp_path / f"rows.{kind}", ROWS)
    place = "line" if kind == "jsonl" else "row"
    expected = [
        Pair(row["instruction"], row["input"] or "", row["output"], f"{path}, {place} {n}")
        for n, row in enumerate(ROWS, 1)
    ]
    assert read(path) == expected


@KINDS
def test_the_input_may_be_missing_and_other_fields_are_ignored(tmp_path, kind):
    path = write(tmp_path / f"rows.{kind}", [{"id": 7, "output": "b", "instruction": "a", "text": "c"}])
    assert [(p.instruction, p.input, p.output) for p in read(path)] == [("a", "", "b")]


@KINDS
def test_fields_may_have_other_names(tmp_path, kind):
    path = write(
        tmp_path / f"rows.{kind}",
        [{"prompt": "a", "context": "b", "response": "c", "input": "not this", "output": 5}],
    )
    [found] = read(path, instruction="prompt", input="context", output="response")
    assert (found.instruction, found.input, found.output) == ("a", "b", "c")
    path = write(tmp_path / f"turned.{kind}", [{"instruction": "a", "input": "b", "output": "c"}])
    [found] = read(path, instruction="output", output="instruction")
    assert (found.instruction, found.input, found.output) == ("c", "b", "a")


def test_blank_lines_are_counted_and_a_byte_order_mark_is_not_text(tmp_path):
    row = json.dumps(ROWS[0]).encode()
    (tmp_path / "rows.jsonl").write_bytes(codecs.BOM_UTF8 + b"\r\n" + row + b"\r\n\n  \n" + row)
    assert [p.where.rsplit(",")[1] for p in read(tmp_path / "rows.jsonl")] == [" line 2", " line 5"]
    (tmp_path / "rows.json").write_bytes(codecs.BOM_UTF8 + b"[" + row + b"]")
    assert [p.instruction for p in read(tmp_path / "rows.json")] == ["Name a color."]


GOOD = {"instruction": "a", "input": "b", "output": "c"}


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": ...}, "has no text in field 'output' (fields: instruction, input)"),
        ({"instruction": ...}, "has no text in field 'instruction' (fields: input, output)"),
        (
            {"output": 4},
            "has no text in field 'output' (fields: instruction, input, output), it holds 4; remove the "
            "row, or ",
        ),
        (
            {"output": ["c"]},
            "has no text in field 'output' (fields: instruction, input, output), it holds [\"c\"]; remove "
            "the row",
        ),
        ({"input": 0}, "has no text in field 'input'"),
        ({"input": False}, "has no text in field 'input'"),
        ({"output": "half \ud83d"}, r"holds half a character ('\ud83d')"),
        ({"input": "\ude00"}, "holds half a character"),
    ],
    ids=str,
)
def test_a_row_with_a_wrong_field_is_named_by_its_number(tmp_path, kind, changes, said):
    bad = {name: value for name, value in (GOOD | changes).items() if value is not ...}
    path = write(tmp_path / f"rows.{kind}", [GOOD, GOOD, bad, GOOD])
    message = refusal(path)
    assert message.startswith(f"{path}, {'line' if kind == 'jsonl' else 'row'} 3 {said}")
    assert "data.fields says what they are called" in message or "half" in message


def test_a_wrong_field_of_a_parquet_file_is_named_too(tmp_path):
    path = write(tmp_path / "numbers.parquet", [{"instruction": "a", "output": 1}])
    assert refusal(path).startswith(
        f"{path}, row 1 has no text in field 'output' (fields: instruction, output)"
    )


def test_an_error_names_the_field_as_the_file_calls_it(tmp_path):
    path = write(tmp_path / "rows.json", [GOOD])
    assert "row 1 has no text in field 'response' (fields: instruction, input, output)" in refusal(
        path, output="response"
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"", "is not JSON"),
        ("a.json", b'[{"instruction": "a", ', "is not JSON"),
        ("a.json", b"\xff\xfe\xff[]", "is not JSON"),
        ("a.json", b'{"instruction": "a"}\n{"instruction": "b"}', "if it has a row a line, name it .jsonl"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b'[{"instruction": ' + b"9" * 5000 + b"}]", "is not JSON"),
        ("a.json", b'{"instruction": "a", "output": "b"}', "should be a list of rows"),
        ("a.json", b'"text"', "should be a list of rows"),
        ("a.json", b'[{"instruction": "a", "output": "b"}, "text"]', 'row 2 is "text", not an object'),
        ("a.json", b"[[1, 2]]", "row 1 is [1, 2], not an object"),
        ("a.json", b"[null]", "row 1 is null, not an object"),
        ("a.jsonl", b'{"instruction": "a", "output": "b"}\n\n{"instruction": \n', "line 3 is not JSON"),
        (
            "a.jsonl",
            b'[{"instruction": "a", "output": "b"}]',
            "line 1 is not a JSON object: a list begins there; name it .json",
        ),
        ("a.jsonl", b'{"a":' * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"instruction": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("a.jsonl", b'{"instruction": "\xe9", "output": "b"}', "byte 0xe9 at offset 17 is not UTF-8"),
        ("a.parquet", b"PAR1 and no more", "cannot be opened"),
        ("a.parquet", b"", "cannot be opened"),
        ("a.txt", b"[]", ".json, .jsonl or .parquet files are read here"),
        ("a.csv", b"instruction,output\na,b\n", ".json, .jsonl or .parquet files are read here"),
        ("a", b"[]", ".json, .jsonl or .parquet files are read here"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_a_file_that_does_not_hold_rows_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert said in message
    assert str(tmp_path / name) in message


def test_a_name_that_looks_like_a_glob_is_a_file_name(tmp_path):
    for kind in ("json", "parquet"):
        assert len(read(write(tmp_path / f"rows[1]*.{kind}", [GOOD]))) == 1


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"instruction": "\xe9", "output": "b"}')
    assert [row["instruction"] for row, _ in read_files(str(path), "data.path", "replace")] == ["\ufffd"]


def test_a_field_that_no_row_has_is_not_silently_empty(tmp_path):
    path = write(tmp_path / "rows.json", [GOOD, GOOD])
    assert f"no row of {path} has 'context', which data.fields names as input" in refusal(
        path, input="context"
    )


def test_the_error_for_a_missing_or_unsupported_file_names_its_key(tmp_path):
    (tmp_path / "rows.txt").write_text("no rows")
    for key in ("data.path", "data.val_path"):
        for path, said in (
            ("none.json", "no .json, .jsonl or .parquet file there; give a file"),
            ("rows.txt", ".json, .jsonl or .parquet files are read"),
        ):
            with pytest.raises(UserError) as error:
                list(read_files(str(tmp_path / path), key))
            assert str(error.value).startswith(f"{key}={tmp_path / path}: {said}")


def test_a_folder_and_a_glob_are_read_as_well_as_a_file(tmp_path):
    for name, text in (("b.JSONL", "b"), ("a.json", "a"), ("c.ndjson", "c")):
        write(tmp_path / name, [GOOD | {"output": text}])
    assert [pair.output for pair in read(tmp_path)] == ["a", "b", "c"]
    assert [pair.output for pair in read(tmp_path / "[bc].*")] == ["b", "c"]


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


@pytest.mark.parametrize(
    "row",
    [{"messages": CHAT}, {"id": 1, "conversations": SHARED}, {"instruction": CHAT, "output": "x"}],
    ids=["a", "b", "c"],
)
@KINDS
def test_the_error_for_a_conversation_calls_it_one(tmp_path, kind, row):
    """Renaming fields cannot help, since the text is in a list."""
    message = refusal(write(tmp_path / f"rows.{kind}", [row]))
    assert (
        "is a conversation" in message
        and '{"instruction": "...", "input": "...", "output": "..."}' in message
    )
    assert "data.fields" not in message


@pytest.mark.parametrize("indent", [None, 1])
def test_the_error_for_a_list_named_jsonl_or_rows_named_json_gives_the_right_name(tmp_path, indent):
    (tmp_path / "list.jsonl").write_text(json.dumps([GOOD, GOOD], indent=indent))
    message = refusal(tmp_path / "list.jsonl")
    assert "a list begins there; name it .json" in message
    (tmp_path / "list.jsonl").rename(tmp_path / "list.json")
    assert len(read(tmp_path / "list.json")) == 2
    (tmp_path / "rows.json").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    assert "if it has a row a line, name it .jsonl" in refusal(tmp_path / "rows.json")


@pytest.mark.parametrize("key", ["data", "train", 'it\'s "rows"'])
def test_a_list_within_an_object_is_found_and_the_command_in_the_message_extracts_it(
    tmp_path, monkeypatch, key
):
    (tmp_path / "whole.json").write_text(json.dumps({"version": "1", key: [GOOD, GOOD]}))
    command = (
        refusal(tmp_path / "whole.json").splitlines()[1].strip().removesuffix(" writes them to rows.json")
    )
    monkeypatch.chdir(tmp_path)
    assert subprocess.run(shlex.split(command)).returncode == 0
    assert len(read(tmp_path / "rows.json")) == 2
    (tmp_path / "one.json").write_text(json.dumps(GOOD))
    assert "is one object, and should be a list of rows" in (message := refusal(tmp_path / "one.json"))
    assert message.endswith("put it in square brackets")


@KINDS
def test_rows_without_instruction_or_output_are_left_out_and_counted(tmp_path, kind, capsys):
    empty = [GOOD | {"output": ""}, GOOD | {"instruction": " \n"}, GOOD | {"output": None}]
    path = write(tmp_path / f"some.{kind}", [GOOD, empty[0], GOOD | {"input": ""}, *empty[1:]])
    capsys.readouterr()
    place = "line" if kind == "jsonl" else "row"
    assert [p.where for p in read(path)] == [f"{path}, {place} 1", f"{path}, {place} 3"]
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warned == [
        f"warning: 3 rows without instruction or output left out, the first at {path}, {place} 2"
    ]
    path = write(tmp_path / f"one.{kind}", [GOOD, empty[1]])
    assert len(read(path)) == 1
    assert (
        f"warning: 1 row without instruction or output left out, the first at {path}, {place} 2\n"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "rows", [[], [GOOD | {"output": " "}], [GOOD | {"instruction": ""}] * 3], ids=["no row", "one", "three"]
)
def test_a_file_without_any_output_is_refused(tmp_path, rows, capsys):
    path = write(tmp_path / "rows.json", rows)
    assert refusal(path).startswith(f"{path} holds no instruction with an output")
    assert capsys.readouterr().err == "", "one message, not two"


# ---- the split -----------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path) -> Path:
    """A file of 37 rows. Every third row has the same texts as its neighbour, so only its place identifies
    a row."""
    return write(
        tmp_path / "many.jsonl",
        [{"instruction": f"i{n - (n % 3 == 1)}", "output": "o"} for n in range(1, 38)],
    )


def lines(pairs: list[Pair]) -> list[int]:
    return [int(p.where.split()[-1]) for p in pairs]


@pytest.mark.parametrize(
    ("data", "n_val"),
    [
        ({"val_docs": 5}, 5),
        ({"val_docs": 36}, 36),
        ({"val_fraction": 0.2}, 7),
        ({"val_fraction": 0.001}, 1),
        ({}, 4),
    ],
    ids=str,
)
def test_validation_rows_are_drawn_whole_and_the_rest_is_trained_on(many, data, n_val):
    train, val = map(lines, split_pairs(config_of(many, **data)))
    assert len(val) == n_val
    assert sorted(train + val) == list(range(1, 38)), "each row on one side, none lost"
    assert (train, val) == (sorted(train), sorted(val)), "in the order of the file"


def test_the_seed_decides_the_split(many):
    splits = [lines(split_pairs(config_of(many, seed, val_docs=9))[1]) for seed in (1, 1, 2, 3)]
    assert splits[0] == splits[1]
    assert len({tuple(split) for split in splits}) == 3
    assert splits[0] != list(range(1, 10)) and splits[0] != list(range(29, 38)), (
        "drawn at random, not the first or the last"
    )


def test_fewer_training_rows_are_the_first_ones_and_validation_stays_the_same(many):
    whole, limited = (split_pairs(config_of(many, val_docs=9, train_docs=n)) for n in (None, 11))
    assert limited[0] == whole[0][:11]
    assert limited[1] == whole[1]


def test_validation_may_have_its_own_file(many, tmp_path):
    other = write(tmp_path / "val.json", [{"instruction": f"v{n}", "output": "o"} for n in range(8)])
    train, val = split_pairs(config_of(many, val_path=str(other)))
    assert lines(train) == list(range(1, 38))
    assert [p.instruction for p in val] == [f"v{n}" for n in range(8)]
    train, val = split_pairs(config_of(many, val_path=str(other), val_docs=3, train_docs=4))
    assert (lines(train), [p.instruction for p in val]) == ([1, 2, 3, 4], ["v0", "v1", "v2"])
    with pytest.raises(
        UserError, match=r"data\.val_path=nowhere\.json: no \.json, \.jsonl or \.parquet file there"
    ):
        split_pairs(config_of(many, val_path="nowhere.json"))


def test_validation_may_be_a_split_of_the_dataset(monkeypatch):
    hub = {
        "train": [{"q": f"t{n}", "output": "o"} for n in range(6)],
        "test": [{"q": f"v{n}", "output": "o"} for n in range(4)],
    }
    asked = []

    def open_dataset(name, config, split, path, revision, streaming, instead):
        asked.append((name, config, split, path, revision, streaming))
        return hub[split]

    monkeypatch.setattr("support.text.instruction_files.open_dataset", open_dataset)
    names = {
        "path": None,
        "dataset": "some/rows",
        "config": "en",
        "revision": "abc",
        "fields": {"instruction": "q"},
    }
    config = config_of("unused")
    config.data = config.data.model_validate(
        config.data.model_dump() | names | {"val_split": "test", "val_docs": 3}
    )
    train, val = split_pairs(config)
    assert [p.instruction for p in train] == [f"t{n}" for n in range(6)]
    assert [p.instruction for p in val] == ["v0", "v1", "v2"]
    assert asked == [
        ("some/rows", "en", "train", None, "abc", False),
        ("some/rows", "en", "test", None, "abc", False),
    ]
    assert val[1].where == "some/rows, row 2 of test"
    config.data = config.data.model_copy(update={"val_split": None, "val_docs": 2})
    train, val = split_pairs(config)
    assert sorted(p.instruction for p in train + val) == [f"t{n}" for n in range(6)] and len(val) == 2


@pytest.mark.parametrize("n_val", [37, 1000])
def test_validation_that_leaves_nothing_to_train_on_is_refused(many, n_val):
    with pytest.raises(
        UserError, match=f"37 instructions, of which {n_val} are for validation, leave none to train on"
    ):
        split_pairs(config_of(many, val_docs=n_val))


@pytest.mark.parametrize("data", [{}, {"val_docs": 4}], ids=str)
def test_a_row_that_is_most_of_the_text_is_trained_on(tmp_path, data):
    """A row cannot be cut, so another row is held out instead. If all rows are similar, the same ones as
    before are held out."""
    rows = [GOOD | {"output": f"{n} " + "word " * (n % 7)} for n in range(40)]
    alike = write(tmp_path / "alike.json", rows)
    rows[11] = GOOD | {"output": "long " * 5000}
    path = write(tmp_path / "rows.json", rows)
    moved = 0
    for seed in range(30):
        train, val = map(lines, split_pairs(config_of(path, seed, **data)))
        drawn = np.random.default_rng(seed).permutation(40)
        assert (11 + 1 in train, len(val)) == (True, 4)
        assert sorted(n - 1 for n in lines(split_pairs(config_of(alike, seed, **data))[1])) == sorted(
            drawn[:4].tolist()
        )
        moved += 11 in drawn[:4]
    assert moved > 0, "with some of these seeds a plain draw would hold it out"


def test_a_single_row_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match="1 instructions, of which 1 are for validation"):
        split_pairs(config_of(write(tmp_path / "one.json", [GOOD])))


def test_a_config_loads_both_sides_and_validation_scores_only_responses(many):
    for mask_prompt in (True, False):
        packed = load_instructions(config_of(many, val_docs=5, mask_prompt=mask_prompt), BYTE)
        assert (packed.n_train_docs, packed.n_val_docs, len(packed.train), len(packed.val)) == (32, 5, 32, 5)
        assert (packed.train[0]["labels"] == IGNORE).any() != (not mask_prompt)
        assert (packed.val[0]["labels"] == IGNORE).any()
        first = split_pairs(config_of(many, val_docs=5))[0][0]
        assert packed.sample_text == f"Q{first.instruction}Ao"
