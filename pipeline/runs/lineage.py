"""What a stage's checkpoint was made with, and whether the configuration can still go on with it.

A run's config.yaml may be edited between two sessions: rates, weights, views of a step and whatever saves memory act
from the next step on. Other settings say what the saved numbers are (shapes, the lattice that its ids count on) or what
the first state was made of, which is not made again. Those are written into every checkpoint's meta, with the checksum
of what the stage started from, and a checkpoint that they do not go with is refused by their names.

    meta["settings"]   {"fine.tets": 64, ...}, the leaves of DEFINING
    meta["upstream"]   {"file": "coarse/checkpoint.safetensors", "crc32": 1}, or null where it started from nothing

Checkpoints written before these keys existed have neither; they are taken as they are, unchecked, and so is a setting
that one of the two does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runs.checkpoint import CHECKPOINT, read_meta
from stages.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.model import Config
    from stages.guidance.residuals import Rule

COARSE = f"coarse/{CHECKPOINT}"  # of this run, or the copy of another's that the fine stage refines
EDITED = f"start/{CHECKPOINT}"  # the coarse stage of another run that this run's coarse stage edits
GIVEN = "start/mesh.safetensors"  # the mesh of --init-mesh as it was read

# Settings and groups of settings; fine.resolution and clipmesh.resolution are the renders' and may change.
DEFINING = {
    "coarse": ("coarse.particles", "coarse.field", "coarse.background.hidden", "coarse.occupancy.resolution"),
    "fine": (
        *("fine.geometry", "fine.tets", "fine.deformation", "fine.field", "fine.detail"),
        *("fine.initialise", "fine.sphere", "fine.solidify", "fine.fit", "place"),
    ),
    "clipmesh": (
        *("clipmesh.radius", "clipmesh.control", "clipmesh.control_faces", "clipmesh.subdivisions"),
        *("clipmesh.texture_size", "clipmesh.padding", "clipmesh.unwrap", "place"),
    ),
}


def made_with(config: Config, stage: str) -> dict[str, Any]:
    """The settings that define a stage's state, by dotted name, as JSON gives them back."""
    values = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for name in DEFINING[stage]:
        value = values
        for part in name.split("."):
            value = value[part]
        found |= _leaves(name, value)
    chosen = values["guidance"][stage]["rule"]
    rule = _rule(chosen["name"])
    found[f"guidance.{stage}.rule"] = chosen["name"]
    if rule is not None and rule.stateful:  # weights shaped as the prior's are
        found |= {f"guidance.{stage}.rule.{name}": chosen[name] for name in rule.shaping}
        found[f"prior.{stage}"] = values["prior"][stage]
    return found


def _rule(name: str) -> Rule | None:
    """The entry of a rule; None for one that is no longer known."""
    from stages.guidance.residuals import RULES

    return RULES.get(name)


def _differ(name: str, was: Any, now: Any) -> bool:
    if name.endswith(".rule"):  # rules without a state may take over from each other
        return was != now and any(rule is None or rule.stateful for rule in (_rule(was), _rule(now)))
    return was != now


def _leaves(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, child in value.items() for key, leaf in _leaves(f"{name}.{part}", child).items()}


def upstream_of(config: Config, stage: str) -> str | None:
    """The file in the run's folder that holds what a stage starts from; None for nothing."""
    if stage == "fine" and ("coarse" in config.stages or config.from_run is not None):
        return COARSE
    if stage != config.stages[0]:
        return None
    if config.init_mesh is not None:
        return GIVEN
    return EDITED if stage == "coarse" and config.from_run is not None else None


def lineage(folder: Path, config: Config, stage: str) -> dict[str, Any]:
    """The entries of a checkpoint's meta; what the stage starts from must be there."""
    return {"settings": made_with(config, stage), "upstream": _upstream(folder, config, stage)}


def _upstream(folder: Path, config: Config, stage: str) -> dict[str, Any] | None:
    file = upstream_of(config, stage)
    if file is None:
        return None
    if not (folder / file).is_file():
        raise UserError(f"{folder / file} is gone", f"{stage} was started from it", afresh(folder, config))
    remade = file == COARSE and "coarse" in config.stages
    return {"file": file, "crc32": read_meta(folder / file, None if remade else afresh(folder, config))["crc32"]}


