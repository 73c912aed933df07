"""The systems that are compared: recipes of `pipeline run`, and the ends of the scale: ground truth and a random field.

Each makes one mesh of (prompt, seed) in a cell's folder and says what it took. The pipeline is run as the user runs
it, `python -m pipeline run ...`, in a process of its own; an interrupted run is resumed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import FOLDER
from benchmarks.quality.suite import spec_of
from benchmarks.speed.energy import energy_j
from benchmarks.speed.runs import environment_of
from stages.errors import UserError
from stages.gan.model import load_sizes
from stages.gan.stage import class_of
from stages.mesh.files.read import read_mesh
from stages.mesh.mesh import Mesh
from stages.networks import networks_folder
from stages.pocket.build import build


@dataclass(frozen=True)
class Job:
    """One mesh to be made.

    folder: where. threads: how many the run may use; 0 where it has the machine to itself.
    options: more words for `pipeline run`, key=value.
    coarse_run: a finished run of the same prompt, seed and options whose coarse stage may be taken over, or None.
    """

    prompt: str
    seed: int
    folder: Path
    threads: int
    options: tuple[str, ...] = ()
    coarse_run: Path | None = None


Make = Callable[[Job], tuple[Mesh, dict[str, Any]]]  # the mesh and what it took


@dataclass(frozen=True)
class System:
    """A name's maker and meaning.

    seeded: whether its result depends on the seed. recipe: of its run; stages: those of the recipe that it runs, None
    for all of them. begins_as: the system whose run is the first stage of this one's. needs_truth: whether it is made
    from the ground truth's mesh, which only captions of the pocket world have.
    """

    make: Make
    meaning: str
    seeded: bool = True
    recipe: str | None = None
    stages: tuple[str, ...] | None = None
    begins_as: str | None = None
    needs_truth: bool = False


class Failed(Exception):
    """A run ended without a mesh, for a reason that is a result: what the user would have been told."""


def run_pipeline(job: Job, words: list[str]) -> tuple[Mesh, dict[str, Any]]:
    """A mesh by `pipeline run`, and its times; the GLB is read back by trimesh, not by the code that wrote it."""
    run = job.folder / "run"
    finished = (run / "mesh.glb").is_file()
    if (run / "config.yaml").is_file():
        command = ["resume", str(run)]
    else:
        command = ["run", "--prompt", job.prompt, "--seed", str(job.seed), "--out", str(run), *words, *job.options]
    started = time.perf_counter()
    with open(job.folder / "log.txt", "a") as log, energy_j() as energy:
        process = subprocess.run(
            [sys.executable, "-m", "pipeline", *command],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=_environment(job.threads),
            check=False,
        )
    seconds = time.perf_counter() - started
    if process.returncode == 130 or process.returncode < 0:
        raise KeyboardInterrupt
    record = json.loads((run / "run.json").read_text()) if (run / "run.json").is_file() else {}
    if finished:  # made before and judged again: its own record says how long it took, to the second
        seconds = sum(_seconds_of(session) for session in record.get("sessions", []))
    if process.returncode != 0:
        tail = (job.folder / "log.txt").read_text(errors="replace").strip().splitlines()[-6:]
        if process.returncode == 2 and record:  # it ran and found that there is no object
            raise Failed("\n".join(tail))
        raise RuntimeError(f"pipeline {' '.join(command)} ended with {process.returncode}:\n" + "\n".join(tail))
    cost = _times(record, seconds, job)
    # Else it is not this run's alone, or not the whole of it.
    if energy and not finished and job.threads == 0 and job.coarse_run is None and not cost["interrupted"]:
        cost["energy_j"] = {name: round(value, 1) for name, value in energy.items()}
    return read_mesh(run / "mesh.glb"), cost


def _seconds_of(session: dict[str, Any]) -> float:
    """How long a session of a run took, 0 for one that left no end."""
    if "ended" not in session:
        return 0.0
    return (datetime.fromisoformat(session["ended"]) - datetime.fromisoformat(session["started"])).total_seconds()


def _environment(threads: int) -> dict[str, str]:
    """The environment with every thread pool at `threads`; 0 leaves them alone."""
    return environment_of(threads) if threads else dict(os.environ)


def _times(record: dict[str, Any], seconds: float, job: Job) -> dict[str, Any]:
    """Seconds by stage and phase, steps a second and peak memory, of this run and of a coarse run it started from."""
    stages = dict(record.get("stages", {}))
    total, memory = seconds, record.get("peak_memory_mb")
    taken_over = job.coarse_run is not None and "coarse" not in stages  # else resumed: it has made its own
    if taken_over:
        earlier = json.loads((job.coarse_run / "run.json").read_text())
        stages = {"coarse": earlier["stages"]["coarse"], **stages}
        total += earlier["stages"]["coarse"]["seconds"]
        memory = max(memory or 0, earlier.get("peak_memory_mb") or 0) or None
    facts = {
        name: {
            "seconds": round(stage["seconds"], 2),
            "steps": stage["steps"],
            "steps_per_s": round(stage["steps"] / stage["seconds"], 3) if stage["seconds"] else None,
            "phases": {k: round(v, 2) for k, v in stage.get("phases", {}).items()},
        }
        for name, stage in stages.items()
    }
    return {
        "wall_s": round(total, 1),  # process start, loading, both stages, export
        "stages": facts,
        "export": record.get("export", {}).get("phases"),
        "peak_memory_mb": memory,
        "coarse_taken_over": taken_over,
        "interrupted": len(record.get("sessions", [])) > 1,  # wall_s then misses what earlier sessions took
        "threads": job.threads or None,
    }


def _coarse(recipe: str | None = None) -> Make:
    return lambda job: run_pipeline(job, [*_config(recipe), "--stages", "coarse"])


def _two_stages(recipe: str | None = None) -> Make:
    def make(job: Job) -> tuple[Mesh, dict[str, Any]]:
        if job.coarse_run is None:
            return run_pipeline(job, [*_config(recipe), "--stages", "coarse,fine"])
        return run_pipeline(job, [*_config(recipe), "--stages", "fine", "--from", str(job.coarse_run)])

    return make


def _stages(stages: str) -> Make:
    """A run of these stages by the recipe that they take of themselves."""
    return lambda job: run_pipeline(job, ["--stages", stages])


def _gan(stages: str) -> Make:
    """A run of these stages, begun by a class's generator; a prompt of another class is a result, not a fault."""

    def make(job: Job) -> tuple[Mesh, dict[str, Any]]:
        from pipeline.config.model import load_config

        settings = load_config(None, list(job.options), {"stages": stages}).gan
        sizes = load_sizes(networks_folder(settings.weights, "gan"))
        try:
            class_of(job.prompt, sizes)
        except UserError as error:
            raise Failed(f"{error.what}\n{error.why}\n{error.fix}") from None
        return _stages(stages)(job)

    return make


