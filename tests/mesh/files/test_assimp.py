"""Our readers beside assimp's: the same triangles at the same places, in OBJ, PLY, STL and glTF of many habits."""

import numpy as np
import pytest

from pipeline.output.glb import glb_bytes
from pipeline.output.ply import ply_bytes
from pipeline.output.stl import stl_bytes
from stages.mesh.files.read import read_mesh
from tests.mesh.mesh_shapes import torus

assimp = pytest.importorskip("assimp_py")

RING = torus(n=12, m=8)
COUNT = len(RING.vertices)


def obj(*, relative=False, blocks=1, slashes=""):
    """The torus in as many blocks of vertices and faces; relative: indices counted back."""
    text = ""
    for block in range(blocks):
        text += "".join(
            "v {} {} {}\n".format(*map(float, row)) for row in RING.vertices + np.float32([3 * block, 0, 0])
        )
        start = -COUNT if relative else 1 + block * COUNT
        for face in RING.faces:
            text += "f " + " ".join(f"{start + k}{slashes}" for k in face) + "\n"
    return text


FILES = {
    "plain.obj": obj().encode(),
    "relative.obj": obj(relative=True, blocks=3).encode(),
    "blocks.obj": obj(blocks=3).encode(),
    "slashes.obj": obj(slashes="//").encode(),
    "tabs.obj": obj().replace(" ", "\t").encode(),
    "blanks.obj": obj().replace(" ", "   ").replace("\n", "  \r\n").encode(),
    "continued.obj": obj().replace("f ", "f \\\n ").encode(),
    "objects.obj": ("o one\ng a b\ns 1\nusemtl nothing\n" + obj()).encode(),
    "binary.ply": ply_bytes(RING),
    "binary.stl": stl_bytes(RING),
    "mesh.glb": glb_bytes(RING),
}


def sorted_triangles(corners):
    """Triangles [F, 3, 3], each begun at its least corner, all in order."""
    keys = np.round(corners.astype(np.float64), 4) + 0.0
    first = np.array([min(range(3), key=lambda k: tuple(triangle[k])) for triangle in keys])
    keys = np.take_along_axis(keys, ((first[:, None] + np.arange(3)) % 3)[..., None], axis=1).reshape(-1, 9)
    return keys[np.lexsort(keys.T)]


@pytest.mark.parametrize("name", FILES)
def test_our_reader_and_assimp_see_the_same_triangles(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    scene = assimp.import_file(str(tmp_path / name), assimp.Process_Triangulate)
    theirs = []
    for part in scene.meshes:
        points = np.array(part.vertices, dtype=np.float32).reshape(-1, 3)
        theirs.append(points[np.array(part.indices).reshape(-1, 3)])
    mesh = read_mesh(tmp_path / name)
    ours = sorted_triangles(mesh.vertices[mesh.faces])
    np.testing.assert_allclose(ours, sorted_triangles(np.concatenate(theirs)), atol=1e-3)
