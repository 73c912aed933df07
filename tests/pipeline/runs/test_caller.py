"""What a run does to torch while it lasts: its deterministic mode, and the warnings that go with it."""

import warnings

import pytest
import torch

from pipeline.runs.caller import deterministic, warnings_told


@pytest.mark.parametrize(("enabled", "mode"), [(True, 1), (False, 0)])
def test_torch_is_deterministic_inside_where_it_is_wanted(enabled, mode):
    before = torch.get_deterministic_debug_mode()
    with deterministic(torch.device("cpu"), enabled):
        assert torch.get_deterministic_debug_mode() == mode
    assert torch.get_deterministic_debug_mode() == before


def test_an_operation_that_torch_cannot_repeat_is_told_once_and_other_warnings_stay_warnings():
    notes, show = [], warnings.showwarning
    with pytest.warns(UserWarning, match="something else") as others, warnings_told(notes.append):
        for _ in range(2):
            warnings.warn(
                "upsample_linear1d_backward_out_cuda does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True, warn_only=True)'. You can file an issue",
                stacklevel=1,
            )
            warnings.warn(
                "Memory Efficient attention defaults to a non-deterministic algorithm. To explicitly enable "
                "determinism call torch.use_deterministic_algorithms(True, warn_only=False).",
                stacklevel=1,
            )
        warnings.warn("something else", stacklevel=1)
    assert [note.split(" does not")[0] for note in notes] == [
        "upsample_linear1d_backward_out_cuda",
        "Memory Efficient attention",
    ]
    assert len(others) == 1 and warnings.showwarning is show
