"""Random changes that break an input: of its bytes, and of its parts where its format is known.

Changed bytes mostly die at the first thing that a reader looks at: the syntax, a length, a checksum. So each format
has changes, too, that keep it in order: one value of a JSON or YAML tree, one number of a body, one line of a header;
lengths and checksums are written anew.
"""

from __future__ import annotations

import base64
import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

TEXTS = [
    *("\x00", "\x07", "&a [*a]", "*a", "!!int x", "!!binary x", "{", "}", "[", "]", ": ", "- ", "? ", "|", ">", "%"),
    *("nan", ".inf", "1e999", "-1", "0", "true", "null", "~", "9" * 400, "9" * 5000, "\N{HOT BEVERAGE}", "\u202e"),
    *("\t", "\r", "<<: *a", "[" * 60, "{a: " * 60, "prompt", "stages", "coarse", "steps", "rule", "name", "---"),
    *("'", '"', "extends: default"),
]
_NUMBERS = (b"0", b"-1", b"1e999", b"nan", b"inf", b"4294967295", b"99999999999", b"-2147483649", b"1e-400", b"")
_FLOATS = (0.0, -1.0, 1e30, -1e38, 1e-40, float("nan"), float("inf"), 0.5, 7.0)
_INTEGERS = (0, 1, 2, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1)
_ODD = [None, True, -1, 0, 1e308, 10**30, "", "x", [], {}, [[]], {"a": []}, "\ud800", float("nan")]
_NEAR = [1, 2, 3, 7, 0.5, -0.5, 1e-9, 1e6, "0", "x/y", [0], [1, 2], [0.5, 1.0, 0, 1, "cosine"], False]
_WORDS = {  # of a line's change
    ".obj": "v vt vn f fo l p g o s usemtl mtllib vp curv call # \\ f/ / -1 0 1/1 1//1 1/1/1 -1/-1/-1 2.5 nan 1e30",
    ".ply": "element property list uchar char int uint float double short vertex face tristrips comment TextureFile "
    "x y z nx red s t texcoord texnumber vertex_indices format ascii binary_big_endian end_header -1 0 3 7 nan 1e30",
    ".stl": "solid facet normal outer loop vertex endloop endfacet endsolid 0 1e30 -1 nan",
    ".mtl": "newmtl Kd map_Kd -s -o -clamp on off -mm -t -cc -imfchan Pm Pr d Tr map_d # \\ 0 -1 1e30 nan ",
}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to four random changes: cut, emptied, repeated, overwritten, numbers made extreme."""
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 4, 16, 400)))
        change = rng.randrange(8)
        if change == 0:
            data = data[:a]
        elif change == 1:
            data = data[:a] + data[b:]
        elif change == 2:
            data = data[:b] + data[a:b] * rng.choice((1, 3)) + data[b:]
        elif change == 3:
            data = data[:a] + rng.choice(TEXTS).encode() + data[b:]
        elif change == 4:
            data = data[:a] + rng.randbytes(b - a) + data[b:]
        elif change == 5:
            data = data[:a] + rng.choice((b"\xff", b"\x00", b"\xe9", b"\n")) * (b - a) + data[b:]
        elif change == 6:
            data = _number_changed(data, rng)
        elif rng.random() < 0.1:
            data = b""
    return data


def _number_changed(data: bytes, rng: random.Random) -> bytes:
    starts = [i for i in range(1, len(data)) if data[i] in b"0123456789" and data[i - 1] in b" :-="]
    if not starts:
        return data
    a = rng.choice(starts)
    b = next((i for i in range(a, len(data)) if data[i] not in b"0123456789.eE+-"), len(data))
    return data[:a] + rng.choice(_NUMBERS) + data[b:]


def mutated_json(text: str, rng: random.Random) -> bytes:
    """Return JSON with one or two values of another kind, moved, doubled or gone; or its bytes mutated."""
    if rng.random() < 0.2:
        return mutated(text.encode(), rng)
    return json.dumps(tree_changed(json.loads(text), rng)).encode()


def mutated_yaml(text: str, rng: random.Random) -> bytes:
    """Return YAML with one or two settings of another value, of another name or gone; or its bytes mutated."""
    import yaml

    if rng.random() < 0.2:
        return mutated(text.encode(), rng)
    root = tree_changed(yaml.safe_load(text), rng)
    return yaml.safe_dump(root, sort_keys=False).encode("utf-8", "surrogatepass")


def near_text(value: Any, rng: random.Random) -> str:
    """Return the text of a setting's value that is near another: of its kind, or of a ramp between two."""
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int | float):
        value = rng.choice((value * 2, value + 1, value / 2, value // 2, 0, -value, value * 1000, value + 0.5))
        return rng.choice((f"{value:g}", f"{value}", f"[{value},0]", f"[{value},{value / 2},0.1,0.9,cosine]"))
    if isinstance(value, list):
        return json.dumps(rng.choice((value[:-1], value[::-1], value + value, [*value, 1], [])))
    return rng.choice((json.dumps(value), f"{value}x", "null", "''"))


def tree_changed(root: Any, rng: random.Random) -> Any:
    """Return a tree of lists and mappings with one or two of its places changed, most to values of a like kind."""
    root = copy.deepcopy(root)
    if rng.random() < 0.02:
        return rng.choice(_ODD)
    for _ in range(rng.choice((1, 1, 2))):
        places = list(_places(root))
        if not places:
            return rng.choice(_ODD)
        holder, key = rng.choice(places)
        value, change = holder[key], rng.random()
        if change < 0.15:
            del holder[key]
        elif change < 0.25 and isinstance(holder, dict):
            holder[rng.choice((str(key)[:-1], f"{key}s", "name"))] = holder.pop(key)
        elif change < 0.35 and isinstance(value, list):
            holder[key] = rng.choice((value[:-1], value[::-1], value + value, [value]))
        elif change < 0.55 and isinstance(value, int | float) and not isinstance(value, bool):
            holder[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value + 0.5, str(value)))
        elif change < 0.75:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
        else:
            holder[key] = copy.deepcopy(rng.choice(_NEAR if change < 0.85 else _ODD))
    return root


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, dict | list):
        return
    for key in list(value) if isinstance(value, dict) else range(min(len(value), 20)):
        yield value, key
        yield from _places(value[key])


