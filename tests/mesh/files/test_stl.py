"""Reading STL: binary and text, whole or refused with numbers."""

import struct

import numpy as np
import pytest

from pipeline.output.stl import stl_bytes
from stages.errors import UserError
from stages.mesh.files.read import read_mesh
from tests.mesh.mesh_shapes import box, torus


def text(mesh, name="thing"):
    rows = [f"solid {name}"]
    for normal, corners in zip(mesh.face_normals(), mesh.vertices[mesh.faces]):
        rows += ["facet normal {} {} {}".format(*normal), "  outer loop"]
        rows += ["    vertex {!r} {!r} {!r}".format(*map(float, corner)) for corner in corners]
        rows += ["  endloop", "endfacet"]
    return "\n".join([*rows, f"endsolid {name}", ""])


def refusal(path):
    with pytest.raises(UserError) as error:
        read_mesh(path)
    return error.value.why


def test_text_and_binary_give_the_same_triangles(tmp_path):
    mesh = torus(n=12, m=8)
    (tmp_path / "a.stl").write_bytes(stl_bytes(mesh))
    (tmp_path / "b.stl").write_text(text(mesh))
    (tmp_path / "c.stl").write_bytes(text(mesh).upper().replace("\n", "\r\n").encode())
    (tmp_path / "d.stl").write_bytes(b"solid but binary".ljust(80) + stl_bytes(mesh)[80:])
    for name in "abcd":
        back = read_mesh(tmp_path / f"{name}.stl")
        np.testing.assert_array_equal(back.vertices[back.faces], mesh.vertices[mesh.faces])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused_with_both_numbers(tmp_path, share):
    data = stl_bytes(box())
    (tmp_path / "a.stl").write_bytes(data[: int(84 + share * (len(data) - 84))])
    why = refusal(tmp_path / "a.stl")
    assert "promises 12 triangles" in why and f"holds {int(12 * share)}" in why
    content = text(box())
    (tmp_path / "b.stl").write_text(content[: int(share * len(content))])
    assert "cut off" in refusal(tmp_path / "b.stl")


def test_more_than_the_header_says_is_refused_with_both_numbers(tmp_path):
    (tmp_path / "a.stl").write_bytes(stl_bytes(box()) + bytes(100))
    why = refusal(tmp_path / "a.stl")
    assert "promises 12 triangles" in why and "100 bytes more" in why


def test_facets_of_four_corners_are_cut_and_of_two_refused(tmp_path, caplog):
    facet = "solid a\nfacet normal 0 0 1\nouter loop\n{}endloop\nendfacet\nendsolid\n"
    square = "".join(f"vertex {x} {y} 0\n" for x, y in ((0, 0), (1, 0), (1, 1), (0, 1)))
    (tmp_path / "a.stl").write_text(facet.format(square))
    assert len(read_mesh(tmp_path / "a.stl").faces) == 2 and "more than three" in caplog.text
    (tmp_path / "a.stl").write_text(facet.format("".join(square.splitlines(True)[:2])))
    assert "facet 1 has 2 corners, wanted 3" in refusal(tmp_path / "a.stl")


def test_colours_and_turned_normals_are_said(tmp_path, caplog):
    data = bytearray(stl_bytes(box()))
    data[84 + 48 : 84 + 50] = struct.pack("<H", 0x801F)
    (tmp_path / "a.stl").write_bytes(data)
    read_mesh(tmp_path / "a.stl")
    assert "attribute bytes are left out" in caplog.text
    mesh = box()
    mesh.faces = mesh.faces[:, ::-1]
    turned = bytearray(stl_bytes(mesh))
    for k in range(12):
        turned[84 + 50 * k : 84 + 50 * k + 12] = data[84 + 50 * k : 84 + 50 * k + 12]
    (tmp_path / "a.stl").write_bytes(turned)
    read_mesh(tmp_path / "a.stl")
    assert "normals point away" in caplog.text
