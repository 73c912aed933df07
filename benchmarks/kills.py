"""Everything that writes, killed at random moments and taken up again: it must end with the bytes of one left alone.

    python -m benchmarks.kills --count 20

Four things take turns to be killed by SIGKILL at a random moment:
- a tiny run of both stages under the reference prior, then resumed;
- the same, killed once more while it resumes, where it is not finished yet;
- an export of a finished run in its place, then made again;
- a batch of two such runs: its worker, after which the batch goes on by itself, or the batch alone, whose worker saves
  its run, or both; then the batch is typed again.
Compared are the mesh files, the checkpoints' tensors, and the metrics without their times.

A run that is killed before its config.yaml is there has nothing to resume: the same command begins it again in the same
folder, and is killed again. Such kills are counted apart. A process that ends before it is killed is no kill: another
takes its place. Moments are measured in the processor time of the process and its children, which does not depend on
what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, append_line, environment
from stages.errors import UserError
from stages.paths import from_home

FILE = "kills.jsonl"
ROOT = Path(__file__).resolve().parents[1]
FORMATS = "glb,obj,ply,stl"
RECIPE = """
prior: {coarse: reference, fine: reference}
reference: {supersample: 1}
checkpoint_every: 3
preview_every: 4
coarse:
  steps: 12
  resolution: 24
  views_per_step: 2
  samples: 64
  field: {levels: 8, log2_table: 12, finest: 64, hidden: 16}
  occupancy: {resolution: 32}
  shading: {albedo_until: 0.33}
  preview_size: 16
fine:
  steps: 9
  resolution: 64
  tets: 16
  detail: {levels: 1, log2_table: 12, finest: 128}
  initialise: {samples: 32}
  preview_size: 16
export: {texture_size: 64, faces: 1000, turntable_frames: 0, unwrap: boxes}
"""


State = dict[str, Any]


@dataclass
class Clock:
    """Processor time of a process that is left alone; less once one has ended before it was killed."""

    seconds: float


def state_of(run: Path) -> State:
    """What a finished run comes to: its files, the tensors of its checkpoints, its metrics without their times."""
    from pipeline.runs.checkpoint import load_checkpoint

    state: State = {path.name: path.read_bytes() for path in sorted(run.glob("mesh*"))}
    for path in sorted(run.glob("*/checkpoint.safetensors")):
        tensors, _ = load_checkpoint(path)
        state[path.parent.name] = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    state["metrics"] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    state["left over"] = sorted(path.name for path in run.rglob("*.part"))
    state["status"] = json.loads((run / "run.json").read_text(encoding="utf-8"))["status"]
    return state


def kills(seed: int, count: int, work: Path) -> Iterator[State]:
    """Yield what became of `count` runs, exports and batches, each killed and taken up again.

    Args:
        seed: of the moments. count: of runs, exports and batches. work: an empty folder.
    Yields: for each what was `killed`, `after_s` (seconds of processor time, of each kill), how often it had
        `begun_anew` before that, and what `differs` at its end.
    Raises: UserError where the run that is left alone does not come to its end.
    """
    import trimesh

    rng = random.Random(seed)
    trimesh.creation.box((1.0, 0.6, 0.6)).export(work / "block.glb")
    (work / "tiny.yaml").write_text(RECIPE)
    (work / "prompts.txt").write_text("a block\n")
    recipe = ["--config", "tiny.yaml", "reference.mesh=block.glb"]
    words = ["run", *recipe, "--prompt", "a block", "--out"]
    many = ["batch", "prompts.txt", *recipe, "--seeds", "2", "--workers", "1", "--out"]
    _finish(_start(work, *words, "warm"))  # compiles kernels, which later processes load
    whole = Clock(_finish(_start(work, *words, "alone")))
    exported = Clock(_finish(_start(work, "export", "alone", "--format", FORMATS, "--out", "files")))
    both = Clock(_finish(_start(work, *many, "batch")))
    alone, files, batch = state_of(work / "alone"), _files(work / "files"), _batch_state(work / "batch")
    for number in range(count):
        name, turn = f"run-{number}", number % 4
        if turn == 2:
            yield _kill_export(work, name, rng, exported, files)
        elif turn == 3:
            yield _kill_batch(work, name, many, rng, both, batch)
        else:
            yield _kill_run(work, name, words, rng, whole, alone, again=turn == 1)
        shutil.rmtree(work / name, ignore_errors=True)


def _kill_run(
    work: Path, name: str, words: list[str], rng: random.Random, clock: Clock, alone: State, again: bool
) -> State:
    def begin() -> subprocess.Popen:
        if (work / name / "config.yaml").exists():  # the one before ended too soon
            shutil.rmtree(work / name)
        return _start(work, *words, name)

    moments = [_killed(begin, rng, clock)]
    while not (work / name / "config.yaml").exists():
        moments.append(_killed(begin, rng, clock))
    begun_anew, what = len(moments) - 1, "run"
    if again and not _is_finished(work / name):
        what = "run and resume"
        backup = work / f"{name}-kept"
        shutil.copytree(work / name, backup)

        def resume() -> subprocess.Popen:
            shutil.rmtree(work / name)
            shutil.copytree(backup, work / name)
            return _start(work, "resume", name)

        moments.append(_killed(resume, rng, Clock(clock.seconds)))
        shutil.rmtree(backup)
    _finish(_start(work, "resume", name))
    now = state_of(work / name)
    differs = [key for key in alone if now.get(key) != alone[key]]
    return {"killed": what, "after_s": moments, "begun_anew": begun_anew, "differs": differs}


def _kill_export(work: Path, name: str, rng: random.Random, clock: Clock, files: State) -> State:
    """Into the run's own folder, whose files an export may write over."""
    words = ["export", name, "--format", FORMATS]

    def begin() -> subprocess.Popen:
        shutil.rmtree(work / name, ignore_errors=True)
        shutil.copytree(work / "alone", work / name)
        return _start(work, *words)

    moment = _killed(begin, rng, clock)
    _finish(_start(work, *words))
    now = _files(work / name)
    return {
        "killed": "export",
        "after_s": [moment],
        "begun_anew": 0,
        "differs": sorted(k for k in files | now if files.get(k) != now.get(k)),
    }


