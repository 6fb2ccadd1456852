"""Settings of all tests: one thread per worker, a fixed seed, GPU tests only with a GPU."""

import os
import tempfile

import pytest
import torch

# Tiles that were tuned on this machine must not affect tests; nothing is written to this folder.
os.environ["NATTEN_CACHE"] = os.path.join(tempfile.gettempdir(), "natten-untuned")
torch.set_num_threads(1)
collect_ignore = ["typing_uses.py"]  # it has imports that must fail; test_types.py reads it


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other processes test on the same GPU


@pytest.fixture(scope="session")
def two_ranks():
    """Two ranks of a gloo group, for tests of the group "distributed", which share a process."""
    from ranks import Pool

    pool = Pool(2)
    yield pool
    pool.close()


def pytest_collection_modifyitems(items):
    gpus = torch.cuda.device_count()
    for marker, needed in (("gpu", 1), ("multigpu", 2)):
        for item in items:
            if marker in item.keywords and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU{'s' * (needed > 1)}"))
