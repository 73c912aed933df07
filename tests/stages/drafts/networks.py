"""The fixture of a draft stage's networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def networks_of(tiny_networks: Callable[[Path], Path]) -> Callable:
    """A fixture: a folder of small networks, once for a module."""

    @pytest.fixture(scope="module")
    def networks(tmp_path_factory):
        return tiny_networks(tmp_path_factory.mktemp("networks"))

    return networks
