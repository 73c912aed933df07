"""Every mesh kernel on a hundred random inputs of every size, against its plain-torch twin, forward and backward.

The inputs are those of kernel_cases.py; the field kernels run on the same rails (test_kernels_fields.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_cases import (
    FAST,
    KINDS,
    OPS,
    SIZES,
    assert_agrees,
    assert_refused_or_left_to_the_twin,
    outputs,
)


def near_silhouettes(ids: Tensor) -> Tensor:
    """Pixels [B, H, W] with another triangle among their eight neighbours."""
    if not ids.numel():
        return ids.bool()
    high = torch.nn.functional.max_pool2d(ids[:, None], 3, 1, 1)[:, 0]
    low = -torch.nn.functional.max_pool2d(-ids[:, None], 3, 1, 1)[:, 0]
    return high != low


@cache
def twins(name: str, seed: int):
    case = OPS[name](seed)
    return case, outputs(case, "torch", "cpu", None)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device"), FAST)
@pytest.mark.parametrize("name", OPS)
def test_agrees_with_the_twin_at_a_hundred_random_sizes(name, backend, device):
    if backend == "warp":
        pytest.importorskip("warp")
    pixels = wrong_pixels = 0
    for seed in SIZES:
        case, (want, want_grads) = twins(name, seed)
        if KINDS[seed % len(KINDS)] == "strided":
            case = replace(case, layout="strided")
        keep = None
        if name == "rasterise":
            ids = case(tuple(leaf.to(device) for leaf in case.leaves), backend, device)[0][..., 3].cpu()
            keep = ids == want[0][..., 3]
            assert (keep | near_silhouettes(want[0][..., 3])).all(), f"input {seed}"
            pixels, wrong_pixels = pixels + ids.numel(), wrong_pixels + int((~keep).sum())
            if not keep.all():  # compare the gradients of the other pixels
                want, want_grads = outputs(case, "torch", "cpu", keep)
                want = (torch.where(keep[..., None], want[0], 0.0),)
        got, got_grads = outputs(case, backend, device, keep)
        if keep is not None:
            got = (torch.where(keep[..., None], got[0], 0.0),)
        assert_agrees((*got, *got_grads), (*want, *want_grads), case.tolerance, f"input {seed}", case.least)
    assert wrong_pixels <= 1e-3 * pixels


@pytest.mark.slow
def test_the_random_inputs_reach_what_they_are_meant_to_reach():
    """A comparison of empty pictures would pass too."""
    covered = [float((twins("rasterise", s)[1][0][0][..., 3] > 0).float().mean()) for s in SIZES if s % 20]
    assert sum(c > 0.2 for c in covered) > 40
    blended = [twins("antialias", s) for s in SIZES]
    changed = sum(int((out[0] != case.leaves[0]).any(-1).sum()) for case, (out, _) in blended)
    assert changed > 1000
    assert sum(int(twins("marching_tetrahedra", s)[1][0][1].shape[0]) for s in SIZES) > 500
    assert sum(int((twins("edge_topology", s)[1][0][0] >= 0).sum()) for s in SIZES) > 20


@pytest.mark.parametrize("backend", ["numba", "warp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", [name for name in OPS if OPS[name](7).leaves])
def test_other_floats_are_refused_by_name_and_double_is_left_to_the_twin(name, dtype, backend):
    if backend == "warp":
        pytest.importorskip("warp")
    assert_refused_or_left_to_the_twin(OPS[name](7), dtype, backend)
