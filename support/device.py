"""Which device and precision to use, and what the machine has."""

import contextlib
import os
from pathlib import Path

import torch

from support.messages import UserError

CONTAINER_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)  # Linux, version 2 and 1

# Dense bf16 peak in FLOP/s, by a piece of the device name, from the vendors' datasheets; the first match
# counts.
BF16_PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}


def resolve_device(name: str) -> str:
    """`cpu`, `cuda` or `mps` for a device name; `auto` takes the best there is. Raises UserError for one
    that is not there."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": mps}
    if name not in present:
        raise UserError(f"device {name!r} is unknown; choose auto, {', '.join(present)}")
    if not present[name]:
        here = ", ".join(device for device, there in present.items() if there)
        raise UserError(f"device {name!r} is not available here; available: {here}")
    return name


def resolve_precision(precision: str, device: str) -> str:
    """Lightning's name of the precision; `auto` is bf16-mixed on a GPU that computes in bf16, float32
    elsewhere."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if device == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def device_label(device: str) -> str:
    """E.g. `cuda (NVIDIA A100-SXM4-80GB)` or `cpu (2 threads)`."""
    if device == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"cpu ({torch.get_num_threads()} threads)" if device == "cpu" else device


def bf16_peak_flops(device: str) -> float | None:
    """The device's dense bf16 peak, None where it is not known."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for piece, peak in BF16_PEAK.items() if piece in name), None)


def memory_used_mb(device: str) -> float:
    """Peak memory of this process: the GPU's, or the resident set on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if device == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if os.uname().sysname == "Darwin" else peak / 2**10


def memory_total(device: str) -> int:
    """Bytes of memory the device has in all; of the machine's, as much as a container or `ulimit -v` lets
    this process have."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    import resource

    amounts = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no container; no limit, which is written as `max`
            amounts.append(int(Path(file).read_text()))
    ulimit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(amounts if ulimit == resource.RLIM_INFINITY else [*amounts, ulimit])
