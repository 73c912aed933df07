"""Random calls of every mesh kernel, and how a backend is compared with the plain-torch twin.

Of each ten inputs one is empty, one a single triangle, one degenerate, one huge, one behind the eye, one not finite and
one not contiguous, in the ways that the op knows. The backends are numba and Warp, on Warp's CPU device and on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from stages.kernels.lambert import lambert
from stages.kernels.lattice import diffuse
from stages.kernels.marching import marching_tetrahedra, mesh_edges
from stages.kernels.raster import antialias, edge_topology, interpolate, rasterise, texture, vertex_normals
from stages.kernels.smoothness import smoothness

SIZES = range(100)
KINDS = ("empty", "one", "degenerate", "huge", "behind", "broken", "strided", "plain", "plain", "plain")


@dataclass(frozen=True)
class Case:
    """One call: op(*leaves, *rest, **options); gradients go to the leaves.

    layout: how the tensors lie in memory, a kind of `laid`. tolerance: of a difference, over a tensor's largest value,
    which counts as `least` at least: sums that cancel keep the rounding of their terms.
    """

    op: Callable
    leaves: tuple[Tensor, ...]
    rest: tuple = ()
    options: tuple[tuple[str, object], ...] = ()
    layout: str = "plain"
    tolerance: float = 1e-5
    least: float = 1e-3

    def __call__(self, leaves: tuple[Tensor, ...], backend: str, device: str) -> tuple[Tensor, ...]:
        rest = tuple(self.laid(t.to(device)) if isinstance(t, Tensor) else t for t in self.rest)
        out = self.op(*(self.laid(leaf) for leaf in leaves), *rest, backend=backend, **dict(self.options))
        return out if isinstance(out, tuple) else (out,)

    def laid(self, tensor: Tensor) -> Tensor:
        """The tensor, in the layout that the case is about."""
        if self.layout == "strided":  # with gaps between its values
            return torch.stack([tensor, tensor], -1)[..., 0]
        if self.layout == "turned" and tensor.ndim > 1:  # last dimension first
            return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
        if self.layout == "shifted":  # not from the beginning of its memory on, nor from a multiple of 16 bytes
            return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        return tensor


def random(seed: int) -> tuple[torch.Generator, str, Callable[[int, int], int]]:
    g = torch.Generator().manual_seed(seed)
    return g, KINDS[seed % len(KINDS)], lambda low, high: int(torch.randint(low, high + 1, (), generator=g))


def soup(seed: int) -> tuple[Tensor, Tensor, int, int]:
    """clip [B, V, 4], triangles [F, 3], height, width."""
    g, kind, pick = random(seed)
    views, height, width = pick(1, 3), pick(1, 24), pick(1, 24)
    count = {"empty": 0, "one": 1}.get(kind, pick(2, 40))
    vertices = pick(3, 30)
    clip = torch.randn(views, vertices, 4, generator=g)
    clip[..., 3] = 1.0 + 2.0 * torch.rand(views, vertices, generator=g)
    triangles = torch.randint(0, vertices, (count, 3), generator=g).int()
    sets = [frozenset(t) for t in triangles.tolist()]  # of two triangles with the same corners, rounding picks one
    triangles = triangles[[n for n, corners in enumerate(sets) if corners not in sets[:n]]]
    if kind == "one":
        triangles = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    if kind == "empty" and seed % 20 == 0:
        clip = clip[:0]
    if kind == "degenerate":
        triangles[::2, 1] = triangles[::2, 0]  # two corners at one vertex
        clip[:, : vertices // 2, :2] = clip[:, :1, :2]  # several vertices at one place
    if kind == "huge":
        clip[..., :2] *= 10.0 ** torch.randint(2, 6, (views, vertices, 1), generator=g)
    if kind == "behind":
        clip[..., 3] = torch.randn(views, vertices, generator=g)
    if kind == "broken":
        at = torch.randint(0, vertices, (3,), generator=g)
        clip[:, at, torch.tensor([0, 1, 3])] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return clip, triangles, height, width


def case_of_rasterise(seed: int) -> Case:
    clip, triangles, height, width = soup(seed)
    return Case(rasterise, (clip,), (triangles, height, width))


def case_of_interpolate(seed: int) -> Case:
    g, kind, pick = random(seed)
    clip, triangles, height, width = soup(seed)
    rast = rasterise(clip, triangles, height, width, backend="torch").detach()
    shape = (clip.shape[1], pick(1, 5)) if seed % 3 else (*clip.shape[:2], pick(1, 5))
    attributes = torch.randn(shape, generator=g) * (1e6 if kind == "huge" else 1)
    return Case(interpolate, (attributes, rast), (triangles,))


def case_of_antialias(seed: int) -> Case:
    g, _, pick = random(seed)
    clip, triangles, height, width = soup(seed)
    if seed % 2:  # a fan, so that edges have two triangles and the walk goes on beyond the first
        n = torch.arange(min(len(triangles), clip.shape[1] - 2), dtype=torch.int32)
        triangles = torch.stack([0 * n, n + 1, n + 2], 1)
    rast = rasterise(clip, triangles, height, width, backend="torch").detach()
    colour = torch.rand(*rast.shape[:3], pick(1, 5), generator=g)
    topology = edge_topology(triangles, clip.shape[1], backend="torch")
    return Case(lambda c, p, *rest, backend: antialias(c, rest[0], p, *rest[1:], backend=backend), (colour, clip),
                (rast, triangles, topology))  # fmt: skip


def case_of_texture(seed: int) -> Case:
    g, kind, pick = random(seed)
    count = {"empty": 0, "one": 1}.get(kind, pick(2, 30))
    image = torch.rand(pick(1, 9), pick(1, 9), pick(1, 5), generator=g)
    uv = torch.rand(count, 2, generator=g) * 1.6 - 0.3
    if kind == "huge":
        uv *= 1e8
    if kind == "broken":
        uv[0], uv[1] = torch.nan, torch.inf
    if kind == "degenerate":
        uv[:] = uv[:1]  # every look-up in one place
    return Case(texture, (image, uv))


def case_of_normals(seed: int) -> Case:
    clip, triangles, _, _ = soup(seed)
    if KINDS[seed % len(KINDS)] == "huge":  # without slivers, whose rounding is a direction at this size
        triangles = triangles.sort(1)[0].unique(dim=0)
        triangles = triangles[(triangles[:, :-1] != triangles[:, 1:]).all(1)]
    vertices = clip[0, :, :3] if len(clip) else torch.zeros(0, 3)
    return Case(vertex_normals, (vertices.nan_to_num(0.0, 0.0, 0.0).contiguous(),), (triangles,))


def case_of_marching(seed: int) -> Case:
    g, kind, pick = random(seed)
    n, count = pick(4, 20), {"empty": 0, "one": 1}.get(kind, pick(2, 40))
    positions, sdf = torch.randn(n, 3, generator=g), torch.randn(n, generator=g)
    draws = [torch.randperm(n, generator=g)[:4] for _ in range(count)]
    tets = torch.stack(draws) if draws else torch.zeros(0, 4, dtype=torch.long)
    pairs = torch.stack([tets[:, [a, b]] for a, b in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))], 1)  # [T, 6, 2]
    edges, number = pairs.sort(-1)[0].reshape(-1, 2).unique(dim=0, return_inverse=True)
    if kind == "degenerate":
        sdf[:: pick(1, 3)] = 0.0
    if kind == "huge":
        positions, sdf = positions * 1e6, sdf * 1e6
    integers = (edges.int(), tets.int(), number.reshape(-1, 6).int())
    return Case(marching_tetrahedra, (positions, sdf), integers, (("guard", 0.01),))


def case_of_topology(seed: int) -> Case:
    clip, triangles, _, _ = soup(seed)
    return Case(edge_topology, (), (triangles, clip.shape[1]))


def case_of_mesh_edges(seed: int) -> Case:
    """Separate tetrahedra under shuffled numbers, some glued at a vertex."""
    g, kind, pick = random(seed)
    count = {"empty": 0, "one": 1}.get(kind, pick(2, 12))
    solid = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    faces = (solid + 4 * torch.arange(count)[:, None, None]).reshape(-1, 3)
    if kind == "degenerate":
        faces[faces == 4] = 0
    shuffled = torch.randperm(4 * max(count, 1), generator=g)[faces]
    return Case(mesh_edges, (), (shuffled[torch.randperm(len(faces), generator=g)].int(), 4 * max(count, 1)))


def case_of_smoothness(seed: int) -> Case:
    """Separate tetrahedra, some glued at a vertex, some flat."""
    faces, count = case_of_mesh_edges(seed).rest
    g, kind, _ = random(seed)
    vertices = torch.randn(count, 3, generator=g) * (1e6 if kind == "huge" else 1)
    if kind == "degenerate":
        vertices = (4 * vertices).round() / 4  # so that what has no area or cancels does so without rounding
        vertices[: len(vertices[1::5]) * 5 : 5] = vertices[1::5]
    return Case(lambda *arguments, backend: torch.stack(smoothness(*arguments, backend=backend)), (vertices,),
                (faces, *mesh_edges(faces, count, backend="torch")))  # fmt: skip


def case_of_diffuse(seed: int) -> Case:
    g, kind, pick = random(seed)
    n = {"empty": 0, "one": 1}.get(kind, pick(2, 40))
    joined = (torch.rand(n, n, generator=g) < 0.2).tril(-1)
    joined = joined | joined.T
    slots = int(joined.sum(1).max()) + 1 if n else 3
    neighbours = torch.full((n, slots), -1, dtype=torch.int32)
    for i, row in enumerate(joined):
        columns = row.nonzero()[:, 0].int()
        neighbours[i, torch.randperm(slots, generator=g)[: len(columns)]] = columns
    values = torch.randn(n, generator=g) * (1e8 if kind == "huge" else 1)
    strength = 10.0 ** (2 * torch.rand((), generator=g).item() - 0.5)
    return Case(diffuse, (values,), (neighbours, strength))


def case_of_lambert(seed: int) -> Case:
    g, kind, pick = random(seed)
    n = {"empty": 0, "one": 1}.get(kind, pick(2, 40))
    normals, points = torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g)
    albedo = torch.rand(1 if seed % 3 == 0 else n, 3, generator=g)
    light = 3 * torch.randn(1 if seed % 2 else n, 3, generator=g)
    if kind == "huge":
        points, light, normals = points * 1e6, light * 1e6, normals * 1e6
    if kind == "degenerate":
        normals[::2] *= 1e-5  # shorter than counts
        normals[1::2] = 0.0
        points[::3] = light[:1] if len(light) == 1 else light[::3]  # in the light
    if kind == "behind":
        normals = -(light - points) * torch.rand(n, 1, generator=g)  # turned away from it
    options = (("shortest", 1e-3 if pick(0, 1) else 0.0),)
    grads = points.detach()  # which a point in the light has none of that means anything
    if kind == "degenerate":
        return Case(lambda a, v, *rest, **more: lambert(a, v, grads, *rest, **more), (albedo, normals),
                    (light, 0.3, 0.7), options)  # fmt: skip
    return Case(lambert, (albedo, normals, points), (light, 0.3, 0.7), options)


OPS = {
    "rasterise": case_of_rasterise,
    "interpolate": case_of_interpolate,
    "antialias": case_of_antialias,
    "texture": case_of_texture,
    "vertex_normals": case_of_normals,
    "marching_tetrahedra": case_of_marching,
    "edge_topology": case_of_topology,
    "mesh_edges": case_of_mesh_edges,
    "diffuse": case_of_diffuse,
    "smoothness": case_of_smoothness,
    "lambert": case_of_lambert,
}
FAST = [
    pytest.param("numba", "cpu", id="numba"),
    pytest.param("warp", "cpu", id="warp-cpu"),
    pytest.param("warp", "cuda", id="warp-cuda", marks=pytest.mark.cuda),
]


def outputs(case: Case, backend: str, device: str, keep: Tensor | None):
    """What the op returns and the gradients of the leaves, on the CPU; `keep` masks the pixels that count."""
    leaves = tuple(leaf.to(device).requires_grad_() for leaf in case.leaves)
    outs = case(leaves, backend, device)
    ends = [t for t in outs if t.requires_grad]
    grads = ()
    if ends:
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=g) for t in ends]
        if keep is not None:
            weights = [torch.where(keep[..., None], weight, 0.0) for weight in weights]
        grads = torch.autograd.grad(ends, leaves, [w.to(device) for w in weights], allow_unused=True)
        grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
    return tuple(t.detach().cpu() for t in outs), tuple(g.cpu() for g in grads)


def assert_agrees(
    got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float, message: str, least: float = 1e-3
) -> None:
    """The same shapes and dtypes, the same integers, floats as near as a Case says; the wanted are finite."""
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{message}, tensor {n}"
        if not a.is_floating_point():
            assert torch.equal(a, b), f"{message}, tensor {n}"
            continue
        size = float(b.abs().max()) if b.numel() else 0.0
        assert math.isfinite(size), f"{message}, tensor {n}: the twin is not finite"
        wrong = float((a - b).abs().max()) if b.numel() else 0.0
        assert wrong <= tolerance * max(size, least), f"{message}, tensor {n}: off by {wrong} of {size}"


def assert_refused_or_left_to_the_twin(case: Case, dtype: torch.dtype, backend: str) -> None:
    """A compiled backend refuses a case in another dtype, by name; "auto" computes it in float64."""
    leaves = tuple(leaf.to(dtype) for leaf in case.leaves)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"wanted dtype float32.*got {kind}|'{backend}' takes float32.*got .*{kind}"):
        case(leaves, backend, "cpu")
    if dtype == torch.float64:
        rest = tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in case.rest)
        outs = replace(case, rest=rest)(leaves, "auto", "cpu")
        assert {out.dtype for out in outs if out.is_floating_point()} == {torch.float64}
