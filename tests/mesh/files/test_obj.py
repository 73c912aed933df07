"""OBJ and MTL files by the text of their formats; concave polygons against areas by hand and the shoelace formula."""

import logging

import numpy as np
import pytest
from PIL import Image

from stages.errors import UserError
from stages.mesh.files.polygons import ears
from stages.mesh.files.read import read_mesh
from stages.mesh.measure import face_areas, measure

U = np.array([[0, 0], [3, 0], [3, 3], [2, 3], [2, 1], [1, 1], [1, 3], [0, 3]], float)  # area 7


def shoelace(polygon):
    x, y = polygon.T
    return 0.5 * (x * np.roll(y, -1) - y * np.roll(x, -1)).sum()


def signed_areas(polygon, triangles):
    a, b, c = polygon[np.array(triangles)].swapaxes(0, 1)
    return 0.5 * ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])


def prism(start):
    """A U-shaped prism, 1 high, its caps polygons of eight corners beginning at any of them; area 7 + 7 + 16."""
    n = len(U)
    lines = [f"v {x} 0 {-y}" for x, y in U] + [f"v {x} 1 {-y}" for x, y in U]
    ring = np.roll(np.arange(n), -start)
    lines.append("f " + " ".join(str(n + k + 1) for k in ring))
    lines.append("f " + " ".join(str(k + 1) for k in ring[::-1]))
    for k in range(n):
        after = (k + 1) % n
        lines.append(f"f {k + 1} {after + 1} {n + after + 1} {n + k + 1}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("start", range(8))
def test_a_concave_cap_keeps_its_notch_wherever_it_begins(tmp_path, start):
    (tmp_path / "a.obj").write_text(prism(start))
    mesh = read_mesh(tmp_path / "a.obj")
    assert face_areas(mesh.vertices, mesh.faces).sum() == pytest.approx(30, abs=1e-5)
    report = measure(mesh)
    assert report.volume == pytest.approx(7, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_ears_of_a_star_cover_it_once(seed):
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.random(40)) * 2 * np.pi
    star = rng.uniform(0.1, 1, 40)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    triangles = ears(star)
    areas = signed_areas(star, triangles)
    assert len(triangles) == 38 and (areas > 0).all()
    assert areas.sum() == pytest.approx(shoelace(star))


def test_corners_in_line_and_polygons_that_cross_themselves_end():
    square = np.array([[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [0, 2]], float)
    assert signed_areas(square, ears(square)).sum() == pytest.approx(4)
    bow = np.array([[0, 0], [1, 1], [1, 0], [0, 1], [-1, 0.5]], float)
    assert len(ears(bow)) == 3
    assert len(ears(np.zeros((6, 2)))) == 4


def test_convex_polygons_become_fans(tmp_path):
    path = tmp_path / "a.obj"
    path.write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\nf -4 -3 -2\n")
    assert read_mesh(path).faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 2]]


def test_texture_coordinates_and_negative_numbers_stay_with_their_corners(tmp_path):
    lines = [f"v {x} {y} 0" for x, y in U] + [f"vt {x / 4} {y / 4}" for x, y in U]
    lines.append("f " + " ".join(f"{k - 8}/{k - 8}" for k in range(8)))
    (tmp_path / "a.obj").write_text("\n".join(lines[:-1]) + "\n" + lines[-1].replace(" -4/-4 ", " -4/-4 \\\n") + "\n")
    mesh = read_mesh(tmp_path / "a.obj")
    assert face_areas(mesh.vertices, mesh.faces).sum() == pytest.approx(7)
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces], mesh.vertices[mesh.faces][..., :2] / 4, atol=1e-6)


def test_lost_pictures_and_libraries_are_named(tmp_path, caplog):
    body = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl red\nf 1/1 2/2 3/3\n"
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + body)
    with caplog.at_level(logging.WARNING):
        read_mesh(tmp_path / "a.obj")
        assert "a.mtl is not there" in caplog.text
        caplog.clear()
        (tmp_path / "a.mtl").write_text("newmtl blue\nmap_Kd unused.png\nnewmtl red\nmap_Kd -s 1 1 1 my.png\n")
        read_mesh(tmp_path / "a.obj")
        assert "my.png" in caplog.text and "unused" not in caplog.text
        caplog.clear()
        Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "my.png")
        read_mesh(tmp_path / "a.obj")
        assert not caplog.records


TETRA = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
FACES = [(1, 3, 2), (1, 2, 4), (1, 4, 3), (2, 3, 4)]


def tetra(x=0.0, relative=False):
    """The lines of a tetrahedron of volume 1/6 at x, its faces counted from 1 or back from the last vertex."""
    lines = [f"v {x + a} {b} {c}" for a, b, c in TETRA]
    return lines + ["f " + " ".join(str(k - 5 if relative else k) for k in face) for face in FACES]


def corners(path):
    mesh = read_mesh(path)
    return mesh.vertices[mesh.faces]


