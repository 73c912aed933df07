"""Other people's packages on the kernels' inputs: what pip installs (extra: bench), and nerfacc on CUDA.

    drjit     its hash grid encoding, forward and backward, LLVM backend
    open3d    RaycastingScene.cast_rays           mitsuba   Scene.ray_intersect_preliminary, llvm_ad_rgb
    embree    trimesh's ray module over embreex   nerfacc   OccGridEstimator.sampling, accumulate_along_rays

The ray casters see the rays of the pixels' centres and answer which triangle each hits, what rasterising answers. They
build a structure over the mesh first, which is timed apart: casting alone is the case that favours them. Dr.Jit's grid
has the shape of ours (levels, features, rows, growth) but lays its rows out in its own way, so its values differ.

A package that cannot be used is Absent, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels.operations import Call, Scene
from stages.cameras import rays
from stages.kernels.grid import HashGridSpec
from stages.kernels.volume import Samples

MODULES = {
    "drjit": ("drjit", "drjit.llvm.ad", "drjit.nn"),
    "open3d": ("open3d",),
    "mitsuba": ("mitsuba",),
    "embree": ("embreex", "trimesh.ray.ray_pyembree"),
    "nerfacc": ("nerfacc",),
}
DISTRIBUTIONS = {"embree": "embreex"}  # where it is not the peer's name
HAVE = {"hash": ("drjit",), "cast": ("open3d", "mitsuba", "embree"), "march": ("nerfacc",), "composite": ("nerfacc",)}
ON = {"cpu": ("drjit", "open3d", "mitsuba", "embree"), "cuda": ("nerfacc",)}


class Absent(Exception):
    """A peer cannot be used here; the message says why."""


@dataclass(frozen=True)
class Cast:
    """A ray caster over one scene: `run` casts all rays, `triangles` reads the triangle [R] (-1: none) from what it
    returned, `build` makes its structure anew."""

    run: Call
    triangles: Callable[[Any], np.ndarray]
    build: Call


def probe(name: str) -> str:
    """Return the version of a peer that imports. Raises Absent with the reason."""
    try:
        for module in MODULES[name]:
            importlib.import_module(module)
    except Exception as error:  # a broken build may raise anything; the reason is kept
        lines = str(error).strip().splitlines()
        raise Absent(f"{type(error).__name__}: {lines[0] if lines else 'no message'}") from None
    try:
        return metadata.version(DISTRIBUTIONS.get(name, name))
    except metadata.PackageNotFoundError:
        return "version unknown"


def peers_of(kind: str | None, device: str) -> tuple[str, ...]:
    """Return who has an op of this kind on this device."""
    return tuple(name for name in HAVE.get(kind or "", ()) if name in ON[device])


def contestant(name: str, kind: str, inputs: Any, threads: int) -> Call | Cast:
    """A peer's callable for the inputs of a Case. Raises Absent, also where a package imports but cannot compute."""
    probe(name)
    make = {
        ("drjit", "hash"): _drjit_hash,
        ("open3d", "cast"): _open3d,
        ("mitsuba", "cast"): _mitsuba,
        ("embree", "cast"): _embree,
        ("nerfacc", "march"): _nerfacc_march,
        ("nerfacc", "composite"): _nerfacc_composite,
    }[name, kind]
    try:
        return make(*inputs, threads=threads)
    except Exception as error:  # no LLVM library, another version's API, ...
        raise Absent(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}") from None


def _set_drjit_threads(threads: int) -> None:
    import drjit

    drjit.set_thread_count(threads)


def _drjit_hash(points: Tensor, spec: HashGridSpec, up: Tensor | None, *, threads: int) -> Call:
    """Encoding of points [N, 3], and with `up` [N, L F] the gradient of the parameters too."""
    import drjit as dr
    from drjit.llvm.ad import ArrayXf, Float
    from drjit.nn import HashGridEncoding

    _set_drjit_threads(threads)
    grid = HashGridEncoding(
        Float,
        3,
        n_levels=spec.levels,
        n_features_per_level=spec.features,
        hashmap_size=1 << spec.log2_table,
        base_resolution=spec.base,
        per_level_scale=(spec.finest / spec.base) ** (1 / max(spec.levels - 1, 1)),
        rng=dr.rng(seed=0),
    )
    at = ArrayXf(np.ascontiguousarray(points.numpy().T))
    weights = None if up is None else ArrayXf(np.ascontiguousarray(up.numpy().T))
    dr.eval(at, weights)

    def forward() -> Any:
        out = grid(at)
        dr.eval(out)
        dr.sync_thread()
        return out

    def both() -> Any:
        dr.enable_grad(grid.data)
        dr.backward(dr.sum(grid(at) * weights, axis=None))
        gradient = dr.grad(grid.data)
        dr.eval(gradient)
        dr.sync_thread()
        dr.disable_grad(grid.data)
        return gradient

    run = forward if up is None else both
    run()  # fails here where there is no LLVM library
    return run


