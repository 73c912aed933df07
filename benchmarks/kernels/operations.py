"""The kernels' inputs and what is timed on them: each op, and the two chains of ops that a training step consists of.

    nerf_step     hash encoding, a density and a colour perceptron, compositing       (the coarse stage)
    raster_step   rasterise, interpolate, antialias                                   (the fine stage)

Points lie on rays through the box in the rays' order, as marching leaves them, not scattered at random: memory is read
as it is in training. The mesh is a closed bumpy ball with silhouettes inside its outline, seen from 20 degrees above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.cameras import Views, orbit_views, rays, to_clip
from stages.kernels.density import hash_density
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode, hash_gradient
from stages.kernels.lattice import diffuse
from stages.kernels.marching import marching_tetrahedra, mesh_edges
from stages.kernels.mlp import mlp, mlp_with_slope
from stages.kernels.raster import antialias, edge_topology, interpolate, rasterise, texture, vertex_normals
from stages.kernels.smoothness import smoothness
from stages.kernels.volume import Samples, composite, cull, march
from stages.mesh.tets.dmtet import from_function
from stages.mesh.tets.tetrahedra import Lattice

FORWARD, BOTH = "forward", "forward + backward"
Call = Callable[[], Any]
Names = dict[str, str]  # backend by family of stages.kernels.backend.FAMILIES


@dataclass(frozen=True)
class Sizes:
    """side: pixels of each of four views; per_ray: samples; tables: log2 of a hash level's rows; hidden: units of the
    perceptrons; pixels: a side of the rasterised picture; rings: of the ball, 4 rings (rings - 1) triangles, 50,624 as
    published; cells: of the lattice."""

    side: int = 64
    per_ray: int = 16
    tables: tuple[int, ...] = (15, 19)
    hidden: int = 32
    pixels: int = 512
    rings: int = 113
    cells: int = 64


QUICK = Sizes(side=8, per_ray=8, tables=(11,), hidden=16, pixels=48, rings=12, cells=12)


@dataclass(frozen=True)
class Case:
    """One measurement: `call(names)` gives what to run under these backends."""

    name: str
    work: str
    shapes: dict[str, Any]
    call: Callable[[Names], Call]
    peers: str | None = None  # which function of benchmarks.kernels.peers has it: hash, cast, march or composite
    inputs: Any = field(default=None, repr=False)


def gradients(outputs: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
    """Return forward and backward of a loss, with fresh gradients every time."""
    return lambda: torch.autograd.grad(outputs(), leaves)


def without_gradients(call: Call) -> Call:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


class Volume:
    """Rays, samples and points of four views, and random networks."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, torch.device(device)
        self.generator = torch.Generator().manual_seed(0)
        views = orbit_views([20.0, 110.0, 200.0, 290.0], 20.0).to(self.device)
        self.rays_o, self.rays_d = (v.reshape(-1, 3).contiguous() for v in rays(views, sizes.side, sizes.side))
        nearest = -(self.rays_o * self.rays_d).sum(-1, keepdim=True)  # [R, 1]
        along = (torch.arange(sizes.per_ray, device=self.device) + 0.5) / sizes.per_ray * 1.8 - 0.9
        t = nearest + along  # [R, per_ray]
        points = self.rays_o[:, None] + t[..., None] * self.rays_d[:, None]
        self.points = (0.5 * (points + 1)).clamp(0, 1).reshape(-1, 3).contiguous()
        delta = torch.full_like(t, 1.8 / sizes.per_ray)
        offsets = torch.arange(len(t) + 1, device=self.device) * sizes.per_ray
        self.samples = Samples(t.reshape(-1).contiguous(), delta.reshape(-1).contiguous(), offsets)

    @property
    def shapes(self) -> dict[str, Any]:
        return {"samples": len(self.points), "rays": len(self.rays_o)}

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * (2 * torch.rand(*shape, generator=self.generator) - 1)).to(self.device)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.random(*shape, scale=scale).requires_grad_()

    def weights(self, inputs: int, outputs: int) -> list[Tensor]:
        hidden = self.sizes.hidden
        shapes = (hidden, inputs), (hidden,), (outputs, hidden), (outputs,)
        return [self.leaf(*shape, scale=shape[-1] ** -0.5) for shape in shapes]

    @cached_property
    def occupancy(self) -> Tensor:
        """A ball of radius 0.6 in a grid of 64 cells a side; the share of occupied cells is 11 %."""
        g = 64
        centres = (torch.arange(g, device=self.device) + 0.5) * (2 / g) - 1
        x, y, z = torch.meshgrid(centres, centres, centres, indexing="ij")
        return (x * x + y * y + z * z < 0.36).to(torch.uint8)


