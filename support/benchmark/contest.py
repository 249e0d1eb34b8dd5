"""One comparison: its sides are built, timed in rounds, and turned into rows for the table and the JSON."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from support.benchmark.machine import Machine, read_bandwidth
from support.benchmark.rounds import Rounds, Side, interleave
from support.cli import print_wide
from support.device import wait_for

BANDWIDTH_SECONDS = 0.5  # for reading as many bytes as a model has
Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure, and with how many CPU threads."""

    n_rounds: int
    max_seconds: float  # of the rounds of one contest
    n_threads: int


@dataclass
class Contest:
    """What is compared. `binds` names the limit that a perfect program would reach: `matmul`, `bandwidth` or
    None. `of` says what the milliseconds are of (a step, a token), and `per_run` how many of these one run
    has. `differs` compares by difference instead of ratio."""

    task: str
    subject: str
    unit: str
    of: str
    per_run: float = 1.0
    binds: str | None = None
    dtype: torch.dtype = torch.float32
    differs: bool = False


def hold(contest: Contest, builders: list[Callable[[], Side]], machine: Machine, effort: Effort) -> list[Row]:
    """Build the sides, time them, and return a row for each."""
    sides, resident = [], {}
    for build in builders:
        before = gpu_memory(machine.device)
        side = build()
        side.run()  # the first run makes the optimizer's state and the cache
        resident[side.name] = gpu_memory(machine.device) - before
        sides.append(side)
    rounds = interleave(
        sides,
        n_rounds=effort.n_rounds,
        max_seconds=effort.max_seconds,
        n_threads=effort.n_threads,
        finish=partial(wait_for, machine.device),
    )
    if machine.device == "cuda":
        for side in sides:
            side.memory = peak_memory(side, resident[side.name])
    return [row_of(contest, side, rounds, machine) for side in sides]


def gpu_memory(device: str) -> int:
    """Bytes of GPU memory that tensors occupy now; 0 on other devices."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak_memory(side: Side, resident: int) -> int:
    """The most GPU memory that this side needs at any moment of a run: what it keeps between runs
    (`resident`), and what it adds during one. The other sides' memory is not counted."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    side.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + resident


# ---- rows ----------------------------------------------------------------------------------------


def row_of(contest: Contest, side: Side, rounds: Rounds, machine: Machine) -> Row:
    """The figures of one side, as plain numbers: times in ms, rates a second, sizes in single units."""
    seconds = rounds.of(side.name)
    median = rounds.median(side.name)
    ours = rounds.names[0]
    is_ours = side.name == ours
    per_ms = 1000 / contest.per_run
    return {
        "task": contest.task,
        "subject": contest.subject,
        "side": side.name,
        "note": side.note,
        "of": contest.of,
        "ms": median * per_ms,
        "lowest_ms": min(seconds) * per_ms,
        "highest_ms": max(seconds) * per_ms,
        "noise": rounds.noise(side.name),
        "unit": contest.unit,
        "units_per_second": side.units / median,
        "ours_as_fast": None if is_ours else rounds.ratio(ours, side.name),
        "ours_longer_ms": None if is_ours else rounds.difference(ours, side.name) * per_ms,
        "differs": contest.differs,
        "rounds": len(seconds),
        "dropped_rounds": rounds.n_dropped,
        "all_disturbed": rounds.all_disturbed,
        "disturbance_known": None not in rounds.lost,
        "n_params": side.n_params,
        "flops_per_unit": side.flops / side.units,
        "bytes_per_unit": side.n_bytes / side.units,
        "peak_memory": side.memory,
        **share_of_limit(contest, side, median, machine),
    }


def share_of_limit(contest: Contest, side: Side, seconds: float, machine: Machine) -> Row:
    """The limit that binds, what was reached of it, and for bf16 on a known GPU the share of the data sheet's
    figure ("model FLOPs utilization")."""
    if contest.binds == "matmul":
        limit, reached = machine.matmul[str(contest.dtype).removeprefix("torch.")], side.flops / seconds
    elif contest.binds == "bandwidth":
        limit, reached = bandwidth_for(side.n_bytes / side.units, machine), side.n_bytes / seconds
    else:
        return dict.fromkeys(("limit", "limit_per_second", "reached_per_second", "share", "mfu"))
    mfu = None
    if machine.bf16_data_sheet and contest.dtype == torch.bfloat16:
        mfu = side.flops / seconds / machine.bf16_data_sheet
    return {
        "limit": contest.binds,
        "limit_per_second": limit,
        "reached_per_second": reached,
        "share": reached / limit,
        "mfu": mfu,
    }


