"""glTF 2.0 by its text: what a file may say is read, told or refused; promises of lengths are kept or told."""

import base64
import json
import struct

import numpy as np
import pytest

from pipeline.output.glb import glb_bytes
from stages.errors import UserError
from stages.mesh.files.read import GREY, read_mesh
from tests.mesh.mesh_shapes import box

SQUARE = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
CODES = {"int8": 5120, "uint8": 5121, "uint16": 5123, "uint32": 5125, "float32": 5126}
KINDS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}


class Document:
    """A glTF document under construction, its buffers within it."""

    def __init__(self):
        self.json = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}]}
        self.json |= {"meshes": [], "accessors": [], "bufferViews": [], "buffers": []}

    def numbers(self, values, kind="float32"):
        values = np.asarray(values, kind)
        data = values.tobytes()
        uri = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
        self.json["buffers"].append({"uri": uri, "byteLength": len(data)})
        self.json["bufferViews"].append({"buffer": len(self.json["buffers"]) - 1, "byteLength": len(data)})
        shape = {"count": len(values), "type": KINDS[1 if values.ndim == 1 else values.shape[1]]}
        shape |= {"bufferView": len(self.json["bufferViews"]) - 1, "componentType": CODES[values.dtype.name]}
        self.json["accessors"].append(shape)
        return len(self.json["accessors"]) - 1

    def mesh(self, points=SQUARE, indices=(0, 1, 2, 0, 2, 3), **more):
        primitive = {"attributes": {"POSITION": self.numbers(points)}}
        if indices is not None:
            primitive["indices"] = self.numbers(indices, "uint16")
        self.json["meshes"].append({"primitives": [primitive | more]})
        return primitive

    def save(self, folder):
        (folder / "a.gltf").write_text(json.dumps(self.json))
        return folder / "a.gltf"


@pytest.fixture
def document():
    doc = Document()
    doc.mesh()
    return doc


def refusal(path):
    with pytest.raises(UserError) as error:
        read_mesh(path)
    return error.value.why


def test_a_hidden_node_and_all_below_it_are_left_out(document, tmp_path, caplog):
    hidden = {"children": [2], "extensions": {"KHR_node_visibility": {"visible": False}}}
    document.json["nodes"] += [hidden, {"mesh": 0, "translation": [9, 0, 0]}]
    document.json["scenes"][0]["nodes"] = [0, 1]
    mesh = read_mesh(document.save(tmp_path))
    assert len(mesh.faces) == 2 and mesh.vertices.max() == 1
    assert "hidden" in caplog.text


@pytest.mark.parametrize("of_node", [False, True])
def test_default_weights_move_the_corners(document, tmp_path, of_node):
    target = {"POSITION": document.numbers(np.tile([0, 0, 2.0], (4, 1)))}
    document.json["meshes"][0]["primitives"][0]["targets"] = [target, target]
    document.json["meshes"][0]["weights"] = [1, 0]
    document.json["nodes"].append({"mesh": 0})
    if of_node:
        document.json["nodes"][1]["weights"] = [0.5, 0.25]
        document.json["scenes"][0]["nodes"] = [0, 1]
    mesh = read_mesh(document.save(tmp_path))
    expected = {2.0, 1.5} if of_node else {2.0}
    assert set(mesh.vertices[:, 2].tolist()) == expected


def test_the_files_own_scene_is_read(document, tmp_path, caplog):
    document.json["scenes"] = [{"nodes": [1]}, {"nodes": [0]}]
    document.json["scene"] = 1
    document.json["nodes"].append({"mesh": 0, "translation": [9, 0, 0]})
    assert read_mesh(document.save(tmp_path)).vertices.max() == 1
    assert "2 scenes: number 1" in caplog.text


@pytest.mark.parametrize("indexed", [False, True])
def test_a_strip_turns_every_second_triangle(tmp_path, indexed):
    document = Document()
    document.mesh([SQUARE[k] for k in (0, 1, 3, 2)], (0, 1, 2, 3) if indexed else None, mode=5)
    mesh = read_mesh(document.save(tmp_path))
    assert mesh.faces.tolist() == [[0, 1, 2], [2, 1, 3]]
    assert (mesh.face_normals()[:, 2] == 1).all()


def test_other_primitives_are_said_and_alone_refused(document, tmp_path, caplog):
    more = document.json["meshes"][0]["primitives"]
    more += [{"attributes": more[0]["attributes"], "mode": mode} for mode in (0, 1, 3)] + [{"attributes": {}}]
    assert len(read_mesh(document.save(tmp_path)).faces) == 2
    assert "points" in caplog.text and "lines" in caplog.text and "without POSITION" in caplog.text
    del more[0]
    why = refusal(document.save(tmp_path))
    assert "holds no triangles" in why and "POSITION" in why


