"""What every script's command line shares: the error for users, the wrapper that prints it, the common flags."""

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
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
)  # full, over quota, too large, read-only, broken


def end_with_parent(grace: float = 10.0, parent: int | None = None) -> None:
    """From now on this process ends when whoever started it is gone, `grace` seconds later, if it has not
    ended itself. `parent` is its process id, for one that may be gone already.

    For the further processes of a run. Without its main process, one that waits for the others would do so
    for half an hour.
    """
    parent = parent or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(grace)
        os.write(2, b"error: the process that started this one is gone; it ends too\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class OutputFile(io.FileIO):
    """Standard output or standard error as a file whose failure (a full disk, a lost terminal) ends
    nothing: what it does not take is dropped. Where `results` go to it, the first failure is a UserError.
    A reader of standard output who has gone (`| head`) is the BrokenPipeError that it always is."""

    def __init__(self, descriptor: int, results: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.results = results

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EPIPE and self.fileno() == 1:
                raise
            if self.results:
                self.results = False
                raise UserError(
                    f"standard output cannot be written ({error.strerror}); a part is missing, so send it "
                    "elsewhere"
                ) from None
            return len(data)


def open_output(results: bool) -> None:
    """Make standard output and standard error fit for any text and any end. A character that their
    encoding lacks is written as an escape (`\\u6771`); one of them that is closed takes everything and
    shows nothing; one that fails ends nothing, but for standard output where the script's results go to
    it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would get its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor, important in (("stdout", 1, results), ("stderr", 2, False)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # done before, or caught by a test
            continue
        if os.name == "nt" and stream:  # its terminal is no plain file
            stream.reconfigure(errors="backslashreplace")
            continue
        file = OutputFile(descriptor, important)
        writer = file if stream and stream.write_through else io.BufferedWriter(file)
        by_line = bool(stream and stream.line_buffering)
        encoding = stream.encoding if stream else "utf-8"
        text = io.TextIOWrapper(
            writer, encoding, "backslashreplace", line_buffering=by_line, write_through=writer is file
        )
        setattr(sys, name, text)


def guarded(main: Callable, *args, results: bool = True, **kwargs):
    """Call `main`; turn a user's mistake into one to three lines on stderr and exit status 2, without a
    traceback.

    Anything else that is raised is a bug of ours and keeps its traceback; Ctrl-C is none, also during later
    imports. `results` says whether standard output is what the script is for (else a full disk there ends
    nothing).
    """
    sys.excepthook = _quiet_interrupt
    open_output(results)
    try:
        try:
            return main(*args, **kwargs)
        finally:
            sys.stdout.flush()
    except UserError as error:
        if is_main_process():  # the others found the same
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone (| head): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
    sys.exit(2)


def _quiet_interrupt(kind: type[BaseException], error: BaseException, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)  # Python itself then ends with status 130
    else:
        sys.__excepthook__(kind, error, traceback)


def at_home(path: str, key: str = "") -> str:
    """The path with ~ at its start, or ~user, as the home folder. Raises UserError for a user that there
    is none of."""
    found = os.path.expanduser(path)
    if path.startswith("~") and found == path:
        named = f"{key}={path}" if key else path
        raise UserError(
            f"{named}: there is no user {path.split('/')[0][1:]}, whose home folder that would be; a file "
            f"of that name is ./{path}"
        )
    return found


def file_path(text: str) -> str:
    """The type of a flag that takes a path."""
    try:
        return at_home(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Parser(argparse.ArgumentParser):
    """A parser that answers flags of other programs with ours."""

    typed: list[str] = []  # the command line, for the answer to what it does not know

    def parse_known_args(self, args=None, namespace=None):
        self.typed = list(sys.argv[1:] if args is None else args)
        for task in self.tasks().values():
            task.typed = self.typed[1:]
        return super().parse_known_args(args, namespace)

    def tasks(self) -> dict[str, "Parser"]:
        """The parsers of the first word, in a script that does several jobs."""
        return {
            name: task
            for action in self._actions
            if isinstance(action.choices, dict)
            for name, task in action.choices.items()
        }

    def error(self, message: str) -> NoReturn:
        task = self.tasks().get(self.typed[0] if self.typed else "", self)
        words = self.typed if task is self else self.typed[1:]
        paths = any(not action.option_strings and action.dest == "paths" for action in task._actions)
        answers = flag_answers(words, set(task._option_string_actions), paths=paths)
        super().error("\n       ".join([message, *answers]))


def make_parser(doc: str) -> Parser:
    """A parser whose --help is the script's docstring, with its examples as they stand there."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
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
    """What train.py and finetune.py have in common."""
    add_config_flags(parser)
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        type=file_path,
        metavar="CKPT",
        help="go on with the run in checkpoint.dir, or with this checkpoint",
    )
    beginning.add_argument(
        "--fresh", action="store_true", help="start anew; an unfinished run in the folder is moved to old-<n>"
    )
    parser.add_argument(
        "--check", action="store_true", help="run the pre-training checklist and exit; nothing is written"
    )
    parser.add_argument(
        "--show-step", type=int, metavar="N", help="print the text that step N trains on, and exit"
    )


def add_tokenizer_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        default="auto",
        type=file_path,
        metavar="NAME",
        help="auto (default) takes the checkpoint's own; another name only warns, since its ids mean "
        "nothing to this model",
    )


def warn_of_other_tokenizer(wanted: str, kind: str, vocab_size: int) -> None:
    """Say that what --tokenizer names is not used where the checkpoint has another one."""
    if wanted not in ("auto", kind):
        warn(
            f"--tokenizer {wanted} is not what this model was trained with; using the checkpoint's own ({kind}, "
            f"{vocab_size:,} tokens), since ids mean nothing under another vocabulary"
        )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
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


def unix_text(text: str) -> str:
    """A text as those for training are read: without a byte order mark at its beginning, line ends as \\n."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def print_wide(table: Any) -> None:
    """A rich table on lines of any length, so that no name is ever cut: a narrow terminal folds the line
    itself. Names are shown as they are, brackets too."""
    from rich.console import Console

    Console(width=10_000, height=100, highlight=False, markup=False, emoji=False).print(table)


def progress(items: Iterable, label: str, total: int | None = None) -> Iterator:
    """The items, with a bar on the terminal while they last; without a terminal, the items alone."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, label, total, console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def byte_progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes that have been done: a bar on the terminal, elsewhere a line now
    and then."""
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
    began = said = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal said, done
        done += n
        if (now := time.monotonic()) - said >= SECONDS_BETWEEN_LINES:
            of = f" of {total / 1e6:,.0f}" if total else ""
            print(
                f"{label}: {done / 1e6:,.0f}{of} MB, {done / 1e6 / (now - began):.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )
            said = now

    yield advance
