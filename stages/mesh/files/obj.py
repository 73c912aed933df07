"""Reading Wavefront OBJ by the text of its format, without trimesh.

Read: v with its colour, vt, vn, f with indices from 1 or relative to the last (of the point where the face stands),
usemtl and mtllib; continued lines, comments behind numbers, tabs, indents, a byte-order mark, UTF-16. A polygon of more
than three corners becomes triangles, by its ears where it is concave.
Warned of and left out: points, lines, curves and surfaces, statements that are not OBJ's. Refused, with the line: the
index 0 and those out of bounds, numbers that are none.

A group's or object's name says nothing of shape or colour: all are one mesh, in one part per material.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from stages.errors import UserError
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.files.mtl import Material, lines_of, read_libraries
from stages.mesh.files.picture import GREY, bare_layout, in_one_tile, pixels, spread
from stages.mesh.files.polygons import triangles_of
from stages.mesh.mesh import Material as MeshMaterial
from stages.mesh.mesh import Mesh

log = logging.getLogger(__name__)

_NAMES = {"mtllib", "usemtl", "o", "g"}  # what follows is a name, in which # may stand
_SILENT = {"g", "o", "s", "mg", "vp", "bevel", "c_interp", "d_interp", "lod", "cstype", "deg", "bmat", "step", "parm"}
_SILENT |= {"trim", "hole", "scrv", "sp", "end", "con", "shadow_obj", "trace_obj", "ctech", "stech", "bsp", "bzp"}
_LEFT_OUT = {"p": "points", "l": "lines", "curv": "curves", "curv2": "curves", "surf": "curved surfaces"}
_LEFT_OUT |= {"call": "other files called", "csh": "commands", "usemap": "texture maps", "maplib": "texture maps"}


class _Obj:
    """The statements of an OBJ file."""

    def __init__(self, path: Path) -> None:
        """Raises: UserError with the line of what is none of OBJ's."""
        self.path = path
        self.v: list[list[str]] = []
        self.vt: list[list[str]] = []
        self.vn: list[list[str]] = []
        self.corners: tuple[list[int], list[int], list[int]] = [], [], []  # v, vt, vn as written; 0 for none
        self.sizes: list[int] = []
        self.counts: list[tuple[int, int, int]] = []  # of v, vt, vn where a face stands
        self.face_lines: list[int] = []
        self.face_materials: list[int] = []
        self.materials: list[str] = [""]
        self.libraries: list[str] = []
        omissions: Counter[str] = Counter()
        strange: list[int] = []
        current = 0
        rows = {"v": self.v, "vt": self.vt, "vn": self.vn}
        for number, line in enumerate(lines_of(path), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            key = words[0]
            if "#" in line and key not in _NAMES:
                words = line.split("#", 1)[0].split()
            if key in rows:
                rows[key].append(words[1:])
            elif key in ("f", "fo"):
                if len(words) < 4:
                    omissions["faces of fewer than three corners"] += 1
                    continue
                self._face(words[1:], number, current)
            elif key == "usemtl":
                name = line.split(None, 1)[1].strip() if len(words) > 1 else ""
                if name not in self.materials:
                    self.materials.append(name)
                current = self.materials.index(name)
            elif key == "mtllib":
                self.libraries += [line.split(None, 1)[1].strip()] if len(words) > 1 else []
            elif key in _LEFT_OUT:
                omissions[_LEFT_OUT[key]] += 1
            elif key not in _SILENT:
                strange.append(number)
        for what, count in omissions.items():
            log.warning("%s: %d %s are left out", path.name, count, what)
        if strange:
            log.warning("%s: %d lines are no OBJ (the first is %d), and are left out", path.name, *_first(strange))

    def _face(self, words: list[str], number: int, material: int) -> None:
        slashes = words[0].count("/")
        try:
            if all(word.count("/") == slashes for word in words) and not any("//" in word for word in words):
                numbers = list(map(int, " ".join(words).replace("/", " ").split()))
                step = slashes + 1
                if step > 3 or len(numbers) != step * len(words):
                    raise ValueError
                zeros = [0] * len(words)
                corners = [numbers[k::step] if k < step else zeros for k in range(3)]
                if 0 in numbers:
                    raise self._wrong(number, "it has the index 0, and OBJ counts from 1")
            else:
                corners = list(zip(*(self._corner(word, number) for word in words)))
        except ValueError:
            raise self._wrong(number, f"the face {' '.join(words)[:80]} is not made of indices") from None
        for column, values in zip(self.corners, corners, strict=True):
            column.extend(values)
        self.sizes.append(len(words))
        self.counts.append((len(self.v), len(self.vt), len(self.vn)))
        self.face_lines.append(number)
        self.face_materials.append(material)

    def _corner(self, word: str, number: int) -> tuple[int, int, int]:
        parts = word.split("/")
        if len(parts) > 3:
            raise ValueError
        first, second, third = (*parts, "", "")[:3]
        corner = int(first), int(second) if second else 0, int(third) if third else 0
        if not corner[0] or (second and not corner[1]) or (third and not corner[2]):
            raise self._wrong(number, "it has the index 0, and OBJ counts from 1")
        return corner

    def _wrong(self, line: int, why: str) -> UserError:
        return UserError(f"Cannot read the mesh {self.path}", f"line {line}: {why}", "save it again, as OBJ or GLB")

    def _line(self, key: str, row: int) -> int:
        """The line of a kind's statement."""
        lines = (number for number, line in enumerate(lines_of(self.path), 1) if line.split(None, 1)[:1] == [key])
        return next(itertools.islice(lines, row, None))

    def numbers(self, key: str, least: int) -> np.ndarray:
        """The numbers behind all statements of a kind, [N, most], NaN where a line has fewer."""
        rows = getattr(self, key)
        if not rows:
            return np.zeros((0, least))
        widths = np.fromiter(map(len, rows), np.int64, len(rows))
        if widths.min() < least:
            row = int(widths.argmin())
            raise self._wrong(self._line(key, row), f"{key} has {widths[row]} numbers, wanted {least}")
        try:
            if widths.min() == widths.max():
                return np.array(list(map(float, itertools.chain.from_iterable(rows)))).reshape(len(rows), -1)
            table = np.full((len(rows), widths.max()), np.nan)
            for width in np.unique(widths):
                these = np.flatnonzero(widths == width)
                table[these, :width] = np.array([rows[k] for k in these], dtype=np.float64)
            return table
        except ValueError:
            row = next(k for k, words in enumerate(rows) if not all(map(_is_number, words)))
            raise self._wrong(self._line(key, row), f"{' '.join(rows[row])[:80]} are not all numbers") from None

    def indices(self) -> np.ndarray:
        """The corners [C, 3] as places of v, vt, vn; -1 where one has none. UserError where v has no such place."""
        corners = np.stack([np.array(column, dtype=np.int64) for column in self.corners], -1)
        faces = np.repeat(np.arange(len(self.sizes)), self.sizes)
        before = np.array(self.counts, dtype=np.int64).reshape(-1, 3)[faces]
        places = np.where(corners > 0, corners - 1, np.where(corners < 0, corners + before, -1))
        for k, key in enumerate(("v", "vt", "vn")):
            count = len(getattr(self, key))
            bad = (places[:, k] >= count) | ((corners[:, k] < 0) & (places[:, k] < 0))
            if not bad.any():
                continue
            first = int(bad.argmax())
            index, line = int(corners[first, k]), self.face_lines[faces[first]]
            there = count if index > 0 else before[first, k]
            if k == 0:
                raise self._wrong(line, f"the index {index} is out of bounds, there are {there} vertices")
            what = "texture coordinates" if k == 1 else "normals"
            text = "%s, line %d: the index %d is out of bounds, there are %d %s: corners like this have none"
            log.warning(text, self.path.name, line, index, there, what)
            places[bad, k] = -1
        return places


def read_obj(path: Path) -> list[Mesh]:
    """Return the parts of an OBJ file, one for each material; none where it has no faces.

    Raises: UserError with the line of what cannot be read.
    """
    file = _Obj(path)
    table = file.numbers("v", 3)
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused
        points = table[:, :3].astype(np.float32)
    if not file.sizes:
        return []
    colours = _colours(table, path)
    places = file.indices()
    uv, normals = file.numbers("vt", 1), file.numbers("vn", 3)[:, :3].astype(np.float32)
    if uv.shape[1] == 1:
        uv = np.pad(uv, ((0, 0), (0, 1)))
    uv = np.nan_to_num(uv[:, :2])
    triangles, polygons = triangles_of(table[:, :3], places[:, 0], np.array(file.sizes))
    used = [file.materials[k] for k in dict.fromkeys(file.face_materials)]
    libraries = file.libraries or [path.with_suffix(".mtl").name] * path.with_suffix(".mtl").is_file()
    materials = read_libraries(path, libraries, {way for name in used for way in _ways(name)})
    parts = []
    pictures: dict[Path, np.ndarray] = {}  # materials share pictures: one copy of each
    of_triangle = np.array(file.face_materials)[polygons]
    for which in dict.fromkeys(file.face_materials):
        name = file.materials[which]
        material = next((materials[way] for way in _ways(name) if way in materials), None)
        if material is None and name and materials:
            log.warning("the material %s is in no library: it is plain grey", name)
        rows = places[triangles[of_triangle == which]]  # [T, 3, 3]
        part = _part(points, colours, uv, normals, rows, material, pictures)
        part.materials = (MeshMaterial(name.strip('"')),) if name else ()
        parts.append(part)
    return parts


def _part(
    points: np.ndarray,
    colours: np.ndarray | None,
    uv: np.ndarray,
    normals: np.ndarray,
    rows: np.ndarray,
    material: Material | None,
    pictures: dict[Path, np.ndarray],
) -> Mesh:
    """The triangles [T, 3, 3] (places of v, vt, vn) of one material as a mesh; corners with other normals are apart."""
    with_normals = bool((rows[..., 2] >= 0).all())
    keys = rows[..., 0] * len(normals) + rows[..., 2] if with_normals else rows[..., 0]
    keys, faces = np.unique(keys, return_inverse=True)
    corners, of_normals = np.divmod(keys, len(normals)) if with_normals else (keys, keys)
    faces = faces.reshape(-1, 3).astype(np.int32)
    mesh = Mesh(points[corners], faces, normals=_unit(normals[of_normals]) if with_normals else None)
    tint = None if colours is None else colours[corners]
    laid_out = bool((rows[..., 1] >= 0).all())
    if laid_out:
        places, uv_faces = np.unique(rows[..., 1], return_inverse=True)
        layout, uv_faces = uv[places].astype(np.float32), uv_faces.reshape(-1, 3).astype(np.int32)
    if material is not None:
        mesh.metallic, mesh.roughness = material.metallic, material.roughness
    if material is not None and material.picture is not None and not laid_out:
        log.warning("corners without texture coordinates: the picture %s is left out", material.picture.name)
    elif material is not None and material.picture is not None:
        if tint is not None and not np.allclose(tint, 1):
            log.warning("the vertex colours that tint a texture are left out; bake them into the texture")
        if material.picture not in pictures:
            pictures[material.picture] = pixels(material.picture)
        layout = layout * np.float32(material.scale) + np.float32(material.offset)
        fit = spread(layout, uv_faces, pictures[material.picture], ("clamp", "clamp")) if material.clamp else None
        for name, value in (fit or in_one_tile(layout, uv_faces, pictures[material.picture])).items():
            setattr(mesh, name, value)
        return mesh
    plain = np.full(3, GREY if tint is None else 1.0, np.float32) if material is None else material.colour
    mesh.colours = (np.tile(plain, (len(corners), 1)) * (1 if tint is None else tint)).astype(np.float32)
    if laid_out and (fit := bare_layout(layout, uv_faces)):
        mesh.uv, mesh.uv_faces = fit["uv"], fit["uv_faces"]
    return mesh


def _colours(table: np.ndarray, path: Path) -> np.ndarray | None:
    """Linear colours [V, 3] of `v x y z r g b`, sRGB; None where no vertex has one."""
    if table.shape[1] == 4 or (table.shape[1] > 4 and np.isfinite(table[:, 3]).any()):
        weights = table[np.isnan(table[:, 4]) if table.shape[1] > 4 else slice(None), 3]
        if (np.isfinite(weights) & (weights != 1)).any():
            log.warning("%s: the weights of vertices are for curves; positions are taken as written", path.name)
    if table.shape[1] < 6:
        return None
    colours = table[:, 3:6]
    bare = ~np.isfinite(colours).all(1)
    if bare.any():
        text = "%s: %d of %d vertices have no colour: they are taken as white"
        log.warning(text, path.name, bare.sum(), len(bare))
    colours = np.where(bare[:, None], 1.0, colours)
    if colours.max() > 1:
        log.warning("%s: its vertex colours go up to %g: they are taken to end at 255", path.name, colours.max())
        colours = np.where(bare[:, None], 1.0, colours / 255)
    return srgb_to_linear(torch.from_numpy(np.clip(colours, 0, 1)).float()).numpy()


def _ways(name: str) -> list[str]:
    """List the ways to write a material's name in its library: as written, without quotes, without a comment."""
    ways = [name, name.strip('"'), name.split("#")[0].strip(), *name.split()[:1]]
    return list(dict.fromkeys(way for way in ways if way))


def _unit(directions: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(directions, axis=1, keepdims=True)
    return (directions / np.maximum(length, 1e-20)).astype(np.float32)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _first(lines: list[int]) -> tuple[int, int]:
    return len(lines), lines[0]
