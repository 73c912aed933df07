"""Changes to the JSON of a GLB file, of what trimesh does not write itself."""

import base64
import json
import struct

import numpy as np


def edited(path, change):
    """A GLB file with its JSON changed."""
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    document = json.loads(data[20 : 20 + length])
    change(document)
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text + data[20 + length :]
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body)


def moving(**move):
    """An edit that moves the base colour's texture (KHR_texture_transform)."""

    def change(document):
        texture = document["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]
        texture["extensions"] = {"KHR_texture_transform": move}

    return change


def packed(values, dtype, kind, **more):
    """An edit's helper: values as an accessor in a buffer of its own; returns a function of the document."""
    values = np.asarray(values, dtype)
    codes = {"int8": 5120, "uint8": 5121, "int16": 5122, "uint16": 5123, "uint32": 5125, "float32": 5126}

    def add(document):
        data = "data:;base64," + base64.b64encode(values.tobytes()).decode()
        document["buffers"].append({"uri": data, "byteLength": values.nbytes})
        view = {"buffer": len(document["buffers"]) - 1, "byteLength": values.nbytes}
        document["bufferViews"].append(view)
        accessor = {"bufferView": len(document["bufferViews"]) - 1, "componentType": codes[values.dtype.name]}
        document["accessors"].append(accessor | {"type": kind, "count": len(values)} | more)
        return len(document["accessors"]) - 1

    return add


def primitive(document):
    return document["meshes"][0]["primitives"][0]
