"""Layouts on several ranks, by gloo on a CPU: the numbers of one device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from ranks import Pool

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


def size() -> int:
    return dist.get_world_size()


def test_pool(ranks: Pool) -> None:
    assert ranks(size) == [4] * 4
