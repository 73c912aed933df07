"""Every field kernel on a hundred random inputs of every size, against its plain-torch twin, forward and backward; and
what else is true of all compiled backends: numba, Warp on its CPU device, Warp on CUDA.

Of each ten inputs one is empty, one a single sample, one lies on cell walls, one is huge, one outside of the box, one
the same sample all over, and three are not contiguous, each in its own way.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from stages.kernels.density import hash_density
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode, hash_encode_both, hash_gradient
from stages.kernels.mlp import mlp, mlp_with_slope
from stages.kernels.volume import Samples, composite, march, visible
from tests.test_kernels_sizes import FAST, SIZES, Case, assert_agrees, assert_refused_or_left_to_the_twin, outputs

KINDS = ("empty", "one", "walls", "huge", "outside", "same", "strided", "turned", "shifted", "plain")
SMALL = HashGridSpec(levels=5, log2_table=8, base=3, finest=40)  # two dense levels, three hashed
SPECS = (SMALL, HashGridSpec(levels=1, log2_table=8, base=4, finest=4), HashGridSpec(levels=7, log2_table=10))
PERCEPTRONS = ((7, 3), (32, 1))  # inputs and outputs; of the first, neither fills a whole tile


def backends(*params):
    """A fixture: name and device of a backend; where warp is absent, its parameters alone skip."""

    def fixture(request) -> tuple[str, str]:
        if request.param[0] == "warp":
            pytest.importorskip("warp")
        return request.param

    return pytest.fixture(fixture, params=[pytest.param(p.values, id=p.id, marks=p.marks) for p in params])


EVERY = (pytest.param("torch", "cpu", id="torch"), *FAST)
fast, every = backends(*FAST), backends(*EVERY)


class Draw:
    """Random tensors of one input: its kind, its size, normal or uniform values."""

    def __init__(self, seed: int, largest: int) -> None:
        self.g, self.kind, self.seed = torch.Generator().manual_seed(seed), KINDS[seed % len(KINDS)], seed
        self.n = {"empty": 0, "one": 1}.get(self.kind, int(torch.randint(2, largest, (), generator=self.g)))
        self.layout = self.kind if self.kind in ("strided", "turned", "shifted") else "plain"

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.g)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.g)

    def points(self, spec: HashGridSpec) -> Tensor:
        """[n, 3]"""
        points = self.uniform(self.n, 3)
        if self.kind == "walls":
            points = (points * spec.resolutions[-1]).round() / spec.resolutions[-1]
        if self.kind == "huge":
            points = self.normal(self.n, 3) * 10.0 ** torch.randint(3, 38, (self.n, 3), generator=self.g)
        if self.kind == "outside":
            points = 3 * points - 1
        return points[:1].expand(self.n, 3).clone() if self.kind == "same" else points

    def samples(self) -> tuple[Tensor, Samples]:
        """Densities, and samples of n rays some of which have none; all of one ray where they are the same."""
        counts = torch.randint(-3, 9, (self.n,), generator=self.g).clamp(min=0)
        if self.kind == "same":
            counts[1:], counts[0] = 0, 100
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        n, large = int(offsets[-1]), 1e6 if self.kind == "huge" else 1.0
        sigmas = 5 * large * self.uniform(n)
        if self.kind == "walls":
            sigmas[::2] = 0.0
        return sigmas, Samples(large * (self.uniform(n) + 1), 0.02 + 0.1 * self.uniform(n), offsets)


def case_of_encode(seed: int) -> Case:
    draw, spec = Draw(seed, 100), SPECS[seed % len(SPECS)]
    table = draw.normal(spec.rows, 2) * (1e6 if draw.kind == "huge" else 1)
    return Case(hash_encode, (draw.points(spec), table), (spec,), layout=draw.layout, tolerance=2e-5)


def case_of_both(seed: int) -> Case:
    draw, spec, finer = Draw(seed, 100), SPECS[seed % len(SPECS)], SPECS[(seed + 1) % len(SPECS)]

    def op(points, first, second, backend):
        return hash_encode_both(points, (first, second), (spec, finer), backend=backend)

    leaves = (draw.points(spec), draw.normal(spec.rows, 2), draw.normal(finer.rows, 2))
    return Case(op, leaves, layout=draw.layout, tolerance=2e-5)


def case_of_gradient(seed: int) -> Case:
    draw, spec = Draw(seed, 100), SPECS[seed % len(SPECS)]
    points, table, g = draw.points(spec), draw.normal(spec.rows, 2), draw.normal(draw.n, spec.width)

    def op(table, g, points, backend):
        return hash_gradient(points, table, spec, g, backend=backend)

    return Case(op, (table, g), (points,), layout=draw.layout, tolerance=2e-5)


def case_of_density(seed: int) -> Case:
    """Points none of whose hidden units is within rounding of zero, where the slope jumps."""
    draw = Draw(seed, 100)
    table, w1, b1 = draw.normal(SMALL.rows, 2), draw.normal(12, SMALL.width), draw.normal(12)
    w2, b2, points = draw.normal(1, 12), draw.normal(1), draw.points(SMALL)
    hidden = hash_encode(points.double(), table.double(), SMALL, backend="torch") @ w1.double().T + b1.double()
    points = points[(hidden.abs() > 1e-4).all(-1)]

    def op(table, w1, b1, w2, b2, points, backend):
        return hash_density(points, table, SMALL, (w1, b1, w2, b2), backend=backend)

    return Case(op, (table, w1, b1, w2, b2), (points,), layout=draw.layout, tolerance=5e-5, least=0.1)


def perceptron(seed: int) -> tuple[Tensor, ...]:
    """Inputs and first layer on a grid of eighths: hidden units come out exact, those that are 0 included."""
    draw, hidden, (inputs, outs) = Draw(seed, 200), 1 + seed % 40, PERCEPTRONS[seed // 10 % 2]
    shapes = (draw.n, inputs), (hidden, inputs), (hidden,)
    x, w1, b1 = ((8 * draw.normal(*shape)).round() / 8 for shape in shapes)
    if draw.kind == "walls":
        x, b1 = 0 * x, 0 * b1
    if draw.kind == "huge":
        x, b1 = 2.0**20 * x, 2.0**20 * b1
    if draw.kind == "outside":
        b1 = b1 - 100  # no unit is on
    if draw.kind == "same":
        x = x[:1].expand_as(x).clone()
    return x, w1, b1, draw.normal(outs, hidden), draw.normal(outs)


def case_of_mlp(seed: int) -> Case:
    return Case(mlp, perceptron(seed), layout=Draw(seed, 2 + 1).layout, tolerance=3e-5, least=0.1)


def case_of_slope(seed: int) -> Case:
    return Case(mlp_with_slope, perceptron(seed), layout=Draw(seed, 2 + 1).layout, tolerance=3e-5, least=0.1)


def case_of_composite(seed: int) -> Case:
    draw = Draw(seed, 60)
    sigmas, samples = draw.samples()

    def op(sigmas, values, t, delta, offsets, backend):
        return composite(sigmas, values, Samples(t, delta, offsets), backend=backend)

    rest = (samples.t, samples.delta, samples.ray_offsets)
    return Case(op, (sigmas, draw.normal(len(samples), seed % 6)), rest, layout=draw.layout, tolerance=2e-5)


def case_of_visible(seed: int) -> Case:
    draw = Draw(seed, 60)
    sigmas, samples = draw.samples()

    def op(sigmas, t, delta, offsets, backend):
        index, kept = visible(20 * sigmas, Samples(t, delta, offsets), 1e-2, 0.05, backend=backend)
        return index, kept.t, kept.delta, kept.ray_offsets

    return Case(op, (sigmas,), (samples.t, samples.delta, samples.ray_offsets), layout=draw.layout)


def case_of_march(seed: int) -> Case:
    """Rays from around the box; walls: along the cells' walls, huge: from far away, outside: past the box."""
    draw, cells = Draw(seed, 60), 1 + seed % 17
    o = 3 * torch.nn.functional.normalize(draw.normal(draw.n, 3), dim=-1)
    d = torch.nn.functional.normalize(0.7 * draw.normal(draw.n, 3) - o, dim=-1)
    if draw.kind == "walls":
        d = torch.eye(3)[torch.randint(0, 3, (draw.n,), generator=draw.g)]
        o = (2 / cells * torch.randint(0, cells + 1, (draw.n, 3), generator=draw.g) - 1) * (1 - d) - 3 * d
    if draw.kind == "huge":
        o = o - d * 10.0 ** torch.randint(1, 30, (draw.n, 1), generator=draw.g)
    if draw.kind == "outside":
        d = -d
    if draw.kind == "same":
        o, d = (v[:1].expand(draw.n, 3).clone() for v in (o, d))
    occupancy = (3 * draw.uniform(cells, cells, cells)).to(torch.uint8)
    occupancy = occupancy if seed % 3 else occupancy > 0

    def op(o, d, jitter, occupancy, backend):
        samples = march(o, d, occupancy, 0.05, jitter, thin_stride=1 + seed % 4, backend=backend)
        return samples.t, samples.delta, samples.ray_offsets

    return Case(op, (o, d, draw.uniform(draw.n)), (occupancy,), layout=draw.layout)