def mutated_tensors(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with its header mutated or its end cut."""
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    header = mutated_json(data[8:end].decode(), rng)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, 2**20))
    return length.to_bytes(8, "little") + header + data[end:]


def state_changed(state: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return named tensors with one or two of them gone, under another name, of another shape, type or values."""
    import torch

    state = dict(state)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(state) or ["x"])
        tensor = state.pop(name, torch.zeros(1))
        flat = tensor.reshape(-1)
        shapes = (flat, flat[:1], flat[:0], tensor[None], tensor.sum())
        types = (torch.int8, torch.bool, torch.float16, torch.bfloat16, torch.float64)
        change = rng.randrange(5)
        if change == 1:
            name = rng.choice((name.rpartition(".")[0] or "x", f"{name}.x", name.replace("_A", "_B"), "x"))
        if change == 2:
            tensor = rng.choice(shapes)
        if change == 3:
            tensor = tensor.to(rng.choice(types))
        if change == 4 and tensor.is_floating_point():
            tensor = torch.full_like(tensor, rng.choice((float("nan"), float("inf"), 0.0)))
        if change:
            state[name] = tensor.contiguous().clone()
    return state


def mutated_mesh(data: bytes, suffix: str, rng: random.Random) -> bytes:
    """Return the file of a mesh, of a material library or of a picture with changes that its format lets pass.

    Args:
        suffix: .glb, .gltf, .obj, .mtl, .ply, .stl or .png.
    """
    if rng.random() < 0.2:
        return mutated(data, rng)
    if suffix == ".glb":
        return _glb_changed(data, rng)
    if suffix == ".gltf":
        return _gltf_changed(json.loads(data), rng)
    if suffix == ".ply":
        return _ply_changed(data, rng)
    if suffix == ".stl" and not data.startswith(b"solid"):
        return _body_changed(data, 84, rng)
    return _lines_changed(data, _WORDS[suffix].split(), rng) if suffix in _WORDS else mutated(data, rng)