def bandwidth_for(n_bytes: float, machine: Machine) -> float:
    """How fast this many bytes can be read again and again: faster than from memory, if a cache holds them.
    Of several measurements the best counts, and no limit is below that of the memory."""
    if n_bytes >= machine.read_bytes:
        return machine.bandwidth
    return max(machine.bandwidth, read_bandwidth(n_bytes, machine.device, BANDWIDTH_SECONDS))


# ---- the table -----------------------------------------------------------------------------------


def time_text(ms: float) -> str:
    """A time with a fitting number of digits."""
    if ms >= 10_000:
        return f"{ms / 1000:,.1f} s"
    return f"{ms:,.0f} ms" if ms >= 1000 else f"{ms:.3g} ms" if ms >= 0.1 else f"{1000 * ms:.3g} us"


def comparison_text(row: Row) -> str:
    """How ours compares with this side: `0.98 x` as fast, or `+12 ms`."""
    if row["ours_as_fast"] is None:
        return ""
    if row["differs"]:
        return f"{row['ours_longer_ms']:+,.3g} ms"
    return f"{row['ours_as_fast']:.2f} x"


def reached_text(row: Row) -> str:
    """What was reached: operations or bytes a second."""
    if row["limit"] is None:
        return ""
    return f"{row['reached_per_second'] / 1e9:,.3g} {'GFLOP/s' if row['limit'] == 'matmul' else 'GB/s'}"


def rate_text(row: Row) -> str:
    rate = row["units_per_second"]
    return f"{rate:,.3g} {row['unit']}/s" if rate < 100 else f"{rate:,.0f} {row['unit']}/s"


def rounds_text(row: Row) -> str:
    """How many rounds counted, how many were left out; * if even those that counted were disturbed."""
    left_out = f" of {row['rounds'] + row['dropped_rounds']}" if row["dropped_rounds"] else ""
    return f"{row['rounds']}{left_out}{'*' if row['all_disturbed'] else ''}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "what": lambda row: f"{row['task']}, {row['subject']}",
    "who": lambda row: row["side"] + (f" ({row['note']})" if row["note"] else ""),
    "time": lambda row: time_text(row["ms"]),
    "of a": lambda row: row["of"],
    "noise": lambda row: f"{100 * row['noise']:.1f}%",
    "rounds": rounds_text,
    "rate": rate_text,
    "reaches": reached_text,
    "of limit": lambda row: "" if row["limit"] is None else f"{row['share']:.2f} {row['limit']}",
    "MFU": lambda row: "" if row["mfu"] is None else f"{row['mfu']:.3f}",
    "ours is": comparison_text,
    "parameters": lambda row: "" if row["n_params"] is None else f"{row['n_params']:,}",
    "MFLOP each": lambda row: f"{row['flops_per_unit'] / 1e6:,.3g}" if row["flops_per_unit"] else "",
    "GPU MB": lambda row: "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}",
}
LEFT_ALIGNED = ("what", "who", "of a", "of limit")


def print_rows(rows: list[Row]) -> None:
    """Print the rows as a table, without columns that would be empty; under it what its marks mean."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = {name: text for name, text in COLUMNS.items() if any(text(row) for row in rows)}
    for name in shown:
        side = "left" if name in LEFT_ALIGNED else "right"
        table.add_column(name, justify=side, no_wrap=True, overflow="ignore")
    before = None
    for row in rows:
        cells = [text(row) for text in shown.values()]
        cells[0], before = ("" if cells[0] == before else cells[0]), cells[0]
        table.add_row(*cells)
    print_wide(table)
    print("noise: half of the rounds are within this share of the median")
    if "ours is" in shown:
        print("ours is: so many times as fast as this one, or so many milliseconds longer")
    if any(row["dropped_rounds"] for row in rows):
        print("rounds: those in which other processes took CPU time that was needed are left out")
    if any(row["all_disturbed"] for row in rows):
        print("* other processes disturbed every round, so all count; close other programs and try again")
    if not all(row["disturbance_known"] for row in rows):
        print("rounds: this system does not tell whether other processes disturb, so none is left out")
