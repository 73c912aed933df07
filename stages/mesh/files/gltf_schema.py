"""The kinds of the values that a glTF document must have where it is read (glTF 2.0 specification, sec. 5).

What no part of the reading asks for may be anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

_LARGEST = 3.4e38  # numbers end where single precision does

# A kind is a type, [kind] for a list, (kind, count) for a list of so many, or an object: its keys and their kinds; "!"
# after a key says that it must be there, "*" stands for all keys. `int` is a whole number from 0: a count or an index.
_TEXTURE = {
    "index!": int,
    "texCoord": int,
    "extensions": {
        "KHR_texture_transform": {"offset": (float, 2), "rotation": float, "scale": (float, 2), "texCoord": int}
    },
}
_MATERIAL = {
    "name": str,
    "alphaMode": str,
    "alphaCutoff": float,
    "doubleSided": bool,
    "emissiveFactor": (float, 3),
    "normalTexture": _TEXTURE,
    "occlusionTexture": _TEXTURE,
    "emissiveTexture": _TEXTURE,
    "pbrMetallicRoughness": {
        "baseColorFactor": (float, 4),
        "baseColorTexture": _TEXTURE,
        "metallicFactor": float,
        "roughnessFactor": float,
        "metallicRoughnessTexture": _TEXTURE,
    },
    "extensions": {},
}
_NODE = {
    "name": str,
    "children": [int],
    "mesh": int,
    "camera": int,
    "weights": [float],
    "matrix": (float, 16),
    "translation": (float, 3),
    "rotation": (float, 4),
    "scale": (float, 3),
    "extensions": {"KHR_node_visibility": {"visible": bool}},
}
_PRIMITIVE = {
    "attributes": {"*": int},
    "indices": int,
    "material": int,
    "mode": int,
    "targets": [{"*": int}],
    "extensions": {"KHR_draco_mesh_compression": {"bufferView!": int, "attributes!": {"*": int}}},
}
_SPARSE = {
    "count!": int,
    "indices!": {"bufferView!": int, "byteOffset": int, "componentType!": int},
    "values!": {"bufferView!": int, "byteOffset": int},
}
_ACCESSOR = {
    "componentType!": int,
    "count!": int,
    "type!": str,
    "bufferView": int,
    "byteOffset": int,
    "normalized": bool,
    "sparse": _SPARSE,
}
DOCUMENT = {
    "extensionsUsed": [str],
    "extensionsRequired": [str],
    "extensions": {},
    "scene": int,
    "scenes": [{"name": str, "nodes": [int]}],
    "nodes": [_NODE],
    "meshes": [{"name": str, "weights": [float], "primitives": [_PRIMITIVE]}],
    "materials": [_MATERIAL],
    "textures": [{"source": int, "sampler": int, "extensions": {"EXT_texture_webp": {"source": int}}}],
    "images": [{"uri": str, "mimeType": str, "bufferView": int}],
    "samplers": [{"wrapS": int, "wrapT": int}],
    "accessors": [_ACCESSOR],
    "bufferViews": [{"buffer!": int, "byteLength!": int, "byteOffset": int, "byteStride": int}],
    "buffers": [{"byteLength!": int, "uri": str}],
    "cameras": [{}],
    "animations": [{}],
}
_WORDS: dict[type, str] = {int: "a whole number from 0", float: "a number", str: "a text", bool: "true or false"}


def check_kinds(value: Any, wrong: Callable[[str], Exception], kind: Any = None, place: str = "") -> None:
    """Refuse a glTF document that has something of another kind than is read there.

    Args:
        value: the document, or a part of it.
        wrong: makes the error of a reason.
        kind: of the part; see DOCUMENT.
        place: of the part, as in `nodes[3].mesh`.
    Raises: what `wrong` makes.
    """
    kind = DOCUMENT if kind is None else kind
    if isinstance(kind, dict):
        _check_object(value, wrong, kind, place)
    elif isinstance(kind, list | tuple):
        count = kind[1] if isinstance(kind, tuple) else None
        if not isinstance(value, list) or count not in (None, len(value)):
            raise wrong(f"its {place} is {_shown(value)}, wanted a list{f' of {count}' if count else ''}")
        for number, item in enumerate(value):
            check_kinds(item, wrong, kind[0], f"{place}[{number}]")
    elif not _is_of(value, kind):
        raise wrong(f"its {place} is {_shown(value)}, wanted {_WORDS[kind]}")


def _check_object(value: Any, wrong: Callable[[str], Exception], kind: dict[str, Any], place: str) -> None:
    if not isinstance(value, dict):
        raise wrong(f"its {place or 'JSON'} is {_shown(value)}, wanted an object")
    for key, inner in kind.items():
        name = key.removesuffix("!")
        where = f"{place}.{name}" if place else name
        if name == "*":
            for other, item in value.items():
                check_kinds(item, wrong, inner, f"{place}.{other}")
        elif name in value:
            check_kinds(value[name], wrong, inner, where)
        elif name != key:
            raise wrong(f"its {where} is missing")


def _is_of(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) < _LARGEST and math.isfinite(value)
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
