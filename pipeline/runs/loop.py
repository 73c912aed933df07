"""The loop around one stage: steps, metrics, previews off the critical path, checkpoints, stopping.

A checkpoint holds the stage's whole state and the time spent so far; metrics are flushed to the disk before it, so the
line of every step that a checkpoint counts on is there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import Interrupted
from pipeline.output.files import write_whole
from pipeline.output.surface import png_bytes
from pipeline.priors.memory import forecast
from pipeline.runs import stages
from pipeline.runs.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from pipeline.runs.interrupt import StopRequest
from pipeline.runs.lineage import check_upstream, lineage
from pipeline.runs.ranks import lost, note_split
from stages.errors import UserError
from stages.kinds import STAGES
from stages.parallel import RankLost, agree, any_rank, first_then_others, rank
from stages.phases import phase

if TYPE_CHECKING:
    import torch

    from pipeline.config.model import Config
    from pipeline.priors.source import Kept
    from pipeline.priors.sources import StagePrior
    from pipeline.runs.caller import Caller
    from pipeline.runs.log import Metrics, Record
    from pipeline.runs.progress import Progress, StageProgress
    from pipeline.runs.tracking import Board
    from pipeline.watch.mailbox import Mailbox
    from stages.stage import Asset, Stage


class Host(Protocol):
    """The run of a stage, as its loop uses it."""

    folder: Path
    config: Config
    device: torch.device
    caller: Caller
    priors: Mapping[str, StagePrior]
    kept: Kept
    progress: Progress
    record: Record
    metrics: Metrics
    board: Board
    mailbox: Mailbox

    def saved_step(self, name: str) -> int | None:
        """Return the step of a stage's checkpoint, None without one."""

    def finish(self, name: str, stage: Stage) -> Asset:
        """Return the asset of a stage after its last step."""


