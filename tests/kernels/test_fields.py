"""Every field kernel on a hundred random inputs of every size, against its plain-torch twin, forward and backward; and
what else is true of all compiled backends: numba, Warp on its CPU device, Warp on CUDA.

The inputs are those of field_cases.py.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from stages.kernels.density import hash_density
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode, hash_gradient
from stages.kernels.mlp import mlp_with_slope
from stages.kernels.volume import Samples, composite
from tests.kernels.field_cases import (
    EVERY,
    KINDS,
    OPS,
    SMALL,
    Draw,
    backends,
    head,
    problem,
)
from tests.kernels.kernel_cases import FAST, SIZES, Case, assert_agrees, assert_refused_or_left_to_the_twin, outputs

fast, every = backends(*FAST), backends(*EVERY)


@cache
def twins(name: str, seed: int):
    case = OPS[name](seed)
    return case, outputs(case, "torch", "cpu", None)


def of_rays(actual: tuple[Tensor, ...], chosen: Tensor) -> tuple[Tensor, ...]:
    """t, delta and counts of the chosen rays alone."""
    counts = actual[2].diff()
    survivors = chosen.repeat_interleave(counts)
    return actual[0][survivors], actual[1][survivors], counts[chosen]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_agrees_with_the_twin_at_a_hundred_random_sizes(name, fast):
    for seed in SIZES:
        case, (want, want_grads) = twins(name, seed)
        got, got_grads = outputs(case, *fast, None)
        if name == "march":  # a sample within float rounding of a cell wall may fall on either side
            same = got[2].diff() == want[2].diff()
            assert (~same).sum() <= 0.01 * len(same) + (fast[1] == "cuda"), f"input {seed}"
            got, want = of_rays(got, same), of_rays(want, same)
        message = f"input {seed}, {KINDS[seed % len(KINDS)]}"
        assert_agrees((*got, *got_grads), (*want, *want_grads), case.tolerance, message, case.least)


@pytest.mark.slow
def test_the_random_inputs_reach_what_they_are_meant_to_reach():
    """A comparison of nothing with nothing would pass too."""
    sizes = {name: [len(twins(name, seed)[1][0][0]) for seed in SIZES] for name in OPS}
    assert all(sum(n > 20 for n in numbers) > 30 for numbers in sizes.values()), sizes
    assert all(min(numbers) == 0 for numbers in sizes.values())
    moved = [twins("hash_encode", seed)[1][1][0].abs().amax(1) for seed in SIZES if KINDS[seed % 10] == "outside"]
    assert 0.2 < (torch.cat(moved) > 0).float().mean() < 1  # clamped in every axis, or not
    off = [(twins("mlp", seed)[1][1][2] == 0).float().mean() for seed in SIZES if seed % 10 != 0]
    assert 0.05 < sum(off) / len(off) < 0.5  # units that no input turns on
    survivors = sum(sizes["cull"]) / sum(len(twins("cull", seed)[0].leaves[0]) for seed in SIZES)
    assert 0.1 < survivors < 0.9
    deltas = torch.cat([twins("march", seed)[1][0][1] for seed in SIZES])
    assert len(deltas.unique()) == 4  # strides


@pytest.mark.parametrize("backend", ["numba", "warp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", OPS)
def test_other_floats_are_refused_by_name_and_double_is_left_to_the_twin(name, dtype, backend):
    if backend == "warp":
        pytest.importorskip("warp")
    assert_refused_or_left_to_the_twin(OPS[name](9), dtype, backend)


@pytest.mark.parametrize("name", ["g", "known", "density's known"])
def test_features_of_another_shape_or_dtype_are_refused_by_name(name, every):
    """numba would read float64 as float32, and rows of another length as its own."""
    backend, device = every
    points, table, good, _ = problem(6, device)

    def call(features: Tensor) -> None:
        if name == "g":
            hash_gradient(points, table, SMALL, features, backend=backend)
        elif name == "known":
            hash_encode(points, table, SMALL, known=features, backend=backend)
        else:
            weights = head(SMALL.width, 4, 1, device)
            hash_density(points, table, SMALL, weights, known=features, backend=backend)

    call(good)
    name = name.split()[-1]
    for dtype in (torch.float64, torch.float16, torch.int32):
        with pytest.raises(ValueError, match=rf"{name}: wanted float32 on .*, got {str(dtype)[6:]} on"):
            call(good.to(dtype))
    for wrong in (good[:-1], good[:, :-1], good[:, 0]):
        with pytest.raises(ValueError, match=rf"{name}: wanted shape \[6, {SMALL.width}\], got"):
            call(wrong)
    with pytest.raises(ValueError, match=rf"{name}: wanted float32 on {device}.*, got float32 on meta"):
        call(good.to("meta"))


def test_density_refuses_wrong_shapes_by_name(every):
    """A kernel reads as many numbers as it was told of, whether they are there or not."""
    backend, device = every
    points, table, *_ = problem(6, device)
    w1, b1, w2, b2 = head(SMALL.width, 4, 1, device)
    good = {"points": points, "table": table, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    wrong = {"points": points[:, :2], "table": table[1:], "w1": w1[:, 1:], "b1": b1[1:], "w2": w2[:, 1:], "b2": b2[:0]}
    for name in (*wrong, "w2"):
        arguments = {**good, name: wrong.pop(name, head(SMALL.width, 4, 2, device)[2])}
        with pytest.raises(ValueError, match=f"^{name}: wanted shape"):
            hash_density(arguments["points"], arguments["table"], SMALL,
                         tuple(arguments[k] for k in ("w1", "b1", "w2", "b2")), backend=backend)  # fmt: skip


def test_known_features_and_a_broadcast_gradient_are_taken_as_they_are(fast):
    backend, device = fast
    points, table, *_ = problem(300, device)
    known = hash_encode(points, table, SMALL, backend=backend)
    gradients = []
    for kwargs in ({"backend": backend}, {"backend": backend, "known": known}, {"backend": "torch"}):
        t = table.clone().requires_grad_()
        hash_encode(points, t, SMALL, **kwargs).sum().backward()  # upstream is one number, with strides of 0
        gradients.append(t.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert_agrees(gradients[:1], gradients[2:], 2e-5, "sum of features")


def test_perceptron_sums_gradients_over_many_blocks_of_points(fast):
    g = torch.Generator().manual_seed(0)
    x, w1, b1 = ((8 * torch.randn(*shape, generator=g)).round() / 8 for shape in ((5000, 32), (16, 32), (16,)))
    case = Case(mlp_with_slope, (x, w1, b1, torch.randn(1, 16, generator=g), torch.randn(1, generator=g)))
    got, want = (outputs(case, *where, None) for where in (fast, ("torch", "cpu")))
    assert_agrees((*got[0], *got[1]), (*want[0], *want[1]), 3e-5, "5000 points")


def test_each_output_of_composite_sends_back_its_own_gradient(fast):
    sigmas, samples = Draw(9, 60).samples()
    values = torch.rand(len(samples), 3, generator=torch.Generator().manual_seed(0))
    packed = (samples.t, samples.delta, samples.ray_offsets)
    for chosen in range(4):

        def op(sigmas, values, t, delta, offsets, backend, chosen=chosen):
            return composite(sigmas, values, Samples(t, delta, offsets), backend=backend)[chosen].square()

        case = Case(op, (sigmas, values), packed)
        got, want = (outputs(case, *where, None) for where in (fast, ("torch", "cpu")))
        assert_agrees((*got[0], *got[1]), (*want[0], *want[1]), 2e-5, f"output {chosen}")


def test_gradients_are_float64_finite_differences(fast):
    backend, device = fast
    points, table, g, up = problem(12, device)
    along = torch.randn(SMALL.rows, 2, generator=torch.Generator().manual_seed(6)).double().to(device)
    away = torch.ones(12, dtype=torch.bool, device=device)  # the encoding has kinks at cell walls
    for resolution in SMALL.resolutions:
        fraction = points * resolution % 1
        away &= ((fraction > 1e-3) & (fraction < 1 - 1e-3)).all(-1)
    assert away.sum() > 6
    exact, step = (points.double(), table.double()), 1e-6
    numeric = [
        sum(s * (hash_encode(exact[0] + s * d, exact[1], SMALL) * g).sum(-1) for s in (1, -1)) / (2 * step)
        for d in step * torch.eye(3, dtype=torch.float64, device=device)
    ]
    actual = hash_gradient(points, table, SMALL, g, backend=backend)
    assert_agrees((actual[away],), (torch.stack(numeric, -1).float()[away],), 2e-5, "gradient by the points")
    t = table.clone().requires_grad_()
    (hash_gradient(points, t, SMALL, g, backend=backend) * up).sum().backward()
    ends = [(hash_gradient(exact[0], exact[1] + s * along, SMALL, g.double()) * up).sum() for s in (1e-3, -1e-3)]
    assert float((t.grad * along).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-3, rel=1e-4)
    sigmas, samples = Draw(9, 20).samples()
    along = torch.randn(len(samples), generator=torch.Generator().manual_seed(7)).double()
    packed = [v.to(device) for v in (samples.t, samples.delta, samples.ray_offsets)]
    s = sigmas.to(device).requires_grad_()
    composite(s, packed[0][:, None], Samples(*packed), backend=backend)[0].cos().sum().backward()
    doubled = Samples(samples.t.double(), samples.delta.double(), samples.ray_offsets)
    ends = [composite(sigmas.detach() + e * along, doubled.t[:, None], doubled)[0].cos().sum() for e in (1e-5, -1e-5)]
    assert float((s.grad.cpu() * along).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_no_product_is_fused_with_the_subtraction_of_the_cell(fast):
    """With one, features at 8192 cells a side would be off by up to 4e-4 of the table's values."""
    spec = HashGridSpec(levels=2, log2_table=12, base=4096, finest=8192)
    points, table, *_ = problem(4000, fast[1], spec)
    slow, actual = (hash_encode(points, table.clamp(-1, 1), spec, backend=backend) for backend in ("torch", fast[0]))
    assert float((slow - actual).abs().max()) < 1e-6
