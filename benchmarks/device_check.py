"""What a GPU is to prove, in one command of under nine minutes: `python -m benchmarks.device_check`.

    doctor   what is installed and found
    tests    the tests that need CUDA
    job      the main job twice, and whether its files and checkpoints have the same bytes
    full     30 + 30 steps under a model of Stable Diffusion 2.1's size, random weights: the split of a step, and the
             time that a whole run of the recipe would take
    peers    our kernels against nvdiffrast and tiny-cuda-nn, where they are built

    python -m benchmarks.device_check                    writes results/device_check.json, which the tables read
    python -m benchmarks.device_check --device cpu --quick    does everything run? The numbers mean nothing

Each part is a process of its own with its share of the time, so that one that breaks or hangs leaves the others theirs;
the file is written after each.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, environment
from benchmarks.markdown import markdown_table, origin_of
from benchmarks.speed.runs import Broken, environment_of, full_size_run, run
from benchmarks.speed.speed import QUICK_WORDS
from pipeline.config.model import load_config
from pipeline.output.files import write_whole
from stages.paths import from_home

FILE = RESULTS / "device_check.json"
BUDGET_S = 530  # of all parts together
STEPS = 30  # of each stage under the full-size model
JOB = ["--stages", "coarse,fine", "--prompt", "a red mug"]
COMPARED = ("mesh.glb", "mesh.png", "coarse/checkpoint.safetensors", "fine/checkpoint.safetensors")
PEERS = "hash_encode,hash_gradient,mlp,nerf_step,rasterise,interpolate,antialias,raster_step"
Facts = dict[str, Any]


class Late(Exception):
    """A part had no time left."""


def _output(command: list[str], seconds: float, codes: tuple[int, ...] = (0,)) -> str:
    """Run a command and return what it prints. Raises: Broken for another exit code; Late."""
    if seconds < 1:
        raise Late("there was no time left for it")
    env = environment_of(1) if "pytest" in command else None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=env, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise Late(f"it was stopped after {seconds:.0f} s") from None
    if done.returncode not in codes:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise Broken(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
    return done.stdout


def doctor(args: argparse.Namespace, seconds: float) -> Facts:
    """What `pipeline doctor` says."""
    return {"report": json.loads(_output([sys.executable, "-m", "pipeline", "doctor", "--json"], seconds))}


def tests(args: argparse.Namespace, seconds: float) -> Facts:
    """How the tests that need CUDA end, with the names of those that fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "-rf", "tests"]
    text = _output([*command, *(["-k", "no_such_test"] if args.quick else [])], seconds, (0, 1, 5))
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    return counts | {"failures": re.findall(r"^FAILED (\S+)", text, re.MULTILINE)}


def job(args: argparse.Namespace, seconds: float) -> Facts:
    """The main job twice: seconds of each, and which of the compared files have other bytes."""
    words = [*JOB, "--device", args.device, *(QUICK_WORDS if args.quick else [])]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("first", "second")]
        env, began = environment_of(args.threads), time.monotonic()
        took = [round(run(folder, words, env, began + seconds - time.monotonic()), 2) for folder in folders]
        differ = [name for name in COMPARED if len({(folder / name).read_bytes() for folder in folders}) > 1]
        stages = json.loads((folders[1] / "run.json").read_text())["stages"]
    facts = {name: {"seconds": stage["seconds"], "steps": stage["steps"]} for name, stage in stages.items()}
    return {"wall_s": took, "stages": facts, "differ": differ, "same_bytes": not differ}


def full(args: argparse.Namespace, seconds: float) -> Facts:
    """Time and split of a step under networks of full size, and the projected time of the recipe's steps."""
    steps = 2 if args.quick else STEPS
    words = [f"coarse.steps={steps}", f"fine.steps={steps}", "export.turntable_frames=0"]
    words += QUICK_WORDS if args.quick else []
    facts = full_size_run(words, "tiny" if args.quick else "sd21", args.threads, args.device, seconds)
    split = facts["profile"]["step_phases_ms"]
    step_s = {name: sum(phases.values()) / 1e3 for name, phases in split.items()}
    once = max(0.0, facts["wall_s"] - sum(steps * value for value in step_s.values()))
    config = load_config("stable-diffusion")
    recipe = {name: getattr(config, name).steps for name in step_s}
    projected = once + sum(recipe[name] * value for name, value in step_s.items())
    facts |= {
        "steps": steps,
        "recipe_steps": recipe,
        "step_s": {name: round(value, 4) for name, value in step_s.items()},
    }
    return facts | {"projected_s": round(projected, 1), "once_s": round(once, 1)}


