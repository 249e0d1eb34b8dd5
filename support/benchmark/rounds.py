"""Times programs side by side, in rounds, and leaves out rounds that other processes disturbed.

A *side* is one of the programs that are compared. In each *round* every side has one *turn*, so a machine
that grows slow or fast does so for all of them. A round is *disturbed*, and is left out, if other processes
took CPU time that a turn needed. What is left gives a median for each side, and its noise.
"""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

WARM_UP_RUNS = 3  # that do not count: they fill caches
TURN_SECONDS = 0.25  # a turn repeats its work until it takes about this long: CPU times come in 1/100 s
MAX_LOST = 0.05  # a round is disturbed if other processes took more than this share of our CPU time in a turn
MAX_ROUNDS_FOR_ONE = 3  # at most this many rounds are made for each one that is wanted


@dataclass
class Side:
    """One program that is timed. `run` does its work once. It can return the seconds that count, if only a
    part of them does; otherwise the whole call is timed."""

    name: str
    run: Callable[[], float | None]
    n_params: int | None = None
    flops: float = 0.0  # useful floating-point operations of one run
    n_bytes: float = 0.0  # bytes that one run has to read from memory, at least
    units: float = 1.0  # what it gets done, e.g. tokens
    note: str = ""  # shown beside its name
    memory: int | None = None  # bytes of GPU memory at most; None on a CPU


# ---- disturbance ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds so far: of the whole machine, and of this process with its finished children."""

    everyone: float
    ours: float
    n_cpus: int = 1


def read_cpu_times() -> CpuTimes | None:
    """The times now; None on a system that is not Linux."""
    if sys.platform != "linux":
        return None
    total, *each = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line[:3] == "cpu"]
    user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, total[1:9])
    busy = user + nice + system + irq + softirq + stolen  # stolen: by other virtual machines
    ours = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        ours += used.ru_utime + used.ru_stime
    return CpuTimes(everyone=busy / os.sysconf("SC_CLK_TCK"), ours=ours, n_cpus=len(each))


def lost_share(
    before: CpuTimes | None, after: CpuTimes | None, seconds: float, n_threads: int
) -> float | None:
    """The share of our threads' time that other processes took. Others may use the CPUs that our threads
    leave free. None if the system does not tell.

    Two CPUs, our two threads, one second, in which the others used 0.2 s: they took a tenth of our 2 s. Of 16
    CPUs they would have used free ones.
    """
    if before is None or after is None or seconds <= 0:
        return None
    others = (after.everyone - before.everyone) - (after.ours - before.ours)
    n_threads = min(n_threads, after.n_cpus)
    free = (after.n_cpus - n_threads) * seconds
    return max(0.0, others - free) / (n_threads * seconds)


# ---- rounds --------------------------------------------------------------------------------------


@dataclass
class Rounds:
    """What was timed: for each round and side the seconds of one run, and the share of CPU time that was lost
    in the worst turn of the round (None if the system does not tell)."""

    names: list[str]
    seconds: list[dict[str, float]] = field(default_factory=list)
    lost: list[float | None] = field(default_factory=list)

    @property
    def clean(self) -> list[int]:
        """The numbers of the rounds that were not disturbed."""
        return [i for i, lost in enumerate(self.lost) if lost is None or lost <= MAX_LOST]

    @property
    def kept(self) -> list[int]:
        """The rounds that count: the clean ones; if there is none, all."""
        return self.clean or list(range(len(self.lost)))

    @property
    def n_dropped(self) -> int:
        return len(self.lost) - len(self.kept)

    @property
    def all_disturbed(self) -> bool:
        """Whether even the rounds that count were disturbed."""
        return not self.clean

    def of(self, name: str) -> list[float]:
        """The seconds of one run of this side, in the rounds that count."""
        return [self.seconds[i][name] for i in self.kept]

    def median(self, name: str) -> float:
        return statistics.median(self.of(name))

    def noise(self, name: str) -> float:
        """Half of the rounds are within this share of the median."""
        median = self.median(name)
        return statistics.median(abs(seconds - median) for seconds in self.of(name)) / median

    def ratio(self, name: str, other: str) -> float:
        """How many times as fast as `other` the side `name` is: the median over rounds, each compared with
        itself."""
        pairs = zip(self.of(name), self.of(other), strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    def difference(self, name: str, other: str) -> float:
        """How many seconds longer `name` takes than `other`, compared in the same way."""
        pairs = zip(self.of(name), self.of(other), strict=True)
        return statistics.median(ours - theirs for ours, theirs in pairs)


def interleave(
    sides: list[Side],
    *,
    n_rounds: int,
    max_seconds: float,
    n_threads: int,
    finish: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    cpu_times: Callable[[], CpuTimes | None] = read_cpu_times,
) -> Rounds:
    """Time the sides in turn until `n_rounds` rounds are undisturbed, or `max_seconds` are over, or
    MAX_ROUNDS_FOR_ONE times as many rounds were made. There is always one round. `finish` waits for what a
    GPU still works on. `clock` and `cpu_times` are for tests."""
    rounds = Rounds([side.name for side in sides])
    n_runs = {side.name: runs_per_turn(side, finish, clock) for side in sides}
    deadline = clock() + max_seconds
    while len(rounds.clean) < n_rounds and len(rounds.lost) < MAX_ROUNDS_FOR_ONE * n_rounds:
        if rounds.lost and clock() > deadline:
            break
        first = len(rounds.lost) % len(sides)  # the side that begins changes from round to round
        seconds, lost = {}, []
        for side in sides[first:] + sides[:first]:
            before = cpu_times()
            began = clock()
            counted = [side.run() for _ in range(n_runs[side.name])]
            finish()
            took = clock() - began
            lost.append(lost_share(before, cpu_times(), took, n_threads))
            seconds[side.name] = (took if counted[0] is None else sum(counted)) / len(counted)
        rounds.seconds.append(seconds)
        rounds.lost.append(None if None in lost else max(lost))
    return rounds


def runs_per_turn(side: Side, finish: Callable[[], None], clock: Callable[[], float]) -> int:
    """Warm up, and return how many runs fill a turn of TURN_SECONDS."""
    for _ in range(WARM_UP_RUNS):
        began = clock()
        side.run()
        finish()
        took = clock() - began
        if took > TURN_SECONDS:  # what is slow needs no more warming
            break
    return max(1, round(TURN_SECONDS / max(took, 1e-7)))
