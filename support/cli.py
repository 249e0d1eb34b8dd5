"""What the command lines of all scripts share: a wrapper that turns a user's mistakes into a line of text and
an exit status, common flags, tables and progress bars.
"""

import argparse
import contextlib
import errno
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from support.foreign.flags import flag_answers
from support.messages import UserError, is_main_process, warn

SECONDS_BETWEEN_LINES = 20
# The disk or the user's share of it is full, a file would be too large, the disk is read-only, or broken.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# ---- entry and exit ------------------------------------------------------------------------------


def guarded(main: Callable, *args, results: bool = True, **kwargs):
    """Call `main` and return what it returns. A user's mistake is printed on standard error, in one to three
    lines without a traceback, and the script ends with exit status 2.

    Any other exception is a bug of ours and keeps its traceback. Ctrl-C never shows a traceback, not even
    during the imports after this call. `results` is True for a script that prints its results: then it is an
    error if they cannot be written, for example because the disk is full.

    A script calls this twice: first to read its flags, then, after imports that take seconds, to do its work.
    The first call prepares standard output and standard error, so only its `results` counts.
    """
    sys.excepthook = _quiet_interrupt
    open_output(results)
    try:
        try:
            return main(*args, **kwargs)
        finally:
            sys.stdout.flush()
    except UserError as error:
        if is_main_process():  # the other processes of the run have the same error
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the program that read our output has ended (| head): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr)
    sys.exit(2)