def volume_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """Hash encoding, perceptron, marching, compositing, and the step made of them."""
    v = Volume(sizes, device)
    for log2 in sizes.tables:
        yield from _hash_cases(v, HashGridSpec(log2_table=log2))
    yield from _slope_cases(v, HashGridSpec(log2_table=sizes.tables[0]))
    yield from _mlp_cases(v)
    yield _march_case(v)
    yield from _composite_cases(v)


def _hash_cases(v: Volume, spec: HashGridSpec) -> Iterator[Case]:
    n, width, shapes = len(v.points), spec.width, _shapes(v, spec)
    table, up = v.leaf(spec.rows, spec.features), v.random(n, width)
    density, colour, upstream = v.weights(width, 1), v.weights(width, 3), v.random(len(v.rays_o), 3)

    def encoded(names: Names) -> Tensor:
        return hash_encode(v.points, table, spec, backend=names["hash"])

    def whole(names: Names) -> Tensor:
        return nerf_loss(v, table, spec, density, colour, upstream, names)

    more = {"shapes": shapes}
    yield Case(
        "hash_encode", FORWARD, call=lambda names: without_gradients(lambda: encoded(names)),
        peers="hash", inputs=(v.points, spec, None), **more,
    )  # fmt: skip
    yield Case(
        "hash_encode", BOTH, call=lambda names: gradients(lambda: (encoded(names) * up).sum(), [table]),
        peers="hash", inputs=(v.points, spec, up), **more,
    )  # fmt: skip
    yield Case(
        "nerf_step", BOTH, shapes | {"hidden": v.sizes.hidden},
        call=lambda names: gradients(lambda: whole(names), [table, *density, *colour]),
    )  # fmt: skip


def _shapes(v: Volume, spec: HashGridSpec) -> dict[str, Any]:
    shapes = v.shapes | {"levels": spec.levels, "features": spec.features}
    return shapes | {"log2_table": spec.log2_table, "finest": spec.finest}


def _slope_cases(v: Volume, spec: HashGridSpec) -> Iterator[Case]:
    table, g, along = v.leaf(spec.rows, spec.features), v.leaf(len(v.points), spec.width), v.random(len(v.points), 3)
    weights, up = v.weights(spec.width, 1), v.random(len(v.points))

    def slope(names: Names) -> Tensor:
        return (hash_gradient(v.points, table, spec, g, backend=names["hash"]) * along).sum()

    def density(names: Names) -> Tensor:
        _, raw, gradient = hash_density(v.points, table, spec, tuple(weights), backend=names["hash"])
        return (raw * up).sum() + (gradient * along).sum()

    yield Case("hash_gradient", BOTH, _shapes(v, spec), lambda names: gradients(lambda: slope(names), [table, g]))
    yield Case(
        "hash_density", BOTH, _shapes(v, spec) | {"hidden": v.sizes.hidden},
        lambda names: gradients(lambda: density(names), [table, *weights]),
    )  # fmt: skip


def _mlp_cases(v: Volume) -> Iterator[Case]:
    n, width = len(v.points), HashGridSpec().width
    x, weights, up, along = v.leaf(n, width), v.weights(width, 4), v.random(n, 4), v.random(n, width)
    more = {"shapes": v.shapes | {"inputs": width, "hidden": v.sizes.hidden, "outputs": 4}}

    def out(names: Names) -> Tensor:
        return mlp(x, *weights, backend=names["mlp"])

    def sloped(names: Names) -> Tensor:
        out, slope = mlp_with_slope(x, *weights, backend=names["mlp"])
        return (out * up).sum() + (slope * along).sum()

    yield Case("mlp", FORWARD, call=lambda names: without_gradients(lambda: out(names)), **more)
    yield Case("mlp", BOTH, call=lambda names: gradients(lambda: (out(names) * up).sum(), [x, *weights]), **more)
    yield Case("mlp_with_slope", BOTH, call=lambda names: gradients(lambda: sloped(names), [x, *weights]), **more)


def _march_case(v: Volume) -> Case:
    jitter = torch.rand(len(v.rays_o), generator=v.generator).to(v.device)
    step = 2 * 3**0.5 / 80
    return Case(
        "march", FORWARD, {"rays": len(v.rays_o), "grid": 64, "steps along the diagonal": 80},
        lambda names: lambda: march(v.rays_o, v.rays_d, v.occupancy, step, jitter, backend=names["volume"]),
        peers="march", inputs=(v.rays_o, v.rays_d, v.occupancy, step),
    )  # fmt: skip


