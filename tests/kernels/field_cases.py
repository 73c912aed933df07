"""Random calls of every field kernel: the hash grid, the perceptron, marching and compositing.

Of each ten inputs one is empty, one a single sample, one lies on cell walls, one is huge, one outside of the box, one
the same sample all over, and three are not contiguous, each in its own way.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.kernels.density import hash_density
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode, hash_encode_both, hash_gradient
from stages.kernels.mlp import mlp, mlp_with_slope
from stages.kernels.volume import Samples, composite, cull, march
from tests.kernels.kernel_cases import FAST, Case

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


def case_of_cull(seed: int) -> Case:
    draw = Draw(seed, 60)
    sigmas, samples = draw.samples()

    def op(sigmas, t, delta, offsets, backend):
        index, survivors = cull(20 * sigmas, Samples(t, delta, offsets), 1e-2, 0.05, backend=backend)
        return index, survivors.t, survivors.delta, survivors.ray_offsets

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
    "cull": case_of_cull,
}


def problem(n: int, device: str = "cpu", spec: HashGridSpec = SMALL) -> tuple[Tensor, ...]:
    """points, table, and upstream gradients of features and of points."""
    g = torch.Generator().manual_seed(4)
    draws = (torch.rand(n, 3, generator=g), *(torch.randn(*s, generator=g) for s in ((spec.rows, 2), (n, spec.width))))
    return tuple(v.to(device) for v in (*draws, torch.randn(n, 3, generator=g)))


def head(inputs: int, hidden: int, outs: int, device: str) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(5)
    shapes = (hidden, inputs), (hidden,), (outs, hidden), (outs,)
    return tuple(torch.randn(*shape, generator=g).to(device) for shape in shapes)
