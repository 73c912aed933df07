"""From an optimiser's raw surface to one worth exporting: checked, welded, without floaters, under a face budget.

Every function returns a new mesh and leaves its input alone. Texture coordinates and textures do not survive a
change of faces, so they are dropped; vertex colours are kept.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from stages.errors import UserError
from stages.mesh.measure import edges_of, face_areas, face_components, face_volumes, measure
from stages.mesh.mesh import Mesh

log = logging.getLogger(__name__)

ADVICE = "run the stage for more steps, or start it again with another seed"


def check_mesh(mesh: Mesh) -> None:
    """Raise UserError unless the mesh has faces, finite positions and colours, and indices in range."""
    shapes = mesh.vertices.shape, mesh.faces.shape
    if any(len(shape) != 2 or shape[1] != 3 for shape in shapes):
        why = f"vertices have shape {list(shapes[0])} and faces {list(shapes[1])}, wanted [V, 3] and [F, 3]"
        raise UserError("The mesh cannot be used", why, "triangulate it and give one row of three to each")
    if len(mesh.faces) == 0 or len(mesh.vertices) == 0:
        raise UserError("The mesh is empty", "it has no faces", ADVICE)
    if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
        why = f"faces refer to vertices {mesh.faces.min()} to {mesh.faces.max()}, but there are {len(mesh.vertices)}"
        raise UserError("The mesh is damaged", why, "write the file again from its source")
    used = np.unique(mesh.faces)
    for name, values in (("position", mesh.vertices[used]), ("colour", mesh.colours)):
        if values is None:
            continue
        if name == "colour" and values.shape != (len(mesh.vertices), 3):
            why = f"vertex colours have shape {list(values.shape)}, wanted [{len(mesh.vertices)}, 3]"
            raise UserError("The mesh is damaged", why, "give one linear RGB colour to each vertex, or none")
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            why = f"{int(bad.sum())} of {len(values)} vertices have a {name} that is not a finite number"
            raise UserError("The mesh is damaged", why, "lower the learning rates of the stage that made it")


def _select(mesh: Mesh, faces: np.ndarray) -> Mesh:
    """The mesh of these faces [F', 3], without the vertices they leave unused."""
    used, inverse = np.unique(faces, return_inverse=True)
    colours = None if mesh.colours is None else mesh.colours[used]
    return Mesh(mesh.vertices[used], inverse.reshape(-1, 3).astype(np.int32), colours)


def _openness(faces: np.ndarray) -> tuple[int, int]:
    """Boundary edges and edges with three or more faces."""
    count = edges_of(faces).count
    return int((count == 1).sum()), int((count > 2).sum())


def tidy(mesh: Mesh) -> Mesh:
    """Weld equal positions where that closes gaps, drop degenerate and repeated faces, face a closed body outwards.

    Faces without area but with three different vertices stay: dropping them would open the surface.
    Raises: UserError if the mesh is unusable or nothing remains.
    """
    check_mesh(mesh)
    faces = mesh.faces.astype(np.int64)
    boundary, crowded = _openness(faces)
    if boundary:
        _, first, inverse = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
        welded = first[inverse.reshape(-1)][faces]
        triangles = welded[(welded != np.roll(welded, 1, axis=1)).all(axis=1)]
        after = _openness(triangles) if len(triangles) else (boundary, crowded)
        if after[0] < boundary and after[1] <= crowded:
            faces = welded
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(axis=1)]
    _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
    faces = faces[np.sort(first)]
    if len(faces) == 0 or face_areas(mesh.vertices, faces).sum() <= 0:
        raise UserError("The mesh is empty", "all of its faces are degenerate (no area)", ADVICE)
    result = _select(mesh, faces)
    report = measure(result)
    if report.watertight and report.oriented and report.volume < 0:
        log.warning("the surface faced inwards and was turned over")
        result.faces = np.ascontiguousarray(result.faces[:, ::-1])
    return result


