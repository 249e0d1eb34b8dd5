"""One comparison: its sides are built, timed in rounds, and turned into rows for the table and the JSON."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from support.benchmark.machine import Machine, read_bandwidth, wait_for
from support.benchmark.rounds import Rounds, Side, interleave
from support.cli import print_wide

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
        finish=wait_for(machine.device),
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


COLUMNS: dict[str, Callable[[Row], str]] = {
    "what": lambda row: f"{row['task']}, {row['subject']}",
    "who": lambda row: row["side"] + (f" ({row['note']})" if row["note"] else ""),
    "time": lambda row: time_text(row["ms"]),
    "of a": lambda row: row["of"],
    "noise": lambda row: f"{100 * row['noise']:.1f}%",
    "rate": lambda row: (
        f"{row['units_per_second']:,.3g} {row['unit']}/s"
        if row["units_per_second"] < 100
        else f"{row['units_per_second']:,.0f} {row['unit']}/s"
    ),
    "reaches": reached_text,
    "of limit": lambda row: "" if row["limit"] is None else f"{row['share']:.2f} {row['limit']}",
    "MFU": lambda row: "" if row["mfu"] is None else f"{row['mfu']:.3f}",
    "ours is": comparison_text,
    "parameters": lambda row: "" if row["n_params"] is None else f"{row['n_params']:,}",
    "MFLOP/unit": lambda row: f"{row['flops_per_unit'] / 1e6:,.3g}" if row["flops_per_unit"] else "",
    "GPU MB": lambda row: "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}",
}
LEFT_ALIGNED = ("what", "who", "of a", "of limit")


def print_rows(rows: list[Row]) -> None:
    """Print the rows as a table, without columns that would be empty; under it what was left out."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = {name: text for name, text in COLUMNS.items() if any(text(row) for row in rows)}
    for name in shown:
        table.add_column(
            name, justify="left" if name in LEFT_ALIGNED else "right", no_wrap=True, overflow="ignore"
        )
    previous = None
    for row in rows:
        cells = [text(row) for text in shown.values()]
        what = (row["task"], row["subject"])
        if what == previous:
            cells[0] = ""  # the same as in the line above
        previous = what
        table.add_row(*cells)
    print_wide(table)
    print("\n".join(rounds_text(rows)))


def rounds_text(rows: list[Row]) -> list[str]:
    """A line for each contest that says how many rounds counted, and how many were left out."""
    lines = {}
    for row in rows:
        name = f"{row['task']}, {row['subject']}"
        text = f"{name}: {row['rounds']} rounds counted, {row['dropped_rounds']} disturbed ones left out"
        if row["all_disturbed"]:
            text = f"{name}: other processes disturbed all {row['rounds']} rounds, so these count: close them"
        elif not row["disturbance_known"]:
            text = f"{name}: {row['rounds']} rounds; this system does not tell which were disturbed"
        lines[name] = text
    return list(lines.values())