class StageLoop:
    """Takes one stage to its last step: steps, metrics, previews, checkpoints, stopping."""

    def __init__(self, run: Host, name: str, stop: StopRequest) -> None:
        self._run, self._name, self._stop = run, name, stop
        self._folder = run.folder / name
        self._path = self._folder / CHECKPOINT
        self._writer = ThreadPoolExecutor(1, "preview")
        self._preview_write: Future | None = None
        self._leave: Callable[[], None] | None = None  # what leaves the prior as it was
        self._phases: dict[str, float] = {}
        self._seconds = 0.0
        self._paused = 0.0  # seconds, which are neither the stage's nor a phase's

    def take(self, previous: Asset | None) -> Asset:
        """Take the stage's remaining steps and return its asset."""
        with phase(self._name):
            return self._take(previous)

    def _take(self, previous: Asset | None) -> Asset:
        run, name = self._run, self._name
        if rank() == 0:
            (self._folder / "previews").mkdir(parents=True, exist_ok=True)
        self._opened = time.perf_counter()
        state, meta = load_checkpoint(self._path) if self._path.exists() else (None, {"step": 0})
        if state is not None:
            check_upstream(run.folder, run.config, name, meta)  # a stage before may have been made again just now
        self._lineage = lineage(run.folder, run.config, name)
        self._phases, self._seconds = meta.get("phases", {}), meta.get("seconds", 0.0)
        run.metrics.rewind(name, meta["step"], tuple(STAGES)[tuple(STAGES).index(name) + 1 :])
        run.progress.note(f"{name}: loading the prior {getattr(run.config.prior, name)}")
        download = run.priors[name].announce()
        if download is not None:
            run.progress.note(f"{name}: {download}")
        prior = self._timed("load_prior", partial(first_then_others, run.priors[name].fetched))
        expected = forecast(prior, run.device)
        if expected is not None:
            run.progress.note(f"{name}: {expected}")
        guidance = self._timed("load_prior", partial(prior.build, run.device, run.kept))
        self._leave = getattr(guidance, "close", None)
        settings = getattr(run.config, name)
        note_split(run.progress, name, settings)
        make = partial(stages.make_stage, name, settings, guidance, run.device, run.config.seed, previous)
        stage = self._timed("construct", make)
        del make, guidance, previous, prior
        if state is not None:
            stage.load_state_dict(state)
        self._optimise(stage)
        return self._finish(stage)

    def _optimise(self, stage: Stage) -> None:
        with self._run.progress.stage(self._name, stage.steps, stage.step_index) as display:
            self._stop.gentle = True
            try:
                while stage.step_index < stage.steps:
                    self._step(stage, display)
            except RankLost as error:
                raise self._lost(stage) from error
            self._stop.gentle = False

    def _step(self, stage: Stage, display: StageProgress) -> None:
        config = self._run.config
        began = time.perf_counter()
        with phase("step"):
            metrics = stage.step()
        step = stage.step_index
        self._check_finite(metrics, step)
        seconds = time.perf_counter() - began
        self._run.metrics.add(self._name, step, seconds, metrics)
        self._run.board.add(self._name, step, seconds, metrics)
        display.update(step, stage.headline(metrics))
        if rank() == 0 and self._run.mailbox.wished():
            self._answer(stage)
        if step % config.preview_every == 0 or step == stage.steps:
            self._preview(stage)
        stopping = any_rank(self._stop.requested)  # asked once: a signal between two looks must not skip the saving
        if stopping or step % config.checkpoint_every == 0 or step == stage.steps:
            agree(f"{self._name} stage", stage.state_dict)
            self._save(stage)
        if self._run.caller.on_step is not None and rank() == 0:
            self._run.caller.on_step(self._name, step, dict(metrics))
        if stopping:
            raise Interrupted(f"stopped at {self._name} step {step} of {stage.steps}, which is saved")

    def _answer(self, stage: Stage) -> None:
        """Do what a page asks; the time that it holds the run up is not the stage's."""
        paused = self._timed("view", partial(self._run.mailbox.answer, self._name, stage, self._stop))
        self._phases["view"] -= paused
        self._paused += paused

    def _lost(self, stage: Stage) -> UserError:
        """Save what was done before another process ended, and say so at once: this one may soon be ended as well."""
        if rank() == 0 and stage.step_index > (self._run.saved_step(self._name) or 0):
            self._save(stage)
        saved = self._run.saved_step(self._name)
        where = f"{self._name} step {saved} of {stage.steps} is saved" if saved else "nothing was saved yet"
        self._run.progress.note(f"another process of this run ended; {where}")
        return lost(self._run.folder, where)

    def _finish(self, stage: Stage) -> Asset:
        asset = self._timed("finish", lambda: self._run.finish(self._name, stage))
        self._join()
        self._note(stage)
        return asset

    def _check_finite(self, metrics: dict[str, float], step: int) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            saved = self._run.saved_step(self._name)
            raise UserError(
                f"{self._name} broke down at step {step}",
                f"{', '.join(bad)} is not a finite number",
                "lower its learning rates or guidance scale, or keep the prior in float32; "
                + (f"the checkpoint of step {saved} is untouched" if saved else "nothing was saved yet"),
            )

    def _preview(self, stage: Stage) -> None:
        """Render now, since the state moves on; compress and write beside the next steps."""
        if rank() > 0:
            return
        image = self._timed("preview", stage.preview)
        path = self._folder / "previews" / f"{stage.step_index:06d}.png"
        self._timed("preview", self._join)
        self._preview_write = self._writer.submit(lambda: write_whole(path, png_bytes(image)))
        self._run.board.show(self._name, stage.step_index, image)

    def _save(self, stage: Stage) -> None:
        if rank() > 0:
            return
        self._timed("checkpoint", lambda: self._write(stage))
        self._note(stage)

    def _write(self, stage: Stage) -> None:
        self._run.metrics.flush(durable=True)
        seconds, phases = self._spent(stage)
        meta = {"stage": self._name, "step": stage.step_index, "steps": stage.steps} | self._lineage
        save_checkpoint(self._path, stage.state_dict(), meta | {"seconds": seconds, "phases": phases})

    def _note(self, stage: Stage) -> None:
        seconds, phases = self._spent(stage)
        facts = {"step": stage.step_index, "steps": stage.steps, "seconds": seconds, "phases": phases}
        self._run.record.data["stages"][self._name] = facts
        self._run.record.save()

    def _spent(self, stage: Stage) -> tuple[float, dict[str, float]]:
        phases = dict(self._phases)
        for name, seconds in stage.times.items():
            phases[name] = phases.get(name, 0.0) + seconds
        seconds = self._seconds + time.perf_counter() - self._opened - self._paused
        return round(seconds, 2), {phase: round(value, 3) for phase, value in phases.items()}

    def _timed(self, name: str, call: Any) -> Any:
        with phase(name, self._phases):
            return call()

    def _join(self) -> None:
        if self._preview_write is not None:
            self._preview_write.result()

    def close(self) -> None:
        """Leave with every preview and metric written."""
        self._stop.gentle = False
        if self._leave is not None:
            self._leave()
        self._writer.shutdown()
        self._run.metrics.flush()
        self._run.board.flush()
