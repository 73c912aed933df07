"""Reading PLY: every order and type against the same box, and files that are not what their headers say."""

import numpy as np
import pytest
from PIL import Image

from stages.errors import UserError
from stages.mesh.files.read import GREY, read_mesh
from stages.mesh.measure import face_areas
from tests.mesh.mesh_shapes import box

ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
XYZ = "property float x\nproperty float y\nproperty float z\n"
SQUARE = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]


def ply(order, elements, comments=()):
    """A PLY file. elements: (name, property lines, rows of (type or None for text's sake, values))."""
    head = ["ply", f"format {order} 1.0", *comments]
    body = b""
    for name, lines, rows in elements:
        head += [f"element {name} {len(rows)}", *lines.strip().splitlines()]
        for row in rows:
            if order == "ascii":
                body += " ".join(f"{v:g}" for _, values in row for v in np.atleast_1d(values)).encode() + b"\n"
            else:
                body += b"".join(np.atleast_1d(v).astype(ORDERS[order] + kind).tobytes() for kind, v in row)
    return "\n".join([*head, "end_header", ""]).encode() + body


def vertices(points, kind="f4"):
    return [[(kind, point)] for point in points]


def faces(polygons, count="u1", index="i4"):
    return [[(count, len(polygon)), (index, polygon)] for polygon in polygons]


LIST = "property list uchar int vertex_indices"


def saved(folder, data):
    (folder / "a.ply").write_bytes(data)
    return folder / "a.ply"


def refusal(folder, data):
    with pytest.raises(UserError) as error:
        read_mesh(saved(folder, data))
    return error.value.why


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_same_box(tmp_path, order):
    mesh = box()
    data = ply(order, [("vertex", XYZ, vertices(mesh.vertices)), ("face", LIST, faces(mesh.faces))])
    back = read_mesh(saved(tmp_path, data))
    np.testing.assert_array_equal(back.vertices, mesh.vertices)
    np.testing.assert_array_equal(back.faces, mesh.faces)


