"""Does the whole pipeline rebuild a known mesh? The exact reference prior through the coarse and the fine stage.

    python -m benchmarks.rebuild [--meshes knot,bowl,bracket] [--stages coarse,fine] [--config reference] [KEY=VALUE]

Measured on 18 views that no training step has seen (three elevations), against the given mesh:
    iou         intersection over union of the silhouettes (coverage > 0.5), all views together
    psnr_db     of unshaded sRGB pictures on grey, from the mean squared error over the pixels of all views
    psnr_object_db  the same over the pixels of either silhouette only
    chamfer     mean of the two mean distances between 200,000 points of each surface, over the box's diagonal;
                between two samplings of one surface it reads `chamfer_floor`, not 0
and whether the final mesh, decimated and textured as it is exported, is closed, manifold and in one piece. One JSON
line a mesh and stage goes to results/reference.jsonl, and a picture of all to results/reference.png.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.spatial import cKDTree
from torch import Tensor

from benchmarks.environment import RESULTS, append_line, environment
from benchmarks.quality.render import GREY, Subject, albedo_of
from benchmarks.rebuild_meshes import MESHES
from pipeline.config.model import Config, load_config
from pipeline.output.asset import finalise
from pipeline.output.files import write_whole
from pipeline.runs.run import choose_device
from pipeline.runs.stages import make_stage
from stages.cameras import Views, orbit_views
from stages.errors import UserError
from stages.guidance.exact import ReferencePrior
from stages.guidance.guidance import Guidance
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.measure import face_areas, measure
from stages.mesh.mesh import Mesh
from stages.prompts import ViewPrompts
from stages.stage import Stage

SIZE = 128  # side of the evaluation pictures
SHOWN = (0, 8)  # views in the picture: level from the front, from behind and above
TARGETS = {  # bounds that a result has to reach; of Chamfer from below
    "coarse": {"iou": 0.93, "psnr_db": 22.0},
    "fine": {"iou": 0.97, "psnr_db": 26.0, "chamfer": 0.01, "watertight": True, "manifold": True, "components": 1},
}


def unseen_views() -> Views:
    """18 views: three elevations, azimuths that are offset between them."""
    azimuths = [60.0 * k + offset for offset in (5.0, 25.0, 45.0) for k in range(6)]
    return orbit_views(azimuths, torch.tensor([0.0, 25.0, 50.0]).repeat_interleave(6))


def missed(stage: str, scores: dict[str, Any]) -> list[str]:
    """The targets of a stage that its scores do not reach."""

    def reached(name: str, bound: Any) -> bool:
        if name == "chamfer":
            return scores[name] <= bound
        return scores[name] >= bound if isinstance(bound, float) else scores[name] == bound

    return [name for name, bound in TARGETS[stage].items() if not reached(name, bound)]


def compare(images: Tensor, coverage: Tensor, target: Tensor, target_coverage: Tensor) -> dict[str, float]:
    """Silhouette IoU and PSNR of linear pictures [V, H, W, 3] with coverage [V, H, W, 1]."""
    inside, wanted = coverage > 0.5, target_coverage > 0.5
    square = (linear_to_srgb(images) - linear_to_srgb(target)) ** 2
    either = (inside | wanted)[..., 0]
    return {
        "iou": float((inside & wanted).sum() / (inside | wanted).sum().clamp_min(1)),
        "psnr_db": -10 * math.log10(float(square.mean())),
        "psnr_object_db": -10 * math.log10(float(square[either].mean())),
    }


def surface_points(mesh: Mesh, count: int, seed: int) -> np.ndarray:
    """Points [count, 3] uniform in area."""
    rng = np.random.default_rng(seed)
    areas = face_areas(mesh.vertices, mesh.faces)
    face = rng.choice(len(areas), count, p=areas / areas.sum())
    u, v = np.sqrt(rng.random(count)), rng.random(count)
    a, b, c = (mesh.vertices[mesh.faces[face, k]] for k in range(3))
    return a * (1 - u)[:, None] + b * (u * (1 - v))[:, None] + c * (u * v)[:, None]


def chamfer(mesh: Mesh, target: Mesh, count: int = 200_000) -> float:
    """Symmetric mean point distance over the diagonal of the target's box."""
    p, q = surface_points(mesh, count, 0), surface_points(target, count, 1)
    there, back = cKDTree(q).query(p)[0].mean(), cKDTree(p).query(q)[0].mean()
    return float((there + back) / 2 / np.linalg.norm(np.ptp(target.vertices, axis=0)))


