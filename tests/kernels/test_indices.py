"""Range checks of indices: refused by name, looked at once, looked at again after a change."""

import pytest
import torch

from stages.kernels import indices
from stages.kernels.indices import check_indices, extent, set_extent


def test_indices_out_of_range_and_other_numbers_are_refused_by_name():
    check_indices("edges", torch.tensor([[0, 4], [2, 3]], dtype=torch.int32), 5)
    check_indices("edges", torch.tensor([-1, 4]), 5, start=-1)
    check_indices("edges", torch.zeros(0, 2, dtype=torch.int32), 0)
    with pytest.raises(ValueError, match=r"edges: wanted indices in \[0, 5\), got 0 to 5"):
        check_indices("edges", torch.tensor([0, 5]), 5)
    with pytest.raises(ValueError, match=r"edges: wanted indices in \[0, 5\), got -1 to 3"):
        check_indices("edges", torch.tensor([-1, 3]), 5)
    with pytest.raises(ValueError, match="edges: wanted dtype int32, got float32"):
        check_indices("edges", torch.tensor([0.0]), 5)


def test_a_tensor_is_looked_at_once_and_again_after_a_change(monkeypatch):
    looks = []
    look = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda t: looks.append(1) or look(t))
    tensor = torch.tensor([3, 1, 2])
    assert extent(tensor) == (1, 3) and extent(tensor) == (1, 3) and len(looks) == 1
    tensor[0] = 9
    assert extent(tensor) == (1, 9) and len(looks) == 2
    assert extent(tensor.clone()) == (1, 9) and len(looks) == 3
    with torch.inference_mode():
        still = torch.tensor([4, 5])
        assert extent(still) == (4, 5) and extent(still) == (4, 5) and len(looks) == 5
        assert set_extent(still, 0, 9) is still


def test_given_bounds_hold_until_a_change():
    tensor = set_extent(torch.tensor([3, 4]), 0, 9)
    with pytest.raises(ValueError, match="got 0 to 9"):
        check_indices("x", tensor, 5)
    tensor[0] = 2
    assert extent(tensor) == (2, 4)


def test_nothing_is_kept_of_a_tensor_that_is_gone():
    before = len(indices._extents)
    tensor = torch.tensor([3, 4])
    extent(tensor)
    assert len(indices._extents) == before + 1
    del tensor
    assert len(indices._extents) == before
