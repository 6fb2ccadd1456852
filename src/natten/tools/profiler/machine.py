"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch

from ...version import __version__


def version_of(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's name if the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """The versions of what decides speed."""
    return {
        "natten": __version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda or "none",
    }


def free_memory(device: torch.device) -> int | None:
    """Bytes that programs may still take, None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]  # in kB
    return 1024 * int(found[0]) if found else None
