"""From a user's mesh to the first surface of the fine stage: what it encloses, with holes closed, as a DMTet.

Inside is where the generalised winding number exceeds one half (Jacobson et al. 2013): exact for closed meshes, parts
may overlap, and a hole is closed by the surface on which its rim's influence is balanced. That surface always hangs on
the mesh (winding numbers are harmonic elsewhere), so it is found by following it from the mesh outwards.
Signs are decided at lattice vertices, the crossing of each lattice edge by bisection, and what is stored is the
distance to the resulting triangles: hidden faces inside overlapping parts leave no trace.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from stages.errors import UserError
from stages.mesh.measure import adjacent_faces, edges_of, label_components
from stages.mesh.mesh import Mesh
from stages.mesh.orient import one_sided, turned, welded_faces
from stages.mesh.sample import points_at, surface_samples
from stages.mesh.tets.dmtet import DMTet, ids_near, margin_rings
from stages.mesh.tets.initialise import bisect, crossing_edges, distance_to_surface
from stages.mesh.tets.losses import Losses, losses
from stages.mesh.tets.tetrahedra import MAX_RESOLUTION, Band, Lattice, build_band, dilate, lookup
from stages.mesh.tree import TriangleTree

log = logging.getLogger(__name__)

PROBES = 4000  # points whose distance to the new surface tells what was lost
LOST = 0.5  # share of the visible surface that may be lost before the start is refused
WARN = 0.02
TORN, BROKEN = 0.1, 0.25  # share of the body whose loss is refused: where it is thinner than a cell, and anywhere
CELLS = 1.25  # cells that a plate must be thick for its surface to have no holes: 1.14 were enough, 0.76 not
FAR = 0.25  # a largest part shorter than this share of the whole is dwarfed by the distance of others


class SolidifySettings(BaseModel):
    """Settings of a given mesh's conversion to a body."""

    model_config = ConfigDict(extra="forbid")

    shell: float = Field(
        0.0, ge=0, le=8, description="lattice cells to either side that sheets and open parts are thickened by; 0: none"
    )


class Body:
    """The body that a mesh encloses: `solid(points) > 0.5` inside.

    Args:
        mesh: in the scene.
        shell: thickness in world units to either side of parts with open edges.
        cell: length over which `solid` falls by one at the shell's surface.
    """

    def __init__(self, mesh: Mesh, shell: float, cell: float) -> None:
        positions, faces = welded_faces(mesh)
        faces = faces[one_sided(faces)]
        over = turned(positions, faces)
        faces = np.where(over[:, None], faces[:, ::-1], faces)
        triangles = positions[faces].astype(np.float64)
        self.tree, self.shell, self._cell = TriangleTree(triangles), shell, cell
        open_faces = _open_parts(faces)
        self.sheets = TriangleTree(triangles[open_faces]) if shell > 0 and open_faces.any() else None

    def solid(self, points: np.ndarray) -> np.ndarray:
        """Return whether points [N, 3] lie inside, [N]."""
        value = self.tree.winding_numbers(points)
        if self.sheets is not None:
            value = np.maximum(value, 0.5 + (self.shell - self.sheets.distances(points)) / self._cell)
        return value

    def distances(self, points: np.ndarray) -> np.ndarray:
        """Return distances of points [N, 3] to the surface of the mesh, or a bound on them where there is a shell."""
        return np.maximum(self.tree.distances(points) - self.shell, 0)


