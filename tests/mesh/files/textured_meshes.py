"""Textured meshes for the tests of reading: squares with a picture, and the colours that they show."""

import numpy as np
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from stages.mesh.sample import colours_at


def square(uv) -> trimesh.Trimesh:
    """The unit square with a texture of four colours: red, green below; blue, white above."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[32:, :32, 0] = picture[32:, 32:, 1] = picture[:32, :32, 2] = 255
    picture[:32, 32:] = 255
    visual = TextureVisuals(uv=np.asarray(uv, float), material=PBRMaterial(baseColorTexture=Image.fromarray(picture)))
    corners = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    return trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)


def seen(mesh, x, y):
    """The colour a textured square shows at (x, y)."""
    for face in range(len(mesh.faces)):
        a, b, c = mesh.vertices[mesh.faces[face]][:, :2].astype(float)
        weights = np.linalg.solve(np.array([[*a, 1], [*b, 1], [*c, 1]]).T, [x, y, 1])
        if (weights > -1e-6).all():
            return colours_at(mesh, np.array([face]), weights[None])[0].tolist()
    raise AssertionError


def shown_at(mesh, place):
    """The colour of the face nearest to a point [3], at the place where it is."""
    corners = mesh.vertices[mesh.faces].astype(float)
    face = np.argmin(np.linalg.norm(corners.mean(1) - place, axis=1))
    weights = np.linalg.lstsq(np.vstack([corners[face].T, np.ones(3)]), [*place, 1], rcond=None)[0]
    return colours_at(mesh, np.array([face]), weights[None])[0].tolist()


def painted(material, uv=((0, 0), (1, 0), (1, 1), (0, 1)), away=0.0) -> trimesh.Trimesh:
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]) + np.array([away, 0, 0])
    visual = TextureVisuals(uv=np.asarray(uv, float), material=material)
    return trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)


CORNERS = [[0, 0], [1, 0], [1, 1], [0, 1]]
WITHIN = [(x, y) for x in (0.2, 0.4, 0.6, 0.8) for y in (0.1, 0.3, 0.7, 0.9)]
