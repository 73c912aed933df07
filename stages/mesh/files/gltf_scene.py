"""The visible part of a glTF file: its scene, hidden nodes, morphed meshes; and the extensions that are not read."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np

from stages.mesh.files.gltf_file import GltfFile

log = logging.getLogger(__name__)

VISIBILITY = "KHR_node_visibility"
# extensions that are read, or say nothing of shape and base colour
KNOWN = {"KHR_texture_transform", "KHR_mesh_quantization", "EXT_texture_webp", "KHR_lights_punctual", VISIBILITY}
KNOWN |= {"KHR_xmp_json_ld", "KHR_xmp", "FB_ngon_encoding", "KHR_node_selectability", "KHR_node_hoverability"}
# said elsewhere, where they matter
TOLD = {"KHR_texture_basisu", "MSFT_texture_dds", "EXT_texture_avif", "KHR_draco_mesh_compression"}
_WHAT = {
    "EXT_mesh_gpu_instancing": "copies of its meshes by instancing are left out",
    "KHR_animation_pointer": "animations are left out",
    "EXT_meshopt_compression": "its plain buffers are read in place of the compressed ones",
}


def show(file: GltfFile) -> set[int]:
    """Leave in a file's scene what is to be seen, morphed as it is by default; return the numbers of its meshes.

    Raises: UserError for a file without a scene, one that shows no mesh, or whose nodes are no tree.
    """
    document = file.document
    scenes, meshes = document.get("scenes", []), document.get("meshes", [])
    if not scenes:
        why = f"it has no scene: none of its {len(meshes)} meshes is placed to be seen"
        raise file.wrong(why, "save it again with a scene, in Blender for one")
    first = document.get("scene", 0)
    scene = file.item("scenes", first)
    if len(scenes) > 1:
        log.warning("%s has %d scenes: number %d is read", file.path.name, len(scenes), first)
    _check_tree(file)
    shown_nodes, hidden = _visible(file, scene.get("nodes", []))
    for node in hidden:
        if "mesh" in document["nodes"][node]:
            log.warning("%s: the mesh of a hidden node is left out", file.path.name)
            del document["nodes"][node]["mesh"]
            file.changed = True
    used = [node for node in shown_nodes if "mesh" in document["nodes"][node]]
    if not used:
        reason = (
            "it holds no triangles: it has no mesh"
            if not meshes
            else f"its scene shows none of its {len(meshes)} meshes"
        )
        raise file.wrong(reason, "save it again with a mesh in its scene")
    for node in used:
        file.item("meshes", document["nodes"][node]["mesh"])
    _morph(file, used)
    _tell(file)
    return {document["nodes"][node]["mesh"] for node in used}


def _check_tree(file: GltfFile) -> None:
    """Refuse nodes with two parents or none but themselves: they would be drawn twice, or without an end."""
    parent: dict[int, int] = {}
    for number, node in enumerate(file.document.get("nodes", [])):
        for child in node.get("children", []):
            file.item("nodes", child)
            if child in parent or child == number:
                raise file.wrong(f"its nodes are no tree: node {child} has two parents, or is its own")
            parent[child] = number
    for node in parent:
        steps, at = 0, node
        while at in parent:
            at, steps = parent[at], steps + 1
            if steps > len(parent):
                raise file.wrong(f"its nodes are no tree: node {node} is its own parent's parent")


def _visible(file: GltfFile, roots: list[int]) -> tuple[list[int], list[int]]:
    """The nodes of a scene that are to be seen, and those that are hidden, with all below them."""
    shown_nodes: list[int] = []
    hidden: list[int] = []
    rest = [(node, True) for node in roots]
    while rest:
        number, visible = rest.pop()
        node = file.item("nodes", number)
        visible = visible and node.get("extensions", {}).get(VISIBILITY, {}).get("visible", True)
        (shown_nodes if visible else hidden).append(number)
        rest += [(child, visible) for child in node.get("children", [])]
    return sorted(shown_nodes), sorted(hidden)


def _morph(file: GltfFile, nodes: list[int]) -> None:
    """Give nodes whose weights move the corners a mesh of their own, moved (specification, sec. 3.7.2.2)."""
    document = file.document
    copies: dict[tuple[int, tuple[float, ...]], int] = {}
    for number in nodes:
        node = document["nodes"][number]
        mesh = document["meshes"][node["mesh"]]
        weights = tuple(map(float, node.get("weights", mesh.get("weights", []))))
        if not any(weights):
            continue
        key = node["mesh"], weights
        if key not in copies:
            new = copy.deepcopy(mesh)
            for primitive in new.get("primitives", []):
                _move(file, primitive, weights)
            document["meshes"].append(new)
            copies[key] = len(document["meshes"]) - 1
        node["mesh"] = copies[key]
        file.changed = True


def _move(file: GltfFile, primitive: dict[str, Any], weights: tuple[float, ...]) -> None:
    targets = primitive.get("targets", [])
    if len(targets) != len(weights):
        raise file.wrong(f"it weighs {len(weights)} morph targets, and a primitive has {len(targets)}")
    if "KHR_draco_mesh_compression" in primitive.get("extensions", {}):
        log.warning("%s: the morph targets of a part compressed by Draco are left out", file.path.name)
        return
    for name in ("POSITION", "NORMAL"):
        if name not in primitive.get("attributes", {}):
            continue
        values = file.numbers(primitive["attributes"][name]).astype(np.float32)
        for weight, target in zip(weights, targets, strict=True):
            if weight and name in target:
                values = values + np.float32(weight) * file.numbers(target[name]).astype(np.float32)
        primitive["attributes"][name] = file.add(values)


def _tell(file: GltfFile) -> None:
    """Warn of what a file adds to its meshes and is left out."""
    document, name = file.document, file.path.name
    if any("skin" in node for node in document.get("nodes", [])):
        log.warning("%s has a skeleton: its mesh is read as it is stored, before any bone moves it", name)
    if document.get("animations"):
        log.warning("%s: animations are left out: it is read as it stands at rest", name)
    for extension in document.get("extensionsUsed", []):
        if extension in KNOWN | TOLD or extension.startswith("KHR_materials_"):
            continue
        log.warning("%s uses %s: %s", name, extension, _WHAT.get(extension, "what it adds is not read, and left out"))
