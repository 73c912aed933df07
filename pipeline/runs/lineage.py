"""The settings that a stage's checkpoint depends on, and the check that the configuration still has them.

A run's config.yaml may be edited between two sessions: rates, weights, views of a step and whatever saves memory act
from the next step on. Other settings say what the saved numbers are (shapes, the lattice that its ids count on) or what
the first state was made of, which is not made again. Those are written into every checkpoint's meta, with the checksum
of what the stage started from, and a checkpoint that they do not go with is refused by their names.

    meta["settings"]   {"fine.tets": 64, ...}, the leaves of what stages/kinds.py calls defining
    meta["upstream"]   {"file": "coarse/checkpoint.safetensors", "crc32": 1}, or null where it started from nothing

A checkpoint without these entries, or with settings of another version of the toolkit, is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runs.checkpoint import CHECKPOINT, STEPS, read_meta
from stages.errors import UserError
from stages.guidance.residuals import RULES
from stages.kinds import STAGES, predecessor

if TYPE_CHECKING:
    from pipeline.config.model import Config

EDITED = f"start/{CHECKPOINT}"  # the stage of another run that this run's first stage edits
GIVEN = "start/mesh.safetensors"  # the mesh of --init-mesh as it was read
_ANOTHER_VERSION = "it was written by another version of the toolkit"
_START_ANEW = "go on with the version that wrote it, or start a new run"


def checkpoint_of(stage: str) -> str:
    """Return the file in a run's folder that holds a stage: of this run, or the copy of another's that is refined."""
    return f"{stage}/{CHECKPOINT}"


def made_with(config: Config, stage: str) -> dict[str, Any]:
    """Return the settings that define a stage's state, by dotted name, as JSON gives them back."""
    values = config.model_dump(mode="json")
    settings: dict[str, Any] = {}
    for name in STAGES[stage].defining:
        value = values
        for part in name.split("."):
            value = value[part]
        settings |= _leaves(name, value)
    chosen = values["guidance"][stage]["rule"]
    rule = RULES[chosen["name"]]
    settings[f"guidance.{stage}.rule"] = chosen["name"]
    if rule.stateful:  # weights shaped as the prior's are
        settings |= {f"guidance.{stage}.rule.{name}": chosen[name] for name in rule.shaping}
        settings[f"prior.{stage}"] = values["prior"][stage]
    return settings


def _shared(stage: str, settings: dict[str, Any]) -> set[str]:
    """The names in an answer of :func:`made_with` that do not come from a rule with a state."""
    return {k for k in settings if not k.startswith(f"guidance.{stage}.rule.") and k != f"prior.{stage}"}