def test_relative_indices_count_back_from_where_the_face_stands(tmp_path):
    (tmp_path / "a.obj").write_text("\n".join(tetra(relative=True) + tetra(3, relative=True) + tetra(9, True)))
    mesh = read_mesh(tmp_path / "a.obj")
    assert measure(mesh).volume == pytest.approx(0.5) and measure(mesh).components == 3
    assert mesh.vertices[:, 0].min() == 0 and mesh.vertices[:, 0].max() == 10


def test_relative_coordinates_and_normals_have_counts_of_their_own(tmp_path):
    lines = [f"v {a} {b} {c}" for a, b, c in TETRA]
    for k, face in enumerate(FACES):
        lines += [f"vt 0 {k / 4}", f"vt 1 {k / 4}", f"vn 0 0 {k + 1}"]
        lines.append("f " + " ".join(f"{v}/{-1 - (n == 2)}/-1" for n, v in enumerate(face)))
    (tmp_path / "a.obj").write_text("\n".join(lines))
    mesh = read_mesh(tmp_path / "a.obj")
    np.testing.assert_allclose(
        mesh.uv[mesh.uv_faces], [[[1, k / 4], [1, k / 4], [0, k / 4]] for k in range(4)], atol=1e-6
    )
    assert (mesh.normals == [0, 0, 1]).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(" ", "\t"),
        lambda text: "".join(f"  \t{line}\n" for line in text.splitlines()),
        lambda text: "".join(f"{line} # of {n}\n" for n, line in enumerate(text.splitlines())),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.replace(" 0 0\n", " \\\n  0 \\ \r\n 0\n"),
        lambda text: text.replace("\n", " 1.0\n", 4),
        lambda text: "#\\\n\n" + text.replace("f ", "fo "),
        lambda text: text.rstrip(),
    ],
)
def test_blanks_comments_line_ends_and_continuations_change_nothing(tmp_path, change):
    text = "\n".join(tetra()) + "\n"
    (tmp_path / "a.obj").write_text(text)
    (tmp_path / "b.obj").write_bytes(change(text).encode())
    np.testing.assert_array_equal(corners(tmp_path / "b.obj"), corners(tmp_path / "a.obj"))


@pytest.mark.parametrize("code", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_hides_no_vertex(tmp_path, code):
    (tmp_path / "a.obj").write_bytes("\n".join(tetra() + tetra(3)).encode(code))
    assert measure(read_mesh(tmp_path / "a.obj")).volume == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["f 1 2 0"], "line 9: it has the index 0"),
        (["f 1 2 5"], "line 9: the index 5 is out of bounds, there are 4 vertices"),
        (["f 1 2 -5"], "line 9: the index -5 is out of bounds, there are 4 vertices"),
        (["f 1 2 x"], "line 9: the face 1 2 x is not made of indices"),
        (["v 1 2"], "line 9: v has 2 numbers, wanted 3"),
        (["v 1,0 2,0 3,0"], "line 9: 1,0 2,0 3,0 are not all numbers"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path, lines, why):
    (tmp_path / "a.obj").write_text("\n".join(tetra() + lines))
    with pytest.raises(UserError) as error:
        read_mesh(tmp_path / "a.obj")
    assert why in error.value.why


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["l 1 2", "p 3"], "1 lines are left out"),
        (["f 1 2"], "1 faces of fewer than three corners are left out"),
        (["surf 0 1 0 1 1 2 3 4"], "1 curved surfaces are left out"),
        (["hello", "world"], "2 lines are no OBJ (the first is 9)"),
        (["v 1 1 1 0.5"], "weights"),
        (["f 1/7 2/8 3/9"], "there are 0 texture coordinates"),
    ],
)
def test_what_is_left_out_is_said(tmp_path, caplog, lines, message):
    (tmp_path / "a.obj").write_text("\n".join(tetra() + lines))
    read_mesh(tmp_path / "a.obj")
    assert message in caplog.text


def test_colours_of_some_vertices_are_kept_and_the_others_white(tmp_path, caplog):
    lines = tetra()
    lines[0], lines[1] = lines[0] + " 1 0 0", lines[1] + " 0 1 0"
    (tmp_path / "a.obj").write_text("\n".join(lines))
    mesh = read_mesh(tmp_path / "a.obj")
    order = [mesh.vertices.tolist().index(list(map(float, place))) for place in TETRA]
    np.testing.assert_allclose(mesh.colours[order], [[1, 0, 0], [0, 1, 0], [1, 1, 1], [1, 1, 1]], atol=1e-6)
    assert "2 of 4 vertices have no colour" in caplog.text


def test_vertex_colours_are_tinted_by_a_plain_material(tmp_path):
    lines = [line + " 1 1 0" * line.startswith("v") for line in tetra()]
    (tmp_path / "a.obj").write_text("\n".join(["mtllib a.mtl", "usemtl red", *lines]))
    (tmp_path / "a.mtl").write_text("newmtl red\nKd 1 0 0\nPm 0.25\nPr 0.5\n")
    mesh = read_mesh(tmp_path / "a.obj")
    np.testing.assert_allclose(mesh.colours, np.tile([1, 0, 0], (4, 1)), atol=1e-6)
    assert (mesh.metallic, mesh.roughness) == (0.25, 0.5)


SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"


def painted(folder, statement, material='newmtl "of # two words"\n', picture="a b.png"):
    """A square whose material has the statement; its picture is red on the left and blue on the right."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4, 0] = pixels[:, 4:, 2] = 255
    (folder / picture).parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / picture)
    (folder / "my lib.mtl").write_text(material + statement + "\n")
    name = material.split(None, 1)[1].strip()
    (folder / "a.obj").write_text(f"mtllib my lib.mtl\n{SQUARE}usemtl {name}\nf 1/1 2/2 3/3 4/4\n")
    return read_mesh(folder / "a.obj")


@pytest.mark.parametrize(
    "statement",
    [
        "map_Kd a b.png",
        '  map_Kd\t"a b.png"',
        "map_kd -blendu on -s 1 1 1 -o 0 0 -mm 0 1 -texres 64 a b.png",
        "map_Kd -clamp on A B.PNG",
        "map_Kd C:\\work\\a b.png",
        "map_Kd a b.png -s 1 1 1",
        "map_Kd \\\n a b.png",
    ],
)
def test_pictures_are_found_behind_options_quotes_and_foreign_folders(tmp_path, caplog, statement):
    mesh = painted(tmp_path, statement)
    assert mesh.texture[0, 0].tolist() == [255, 0, 0] and mesh.texture[0, -1].tolist() == [0, 0, 255]
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces[0]], [[0, 0], [1, 0], [1, 1]])
    assert not caplog.records


def test_a_picture_in_a_folder_named_with_backslashes_is_found(tmp_path):
    assert painted(tmp_path, "map_Kd .\\pictures\\a.png", picture="pictures/a.png").texture is not None


def test_scale_and_offset_move_the_coordinates(tmp_path):
    mesh = painted(tmp_path, "map_Kd -s 0.5 1 -o 0.25 0 0 a b.png")
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces[0]], [[0.25, 0], [0.75, 0], [0.75, 1]])


def test_a_clamped_picture_goes_on_with_its_border(tmp_path):
    mesh = painted(tmp_path, "map_Kd -clamp on -s 2 1 -o -1 0 a b.png")  # u from -1 to 1: red, then the picture
    u = mesh.uv[mesh.uv_faces].reshape(-1, 2)[:, 0]
    assert u.min() == 0 and u.max() == 1 and mesh.texture.shape == (8, 16, 3)
    assert (mesh.texture[:, :12] == [255, 0, 0]).all() and (mesh.texture[:, 12:] == [0, 0, 255]).all()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("map_Kd -mm 0.1 2 a b.png", "-mm of the picture"),
        ("map_Kd a b.png\nd 0.5", "transparency is left out"),
        ("map_Kd a b.png\nKd spectral x.rfl", "kd spectral x.rfl is not read"),
    ],
)
def test_what_a_material_says_in_vain_is_said(tmp_path, caplog, statement, message):
    assert painted(tmp_path, statement).texture is not None
    assert message in caplog.text


def test_the_first_of_several_libraries_that_has_a_material_gives_it(tmp_path):
    (tmp_path / "a.mtl").write_text("newmtl other\nKd 0 1 0\n")
    (tmp_path / "b.mtl").write_text("newmtl mine\nKd 1 0 0\nnewmtl other\nKd 0 0 1\n")
    for libraries in ("mtllib a.mtl b.mtl", "mtllib a.mtl\nmtllib b.mtl", 'mtllib "a.mtl" "b.mtl"'):
        (tmp_path / "c.obj").write_text(
            "\n".join([libraries, "usemtl mine", *tetra(), "usemtl other", *tetra(3, True)])
        )
        mesh = read_mesh(tmp_path / "c.obj")
        colours = mesh.colours[mesh.faces]
        assert (colours[:4] == [1, 0, 0]).all() and (colours[4:] == [0, 1, 0]).all()


def test_a_material_of_no_library_is_named(tmp_path, caplog):
    (tmp_path / "a.mtl").write_text("newmtl other\nKd 0 1 0\n")
    (tmp_path / "a.obj").write_text("\n".join(["mtllib a.mtl", "usemtl mine", *tetra()]))
    read_mesh(tmp_path / "a.obj")
    assert "the material mine is in no library" in caplog.text


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("number", ["1e999", "nan", "-1e39"])
def test_a_polygon_with_a_corner_that_is_no_point_is_refused(tmp_path, number):
    (tmp_path / "a.obj").write_text(prism(0).replace("v 3.0 0 -3.0", f"v 3 {number} -3"))
    assert number in (tmp_path / "a.obj").read_text()
    with pytest.raises(UserError, match="coordinates that are not finite"):
        read_mesh(tmp_path / "a.obj")
