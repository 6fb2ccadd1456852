"""Plans and masks that are kept between calls stay within their bound in bytes."""

import gc
import threading

import pytest
import torch

import natten
from natten import caches, tiling
from natten.backends.sdpa import costs, fused, views
from natten.backends.tiled import grids
from natten.caches import Store
from natten.inputs import Inputs


def test_the_least_recently_used_leaves_first():
    store = Store(3 * (100 + caches._ENTRY))
    for key in "abc":
        store.find(key, str, lambda _: 100)
    store.find("a", pytest.fail, lambda _: 100)  # so that it is the most recently used
    store.find("d", str, lambda _: 100)
    assert list(store._entries) == ["c", "a", "d"]
    assert store.bytes == store.most


def test_what_is_too_large_is_not_kept():
    store = Store(1000)
    store.find("small", str, lambda _: 1)
    assert store.find("large", lambda: "value", lambda _: 1001) == "value"
    assert list(store._entries) == ["small"]


def test_forgetting_counts():
    store = Store(10_000)
    for key in range(4):
        store.find(key, str, lambda _: 10)
    store.forget(lambda key: key < 3)
    assert list(store._entries) == [3] and store.bytes == 10 + caches._ENTRY


def test_threads():
    """Threads find and evict at the same time, and the count stays right."""
    store = Store(20 * (50 + caches._ENTRY))

    def work(first):
        for i in range(2000):
            key = (first + i * 7) % 40
            assert store.find(key, lambda key=key: key, lambda _: 50) == key

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store._entries) == 20
    assert store.bytes == sum(size for _, size in store._entries.values()) == store.most


def tensor_bytes():
    """Bytes of the storages of all CPU tensors that are alive."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if type(x) is torch.Tensor and x.device.type == "cpu" and x.layout is torch.strided:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def masks_of_tiled(rule, x):
    return [grids._kept_mask(grid.looks) for grid in grids.grids_for(rule, x, x, 32)[::3]]


def masks_of_sdpa(rule, x):
    every = fused._tile_views(rule, 1.0, Inputs(x, x, x), False)
    return [tiles.mask for tiles in every if tiles.mask is not None]


@pytest.mark.parametrize("masks", [masks_of_tiled, masks_of_sdpa])
def test_two_hundred_layouts(masks, monkeypatch):
    """All their plans and masks would take more than four times the bound."""
    monkeypatch.setattr(tiling, "_candidates", lambda *args: [4])  # because a search takes long
    options = costs._options
    monkeypatch.setattr(costs, "_options", lambda *args: [[axis[-2]] for axis in options(*args)])
    caches.STORE.forget(lambda key: True)
    before, made = tensor_bytes(), 0
    for n in range(200):
        shape = (8 + n % 4, 15 + n // 4 % 5, 13 + n // 20)
        # Tiles of layouts with the same windows look alike, and share masks.
        rule = natten.Neighborhood.create(3, (5 + n % 4, 11 + n // 4 % 5, 4 + n // 20))
        made += sum(mask.nbytes for mask in masks(rule, torch.zeros(1, *shape, 1, 1)))
        assert caches.STORE.bytes <= caches.MOST
    kept = tensor_bytes() - before
    assert caches.MOST / 2 < kept <= caches.STORE.bytes
    assert made > 4 * caches.MOST
    caches.STORE.forget(lambda key: True)
    assert tensor_bytes() - before < 1 << 20


@pytest.mark.parametrize("is_small", [True, False])
def test_views_hold_small_masks_and_count_them(is_small, monkeypatch):
    """So a call of few tokens does not ask the store, and the store knows what it could free."""
    caches.STORE.forget(lambda key: True)
    if not is_small:
        monkeypatch.setattr(views, "OWN_MASK", 1 << 10)
    x, rule = torch.zeros(1, 96, 1, 8), natten.Neighborhood.create(1, 95)
    (tiles,) = fused._tile_views(rule, 1.0, Inputs(x, x, x), False)
    mask, size = tiles.mask, tiles.bytes()
    caches.STORE.forget(lambda key: True)
    assert (tiles.mask is mask) == is_small
    assert (size >= mask.nbytes) == is_small


def test_equal_looks_share_a_mask():
    a, b = (grids.Looks([((0, 1), (3, 4), 4)]) for _ in range(2))
    assert a is not b and a == b and hash(a) == hash(b)
    assert grids._kept_mask(a) is grids._kept_mask(b)