OPS = {
    "hash_encode": case_of_encode,
    "hash_encode_both": case_of_both,
    "hash_gradient": case_of_gradient,
    "hash_density": case_of_density,
    "mlp": case_of_mlp,
    "mlp_with_slope": case_of_slope,
    "march": case_of_march,
    "composite": case_of_composite,
    "visible": case_of_visible,
}


@cache
def twins(name: str, seed: int):
    case = OPS[name](seed)
    return case, outputs(case, "torch", "cpu", None)


def of_rays(found: tuple[Tensor, ...], chosen: Tensor) -> tuple[Tensor, ...]:
    """t, delta and counts of the chosen rays alone."""
    counts = found[2].diff()
    kept = chosen.repeat_interleave(counts)
    return found[0][kept], found[1][kept], counts[chosen]


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


def test_the_random_inputs_reach_what_they_are_meant_to_reach():
    """A comparison of nothing with nothing would pass too."""
    sizes = {name: [len(twins(name, seed)[1][0][0]) for seed in SIZES] for name in OPS}
    assert all(sum(n > 20 for n in found) > 30 for found in sizes.values()), sizes
    assert all(min(found) == 0 for found in sizes.values())
    moved = [twins("hash_encode", seed)[1][1][0].abs().amax(1) for seed in SIZES if KINDS[seed % 10] == "outside"]
    assert 0.2 < (torch.cat(moved) > 0).float().mean() < 1  # clamped in every axis, or not
    off = [(twins("mlp", seed)[1][1][2] == 0).float().mean() for seed in SIZES if seed % 10 != 0]
    assert 0.05 < sum(off) / len(off) < 0.5  # units that no input turns on
    kept = sum(sizes["visible"]) / sum(len(twins("visible", seed)[0].leaves[0]) for seed in SIZES)
    assert 0.1 < kept < 0.9
    deltas = torch.cat([twins("march", seed)[1][0][1] for seed in SIZES])
    assert len(deltas.unique()) == 4  # strides


