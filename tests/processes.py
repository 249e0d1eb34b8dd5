"""Groups of processes for the tests of distributed training.

Nothing can hang here: a group that has not ended after LIMIT_SECONDS is killed, and its test fails.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import Run

LIMIT_SECONDS = 120  # a group of processes that runs longer has hung


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


class Group:
    """The processes of one run, in a process group of their own. `pids` are in the order of their start."""

    def __init__(self, folder: Path, *works: Callable[[], int]):
        self.folder = folder
        self.pids: list[int] = []
        self.said = ""
        self.hung = False
        read, write = os.pipe()
        self.err = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the group)
        for work in works:
            self.pids.append(self._fork(work, write))
        os.close(write)
        self.out = open(read)  # noqa: SIM115 (closed by `end`)
        self.limit = threading.Timer(LIMIT_SECONDS, self._give_up)
        self.limit.start()

    def _fork(self, work: Callable[[], int], out: int) -> int:
        group = self.pids[0] if self.pids else 0
        pid = os.fork()
        if pid:
            with contextlib.suppress(OSError):  # the child may have done it already
                os.setpgid(pid, group)
            return pid
        code = 70  # an error of ours, with its traceback
        try:
            os.setpgid(0, group)
            os.dup2(out, 1)
            os.dup2(self.err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # A fork breaks the thread pool; this makes a new one. PyTorch aborts if several threads do so.
            torch.set_num_threads(1)
            code = work()
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            sys.__excepthook__(type(error), error, error.__traceback__)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def until(self, pattern: str) -> "Group":
        """Read standard output until a line matches the pattern."""
        for line in self.out:
            self.said += line
            if re.match(pattern, line):
                return self
        raise AssertionError(f"ended before {pattern!r}: {self.end()}")

    def signal(self, signum: int, *pids: int) -> "Group":
        """Send the signal to these processes, or without any to the whole group."""
        for pid in pids:
            os.kill(pid, signum)
        if not pids:
            os.killpg(self.pids[0], signum)
        return self

    def children(self) -> list[int]:
        """The ids of the first process's children."""
        return children_of(self.pids[0])

    def _give_up(self) -> None:
        self.hung = True
        self.kill()

    def kill(self) -> None:
        for pid in self.pids:  # torchrun gives its workers sessions of their own
            for child in children_of(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pids[0], signal.SIGKILL)

    def end(self) -> Run:
        """Wait until all processes have closed standard output, so until none is left. The exit status is
        that of the first process."""
        self.said += self.out.read()
        self.limit.cancel()
        self.codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        self.out.close()
        self.err.seek(0)
        err = self.err.read()
        assert not self.hung, f"hung; it said:\n{self.said}\n{err}"
        return Run(self.folder, self.codes[0], self.said, err)
