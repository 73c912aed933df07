"""OBJ files: concave polygons by ear clipping, against areas by hand and by the shoelace formula; lost pictures."""

import logging

import numpy as np
import pytest
from PIL import Image

from stages.mesh.files.obj import ears, plain_obj
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


def test_convex_files_are_left_to_the_reader(tmp_path):
    path = tmp_path / "a.obj"
    path.write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\nf -4 -3 -2\n")
    assert plain_obj(path) is None


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
