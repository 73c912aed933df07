"""What glTF files say beyond plain meshes: moved textures, quantised and sparse numbers, fans, extensions."""

import json

import numpy as np
import pytest
import trimesh

from stages.errors import UserError
from stages.mesh.files.read import read_mesh
from tests.mesh.files.gltf_edits import edited, moving, packed, primitive
from tests.mesh.files.textured_meshes import CORNERS, WITHIN, seen, square


def test_a_moved_texture_lands_where_the_file_says(tmp_path):
    """The lower left quadrant, turned clockwise by 90 degrees: the extension's own example."""
    square(CORNERS).export(tmp_path / "a.glb")
    edited(tmp_path / "a.glb", moving(offset=[0, 1], rotation=np.pi / 2, scale=[0.5, 0.5]))
    mesh = read_mesh(tmp_path / "a.glb")
    # turned clockwise, the quadrant's lower right corner comes to lie at the lower left
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces[0]], [[0.5, 0], [0.5, 0.5], [0, 0.5]], atol=1e-6)


@pytest.mark.parametrize(
    ("move", "uv"),
    [
        ({"scale": [2, 2]}, [[0, -1], [2, -1], [2, 1], [0, 1]]),
        ({"offset": [0.5, 0]}, [[0.5, 0], [1.5, 0], [1.5, 1], [0.5, 1]]),
        ({"offset": [0, 1], "scale": [1, -1]}, [[0, 1], [1, 1], [1, 0], [0, 0]]),
        ({"offset": [1, 1], "rotation": np.pi}, [[1, 1], [0, 1], [0, 0], [1, 0]]),
    ],
)
def test_a_moved_texture_shows_what_moved_coordinates_show(tmp_path, move, uv):
    square(CORNERS).export(tmp_path / "moved.glb")
    edited(tmp_path / "moved.glb", moving(**move))
    square(uv).export(tmp_path / "written.glb")
    one, other = read_mesh(tmp_path / "moved.glb"), read_mesh(tmp_path / "written.glb")
    for x, y in WITHIN:
        np.testing.assert_allclose(seen(one, x, y), seen(other, x, y), atol=1e-5, err_msg=f"{x}, {y}")


@pytest.mark.parametrize("extension", [False, True])
def test_the_coordinates_that_the_texture_uses_are_taken(tmp_path, extension):
    def second(document):
        used = primitive(document)["attributes"]
        used["TEXCOORD_1"] = used["TEXCOORD_0"]
        used["TEXCOORD_0"] = packed(np.full((4, 2), 0.7), "float32", "VEC2")(document)
        texture = document["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]
        if extension:
            texture["extensions"] = {"KHR_texture_transform": {"texCoord": 1}}
        else:
            texture["texCoord"] = 1

    square(CORNERS).export(tmp_path / "a.glb")
    plain = read_mesh(tmp_path / "a.glb")
    edited(tmp_path / "a.glb", second)
    mesh = read_mesh(tmp_path / "a.glb")
    np.testing.assert_array_equal(mesh.uv[mesh.uv_faces], plain.uv[plain.uv_faces])


@pytest.mark.parametrize(("kind", "most"), [("int8", 127), ("int16", 32767)])
def test_quantised_coordinates_are_read(tmp_path, kind, most):
    """KHR_mesh_quantization: integers of [-1, 1], interleaved, their node makes them large."""
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])

    def quantised(document):
        used = primitive(document)["attributes"]
        padded = np.zeros((4, 4), kind)  # rows are aligned to four bytes
        padded[:, :3] = corners * most
        padded[0, 0] -= 1  # the lowest integer is -1, too
        used["POSITION"] = packed(padded, kind, "VEC3", normalized=True)(document)
        document["bufferViews"][-1]["byteStride"] = 4 * padded.itemsize
        down = 1 - np.array(CORNERS)[:, 1]
        turned = np.stack([np.array(CORNERS)[:, 0], down], 1) * 65535
        used["TEXCOORD_0"] = packed(turned, "uint16", "VEC2", normalized=True)(document)
        document["extensionsRequired"] = ["KHR_mesh_quantization"]
        for node in document["nodes"]:
            if "mesh" in node:
                node.pop("matrix", None)
                node["scale"], node["translation"] = [3, 3, 3], [0, 1, 0]

    square(CORNERS).export(tmp_path / "a.glb")
    plain = read_mesh(tmp_path / "a.glb")
    edited(tmp_path / "a.glb", quantised)
    mesh = read_mesh(tmp_path / "a.glb")
    np.testing.assert_allclose(mesh.vertices, corners * 3 + [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces], plain.uv[plain.uv_faces], atol=1e-6)