def _config(recipe: str | None) -> list[str]:
    """A recipe as words; none for the default, which is what a user types."""
    return [] if recipe is None else ["--config", recipe]


def _reference(job: Job) -> tuple[Mesh, dict[str, Any]]:
    """Coarse and fine under the exact prior of the prompt's own mesh: what the optimisation can reach at best."""
    target = job.folder / "truth.ply"
    if not target.is_file():
        write_ply(_truth_mesh(job.prompt), target)
    return run_pipeline(job, ["--config", "reference", f"reference.mesh={target}", "--stages", "coarse,fine"])


def _texture(job: Job) -> tuple[Mesh, dict[str, Any]]:
    """The ground truth's shape without its colours, painted by the prompt; that it is the same shape is checked.

    The plain mesh has texture coordinates of its own, so that keeping them is checked as well.
    Raises: RuntimeError where the result is another mesh: a bug, not a score.
    """
    plain = job.folder / "plain.glb"
    if not plain.is_file():
        write_plain(_truth_mesh(job.prompt), plain)
    mesh, cost = run_pipeline(job, ["--config", "texture", "--init-mesh", str(plain)])
    source = read_mesh(plain)
    if not np.array_equal(mesh.vertices[mesh.faces], source.vertices[source.faces]):
        raise RuntimeError(f"{job.folder}: the locked mesh came back with other triangles")
    if not np.allclose(mesh.uv[mesh.uv_faces], source.uv[source.uv_faces], atol=1e-5):
        raise RuntimeError(f"{job.folder}: the locked mesh came back with other texture coordinates")
    return mesh, cost | {"geometry": "untouched", "texture_coordinates": "its own"}


def _recipe(name: str) -> Make:
    def make(job: Job) -> tuple[Mesh, dict[str, Any]]:
        return run_pipeline(job, ["--config", name])

    return make


def _truth_mesh(prompt: str) -> Mesh:
    spec = spec_of(prompt)
    if spec is None:
        raise UserError(
            f"no ground truth for {prompt!r}",
            "only captions of the pocket world have one",
            "leave truth and reference out of --systems",
        )
    return build(spec)


def _truth(job: Job) -> tuple[Mesh, dict[str, Any]]:
    return _truth_mesh(job.prompt), {}


def _floor(job: Job) -> tuple[Mesh, dict[str, Any]]:
    """A random smooth blob with random smooth colours, drawn without looking at the prompt: by seed and place alone."""
    return random_blob(np.random.default_rng([job.seed, len(job.prompt), sum(map(ord, job.prompt))])), {}