@dataclass
class Judge:
    """The truth about one mesh, and what it says of an approximation of it."""

    mesh: Mesh
    views: Views = field(default_factory=unseen_views)

    def __post_init__(self) -> None:
        self.images, self.coverage = albedo_of(Subject.of(self.mesh), self.views, SIZE)

    def of_pictures(self, images: Tensor, coverage: Tensor) -> dict[str, float]:
        return compare(images.cpu(), coverage.cpu(), self.images, self.coverage)

    def of_field(self, stage: Any) -> tuple[dict[str, float], Tensor]:
        """Scores and pictures of a coarse stage, rendered as volume six views at a time."""
        grey = srgb_to_linear(torch.full((3,), GREY)).to(stage.device)
        groups = [self.views[k : k + 6].to(stage.device) for k in range(0, len(self.views), 6)]
        parts = [stage.render(group, SIZE, backdrop=grey) for group in groups]
        images = torch.cat([part.colour for part in parts]).cpu()
        return self.of_pictures(images, torch.cat([part.opacity for part in parts])), images

    def of_mesh(self, mesh: Mesh) -> tuple[dict[str, Any], Tensor]:
        """Scores and pictures of a finished mesh with its texture, and its topology."""
        images, coverage = albedo_of(Subject.of(mesh), self.views, SIZE)
        report = measure(mesh)
        topology = {k: getattr(report, k) for k in ("watertight", "manifold", "oriented", "components", "faces")}
        scores = self.of_pictures(images, coverage)
        return scores | {"chamfer": chamfer(mesh, self.mesh), "chamfer_floor": self.floor()} | topology, images

    def floor(self) -> float:
        """What the Chamfer distance reads for the mesh itself."""
        return chamfer(self.mesh, self.mesh)


def guidance_of(config: Config, name: str, mesh: Mesh) -> Guidance:
    """The exact reference prior of `mesh` under a stage's own guidance settings, as the pipeline builds it."""
    resolution = config.reference.resolution or getattr(config, name).resolution
    prior = ReferencePrior(mesh, config.reference.model_copy(update={"resolution": resolution}), config.prompts)
    prompts = ViewPrompts(config.prompt, config.negative, config.prompts)
    settings = getattr(config.guidance, name)
    return Guidance(prior, settings, prompts, torch.Generator().manual_seed(config.seed))


def take(stage: Stage, label: str) -> float:
    """All steps of a stage, saying now and then how it goes; seconds."""
    began = said = time.perf_counter()
    for _ in range(stage.steps):
        metrics = stage.step()
        now = time.perf_counter()
        if now - said > 20:
            said = now
            print(
                f"{label} {stage.step_index}/{stage.steps} {now - began:.0f} s  {stage.headline(metrics)}", flush=True
            )
    return time.perf_counter() - began


def rebuild(name: str, config: Config) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Run the configured stages on one of MESHES.

    Returns: a result line for each stage, and the linear pictures [len(SHOWN), SIZE, SIZE, 3] of target and stages.
    """
    judge = Judge(MESHES[name]())
    device, asset, lines, pictures = choose_device(config.device), None, [], [judge.images[list(SHOWN)]]
    for stage_name in config.stages:
        guidance = guidance_of(config, stage_name, judge.mesh)
        stage = make_stage(stage_name, getattr(config, stage_name), guidance, device, config.seed, asset)
        seconds = take(stage, f"{name} {stage_name}")
        line: dict[str, Any] = {"mesh": name, "stage": stage_name, "steps": stage.steps, "seconds": round(seconds, 1)}
        line["phases"] = {k: round(v, 1) for k, v in stage.times.items()}
        asset = stage.finish()
        if asset.mesh is None:
            scores, images = judge.of_field(stage)
        else:
            scores, images = judge.of_mesh(finalise(asset, config.export))
        line |= {k: round(v, 5) if isinstance(v, float) else v for k, v in scores.items()}
        line |= {"targets": TARGETS[stage_name], "missed": missed(stage_name, scores)}
        lines.append(line)
        pictures.append(images[list(SHOWN)])
        print(line, flush=True)
    return lines, pictures


def save_picture(path: Path, rows: list[list[Tensor]]) -> None:
    """One row a mesh: the views of the target, then of each stage."""
    picture = torch.cat([torch.cat([view for part in row for view in part], 1) for row in rows])
    levels = (linear_to_srgb(picture).numpy() * 255).round().astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(levels).save(data, "PNG", optimize=True)
    write_whole(path, data.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", default=",".join(MESHES), help="which of the meshes, comma-separated")
    parser.add_argument("--stages", default="coarse,fine", help="stages to run")
    parser.add_argument("--config", default="reference", help="recipe or YAML file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for reference.jsonl and reference.png")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    arguments = parser.parse_intermixed_args()
    if (arguments.overrides or arguments.config != "reference") and arguments.results == RESULTS:
        parser.error("other settings than the recipe's must not end up in the table: give another --results")
    names = arguments.meshes.split(",")
    for name in names:
        if name not in MESHES:
            raise SystemExit(f"no such mesh: {name}; there are {', '.join(MESHES)}")
    try:
        config = load_config(arguments.config, arguments.overrides, {"stages": arguments.stages})
        rows = []
        for name in names:
            lines, pictures = rebuild(name, config)
            rows.append(pictures)
            for line in lines:
                facts = line | {"overrides": arguments.overrides} | environment()
                append_line(arguments.results / "reference.jsonl", facts)
            save_picture(arguments.results / "reference.png", rows)
    except UserError as error:
        raise SystemExit(f"{error.what}\n{error.why}\n{error.fix}") from error


if __name__ == "__main__":
    main()
