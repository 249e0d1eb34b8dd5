"""Whose processor this is."""

import functools
import platform
from pathlib import Path


@functools.cache
def has_amd_cpu() -> bool:
    """Whether the CPU is one of AMD's; False where the system does not tell. Windows names the maker in
    `platform.processor()`, Linux in /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    linux = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    return "AuthenticAMD" in platform.processor() + linux