def random_blob(rng: np.random.Generator, waves: int = 12) -> Mesh:
    """Return a closed random shape of radius about 0.6: a sphere moved by random waves, coloured by others."""
    import trimesh

    ball = trimesh.creation.icosphere(5, 1.0)
    x = ball.vertices
    directions = rng.normal(0, 2.5, (4, waves, 3))
    phases, weights = rng.uniform(0, 2 * np.pi, (4, waves)), rng.normal(0, 1, (4, waves))
    fields = np.einsum("kw,kwv->kv", weights, np.sin(np.einsum("kwc,vc->kwv", directions, x) + phases[..., None]))
    radius = 0.6 * np.exp(0.12 * fields[0])
    colours = 1 / (1 + np.exp(-fields[1:].T))
    return Mesh((x * radius[:, None]).astype(np.float32), ball.faces.astype(np.int32), colours.astype(np.float32))


def write_ply(mesh: Mesh, path: Path) -> None:
    """A mesh with 8-bit sRGB vertex colours for programs that read files."""
    import torch
    import trimesh

    from stages.kernels.srgb import linear_to_srgb

    colours = (linear_to_srgb(torch.from_numpy(mesh.colours)) * 255).round().byte().numpy()
    part = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=colours, process=False)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(part.export(file_type="ply"))
    temporary.replace(path)


def write_plain(mesh: Mesh, path: Path) -> None:
    """A mesh without its colours, in charts of its own, as a GLB with a plain grey texture."""
    from pipeline.output.glb import write_glb
    from stages.mesh.texture.uv import unwrap

    bare = Mesh(mesh.vertices, mesh.faces)
    atlas = unwrap(bare, 1024, method="boxes")
    grey = np.full((4, 4, 3), 160, np.uint8)
    write_glb(replace(bare, uv=atlas.uv, uv_faces=atlas.uv_faces, texture=grey), path)


SYSTEMS: dict[str, System] = {
    "coarse": System(_coarse(), "DreamFusion: the coarse stage alone, meshed", recipe="default", stages=("coarse",)),
    "magic3d": System(_two_stages(), "Magic3D: coarse, then fine", recipe="default", begins_as="coarse"),
    "sphere": System(_recipe("sphere"), "fine only, from a sphere", recipe="sphere"),
    "points": System(_stages("points"), "Point-E: points from a picture, meshed", recipe="points", stages=("points",)),
    "points+fine": System(_stages("points,fine"), "Point-E, then fine", recipe="points"),
    "triplane": System(
        _stages("triplane"), "Rodin: a tri-plane from words, meshed", recipe="triplane", stages=("triplane",)
    ),
    "triplane+fine": System(_stages("triplane,fine"), "Rodin, then fine", recipe="triplane"),
    "gan": System(_gan("gan"), "GET3D: a mesh of a class's generator", recipe="gan", stages=("gan",)),
    "gan+fine": System(_gan("gan,fine"), "GET3D, then fine", recipe="gan"),
    "texture": System(
        _texture, "the ground truth's shape, plain, painted and not moved", recipe="texture", needs_truth=True
    ),
    "reference": System(
        _reference,
        "Magic3D under the exact prior of the ground truth: upper bound",
        recipe="reference",
        needs_truth=True,
    ),
    "truth": System(_truth, "ground truth: ceiling", seeded=False, needs_truth=True),
    "floor": System(_floor, "random smooth blob: floor"),
}


CURES = FOLDER / "cures"  # plain SDS with one rule or cure each: sds+NAME


def cures() -> list[str]:
    """Return the systems sds+NAME, for the recipes of benchmarks/cures."""
    return [f"sds+{path.stem}" for path in sorted(CURES.glob("*.yaml"))]


def find_system(name: str) -> System:
    """A system by name, sds+CURE, or any recipe of configs/ or YAML file by its name; RECIPE:coarse is its coarse stage
    alone, which RECIPE takes over. UserError for an unknown one."""
    if name in SYSTEMS:
        return SYSTEMS[name]
    from pipeline.config.model import load_config
    from pipeline.config.recipes import find_recipe, recipes

    recipe = name.removesuffix(":coarse")
    only_coarse = recipe != name
    if recipe in cures():
        path = str(CURES / f"{recipe.removeprefix('sds+')}.yaml")
        meaning = "plain SDS with one rule or cure"
    else:
        try:
            path = str(find_recipe(recipe))
        except UserError as error:
            known = [*SYSTEMS, *recipes(), *cures()]
            raise UserError(f"no such system: {name}", f"known: {', '.join(known)}", "choose among them") from error
        meaning = f"recipe {Path(path).stem}"
    two = load_config(path, [], {}).stages == ["coarse", "fine"]
    if only_coarse and not two:
        raise UserError(f"no such system: {name}", f"{recipe} does not begin with a coarse stage", f"ask for {recipe}")
    if only_coarse:
        return System(_coarse(path), f"{meaning}, the coarse stage alone", recipe=path, stages=("coarse",))
    if two:
        return System(_two_stages(path), meaning, recipe=path, begins_as=f"{recipe}:coarse")
    return System(_recipe(path), meaning, recipe=path)