def _open_parts(faces: np.ndarray) -> np.ndarray:
    """Faces [F] bool of pieces with an edge that has only one face."""
    edges = edges_of(faces)
    pairs, _ = adjacent_faces(edges)
    count, piece = label_components(len(faces), pairs // 3)
    border = (edges.count[edges.of_half_edge] == 1).reshape(-1, 3).any(1)
    return np.bincount(piece, border, count)[piece] > 0


def dmtet_from_mesh(
    mesh: Mesh,
    lattice: Lattice,
    settings: SolidifySettings | None = None,
    *,
    deformation: float = 0.24,
    device: torch.device | str = "cpu",
) -> tuple[DMTet, dict[str, float]]:
    """Return the DMTet of the body that a mesh encloses, and facts about it.

    Args:
        mesh: in the scene's box; open, overlapping, inconsistent as it may be.
    Returns: the DMTet; and faces: triangles of the mesh, missed: share of its visible surface that lies more than a
        cell from the DMTet's, lost: share of the body beneath its visible surface that lies outside the DMTet's.
    Raises: UserError where it encloses nothing, or the lattice is too coarse for most of it.
    """
    settings = settings or SolidifySettings()
    body = Body(mesh, settings.shell * lattice.cell, lattice.cell)
    band, inside = _decided(body, lattice)
    crossing = inside[band.edges[:, 0]] != inside[band.edges[:, 1]]
    if not crossing.any():
        raise _no_body("it encloses no point of the lattice: it is a sheet, or thinner than a cell", lattice)

    vertices, faces = _surface(body, band, inside)
    missed = _missed(mesh, body, TriangleTree(vertices[faces]), lattice.cell)
    if missed > LOST:
        raise _no_body(f"{100 * missed:.0f} % of what can be seen of it would be lost", lattice)
    if missed > WARN:
        log.warning(
            "%.0f %% of the mesh is a sheet or thinner than a cell of %.3g, and is lost", 100 * missed, lattice.cell
        )
    ids = dilate(lattice, band.ids[np.unique(band.edges[crossing])], margin_rings(lattice))
    place = lookup(band.ids, ids)
    sign = np.where(inside[place], -1, 1)
    beyond = place < 0
    if beyond.any():
        sign[beyond] = np.where(body.solid(lattice.positions(ids[beyond])) > 0.5, -1, 1)
    distance = distance_to_surface(lattice.positions(ids), vertices, faces)
    dmtet = DMTet(lattice, ids, sign * distance, deformation=deformation, device=device)
    with torch.no_grad():  # crossings from distances are not those found above where the body is thin
        surface = dmtet.surface()
    triangles = surface.vertices.cpu().numpy()[surface.faces.cpu().numpy()]
    loss = losses(mesh, body.tree, TriangleTree(triangles), lattice.cell)
    _judge(loss, lattice)
    return dmtet, {"faces": float(len(mesh.faces)), "missed": missed, "lost": loss.share}


def _decided(body: Body, lattice: Lattice) -> tuple[Band, np.ndarray]:
    """A band of lattice vertices around the body's surface and which of them [N] are inside it.

    It begins around the mesh and grows wherever the surface leaves it, as it does across a hole.
    """
    ids = ids_near(lattice, body.distances, (margin_rings(lattice) + 1) * lattice.cell)
    solid = body.solid(lattice.positions(ids))
    while True:
        band = build_band(lattice, ids)
        inside = (solid > 0.5) & ~band.border
        ends = band.edges[inside[band.edges[:, 0]] != inside[band.edges[:, 1]]].reshape(-1)
        leaks = np.unique(ends[(band.rim & ~band.border)[ends]])
        if not len(leaks):
            return band, inside
        new = np.setdiff1d(dilate(lattice, ids[leaks], 2 * margin_rings(lattice)), ids, assume_unique=True)
        ids = np.concatenate([ids, new])
        order = np.argsort(ids)
        solid = np.concatenate([solid, body.solid(lattice.positions(new))])[order]
        ids = ids[order]


def _surface(body: Body, band: Band, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] where the body's surface crosses the lattice's edges, and faces [F, 3].

    The crossing is that of the one triangle the edge meets; where it meets none or several (a hole, overlapping parts,
    a shell) it is found by bisection.
    """
    ends, faces = crossing_edges(band, inside)
    a, b = (band.lattice.positions(band.ids[side]) for side in ends.T)
    count, t = body.tree.hits(a, b)
    rest = count != 1 if body.sheets is None else np.ones(len(a), dtype=bool)

    def density(points: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(body.solid(points.numpy())).float()

    if rest.any():
        sides = (torch.from_numpy(x[rest]) for x in (a, b))
        t[rest] = bisect(*sides, density, 0.5, "cpu").numpy()
    return a + (b - a) * t[:, None].astype(np.float32), faces


def _missed(mesh: Mesh, body: Body, surface: TriangleTree, cell: float) -> float:
    """Share of the mesh's area, hidden parts set aside, that lies more than a cell from a surface."""
    face, weights = surface_samples(mesh, PROBES, torch.Generator().manual_seed(0))
    points, normals = points_at(mesh, face, weights), mesh.face_normals()[face]
    visible = np.minimum(*(body.tree.winding_numbers(points + way * 0.1 * cell * normals) for way in (1, -1))) < 0.5
    if not visible.any():
        return 1.0
    return float((surface.distances(points[visible]) > cell + body.shell).mean())


def _judge(loss: Losses, lattice: Lattice) -> None:
    """Warn of what a first surface has lost of its body, or refuse it with the setting that helps."""
    cell, thin = lattice.cell, loss.thickness < lattice.cell
    parts = int((loss.parts > 0.5).sum())
    dwarf = f"its largest part is {100 * loss.reach:.2g} % as long as all of it" if loss.reach < FAR else ""
    if loss.share > BROKEN or ((thin or dwarf) and loss.share > TORN):
        why = f"{100 * loss.share:.0f} % of the body would be lost"
        if dwarf:
            raise _no_body(f"{why}: {dwarf}", lattice, "take the parts that lie far away out of the file, or ")
        raise _no_body(
            f"{why}: a tenth of it or more is thinner than {loss.thickness:.2g}", lattice, _finer(loss, cell)
        )
    if dwarf:
        log.warning("%s: parts that lie far away make it small, and coarse", dwarf)
    if loss.share > (WARN if thin else TORN):
        text = "%.0f %% of the mesh's body is thinner than a cell of %.3g, and is lost"
        log.warning(text, 100 * loss.share, cell)
    elif parts:
        text = "%d of %d parts of the mesh are thinner than a cell of %.3g, and lost, most or all of them"
        log.warning(text, parts, len(loss.parts), cell)


def _finer(loss: Losses, cell: float) -> str:
    """Advice on a lattice that holds most of a body."""
    tets = int(np.ceil(CELLS * 2 / loss.thickness / 8)) * 8
    return f"set fine.tets={tets}, or " if loss.thickness < 2 * cell and tets <= MAX_RESOLUTION else ""


def _no_body(why: str, lattice: Lattice, better: str | None = None) -> UserError:
    """better: what helps most, before the way that always does; None where the mesh may be a sheet."""
    locked = "paint it as it is with fine.geometry=locked"
    sheet = f"{locked}, thicken it with fine.solidify.shell=1, or raise fine.tets above {lattice.resolution}"
    return UserError(
        "The mesh cannot be made a body to refine",
        f"{why} ({'a cell is ' if better is not None else ''}{lattice.cell:.3g} of the scene)",
        sheet if better is None else f"{better}{locked}",
    )
