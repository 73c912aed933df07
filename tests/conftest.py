"""Fixtures of the whole suite."""

import gc
import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch loads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` skip where torch finds no device."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(autouse=True)
def same_threads():
    """Commands called in place set their own numbers of threads: the next test gets back what there was before.

    One that left torch at 4,096 made the suite after it ten times slower.
    """
    import sys

    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None and sys.modules["torch"].get_num_threads() != before:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def frozen_heap():
    """Take what is alive between modules out of the garbage collector's rounds.

    Runs collect between their stages; in a process with torch's compiler and every family of diffusers loaded each
    round takes half a second, and the suite asks for hundreds.
    """
    yield
    gc.collect()
    gc.freeze()