def _kill_batch(work: Path, name: str, words: list[str], rng: random.Random, clock: Clock, alone: State) -> State:
    victims = rng.choice(("worker", "batch", "batch and worker"))

    def begin() -> subprocess.Popen:
        shutil.rmtree(work / name, ignore_errors=True)
        return _start(work, *words, name)

    while True:
        process = begin()
        used = _wait(process, rng.uniform(0.25, 1.0) * clock.seconds)
        workers = [pid for pid in _family(process.pid)[1:] if _leads_a_session(pid)]
        if process.poll() is None and (workers or victims == "batch"):
            break
        if process.poll() is None:  # no worker yet to be killed
            process.kill()
            process.wait()
        else:
            clock.seconds = min(clock.seconds, _finish(process, used))
    if "batch" in victims:
        process.kill()
        process.wait()
    if "worker" in victims:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):  # it may have done its last run
                os.kill(pid, signal.SIGKILL)
    if victims == "worker":
        _finish(process)
    else:
        _finish(_start(work, *words, name))
    now = _batch_state(work / name)
    differs = [key for key in alone if now.get(key) != alone[key]]
    return {"killed": victims, "after_s": [round(used, 2)], "begun_anew": 0, "differs": differs}


def _batch_state(out: Path) -> State:
    """What a finished batch comes to: its plan, and each of its runs."""
    runs = sorted(path.parent for path in out.glob("*/config.yaml"))
    state: State = {f"{run.name}/{key}": value for run in runs for key, value in state_of(run).items()}
    return state | {"plan": (out / "batch.json").read_bytes(), "page": (out / "index.html").is_file()}


def _is_finished(run: Path) -> bool:
    path = run / "run.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"


def _files(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("mesh*"))}
    return files | {path.name: b"" for path in folder.rglob("*.part")}


def _start(work: Path, *words: str) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with open(work / "output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words],
            cwd=work,
            env=os.environ | {"PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _killed(begin: Callable[[], subprocess.Popen], rng: random.Random, clock: Clock) -> float:
    """Begin a process and kill it at a random moment of its time; where it ends first, begin again with a shorter one.

    Returns: the seconds of processor time after which a kill ended it, and nothing else.
    """
    while True:
        process = begin()
        moment = rng.uniform(0.25, 1.0) * clock.seconds
        used = _wait(process, moment)
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                return round(used, 2)
        clock.seconds = min(clock.seconds, _finish(process, used))


def _wait(process: subprocess.Popen, seconds: float) -> float:
    """Wait for the end of a process, no longer than it takes to use so much processor time; return what it used."""
    used = 0.0
    while process.poll() is None and used < seconds:
        time.sleep(0.005)
        used = max(used, sum(map(_processor_s, _family(process.pid))))
    return used


def _family(pid: int) -> list[int]:
    """Return a process and all that descend from it, as far as they live."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            children += map(int, path.read_text().split())
    return [pid, *(one for child in children for one in _family(child))]


def _processor_s(pid: int) -> float:
    """Return the processor time of a process and of those of its children that have ended, 0 if it is gone; proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _leads_a_session(pid: int) -> bool:
    """Whether a process is a batch's worker, which makes a session of its own."""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _finish(process: subprocess.Popen, used: float = 0.0) -> float:
    """Wait for the end of a process, and return the processor time that it used. Raises: UserError where it failed."""
    used = max(used, _wait(process, math.inf))
    if process.returncode != 0:
        words = " ".join(process.args[3:])
        raise UserError(f"pipeline {words} ended with {process.returncode}", "see its output", "mend it first")
    return used


def main() -> int:
    """Run the command line; 1 where a process did not end with the bytes of one left alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--count", type=int, default=5, help="runs, exports and batches to kill")
    parser.add_argument(
        "--out", type=from_home, help=f"folder of {FILE}, for a line of it; {RESULTS} is the published one"
    )
    args = parser.parse_args()
    before = environment()  # the revision that the processes ran
    lines = []
    with tempfile.TemporaryDirectory(prefix="kills-") as work:
        for line in kills(args.seed, args.count, Path(work)):
            lines.append(line)
            end = ", ".join(line["differs"]) or "the same bytes"
            print(f"{line['killed']} killed after {line['after_s']} s: {end}", flush=True)
    same = sum(not line["differs"] for line in lines)
    anew = sum(line["begun_anew"] for line in lines)
    print(f"{same} of {len(lines)} resumed to the same bytes; {anew} kills before them only began a run anew")
    if args.out is not None:
        facts = {"seed": args.seed, "kills": len(lines), "same_bytes": same, "begun_anew": anew, "each": lines}
        append_line(args.out / FILE, before | facts)
    return 0 if same == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
