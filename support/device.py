"""Which device and precision to use, and how much memory and speed the device has."""

import contextlib
import functools
import os
import platform
from pathlib import Path

import torch

from support.messages import UserError

# The files in which Linux says how much memory a container may use (cgroups, version 2 and version 1).
CONTAINER_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

# The most bf16 operations per second (FLOP/s, dense), from the vendors' datasheets. A key is a part of the
# device's name; the first key that fits counts, so "H100 PCIe" comes before "H100".
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
    """Turn the device that a user asks for into `cpu`, `cuda` or `mps`; `auto` is the fastest that this
    machine has. Raises UserError for a device that is unknown or that this machine lacks."""
    is_here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if is_here[device])
    if name not in is_here:
        raise UserError(f"device {name!r} is unknown; choose auto, {', '.join(is_here)}")
    if not is_here[name]:
        available = ", ".join(device for device in is_here if is_here[device])
        raise UserError(f"device {name!r} is not available here; available: {available}")
    return name


def resolve_precision(precision: str, device: str) -> str:
    """Lightning's name for the precision. `auto` is bf16-mixed on a GPU that can compute in bf16, otherwise
    float32 (`32-true`)."""
    if precision != "auto":
        return precision
    if device == "cuda" and torch.cuda.is_bf16_supported():
        return "bf16-mixed"
    return "32-true"


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which a matrix product with `x` is computed: in mixed precision (autocast) a smaller one,
    such as bf16, otherwise the type of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def autocast_of(precision: str, device: str) -> contextlib.AbstractContextManager:
    """The context in which Lightning runs a step of this precision: bf16 matrix products with `bf16-mixed`,
    otherwise none."""
    if precision != "bf16-mixed":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)


def wait_for(device: str) -> None:
    """Return when the device has finished its work: a GPU works on while Python goes ahead."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def device_label(device: str) -> str:
    """The device in words, such as `cuda (NVIDIA A100-SXM4-80GB)` or `cpu (2 threads)`."""
    if device == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    if device == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return device


def cpuinfo(field: str) -> str:
    """What Linux says of the first CPU in /proc/cpuinfo; an empty text on other systems."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def processor_name() -> str:
    """The CPU's name, as Linux tells it or else Python."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def has_amd_cpu() -> bool:
    """Whether the CPU is one of AMD's; False where the system does not tell. Windows names the maker in
    `platform.processor()`."""
    return "AuthenticAMD" in (cpuinfo("vendor_id") or platform.processor())


def bf16_peak_flops(device: str) -> float | None:
    """The most bf16 operations that the device can do in a second; None if that is not known."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in BF16_PEAK.items() if part in name), None)


def memory_used_mb(device: str) -> float:
    """The most memory that this process has used so far, in MB: GPU memory on a GPU, otherwise main
    memory. (On mps, the memory in use now.)"""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if device == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if os.uname().sysname == "Darwin" else peak / 2**10  # macOS counts bytes, Linux KB


def memory_total(device: str) -> int:
    """How many bytes of memory the device has. For the CPU, a container or `ulimit -v` may allow this process
    less than the machine has; then that is the answer."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    import resource

    amounts = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in CONTAINER_LIMIT_FILES:
        # OSError: there is no container. ValueError: it has no limit, which is written as `max`.
        with contextlib.suppress(OSError, ValueError):
            amounts.append(int(Path(file).read_text()))
    ulimit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if ulimit != resource.RLIM_INFINITY:
        amounts.append(ulimit)
    return min(amounts)