def put(*path_and_value):
    """A change of a document: its place, and what stands there."""

    def change(document):
        *path, last, value = path_and_value
        at = document
        for step in path:
            at = at[step]
        if value is None:
            del at[last]
        else:
            at[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("asset", {"version": "1.0"}), ["glTF 1.0", "2.0 is read"]),
        (put("asset", {"version": "2.0", "minVersion": "2.1"}), ["glTF 2.1"]),
        (put("asset", None), ["no asset"]),
        (put("scenes", []), ["no scene", "1 meshes"]),
        (put("scenes", 0, "nodes", []), ["shows none of its 1 meshes"]),
        (put("scene", 3), ["number 3 of its scenes", "there are 1"]),
        (put("nodes", 0, "mesh", 7), ["number 7 of its meshes", "there are 1"]),
        (put("nodes", 0, "children", [0]), ["no tree"]),
        (put("buffers", 0, "byteLength", 480), ["promises 480 bytes", "has 48"]),
        (put("buffers", 0, "uri", "gone away.bin"), ["gone away.bin is not there"]),
        (put("buffers", 0, "uri", "https://example.com/a.bin"), ["https://example.com/a.bin is not there"]),
        (put("buffers", 0, "uri", "data:;base64,@@@"), ["not base64"]),
        (put("buffers", 0, "uri", None), ["no uri"]),
        (put("bufferViews", 0, "byteLength", 400), ["byte 400 of buffer 0", "has 48"]),
        (put("accessors", 0, "count", 40), ["40 ", "480", "48"]),
        (put("accessors", 1, "count", 60), ["120", "12"]),
        (put("accessors", 1, "count", 5), ["5 corners", "multiple of 3"]),
        (put("accessors", 0, "count", 3), ["vertex 3", "there are 3"]),
        (put("accessors", 0, "componentType", 5124), ["no kind of glTF's"]),
        (put("meshes", 0, "primitives", 0, "mode", 9), ["mode 9"]),
        (put("meshes", 0, "primitives", 0, "attributes", "NORMAL", 1), ["4 positions", "6 values of NORMAL"]),
        (put("meshes", 0, "primitives", 0, "material", 2), ["number 2 of its materials", "there are 0"]),
        (put("meshes", 0, "primitives", 0, "attributes", "POSITION", 9), ["number 9 of its accessors", "there are 2"]),
    ],
)
def test_what_a_file_does_not_keep_is_refused_with_both_numbers(document, tmp_path, change, words):
    read_mesh(document.save(tmp_path))
    change(document.json)
    why = refusal(document.save(tmp_path))
    assert all(word in why for word in words), why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("animations", [{"channels": [], "samplers": []}]), "animations are left out"),
        (put("extensionsUsed", ["EXT_mesh_gpu_instancing"]), "instancing"),
        (put("extensionsUsed", ["VENDOR_new_shapes"]), "VENDOR_new_shapes"),
    ],
)
def test_what_is_left_out_is_said(document, tmp_path, caplog, change, message):
    document.json["extensionsUsed"] = ["KHR_materials_unlit", "KHR_texture_transform"]
    read_mesh(document.save(tmp_path))
    assert not caplog.records
    change(document.json)
    read_mesh(document.save(tmp_path))
    assert message in caplog.text


