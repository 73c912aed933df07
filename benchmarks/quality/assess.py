"""Everything that is measured on one mesh: CLIP embeddings, colour, detail, pictures, Janus, geometry, mesh facts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.quality import geometry, metrics
from benchmarks.quality.pictures import picture_facts
from benchmarks.quality.render import ALBEDO, CLAY, COLOUR, Subject, ring, shoot
from benchmarks.quality.suite import spec_of
from stages.cameras import orbit_views
from stages.guidance.clip import ClipScorer
from stages.kernels.srgb import linear_to_srgb
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.pocket import world
from stages.pocket.build import build

LOOKS = {"colour": COLOUR, "textureless": CLAY}
VIEWS, ELEVATION = 8, 30.0  # of the CLIP scores
PICTURE = 256  # side in pixels of the renders that CLIPs see; each resizes to its own
JANUS_PICTURE, JANUS_ELEVATION = 64, 15.0
GALLERY = {"front": 0.0, "side": 60.0, "back": 180.0}  # azimuths of the gallery's pictures; the last is clay from 30
GALLERY_SIDE = 224


def assess(mesh: Mesh, prompt: str, scorers: list[ClipScorer]) -> dict[str, Any]:
    """All measurements of a mesh that stands for `prompt`; those against ground truth only inside the pocket world.

    Returns: JSON-ready; None stands for what could not be measured.
    """
    spec = spec_of(prompt)
    truth = None if spec is None else build(spec)
    subject, ideal = Subject.of(mesh), None if truth is None else Subject.of(truth)
    result: dict[str, Any] = {"clip": clip_facts(subject, scorers), "mesh": mesh_facts(mesh)}
    result["colour"] = colour_facts(subject, ideal)
    if truth is not None and ideal is not None:
        result["geometry"] = {k: _finite(v) for k, v in geometry.compare(mesh, truth).items()}
        result["picture"] = {k: _finite(v) for k, v in picture_facts(subject, ideal).items()}
        if spec.other is None and world.true_front(spec.kind):
            result["janus"] = janus_facts(subject, ideal)
    return result


def clip_facts(subject: Subject, scorers: list[ClipScorer]) -> dict[str, Any]:
    """Return the mean unit embedding of each look under each CLIP; scores against texts are made from them later."""
    cameras, facts = ring(VIEWS, ELEVATION), {scorer.name: {} for scorer in scorers}
    for look, shading in LOOKS.items():
        images, _ = shoot(subject, cameras, PICTURE, shading)
        for scorer in scorers:
            with torch.no_grad():
                mean = metrics.mean_embedding(scorer.embed_images(images)).cpu()
            facts[scorer.name][look] = [round(v, 6) for v in mean.tolist()]
    return facts


def colour_facts(subject: Subject, truth: Subject | None) -> dict[str, float | None]:
    """Return saturation, brightness and detail, and where there is a truth their errors against it.

    saturation_error, brightness_error: signed differences. colour_difference: of the mean colours, Delta E.
    detail_ratio: high-frequency energy over the truth's.
    """
    looks, lab = _looks(subject)
    facts = dict(looks)
    if truth is not None:
        theirs, their_lab = _looks(truth)
        facts["colour_difference"] = metrics.colour_difference(lab, their_lab)
        facts["saturation_error"] = looks["saturation"] - theirs["saturation"]
        facts["brightness_error"] = looks["brightness"] - theirs["brightness"]
        facts["detail_ratio"] = looks["detail"] / theirs["detail"] if theirs["detail"] > 1e-6 else math.nan
    return {k: _finite(v) for k, v in facts.items()}


def _looks(subject: Subject) -> tuple[dict[str, float], torch.Tensor]:
    """Numbers of an asset's colours and detail, and its mean colour in each view."""
    cameras = ring(4, ELEVATION)
    unshaded = shoot(subject, cameras, 128, ALBEDO)
    saturation, brightness = metrics.saturation_brightness(*unshaded)
    detail = metrics.detail(*shoot(subject, cameras, PICTURE, COLOUR))
    return {"saturation": saturation, "brightness": brightness, "detail": detail}, metrics.mean_lab(*unshaded)


def janus_facts(subject: Subject, truth: Subject) -> dict[str, Any]:
    """Return the share of front-like views from behind, and the verdict."""
    cameras = orbit_views(metrics.janus_azimuths(), JANUS_ELEVATION)
    images = [shoot(s, cameras, JANUS_PICTURE)[0] for s in (subject, truth)]
    features = [metrics.picture_features(i) for i in (*images, images[1].flip(2))]
    share = metrics.front_share(*features)
    return {"front_share": round(share, 4), "two_faced": metrics.two_faced(share)}


def mesh_facts(mesh: Mesh) -> dict[str, Any]:
    """Counts and verdicts of the welded surface (a GLB is split along UV seams), self-intersections, UV stretch."""
    report = measure(welded(mesh)).as_dict()
    keys = (
        "vertices",
        "faces",
        "components",
        "boundary_edges",
        "nonmanifold_edges",
        "nonmanifold_vertices",
        "watertight",
        "manifold",
        "oriented",
        "solid",
        "volume",
        "area",
    )
    facts: dict[str, Any] = {k: report[k] for k in keys}
    facts["self_intersections"] = geometry.self_intersections(mesh)
    facts["uv_stretch"] = _finite(geometry.uv_stretch(mesh))
    facts["uv_collapsed"] = _finite(geometry.uv_collapsed(mesh))
    facts["texture"] = None if mesh.texture is None else list(mesh.texture.shape[:2])
    return facts


def welded(mesh: Mesh) -> Mesh:
    """Return the mesh with equal positions made one vertex."""
    if len(mesh.faces) == 0:
        return Mesh(mesh.vertices, mesh.faces)
    vertices, place = np.unique(mesh.vertices, axis=0, return_inverse=True)
    return Mesh(vertices, place.reshape(-1)[mesh.faces].astype(np.int32))


def draw_gallery(mesh: Mesh, path: Path) -> None:
    """Front, side, back and a textureless view side by side, as one picture."""
    subject = Subject.of(mesh)
    views = orbit_views(list(GALLERY.values()), 20.0)
    strip = [
        *shoot(subject, views, GALLERY_SIDE)[0],
        shoot(subject, orbit_views([30.0], 20.0), GALLERY_SIDE, CLAY)[0][0],
    ]
    picture = (linear_to_srgb(torch.cat(strip, 1)) * 255).round().byte().numpy()
    Image.fromarray(picture).save(path, quality=88)


def _finite(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
