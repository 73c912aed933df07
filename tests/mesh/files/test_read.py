"""Reading users' files: what is refused, and what their colours and texture coordinates become."""

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from pipeline.output.glb import write_glb
from stages.errors import UserError
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.files.join import LARGEST, side_by_side
from stages.mesh.files.read import GREY, _joined, _parts, read_mesh
from stages.mesh.sample import _looked_up, colours_at
from tests.mesh.files.textured_meshes import CORNERS, painted, seen, shown_at, square
from tests.mesh.mesh_shapes import box, moved, torus

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
    with pytest.raises(UserError, match="Cannot read the mesh") as error:
        read_mesh(tmp_path / name)
    assert name in error.value.what and why in error.value.why and error.value.fix


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
    colours = colours_at(mesh, far, np.full((len(far), 3), 1 / 3))
    torch.testing.assert_close(colours, torch.tensor([0, 0.5, 0]).expand(12, 3), atol=0.02, rtol=0)
    near = np.flatnonzero(mesh.vertices[mesh.faces][:, :, 0].mean(1) < 2)
    colours = colours_at(mesh, near[:1], np.array([[0.8, 0.1, 0.1]]))
    torch.testing.assert_close(colours[0], torch.tensor([1.0, 0, 0]), atol=0.05, rtol=0)


def test_vertex_colours_beside_a_material_are_read(tmp_path):
    """glTF multiplies COLOR_0 by the material's factor; our own GLB files hold both."""
    ring, other = torus(n=12, m=8), moved(box(), (3, 0, 0))
    ring.colours = np.linspace(0, 1, 3 * len(ring.vertices), dtype=np.float32).reshape(-1, 3)
    other.colours = np.full((8, 3), 0.25, np.float32)
    write_glb(ring, tmp_path / "own.glb")
    back = read_mesh(tmp_path / "own.glb")
    np.testing.assert_allclose(back.colours[back.faces], ring.colours[ring.faces], atol=1e-4)
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
    expected = srgb_to_linear(torch.tensor([128, 0, 255]) / 255).numpy()
    np.testing.assert_allclose(read_mesh(tmp_path / "a.ply").colours, np.tile(expected, (8, 1)), atol=1e-6)


MTL = """newmtl picture\nKd 1 1 1\nmap_Kd picture.png\nnewmtl plain\nKd 0 1 0\n"""
OBJ = (
    "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 5 0 0\nv 6 0 0\nv 5 1 0\nvt 0 0\nvt 1 0\nvt 0 1\n"
    "usemtl picture\nf 1/1 2/2 3/3\nusemtl plain\nf 4 5 6\n"
)


def test_an_obj_with_a_picture_and_a_plain_material_keeps_both(tmp_path):
    """What Blender writes; trimesh's own packing of two kinds of material ends in grey."""
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "picture.png")
    (tmp_path / "a.mtl").write_text(MTL)
    (tmp_path / "a.obj").write_text(OBJ)
    mesh = read_mesh(tmp_path / "a.obj")
    assert shown_at(mesh, [0.3, 0.3, 0]) == pytest.approx([1, 0, 0], abs=0.01)
    assert shown_at(mesh, [5.3, 0.3, 0]) == pytest.approx([0, 1, 0], abs=0.01)


def test_factors_masks_and_tiles_of_several_textures_survive_the_joining(tmp_path):
    brown = Image.new("RGB", (16, 16), (200, 100, 50))
    stated = PBRMaterial(baseColorTexture=brown, baseColorFactor=[255, 255, 255, 255])
    mask = PBRMaterial(baseColorTexture=Image.new("RGB", (16, 8), (0, 0, 255)), alphaMode="MASK")
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, :16] = 255
    repeat = PBRMaterial(baseColorTexture=Image.fromarray(stripes))
    parts = [painted(stated), painted(mask, away=5), painted(repeat, [[0, 0], [4, 0], [4, 4], [0, 4]], away=10)]
    trimesh.Scene(parts).export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    expected = srgb_to_linear(torch.tensor([200, 100, 50]) / 255).tolist()
    assert shown_at(mesh, [0.7, 0.2, 0]) == pytest.approx(expected, abs=0.01)
    assert shown_at(mesh, [5.7, 0.2, 0]) == pytest.approx([0, 0, 1], abs=0.01)
    for k in range(4):
        assert shown_at(mesh, [10 + (k + 0.25) / 4, 0.05, 0]) == pytest.approx([1, 1, 1], abs=0.01)
        assert shown_at(mesh, [10 + (k + 0.75) / 4, 0.05, 0]) == pytest.approx([0, 0, 0], abs=0.01)