def _quiet_interrupt(kind: type[BaseException], error: BaseException, traceback) -> None:
    """Python calls this for an exception that nothing caught. Ctrl-C becomes one line; any other exception is
    shown as usual."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)  # Python itself then ends with status 130
    else:
        sys.__excepthook__(kind, error, traceback)


def open_output(results: bool) -> None:
    """Make sure that printing never ends a script, whatever the text and wherever it goes.

    A character that the encoding of a stream lacks is written as an escape (`\\u6771`). What is printed to a
    closed stream, or cannot be written (to a full disk, for example), is dropped. But if `results` go to
    standard output and cannot be written, that is a UserError. A second call changes nothing.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: otherwise the next file opened would get this number, and all we print
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor, holds_results in (("stdout", 1, results), ("stderr", 2, False)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # opened by an earlier call, or caught by a test
            continue
        if os.name == "nt" and stream:  # on Windows a terminal is not a file
            stream.reconfigure(errors="backslashreplace")
            continue
        file = OutputFile(descriptor, holds_results)
        is_unbuffered = bool(stream and stream.write_through)
        text = io.TextIOWrapper(
            file if is_unbuffered else io.BufferedWriter(file),
            encoding=stream.encoding if stream else "utf-8",
            errors="backslashreplace",
            line_buffering=bool(stream and stream.line_buffering),
            write_through=is_unbuffered,
        )
        setattr(sys, name, text)


class OutputFile(io.FileIO):
    """Standard output or standard error, as a file that drops what cannot be written (the disk is full, the
    terminal is closed), so that the script continues.

    If it holds results, its first failure is a UserError. If the program that reads standard output has ended
    (`| head`), that is a BrokenPipeError, as usual.
    """

    def __init__(self, descriptor: int, holds_results: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.holds_results = holds_results

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EPIPE and self.fileno() == 1:
                raise
            if self.holds_results:
                self.holds_results = False
                raise UserError(
                    f"standard output cannot be written ({error.strerror}), so part of the results is "
                    "missing; send it elsewhere"
                ) from None
            return len(data)


def end_with_parent(grace: float = 10.0, parent: int | None = None) -> None:
    """Start a thread that ends this process `grace` seconds after its parent, the process that started it, is
    gone. `parent` is the id of the parent; give it if the parent may be gone already.

    The other processes of a run call this. Without it, they would wait for a main process that has been
    killed for half an hour.
    """
    parent = parent or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(grace)
        os.write(2, b"error: the process that started this one is gone; it ends too\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- flags ---------------------------------------------------------------------------------------


def at_home(path: str, key: str = "") -> str:
    """The path with the home folder in place of ~ or ~user at its start. Raises UserError if there is no such
    user; the message names the config `key` that holds the path."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        named = f"{key}={path}" if key else path
        user = path.split("/")[0].removeprefix("~")
        raise UserError(
            f"{named}: there is no user {user}, whose home folder that would be; a file of that name is "
            f"./{path}"
        )
    return expanded


def file_path(text: str) -> str:
    """What argparse calls to convert the value of a flag that takes a path: ~ becomes the home folder."""
    try:
        return at_home(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Parser(argparse.ArgumentParser):
    """A parser that knows flags of other programs: if a user types one, its error names our flag for it."""

    typed: list[str] = []  # the words of the command line; `error` looks for unknown flags among them

    def parse_known_args(self, args=None, namespace=None):
        self.typed = list(sys.argv[1:] if args is None else args)
        for task in self.tasks().values():
            task.typed = self.typed[1:]
        return super().parse_known_args(args, namespace)

    def tasks(self) -> dict[str, "Parser"]:
        """{first word of the command line: the parser for this job}; empty if the script has only one job."""
        tasks: dict[str, Parser] = {}
        for action in self._actions:
            if isinstance(action.choices, dict):
                tasks |= action.choices
        return tasks

    def error(self, message: str) -> NoReturn:
        """Exit with argparse's message, and a line for each unknown flag that we know from other programs."""
        task = self.tasks().get(self.typed[0], self) if self.typed else self
        words = self.typed if task is self else self.typed[1:]
        paths = any(not action.option_strings and action.dest == "paths" for action in task._actions)
        answers = flag_answers(words, set(task._option_string_actions), paths=paths)
        super().error("\n       ".join([message, *answers]))


def make_parser(doc: str) -> Parser:
    """A parser whose --help shows the script's docstring with its line breaks, so that examples stay as they
    are."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of scripts that read a config."""
    parser.add_argument("--config", type=file_path, metavar="FILE", help="YAML (or JSON) config file")
    parser.add_argument(
        "--override",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change one config key, e.g. training.max_steps=1000; may be repeated",
    )
    parser.add_argument("--seed", type=int, help="short for --override seed=N")
    parser.add_argument(
        "--device", help="short for --override hardware.accelerator=NAME (auto, cpu, cuda, mps)"
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that train.py and finetune.py share."""
    add_config_flags(parser)
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        type=file_path,
        metavar="CKPT",
        help="resume the run in checkpoint.dir, or from this checkpoint",
    )
    beginning.add_argument(
        "--fresh",
        action="store_true",
        help="start a new run; an unfinished run in the folder is moved to old-<n>",
    )
    parser.add_argument(
        "--check", action="store_true", help="run the pre-training checklist and exit; nothing is written"
    )
    parser.add_argument(
        "--show-step", type=int, metavar="N", help="print the text that step N trains on, and exit"
    )


def add_tokenizer_flag(parser: argparse.ArgumentParser) -> None:
    """Add --tokenizer, which changes nothing, since a checkpoint has its own tokenizer. Users of other
    programs try it."""
    parser.add_argument(
        "--tokenizer",
        default="auto",
        type=file_path,
        metavar="NAME",
        help="auto (default) takes the checkpoint's own; another name only warns, since its ids mean "
        "nothing to this model",
    )


def warn_of_other_tokenizer(wanted: str, kind: str, vocab_size: int) -> None:
    """Warn if --tokenizer names another tokenizer than the checkpoint's, which is the one used."""
    if wanted not in ("auto", kind):
        warn(
            f"--tokenizer {wanted} is not what this model was trained with; using the checkpoint's own "
            f"({kind}, {vocab_size:,} tokens), since ids mean nothing under another vocabulary"
        )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of scripts that sample from a checkpoint."""
    parser.add_argument(
        "--ckpt",
        type=file_path,
        metavar="FILE",
        required=True,
        help="checkpoint to load; it holds model, tokenizer and config",
    )
    add_tokenizer_flag(parser)
    parser.add_argument("--seed", type=int, default=42, help="seed of the sampling (default 42)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")


def add_quantize_flag(parser: argparse.ArgumentParser) -> None:
    """Add --quantize, for scripts that can compute with smaller weights (support/int8.py)."""
    parser.add_argument(
        "--quantize",
        choices=["int8"],
        help="int8: after loading, round the matrices to one byte a weight; decoding is faster on a CPU",
    )


def unix_text(text: str) -> str:
    """The text as training would read it from a file: without the mark U+FEFF that some Windows programs put
    first, and with \\n for each \\r\\n."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


# ---- tables and progress -------------------------------------------------------------------------


def print_wide(table: Any) -> None:
    """Print a table of the library `rich` with lines as long as they need to be, so that no name is cut off:
    a narrow terminal wraps them. Brackets in names are shown, not read as markup."""
    from rich.console import Console

    Console(width=10_000, height=100, highlight=False, markup=False, emoji=False).print(table)


def progress(items: Iterable, label: str, total: int | None = None) -> Iterator:
    """Yield the items, and show a progress bar if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, label, total, console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def byte_progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """`with byte_progress(...) as advance:` gives a function to call with the number of bytes just done.
    Progress is shown as a bar on a terminal, and elsewhere as a line every SECONDS_BETWEEN_LINES seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n: bar.advance(task, n)
        return
    began = last_line = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal last_line, done
        done += n
        now = time.monotonic()
        if now - last_line < SECONDS_BETWEEN_LINES:
            return
        last_line = now
        of = f" of {total / 1e6:,.0f}" if total else ""
        speed = done / 1e6 / (now - began)
        print(f"{label}: {done / 1e6:,.0f}{of} MB, {speed:.1f} MB/s", file=sys.stderr, flush=True)

    yield advance
