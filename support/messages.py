"""How the program speaks to users: the error for their mistakes, warnings, notices, and text made safe to
print."""

import contextlib
import os
import sys
from typing import Any


class UserError(ValueError):
    """A mistake the user can fix. The message gives the value, the rule and the next step."""


def is_main_process() -> bool:
    """True in the first process of a run on several GPUs or machines (or the only one), False in the others,
    whichever program started them."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def warn(message: str) -> None:
    """Print a warning on standard error. Only the main process prints it: the others would say the same."""
    if is_main_process():
        print(f"warning: {message}", file=sys.stderr)


def inform(message: str) -> None:
    """Print a notice on standard error, so that standard output holds only results. Only the main process
    prints it."""
    if is_main_process():
        print(message, file=sys.stderr)


class OptionalPart(contextlib.AbstractContextManager):
    """`with part: ...` around something that a run does not need, such as a picture or a log. If it fails,
    the run continues: the first failure is a warning, later ones are silent."""

    def __init__(self, name: str):
        self.name = name
        self.failed = False

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """Python calls this at the end of the block. True means that the error is dealt with; False lets it
        through, which is right for Ctrl-C and for an exit."""
        if not isinstance(error, Exception):
            return False
        if not self.failed:
            what = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            warn(
                f"{self.name} failed ({type(error).__name__}: {printable(what)}); the run continues without "
                "it"
            )
        self.failed = True
        return True


def printable(text: object) -> str:
    r"""The text with escapes in place of control characters, which a terminal would obey instead of showing.

    >>> printable("clear\x1b[2J and a new line\n")
    'clear\\x1b[2J and a new line\\n'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def printable_lines(text: str) -> str:
    """The same for a text of several lines: line ends and tabs stay."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)