def _composite_cases(v: Volume) -> Iterator[Case]:
    n = len(v.points)
    sigmas, values, up = v.random(n).abs().requires_grad_(), v.leaf(n, 3), v.random(len(v.rays_o), 3)
    more = {"shapes": v.shapes | {"channels": 3}, "peers": "composite"}

    def out(names: Names) -> Tensor:
        return composite(sigmas, values, v.samples, backend=names["volume"])[0]

    yield Case(
        "composite", FORWARD, call=lambda names: without_gradients(lambda: out(names)),
        inputs=(sigmas, values, v.samples, up, False), **more,
    )  # fmt: skip
    yield Case(
        "composite", BOTH, call=lambda names: gradients(lambda: (out(names) * up).sum(), [sigmas, values]),
        inputs=(sigmas, values, v.samples, up, True), **more,
    )  # fmt: skip
    dense = 20 * sigmas.detach()  # light runs out along most rays
    yield Case(
        "cull", FORWARD, v.shapes | {"threshold": 1e-3, "min_optical_depth": 0.05},
        lambda names: lambda: cull(dense, v.samples, 1e-3, 0.05, backend=names["volume"]),
    )  # fmt: skip


def nerf_loss(
    v: Volume, table: Tensor, spec: HashGridSpec, density: list[Tensor], colour: list[Tensor], up: Tensor, names: Names
) -> Tensor:
    """Return what the coarse stage does between its samples and its picture, summed against `up` [R, 3]."""
    features = hash_encode(v.points, table, spec, backend=names["hash"])
    sigmas = torch.nn.functional.softplus(mlp(features, *density, backend=names["mlp"])[:, 0])
    albedo = torch.sigmoid(mlp(features, *colour, backend=names["mlp"]))
    out, _, opacity, _ = composite(sigmas, albedo, v.samples, backend=names["volume"])
    return (out * up).sum() + opacity.sum()


@dataclass(frozen=True)
class Scene:
    """A mesh before a camera: vertices [V, 3], triangles [F, 3] int32, one view."""

    vertices: Tensor
    triangles: Tensor
    views: Views
    pixels: int

    @cached_property
    def clip(self) -> Tensor:
        return to_clip(self.vertices, self.views).contiguous()


def bumpy_ball(rings: int) -> tuple[np.ndarray, np.ndarray]:
    """A closed ball with bumps: vertices [V, 3] float32 and 4 rings (rings - 1) triangles [F, 3] int32, outwards."""
    columns = 2 * rings
    polar = np.linspace(0, np.pi, rings + 1)[1:-1]
    around = np.arange(columns) * (2 * np.pi / columns)
    p, a = np.meshgrid(polar, around, indexing="ij")
    radius = 0.65 + 0.1 * np.sin(5 * p) * np.cos(6 * a)
    ball = np.stack([radius * np.sin(p) * np.sin(a), radius * np.cos(p), radius * np.sin(p) * np.cos(a)], -1)
    vertices = np.concatenate([ball.reshape(-1, 3), [[0, 0.65, 0], [0, -0.65, 0]]]).astype(np.float32)
    top, bottom = len(vertices) - 2, len(vertices) - 1
    i, j = np.meshgrid(np.arange(rings - 2), np.arange(columns), indexing="ij")
    a, b = (i * columns + j).ravel(), (i * columns + (j + 1) % columns).ravel()
    c, d = a + columns, b + columns
    j = np.arange(columns)
    last = (rings - 2) * columns
    caps = [
        np.stack([np.full(columns, top), j, (j + 1) % columns], -1),
        np.stack([np.full(columns, bottom), last + (j + 1) % columns, last + j], -1),
    ]
    triangles = np.concatenate([np.stack([a, c, b], -1), np.stack([b, c, d], -1), *caps]).astype(np.int32)
    return vertices, triangles


