"""Reading users' files: what is refused, and what their colours and texture coordinates become."""

import numpy as np
import pytest
import torch
import trimesh
from mesh_shapes import box, moved, torus
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from pipeline.export.glb import write_glb
from stages.errors import UserError
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.read import GREY, _joined, _parts, read_mesh
from stages.mesh.sample import colours_at

TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
POINTS = (
    "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n0 0 0\n"
)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.glb", b"", ""),
        ("empty.ply", b"", ""),
        ("text.stl", b"hello", "holds no triangles"),
        ("points.ply", POINTS.encode(), "holds no triangles"),
        ("index.obj", (TRIANGLE + "f 1 2 9\n").encode(), "out of bounds"),
        ("nan.obj", b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
        ("huge.obj", b"v 1e300 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
        ("flat.obj", b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "no area"),
        ("lines.obj", (TRIANGLE + "l 1 2\n").encode(), ""),
        ("model.fbx", b"abc", "not supported"),
    ],
)
def test_files_without_a_surface_are_refused_in_three_lines(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="Cannot read the mesh") as caught:
        read_mesh(tmp_path / name)
    assert name in caught.value.what and why in caught.value.why and caught.value.fix


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_mesh(tmp_path / "gone.glb")
    with pytest.raises(UserError, match="a folder"):
        read_mesh(tmp_path)


@pytest.mark.parametrize("suffix", ["obj", "ply", "stl", "glb"])
def test_plain_files_of_every_format_are_grey_and_whole(tmp_path, suffix):
    mesh = torus(n=12, m=8)
    mesh.vertices = np.round(mesh.vertices, 4)  # trimesh writes eight decimals into text
    trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).export(tmp_path / f"mesh.{suffix}")
    back = read_mesh(tmp_path / f"mesh.{suffix}")
    np.testing.assert_array_equal(back.vertices[back.faces], mesh.vertices[mesh.faces])
    assert suffix == "glb" or np.allclose(back.colours, GREY)  # trimesh gives a GLB a material of its own


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


@pytest.mark.parametrize("shift", [0, 3, -2])
def test_coordinates_in_another_tile_show_the_same(tmp_path, shift):
    square(np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) + shift).export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    assert mesh.uv.min() >= 0 and mesh.uv.max() <= 1 and mesh.texture.shape == (64, 64, 3)
    for (x, y), colour in {(0.2, 0.3): [1, 0, 0], (0.7, 0.2): [0, 1, 0], (0.3, 0.8): [0, 0, 1]}.items():
        assert seen(mesh, x, y) == pytest.approx(colour, abs=1e-5)


def test_a_repeating_texture_is_repeated(tmp_path):
    square([[0, 0], [2, 0], [2, 3], [0, 3]]).export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    assert mesh.uv.min() >= 0 and mesh.uv.max() <= 1 and mesh.texture.shape == (192, 128, 3)
    for x in (0, 1):
        for y in range(3):
            assert seen(mesh, (x + 0.25) / 2, (y + 0.25) / 3) == pytest.approx([1, 0, 0], abs=1e-5)
            assert seen(mesh, (x + 0.75) / 2, (y + 0.25) / 3) == pytest.approx([0, 1, 0], abs=1e-5)


def test_coordinates_without_a_texture_are_kept_for_one_to_come(tmp_path):
    (tmp_path / "a.obj").write_text(TRIANGLE + "vt 0.1 0.2\nvt 0.8 0.2\nvt 0.1 0.9\nf 1/1 2/2 3/3\n")
    mesh = read_mesh(tmp_path / "a.obj")
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces[0]], [[0.1, 0.2], [0.8, 0.2], [0.1, 0.9]], atol=1e-6)
    assert mesh.texture is None or (mesh.texture == mesh.texture[0, 0]).all()  # trimesh stands a plain picture in


def test_textured_and_plain_parts_keep_their_colours_together(tmp_path):
    plain = trimesh.Trimesh(moved(box(), (3, 0, 0)).vertices, box().faces, process=False)
    plain.visual = TextureVisuals(material=PBRMaterial(baseColorFactor=[0.0, 0.5, 0.0, 1.0]))
    trimesh.Scene([square([[0, 0], [1, 0], [1, 1], [0, 1]]), plain]).export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    assert mesh.texture is not None and len(mesh.faces) == 14
    far = np.flatnonzero(mesh.vertices[mesh.faces][:, :, 0].mean(1) > 2)
    shown = colours_at(mesh, far, np.full((len(far), 3), 1 / 3))
    torch.testing.assert_close(shown, torch.tensor([0, 0.5, 0]).expand(12, 3), atol=0.02, rtol=0)
    near = np.flatnonzero(mesh.vertices[mesh.faces][:, :, 0].mean(1) < 2)
    shown = colours_at(mesh, near[:1], np.array([[0.8, 0.1, 0.1]]))
    torch.testing.assert_close(shown[0], torch.tensor([1.0, 0, 0]), atol=0.05, rtol=0)


def test_vertex_colours_beside_a_material_are_read(tmp_path):
    """glTF multiplies COLOR_0 by the material's factor; our own GLB files hold both."""
    own, other = torus(n=12, m=8), moved(box(), (3, 0, 0))
    own.colours = np.linspace(0, 1, 3 * len(own.vertices), dtype=np.float32).reshape(-1, 3)
    other.colours = np.full((8, 3), 0.25, np.float32)
    write_glb(own, tmp_path / "own.glb")
    back = read_mesh(tmp_path / "own.glb")
    np.testing.assert_allclose(back.colours[back.faces], own.colours[own.faces], atol=1e-4)
    write_glb(other, tmp_path / "other.glb")
    scene = trimesh.Scene([*(trimesh.load_scene(tmp_path / f).geometry.popitem()[1] for f in ("own.glb", "other.glb"))])
    assert len(scene.geometry) == 2
    both = _joined(_parts(scene), linear=True)
    far = both.vertices[:, 0] > 2
    np.testing.assert_allclose(both.colours[far], 0.25, atol=1e-4)
    assert np.ptp(both.colours[~far]) > 0.9


def test_vertex_colours_of_a_ply_are_srgb(tmp_path):
    colours = np.tile(np.uint8([128, 0, 255]), (8, 1))
    trimesh.Trimesh(box().vertices, box().faces, vertex_colors=colours, process=False).export(tmp_path / "a.ply")
    wanted = srgb_to_linear(torch.tensor([128, 0, 255]) / 255).numpy()
    np.testing.assert_allclose(read_mesh(tmp_path / "a.ply").colours, np.tile(wanted, (8, 1)), atol=1e-6)
