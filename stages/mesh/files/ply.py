"""Reading PLY (Turk 1994), text and binary of either byte order.

Read: of vertices x y z, normals, colours (sRGB) and texture coordinates; of faces their vertices, texture coordinates
and colours; triangle strips; the picture that a `comment TextureFile` names. Other elements are warned of and left out.
Refused: a body that holds fewer or more numbers than its header says, and indices that are out of bounds.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from stages.errors import UserError
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.files.mtl import find_beside
from stages.mesh.files.picture import GREY, bare_layout, in_one_tile, pixels
from stages.mesh.files.polygons import strips, triangles_of
from stages.mesh.mesh import Mesh

log = logging.getLogger(__name__)

_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4"}
_TYPES |= {"double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"}
_TYPES |= {"float32": "f4", "float64": "f8"}
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_UV = [("s", "t"), ("u", "v"), ("texture_u", "texture_v"), ("texture_s", "texture_t")]
_RGB = [("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")]
_CORNERS = ("vertex_indices", "vertex_index")


@dataclass
class _Element:
    """An element of a header. properties: (name, numpy's type, the type of a list's count or None)."""

    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    lists: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # all values, values a row


class _Ply:
    """A PLY file: its elements by name, with what they hold."""

    def __init__(self, path: Path) -> None:
        self.path, data = path, path.read_bytes()
        end = re.search(rb"(?:^|[\r\n])[ \t]*end_header[ \t]*(\r\n|\n|\r)?", data)
        if end is None:
            raise self.wrong("its header has no end (end_header): it is cut off, or no PLY")
        self.pictures: list[str] = []
        self.elements: dict[str, _Element] = {}
        self.order = self._header(data[: end.start()].decode("utf-8", errors="surrogateescape").splitlines())
        self.data, self.place = data, end.end() if self.order else 0
        self.tokens = [] if self.order else data[end.end() :].split()
        self.begin = self.place
        for element in self.elements.values():
            self._read(element)
        rest = self.data[self.place :] if self.order else self.tokens[self.place :]
        if (rest.strip(b" \t\r\n") if self.order else rest) and self.elements:
            unit = "bytes" if self.order else "numbers"
            raise self.wrong(f"its header promises {self.place - self.begin} {unit}, and {len(rest)} more follow")

    def wrong(self, why: str) -> UserError:
        """Return what a file is refused with."""
        return UserError(f"Cannot read the mesh {self.path}", why, "get the whole file again, or save it as GLB")

    def _header(self, lines: list[str]) -> str:
        order = None
        for line in lines[1:]:
            words = line.split()
            try:
                if words[:1] == ["format"]:
                    order = _ORDERS[words[1]]
                elif words[:1] == ["element"]:
                    self.elements[words[1]] = last = _Element(words[1], int(words[2]))
                    if last.count < 0:
                        raise ValueError
                elif words[:2] == ["property", "list"]:
                    last.properties.append((words[4], _TYPES[words[3]], _TYPES[words[2]]))
                elif words[:1] == ["property"]:
                    last.properties.append((words[2], _TYPES[words[1]], None))
                elif words[:2] == ["comment", "TextureFile"]:
                    self.pictures.append(line.split(None, 2)[2].strip())
            except (KeyError, IndexError, ValueError, UnboundLocalError):
                raise self.wrong(f"its header's line {line.strip()[:80]!r} is not PLY") from None
        if order is None:
            raise self.wrong("its header does not say a format")
        return order

    def _read(self, element: _Element) -> None:
        """Take the rows of an element from the body: all at once where their lists are as long as the first's."""
        if not element.count or not element.properties:
            for name, kind, length in element.properties:
                empty = np.zeros(0, kind)
                if length is None:
                    element.columns[name] = empty
                else:
                    element.lists[name] = empty, np.zeros(0, np.int64)
            return
        if not self._even(element):
            self._uneven(element)

    def _even(self, element: _Element) -> bool:
        """Whether all rows are alike, and then they are read."""
        begin = self.place
        sizes = {}
        for name, kind, length in element.properties:
            if length is not None:
                sizes[name] = int(self._take(element, 0, length, 1)[0])
            self._take(element, 0, kind, sizes.get(name, 1))
        row, self.place = self.place - begin, begin
        if begin + row * element.count > (len(self.data) if self.order else len(self.tokens)):
            if sizes:
                return False  # later lists may be shorter
            self._short(element, (self._left() // row))
        if self.order:
            parts = []
            for name, kind, length in element.properties:
                parts += [] if length is None else [(f"{name} count", self.order + length)]
                parts.append((name, self.order + kind, (sizes[name],)) if length else (name, self.order + kind))
            table = np.frombuffer(self.data, np.dtype(parts), element.count, begin)
        else:
            numbers = self._numbers(self.tokens[begin : begin + row * element.count]).reshape(element.count, row)
            table, column = {}, 0
            for name, _, length in element.properties:
                if length is not None:
                    table[f"{name} count"], column = numbers[:, column], column + 1
                table[name] = numbers[:, column : column + sizes[name]] if length else numbers[:, column]
                column += sizes.get(name, 1)
        if any((table[f"{name} count"] != size).any() for name, size in sizes.items()):
            return False
        for name, kind, length in element.properties:
            values = self._of_kind(np.asarray(table[name]), name, kind)
            if length is None:
                element.columns[name] = values
            else:
                element.lists[name] = values.reshape(-1), np.full(element.count, sizes[name])
        self.place = begin + row * element.count
        return True

    def _uneven(self, element: _Element) -> None:
        columns: dict[str, list] = {name: [] for name, _, _ in element.properties}
        counts: dict[str, list[int]] = {name: [] for name, _, length in element.properties if length is not None}
        for row in range(element.count):
            for name, kind, length in element.properties:
                size = 1
                if length is not None:
                    size = int(self._take(element, row, length, 1)[0])
                    counts[name].append(size)
                columns[name].append(self._take(element, row, kind, size))
        for name, kind, length in element.properties:
            values = self._of_kind(np.concatenate(columns[name]), name, kind)
            if length is None:
                element.columns[name] = values
            else:
                element.lists[name] = values, np.array(counts[name], np.int64)

    def _take(self, element: _Element, row: int, kind: str, size: int) -> np.ndarray:
        """The next numbers of the body."""
        if size < 0:
            raise self.wrong(f"row {row + 1} of its element {element.name} has a list of {size} numbers")
        step = np.dtype(kind).itemsize if self.order else 1
        if self._left() < size * step:
            self._short(element, row)
        begin, self.place = self.place, self.place + size * step
        if self.order:
            return np.frombuffer(self.data, self.order + kind, size, begin)
        return self._numbers(self.tokens[begin : begin + size])

    def _left(self) -> int:
        return (len(self.data) if self.order else len(self.tokens)) - self.place

    def _short(self, element: _Element, rows: int) -> None:
        what = {"vertex": "vertices", "face": "faces"}.get(element.name, f"rows of {element.name}")
        raise self.wrong(f"its header promises {element.count} {what}, and it ends after {rows}: it is cut off")

    def _of_kind(self, values: np.ndarray, name: str, kind: str) -> np.ndarray:
        """Return values as numbers of a property's kind; refused where they are none of it."""
        if np.dtype(kind).kind in "iu" and values.dtype.kind == "f":
            bounds = np.iinfo(kind)
            strange = ~((values == np.round(values)) & (values >= bounds.min) & (values <= bounds.max))
            if strange.any():
                raise self.wrong(f"{values[strange].flat[0]:g} is no number of its property {name}, which is of {kind}")
        return values.astype(kind)

    def _numbers(self, words: list[bytes]) -> np.ndarray:
        try:
            return np.array(words, dtype=np.float64) if words else np.zeros(0)
        except ValueError:
            strange = next(word for word in words if not re.fullmatch(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word))
            raise self.wrong(f"{strange[:40]!r} among its numbers is none") from None


def read_ply(path: Path) -> list[Mesh]:
    """Return the parts of a PLY file, one for each picture; none where it has no faces.

    Raises: UserError for a file that is not what its header says.
    """
    file = _Ply(path)
    vertices = file.elements.get("vertex")
    if vertices is None or not {"x", "y", "z"} <= vertices.columns.keys():
        raise file.wrong("it has no vertices with x, y and z")
    known = {"vertex", "face", "tristrips"}
    for element in file.elements.values():
        if element.name not in known and element.count:
            log.warning("%s: its %d rows of %s are left out", path.name, element.count, element.name)
    with np.errstate(over="ignore"):
        points = np.stack([vertices.columns[k] for k in "xyz"], -1).astype(np.float32)
    faces, corners, polygons = _faces(file, points)
    if not len(faces):
        return []
    if faces.min() < 0 or faces.max() >= len(points):
        wrong = int(faces.min() if faces.min() < 0 else faces.max())
        raise file.wrong(f"a face names vertex {wrong}, out of bounds: there are {len(points)}, counted from 0")
    colours = _colours(vertices)
    face = file.elements.get("face")
    if colours is None and face is not None and (face_colours := _colours(face)) is not None:
        colours = _of_faces(face_colours[polygons], faces, len(points))
        if np.abs(colours[faces] - face_colours[polygons][:, None]).max() > 0.02:
            log.warning("%s: its faces' colours become those of the vertices, their mean", path.name)
    normals = None
    if {"nx", "ny", "nz"} <= vertices.columns.keys():
        normals = np.stack([vertices.columns[f"n{k}"] for k in "xyz"], -1).astype(np.float32)
    whole = Mesh(points, faces, colours, normals=normals)
    layout = _layout(vertices, face, faces, corners, polygons)
    number = None if face is None else face.columns.get("texnumber")
    which = np.zeros(len(faces), np.int64) if number is None else number[polygons].astype(np.int64)
    if layout is None or len(np.unique(which)) == 1:
        return [_painted(whole, layout, file, int(which[0]))]
    parts = []
    for k in np.unique(which):
        of_picture = which == k
        used, inverse = np.unique(faces[of_picture], return_inverse=True)
        rows = (None if x is None else x[used] for x in (points, colours, normals))
        vertices_k, colours_k, normals_k = rows
        part = Mesh(vertices_k, inverse.reshape(-1, 3).astype(np.int32), colours_k, normals=normals_k)
        parts.append(_painted(part, (layout[0], layout[1][of_picture]), file, int(k)))
    return parts


def _faces(file: _Ply, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triangles [F, 3] int32, the places [F, 3] of their corners in the faces' lists, and the faces' numbers [F]."""
    face = file.elements.get("face")
    triangles, corners, polygons = (np.zeros((0, 3), np.int64),) * 2 + (np.zeros(0, np.int64),)
    name = None if face is None else next((n for n in (*_CORNERS, *face.lists) if n in face.lists), None)
    if name is not None:
        flat, sizes = face.lists[name]
        flat = flat.astype(np.int64)
        if len(flat) and (flat.min() < 0 or flat.max() >= len(points)):
            wrong = int(flat.min() if flat.min() < 0 else flat.max())
            raise file.wrong(f"a face names vertex {wrong}, out of bounds: there are {len(points)}, counted from 0")
        few = sizes < 3
        if few.any():
            log.warning("%s: %d faces of fewer than three corners are left out", file.path.name, few.sum())
        whole = np.flatnonzero(~few)
        places = np.flatnonzero(np.repeat(~few, sizes))
        corners, polygons = triangles_of(points, flat[places], sizes[whole])
        corners, polygons = places[corners], whole[polygons]
        triangles = flat[corners]
    strip = file.elements.get("tristrips")
    if strip is not None:
        for flat, sizes in strip.lists.values():
            lines = np.split(flat.astype(np.int64), np.cumsum(sizes)[:-1])
            more = np.concatenate([strips(line, -1) for line in lines] or [triangles[:0]])
            triangles = np.concatenate([triangles, more])
            corners = np.concatenate([corners, np.zeros_like(more)])
            polygons = np.concatenate([polygons, np.zeros(len(more), np.int64)])
    return triangles.astype(np.int32), corners, polygons


def _layout(
    vertices: _Element, face: _Element | None, faces: np.ndarray, corners: np.ndarray, polygons: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Texture coordinates [T, 2] and the triangles' places [F, 3] among them, None where the file has none."""
    if face is not None and "texcoord" in face.lists:
        flat, sizes = face.lists["texcoord"]
        of = next(face.lists[name][1] for name in (*_CORNERS, *face.lists) if name in face.lists)
        if (sizes == 2 * of).all() and len(corners) == len(polygons):
            return flat.reshape(-1, 2).astype(np.float32), corners.astype(np.int32)
        log.warning("texture coordinates that are not two for each corner of a face are left out")
    for names in _UV:
        if set(names) <= vertices.columns.keys():
            return np.stack([vertices.columns[n] for n in names], -1).astype(np.float32), faces
    return None


def _painted(mesh: Mesh, layout: tuple[np.ndarray, np.ndarray] | None, file: _Ply, number: int) -> Mesh:
    """The mesh with its picture where it has one and coordinates, else with its colours."""
    name = file.pictures[number] if 0 <= number < len(file.pictures) else None
    picture = None if name is None else find_beside(file.path.parent, name)
    if name is not None and (picture is None or layout is None):
        why = "there is no such file" if picture is None else "there are no texture coordinates"
        log.warning("the picture %s is left out: %s", name, why)
    if picture is not None and layout is not None:
        if mesh.colours is not None and not np.allclose(mesh.colours, 1):
            log.warning("the vertex colours that tint a texture are left out; bake them into the texture")
        fit = in_one_tile(*layout, pixels(picture))
        return Mesh(mesh.vertices, mesh.faces, **fit, normals=mesh.normals)
    if mesh.colours is None:
        mesh.colours = np.full((len(mesh.vertices), 3), GREY, np.float32)
    if layout is not None and (fit := bare_layout(*layout)):
        mesh.uv, mesh.uv_faces = fit["uv"], fit["uv_faces"]
    return mesh


def _colours(element: _Element) -> np.ndarray | None:
    """Linear colours [N, 3] of an element's rows, None where it has none."""
    for names in _RGB:
        if set(names) <= element.columns.keys():
            values = [element.columns[name] for name in names]
            most = [np.iinfo(v.dtype).max if v.dtype.kind == "u" else 255 if v.dtype.kind == "i" else 1 for v in values]
            srgb = np.stack([v / np.float32(m) for v, m in zip(values, most)], -1).astype(np.float32)
            return srgb_to_linear(torch.from_numpy(np.clip(srgb, 0, 1))).numpy()
    return None


def _of_faces(colours: np.ndarray, faces: np.ndarray, vertices: int) -> np.ndarray:
    """Mean colour [V, 3] of the faces [F, 3] around each vertex; grey where there is none."""
    total, count = np.zeros((vertices, 3)), np.bincount(faces.reshape(-1), minlength=vertices)[:, None]
    np.add.at(total, faces.reshape(-1), np.repeat(colours, 3, axis=0))
    return np.where(count > 0, total / np.maximum(count, 1), GREY).astype(np.float32)
