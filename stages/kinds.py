"""The one table of stages: what each is made by, set by, begun with and guided by. A new stage is a module and a line.

    STAGES["mine"] = StageKind(MySettings, MyStage)

is all that configuration, command line, runs, resuming and `pipeline doctor` need. Later stages stand behind the ones
they follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel

from stages.clip_mesh import ClipMeshSettings, ClipMeshStage
from stages.fine import FineSettings, FineStage
from stages.gan.stage import GanSettings, GanStage, check_class
from stages.guidance.guide import Guide
from stages.guidance.settings import GuidanceSettings
from stages.networks import check_networks, networks_folder
from stages.particles import ParticleSettings, make_coarse
from stages.points.stage import PointSettings, PointStage
from stages.ramp import constant
from stages.stage import Asset, Stage
from stages.triplane.stage import TriplaneSettings, TriplaneStage

# What the run's first stage begins with: "nothing", a user's "mesh", or another "run".
Recipe = Callable[[str, Mapping[str, Any]], str | None]


def _default_recipe(start: str, settings: Mapping[str, Any]) -> str | None:
    return None if start == "run" else "default"


@dataclass(frozen=True)
class StageKind:
    """An entry of STAGES: all facts about a stage that the rest of the toolkit reads.

    Args:
        settings: the pydantic model of its group in config.yaml; it has `steps`, `resolution` and `views_per_step`.
        make: the stage from (settings, guidance, device, seed, previous asset); guidance is None where it only
            finishes.
        guidance: its default guidance.
        follows: the stage whose asset it takes; None for one that begins a run of its own.
        follows_too: others of the same run whose asset it takes as well.
        begins_with: what it can begin a run with, of "nothing", "mesh" and "run"; of one that follows another "run"
            means that other's asset, of one that does not its own, which is edited.
        start: what it begins with where that is nothing, to complete "the run begins with ..., which starts from".
        prior: its default source.
        prior_space: which pocket prior that is, a folder of stages/pocket/weights.
        recipe: of a run that begins with it and names none, by what it begins with and the settings given for it; None
            takes the other run's settings.
        defining: settings, or groups of them, that its checkpoint depends on; their change is refused on resume.
        unread: its settings, or groups of them, that it does not read as the others stand, from (settings, what it
            starts from: as in begins_with, or the name of the stage that it follows); a run does not write them to its
            config.yaml.
        weights: the folder of its own networks below stages/pocket/weights; None where it has none.
        pictures: it holds on to the picture of `--image`.
        check: refuses by UserError, from (settings, prompt), before any work, what it cannot draw.
    """

    settings: type[BaseModel]
    make: Callable[[Any, Guide | None, torch.device, int, Asset | None], Stage]
    guidance: Callable[[], GuidanceSettings] = GuidanceSettings
    follows: str | None = None
    follows_too: tuple[str, ...] = ()
    begins_with: frozenset[str] = frozenset({"nothing"})
    start: str = "nothing"
    prior: str = "pocket"
    prior_space: str = "pixel"
    recipe: Recipe = _default_recipe
    defining: tuple[str, ...] = ()
    unread: Callable[[Any, str], set[str]] = lambda settings, start: set()
    weights: str | None = None
    pictures: bool = False
    check: Callable[[Any, str], None] = lambda settings, prompt: None

    def takes(self, stage: str) -> bool:
        """Return whether it can take the asset of that stage of the same run."""
        return stage == self.follows or stage in self.follows_too


def _coarse_recipe(start: str, settings: Mapping[str, Any]) -> str | None:
    return "edit" if start == "run" else "default"


def _fine_recipe(start: str, settings: Mapping[str, Any]) -> str | None:
    if start == "mesh":
        return "texture" if settings.get("geometry") == "locked" else "default"
    return None if start == "run" else "sphere"


def _clipmesh_recipe(start: str, settings: Mapping[str, Any]) -> str | None:
    return None if start == "run" else "clip-mesh"


def _triplane_recipe(start: str, settings: Mapping[str, Any]) -> str | None:
    return None if start == "run" else "triplane"


def _gan_recipe(start: str, settings: Mapping[str, Any]) -> str | None:
    return None if start == "run" else "gan"


def _points_recipe(start: str, settings: Mapping[str, Any]) -> str | None:
    return None if start == "run" else "points"


def _points_unread(settings: PointSettings, start: str) -> set[str]:
    return {"picture_steps", "picture_scale"} if settings.condition == "words" else set()


def _coarse_unread(settings: ParticleSettings, start: str) -> set[str]:
    off = {"particle": settings.particles == 1, "backdrops": settings.backdrops.copies == 0}
    off["transmittance"] = settings.transmittance.weight == 0
    if start == "run":
        off["start"] = True
    else:
        off |= {f"start.{name}": settings.start.source == "blob" for name in ("steps", "points", "lr")}
    return {name for name, unread in off.items() if unread}


def _fine_unread(settings: FineSettings, start: str) -> set[str]:
    return {
        "coarse": {"sphere", "solidify", "fit", "field"},  # the colour field is the coarse stage's
        "triplane": {"sphere", "solidify"},
        "points": {"sphere", "solidify"},
        "gan": {"sphere", "initialise"},
        "mesh": {"sphere", "initialise"},
        "nothing": {"initialise", "solidify", "fit"},
    }.get(start, set())


def _polishing() -> GuidanceSettings:
    """A finished shape needs no large t: it would be made anew (Magic3D sec. 4.2)."""
    return GuidanceSettings(t_max=constant(0.5))


STAGES: dict[str, StageKind] = {
    "coarse": StageKind(
        ParticleSettings,
        make_coarse,
        pictures=True,
        begins_with=frozenset({"nothing", "run"}),
        recipe=_coarse_recipe,
        unread=_coarse_unread,
        defining=("coarse.particles", "coarse.field", "coarse.background.hidden", "coarse.occupancy.resolution"),
    ),
    "points": StageKind(
        PointSettings,
        PointStage,
        recipe=_points_recipe,
        unread=_points_unread,
        defining=("points.steps", "points.upsampling", "points.condition", "points.weights", "points.clip"),
        weights="points",
        check=lambda settings, prompt: check_networks(networks_folder(settings.weights, "points"), "points"),
        pictures=True,
    ),
    "triplane": StageKind(
        TriplaneSettings,
        TriplaneStage,
        prior="clip:pocket",
        recipe=_triplane_recipe,
        defining=("triplane.steps", "triplane.upsampling", "triplane.weights"),
        weights="triplane",
        check=lambda settings, prompt: check_networks(networks_folder(settings.weights, "triplane"), "triplane"),
    ),
    "gan": StageKind(
        GanSettings,
        GanStage,
        prior="clip:pocket",
        recipe=_gan_recipe,
        defining=("gan.steps", "gan.samples", "gan.lr", "gan.weights"),
        weights="gan",
        check=check_class,
    ),
    "fine": StageKind(  # fine.resolution, as clipmesh.resolution, is the renders' and may change
        FineSettings,
        FineStage,
        pictures=True,
        guidance=_polishing,
        follows="coarse",
        follows_too=("points", "triplane", "gan"),
        begins_with=frozenset({"nothing", "mesh", "run"}),
        start="a sphere, a mesh or a coarse stage",
        prior_space="latent",
        recipe=_fine_recipe,
        unread=_fine_unread,
        defining=(
            *("fine.geometry", "fine.tets", "fine.deformation", "fine.field", "fine.detail"),
            *("fine.initialise", "fine.sphere", "fine.solidify", "fine.fit", "place"),
        ),
    ),
    "clipmesh": StageKind(
        ClipMeshSettings,
        ClipMeshStage,
        begins_with=frozenset({"nothing", "mesh"}),
        start="a sphere or a mesh",
        prior="clip:pocket",
        recipe=_clipmesh_recipe,
        defining=(
            *("clipmesh.radius", "clipmesh.control", "clipmesh.control_faces", "clipmesh.subdivisions"),
            *("clipmesh.texture_size", "clipmesh.padding", "clipmesh.unwrap", "place"),
        ),
    ),
}


def predecessor(stage: str, stages: Iterable[str]) -> str | None:
    """Return the one among some stages whose asset a stage takes, None where there is none."""
    return next((name for name in stages if STAGES[stage].takes(name)), None)


def chains() -> list[list[str]]:
    """Return the orders that stages can be run in, each from a stage that follows none."""
    orders = [[name] for name, kind in STAGES.items() if kind.follows is None]
    for chain in orders:
        while (after := next((name for name, kind in STAGES.items() if kind.takes(chain[-1])), None)) is not None:
            chain.append(after)
    return orders


def beginners(start: str) -> list[str]:
    """Return the stages that can begin a run with "nothing", a "mesh" or another "run"."""
    return [name for name, kind in STAGES.items() if start in kind.begins_with]