def _changed(stage: str, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of what two answers of :func:`made_with` do not agree on; rules without a state may take over from each
    other."""
    changed = [name for name in saved if name in now and saved[name] != now[name]]
    rules = saved[f"guidance.{stage}.rule"], now[f"guidance.{stage}.rule"]
    if all(isinstance(name, str) and name in RULES and not RULES[name].stateful for name in rules):
        changed = [name for name in changed if name != f"guidance.{stage}.rule"]
    return changed


def _leaves(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, child in value.items() for key, leaf in _leaves(f"{name}.{part}", child).items()}


def _before(config: Config, stage: str) -> str | None:
    """Return the stage of the same run, or else of another, that a stage follows; None for one that follows none."""
    return predecessor(stage, config.stages) or STAGES[stage].follows


def upstream_of(config: Config, stage: str) -> str | None:
    """Return the file in the run's folder that holds what a stage starts from; None for nothing."""
    before = _before(config, stage)
    if before is not None and (before in config.stages or config.from_run is not None):
        return checkpoint_of(before)
    if stage != config.stages[0]:
        return None
    if config.init_mesh is not None:
        return GIVEN
    return EDITED if "run" in STAGES[stage].begins_with and config.from_run is not None else None


def refined(config: Config, stage: str) -> str | None:
    """Return the stage whose checkpoint, of this run or another, a stage goes on from; None for another start."""
    before = _before(config, stage)
    return before if before is not None and upstream_of(config, stage) == checkpoint_of(before) else None


def lineage(folder: Path, config: Config, stage: str) -> dict[str, Any]:
    """Return the entries of a checkpoint's meta; what the stage starts from must be there."""
    return {"settings": made_with(config, stage), "upstream": _upstream(folder, config, stage)}


def _upstream(folder: Path, config: Config, stage: str) -> dict[str, Any] | None:
    file = upstream_of(config, stage)
    if file is None:
        return None
    if not (folder / file).is_file():
        raise UserError(f"{folder / file} is gone", f"{stage} was started from it", afresh(folder, config))
    remade = refined(config, stage) in config.stages
    meta = read_meta(folder / file, None if remade else afresh(folder, config), ("crc32",))
    return {"file": file, "crc32": meta["crc32"]}


def afresh(folder: Path, config: Config) -> str:
    """Return the advice for a run that has lost an input and cannot make it again."""
    source = f" with --from {config.from_run}" if config.from_run is not None else ""
    return f"start again{source}: pipeline run --config {folder / 'config.yaml'} --out ANOTHER_FOLDER"


def remedy(folder: Path, config: Config, stage: str) -> str | None:
    """Return the advice for a damaged checkpoint of a stage; None where removing it is enough."""
    return None if stage in config.stages else afresh(folder, config)


def check_run(folder: Path, config: Config) -> None:
    """Refuse, before any work, to go on with checkpoints that the configuration does not go with. Raises: UserError."""
    copy = refined(config, config.stages[0])  # of another run's stage
    for stage in [*([] if copy is None else [copy]), *config.stages]:
        path = folder / stage / CHECKPOINT
        if not path.is_file():
            continue
        meta = read_meta(path, remedy(folder, config, stage), STEPS)
        back = f"in {folder / 'config.yaml'}, or {afresh(folder, config)}"
        check_settings(path, meta, config, stage, back)
        if stage not in config.stages:
            continue
        before = refined(config, stage)
        if before not in config.stages or _stands(folder, config, before, path):
            check_upstream(folder, config, stage, meta)


def check_settings(path: Path, meta: dict[str, Any], config: Config, stage: str, back: str) -> None:
    """Raise UserError where a setting that defines a state is another than the one its checkpoint was made with.

    Args:
        path: of the checkpoint.
        meta: its meta.
        config: of the run that is to go on with it.
        stage: its stage.
        back: where to set the settings back, to end the advice with.
    """
    if not {"settings", "upstream"} <= meta.keys():
        raise UserError(f"{path} does not say what it was made with", _ANOTHER_VERSION, _START_ANEW)
    saved, now = meta["settings"], made_with(config, stage)
    unknown = sorted(_shared(stage, saved) ^ _shared(stage, now))
    if unknown:
        known, side = ("the checkpoint", "this version") if unknown[0] in saved else ("this version", "the checkpoint")
        why = f"{known} has the setting {unknown[0]}, of which {side} does not know: {_ANOTHER_VERSION}"
        raise UserError(f"{path} is of other settings than these", why, _START_ANEW)
    changed = _changed(stage, saved, now)
    if not changed:
        return
    values = ", ".join(f"{name} is {json.dumps(now[name])}, was {json.dumps(saved[name])}" for name in changed)
    what = changed[0] if len(changed) == 1 else f"{changed[0]} and {len(changed) - 1} more"
    raise UserError(
        f"{what} {'differs' if len(changed) == 1 else 'differ'} from what {path} was made with",
        f"{values}; what the checkpoint holds would be read as something else, or is not made again",
        f"set {', '.join(f'{name}={json.dumps(saved[name])}' for name in changed)} {back}",
    )


def _stands(folder: Path, config: Config, before: str, later: Path) -> bool:
    """Whether the stage that `later` goes on from is there; if not, it is being made again and compared then.

    Raises: UserError for more of its steps: the later stage would go on from an object that it never saw.
    """
    path = folder / checkpoint_of(before)
    if not path.is_file():
        return False
    meta, steps = read_meta(path, needs=STEPS), getattr(config, before).steps
    if meta["step"] < meta["steps"]:
        return False
    if steps > meta["step"]:
        raise UserError(
            f"{before}.steps = {steps}, and {later} goes on from the object of {meta['step']} steps",
            "more steps would change that object under it",
            f"set {before}.steps={meta['step']} again in {folder / 'config.yaml'}, or remove {later}: "
            f"its stage then begins anew after all the {before} steps",
        )
    return True


def check_upstream(folder: Path, config: Config, stage: str, meta: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint goes on from something else than what now lies before its stage."""
    was, now = meta["upstream"], _upstream(folder, config, stage)
    if was == now:
        return
    path = folder / stage / CHECKPOINT
    was_file, now_file = (entry.get("file") if entry else "nothing" for entry in (was, now))
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