def _glb_changed(data: bytes, rng: random.Random) -> bytes:
    """A GLB whose JSON or numbers are changed, with the lengths of both."""
    end = 20 + struct.unpack("<I", data[12:16])[0]
    text, rest = data[20:end], data[end:]
    if rng.random() < 0.3 and len(rest) > 8:
        rest = _body_changed(rest, 8, rng)
    else:
        text = json.dumps(tree_changed(json.loads(text), rng)).encode()
        text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text + rest
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def _gltf_changed(root: dict[str, Any], rng: random.Random) -> bytes:
    """A glTF whose JSON is changed, or the numbers within one of its data URIs."""
    if rng.random() < 0.3:
        buffer = rng.choice(root["buffers"])
        kind, _, text = buffer["uri"].partition(",")
        buffer["uri"] = f"{kind},{base64.b64encode(_body_changed(base64.b64decode(text), 0, rng)).decode()}"
        return json.dumps(root).encode()
    return json.dumps(tree_changed(root, rng)).encode()


def _ply_changed(data: bytes, rng: random.Random) -> bytes:
    """A PLY with lines of its header or numbers of its body changed."""
    end = data.index(b"end_header") + len(b"end_header\n")
    header, body = data[:end], data[end:]
    if rng.random() < 0.5:
        return _lines_changed(header, _WORDS[".ply"].split(), rng, first=1) + body
    if b"format ascii" in header:
        return header + _lines_changed(body, _WORDS[".ply"].split()[-5:], rng)
    return header + _body_changed(body, 0, rng)


def _body_changed(data: bytes, start: int, rng: random.Random) -> bytes:
    """Bytes from `start` on with one to three of their numbers, of one or four bytes, made others."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(start, max(len(data) - 4, start + 1)) if rng.random() < 0.5 else start
        at += 0 if at > start else rng.randrange(max((len(data) - start) // 4, 1)) * 4
        kind = rng.choice("fIB")
        value = rng.choice(_FLOATS) if kind == "f" else rng.choice(_INTEGERS) % (256 if kind == "B" else 2**32)
        size = struct.calcsize(f"<{kind}")
        if at + size <= len(changed):
            changed[at : at + size] = struct.pack(f"<{kind}", value)
    return bytes(changed)


def _lines_changed(data: bytes, words: list[str], rng: random.Random, first: int = 0) -> bytes:
    """Text with one to three of its lines, from number `first` on, changed, doubled, exchanged or gone."""
    lines = data.split(b"\n")
    for _ in range(rng.randint(1, 3)):
        if len(lines) <= first:
            break
        a, b = (rng.randrange(first, len(lines)) for _ in range(2))
        change = rng.randrange(7)
        if change == 0:
            del lines[a]
        elif change == 1:
            lines.insert(b, lines[a])
        elif change == 2:
            lines[a], lines[b] = lines[b], lines[a]
        else:
            parts = lines[a].split() or [b""]
            place = rng.randrange(len(parts))
            if change == 3:
                del parts[place]
            elif change == 4:
                parts.insert(place, rng.choice(words).encode())
            elif change == 5:
                parts[place] = rng.choice(words).encode()
            else:
                parts[place] = rng.choice((*_NUMBERS, b"1", b"2", b"3", b"-3", b"0.5"))
            lines[a] = b" ".join(parts)
    return b"\n".join(lines)