@pytest.mark.parametrize(("wrap", "message"), [(33071, "clamped"), (33648, "mirrored"), (10497, "")])
def test_a_texture_that_does_not_repeat_beyond_its_border_is_said(document, tmp_path, caplog, wrap, message):
    from io import BytesIO

    from PIL import Image

    picture = BytesIO()
    Image.new("RGB", (2, 2)).save(picture, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    primitive = document.json["meshes"][0]["primitives"][0]
    primitive["attributes"]["TEXCOORD_0"] = document.numbers(np.array(SQUARE)[:, :2] * 2)
    primitive["material"] = 0
    document.json |= {"images": [{"uri": uri}], "samplers": [{"wrapS": wrap, "wrapT": wrap}]}
    document.json["textures"] = [{"source": 0, "sampler": 0}]
    material = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicFactor": 0.25}, "alphaMode": "MASK"}
    document.json["materials"] = [material]
    mesh = read_mesh(document.save(tmp_path))
    assert (message in caplog.text) if message else ("border" not in caplog.text)
    assert "transparent" in caplog.text
    assert mesh.metallic == 0.25 and mesh.roughness == 1  # the format's default


@pytest.mark.parametrize("uri", ["my%20numbers.bin", "my numbers.bin"])
def test_uris_are_read_with_their_codes(document, tmp_path, uri):
    facts = document.json["buffers"][0]
    (tmp_path / "my numbers.bin").write_bytes(base64.b64decode(facts["uri"].split(",")[1]))
    facts["uri"] = uri
    assert len(read_mesh(document.save(tmp_path)).faces) == 2


def test_data_need_not_be_base64_and_a_byte_order_mark_is_skipped(document, tmp_path):
    facts = document.json["buffers"][0]
    data = base64.b64decode(facts["uri"].split(",")[1])
    facts["uri"] = "data:application/octet-stream," + "".join(f"%{byte:02x}" for byte in data)
    path = document.save(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    np.testing.assert_array_equal(read_mesh(path).vertices, SQUARE)


def test_normals_turn_with_their_node(document, tmp_path):
    primitive = document.json["meshes"][0]["primitives"][0]
    primitive["attributes"]["NORMAL"] = document.numbers(np.tile([0.6, 0, 0.8], (4, 1)))
    document.json["nodes"][0] |= {"rotation": [0, np.sqrt(0.5), 0, np.sqrt(0.5)], "scale": [2, 2, 2]}
    mesh = read_mesh(document.save(tmp_path))  # a quarter turn about y: z becomes x, x becomes -z
    np.testing.assert_allclose(mesh.normals, np.tile([0.8, 0, -0.6], (4, 1)), atol=1e-6)


@pytest.mark.parametrize("size", [10, 19, 100, -1])
def test_a_glb_that_was_cut_off_is_refused_with_both_numbers(tmp_path, size):
    data = glb_bytes(box())
    (tmp_path / "a.glb").write_bytes(data[:size])
    why = refusal(tmp_path / "a.glb")
    assert "cut off" in why and str(len(data[:size])) in why and (size in (10, 19) or str(len(data)) in why)


def test_a_glb_that_goes_on_and_one_of_version_1_are_refused(tmp_path):
    data = glb_bytes(box())
    (tmp_path / "a.glb").write_bytes(data + bytes(4))
    why = refusal(tmp_path / "a.glb")
    assert f"promises {len(data)} bytes" in why and str(len(data) + 4) in why
    (tmp_path / "a.glb").write_bytes(struct.pack("<4sI", b"glTF", 1) + data[8:])
    assert "version 1" in refusal(tmp_path / "a.glb")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("nodes", 0, "mesh"), "0", 'its nodes[0].mesh is "0", wanted a whole number from 0'),
        (("nodes", 0, "mesh"), True, "its nodes[0].mesh is true, wanted a whole number from 0"),
        (("nodes",), {}, "its nodes is {}, wanted a list"),
        (("nodes", 0), 7, "its nodes[0] is 7, wanted an object"),
        (("nodes", 0, "matrix"), [1, 0, 0], "its nodes[0].matrix is [1, 0, 0], wanted a list of 16"),
        (("nodes", 0, "scale"), [1, 1, float("inf")], "its nodes[0].scale[2] is Infinity, wanted a number"),
        (("nodes", 0, "translation"), [0, 0, 1e308], "its nodes[0].translation[2] is 1e+308, wanted a number"),
        (("meshes", 0, "primitives", 0, "attributes"), [], "its meshes[0].primitives[0].attributes is []"),
        (("accessors", 0, "count"), 4.5, "its accessors[0].count is 4.5, wanted a whole number from 0"),
        (("accessors", 0, "count"), None, "its accessors[0].count is null"),
        (("buffers", 0), {}, "its buffers[0].byteLength is missing"),
        (("extensionsUsed",), [0], "its extensionsUsed[0] is 0, wanted a text"),
        (("materials",), [{"pbrMetallicRoughness": {"baseColorTexture": {}}}], "baseColorTexture.index is missing"),
        (("textures",), ["x" * 99], 'its textures[0] is "xxx'),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_place(document, tmp_path, place, value, words):
    part = document.json
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    assert words in refusal(document.save(tmp_path))


def test_json_nested_without_end_is_refused(tmp_path):
    (tmp_path / "a.gltf").write_text('{"nodes": ' + "[" * 100_000)
    assert "its JSON is broken" in refusal(tmp_path / "a.gltf")


def test_what_a_file_says_beside_what_is_read_may_be_anything(document, tmp_path):
    document.json |= {"extras": 7, "skins": "x"}
    document.json["nodes"][0] |= {"extras": [], "skin": None, "extensions": {"EXT_x": 1}}
    assert len(read_mesh(document.save(tmp_path)).faces) == 2


def test_colours_that_are_none_are_grey_and_those_beyond_1_cut(document, tmp_path, caplog):
    colours = [[0.5, 0.25, 1], [float("nan"), 0, 0], [0, float("inf"), 0], [2, -1, 0.5]]
    document.json["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"] = document.numbers(colours)
    mesh = read_mesh(document.save(tmp_path))
    np.testing.assert_allclose(mesh.colours, [[0.5, 0.25, 1], [GREY] * 3, [GREY] * 3, [1, 0, 0.5]])
    assert "2 vertices have a colour that is no number" in caplog.text
    assert "1 vertices have a colour beyond 0 and 1" in caplog.text