@pytest.mark.parametrize("order", ORDERS)
def test_polygons_of_several_sizes_other_types_and_properties_between_are_read(tmp_path, order):
    points = [[0, 0, 0], [3, 0, 0], [3, 3, 0], [2, 3, 0], [2, 1, 0], [1, 1, 0], [1, 3, 0], [0, 3, 0]]  # a U of area 7
    rows = [[("f8", p), ("u2", 65535), ("u2", 0), ("u2", 0)] for p in points]
    kinds = XYZ.replace("float", "double") + "property ushort red\nproperty ushort green\nproperty ushort blue\n"
    polygons = [
        [("i2", 7), ("u4", len(p)), ("u2", p), ("f4", 0.5)] for p in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2], [0, 2, 1, 7])
    ]
    lines = "property short group\nproperty list uint ushort vertex_index\nproperty float quality\n"
    mesh = read_mesh(saved(tmp_path, ply(order, [("vertex", kinds, rows), ("face", lines, polygons)])))
    assert len(mesh.faces) == 6 + 1 + 2
    assert face_areas(mesh.vertices, mesh.faces[:6]).sum() == pytest.approx(7)
    np.testing.assert_allclose(mesh.colours, np.tile([1, 0, 0], (8, 1)), atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_strips_are_read_with_their_restarts(tmp_path, order):
    strip = "property list int int vertex_indices"
    data = ply(
        order, [("vertex", XYZ, vertices(SQUARE)), ("tristrips", strip, faces([[0, 1, 3, 2, -1, 0, 1, 2]], "i4"))]
    )
    assert read_mesh(saved(tmp_path, data)).faces.tolist() == [[0, 1, 3], [3, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("least", [1, 40])
def test_a_body_that_is_cut_off_is_refused_with_both_numbers(tmp_path, order, least):
    mesh = box()
    data = ply(order, [("vertex", XYZ, vertices(mesh.vertices)), ("face", LIST, faces(mesh.faces))])
    cut = data.rstrip(b"\n")[:-least] if least > 1 or order else data.rstrip(b"\n").rsplit(None, 1)[0]
    if order == "ascii":
        cut = b" ".join([data[: data.index(b"end_header") + 11], *data.split(b"end_header\n")[1].split()[:-least]])
    why = refusal(tmp_path, cut)
    assert "promises 12 faces" in why and "ends after" in why


@pytest.mark.parametrize("order", ORDERS)
def test_a_body_that_goes_on_is_refused(tmp_path, order):
    mesh = box()
    data = ply(order, [("vertex", XYZ, vertices(mesh.vertices)), ("face", LIST, faces(mesh.faces))])
    read_mesh(saved(tmp_path, data + b"\n"))
    assert "3 more follow" in refusal(tmp_path, data + (b"1 2 3\n" if order == "ascii" else b"\0\0\0"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("element vertex 8", "element vertex 9"), "promises"),
        (("element vertex 8", "element vertex many"), "is not PLY"),
        (("end_header", "the_end"), "no end"),
        (("property float x", "property real x"), "is not PLY"),
        (("property float x", "property float a"), "no vertices with x, y and z"),
        (("format ascii 1.0\n", ""), "does not say a format"),
    ],
)
def test_headers_that_are_wrong_are_refused(tmp_path, change, why):
    mesh = box()
    data = ply("ascii", [("vertex", XYZ, vertices(mesh.vertices)), ("face", LIST, faces(mesh.faces))])
    assert why in refusal(tmp_path, data.replace(*(word.encode() for word in change)))


def test_indices_out_of_bounds_are_refused(tmp_path):
    data = ply("ascii", [("vertex", XYZ, vertices(SQUARE)), ("face", LIST, faces([[0, 1, 4]]))])
    assert "vertex 4, out of bounds: there are 4" in refusal(tmp_path, data)


def test_other_elements_are_said(tmp_path, caplog):
    edge = "property int vertex1\nproperty int vertex2\n"
    parts = [("vertex", XYZ, vertices(SQUARE)), ("edge", edge, [[("i4", [0, 1])]]), ("face", LIST, faces([[0, 1, 2]]))]
    mesh = read_mesh(saved(tmp_path, ply("binary_little_endian", parts)))
    assert len(mesh.faces) == 1 and (mesh.colours == np.float32(GREY)).all()
    assert "1 rows of edge are left out" in caplog.text


@pytest.mark.parametrize("by_corner", [False, True])
def test_a_named_picture_is_read(tmp_path, caplog, by_corner):
    uv = [[0, 0], [1, 0], [1, 1], [0, 1]]
    if by_corner:
        face = [[("u1", 4), ("i4", [0, 1, 2, 3]), ("u1", 8), ("f4", np.ravel(uv))]]
        lines = LIST + "\nproperty list uchar float texcoord"
        parts = [("vertex", XYZ, vertices(SQUARE)), ("face", lines, face)]
    else:
        rows = [[("f4", [*p, *t])] for p, t in zip(SQUARE, uv)]
        parts = [("vertex", XYZ + "property float s\nproperty float t\n", rows), ("face", LIST, faces([[0, 1, 2, 3]]))]
    path = saved(tmp_path, ply("ascii", parts, ["comment TextureFile my picture.png"]))
    assert read_mesh(path).texture is None and "my picture.png is left out: there is no such file" in caplog.text
    Image.new("RGB", (2, 2), (9, 8, 7)).save(tmp_path / "my picture.png")
    mesh = read_mesh(path)
    assert (mesh.texture == [9, 8, 7]).all()
    np.testing.assert_array_equal(mesh.uv[mesh.uv_faces], np.array(uv)[[[0, 1, 2], [0, 2, 3]]])


def test_colours_of_faces_become_those_of_their_vertices(tmp_path):
    rows = [[*row, ("u1", [255, 0, 0])] for row in faces([[0, 1, 2]])]
    lines = LIST + "".join(f"\nproperty uchar {k}" for k in ("red", "green", "blue"))
    mesh = read_mesh(saved(tmp_path, ply("ascii", [("vertex", XYZ, vertices(SQUARE[:3])), ("face", lines, rows)])))
    np.testing.assert_allclose(mesh.colours, np.tile([1, 0, 0], (3, 1)), atol=1e-6)


@pytest.mark.parametrize("number", [-1, 2])
def test_a_face_may_name_a_picture_that_is_not_there(tmp_path, number):
    Image.new("RGB", (2, 2), (9, 8, 7)).save(tmp_path / "a.png")
    face = [[("u1", 3), ("i4", [0, 1, 2]), ("u1", 6), ("f4", [0, 0, 1, 0, 1, 1]), ("i4", n)] for n in (0, number)]
    lines = LIST + "\nproperty list uchar float texcoord\nproperty int texnumber"
    data = ply("ascii", [("vertex", XYZ, vertices(SQUARE)), ("face", lines, face)], ["comment TextureFile a.png"])
    mesh = read_mesh(saved(tmp_path, data))
    assert len(mesh.faces) == 2 and mesh.texture is not None
    texels = mesh.texture.reshape(-1, 3).tolist()
    assert [9, 8, 7] in texels and any(texel != [9, 8, 7] and any(texel) for texel in texels)  # one of them is grey


def test_a_header_without_elements_is_refused(tmp_path):
    assert "no vertices with x, y and z" in refusal(tmp_path, b"ply\nformat ascii 1.0\nend_header\n0 0 0\n")
