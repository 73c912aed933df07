"""A user's mesh in the scene and back: by hand, and to the bit."""

import numpy as np
import pytest

from stages.errors import UserError
from stages.mesh.place import PlaceSettings, place, upright, without_far_specks
from tests.mesh.mesh_shapes import box, join, make, moved, sphere, tetrahedron, torus


def test_a_mesh_is_centred_on_its_box_and_scaled_to_the_radius():
    mesh = moved(box((2, 4, 4)), (10, 20, 30))
    placed, placement = place(mesh, PlaceSettings(radius=0.6))
    assert np.allclose(placed.vertices.min(0), [-0.2, -0.4, -0.4]) and np.allclose(
        placed.vertices.max(0), [0.2, 0.4, 0.4]
    )
    assert placement.scale == pytest.approx(0.2) and placement.centre.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(placement.original, mesh.vertices)
    np.testing.assert_allclose(placement.out_of_scene(placed.vertices), mesh.vertices, atol=1e-5)


def test_unused_vertices_do_not_count():
    mesh = make([[-1, 0, 0], [1, 0, 0], [0, 1, 0], [500, 0, 0]], [[0, 1, 2]])
    placed, _ = place(mesh, PlaceSettings())
    assert np.linalg.norm(placed.vertices[:3], axis=1).max() == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("up", "axis", "expected"),
    [
        ("z", [0, 0, 1], [0, 1, 0]),
        ("z", [0, -1, 0], [0, 0, 1]),  # Blender's front becomes ours
        ("-z", [0, 0, -1], [0, 1, 0]),
        ("x", [1, 0, 0], [0, 1, 0]),
        ("-x", [-1, 0, 0], [0, 1, 0]),
        ("-y", [0, -1, 0], [0, 1, 0]),
        ("y", [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
    ],
)
def test_the_axis_that_points_up_becomes_y(up, axis, expected):
    turned = upright(make([axis, [0, 0, 0], [1, 1, 1]], [[0, 1, 2]]), up)
    np.testing.assert_array_equal(turned.vertices[0], np.float32(expected))


@pytest.mark.parametrize("up", ["x", "-x", "y", "-y", "z", "-z"])
def test_turning_upright_is_a_rotation_and_keeps_bits(up):
    mesh = torus(n=12, m=8)
    turned = upright(mesh, up)
    assert turned.signed_volume() == pytest.approx(mesh.signed_volume(), rel=1e-5)
    assert np.array_equal(np.sort(np.abs(turned.vertices), 1), np.sort(np.abs(mesh.vertices), 1))


def test_yaw_turns_the_front_and_comes_back():
    mesh = make([[2, 0, 0], [0, 1, 0], [0, 0, 0]], [[0, 1, 2]])
    placed, placement = place(mesh, PlaceSettings(yaw_deg=-90))
    across = placed.vertices[0] - placed.vertices[2]
    assert np.allclose(across / np.linalg.norm(across), [0, 0, 1], atol=1e-6)  # what looked along +x looks along +z
    np.testing.assert_allclose(placement.out_of_scene(placed.vertices), mesh.vertices, atol=1e-6)


def test_the_settings_overrule_the_formats_axis_and_may_keep_the_place():
    mesh = moved(box(), (0.1, 0, 0), 0.5)
    result, placement = place(mesh, PlaceSettings(up="y", radius=None), up="z")
    np.testing.assert_array_equal(result.vertices, mesh.vertices)
    assert placement.scale == 1
    with pytest.raises(UserError, match="does not fit") as error:
        place(moved(box(), (1, 0, 0)), PlaceSettings(radius=None))
    assert "place.radius" in error.value.fix


def test_what_has_no_extent_is_refused():
    with pytest.raises(UserError, match="cannot be placed"):
        place(make([[1, 1, 1]] * 3, [[0, 1, 2]]), PlaceSettings())


def test_specks_far_away_are_left_out_and_larger_or_nearer_parts_are_not():
    body = sphere(1.0)
    far, near = (moved(tetrahedron(), (x, 0, 0), 0.001) for x in (100, 1.5))
    mesh, count = without_far_specks(join(body, far, near, moved(far, (0, 5, 0))))
    assert count == 3 and len(mesh.faces) == len(body.faces)
    placed, _ = place(mesh, PlaceSettings())
    assert np.linalg.norm(placed.vertices[: len(body.vertices)], axis=1).max() == pytest.approx(0.85, abs=1e-3)
    large = moved(tetrahedron(), (100, 0, 0), 0.5)
    for whole in (join(body, near), join(body, large), moved(box((100, 1, 1)), (5, 0, 0))):
        assert without_far_specks(whole) == (whole, 0)


def test_the_texture_of_what_is_kept_stays_on_its_faces():
    body, far = sphere(1.0), moved(tetrahedron(), (100, 0, 0), 0.001)
    mesh = join(far, body)
    mesh.uv, mesh.uv_faces = np.zeros((len(mesh.vertices), 2), np.float32), mesh.faces.copy()
    result, _ = without_far_specks(mesh)
    np.testing.assert_array_equal(result.uv_faces, result.faces)
    np.testing.assert_array_equal(result.faces, mesh.faces[len(far.faces) :])
