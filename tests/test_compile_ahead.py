"""Kernels are compiled ahead once, in threads, and launches wait for those that they need."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import natten
from natten import ArgumentError, compiling
from natten.compiling import Job, await_kernel, before_a_new_kernel, record, recorded, start

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compiling, "_known", {})
    in_threads(monkeypatch, True)
    yield
    compiling._pool.cache_clear()


def in_threads(monkeypatch: pytest.MonkeyPatch, can_be: bool) -> None:
    """Whether this Python can parse in several threads; these tests parse nothing."""
    monkeypatch.setattr(compiling, "CAN_PARSE_IN_THREADS", can_be)
    compiling._pool.cache_clear()


def test_a_kernel_is_compiled_once() -> None:
    done: list[str] = []
    jobs = [Job(name, lambda name=name: done.append(name)) for name in "abab"]
    futures = start(GPU, jobs) + start(GPU, jobs)
    for each in futures:
        each.result()
    assert sorted(done) == ["a", "b"] and len(futures) == 8 and len(set(futures)) == 2
    others = start(torch.device("cuda", 1), jobs)  # another GPU may be of another kind
    for each in others:
        each.result()
    assert sorted(done) == ["a", "a", "b", "b"]


def test_a_launch_waits_for_its_kernel() -> None:
    go, order = threading.Event(), []

    def compile_it() -> None:
        go.wait(60)
        order.append("compiled")

    def launch() -> None:
        await_kernel("a")
        order.append("launched")

    start(GPU, [Job("a", compile_it)])
    await_kernel("b")  # nobody compiles that
    thread = threading.Thread(target=launch)
    thread.start()
    go.set()
    thread.join(60)
    assert order == ["compiled", "launched"]


def test_what_a_launch_compiled_is_known() -> None:
    await_kernel("a")
    (future,) = start(GPU, [Job("a", pytest.fail)])
    assert future.result() is None


def test_failures_are_raised_and_forgotten() -> None:
    def fail() -> None:
        raise RuntimeError("no registers")

    for _ in range(2):
        (future,) = start(GPU, [Job("a", fail)])
        with pytest.raises(RuntimeError, match="no registers"):
            future.result()
    await_kernel("a")  # the launch compiles it, and raises


def test_where_python_can_not_parse_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    in_threads(monkeypatch, False)
    threads: list[threading.Thread] = []

    def fail() -> None:
        raise RuntimeError("no registers")

    jobs = [Job(name, lambda: threads.append(threading.current_thread())) for name in "ab"]
    first, second, third = start(GPU, [*jobs, Job("c", fail)])
    assert threads == 2 * [threading.current_thread()]
    assert first.result() is None and second.result() is None
    with pytest.raises(RuntimeError, match="no registers"):
        third.result()
    assert start(GPU, [*jobs, Job("c", lambda: None)])[2].result() is None
    assert len(threads) == 2
    with before_a_new_kernel(pytest.fail):  # nothing is compiled beside a forward
        await_kernel("new")


def test_kernels_are_loaded_ahead() -> None:
    """None are those that a launch loads; what raises, raises when it is launched."""
    loaded: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        @property
        def run(self) -> None:
            loaded.append(self.name)
            if self.name == "b":
                raise RuntimeError("too much shared memory")

    compiling.load(GPU, [Kernel("a"), None, Kernel("b"), Kernel("c")])
    assert sorted(loaded) == ["a", "b", "c"]


def test_the_collector_pauses_while_kernels_are_compiled() -> None:
    """Until the last thread is done, also if a kernel fails."""
    go, inside = threading.Event(), threading.Event()

    def compile_it() -> None:
        with compiling.uncollected():
            inside.set()
            go.wait(60)

    assert gc.isenabled()
    (future,) = start(GPU, [Job("a", compile_it)])
    inside.wait(60)
    with pytest.raises(RuntimeError, match="no registers"), compiling.uncollected():
        raise RuntimeError("no registers")
    assert not gc.isenabled()
    go.set()
    future.result()
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with compiling.uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_the_collector_of_a_forked_process_runs() -> None:
    """Whatever threads compiled in its parent."""
    program = """if True:
        import gc, os
        from natten import compiling
        with compiling.uncollected():
            child = os.fork()
            if child == 0:
                assert gc.isenabled()
                with compiling.uncollected():
                    assert not gc.isenabled()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitpid(child, 0)[1] == 0 and gc.isenabled()
    """
    subprocess.run([sys.executable, "-c", program], check=True)


def test_launches_are_recorded_in_one_thread_only() -> None:
    job = Job("a", pytest.fail)
    with recorded() as jobs:
        assert compiling.is_recording()
        record(job)
        other: list[bool] = []
        thread = threading.Thread(target=lambda: other.append(compiling.is_recording()))
        thread.start()
        thread.join(60)
    assert jobs == [job] and other == [False] and not compiling.is_recording()


def test_a_new_kernel_calls_once() -> None:
    calls: list[int] = []
    await_kernel("known")
    with before_a_new_kernel(lambda: calls.append(1)):
        await_kernel("known")
        assert calls == []
        await_kernel("new")
        await_kernel("newer")
    await_kernel("newest")
    assert calls == [1]

    def fail() -> None:
        raise RuntimeError

    with before_a_new_kernel(fail):  # whoever needs the result raises it again
        await_kernel("last")


LENGTHS = torch.tensor([9])


def meta(*shape: int, **options: Any) -> torch.Tensor:
    return torch.empty(*shape, device="meta", **options)


@pytest.mark.parametrize("device", ["cuda", 0, "cuda:99", "nothing", "meta", 1.5])
def test_other_devices_are_refused(device: Any) -> None:
    with pytest.raises(ArgumentError, match="`device` must be the CPU or one of 0 GPUs here, got"):
        natten.compile_ahead([], device)


@pytest.mark.parametrize("device", ["cpu", None])
def test_a_cpu_has_nothing_to_compile(device: Any) -> None:
    assert natten.compile_ahead([good(), good(requires_grad=True)], device) == 0
    with pytest.raises(ArgumentError, match="kernel_size"):  # calls are checked all the same
        natten.compile_ahead([{**good(), "kernel_size": 30}], device)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is an H100 as far as one asks."""
    monkeypatch.setattr("natten.ahead._device_of", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (3, "`calls` must hold mappings of arguments by name, got <class 'int'> as number 1"),
        ({"kernel_size": 3}, "query"),
        ({"kernal_size": 3}, "did you mean `kernel_size`"),
        ({"query": meta(1, 9, 1, 8), "kernel_size": 30}, "kernel_size"),
        ({"query": meta(1, 9, 9, 1, 8)}, "`query` must be .batch, length, heads, head_dim"),
        (
            {"query": meta(1, 9, 1, 8), **dict.fromkeys(("seqlens_Q", "seqlens_KV"), LENGTHS)},
            "packed",
        ),
    ],
)
def test_calls_are_checked(one_gpu: None, call: Any, message: str) -> None:
    if isinstance(call, dict) and "query" in call:
        call |= dict.fromkeys(("key", "value"), call["query"])
    with pytest.raises(ArgumentError, match=message):
        natten.compile_ahead([{**good(), "backend": "tiled"}, call])


