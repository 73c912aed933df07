"""Everything that writes, killed at random moments and taken up again: it must end with the bytes of one left alone.

    python -m benchmarks.kills --count 20

A tiny run of both stages under the reference prior is killed by SIGKILL at a random moment and resumed, some of them
killed again while they resume; every third of the kills hits an export of a finished run in its place, which is made
again. Compared are the mesh files, the checkpoints' tensors, and the metrics without their times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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


def state_of(run: Path) -> dict[str, Any]:
    """What a finished run comes to: its files, the tensors of its checkpoints, its metrics without their times."""
    from pipeline.runs.checkpoint import load_checkpoint

    state: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(run.glob("mesh*"))}
    for path in sorted(run.glob("*/checkpoint.safetensors")):
        tensors, _ = load_checkpoint(path)
        state[path.parent.name] = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    state["metrics"] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    state["left over"] = sorted(path.name for path in run.rglob("*.part"))
    state["status"] = json.loads((run / "run.json").read_text(encoding="utf-8"))["status"]
    return state


def kills(seed: int, count: int, work: Path) -> list[dict[str, Any]]:
    """Kill `count` processes, take each up again, and compare; a line for each.

    Args:
        seed: of the moments. count: of kills. work: an empty folder.
    Raises: UserError where the run that is left alone does not come to its end.
    """
    import trimesh

    rng = random.Random(seed)
    trimesh.creation.box((1.0, 0.6, 0.6)).export(work / "block.glb")
    (work / "tiny.yaml").write_text(RECIPE)
    words = ["run", "--config", "tiny.yaml", "reference.mesh=block.glb", "--prompt", "a block", "--out"]
    _finish(_start(work, *words, "warm"))  # compiles kernels, which later processes load
    began = time.monotonic()
    _finish(_start(work, *words, "alone"))
    whole_s = time.monotonic() - began
    began = time.monotonic()
    _finish(_start(work, "export", "alone", "--format", FORMATS, "--out", "files"))
    export_s = time.monotonic() - began
    alone, files = state_of(work / "alone"), _files(work / "files")
    lines = []
    for number in range(count):
        name = f"run-{number}"
        if number % 3 == 2:
            lines.append(_kill_export(work, name, rng, export_s, files))
        else:
            lines.append(_kill_run(work, name, words, rng, whole_s, alone))
        shutil.rmtree(work / name, ignore_errors=True)
    return lines


def _kill_run(
    work: Path, name: str, words: list[str], rng: random.Random, whole_s: float, alone: dict[str, Any]
) -> dict[str, Any]:
    moments = [round(_killed(_start(work, *words, name), rng.uniform(0.25, 1.0) * whole_s), 2)]
    what = "run"
    if not (work / name / "config.yaml").exists():  # killed before there was anything to take up
        shutil.rmtree(work / name, ignore_errors=True)
        _finish(_start(work, *words, name))
    else:
        if rng.random() < 0.5:
            what = "run and resume"
            moments.append(round(_killed(_start(work, "resume", name), rng.uniform(0.25, 1.0) * whole_s), 2))
        _finish(_start(work, "resume", name))
    now = state_of(work / name)
    return {"killed": what, "after_s": moments, "differs": [key for key in alone if now.get(key) != alone[key]]}


def _kill_export(work: Path, name: str, rng: random.Random, export_s: float, files: dict[str, bytes]) -> dict[str, Any]:
    """Into the run's own folder, whose files an export may write over."""
    shutil.copytree(work / "alone", work / name)
    words = ["export", name, "--format", FORMATS]
    moment = round(_killed(_start(work, *words), rng.uniform(0.5, 1.0) * export_s), 2)
    _finish(_start(work, *words))
    now = _files(work / name)
    return {"killed": "export", "after_s": [moment], "differs": [key for key in files if now.get(key) != files[key]]}


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


def _killed(process: subprocess.Popen, after_s: float) -> float:
    """Kill a process after some seconds. Returns: the seconds, or those it took where it was done before."""
    began = time.monotonic()
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return time.monotonic() - began


def _finish(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        words = " ".join(process.args[3:])
        raise UserError(f"pipeline {words} ended with {process.returncode}", "see its output", "mend it first")


def main() -> int:
    """Run the command line; 1 where a process did not end with the bytes of one left alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--count", type=int, default=5, help="processes to kill")
    parser.add_argument(
        "--out", type=from_home, help=f"folder of {FILE}, for a line of it; {RESULTS} is the published one"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as work:
        lines = kills(args.seed, args.count, Path(work))
    for line in lines:
        print(f"{line['killed']} killed after {line['after_s']} s: {', '.join(line['differs']) or 'the same bytes'}")
    same = sum(not line["differs"] for line in lines)
    print(f"{same} of {len(lines)} ended with the same bytes")
    if args.out is not None:
        facts = {"seed": args.seed, "kills": len(lines), "same_bytes": same, "each": lines}
        append_line(args.out / FILE, environment() | facts)
    return 0 if same == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