def _winding(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Generalised winding numbers [N] of `points` [N, 3] about `triangles` [F, 3, 3] (Jacobson et al. 2013, eq. 5)."""
    result = np.empty(len(points))
    for i, point in enumerate(points):
        a, b, c = (triangles[:, k] - point for k in range(3))
        la, lb, lc = (np.linalg.norm(v, axis=1) for v in (a, b, c))
        top = np.einsum("ij,ij->i", a, np.cross(b, c))
        dots = [np.einsum("ij,ij->i", u, v) for u, v in ((a, b), (b, c), (c, a))]
        bottom = la * lb * lc + dots[0] * lc + dots[1] * la + dots[2] * lb
        result[i] = np.arctan2(top, bottom).sum() / (2 * np.pi)
    return result


def drop_floaters(mesh: Mesh, ratio: float = 0.02) -> Mesh:
    """Keep the components one can see and would want: not tiny, not a bubble inside, not hidden in another one.

    Args:
        ratio: components with less than this share of the largest one's area are dropped.
    Returns: a mesh with at least the largest component. Cavities (closed components facing inwards) are filled, and
        components that lie inside another closed one go with them.
    """
    labels = face_components(mesh.faces, len(mesh.vertices))
    if labels.max() == 0:
        return _select(mesh, mesh.faces)
    count = int(labels.max()) + 1
    areas = np.bincount(labels, face_areas(mesh.vertices, mesh.faces), count)
    volumes = np.bincount(labels, face_volumes(mesh.vertices, mesh.faces), count)
    edges = edges_of(mesh.faces)
    open_faces = (edges.count[edges.of_half_edge] != 2).reshape(-1, 3).any(axis=1)
    closed = np.bincount(labels, open_faces, count) == 0
    main = int(np.where(closed & (volumes < 0), -1, areas).argmax())
    keep = (areas >= ratio * areas[main]) & ~(closed & (volumes < 0))
    keep[main] = True
    points = mesh.vertices.astype(np.float64)
    by_size = [c for c in np.argsort(-areas, kind="stable") if keep[c]]
    for small in by_size[1:]:
        corners = np.unique(mesh.faces[labels == small])
        probes = points[corners[np.linspace(0, len(corners) - 1, 8).astype(int)]]
        for large in by_size:
            if large != small and keep[large] and closed[large] and areas[large] > areas[small]:
                box = points[np.unique(mesh.faces[labels == large])]
                within = (probes > box.min(0)).all() and (probes < box.max(0)).all()
                if within and (_winding(probes, points[mesh.faces[labels == large]]) > 0.5).all():
                    keep[small] = False
                    break
    dropped = int((~keep).sum())
    if dropped:
        log.info("%d of %d components dropped, %.2g of the area", dropped, count, areas[~keep].sum() / areas.sum())
    return _select(mesh, mesh.faces[keep[labels]])


def largest_shell(mesh: Mesh) -> Mesh:
    """Return the part of a mesh that bounds the largest volume; its texture and coordinates stay.

    Inner voids and separate parts go.
    """
    labels = face_components(mesh.faces, len(mesh.vertices))
    if labels.max() == 0:
        return mesh
    volumes = np.bincount(labels, face_volumes(mesh.vertices, mesh.faces))
    kept = labels == int(volumes.argmax())
    rest = {name: getattr(mesh, name) for name in ("uv_faces", "face_materials")}
    rest = {name: None if values is None else values[kept] for name, values in rest.items()}
    return replace(mesh, faces=mesh.faces[kept], **rest)


def decimate(mesh: Mesh, faces: int) -> Mesh:
    """At most `faces` triangles by quadric edge collapse that keeps a closed manifold closed and manifold.

    Returns: the mesh with fewer faces, the same topology; more faces than asked, with a logged warning, where no
        allowed collapse is left.
    """
    if len(mesh.faces) <= faces:
        return _select(mesh, mesh.faces)
    from stages.mesh.collapse import collapse_edges

    edges = edges_of(mesh.faces)
    border = (edges.count[edges.of_half_edge] == 1).reshape(-1, 3)
    points, triangles = mesh.vertices.astype(np.float64), mesh.faces.astype(np.int64)
    colours = np.zeros((len(points), 0)) if mesh.colours is None else mesh.colours.astype(np.float64)
    alive = collapse_edges(points, triangles, colours, border, faces)
    colours = None if mesh.colours is None else np.clip(colours, 0, 1).astype(np.float32)
    result = _select(Mesh(points.astype(np.float32), triangles, colours), triangles[alive])
    before, after = measure(mesh), measure(result)
    if before.solid and not (after.solid and after.euler_number == before.euler_number):
        log.warning("decimation would have broken the surface; it keeps its %d faces", len(mesh.faces))
        return _select(mesh, mesh.faces)
    if len(result.faces) > faces:
        log.warning("decimated to %d faces; %d cannot be reached without breaking it", len(result.faces), faces)
    return result
