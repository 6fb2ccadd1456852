"""Tiles are remembered on disk, and the choice of tiles follows them."""

import gc
import multiprocessing
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

import natten
from natten import tuning
from natten.backends.interface import KINDS
from natten.neighborhood import Neighborhood


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("NATTEN_CACHE", str(tmp_path))


def test_what_is_remembered_is_found():
    assert tuning.lookup("forward (3, 5)") is None
    path = tuning.remember("forward (3, 5)", [[1, 8, 16], 4])
    assert path.parent == tuning.directory()
    assert tuning.lookup("forward (3, 5)") == [[1, 8, 16], 4]
    assert tuning.lookup("forward (35)") is None
    tuning.remember("forward (3, 5)", [[1, 4, 4], 8])
    assert tuning.lookup("forward (3, 5)") == [[1, 4, 4], 8]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_where(tmp_path, monkeypatch):
    assert tuning.directory().is_relative_to(tmp_path)
    monkeypatch.delenv("NATTEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.directory().is_relative_to(tmp_path / "xdg" / "natten")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tmp_path / "home"))
    for system, caches in (
        ("linux", ".cache"),
        ("darwin", "Library/Caches"),
        ("win32", "AppData/Local"),
    ):
        monkeypatch.setattr(sys, "platform", system)
        assert tuning.directory().is_relative_to(tmp_path / "home" / caches / "natten")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert tuning.directory().is_relative_to(tmp_path / "local" / "natten")
    version = tuning.directory().name
    monkeypatch.setattr(tuning, "__version__", "9.9")
    assert tuning.directory().name != version


def test_a_broken_file_is_as_none(caplog):
    path = tuning.remember("a", [1])
    path.write_text("[1", encoding="utf-8")
    with caplog.at_level("DEBUG", logger="natten"):
        assert tuning.lookup("a") is None
    assert str(path) in caplog.text


def test_a_trial_ends():
    tuning.remember("a", [1])
    with tuning.trial("a", [2]), tuning.trial("b", [3]):
        assert (tuning.lookup("a"), tuning.lookup("b")) == ([2], [3])
    assert (tuning.lookup("a"), tuning.lookup("b")) == ([1], None)
    with pytest.raises(KeyError), tuning.trial("a", [2]):
        raise KeyError
    assert tuning.lookup("a") == [1]


def test_choices_follow():
    calls = []

    @tuning.cached
    def choose(key):
        calls.append(key)
        return tuning.lookup(key)

    assert [choose("a"), choose("a")] == [None, None]
    with tuning.trial("a", [2]):
        assert [choose("a"), choose("a")] == [[2], [2]]
    assert choose("a") is None
    tuning.remember("a", [1])
    assert choose("a") == [1]
    assert len(calls) == 4


def _write(number):
    for _ in range(50):
        tuning.remember("a", [number] * 1000)


def test_many_writers_leave_one_whole_file(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # a fork can not ask CUDA
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(n,)) for n in (1, 2)]
    writers.append(threading.Thread(target=_write, args=(3,)))
    tuning.remember("a", [0] * 1000)
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = tuning.lookup("a")
        assert len(found) == 1000 and len(set(found)) == 1
    for writer in writers:
        writer.join()
    assert len(list(tuning.directory().iterdir())) == 1


def test_triton_uses_what_was_measured():
    tiles = pytest.importorskip("natten.backends.triton.tiles")

    problem = (Neighborhood.create(2, 5), (30, 20), (30, 20), 64, 64, 2)
    for kind in KINDS:
        first, *rest = tiles.candidates(kind, *problem)
        assert tiles.choose(kind, *problem) == first
        other = rest[7]
        tuning.remember(tiles.key(kind, *problem), other)
        assert tiles.choose(kind, *problem) == other
        assert isinstance(tiles.choose(kind, *problem).q_block, tuple)
    longer = (Neighborhood.create(2, 5), (31, 20), (31, 20), 64, 64, 2)
    assert tiles.choose("forward", *longer) == tiles.candidates("forward", *longer)[0]


@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize(
    "known", [5, {}, [], [[1, 1, 4096], [1, 1, 4096], 4, 2], [[1, 8, 8]]], ids=str
)
def test_what_is_no_candidate_is_not_used(known, backend):
    """Another version may have remembered it, or a GPU with more shared memory."""
    tiles = pytest.importorskip(f"natten.backends.{backend}.tiles")
    problem = ("forward", Neighborhood.create(2, 5), (30, 20), (30, 20), 64, 64, 2)
    with tuning.trial(tiles.key(*problem), known):
        assert tiles.choose(*problem) == tiles.candidates(*problem)[0]