def test_sparse_coordinates_are_read(tmp_path):
    def sparse(document):
        used = primitive(document)["attributes"]
        place = document["accessors"][packed([2], "uint8", "SCALAR")(document)]["bufferView"]
        value = document["accessors"][packed([[5, 6, 7]], "float32", "VEC3")(document)]["bufferView"]
        document["accessors"][used["POSITION"]]["sparse"] = {
            "count": 1,
            "indices": {"bufferView": place, "componentType": 5121},
            "values": {"bufferView": value},
        }

    square(CORNERS).export(tmp_path / "a.glb")
    edited(tmp_path / "a.glb", sparse)
    mesh = read_mesh(tmp_path / "a.glb")
    assert [5, 6, 7] in mesh.vertices.tolist() and [0, 1, 0] in mesh.vertices.tolist()


def test_a_gltf_file_beside_its_buffers_is_written_out_too(tmp_path):
    for name, data in trimesh.Scene(square(CORNERS)).export(file_type="gltf").items():
        (tmp_path / name).write_bytes(data)
    plain = read_mesh(tmp_path / "model.gltf")
    document = json.loads((tmp_path / "model.gltf").read_text())
    moving(offset=[0.25, 0], scale=[0.5, 1])(document)
    (tmp_path / "model.gltf").write_text(json.dumps(document))
    mesh = read_mesh(tmp_path / "model.gltf")
    np.testing.assert_array_equal(mesh.texture, plain.texture)
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces], plain.uv[plain.uv_faces] * [0.5, 1] + [0.25, 0], atol=1e-6)


@pytest.mark.parametrize("extension", ["EXT_meshopt_compression", "KHR_texture_basisu", "VENDOR_new_shapes"])
def test_what_a_file_cannot_do_without_is_refused_by_name(tmp_path, extension):
    def needs(document):
        document["extensionsRequired"] = ["KHR_materials_unlit", extension]

    square(CORNERS).export(tmp_path / "a.glb")
    edited(tmp_path / "a.glb", needs)
    with pytest.raises(UserError, match=extension) as error:
        read_mesh(tmp_path / "a.glb")
    assert "unlit" not in error.value.why and error.value.fix


def test_a_file_that_ends_in_its_numbers_is_refused(tmp_path):
    def short(document):
        used = primitive(document)["attributes"]
        used["TEXCOORD_0"] = packed([[0, 0]], "uint8", "VEC2", normalized=True)(document)
        document["accessors"][-1]["count"] = 4

    square(CORNERS).export(tmp_path / "a.glb")
    edited(tmp_path / "a.glb", short)
    with pytest.raises(UserError, match="Cannot read the mesh"):
        read_mesh(tmp_path / "a.glb")


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_linear_vertex_colours_of_every_kind_keep_their_values(tmp_path, kind):
    most = 1 if kind == "float32" else np.iinfo(kind).max
    values = np.array([[0.5, 0.25, 0, 1], [0.003, 0.0015, 0.8, 1], [0, 1, 0.1, 1], [1, 0, 0.3, 1]])

    def coloured(document):
        used = primitive(document)
        used.pop("material", None)
        stored = values * most if kind == "float32" else np.round(values * most)
        used["attributes"]["COLOR_0"] = packed(stored, kind, "VEC4", normalized=kind != "float32")(document)

    square(CORNERS).export(tmp_path / "a.glb")
    edited(tmp_path / "a.glb", coloured)
    mesh = read_mesh(tmp_path / "a.glb")
    assert mesh.texture is None
    np.testing.assert_allclose(mesh.colours, values[:, :3], atol=max(0.51 / most if most > 1 else 0, 1e-6))


@pytest.mark.parametrize("indexed", [True, False])
def test_a_fan_of_triangles_is_read(tmp_path, indexed):
    def fan(document):
        used = primitive(document)
        used["mode"] = 6
        if indexed:
            used["indices"] = packed([[1], [2], [3], [0]], "uint16", "SCALAR")(document)
        else:
            del used["indices"]

    square(CORNERS).export(tmp_path / "a.glb")
    edited(tmp_path / "a.glb", fan)
    faces = read_mesh(tmp_path / "a.glb").faces.tolist()
    assert faces == ([[1, 2, 3], [1, 3, 0]] if indexed else [[0, 1, 2], [0, 2, 3]])


def test_lost_pictures_unread_formats_and_skeletons_are_said(tmp_path, caplog):
    changes = {
        "gone.png": lambda document: document["images"].__setitem__(0, {"uri": "gone.png"}),
        "format": lambda document: document["textures"].__setitem__(
            0, {"extensions": {"KHR_texture_basisu": {"source": 0}}}
        ),
        "skeleton": lambda document: document["nodes"][-1].__setitem__("skin", 0),
    }
    for word, change in changes.items():
        square(CORNERS).export(tmp_path / "a.glb")
        read_mesh(tmp_path / "a.glb")
        assert not caplog.records
        edited(tmp_path / "a.glb", change)
        read_mesh(tmp_path / "a.glb")
        assert word in caplog.text
        caplog.clear()