def good(**options: Any) -> dict[str, Any]:
    q = meta(1, 16, 16, 2, 32, dtype=torch.bfloat16, **options)
    return {"query": q, "key": q, "value": q, "kernel_size": 5}


def test_kernels_of_calls(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward; with gradients; again; by backends that have nothing to compile."""
    pytest.importorskip("triton", "3.6")
    compiled: list[Any] = []
    tables = set()

    def compile_none(device: Any, jobs: Any) -> list[Any]:
        compiled.append([key[0].__name__ for key, _ in jobs])
        tables.update(key for key, _ in jobs if key[0].__name__ == "bias_table_kernel")
        return []

    monkeypatch.setattr(compiling, "start", compile_none)
    single = dict.fromkeys(("query", "key", "value"), meta(1, 16, 16, 2, 32, requires_grad=True))
    biased = {**single, "kernel_size": 5, "rpb": meta(2, 9, 9)}  # of float32: the portable kernels
    calls = [good(), good(requires_grad=True), biased, {**good(), "backend": "tiled"}]
    calls += [dict.fromkeys(("query", "key", "value"), meta(1, 9, 1, 32))]
    natten.compile_ahead([*calls, {**good(requires_grad=True), "rpb": meta(2, 9, 9)}])
    x = meta(2, 16, 16, 2, 32, dtype=torch.bfloat16, requires_grad=True)
    two = {**dict.fromkeys(("query", "key", "value"), x), "kernel_size": 5}
    passes = ["lse_delta_kernel", "backward_kernel", "backward_kernel"]
    portable = ["dq_kernel", "dkdv_kernel", "rpb_grad_kernel", "rpb_grad_sum_kernel"]
    forward = ["forward_kernel"]
    assert compiled[:6] == [forward, forward, passes, forward, portable, forward]
    table, gradient = ["bias_table_kernel"], ["bias_gradient_kernel", "bias_sum_kernel"]
    assert compiled[6] == table + forward
    assert [name for name in compiled[7] if name not in table] == passes + gradient
    natten.compile_ahead([{**two, "rpb": meta(2, 9, 9)}])  # one kernel makes dQ and of the bias
    summed = [passes[0], gradient[0], passes[1], gradient[1]]
    assert [name for name in compiled[9] if name not in table] == summed
    assert len(tables) == 1  # one kernel, whatever the tiles and whichever way


def test_a_gradient_of_the_lse(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", "3.6")
    keys: list[Any] = []
    monkeypatch.setattr(compiling, "start", lambda device, jobs: keys.append(jobs[0].key) or [])
    natten.compile_ahead([good(requires_grad=True)])
    natten.compile_ahead([{**good(requires_grad=True), "return_lse": True}])
    forward, without, again, with_lse = keys
    assert forward == again and without != with_lse


def test_an_error_of_a_compiler_is_raised(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", "3.6")
    go, done = threading.Event(), []

    def begin(device: Any, jobs: Any) -> Any:
        def fail() -> None:
            raise RuntimeError("no registers")

        def late() -> None:
            go.wait(0.05)
            done.append(1)

        return start(device, [Job("a", fail), Job("b", late)])

    start = compiling.start
    monkeypatch.setattr(compiling, "start", begin)
    with pytest.raises(RuntimeError, match="no registers"):
        natten.compile_ahead([good()])
    assert done == [1], "it waits for all of them first"
