"""What is said to users: the error for their mistakes, warnings, notices, and text made safe to print."""

import contextlib
import os
import sys
from typing import Any


class UserError(ValueError):
    """A mistake the user can mend. The message gives the value, the rule and the next step."""


def is_main_process() -> bool:
    """False in the further processes of a distributed run, whoever launched it."""
    return all(
        os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    )


def printable(text: object) -> str:
    """The text with what a terminal would obey rather than show written as an escape: `\\x1b[2J`, `\\n`,
    `\\ud800`."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def printable_lines(text: str) -> str:
    """The same for a text of several lines, whose line ends and tabs stay."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def inform(message: str) -> None:
    """Beside the result, which is alone on standard output. Of several processes the main one says it."""
    if is_main_process():
        print(message, file=sys.stderr)


class OptionalPart(contextlib.AbstractContextManager):
    """`with extra: ...` around what is not training itself, such as a picture or a log: its first failure
    is a warning, and none of them ends the run."""

    def __init__(self, name: str):
        self.name, self.failed = name, False

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):  # a signal or an exit goes through
            return False
        if not self.failed:
            what = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            warn(f"{self.name} failed ({type(error).__name__}: {printable(what)}); the run goes on without")
        self.failed = True
        return True


def warn(message: str) -> None:
    """Of several processes the main one says it, since the others find the same."""
    if is_main_process():
        print(f"warning: {message}", file=sys.stderr)
