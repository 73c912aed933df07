"""Reading STL, binary and text: bare triangles, each with corners of its own.

A file that holds fewer or more triangles than it says, or ends in the midst of one, is refused. Colours in the
attribute bytes, which the format does not define, are warned of and left out.
"""

from __future__ import annotations

import logging
import re
import struct
from pathlib import Path

import numpy as np

from stages.errors import UserError
from stages.mesh.files.picture import GREY
from stages.mesh.files.polygons import triangles_of
from stages.mesh.mesh import Mesh

log = logging.getLogger(__name__)

HEADER, ROW = 84, 50  # bytes of a binary file's beginning and of a triangle
_ROW = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def read_stl(path: Path) -> list[Mesh]:
    """Return the triangles of an STL file as one part; none where it has none.

    Raises: UserError for a file that is cut off, or holds more than it says.
    """
    data = path.read_bytes()
    count = struct.unpack("<I", data[80:HEADER])[0] if len(data) >= HEADER else None
    is_text = re.match(rb"\s*solid\b", data, re.I) and (
        re.search(rb"\b(facet|endsolid)\b", data, re.I) or count is None
    )
    if is_text and (count is None or len(data) != HEADER + ROW * count):
        corners, stored = _text(path, data)
    else:
        corners, stored = _binary(path, data, count)
    if not len(corners):
        return []
    with np.errstate(all="ignore"):  # numbers that are none are refused with the mesh, by all readers alike
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        agree = np.einsum("ij,ij->i", normals, stored)
    if (agree < 0).sum() > (agree > 0).sum():
        log.warning("%s: its normals point away from the side its corners wind about; the latter is taken", path.name)
    vertices = np.ascontiguousarray(corners.reshape(-1, 3))
    faces = np.arange(len(vertices), dtype=np.int32).reshape(-1, 3)
    return [Mesh(vertices, faces, np.full((len(vertices), 3), GREY, np.float32))]


def _binary(path: Path, data: bytes, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Corners [F, 3, 3] and stored normals [F, 3]."""
    if count is None:
        raise _wrong(path, f"it holds no triangles: it has {len(data)} bytes, and an STL's header has {HEADER}")
    whole = (len(data) - HEADER) // ROW
    if whole < count:
        raise _wrong(path, f"its header promises {count} triangles, and it holds {whole}: it is cut off")
    rest = data[HEADER + ROW * count :]
    if rest.strip(b" \t\r\n"):
        more = f"{len(rest)} bytes more follow, room for {len(rest) // ROW} triangles"
        raise _wrong(path, f"its header promises {count} triangles, and {more}")
    rows = np.frombuffer(data, _ROW, count, HEADER)
    if rows["attribute"].any() or b"COLOR=" in data[:80]:
        log.warning("%s: the colours in its attribute bytes are left out", path.name)
    return rows["corners"].astype(np.float32), rows["normal"].astype(np.float32)


def _text(path: Path, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Corners [F, 3, 3] and stored normals [F, 3]; a facet of more corners becomes several triangles."""
    points: list[list[bytes]] = []
    sizes: list[int] = []
    normals: list[list[bytes]] = []
    inside = open_facet = False
    lines = re.split(rb"\r\n|\n|\r", data.rstrip())
    for number, line in enumerate(lines, 1):
        words = line.split()
        key = words[0].lower() if words else b""
        if number == len(lines) and key != b"endsolid":
            break  # said below: it is cut off
        if key == b"facet":
            if open_facet:
                raise _wrong(path, f"line {number}: a facet begins in the midst of facet {len(sizes)}")
            open_facet = True
            sizes.append(0)
            normals.append(words[2:5] if len(words) == 5 else [b"0"] * 3)
        elif key == b"vertex":
            if len(words) != 4 or not open_facet:
                why = "a vertex has three numbers" if open_facet else "a vertex stands outside of a facet"
                raise _wrong(path, f"line {number}: {why}, here is {line.decode(errors='replace').strip()[:60]!r}")
            points.append(words[1:])
            sizes[-1] += 1
        elif key == b"endfacet":
            open_facet = False
            if sizes[-1:] < [3]:
                raise _wrong(path, f"line {number}: facet {len(sizes)} has {(sizes or [0])[-1]} corners, wanted 3")
        elif key == b"solid":
            inside = True
        elif key == b"endsolid":
            inside = False
        elif key not in (b"", b"outer", b"endloop"):
            raise _wrong(path, f"line {number} is not STL: {line.decode(errors='replace').strip()[:60]!r}")
    if open_facet or inside:
        where = (
            f"in facet {len(sizes)}, after {sizes[-1]} of its 3 corners" if open_facet else f"after {len(sizes)} facets"
        )
        raise _wrong(path, f"it is cut off {where}: there is no endsolid")
    if not sizes:
        return np.zeros((0, 3, 3), np.float32), np.zeros((0, 3), np.float32)
    try:
        table, stored = np.array(points, np.float64), np.array(normals, np.float64)
    except ValueError as error:
        raise _wrong(path, f"it has numbers that are none: {error}") from None
    if max(sizes) > 3:
        log.warning("%s: %d facets of more than three corners become triangles", path.name, sum(n > 3 for n in sizes))
    triangles, owner = triangles_of(table, np.arange(len(table)), np.array(sizes))
    with np.errstate(over="ignore"):
        return table[triangles].astype(np.float32), stored[owner].astype(np.float32)


def _wrong(path: Path, why: str) -> UserError:
    return UserError(f"Cannot read the mesh {path}", why, "get the whole file again, or save it as GLB")