def peers(args: argparse.Namespace, seconds: float) -> Facts:
    """The lines of benchmarks.kernels for the ops that nvdiffrast and tiny-cuda-nn have too."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--worker", "--device", args.device, "--only", PEERS]
    options = ["--quick"] if args.quick else ["--budget", "1"]
    lines = [json.loads(line) for line in _output([*command, *options, "--threads", "1"], seconds).splitlines()]
    dropped = ("benchmark", "date", "git", "python", "cpu", "cores", "versions", "device")
    return {"lines": [{k: v for k, v in line.items() if k not in dropped} for line in lines]}


PARTS: dict[str, tuple[Callable[[argparse.Namespace, float], Facts], float]] = {
    "doctor": (doctor, 30),
    "job": (job, 150),
    "full": (full, 150),
    "tests": (tests, 120),
    "peers": (peers, 80),
}  # with the seconds that each may take; what one leaves, the next ones have


def check(args: argparse.Namespace) -> Facts:
    """Run the parts asked for, writing the file after each; returns what it holds."""
    result: Facts = {"benchmark": "device_check", **environment(), "asked": args.device, "quick": args.quick}
    began, allowed = time.monotonic(), 0.0
    for name in args.parts:
        measure, share = PARTS[name]
        allowed += share * args.budget / BUDGET_S
        started = time.monotonic()
        try:
            facts = measure(args, allowed - (started - began))
        except (Broken, Late, OSError, KeyError, ValueError) as error:
            facts = {"broken": f"{type(error).__name__}: {error}"}
        result[name] = facts | {"part_s": round(time.monotonic() - started, 1)}
        print(f"{name:>7}  {result[name]['part_s']:6.1f} s  {_line(name, facts)}", flush=True)
        write_whole(args.out, (json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return result


def _line(name: str, facts: Facts) -> str:
    """A part in a few words."""
    if "broken" in facts:
        return f"BROKEN {facts['broken'].splitlines()[0]}"
    if name == "job":
        bytes_are = "the same bytes" if facts["same_bytes"] else f"OTHER BYTES: {', '.join(facts['differ'])}"
        return f"{facts['wall_s']} s, {bytes_are}"
    if name == "full":
        return (
            f"a step {facts['step_s']} s, the recipe's {facts['recipe_steps']} steps about {facts['projected_s']:.0f} s"
        )
    if name == "tests":
        return ", ".join(f"{count} {word}" for word, count in facts.items() if word != "failures")
    if name == "peers":
        return f"{len(facts['lines'])} lines"
    return "done"


def device_markdown(path: Path = FILE) -> str:
    """Return the README's table of a check; without one, the sentence that says so."""
    if not path.exists():
        return "No GPU has been at hand: `python -m benchmarks.device_check` waits for one."
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [[name, f"{result[name]['part_s']:.0f} s", _line(name, result[name])] for name in PARTS if name in result]
    split = result.get("full", {}).get("profile", {}).get("step_phases_ms", {})
    for stage, phases in split.items():
        parts = ", ".join(f"{name} {ms:.0f}" for name, ms in sorted(phases.items(), key=lambda item: -item[1]))
        rows.append([f"a {stage} step", f"{sum(phases.values()):.0f} ms", parts])
    return f"{markdown_table(['part', 'took', 'result'], rows)}\n\n{result['device']}; {origin_of([result])}."


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="by commas, in this order")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of all parts together")
    parser.add_argument("--quick", action="store_true", help="tiny settings, for trials")
    parser.add_argument("--out", type=from_home, help=f"file to write; default {FILE.name} of the results")
    args = parser.parse_args(arguments)
    args.parts = args.parts.split(",")
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)}: wanted {', '.join(PARTS)}")
    if args.out is None and (args.quick or args.device == "cpu"):
        parser.error("--out: needed here, since these numbers are not those of a GPU")
    args.out = args.out or FILE
    return args


def main(arguments: list[str] | None = None) -> int:
    """Check the device: 0 where every part did what it should, else 1."""
    args = _arguments(arguments)
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("device_check: torch finds no CUDA device; --device cpu --quick tries the command", file=sys.stderr)
            return 2
    result = check(args)
    print(f"\nwrote {args.out}")
    good = not any("broken" in result[name] for name in args.parts)
    good = good and result.get("job", {}).get("same_bytes", True)
    return 0 if good and not result.get("tests", {}).get("failures") else 1


if __name__ == "__main__":
    sys.exit(main())
