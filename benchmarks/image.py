"""`pipeline run --image` on pictures of pocket objects of random proportions, beside runs by their words alone.

    python -m benchmarks.image --out runs/image             # twelve objects
    python -m benchmarks.image --out runs/image --count 2   # the first two

An object's picture shows its plain colours seen from in front and a little above. Measured on the finished meshes:
silhouette IoU and PSNR of the object's box in the picture's own view, volume IoU with that very object, and whether
the pocket CLIP finds its caption first among those of all single plain objects (R-Precision), each with the picture and
by words alone. A line a run is added to OUT/image.jsonl; runs that are finished are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.quality.geometry import volume_iou
from benchmarks.quality.render import Subject, ring, shoot
from pipeline import Result, generate
from pipeline.output.video import render_frames
from pipeline.priors.clips import POCKET_CLIP
from stages.cameras import Views, orbit_views, to_clip
from stages.guidance.clip import ClipScorer
from stages.kernels.raster import rasterise
from stages.mesh.mesh import Mesh
from stages.paths import from_home
from stages.pocket import world
from stages.pocket.build import build
from stages.pocket.palette import COLOURS
from stages.render.shade import ALBEDO

KINDS = ("mug", "house", "duck", "chair", "robot", "car", "teapot", "mushroom", "rocket", "table", "snowman", "boat")
AZIMUTH, ELEVATION, SIZE = 25.0, 15.0, 384


def objects(count: int) -> list[tuple[str, Mesh]]:
    """Return captions and their objects in random proportions, always the same ones."""
    made = []
    for k, kind in enumerate(KINDS[:count]):
        rng = np.random.default_rng([22, k])
        colour = [name for name in COLOURS if world.learnable(kind, name)]
        spec = world.Spec(kind, colour[int(rng.integers(len(colour)))])
        made.append((world.caption(spec), build(spec, rng, variation=1.0)))
    return made


def seen(mesh: Mesh, view: Views) -> tuple[np.ndarray, np.ndarray]:
    """Return sRGB colours [S, S, 3] in [0, 1] over grey and the silhouette [S, S] bool of a view."""
    (picture,) = render_frames(mesh, view, SIZE, shading=ALBEDO, background=0.5, supersample=1)
    vertices, faces = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces).int()
    rast = rasterise(to_clip(vertices, view), faces, SIZE, SIZE)
    return picture / 255, (rast[0, ..., 3] > 0).numpy()


def measure(mesh: Mesh, truth: Mesh, caption: str, scorer: ClipScorer, captions: list[str]) -> dict[str, float]:
    """Return what the module's docstring names, of one finished mesh."""
    view = orbit_views([AZIMUTH], ELEVATION)
    (made, mask), (wanted, true_mask) = seen(mesh, view), seen(truth, view)
    rows, columns = np.flatnonzero(true_mask.any(1)), np.flatnonzero(true_mask.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    psnr = -10 * math.log10(max(float(((made - wanted)[box] ** 2).mean()), 1e-9))
    pictures = shoot(Subject.of(mesh), ring(4), 128)[0]
    scores = scorer.embed_texts(captions) @ scorer.embed_images(pictures).mean(0)
    return {
        "silhouette_iou": float((mask & true_mask).sum() / (mask | true_mask).sum()),
        "psnr_db": psnr,
        "volume_iou": volume_iou(mesh, truth),
        "first": float(captions[int(scores.argmax())] == caption),
    }


def run_all(count: int, out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Make what is not made yet, and measure all; returns a row for each object."""
    scorer = ClipScorer(POCKET_CLIP)
    captions = list(dict.fromkeys(world.caption(s) for s in world.all_specs() if not s.other and s.pattern == "plain"))
    rows = []
    for k, (caption, truth) in enumerate(objects(count)):
        picture, mask = seen(truth, orbit_views([AZIMUTH], ELEVATION))
        file = out / f"{k:02d}.png"
        out.mkdir(parents=True, exist_ok=True)
        layers = np.concatenate([picture, mask[..., None]], -1)
        Image.fromarray((layers * 255).round().astype(np.uint8)).save(file)
        row: dict[str, Any] = {"caption": caption}
        view = {"image.azimuth_deg": AZIMUTH, "image.elevation_deg": ELEVATION, "image.fit": False}
        for name, extra in (("picture", {"image": file, "settings": view}), ("words", {})):
            folder = out / f"{k:02d}-{name}"
            if not (folder / "run.json").is_file() or Result(folder).status != "finished":
                wanted = {"settings": settings | extra.pop("settings", {})} | extra
                generate(caption, seed=k, out=folder, **wanted)
            row[name] = measure(Result(folder).mesh.data, truth, caption, scorer, captions)
        print(json.dumps(row))
        rows.append(row)
        with (out / "image.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + "\n")
    return rows


def main() -> None:
    """Entry point: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=from_home, required=True, help="folder of the runs")
    parser.add_argument("--count", type=int, default=len(KINDS), help="objects, at most twelve")
    options = parser.parse_args()
    rows = run_all(options.count, options.out, {"export.turntable_frames": 0})
    for name in ("words", "picture"):
        means = {key: float(np.mean([row[name][key] for row in rows])) for key in rows[0][name]}
        print(name, {key: round(value, 3) for key, value in means.items()})
    better = sum(row["picture"]["volume_iou"] > row["words"]["volume_iou"] for row in rows)
    print(f"volume IoU above that of the words alone: {better} of {len(rows)}")


if __name__ == "__main__":
    main()
