"""What the tests of every draft stage begin with."""

from __future__ import annotations

import pytest

from tests.tiny_clip import pocket_like


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a small CLIP whose embeddings are as wide as the pocket one's."""
    return pocket_like(tmp_path_factory.mktemp("clips") / "tiny")
