"""Wavefront MTL, the material libraries of OBJ files: what shows as base colour, and how metallic and rough it is.

Read: newmtl, Kd (rgb), map_Kd with -s, -o and -clamp, Pm, Pr. Other lines say nothing of these. Options that change a
picture's values (-mm, -t, -imfchan, -cc) and transparency (d, Tr, map_d) are warned of and left out.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from stages.kernels.srgb import srgb_to_linear
from stages.mesh.files.picture import GREY

log = logging.getLogger(__name__)

_ONE = {"-blendu", "-blendv", "-cc", "-clamp", "-texres", "-bm", "-imfchan", "-type", "-boost"}  # words after an option
_NUMBERS = {"-mm": 2, "-o": 3, "-s": 3, "-t": 3}  # numbers after an option, at most
_NEUTRAL = {"-mm": [0.0, 1.0], "-cc": ["off"], "-t": [0.0, 0.0, 0.0], "-imfchan": []}
_OPTION = re.compile(r"\s*(-[A-Za-z]+)(?=\s)")
_WORD = re.compile(r"\s*(\S+)")


@dataclass
class Material:
    """The base colour of a material.

    Args:
        colour: linear [3].
        picture: path of its image, or None.
        scale: [2], of the texture coordinates, which show the picture at scale * uv + offset.
        offset: [2], see scale.
        clamp: the picture does not repeat.
        metallic, roughness: in [0, 1], or None.
    """

    colour: np.ndarray = field(default_factory=lambda: np.full(3, GREY, np.float32))
    picture: Path | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    clamp: bool = False
    metallic: float | None = None
    roughness: float | None = None


def lines_of(path: Path) -> list[str]:
    """Return the lines of an OBJ or MTL file: byte-order mark dropped, continued lines joined, any line ends.

    Bytes that are not UTF-8 stay as they are in names of files (PEP 383).
    """
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = data.decode("utf-16", errors="replace")
    else:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number in range(len(lines) - 1 if "\\" in text else 0):
        if lines[number].rstrip().endswith("\\"):  # the line after takes it in, so that lines keep their numbers
            lines[number + 1] = f"{lines[number].rstrip()[:-1]} {lines[number + 1]}"
            lines[number] = ""
    return lines


def read_libraries(path: Path, statements: list[str], used: set[str]) -> dict[str, Material]:
    """Return the materials of an OBJ file's libraries by name; where two have one of a name, the first.

    Args:
        path: of the OBJ file.
        statements: what follows each of its `mtllib`: one name, or several between blanks.
        used: names of the materials that the file uses; others are not warned of.
    """
    materials: dict[str, Material] = {}
    for statement in statements:
        whole = find_beside(path.parent, statement)
        names = [statement] if whole else re.findall(r'"[^"]+"|\S+', statement)
        files = [whole] if whole else [find_beside(path.parent, name) for name in names]
        if not any(files):
            log.warning("the material library %s is not there: its colours are left out", statement.strip('"'))
            continue
        for name, file in zip(names, files, strict=True):
            if file is None:
                log.warning("the material library %s is not there: its colours are left out", name)
            else:
                for title, material in _read(file, used).items():
                    materials.setdefault(title, material)
    return materials


def find_beside(folder: Path, name: str) -> Path | None:
    """Return the file of a name written in an OBJ or MTL file, or None.

    As written; without quotes; with / for each \\; without its folders, in which it lay where it was made; each in any
    case of its letters.
    """
    name = name.strip()
    bare = name.strip('"')
    slashed = bare.replace("\\", "/")
    for way in dict.fromkeys([name, bare, slashed, slashed.rsplit("/", 1)[-1]]):
        place = folder / way
        try:
            if way and place.is_file():
                return place
            same = [p for p in place.parent.iterdir() if p.name.lower() == place.name.lower() and p.is_file()]
        except (OSError, ValueError):
            continue
        if way and same:
            return min(same)
    return None


def _read(path: Path, used: set[str]) -> dict[str, Material]:
    materials: dict[str, Material] = {}
    current, name = Material(), ""
    for number, line in enumerate(lines_of(path), 1):
        words = line.split(None, 1)
        if len(words) < 2 or words[0].startswith("#"):
            continue
        key, rest = words[0].lower(), words[1].strip()
        if key == "newmtl":
            name = rest
            current = materials.setdefault(name, Material())
        elif name not in used:
            continue
        elif key == "map_kd":
            _picture(current, rest, path.parent)
        elif key in ("kd", "pm", "pr", "d", "tr"):
            _number(current, key, rest.split("#")[0].split(), f"{path.name}, line {number}")
        elif key == "map_d":
            log.warning("%s, line %d: transparency is left out", path.name, number)
    return materials


def _number(material: Material, key: str, words: list[str], where: str) -> None:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = []
    if not values:
        log.warning("%s: %s %s is not read, and left out", where, key, " ".join(words))
    elif key == "kd":
        material.colour = _linear(values[:3] if len(values) >= 3 else values[:1] * 3)
    elif key == "pm":
        material.metallic = min(max(values[0], 0.0), 1.0)
    elif key == "pr":
        material.roughness = min(max(values[0], 0.0), 1.0)
    elif values[0] != (1 if key == "d" else 0):
        log.warning("%s: transparency is left out", where)


def _picture(material: Material, statement: str, folder: Path) -> None:
    """Take in a map_Kd: its options stand before the file's name, in some files behind it."""
    options, name = _options(statement)
    file = find_beside(folder, statement) or find_beside(folder, name)
    if file is None and (behind := re.match(r"(.*?\S)\s+(-[A-Za-z]+\s.*)", name)):
        more, _ = _options(behind.group(2) + " ")
        options, file = options | more, find_beside(folder, behind.group(1))
    if file is None and "#" in name:
        file = find_beside(folder, name.split("#")[0])
    if file is None:
        log.warning("there is no picture %s: the material's plain colour is taken", name)
        return
    material.picture = file
    for option, neutral in _NEUTRAL.items():
        if options.get(option, neutral) != neutral:
            log.warning("%s of the picture %s is left out", option, file.name)
    scale, offset = options.get("-s", []), options.get("-o", [])
    material.scale = tuple((*scale, 1.0, 1.0)[:2]) if len(scale) != 1 else (scale[0], 1.0)
    material.offset = tuple((*offset, 0.0, 0.0)[:2]) if len(offset) != 1 else (offset[0], 0.0)
    material.clamp = options.get("-clamp") == ["on"]


def _options(statement: str) -> tuple[dict[str, list], str]:
    """The options at the beginning of a map's statement with what follows each, and the rest: the file's name."""
    options: dict[str, list] = {}
    while match := _OPTION.match(statement):
        option = match.group(1).lower()
        if option not in _ONE and option not in _NUMBERS:
            break
        statement = statement[match.end() :]
        values: list = []
        for _ in range(_NUMBERS.get(option, 1)):
            word = _WORD.match(statement)
            value = None if word is None else _value(word.group(1), option in _NUMBERS)
            if value is None:
                break
            values.append(value)
            statement = statement[word.end() :]
        options[option] = values
    return options, statement.strip()


def _value(word: str, number: bool) -> float | str | None:
    if not number:
        return word.lower()
    try:
        return float(word)
    except ValueError:
        return None


def _linear(srgb: list[float]) -> np.ndarray:
    return srgb_to_linear(torch.tensor(srgb, dtype=torch.float64).clamp(0, 1)).float().numpy()
