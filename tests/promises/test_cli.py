"""support/cli.py: any text can be printed in any encoding, and output that fails ends nothing."""

import os
import subprocess
import sys

import pytest
from conftest import REPO

from support.messages import OptionalPart

# A Latin letter, one of another script, one beyond U+FFFF, half of a surrogate pair.
TEXT = "na\u00efve \u6771 \U0001f600 \ud800 \ufffd end"


def script(body: str, results: bool = True) -> str:
    return f"""
import sys
from support.cli import guarded, print_wide
from support.messages import printable, warn
text = {TEXT!r}
def main():
    {body}
    return 3
code = guarded(main, results={results})
sys.exit(code)
"""


def ended(code: str, redirect: str = "", **env: str) -> tuple[int, bytes, bytes]:
    """(status, standard output, standard error) of the code in its own process, with a shell's
    redirection."""
    command = ["sh", "-c", f'exec "$0" "$@" {redirect}', sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPO, env=os.environ | env, capture_output=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "utf-8", "ascii:strict"])
@pytest.mark.parametrize("body", ["print(text)", "warn(text)", "print(text, file=sys.stderr)"])
def test_what_the_encoding_lacks_is_shown_as_an_escape(encoding, body):
    status, out, err = ended(script(body), PYTHONIOENCODING=encoding)
    assert (status, b"Traceback" in err) == (3, False)
    said = (out + err).decode(encoding.split(":")[0])
    assert "end" in said
    assert ("\u6771" if encoding == "utf-8" else "\\u6771") in said
    assert "\\ud800" in said, "half a character, which no encoding has"


def test_a_table_is_drawn_in_every_encoding():
    body = (
        "from rich.table import Table; t = Table(title=text[:-20]); t.add_column(text[0:7]); "
        "t.add_row(text[0:7]); print_wide(t)"
    )
    status, out, err = ended(script(body), PYTHONIOENCODING="ascii")
    assert (status, b"\\u6771" in out) == (3, True), err


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "finetune",
        "infer",
        "list",
        "eval_val",
        "evaluate_checkpoints",
        "benchmark",
        "convert",
        "prepare",
        "from_scratch",
    ],
)
def test_help_is_shown_in_ascii(name):
    done = subprocess.run(
        [sys.executable, f"{name}.py", "--help"],
        cwd=REPO,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (done.returncode, done.stdout[:6], done.stderr) == (0, b"usage:", b"")


@pytest.mark.parametrize(
    "body",
    ["print(text)", "warn(text)", "print(sys.stdout.isatty(), sys.stderr.isatty())", "print_wide(text)"],
)
@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_output_ends_nothing(body, redirect):
    status, _, err = ended(script(body), redirect)
    assert (status, b"Traceback" in err) == (3, False)


def test_a_file_does_not_take_the_place_of_closed_output(tmp_path):
    """The first file that is opened would get number 1, and with it what is printed."""
    body = (
        f"file = open({str(tmp_path / 'data')!r}, 'w'); print('said'); sys.stdout.flush(); import os; "
        "os.write(1, b'said'); file.write('data')"
    )
    assert ended(script(body), ">&-")[0] == 3
    assert (tmp_path / "data").read_text() == "data"


@pytest.mark.parametrize("n", [1, 3000], ids=["a line", "more than a buffer"])
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_standard_output_is_an_error_where_results_go_there(n, unbuffered):
    status, _, err = ended(
        script(f"print('a line of results\\n' * {n})"), ">/dev/full", PYTHONUNBUFFERED=unbuffered
    )
    assert (status, err.count(b"\n")) == (2, 1)
    assert err.startswith(b"error: standard output cannot be written (No space left on device)")


@pytest.mark.parametrize("n", [1, 3000], ids=["a line", "more than a buffer"])
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_a_run_s_messages_ends_nothing(n, unbuffered):
    code = script(f"print('a message\\n' * {n}); print('another', flush=True)", results=False)
    status, _, err = ended(code, ">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (status, err) == (3, b"")


@pytest.mark.parametrize("results", [True, False])
def test_a_full_disk_under_standard_error_ends_nothing(results):
    status, out, _ = ended(script("warn(text); print('continues'); warn(text * 999)", results), "2>/dev/full")
    assert (status, out) == (3, b"continues\n")


def test_a_reader_that_has_gone_still_ends_a_script_quietly():
    code = script("[print('a line', flush=True) for _ in range(99_999)]")
    for env in ({}, {"PYTHONUNBUFFERED": "1"}):
        done = subprocess.run(
            ["sh", "-c", '"$0" -c "$1" | head -1', sys.executable, code],
            cwd=REPO,
            capture_output=True,
            env=os.environ | env,
        )
        assert (done.stdout, done.stderr) == (b"a line\n", b"")


def test_an_optional_part_warns_once_and_lets_exits_through(capsys):
    part = OptionalPart("the weather")
    for number in range(3):
        with part:
            raise ValueError(f"no forecast {number}\n\x1b[2J")
    err = capsys.readouterr().err
    assert err == (
        "warning: the weather failed (ValueError: no forecast 0 \\x1b[2J); the run continues without it\n"
    )
    for error in (SystemExit(3), KeyboardInterrupt()):
        with pytest.raises(type(error)), part:
            raise error
