"""The format of a mesh file, by its name and its first bytes; and what it is instead, in words."""

from __future__ import annotations

import re
from pathlib import Path

from stages.errors import UserError

READABLE = {".glb": "GLB", ".gltf": "glTF", ".obj": "OBJ", ".ply": "PLY", ".stl": "STL"}
READ = "GLB, glTF, OBJ, PLY and STL"
_BEGINNINGS = [
    (rb"glTF", ".glb", "a GLB"),
    (rb"ply[ \t]*[\r\n]", ".ply", "a PLY"),
    (rb"\s*\{", ".gltf", "JSON, as in a .gltf"),
    (rb"PK\x03\x04|PK\x05\x06", "", "a ZIP archive, as 3MF and USDZ are"),
    (rb"\x1f\x8b", "", "compressed by gzip"),
    (rb"Kaydara FBX", "", "an FBX"),
    (rb"BLENDER|\x28\xb5\x2f\xfd", "", "a Blender file"),
    (rb"PXR-USDC|#usda", "", "a USD"),
    (rb"\x89PNG|\xff\xd8\xff|RIFF", "", "a picture"),
    (rb"\s*(<\?xml|<COLLADA)", "", "XML, as COLLADA is"),
]


def format_of(path: Path) -> str:
    """Return the ending in small letters of a file whose format is read: .glb, .gltf, .obj, .ply or .stl.

    Raises: UserError for another format, and for content that is not what the name says: a web page, a Git LFS
        pointer, another format.
    """
    what, suffix = f"Cannot read the mesh {path}", path.suffix.lower()
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        raise UserError(what, "it is empty", "get the whole file again")
    text = head.removeprefix(b"\xef\xbb\xbf")
    if re.match(rb"\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body)", text, re.I | re.S):
        raise UserError(what, "it is a web page (HTML), as a failed download leaves", "download the file itself again")
    if text.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", text)
        whole = f" of {int(size.group(1))} bytes" if size else ""
        raise UserError(what, f"it is a Git LFS pointer to the file{whole}, not the file", "fetch it: git lfs pull")
    ending, content = next(((e, c) for start, e, c in _BEGINNINGS if re.match(start, text)), ("", ""))
    if suffix not in READABLE:
        name = f"{suffix[1:].upper()} is not supported" if suffix else "its name has no ending that tells its format"
        its = f"; its content is {content}" if content else ""
        fix = f"rename it to {path.stem}{ending}" if ending else "save it as GLB"
        raise UserError(what, f"{name}{its}; read are {READ}", fix)
    if content and ending != suffix:
        fix = f"rename it to {path.stem}{ending}" if ending else "unpack or convert it, and give the GLB or OBJ"
        raise UserError(what, f"it is not {READABLE[suffix]} at all: its content is {content}", fix)
    if suffix in (".glb", ".ply", ".gltf") and not content:
        first = {".glb": "'glTF'", ".ply": "'ply'", ".gltf": "'{'"}[suffix]
        why = f"it is not {READABLE[suffix]} at all: it does not begin with {first}"
        raise UserError(what, why, "get the whole file again, or save it as GLB")
    return suffix
