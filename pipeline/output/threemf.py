"""3MF, a zip of XML for printing: triangles in millimetres, z up, coloured by the texture where there is one.

3MF core specification 1.3; the texture is that of the materials and properties extension 1.2, whose coordinates have v
up as in Mesh. Programs that do not know the extension see the shape alone.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from pipeline.output.files import write_whole
from pipeline.output.surface import GENERATOR, png_bytes, textured
from stages.mesh.clean import check_mesh
from stages.mesh.mesh import Mesh

CORE = "http://schemas.microsoft.com/3dmanufacturing/core/2015/02"
MATERIAL = "http://schemas.microsoft.com/3dmanufacturing/material/2015/02"
RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
MODEL_FILE, PICTURE_FILE = "3D/3dmodel.model", "3D/Textures/texture.png"
MODEL_KIND = "http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel"
PICTURE_KIND = "http://schemas.microsoft.com/3dmanufacturing/2013/01/3dtexture"
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in the archive: the same mesh gives the same bytes
XML = '<?xml version="1.0" encoding="UTF-8"?>\n'


def threemf_bytes(mesh: Mesh) -> bytes:
    """Return the mesh as a 3MF file.

    Args:
        mesh: with faces, in millimetres, z up.
    Raises: UserError if the mesh is empty or damaged.
    """
    check_mesh(mesh)
    coloured = textured(mesh)
    files = {
        "[Content_Types].xml": XML
        + '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        + '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        + '<Default Extension="model" ContentType="application/vnd.ms-package.3dmanufacturing-3dmodel+xml"/>'
        + '<Default Extension="png" ContentType="image/png"/></Types>',
        "_rels/.rels": _relation(MODEL_FILE, MODEL_KIND),
        MODEL_FILE: _model(mesh, coloured),
    }
    if coloured:
        files["3D/_rels/3dmodel.model.rels"] = _relation(PICTURE_FILE, PICTURE_KIND)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), text, zipfile.ZIP_DEFLATED)
        if coloured:
            archive.writestr(zipfile.ZipInfo(PICTURE_FILE, EPOCH), png_bytes(mesh.texture), zipfile.ZIP_STORED)
    return buffer.getvalue()


def write_threemf(mesh: Mesh, path: str | Path) -> list[Path]:
    """Write a 3MF file with the texture inside; returns its path."""
    return [write_whole(path, threemf_bytes(mesh))]


def _relation(target: str, kind: str) -> str:
    entry = f'<Relationship Target="/{target}" Id="rel0" Type="{kind}"/>'
    return f'{XML}<Relationships xmlns="{RELATIONS}">{entry}</Relationships>'


def _model(mesh: Mesh, coloured: bool) -> str:
    faces = mesh.faces.tolist()
    parts = [f'{XML}<model unit="millimeter" xml:lang="en-US" xmlns="{CORE}" xmlns:m="{MATERIAL}">']
    parts.append(f'<metadata name="Application">{GENERATOR}</metadata><resources>')
    corner_colours = [""] * len(faces)
    if coloured:
        parts.append(f'<m:texture2d id="2" path="/{PICTURE_FILE}" contenttype="image/png" tilestyleu="clamp"')
        parts.append(' tilestylev="clamp"/><m:texture2dgroup id="3" texid="2">')
        parts += [f'<m:tex2coord u="{u}" v="{v}"/>' for u, v in _numbers(mesh.uv)]
        parts.append("</m:texture2dgroup>")
        corner_colours = [f' pid="3" p1="{a}" p2="{b}" p3="{c}"' for a, b, c in mesh.uv_faces.tolist()]
    whole = ' pid="3" pindex="0"' if coloured else ""
    parts.append(f'<object id="1" type="model" name="mesh"{whole}><mesh><vertices>')
    parts += [f'<vertex x="{x}" y="{y}" z="{z}"/>' for x, y, z in _numbers(mesh.vertices)]
    parts.append("</vertices><triangles>")
    rows = zip(faces, corner_colours, strict=True)
    parts += [f'<triangle v1="{a}" v2="{b}" v3="{c}"{colours}/>' for (a, b, c), colours in rows]
    parts.append('</triangles></mesh></object></resources><build><item objectid="1"/></build></model>')
    return "".join(parts)


def _numbers(rows: np.ndarray) -> list[list[str]]:
    """Rows with the fewest digits that read back as the same float32."""
    return [[str(value) for value in row] for row in rows.astype(np.float32).astype(object)]