def test_kernels_follow_a_trial():
    pytest.importorskip("triton", "3.4")
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    from natten.backends.triton.plan import plan_for

    rule, query = Neighborhood.create(1, 9), torch.empty(1, 300, 1, 64, dtype=torch.bfloat16)
    problem = ("forward", rule, (300,), (300,), 64, 64, 2)

    def used():
        arguments = plan_for(query, query, query, None, None, rule, 1.0).forward.arguments
        return arguments["Q_BLOCK"], arguments["KV_BLOCK"]

    first, other = tiles.candidates(*problem)[:2]
    assert used() == first[:2]
    with tuning.trial(tiles.key(*problem), other):
        assert used() == other[:2] != first[:2]
    assert used() == first[:2]


def test_triton_counts_the_pairs_it_computes():
    """Query tiles of 4 positions, blocks of 8 keys, in both dilation groups of an axis of 21."""
    tiles = pytest.importorskip("natten.backends.triton.tiles")

    rule = Neighborhood.create(1, 3, dilation=2)
    shape = tiles.Tiles((1, 1, 4), (1, 1, 8), 4, 2)
    # Groups of 11 and 10 positions: 3 tiles each, which reach 5 or 6 keys at most: one block.
    assert tiles.computed_pairs("forward", rule, (21,), (21,), shape) == 2 * 3 * 4 * 8
    transposed = tiles.Tiles((1, 1, 4), (1, 1, 2), 4, 2)
    # Keys 0-1, 2-3, ... are reached by 3, 5, 4, 4, 4, 2 of 11 queries, and by 3, 5, 4, 5, 3 of 10.
    found = tiles.computed_pairs("dkdv", rule, (21,), (21,), transposed)
    assert found == (7 + 7) * 2 * 4


class OutOfResources(Exception):
    """Compilers raise such an error if tiles do not fit the GPU; it is not a RuntimeError."""


@pytest.fixture
def trials(monkeypatch):
    """A function that times launches with made-up milliseconds; None stands for tiles too large."""
    pytest.importorskip("triton", "3.4")
    launching = pytest.importorskip("natten.backends.triton.launch")
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def launch(milliseconds):
        def run(**tensors):
            if milliseconds is None:
                raise OutOfResources("shared memory")
            now[0] += milliseconds

        return SimpleNamespace(run=run)

    return lambda times: launching.Trials("a", {(8, n): launch(ms) for n, ms in enumerate(times)})


@pytest.mark.parametrize("times", [(None, 3.0, None, 1.0, 2.0), (2.0, None, None, 1.0, None)])
def test_the_first_call_passes_over_what_does_not_fit(times, trials, caplog):
    found = trials(times)
    with caplog.at_level("DEBUG", logger="natten"):
        found.run(x=torch.empty(1))
    assert tuning.lookup("a") == [8, 3] and found.launches == {}
    assert caplog.text.count("passed over: OutOfResources: shared memory") == times.count(None)
    found.run(x=torch.empty(1))  # runs with the tiles that were chosen


def test_where_no_tiles_fit_the_call_says_so_and_lets_go_of_its_tensors(trials):
    found, x = trials((None, None)), torch.empty(1)
    alive = weakref.ref(x)
    gc.disable()  # reference counts alone must free everything
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"none of the tiles of a .*: shared memory"):
                found.run(x=x)
        del x
        assert alive() is None
    finally:
        gc.enable()
    assert tuning.lookup("a") is None


def test_the_first_call_keeps_the_fastest_tiles(monkeypatch):
    pytest.importorskip("triton", "3.4")
    plan = pytest.importorskip("natten.backends.triton.plan")
    from natten.backends.triton import launch, tiles

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launched, rule = [], Neighborhood.create(1, 9)
    monkeypatch.setattr(launch.Launch, "run", lambda self, **_: launched.append(self.arguments))
    x = torch.empty(1, 310, 1, 64, dtype=torch.bfloat16)
    problem = ("forward", rule, (310,), (310,), 64, 64, 2)
    natten.use_autotuner(True, False)
    try:
        found = plan.plan_for(x, x, x, None, None, rule, 1.0)
        assert isinstance(found.forward, launch.Trials)
        assert isinstance(found.dkdv, launch.Launch)
        ranked = tiles.candidates(*problem)[:6]
        times = dict(zip(found.forward.launches.values(), (6, 5, 1, 7, 8, 9)))
        monkeypatch.setattr(launch, "_time", lambda each, _: times[each])
        found.forward.run(query=x)
        found.forward.run(query=x)
        assert [(c["Q_BLOCK"], c["KV_BLOCK"]) for c in launched] == [
            (ranked[2].q_block, ranked[2].kv_block)
        ] * 2
        assert tuning.lookup(tiles.key(*problem)) is not None
    finally:
        natten.disable_autotuner()
    again = plan.plan_for(x, x, x, None, None, rule, 1.0)
    assert isinstance(again.forward, launch.Launch)
    assert tiles.choose(*problem) == ranked[2]
