"""What this machine can do at most: products of matrices, and reading memory. No program is faster.

A training step and a prefill multiply large matrices: their limit is the matmul peak, in operations a second.
To decode one token, each weight is read once and used for two operations: the limit is the bandwidth of the
memory, in bytes a second.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from support.device import bf16_peak_flops, device_label, memory_total, processor_name, wait_for

MATMUL_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192), "mps": (2048, 4096)}  # rows of a square matrix
READ_BYTES = 2**29  # more than any cache holds
COLUMNS = 1024  # of the matrix that is read


@dataclass(frozen=True)
class Machine:
    """The limits, measured: operations a second by dtype, and bytes a second from main (or GPU) memory."""

    device: str
    label: str
    matmul: dict[str, float]
    bandwidth: float
    read_bytes: int  # how much was read to measure it
    bf16_data_sheet: float | None  # operations a second that the vendor promises; None if not known

    def describe(self) -> list[str]:
        """The limits in words, a line for each."""
        peaks = ", ".join(f"{flops / 1e9:,.0f} GFLOP/s in {name}" for name, flops in self.matmul.items())
        lines = [
            f"machine: {self.label}, torch {torch.__version__}",
            f"limits:  matmul {peaks}; reads {self.bandwidth / 1e9:.1f} GB/s "
            f"({self.read_bytes / 2**20:,.0f} MB, from memory)",
        ]
        if self.bf16_data_sheet:
            lines.append(
                f"         the data sheet says {self.bf16_data_sheet / 1e12:,.0f} TFLOP/s in bfloat16"
            )
        return lines


def fewest_seconds(work: Callable[[], object], device: str, seconds: float) -> float:
    """The time of the fastest run of `work`, of as many as fit into `seconds` and at least three. The fastest
    one counts, because a limit is what is possible; all noise makes it slower."""
    work()
    wait_for(device)
    best, n_runs, deadline = float("inf"), 0, time.perf_counter() + seconds
    while n_runs < 3 or time.perf_counter() < deadline:
        began = time.perf_counter()
        work()
        wait_for(device)
        best = min(best, time.perf_counter() - began)
        n_runs += 1
    return best


def matmul_peak(dtype: torch.dtype, device: str, seconds: float) -> float:
    """Operations a second of the product of two square matrices; the best of two sizes."""
    peaks = []
    for size in MATMUL_SIZES[device]:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds_each = fewest_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds / 2)
        peaks.append(2 * size**3 / seconds_each)
    return max(peaks)


def read_bandwidth(n_bytes: float, device: str, seconds: float) -> float:
    """Bytes a second when `n_bytes` are read again and again, as a matrix times a vector, or times
    two, which some processors do faster: the better counts. A small matrix stays in a cache, which is
    faster than memory."""
    matrix = torch.ones(max(1, int(n_bytes / 4 / COLUMNS)), COLUMNS, device=device)
    times = []
    for n_vectors in (1, 2):
        vectors = torch.ones(n_vectors, COLUMNS, device=device).t()
        times.append(fewest_seconds(lambda v=vectors: torch.mm(matrix, v), device, seconds / 2))
    return 4 * matrix.numel() / min(times)


def measure_machine(device: str, seconds: float) -> Machine:
    """Measure all limits; this takes about `seconds`."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    n_bytes = min(READ_BYTES * (8 if device == "cuda" else 1), memory_total(device) // 16)
    label = device_label(device) + (f", {processor_name()}" if device == "cpu" else "")
    return Machine(
        device=device,
        label=label,
        matmul={name: matmul_peak(dtype, device, seconds / 3) for name, dtype in dtypes.items()},
        bandwidth=read_bandwidth(n_bytes, device, seconds / 3),
        read_bytes=n_bytes,
        bf16_data_sheet=bf16_peak_flops(device),
    )
