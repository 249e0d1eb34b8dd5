"""What counts as a document, in files of every kind."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from support.config.schema import DataConfig
from support.files.find_files import find_files
from support.messages import UserError
from support.text.documents import read_documents, text_documents

EOS_LINE = b"<|endoftext|>\n"


def documents(path: Path | str, **keys) -> list[str]:
    return text_documents(str(path), DataConfig(path=str(path), **keys))


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- which files ---------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path) -> Path:
    """b.txt, a.txt, rows.jsonl, deep/er/c.txt, and three files that are not documents."""
    for name in ("b.txt", "a.txt", "deep/er/c.txt"):
        write(tmp_path / name, f"text of {name}")
    write(tmp_path / "rows.jsonl", '{"text": "row"}\n')
    for name in ("readme.md", "deep/picture.png", "noextension"):
        write(tmp_path / name, b"\xff\x00")
    (tmp_path / "folder.txt").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a.txt", ["a.txt"]),
        ("", ["a.txt", "b.txt", "deep/er/c.txt", "rows.jsonl"]),
        ("deep", ["deep/er/c.txt"]),
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "deep/er/c.txt"]),
        ("[ab].txt", ["a.txt", "b.txt"]),
    ],
    ids=["a file", "a folder", "a folder below", "a glob", "a recursive glob", "a class of characters"],
)
def test_a_path_is_a_file_a_folder_or_a_glob(library, path, found):
    """Files come in the order of their names, so that a corpus is the same on every machine."""
    assert find_files(str(library / path)) == [library / name for name in found]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    path = write(tmp_path / "what[1]*.txt", "one")
    write(tmp_path / "what1.txt", "another")
    assert documents(path) == ["one"]


def test_a_file_is_read_whatever_it_is_called(tmp_path):
    assert documents(write(tmp_path / "README", "text")) == ["text"]


@pytest.mark.parametrize("path", ["nothing.txt", "*.text", "empty", "empty/*"])
def test_a_path_without_files_is_an_error_that_names_it(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="file, a folder or a quoted glob") as caught:
        find_files(str(tmp_path / path))
    assert f"data.path={tmp_path / path}" in str(caught.value)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.json"])
def test_the_error_for_a_file_of_another_source_says_how_to_read_it(tmp_path, name):
    with pytest.raises(
        UserError, match=rf"data\.source=hf --override data\.dataset={name.partition('.')[2]}"
    ):
        documents(write(tmp_path / name, "[]"))


def test_file_endings_ignore_case_and_ndjson_is_jsonl(tmp_path):
    """Before, such rows were trained on as plain text, with their braces, and a .TXT in a folder was
    skipped."""
    for name in ("a.ndjson", "b.JSONL", "c.NdJson"):
        write(tmp_path / name, '{"text": "a row"}\n{"text": "another"}\n')
        assert documents(tmp_path / name) == ["a row", "another"]
    write(tmp_path / "D.TXT", "a text")
    assert documents(tmp_path) == ["a text", *["a row", "another"] * 3]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rows.jsonl.gz", "is packed, and only unpacked files are read; unpack it first: gunzip -k"),
        ("a.TXT.ZST", "unpack it first: unzstd"),
        ("a.txt.xz", "unxz -k"),
        ("a.bz2", "bunzip2 -k"),
        ("a.zip", "unzip"),
        ("a.7z", "is packed"),
        ("a.PDF", "is not plain text; save its text as .txt"),
        ("a.docx", "is not plain text"),
        ("a.htm", "holds markup; save its text as .txt, or name it .txt"),
        ("a.csv", "is a table; write the column with the text as .jsonl"),
        ("a.pkl", "is a pickle"),
        ("train.npy", "data.source=tokens"),
        ("final.ckpt", "holds a model"),
    ],
)
def test_an_unsupported_kind_of_file_is_refused_by_its_name(tmp_path, name, said):
    """Before, it was read as text, or called binary with the advice to replace what is not UTF-8. In a
    folder such a file is left out."""
    path = write(tmp_path / name, "not a text")
    with pytest.raises(UserError) as caught:
        documents(path)
    assert str(caught.value).startswith(f"{path} ") and said in str(caught.value)
    with pytest.raises(UserError) as caught:
        documents(tmp_path)
    assert f"no .txt or .jsonl file there (found: 1 {path.suffix})" in str(caught.value)
    assert said in str(caught.value), "also for a folder, the error says what to do with its files"


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (gzip.compress(b"text"), "gunzip"),
        (bz2.compress(b"text"), "bunzip2"),
        (lzma.compress(b"text"), "unxz"),
        (b"PK\3\4", "unzip"),
        (b"%PDF-1.7", "save its text"),
    ],
    # Without these ids the bytes would be the ids, and a .gz holds the time: two processes would not agree.
    ids=["gz", "bz2", "xz", "zip", "pdf"],
)
@pytest.mark.parametrize("name", ["book.txt", "rows.jsonl", "book"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_a_compressed_file_named_like_a_text_is_refused_by_its_real_kind(
    tmp_path, packed, said, name, errors
):
    with pytest.raises(UserError, match=said):
        documents(write(tmp_path / name, packed), errors=errors)


def test_rows_in_a_file_named_like_a_text_are_read_with_a_warning(tmp_path, capsys):
    assert len(documents(write(tmp_path / "a.txt", '{"text": "a"}\n{"text": "b"}\n'))) == 1
    assert "a.txt is read as plain text, and its first line is a JSON object" in capsys.readouterr().err
    documents(write(tmp_path / "b.txt", "{braces} in a text\n{}"))
    assert capsys.readouterr().err == ""


def test_skipped_files_of_a_folder_are_reported_in_one_line(tmp_path, capsys):
    for name in ("a.txt", "deep/b.txt", "c.jsonl"):
        write(tmp_path / name, '{"text": "row"}' if name == "c.jsonl" else "text")
    assert len(documents(tmp_path)) == 3
    assert capsys.readouterr().err == "", "nothing was left out"
    for name in ("x.pdf", "deep/y.pdf", "README", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt"):
        write(tmp_path / name, b"\0\5")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    assert len(documents(tmp_path)) == 3
    left_out = "6 left out (2 .pdf, 2 hidden, 1 broken link, 1 without an ending)"
    assert capsys.readouterr().err == f"data: 3 files read from {tmp_path}, {left_out}\n"
    (tmp_path / "deep" / "folder").mkdir()
    assert len(documents(tmp_path / "*.txt")) == 1
    assert "1 left out (1 broken link)" in capsys.readouterr().err
    assert len(documents(f"{tmp_path}/deep/*")) == 1
    assert "2 left out (1 .pdf, 1 folder)" in capsys.readouterr().err


def test_linked_folders_are_followed_and_each_file_is_read_once(tmp_path):
    """Also if a link leads back to its own folder, or if several names lead to one file: a text that is
    read twice could be both trained on and validated on."""
    write(tmp_path / "elsewhere" / "book.txt", "a book")
    write(tmp_path / "texts" / "a.txt", "a note")
    write(tmp_path / "texts" / "real" / "b.txt", "another")
    for name, target in {
        "more": "../elsewhere",
        "again": "real",
        "circle": ".",
        "up/circle": "../..",
    }.items():
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / name).symlink_to(target)
    (tmp_path / "texts" / "link.txt").symlink_to("a.txt")
    (tmp_path / "texts" / "hard.txt").hardlink_to(tmp_path / "texts" / "real" / "b.txt")
    (tmp_path / "texts" / "up" / "circle").unlink()
    found = find_files(str(tmp_path / "texts"))
    assert [file.relative_to(tmp_path / "texts").as_posix() for file in found] == [
        "a.txt",
        "hard.txt",
        "more/book.txt",
    ]
    assert sorted(documents(f"{tmp_path}/texts/**/*.txt")) == ["a book", "a note", "another"]


# ---- text ----------------------------------------------------------------------------------------


def test_a_file_without_separators_is_one_document_byte_for_byte(tmp_path):
    text = "\n\n  first line \n\n\tsecond\u2028still second\x0b\x0c\x85\rthe same line \n\n\n"
    assert documents(write(tmp_path / "a.txt", text)) == [text]


def test_a_byte_order_mark_is_not_text_and_line_ends_become_one_character(tmp_path):
    assert documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\xef\xbb\xbfthree")) == [
        "one\ntwo\n\n\ufeffthree"
    ]


def test_lines_of_endoftext_separate_documents(tmp_path):
    """With spaces or a carriage return at the line's end, at the file's ends, and several in a row."""
    content = (
        EOS_LINE
        + b"one\n\nstill one\n<|endoftext|>\r\n\n  two \n\n <|endoftext|> \n"
        + EOS_LINE
        + b"   \n"
        + EOS_LINE
    )
    content += b"three\n<|endoftext|>"
    assert documents(write(tmp_path / "a.txt", content)) == ["one\n\nstill one", "  two ", "three"]


@pytest.mark.parametrize(
    "line",
    ["a <|endoftext|> b", "<|endoftext|><|endoftext|>", "<|endoftext|>.", "<| endoftext |>", "<|ENDOFTEXT|>"],
)
def test_endoftext_within_a_line_is_text(tmp_path, line):
    assert documents(write(tmp_path / "a.txt", f"x\n{line}\ny")) == [f"x\n{line}\ny"]


def test_files_do_not_run_into_each_other(tmp_path):
    write(tmp_path / "a.txt", "one" + "\n<|endoftext|>\n" + "two")
    write(tmp_path / "b.txt", "three")
    write(tmp_path / "c.jsonl", '{"text": "four"}')
    assert documents(tmp_path) == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    "content", [b"", b"\n \t\r\n", EOS_LINE * 3, b"\xef\xbb\xbf", "\u3000\n".encode()], ids=repr
)
def test_a_corpus_without_text_is_an_error(tmp_path, content):
    with pytest.raises(UserError, match=rf"a\.txt holds no text \(1 file, {len(content)} bytes\)"):
        documents(write(tmp_path / "a.txt", content))


# ---- bytes that are not text ---------------------------------------------------------------------

BROKEN = {
    "first byte": (b"\xff", 0),
    "after ascii": (b"abc\xffdef", 3),
    "second line": (b"abc\n\xe9tudes", 4),
    "cut off at the end": ("été 🙂".encode()[:-1], 6),
    "cut off by a line end": (b"ab\xe2\x82\ncd", 2),
    "after multi-byte characters": ("日本語".encode() + b"\x80", 9),
    "after a byte order mark": (b"\xef\xbb\xbfabc\xff", 6),
    "second line after a byte order mark": (b"\xef\xbb\xbfabc\n\xff", 7),
    "after carriage returns": (b"a\r\nb\r\n\xc0", 6),
    "a surrogate in UTF-8": (b"ab\xed\xa0\x80", 2),
    "an overlong form": (b"a\xc0\xaf", 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path, name):
    content, offset = BROKEN[name]
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(UserError) as caught:
        documents(path)
    assert str(path) in str(caught.value)
    assert f"byte {content[offset]:#04x} at offset {offset} is not UTF-8" in str(caught.value)
    assert "data.errors=replace" in str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_with_errors_replace_bad_bytes_become_the_replacement_character(tmp_path, name):
    """As Python itself reads the whole file."""
    content, _ = BROKEN[name]
    expected = content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    assert "\ufffd" in expected
    assert documents(write(tmp_path / "a.txt", content), errors="replace") == [expected]


@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"ab\0c", 2), (b"line\nab\0", 7), ("text".encode("utf-16-le"), 1), (b"\xef\xbb\xbf\0", 3)],
)
def test_a_file_with_a_nul_byte_is_called_binary_and_the_offset_is_named(tmp_path, content, offset):
    with pytest.raises(UserError, match=rf"NUL byte at offset {offset}, .*UTF-16"):
        documents(write(tmp_path / "a.txt", content))
    assert "\0" in documents(tmp_path / "a.txt", errors="replace")[0]


# ---- rows ----------------------------------------------------------------------------------------


def test_each_jsonl_row_is_a_document_whatever_it_holds(tmp_path):
    texts = [
        "one\ntwo",
        "<|endoftext|>",
        "a\n<|endoftext|>\nb",
        "\u2028 é 👩‍👩‍👧",
        "  spaces  ",
        "\x00 control",
    ]
    rows = "\n".join(
        json.dumps({"text": t, "title": 3}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)
    )
    assert documents(write(tmp_path / "a.jsonl", "\ufeff" + rows.replace("\n", "\r\n", 1))) == texts


def test_rows_without_text_are_left_out_and_counted_and_the_field_can_be_chosen(tmp_path, capsys):
    """A blank line is not a row."""
    path = write(
        tmp_path / "a.jsonl",
        '{"story": "one"}\n\n{"story": ""}\n{"story": null}\n{"story": "  \\n"}\n{"story": "two"}\n\n',
    )
    assert documents(path, text_field="story") == ["one", "two"]
    assert (
        capsys.readouterr().err
        == f"warning: 3 rows without text left out; the first: {path}, line 3 has no text\n"
    )


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"text": "cut', "line 3 is not JSON"),
        ("plain text", "line 3 is not JSON"),
        ('["text"]', "line 3 is not a JSON object"),
        ('"text"', "line 3 is not a JSON object"),
        (
            '{"title": "t", "body": "b"}',
            r"line 3 has no text in field 'text' \(fields: title, body\); set data\.text_field",
        ),
        (
            '{"text": 5}',
            r"line 3 has no text in field 'text' \(fields: text\), it holds 5; remove the row, or set "
            r"data\.text_field",
        ),
        ('{"text": ["a", "b"]}', r"it holds \[\"a\", \"b\"\]; remove the row"),
        ('{"text": "a" "b"}', "line 3 is not JSON: .*; each line of a .jsonl file is a whole object"),
        ("{}", "line 3 has no text in field 'text'"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, bad, says):
    """The empty second line is counted, so that an editor shows the right one."""
    path = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n\n{bad}\n{{"text": "fine"}}\n')
    with pytest.raises(UserError, match=says) as caught:
        documents(path)
    assert str(path) in str(caught.value)


def test_half_a_character_in_json_is_read_as_text_or_refused_with_its_line(tmp_path):
    """JSON can spell one half of a surrogate pair, which no tokenizer can encode."""
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n{"text": "half \\ud83d of it"}\n')
    try:
        found = documents(path)
    except UserError as error:
        assert f"{path}, line 2" in str(error)
    else:
        assert "".join(found).encode()


def test_bytes_that_are_not_utf8_are_found_in_jsonl_too(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match="byte 0xff at offset 25"):
        documents(path)
    assert documents(path, errors="replace") == ["ok", "\ufffd"]


def test_documents_are_read_one_by_one(tmp_path):
    """A bad row far down does not keep the ones before it from being used."""
    rows = read_documents(write(tmp_path / "a.jsonl", '{"text": "one"}\nbroken'))
    assert next(rows) == "one"
    with pytest.raises(UserError):
        next(rows)
