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
import tempfile
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
from pipeline import Config, Result, generate, load_config
from pipeline.output.files import write_whole
from stages import CoarseStage, ReferencePrior, UserError
from stages.cameras import Views, orbit_views
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.measure import face_areas, measure
from stages.mesh.mesh import Mesh
from stages.paths import from_home

SIZE = 128  # side of the evaluation pictures
SHOWN = (0, 8)  # views in the picture: level from the front, from behind and above
UNWATCHED = {"export.turntable_frames": 0, "preview_every": 1_000_000}  # nobody looks at the run's own pictures
TARGETS = {  # bounds that a result has to reach; of Chamfer from below
    "coarse": {"iou": 0.93, "psnr_db": 22.0},
    "fine": {"iou": 0.97, "psnr_db": 26.0, "chamfer": 0.01, "watertight": True, "manifold": True, "components": 1},
}


def unseen_views() -> Views:
    """18 views: three elevations, azimuths that are offset between them."""
    azimuths = [60.0 * k + offset for offset in (5.0, 25.0, 45.0) for k in range(6)]
    return orbit_views(azimuths, torch.tensor([0.0, 25.0, 50.0]).repeat_interleave(6))


def missed(stage: str, scores: dict[str, Any]) -> list[str]:
    """Return the targets of a stage that its scores do not reach."""

    def reached(name: str, bound: Any) -> bool:
        if name == "chamfer":
            return scores[name] <= bound
        return scores[name] >= bound if isinstance(bound, float) else scores[name] == bound

    return [name for name, bound in TARGETS[stage].items() if not reached(name, bound)]


def compare(images: Tensor, coverage: Tensor, target: Tensor, target_coverage: Tensor) -> dict[str, float]:
    """Return silhouette IoU and PSNR of linear pictures [V, H, W, 3] with coverage [V, H, W, 1]."""
    inside, target_inside = coverage > 0.5, target_coverage > 0.5
    square = (linear_to_srgb(images) - linear_to_srgb(target)) ** 2
    either = (inside | target_inside)[..., 0]
    return {
        "iou": float((inside & target_inside).sum() / (inside | target_inside).sum().clamp_min(1)),
        "psnr_db": -10 * math.log10(float(square.mean())),
        "psnr_object_db": -10 * math.log10(float(square[either].mean())),
    }


def surface_points(mesh: Mesh, count: int, seed: int) -> np.ndarray:
    """Return points [count, 3] uniform in area."""
    rng = np.random.default_rng(seed)
    areas = face_areas(mesh.vertices, mesh.faces)
    face = rng.choice(len(areas), count, p=areas / areas.sum())
    u, v = np.sqrt(rng.random(count)), rng.random(count)
    a, b, c = (mesh.vertices[mesh.faces[face, k]] for k in range(3))
    return a * (1 - u)[:, None] + b * (u * (1 - v))[:, None] + c * (u * v)[:, None]


def chamfer(mesh: Mesh, target: Mesh, count: int = 200_000) -> float:
    """Return the symmetric mean point distance over the diagonal of the target's box."""
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

    def of_field(self, stage: CoarseStage) -> tuple[dict[str, float], Tensor]:
        """Return scores and pictures of a coarse stage, rendered as volume six views at a time."""
        grey = srgb_to_linear(torch.full((3,), GREY)).to(stage.device)
        groups = [self.views[k : k + 6].to(stage.device) for k in range(0, len(self.views), 6)]
        parts = [stage.render(group, SIZE, backdrop=grey) for group in groups]
        images = torch.cat([part.colour for part in parts]).cpu()
        return self.of_pictures(images, torch.cat([part.opacity for part in parts])), images

    def of_mesh(self, mesh: Mesh) -> tuple[dict[str, Any], Tensor]:
        """Return scores and pictures of a finished mesh with its texture, and its topology."""
        images, coverage = albedo_of(Subject.of(mesh), self.views, SIZE)
        report = measure(mesh)
        topology = {k: getattr(report, k) for k in ("watertight", "manifold", "oriented", "components", "faces")}
        scores = self.of_pictures(images, coverage)
        return scores | {"chamfer": chamfer(mesh, self.mesh), "chamfer_floor": self.floor()} | topology, images

    def floor(self) -> float:
        """Return what the Chamfer distance reads for the mesh itself."""
        return chamfer(self.mesh, self.mesh)


def exact_priors(mesh: Mesh, config: Config) -> dict[str, ReferencePrior]:
    """Return the exact prior of a mesh for each stage of a run, with images of the size that the stage renders at."""

    def prior(stage: str) -> ReferencePrior:
        resolution = config.reference.resolution or getattr(config, stage).resolution
        return ReferencePrior(mesh, config.reference.model_copy(update={"resolution": resolution}), config.prompts)

    return {stage: prior(stage) for stage in config.stages}


def rebuild(name: str, config: Config) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Run the configured stages on a mesh, as `pipeline run` does, and measure what each came to.

    Args:
        name: of MESHES.
        config: of the run; its priors are replaced by the exact one.
    Returns: a result line for each stage, and the linear pictures [len(SHOWN), SIZE, SIZE, 3] of target and stages.
    """
    judge = Judge(MESHES[name]())
    lines, pictures = [], [judge.images[list(SHOWN)]]
    with tempfile.TemporaryDirectory() as scratch:
        priors = exact_priors(judge.mesh, config)
        result = generate(config=config, settings=UNWATCHED, prior=priors, out=Path(scratch) / name)
        for stage in config.stages:
            if stage == "coarse":
                scores, images = judge.of_field(result.stage(stage))
            else:
                scores, images = judge.of_mesh(result.mesh.data)
            line = {"mesh": name, "stage": stage} | times_of(result, stage)
            line |= {k: round(v, 5) if isinstance(v, float) else v for k, v in scores.items()}
            line |= {"targets": TARGETS[stage], "missed": missed(stage, scores)}
            lines.append(line)
            pictures.append(images[list(SHOWN)])
            print(line, flush=True)
    return lines, pictures


def times_of(result: Result, stage: str) -> dict[str, Any]:
    """Return the steps of a stage, the seconds that they took, and its seconds by phase."""
    facts = result.record["stages"][stage]
    seconds = sum(row["seconds"] for row in result.metrics if row["stage"] == stage)
    phases = {name: round(value, 1) for name, value in facts["phases"].items()}
    return {"steps": facts["steps"], "seconds": round(seconds, 1), "phases": phases}


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
    parser.add_argument(
        "--results", type=from_home, default=RESULTS, help="folder for reference.jsonl and reference.png"
    )
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
