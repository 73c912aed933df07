"""What a run would do, said without doing it: every check of a start, memory, and the time that runs like it took."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.model import Config, read_config
from pipeline.priors.memory import forecast
from pipeline.priors.sources import notices
from pipeline.runs.caller import Caller
from pipeline.runs.folder import RUNS, check_place, folder_name
from pipeline.runs.log import read_record
from pipeline.runs.machine import choose_device
from pipeline.runs.progress import Progress, duration
from pipeline.runs.run import prepare
from stages.errors import UserError

if TYPE_CHECKING:
    import torch

LOOKED_AT = 50  # runs beside the new one, the latest first
OWN_GB = 1.1  # of a run with a prior of ours on the CPU, measured


def plan_run(
    config: Config, out: Path | None = None, progress: Progress | None = None, log: tuple[str, ...] = ()
) -> None:
    """Check a new run as its start would, and print what it would do; makes no folder and loads no prior.

    Raises: UserError for all that the start of the run would refuse.
    """
    progress = progress or Progress()
    device = choose_device(config.device)
    config, priors, inputs = prepare(config, device, Caller(log=log))
    check_place(out)
    folder = Path(RUNS) / folder_name(config.prompt, config.seed) if out is None else out
    progress.note(f'"{config.prompt}", seed {config.seed}, on {device.type}, into {folder}')
    for line in filter(None, [inputs.note, *notices(config, priors)]):
        progress.note(line)
    total = 0.0
    for name in config.stages:
        settings = getattr(config, name)
        per_step = _seconds_per_step(config, name, device, folder.parent)
        total += settings.steps * per_step if per_step else 0.0
        time = f"about {duration(settings.steps * per_step)}" if per_step else "time unknown"
        size = f"{settings.steps} steps of {settings.views_per_step} views of {settings.resolution} pixels"
        progress.note(f"{name}: {size}, prior {getattr(config.prior, name)}, {time}")
        memory = forecast(priors[name], device) or f"memory: about {OWN_GB} GB in all"
        progress.note(f"{name}: {priors[name].announce() or memory}")
    if total:
        progress.note(f"about {duration(total)} for the steps, as runs beside it took; export and loading come on top")
    else:
        progress.note("no finished run beside it tells the time of a step; the default recipe takes 75 s on two cores")
    progress.note("nothing was started")


def _seconds_per_step(config: Config, stage: str, device: torch.device, beside: Path) -> float | None:
    """Median over runs beside that took the same kind of step on the same kind of device; None without one."""
    seconds = list(_alike(config, stage, device, beside))
    return statistics.median(seconds) if seconds else None


def _alike(config: Config, stage: str, device: torch.device, beside: Path) -> Iterator[float]:
    records = sorted(beside.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in records[:LOOKED_AT]:
        try:
            record, other = read_record(path), read_config(path.parent)
        except (UserError, OSError, json.JSONDecodeError):
            continue  # another project's, damaged, or of another version
        facts = record["stages"].get(stage)
        kinds = {session.get("device", {}).get("type") for session in record["sessions"]}
        if facts and facts["step"] and kinds == {device.type} and _kind(other, stage) == _kind(config, stage):
            yield facts["seconds"] / facts["step"]


def _kind(config: Config, stage: str) -> tuple:
    settings = getattr(config, stage)
    return getattr(config.prior, stage), settings.resolution, settings.views_per_step