def afresh(folder: Path, config: Config) -> str:
    """What helps where a run has lost what it was given and cannot make itself."""
    source = f" with --from {config.from_run}" if config.from_run is not None else ""
    return f"start again{source}: pipeline run --config {folder / 'config.yaml'} --out ANOTHER_FOLDER"


def remedy(folder: Path, config: Config, stage: str) -> str | None:
    """What helps against a damaged checkpoint of a stage; None for removing it, after which resume makes it again."""
    return None if stage in config.stages else afresh(folder, config)


def check_run(folder: Path, config: Config) -> None:
    """Refuse, before any work, to go on with checkpoints that the configuration does not go with. Raises: UserError."""
    first = [] if "coarse" in config.stages else ["coarse"]  # the copy of another run's
    for stage in [*first, *config.stages]:
        path = folder / stage / CHECKPOINT
        if not path.is_file():
            continue
        meta = read_meta(path, remedy(folder, config, stage))
        back = f"in {folder / 'config.yaml'}, or {afresh(folder, config)}"
        check_settings(path, meta.get("settings", {}), config, stage, back)
        if stage not in config.stages:
            continue
        own_coarse = upstream_of(config, stage) == COARSE and "coarse" in config.stages
        if not own_coarse or _coarse_stands(folder, config, path):
            check_upstream(folder, config, stage, meta)


def check_settings(path: Path, made: dict[str, Any], config: Config, stage: str, back: str) -> None:
    """Raise UserError where a setting that defines a state is another than the one its checkpoint was made with.

    Args:
        path: of the checkpoint. made: its meta's settings. back: where to set them back, to end the advice with.
    """
    now = made_with(config, stage)
    changed = [name for name in made if name in now and _differ(name, made[name], now[name])]
    if not changed:
        return
    values = ", ".join(f"{name} is {json.dumps(now[name])}, was {json.dumps(made[name])}" for name in changed)
    what = changed[0] if len(changed) == 1 else f"{changed[0]} and {len(changed) - 1} more"
    raise UserError(
        f"{what} {'differs' if len(changed) == 1 else 'differ'} from what {path} was made with",
        f"{values}; what the checkpoint holds would be read as something else, or is not made again",
        f"set {', '.join(f'{name}={json.dumps(made[name])}' for name in changed)} {back}",
    )


def _coarse_stands(folder: Path, config: Config, later: Path) -> bool:
    """Whether the coarse stage that `later` goes on from is there; if not, it is being made again and compared then.

    Raises: UserError for more coarse steps: the later stage would go on from an object that it never saw.
    """
    if not (folder / COARSE).is_file():
        return False
    meta = read_meta(folder / COARSE)
    if meta["step"] < meta["steps"]:
        return False
    if config.coarse.steps > meta["step"]:
        raise UserError(
            f"coarse.steps = {config.coarse.steps}, and {later} goes on from the object of {meta['step']} steps",
            "more steps would change that object under it",
            f"set coarse.steps={meta['step']} again in {folder / 'config.yaml'}, or remove {later}: "
            "its stage then begins anew after all the coarse steps",
        )
    return True


def check_upstream(folder: Path, config: Config, stage: str, meta: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint goes on from something else than what now lies before its stage."""
    if "upstream" not in meta:  # written before the key existed
        return
    was, now = meta["upstream"], _upstream(folder, config, stage)
    if was == now:
        return
    path = folder / stage / CHECKPOINT
    was_file, now_file = (entry["file"] if entry else "nothing" for entry in (was, now))
    if was_file != now_file:
        raise UserError(
            f"{path} was started from {was_file}, not from {now_file}",
            "stages, from_run or init_mesh in config.yaml is another than when it was made",
            f"set them back in {folder / 'config.yaml'}, or {afresh(folder, config)}",
        )
    raise UserError(
        f"{path} was started from another {now_file}",
        "that file has been made again since, with another result",
        f"remove {path}: `pipeline resume {folder}` then starts {stage} again from what is there",
    )
