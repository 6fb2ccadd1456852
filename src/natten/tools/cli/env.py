"""What ``natten env`` does: it prints versions, devices and backends."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

from ... import backends, tuning
from ..profiler.machine import cpu_name, version_of, versions
from .outputs import STDOUT, write

DTYPES = (torch.bfloat16, torch.float32)
# Prefixes of the variables that change what runs. Other variables are not printed.
PREFIXES = ("NATTEN_", "TRITON_", "TORCHINDUCTOR_", "CUDA_VISIBLE", "OMP_NUM", "XDG_CACHE_HOME")


def run(args: argparse.Namespace) -> int:
    """Print the environment."""
    found = environment()
    if args.json is not None:
        write(args.json, json.dumps(found, indent=2))
        if args.json == STDOUT:
            return 0
    for section, entries in found.items():
        print(f"{section}:" + ("" if entries else " none"))
        for name, value in entries.items():
            if not isinstance(value, dict):
                print(f"  {name}: {value}")
                continue
            print(f"  {name}:")
            for backend, reason in value.items():
                print(f"    {backend}: {reason}")
    return 0


def environment() -> dict[str, dict[str, Any]]:
    """Everything that an issue report needs, by section."""
    return {
        "versions": {
            **versions(),
            "cudnn": torch.backends.cudnn.version() or "none",
            "python": platform.python_version(),
            "system": platform.platform(),
            **{name: version_of(name) for name in ("numpy", "rich", "matplotlib")},
        },
        "devices": _devices(),
        "backends": _backends(),
        "tuned tiles": _tuned(),
        "environment variables": {
            name: text for name, text in sorted(os.environ.items()) if name.startswith(PREFIXES)
        },
        "natten": {"installed in": os.path.dirname(os.path.dirname(backends.__file__))},
    }


def _devices() -> dict[str, str]:
    found = {"cpu": f"{cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
        )
    return found


def _backends() -> dict[str, dict[str, str]]:
    """For each operator, device and dtype, whether each backend runs it, or why not."""
    found = {}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for dtype in DTYPES:
            name = f"{device}, {str(dtype).removeprefix('torch.')}"
            query = torch.empty(1, 16, 1, 64, device=device, dtype=dtype)
            said = backends.explain(query, kernel_size=3)
            lines = (line.split(": ", 1) for line in said.splitlines())
            found[f"na*d, {name}"] = {backend: reason for backend, reason in lines}
            question = backends.Problem("unfused", query.device, dtype)
            found[f"na*d_qk and na*d_av, {name}"] = {
                each.name: each.unsupported(question) or "can run" for each in backends.BACKENDS
            }
    return found


def _tuned() -> dict[str, str]:
    directory = tuning.directory()
    files = sorted(directory.glob("*.json")) if directory.is_dir() else []
    return {"directory": str(directory), "problems for this device and version": str(len(files))}