@pytest.mark.parametrize("backend", ["numba", "warp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", OPS)
def test_other_floats_are_refused_by_name_and_double_is_left_to_the_twin(name, dtype, backend):
    if backend == "warp":
        pytest.importorskip("warp")
    assert_refused_or_left_to_the_twin(OPS[name](9), dtype, backend)


def problem(n: int, device: str = "cpu", spec: HashGridSpec = SMALL) -> tuple[Tensor, ...]:
    """points, table, and upstream gradients of features and of points."""
    g = torch.Generator().manual_seed(4)
    drawn = (torch.rand(n, 3, generator=g), *(torch.randn(*s, generator=g) for s in ((spec.rows, 2), (n, spec.width))))
    return tuple(v.to(device) for v in (*drawn, torch.randn(n, 3, generator=g)))


def head(inputs: int, hidden: int, outs: int, device: str) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(5)
    shapes = (hidden, inputs), (hidden,), (outs, hidden), (outs,)
    return tuple(torch.randn(*shape, generator=g).to(device) for shape in shapes)


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
    found = hash_gradient(points, table, SMALL, g, backend=backend)
    assert_agrees((found[away],), (torch.stack(numeric, -1).float()[away],), 2e-5, "gradient by the points")
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
    slow, found = (hash_encode(points, table.clamp(-1, 1), spec, backend=backend) for backend in ("torch", fast[0]))
    assert float((slow - found).abs().max()) < 1e-6
