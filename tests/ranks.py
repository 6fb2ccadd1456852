"""Processes that are the ranks of a process group, for tests of `natten.distributed`.

A pool starts once and runs functions of test modules, by name, on all of its ranks together.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Failures(AssertionError):
    """What ranks raised: a message for each of them, None where a rank has returned."""

    def __init__(self, messages: list[str | None]) -> None:
        super().__init__("\n".join(f"rank {i}: {m}" for i, m in enumerate(messages) if m))
        self.messages = messages


class Pool:
    """``size`` ranks of a group on this machine; with the backend "nccl" each has a GPU.

    ``pool(function, *args)`` calls ``function(*args)`` on every rank and returns what they return.
    The function is at the top of a module that ranks can import.
    """

    def __init__(self, size: int, timeout: float = 60, backend: str = "gloo") -> None:
        self.size = size
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._ends = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, size, store, timeout, backend), daemon=True
            )
            process.start()
            self._ends.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for end in self._ends:
            end.send((function.__module__, function.__qualname__, args))
        answers = [end.recv() for end in self._ends]
        if any(failure for failure, _ in answers):
            raise Failures([failure for failure, _ in answers])
        return [result for _, result in answers]

    def close(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def _store(path: str, size: int, timeout: float) -> dist.FileStore:
    store = dist.FileStore(path, size)
    store.set_timeout(timedelta(seconds=timeout))
    return store


def _serve(end: Any, rank: int, size: int, store: str, timeout: float, backend: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        store=_store(store, size, timeout),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    while (job := end.recv()) is not None:
        module, name, args = job
        try:
            function = getattr(importlib.import_module(module), name)
            end.send((None, function(*args)))
        except Exception:
            end.send((traceback.format_exc(), None))
    dist.destroy_process_group()