def test_parts_that_share_a_picture_share_its_place(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 16, 3), dtype=np.uint8))
    parts = [painted(PBRMaterial(baseColorTexture=picture), away=2.0 * k) for k in range(5)]
    trimesh.Scene(parts).export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    assert mesh.texture.size < 2 * 32 * 16 * 3 and len(np.unique(mesh.uv, axis=0)) == 4


@pytest.mark.parametrize("side", [64, pytest.param(3000, marks=pytest.mark.slow)])
def test_every_picture_is_found_in_its_place_however_many_there_are(side):
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, side, (12, 2)).tolist()
    pictures = [np.full((*size, 3), rng.integers(1, 255, 3), np.uint8) for size in sizes]
    whole, places = side_by_side(pictures)
    assert max(whole.shape) <= LARGEST
    for picture, (offset, scale) in zip(pictures, places, strict=True):
        for corner in ([0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5]):
            u, v = np.asarray(corner) * scale + offset
            row, column = round((1 - v) * whole.shape[0]), round(u * whole.shape[1])
            for dr, dc in ((-1, -1), (-1, 0), (0, -1), (0, 0)):  # what a bilinear look-up touches, at the very corner
                assert (whole[row + dr, column + dc] == picture[0, 0]).all()


def test_a_nearly_black_material_stays_nearly_black(tmp_path):
    """0.004 is stored as a byte of 1, which is no factor of 1."""
    plain = trimesh.Trimesh(box().vertices, box().faces, process=False)
    plain.visual = TextureVisuals(material=PBRMaterial(baseColorFactor=[0.004, 0.004, 0.004, 1.0]))
    plain.export(tmp_path / "a.glb")
    assert read_mesh(tmp_path / "a.glb").colours.max() < 0.01


def test_a_mesh_too_far_from_the_origin_for_its_numbers_is_refused(tmp_path):
    for north, fits in ((50.0, True), (5.4e6, False)):
        lines = [f"v {x} {y + north} 0" for x, y in ((0, 0), (10, 0), (0, 10))]
        (tmp_path / "a.obj").write_text("\n".join(lines) + "\nf 1 2 3\n")
        if fits:
            read_mesh(tmp_path / "a.obj")
            continue
        with pytest.raises(UserError, match="single precision") as error:
            read_mesh(tmp_path / "a.obj")
        assert "origin" in error.value.fix


def test_a_picture_of_sixteen_bits_keeps_its_grey(tmp_path):
    grey = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    visual = TextureVisuals(uv=np.array(CORNERS, float), material=PBRMaterial(baseColorTexture=grey))
    corners = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    part = trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)
    assert (_joined([(part, None)], linear=True).texture == 127).all()


def test_parts_that_share_a_picture_hold_it_once(tmp_path):
    scene = trimesh.Scene()
    first = square(CORNERS)
    for k in range(5):
        part = first.copy()
        part.visual.material = first.visual.material
        part.apply_translation([2 * k, 0, 0])
        scene.add_geometry(part)
    scene.export(tmp_path / "a.glb")
    parts = _parts(trimesh.load_scene(str(tmp_path / "a.glb"), process=False))
    assert len({id(part.visual.material.baseColorTexture) for part, _ in parts}) == 1
    mesh = read_mesh(tmp_path / "a.glb")
    assert len(mesh.faces) == 10 and mesh.texture.shape[0] < 2 * 64


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 9)])
def test_look_ups_are_bilinear_and_clamped_at_the_border(shape):
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    uv = rng.uniform(-0.2, 1.2, (200, 2))
    picture = srgb_to_linear(torch.from_numpy(texture / 255.0)).permute(2, 0, 1)[None]
    grid = torch.from_numpy(np.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1]], -1))[None, None]
    expected = torch.nn.functional.grid_sample(picture, grid, padding_mode="border", align_corners=False)[0, :, 0].T
    torch.testing.assert_close(_looked_up(texture, uv), expected.float(), atol=1e-5, rtol=0)
