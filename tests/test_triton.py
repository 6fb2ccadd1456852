"""The Triton backend's tiles, and its kernels: compiled without a GPU, and a sweep with one.

Tests in which Triton interprets the kernels are in test_interpreter.py.
"""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from natten.backends.triton import releases
from natten.neighborhood import Neighborhood

FOUND = releases.release(releases.version() or "")
pytestmark = pytest.mark.skipif(FOUND < releases.OLDEST, reason="needs Triton 3.4 or newer")


@pytest.mark.parametrize("kind", ["forward", "dq", "dkdv"])
def test_tiles_are_valid(kind):
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    for rank in (1, 2, 3):
        for dim, value_dim, itemsize in ((1, 1, 2), (32, 64, 2), (128, 128, 4), (256, 512, 2)):
            shape = (40, 9, 3)[:rank]
            rule = Neighborhood.create(rank, (7, 3, 2)[:rank], 1, (2, 1, 1)[:rank])
            found = tiles.choose(kind, rule, shape, shape, dim, value_dim, itemsize)
            for tile in (found.q_block, found.kv_block):
                assert len(tile) == 3 and all(n & (n - 1) == 0 for n in tile)
                assert 16 <= torch.Size(tile).numel() <= 128
            assert found.num_warps in (4, 8)


@pytest.mark.parametrize("capability", [0, 86], ids=["AMD", "consumer"])
@pytest.mark.parametrize("kind", ["forward", "dq", "dkdv"])
def test_tiles_fit_the_gpu(kind, capability, monkeypatch):
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    rule, shape = Neighborhood.create(2, 13), (64, 64)
    before = tiles.candidates(kind, rule, shape, shape, 64, 64, 2)
    gpu = tiles.gpu_of(capability)
    monkeypatch.setattr(tiles, "gpu", lambda: gpu)
    for dim, itemsize in ((64, 2), (128, 2), (256, 2), (64, 4), (128, 4)):
        for each in tiles.candidates(kind, rule, shape, shape, dim, dim, itemsize):
            rows, cols = (torch.Size(x).numel() for x in each[:2])
            if kind == "dkdv":
                rows, cols = cols, rows
            sizes = kind, rows, cols, dim, dim, itemsize, each.num_stages
            assert tiles._shared(*sizes, gpu) <= gpu.shared
    monkeypatch.undo()
    assert tiles.candidates(kind, rule, shape, shape, 64, 64, 2) == before


@pytest.mark.skipif(FOUND < (3, 6), reason="benchmarks/compiled.py needs Triton 3.6 or newer")
@pytest.mark.parametrize("target", ["80", "90", "gfx942"])
def test_kernels_compile_without_a_gpu(target):
    """The NAT variants; `make kernels` compiles the whole list."""
    command = [sys.executable, "benchmarks/kernels.py", "--target", target, "--variants", "NAT"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| NAT |") == 6


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_sweep_on_a_gpu():
    done = subprocess.run(
        [sys.executable, "tests/sweep.py", "--problems", "40"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert " 0 failures" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_gpus_have_tiles_of_their_own(monkeypatch):
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    rule, shape, found = Neighborhood.create(2, 80), (256, 256), []
    for gpu in map(tiles.gpu_of, (90, 86)):
        monkeypatch.setattr(tiles, "gpu", lambda gpu=gpu: gpu)
        found.append(tiles.choose("dq", rule, shape, shape, 128, 128, 2))
    large, small = found
    assert large != small


def test_tiles_of_products_rounded_to_tf32(monkeypatch):
    """Two warps have 32 rows, a warpgroup has 64 of dQ. Neither half precision nor wide heads have
    other tiles than without, and tiles that were measured are of one kind of products."""
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    rule, shape = Neighborhood.create(2, 13), (64, 64)

    def chosen(dim, itemsize):
        kinds = "forward", "dq", "dkdv"
        return [tiles.choose(kind, rule, shape, shape, dim, dim, itemsize) for kind in kinds]

    problem = "dq", rule, shape, shape, 64, 64
    names = [tiles.key(*problem, n) for n in (4, 2)]
    exact = [*map(chosen, (64, 128, 64), (4, 4, 2))]
    monkeypatch.setattr(tiles, "allows_tf32", lambda: True)
    rounded = [*map(chosen, (64, 128, 64), (4, 4, 2))]
    assert rounded[1:] == exact[1:]
    assert [each.num_warps for each in exact[0]] == [4, 4, 4]
    assert [each.num_warps for each in rounded[0]] == [2, 4, 2]
    assert [torch.Size(each.q_block).numel() for each in rounded[0]] == [32, 64, 32]
    assert [tiles.key(*problem, n) for n in (4, 2)] == [names[0] + "-tf32", names[1]]


def test_tiles_asked_for_are_used(caplog):
    plan = pytest.importorskip("natten.backends.triton.plan")
    rule, x = Neighborhood.create(2, 5), torch.empty(1, 30, 20, 1, 64, dtype=torch.bfloat16)

    def used(*tiles):
        found = plan.plan_for(x, x, x, None, None, rule, 1.0, tiles=tiles)
        return [
            (each.arguments["Q_BLOCK"], each.arguments["KV_BLOCK"])
            for each in (found.forward, found.dkdv)
        ]

    _, backward = used()
    assert used(2, 16, 8, 8, 0, 0, 0, 0) == [((1, 2, 16), (1, 8, 8)), backward]
    assert used(4, 8, 0, 0, 8, 4, 4, 16) == [((1, 4, 8), used(4, 8)[0][1]), ((1, 8, 4), (1, 4, 16))]
    with caplog.at_level("DEBUG", logger="natten"):
        assert used(3, 5, 0, 0, 0, 0, 0, 0) == used()
    assert "the forward kernel has no tiles (3, 5)" in caplog.text