def raster_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """Rasterising, its parts, and the step made of them."""
    vertices, triangles = (torch.from_numpy(x).to(device) for x in bumpy_ball(sizes.rings))
    scene = Scene(vertices, triangles, orbit_views([30.0], 20.0).to(torch.device(device)), sizes.pixels)
    side, count = sizes.pixels, len(vertices)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    clip = scene.clip.clone().requires_grad_()
    colours, image_up = random(count, 3).requires_grad_(), random(1, side, side, 3)
    up = random(1, side, side, 2)
    with torch.no_grad():
        rast = rasterise(clip, triangles, side, side)
    rast_leaf = rast.clone().requires_grad_()
    topology = edge_topology(triangles, count)
    flat = interpolate(colours.detach(), rast, triangles).requires_grad_()
    shapes = {"pixels": side * side, "triangles": len(triangles), "covered": int((rast[..., 3] > 0).sum())}

    def case(name: str, work: str, call: Callable[[str], Call], shape: dict[str, Any] = shapes, **more: Any) -> Case:
        return Case(name, work, shape, lambda names: call(names["raster"]), **more)

    yield case(
        "rasterise", FORWARD, lambda b: without_gradients(lambda: rasterise(clip, triangles, side, side, backend=b)),
        peers="cast", inputs=(scene, rast),
    )  # fmt: skip
    yield case(
        "rasterise", BOTH,
        lambda b: gradients(lambda: (rasterise(clip, triangles, side, side, backend=b)[..., :2] * up).sum(), [clip]),
    )  # fmt: skip
    yield case(
        "interpolate", BOTH,
        lambda b: gradients(
            lambda: (interpolate(colours, rast_leaf, triangles, backend=b) * image_up).sum(), [colours, rast_leaf]
        ),
        shapes | {"channels": 3},
    )  # fmt: skip
    yield case(
        "antialias", BOTH,
        lambda b: gradients(
            lambda: (antialias(flat, rast, clip, triangles, topology, backend=b) * image_up).sum(), [flat, clip]
        ),
        shapes | {"channels": 3},
    )  # fmt: skip

    def whole(backend: str) -> Tensor:
        rast = rasterise(clip, triangles, side, side, backend=backend)
        picture = interpolate(colours, rast, triangles, backend=backend)
        return (antialias(picture, rast, clip, triangles, topology, backend=backend) * image_up).sum()

    yield case("raster_step", BOTH, lambda b: gradients(lambda: whole(b), [clip, colours]), shapes | {"channels": 3})
    points, normal_up = vertices.clone().requires_grad_(), random(count, 3)
    mesh = {"triangles": len(triangles), "vertices": count}
    yield case(
        "vertex_normals", BOTH,
        lambda b: gradients(lambda: (vertex_normals(points, triangles, backend=b) * normal_up).sum(), [points]), mesh,
    )  # fmt: skip
    yield case("edge_topology", FORWARD, lambda b: lambda: edge_topology(triangles, count, backend=b), mesh)
    image, uv = random(2 * side, 2 * side, 3).requires_grad_(), random(side * side, 2).requires_grad_()
    texel_up = random(side * side, 3)
    yield case(
        "texture", BOTH, lambda b: gradients(lambda: (texture(image, uv, backend=b) * texel_up).sum(), [image, uv]),
        {"pixels": side * side, "texture": 2 * side},
    )  # fmt: skip


def marching_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """Marching tetrahedra over the band of a ball, its edges, and the smoothing along the band."""
    lattice = Lattice(sizes.cells)
    dmtet = from_function(lattice, lambda p: p.norm(dim=-1) - 0.6, device=device)
    band = dmtet.band
    edges, tets, tet_edges, near = (
        torch.from_numpy(x).to(device) for x in (band.edges, band.tets, band.tet_edges, band.neighbours)
    )
    positions = dmtet.positions().detach().requires_grad_()
    sdf = dmtet.sdf.detach().clone().requires_grad_()
    guard = 1e-3 * lattice.cell
    with torch.no_grad():
        vertices, faces, _ = marching_tetrahedra(positions, sdf, edges, tets, tet_edges, guard=guard)
    up = torch.rand(vertices.shape, generator=torch.Generator().manual_seed(0)).to(device)
    shapes = {"cells": sizes.cells, "band vertices": len(sdf), "tetrahedra": len(tets), "triangles": len(faces)}

    def marched(backend: str) -> Tensor:
        return (marching_tetrahedra(positions, sdf, edges, tets, tet_edges, guard=guard, backend=backend)[0] * up).sum()

    yield Case(
        "marching_tetrahedra", BOTH, shapes,
        lambda b: gradients(lambda: marched(b["marching"]), [positions, sdf]),
    )  # fmt: skip
    yield Case(
        "mesh_edges", FORWARD, {"triangles": len(faces)},
        lambda b: lambda: mesh_edges(faces, len(vertices), backend=b["marching"]),
    )  # fmt: skip
    leaf = vertices.clone().requires_grad_()
    closed = (faces, *mesh_edges(faces, len(vertices)))
    yield Case(
        "smoothness", BOTH, {"triangles": len(faces)},
        lambda b: gradients(lambda: sum(smoothness(leaf, *closed, backend=b["marching"])), [leaf]),
    )  # fmt: skip
    values = torch.randn(len(sdf), generator=torch.Generator().manual_seed(1)).to(device)
    yield Case(
        "diffuse", FORWARD, {"band vertices": len(sdf), "strength": 100.0},
        lambda b: lambda: diffuse(values, near, 100.0, backend=b["marching"]),
    )  # fmt: skip


def cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """All of them; inputs are made as they are come to."""
    yield from volume_cases(sizes, device)
    yield from raster_cases(sizes, device)
    yield from marching_cases(sizes, device)
