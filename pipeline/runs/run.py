"""A run from prompt to files: the chain of stages with checkpoints, in a folder that can be resumed at any moment.

Every stage's state after step k is a function of the configuration and the device, so a stage restored from a
checkpoint goes on to the same bytes. A finished stage is its checkpoint at the last step: its asset is made again by
constructing the stage, loading and calling finish(), which is all that resume, `--from` and export need.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipeline.config.model import Config, read_config
from pipeline.config.written import dump_read, read_part
from pipeline.errors import Interrupted
from pipeline.output.files import write_whole
from pipeline.output.usdz import check_usd
from pipeline.priors.memory import explain_shortage
from pipeline.priors.source import Kept
from pipeline.priors.sources import StagePrior, check_priors, notices
from pipeline.runs import stages
from pipeline.runs.caller import Caller, deterministic, warnings_told
from pipeline.runs.checkpoint import CHECKPOINT, STEPS, load_checkpoint, read_meta
from pipeline.runs.folder import Lock, check_disk, new_folder, open_folder
from pipeline.runs.inputs import Inputs, check_inputs, load_inputs, load_picture
from pipeline.runs.interrupt import StopRequest
from pipeline.runs.lineage import afresh, check_run, check_upstream, refined, remedy
from pipeline.runs.log import Metrics, Record
from pipeline.runs.loop import StageLoop
from pipeline.runs.machine import choose_device, describe
from pipeline.runs.progress import Progress, duration
from pipeline.runs.ranks import joined, quiet_but_first
from pipeline.runs.tracking import check_log, open_board
from pipeline.streams import silent_rank
from pipeline.watch.mailbox import Mailbox
from stages.errors import UserError, out_of_memory
from stages.kernels.backend import resolve, selected
from stages.parallel import first_then_others, from_first, rank, size
from stages.phases import phase

if TYPE_CHECKING:
    import torch

    from pipeline.profile.record import Profile
    from stages.stage import Asset, Stage


def start_run(
    config: Config,
    out: Path | None = None,
    progress: Progress | None = None,
    profile: Profile | None = None,
    caller: Caller | None = None,
) -> Path:
    """Begin a run in a new folder and take it to its files; returns the folder. A profile is written into it."""
    progress, caller = progress or Progress(), caller or Caller()
    device = choose_device(config.device)
    with deterministic(device, config.deterministic), joined(device):
        return _start(config, out, quiet_but_first(progress), profile, caller, device)


def _start(
    config: Config, out: Path | None, progress: Progress, profile: Profile | None, caller: Caller, device: torch.device
) -> Path:
    config, priors, inputs = prepare(config, device, caller)
    with contextlib.ExitStack() as held:

        def begin() -> str:
            folder = new_folder(out, config.prompt, config.seed)
            progress.note(f"run folder {folder}" + (f"; {inputs.note}" if inputs.note else ""))
            for notice in notices(config, priors):
                progress.note(notice)
            held.enter_context(Lock(folder))
            inputs.write(folder)
            write_whole(folder / "config.yaml", dump_read(config).encode())
            if caller.on_begin is not None:
                caller.on_begin(folder)
            if profile:
                held.enter_context(profile.of_run(folder, config, device, progress.note))
            return str(folder)

        folder = Path(from_first(begin))
        Run(folder, config, device, progress, caller, priors).go()
    return folder


def prepare(config: Config, device: torch.device, caller: Caller) -> tuple[Config, Mapping[str, StagePrior], Inputs]:
    """Return the settings that a new run reads, its priors and what it starts from. Raises: UserError for a mistake."""
    config = read_part(config)  # the very values that a resumed run reads
    resolve(config.kernels, device)  # refuses what is not there
    stages.check_stages(config)
    priors = first_then_others(lambda: check_priors(config, None, caller.priors))
    inputs = check_inputs(config)
    if "usdz" in config.export.formats:
        check_usd()
    check_log(caller.log)
    return config, priors, inputs


def resume_run(folder: Path, progress: Progress | None = None, caller: Caller | None = None) -> None:
    """Go on with a run from its last checkpoint, or say that it is finished."""
    progress, caller = progress or Progress(), caller or Caller()
    config = read_run(folder)
    check_disk(folder)
    check_log(caller.log)
    with contextlib.nullcontext() if silent_rank() else Lock(folder):
        outputs = stands(folder, config)
        if outputs:
            progress.note(f"{folder} is finished: {', '.join(outputs)}")
            return
        device = choose_device(config.device)
        with deterministic(device, config.deterministic), joined(device):
            progress = quiet_but_first(progress)
            run = Run(folder, config, device, progress, caller)
            left = [s for s in config.stages if not run.finished(s)]
            run.priors = first_then_others(lambda: check_priors(config, left, caller.priors))
            progress.note(f"resuming {folder}")
            run.go()


def stands(folder: Path, config: Config) -> list[str]:
    """Return the files of a run that has nothing left to do, none for one that can go on.

    Raises: UserError for one that its configuration does not go with.
    """
    record = Record(folder)
    check_run(folder, config)
    if not all(_finished(folder, config, name) for name in config.stages):
        return []
    _check_prompt(folder, config, record)
    outputs = record.data.get("outputs", [])
    whole = record.data.get("status") == "finished" and all((folder / name).exists() for name in outputs)
    return outputs if whole and record.data.get("exported_with") == _export_settings(config) else []


def _check_prompt(folder: Path, config: Config, record: Record) -> None:
    """Refuse a new prompt for a run whose steps are all taken, since none of them would hear of it."""
    was = record.data.get("prompt")
    if was is None or was == config.prompt:
        return
    file = folder / "config.yaml"
    raise UserError(
        f'{file} asks for "{config.prompt}"',
        f'every step of this run was taken for "{was}", and none is taken again',
        f"for the new prompt: pipeline run --config {file} --out FOLDER; for this object: set the old one back",
    )


def read_run(folder: Path) -> Config:
    """Read the configuration of a run. Raises: UserError where the folder holds none."""
    return read_config(open_folder(folder))


def restore_stage(folder: Path, name: str) -> Stage:
    """Return a stage of a run as its last checkpoint left it, without its prior: it can be looked at, not stepped.

    Args:
        folder: of the run.
        name: of the stage.
    Raises: UserError where the run has no checkpoint of it.
    """
    with reopened(folder) as run:
        if run.saved_step(name) is None:
            saved = ", ".join(path.parent.name for path in sorted(folder.glob(f"*/{CHECKPOINT}"))) or "none"
            raise UserError(f"{folder} has no checkpoint of {name}", f"stages with one: {saved}", "choose one of these")
        return run.restored_stage(name)


@contextlib.contextmanager
def reopened(folder: Path, progress: Progress | None = None) -> Iterator[Run]:
    """Open a run to read from. progress: None says nothing."""
    from rich.console import Console

    progress = progress or Progress(Console(quiet=True))
    config = read_run(folder)
    check_run(folder, config)
    device = choose_device(config.device)
    run = Run(folder, config, device, progress, Caller())
    with deterministic(device, config.deterministic), selected(run.kernels), progress.announce_compilation():
        yield run


class Run:
    """One process's work in a run folder, whose lock it holds.

    Args:
        priors: of the stages to be taken, checked; empty where none is taken.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        device: torch.device,
        progress: Progress,
        caller: Caller,
        priors: Mapping[str, StagePrior] = MappingProxyType({}),
    ) -> None:
        self.folder, self.config, self.device, self.progress, self.caller = folder, config, device, progress, caller
        self.priors = priors
        self.kept = Kept() if caller.kept is None else caller.kept
        self.record, self.metrics = Record(folder, writes=rank() == 0), Metrics(folder, writes=rank() == 0)
        self.mailbox = Mailbox(folder, progress.note, alone=size() == 1)
        self.board = open_board(caller.log if rank() == 0 else (), folder)
        self.kernels = resolve(config.kernels, device)
        self._stuck = False  # a stage took all its steps and made nothing to hand on: resuming would end there again

    def go(self) -> None:
        """Take every stage that is not finished, then write the files."""
        facts = {"prompt": self.config.prompt, "seed": self.config.seed, "stages_asked": self.config.stages}
        stop = StopRequest(self.progress.note)
        try:
            note = self.progress.note
            with stop, selected(self.kernels), self.progress.announce_compilation(), warnings_told(note):
                if rank() == 0:
                    self.mailbox.empty()
                self.record.open_session(describe(self.device), dict(self.kernels.backends), **facts)
                for notice in self.kernels.notices:
                    self.progress.note(notice)
                asset = self._before(self.config.stages[0])
                for name in self.config.stages:
                    asset = self.restore(name) if self.finished(name) else self._take(name, asset, stop)
                    gc.collect()
                if self.caller.kept is None:
                    self.kept.drop()
                if rank() > 0:
                    return
                self._export(asset)
        except (KeyboardInterrupt, Interrupted) as error:
            self.record.save(status="interrupted")
            text = f"{error}\n" if str(error) else "stopped at once; what the last checkpoint holds is safe\n"
            code = stop.exit_code
            raise Interrupted(f"{text}go on with: pipeline resume {self.folder}", code) from None
        except BaseException as error:
            with contextlib.suppress(OSError, UserError):  # a full disk must not hide its own message
                self.record.save(status="failed", error=f"{type(error).__name__}: {error}")
            if self.record.data["stages"] and not self._stuck:
                self.progress.note(f"what was done is kept; to go on after mending: pipeline resume {self.folder}")
            raise
        finally:
            if rank() == 0:
                self.mailbox.empty()
        self.record.data.pop("error", None)
        self.record.save(status="finished")
        self.progress.note(self._summary())
        self.progress.note(self._where_to_look())

    def saved_step(self, name: str) -> int | None:
        """Return the step of a stage's checkpoint, None without one."""
        return _saved_step(self.folder, self.config, name)

    def finished(self, name: str) -> bool:
        """Return whether the stage's checkpoint has come to the last step of the configuration."""
        return _finished(self.folder, self.config, name)

    def _before(self, name: str) -> Asset | None:
        """Return what a stage of this run starts from; None for nothing."""
        before = refined(self.config, name)
        if before is not None:
            return self.restore(before)
        return load_inputs(self.folder, self.config, self.device) if name == self.config.stages[0] else None

    def restore(self, name: str) -> Asset:
        """Load the asset of a stage from its checkpoint, without its prior."""
        if not self.finished(name):
            steps, step = getattr(self.config, name).steps, self.saved_step(name) or 0
            fix = f"pipeline resume {self.folder}"
            if name not in self.config.stages:  # a copy of another run's, which resuming does not take further
                back = f"set {name}.steps={step} again in its config.yaml"
                fix = back if step else afresh(self.folder, self.config)
            raise UserError(f"{name} is not finished in {self.folder}", f"it stands at step {step} of {steps}", fix)
        with phase(name), phase("restore"):
            return self.finish(name, self.restored_stage(name))

    def restored_stage(self, name: str) -> Stage:
        """Load the stage of its checkpoint, without its prior."""
        path = self.folder / name / CHECKPOINT
        state, meta = load_checkpoint(path, remedy(self.folder, self.config, name))
        if name in self.config.stages:
            check_upstream(self.folder, self.config, name, meta)
        self.progress.note(f"{name}: restoring its result")
        if name in self.config.stages and name not in self.record.data["stages"]:  # killed before it was noted
            self.record.data["stages"][name] = {key: meta[key] for key in ("step", "steps", "seconds", "phases")}
        settings, before = getattr(self.config, name), self._before(name)
        stage = stages.make_stage(name, settings, None, self.device, self.config.seed, before)
        stage.load_state_dict(state)
        return stage

    def finish(self, name: str, stage: Stage) -> Asset:
        """Return the asset of a stage after its last step; where it is of no use, the error says how to get something.

        Its checkpoint holds the last step, so resuming would only come to the same end.
        """
        try:
            return stage.finish()
        except UserError as error:
            self._stuck = True
            raise UserError(error.what, error.why, "\n".join([error.fix, *self._ways_on(name, error.fix)])) from error

    def _ways_on(self, name: str, fix: str) -> Iterator[str]:
        config = self.folder / "config.yaml"
        if name not in self.config.stages:
            yield f"its {name} stage is that of {self.config.from_run}: make another run and give that to --from"
            return
        before = refined(self.config, name)
        if before is not None:
            again = f"pipeline run --stages {name} --from {self.folder} KEY=VALUE --out FOLDER"
            yield f"from the same {before} object: {again}"
        else:
            yield f"anew, with other settings: pipeline run --config {config} KEY=VALUE --out FOLDER"
        if f"{name}.steps" in fix:
            yield f"for more steps alone: raise {name}.steps in {config}, then pipeline resume {self.folder}"
        yield f"the previews are in {self.folder / name / 'previews'}"

    def _take(self, name: str, previous: Asset | None, stop: StopRequest) -> Asset:
        from stages.stage import Asset

        loop = StageLoop(self, name, stop)
        try:
            picture = load_picture(self.folder, self.config)
            return loop.take(previous if picture is None else replace(previous or Asset(), picture=picture))
        except Exception as error:
            if out_of_memory(error):
                raise explain_shortage(error, self.priors[name], self.folder) from error
            raise
        finally:
            loop.close()

    def _export(self, asset: Asset) -> None:
        from pipeline.output.asset import finished_mesh, in_own_place
        from pipeline.output.axes import PRINTS, file_axes
        from pipeline.output.result_mesh import ResultMesh
        from pipeline.output.write import write_results

        facts: dict[str, Any] = {"phases": {}}
        self.progress.note("export: cleaning, unwrapping, baking, turning")
        times: dict[str, float] = {}
        with phase("export"):
            mesh = finished_mesh(asset, self.config.export, self.config.fine.initialise, facts)
            with phase("write", times):
                axes = file_axes(asset.placement, self.config.export)
                result = ResultMesh(in_own_place(mesh, asset), mesh, axes)
                paths = write_results(mesh, self.folder, self.config.export, result.data, axes, asset.cloud)
        for name in PRINTS:
            if name in self.config.export.formats:
                self.progress.note(f"mesh.{name}: {axes.note(result.data, name)}")
        self.caller.mesh = result
        facts["phases"]["write"] = round(times["write"], 3)
        files = [path.name for path in paths]
        self.record.save(export=facts, outputs=files, exported_with=_export_settings(self.config))

    def _where_to_look(self) -> str:
        files = self.record.data["outputs"]
        picture = next((name for name in files if name.startswith("turntable")), None)
        moving = f"look at {self.folder / picture}, " if picture else ""
        return f"{moving}open {self.folder / files[0]}; other files: pipeline export {self.folder} --format stl,3mf"

    def _summary(self) -> str:
        stages = self.record.data["stages"]
        parts = [f"{name} {duration(facts['seconds'])}" for name, facts in stages.items()]
        memory = self.record.data.get("peak_memory_mb")
        parts += [f"peak memory {memory / 1024:.1f} GB"] if memory else []
        gpu = self.record.data.get("peak_gpu_memory_mb")
        parts += [f"of the GPU {gpu / 1024:.1f} GB"] if gpu else []
        return f"done: {self.folder / self.record.data['outputs'][0]}  ({', '.join(parts)})"


def _saved_step(folder: Path, config: Config, name: str) -> int | None:
    path = folder / name / CHECKPOINT
    return read_meta(path, remedy(folder, config, name), STEPS)["step"] if path.exists() else None


def _finished(folder: Path, config: Config, name: str) -> bool:
    step = _saved_step(folder, config, name)
    return step is not None and step >= getattr(config, name).steps


def _export_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a run's files depend on, JSON-ready; resume makes the files anew where they differ."""
    return config.export.model_dump(mode="json")
