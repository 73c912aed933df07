"""Wavefront OBJ with its MTL and PNG beside it; vertex colours on the `v` lines where there is no texture.

Texture coordinates have v up, as in Mesh. Numbers are written with the fewest digits that read back as the same
float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.output.files import write_whole
from pipeline.output.surface import GENERATOR, METALLIC, ROUGHNESS, png_bytes, textured
from stages.kernels.srgb import linear_to_srgb
from stages.mesh.clean import check_mesh
from stages.mesh.mesh import Material, Mesh


def _lines(keyword: str, rows: np.ndarray) -> str:
    return "".join(f"{keyword} {' '.join(map(str, row))}\n" for row in rows.astype(np.float32).astype(object))


def obj_text(mesh: Mesh, material_file: str | None) -> str:
    """Return the OBJ file's text; `material_file` is named in it if the mesh has a texture."""
    check_mesh(mesh)
    vertices = mesh.vertices.astype(np.float32)
    parts = [f"# {GENERATOR}\n"]
    with_texture = textured(mesh) and material_file is not None
    if with_texture:
        parts.append(f"mtllib {material_file}\n")
    elif mesh.colours is not None:
        import torch

        srgb = linear_to_srgb(torch.from_numpy(mesh.colours.astype(np.float32))).numpy()
        vertices = np.concatenate([vertices, np.round(srgb, 4)], axis=1)
    parts += ["o mesh\n", _lines("v", vertices)]
    if with_texture:
        parts.append(_lines("vt", mesh.uv))
    parts.append(_lines("vn", np.round(mesh.vertex_normals(), 5)))
    corners = mesh.faces.astype(np.int64) + 1
    if with_texture:
        triples = np.stack([corners, mesh.uv_faces.astype(np.int64) + 1, corners], -1).reshape(-1, 9).tolist()
        names, change = material_names(mesh), ""
        of_face = np.zeros(len(triples), int) if mesh.face_materials is None else mesh.face_materials
        for row, name in zip(triples, (names[k] for k in of_face), strict=True):
            if name != change:
                parts.append(f"usemtl {name}\n")
                change = name
            parts.append("f {}/{}/{} {}/{}/{} {}/{}/{}\n".format(*row))
    else:
        pairs = np.stack([corners, corners], -1).reshape(-1, 6).tolist()
        parts += ["f {}//{} {}//{} {}//{}\n".format(*row) for row in pairs]
    return "".join(parts)


def material_names(mesh: Mesh) -> list[str]:
    """Return the names of the mesh's materials as OBJ can say them: without blanks, each of its own."""
    names = ["_".join(material.name.split()) or "material" for material in mesh.materials or ()] or ["material"]
    return [name if names.index(name) == k else f"{name}_{k}" for k, name in enumerate(names)]


def mtl_text(mesh: Mesh, texture_file: str, normal_file: str | None = None) -> str:
    """Return white materials, matt by default, with their colour from the texture and normals from a map, if any.

    `norm`, `Pr` and `Pm` are of the PBR extension to MTL, which has no word for occlusion.
    """
    parts = [f"# {GENERATOR}\n"]
    materials = mesh.materials or (Material("material", mesh.metallic, mesh.roughness),)
    for name, material in zip(material_names(mesh), materials, strict=True):
        rough = ROUGHNESS if material.roughness is None else material.roughness
        metal = METALLIC if material.metallic is None else material.metallic
        parts.append(f"newmtl {name}\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nd 1\nillum 1\n")
        parts.append(f"Pr {rough:g}\nPm {metal:g}\nmap_Kd {texture_file}\n")
        parts.append(f"norm {normal_file}\n" if normal_file else "")
    return "".join(parts)


def write_obj(mesh: Mesh, path: str | Path) -> list[Path]:
    """Write PATH.obj and, with a texture, PATH.mtl and PATH.png (PATH_normal.png) beside it; returns the paths.

    The OBJ comes last, so it never names files that are not there. Blanks in the name become underscores in the side
    files' names, since readers split at blanks.
    """
    path = Path(path)
    if not textured(mesh):
        return [write_whole(path, obj_text(mesh, None).encode())]
    stem = "_".join(path.stem.split())
    material, picture = path.with_name(f"{stem}.mtl"), path.with_name(f"{stem}.png")
    text = obj_text(mesh, material.name).encode()
    write_whole(picture, png_bytes(mesh.texture))
    pictures = [picture]
    if mesh.normal_map is not None:
        pictures.append(write_whole(path.with_name(f"{stem}_normal.png"), png_bytes(mesh.normal_map)))
    write_whole(material, mtl_text(mesh, *(p.name for p in pictures)).encode())
    return [write_whole(path, text), material, *pictures]