def _pixel_rays(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Origins and unit directions [H W, 3] float32 of the pixels' centres."""
    return tuple(r.reshape(-1, 3).contiguous().numpy() for r in rays(scene.views, scene.pixels, scene.pixels))


def _open3d(scene: Scene, _: Tensor, *, threads: int) -> Cast:
    import open3d

    both = open3d.core.Tensor(np.concatenate(_pixel_rays(scene), -1))
    vertices = open3d.core.Tensor(scene.vertices.numpy())
    triangles = open3d.core.Tensor(scene.triangles.numpy().astype(np.uint32))

    def build() -> Any:
        caster = open3d.t.geometry.RaycastingScene(nthreads=threads)
        caster.add_triangles(vertices, triangles)
        caster.cast_rays(both[:1], nthreads=threads)  # the structure is built with the first rays
        return caster

    caster = build()
    nothing = open3d.t.geometry.RaycastingScene.INVALID_ID

    def hit(answer: Any) -> np.ndarray:
        ids = answer["primitive_ids"].numpy().astype(np.int64)
        return np.where(ids == nothing, -1, ids)

    return Cast(lambda: caster.cast_rays(both, nthreads=threads), hit, build)


def _mitsuba(scene: Scene, _: Tensor, *, threads: int) -> Cast:
    import drjit as dr
    import mitsuba as mi

    mi.set_variant("llvm_ad_rgb")
    _set_drjit_threads(threads)
    origins, directions = (
        kind(*(mi.Float(np.ascontiguousarray(r[:, k])) for k in range(3)))
        for kind, r in zip((mi.Point3f, mi.Vector3f), _pixel_rays(scene))
    )
    cast = mi.Ray3f(origins, directions)
    dr.eval(cast)

    def build() -> Any:
        mesh = mi.Mesh("mesh", len(scene.vertices), len(scene.triangles))
        parameters = mi.traverse(mesh)
        parameters["vertex_positions"] = scene.vertices.numpy().ravel()
        parameters["faces"] = scene.triangles.numpy().ravel().astype(np.uint32)
        parameters.update()
        caster = mi.load_dict({"type": "scene", "mesh": mesh})
        dr.sync_thread()
        return caster

    caster = build()

    def run() -> Any:
        intersection = caster.ray_intersect_preliminary(cast, coherent=True)
        dr.eval(intersection.prim_index, intersection.prim_uv, intersection.t)
        dr.sync_thread()
        return intersection

    def hit(intersection: Any) -> np.ndarray:
        return np.where(np.isfinite(np.array(intersection.t)), np.array(intersection.prim_index).astype(np.int64), -1)

    run()
    return Cast(run, hit, build)


def _embree(scene: Scene, _: Tensor, *, threads: int) -> Cast:
    """One thread whatever is asked for: trimesh casts ray after ray."""
    import trimesh
    from trimesh.ray.ray_pyembree import RayMeshIntersector

    mesh = trimesh.Trimesh(scene.vertices.numpy(), scene.triangles.numpy(), process=False)
    origins, directions = _pixel_rays(scene)

    def build() -> Any:
        caster = RayMeshIntersector(mesh)
        caster.intersects_first(origins[:1], directions[:1])  # the structure is built with the first ray
        return caster

    caster = build()
    return Cast(lambda: caster.intersects_first(origins, directions), lambda hits: np.asarray(hits, np.int64), build)


def _nerfacc_march(rays_o: Tensor, rays_d: Tensor, occupancy: Tensor, step_size: float, *, threads: int) -> Call:
    import nerfacc

    box = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    grid = nerfacc.OccGridEstimator(roi_aabb=box, resolution=len(occupancy), levels=1).to(rays_o.device)
    grid.binaries = occupancy.bool()[None]
    grid.eval()

    def run() -> Any:
        return grid.sampling(rays_o, rays_d, render_step_size=step_size, stratified=False)

    run()
    return run


def _nerfacc_composite(
    sigmas: Tensor, values: Tensor, samples: Samples, up: Tensor, backward: bool, *, threads: int
) -> Call:
    import nerfacc

    index, count = samples.rays, len(samples.ray_offsets) - 1
    near, far = samples.t - samples.delta / 2, samples.t + samples.delta / 2

    def forward() -> Tensor:
        weights, _, _ = nerfacc.render_weight_from_density(near, far, sigmas, ray_indices=index, n_rays=count)
        return nerfacc.accumulate_along_rays(weights, values, ray_indices=index, n_rays=count)

    def run() -> Any:
        if backward:
            return torch.autograd.grad((forward() * up).sum(), [sigmas, values])
        with torch.no_grad():
            return forward()

    run()
    return run
