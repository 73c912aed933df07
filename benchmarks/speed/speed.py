"""Time and memory of steps, starts and whole runs, and how they grow: `python -m benchmarks.speed`.

    python -m benchmarks.speed                          growth, starts and the main job (about 15 minutes on two cores)
    python -m benchmarks.speed --parts growth           step time of both stages against six sizes, with plots
    python -m benchmarks.speed --parts start            the first run ever, which compiles kernels, and later starts
    python -m benchmarks.speed --parts main             the main job: time (median of three), split, peak memory
    python -m benchmarks.speed --parts growth,full --device cuda    and a model of SD 2.1's size, random weights
    python -m benchmarks.speed --quick                  small sizes: does everything run? The numbers mean nothing
    python -m benchmarks.speed --publish                lines to results/speed.jsonl, plots to results/speed_*.svg

Growth replaces the prior's networks by a stand-in without cost (--networks pocket keeps the pocket prior's, on top of
every step): benchmarks/speed/growth.py. Runs are the command as a user types it, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, environment, quiet_libraries, read_lines
from pipeline.output.files import write_whole
from stages.errors import UserError
from stages.paths import from_home

PARTS = ("growth", "start", "main", "full")
FILE = "speed.jsonl"
RUNS, STARTS, JOBS = 7, 3, 3
FULL_WORDS = ["coarse.steps=24", "fine.steps=12", "export.turntable_frames=0"]
QUICK_WORDS = [
    "coarse.steps=2", "coarse.resolution=32", "coarse.views_per_step=1", "coarse.samples=32", "fine.steps=2",
    "fine.resolution=64", "fine.tets=16", "fine.initialise.samples=32", "export.texture_size=64", "export.faces=500",
    "export.turntable_frames=0",
]  # fmt: skip
Line = dict[str, Any]


def growth(args: argparse.Namespace) -> Iterator[Line]:
    """A line for every size of every sweep."""
    import torch

    from benchmarks.speed.growth import SWEEPS, run_sweep

    quiet_libraries()
    if args.threads > (os.cpu_count() or 1):  # before torch is told, which would start them all
        why = f"this machine has {os.cpu_count()} cores"
        raise UserError(f"cannot use {args.threads} threads", why, "give a smaller --threads")
    torch.set_num_threads(args.threads)
    for sweep in SWEEPS:
        if args.sweeps and f"{sweep.stage}.{sweep.name}" not in args.sweeps:
            continue
        options = {"networks": args.networks, "runs": args.runs, "quick": args.quick}
        for result in run_sweep(sweep, device=torch.device(args.device), **options):
            about = {"stage": sweep.stage, "sweep": sweep.name, "label": sweep.label, "linear": sweep.linear}
            yield {"part": "growth", **about, "networks": args.networks, **result}


def start(args: argparse.Namespace) -> Iterator[Line]:
    """The first run ever, and those after it."""
    from benchmarks.speed.runs import first_start, second_start

    yield {"part": "start", "which": "first", **first_start(_words(args), args.threads)}
    yield {"part": "start", "which": "later", **second_start(_words(args), args.threads, 1 if args.quick else STARTS)}


def main_job(args: argparse.Namespace) -> Iterator[Line]:
    """The main job as it is, the median of its runs; then with its profile."""
    from benchmarks.speed.runs import environment_of
    from benchmarks.speed.runs import main_job as run_main_job

    env = environment_of(args.threads)
    jobs = [run_main_job(_words(args), env, profiled=False) for _ in range(1 if args.quick else JOBS)]
    jobs.sort(key=lambda facts: facts["wall_s"])
    spread = {"low_s": jobs[0]["wall_s"], "high_s": jobs[-1]["wall_s"], "runs": len(jobs)}
    spread["peak_memory_mb"] = max(facts["peak_memory_mb"] for facts in jobs)
    yield {"part": "main", "profiled": False, **jobs[len(jobs) // 2], **spread}
    yield {"part": "main", "profiled": True, **run_main_job(_words(args), env, profiled=True)}


def full(args: argparse.Namespace) -> Iterator[Line]:
    """A model of full size with random weights: time only."""
    from benchmarks.speed.runs import full_size_run

    size = "tiny" if args.quick else "sd21"
    words = QUICK_WORDS if args.quick else FULL_WORDS
    yield {"part": "full", "what": "time only: random weights", **full_size_run(words, size, args.threads, args.device)}


def _words(args: argparse.Namespace) -> list[str]:
    return [*(QUICK_WORDS if args.quick else []), f"device={args.device}"]


MEASURE: dict[str, Callable[[argparse.Namespace], Iterator[Line]]] = {
    "growth": growth,
    "start": start,
    "main": main_job,
    "full": full,
}


def measure(args: argparse.Namespace) -> Iterator[Line]:
    """The lines of all parts asked for. Raises UserError for what this machine does not have."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is nothing to measure on cuda", "torch finds no CUDA device", "leave --device out")
    if "full" in args.parts and args.device == "cpu" and not args.quick:
        raise UserError(
            "the full-size run needs a GPU", "a UNet of 866 million parameters takes minutes a step on a CPU",
            "add --device cuda, or leave full out of --parts",
        )  # fmt: skip
    first = {"benchmark": "speed", **environment(), "threads": args.threads}
    first["device"] = first["device"] if args.device == "cuda" else "cpu"
    for part in args.parts:
        for line in MEASURE[part](args):
            yield first | line


def line_text(line: Line) -> str:
    """Return a result line as the terminal shows it."""
    if line["part"] == "growth":
        spread = f"[{line['ms_low']:.1f}, {line['ms_high']:.1f}]"
        facts = ", ".join(f"{name} {value:g}" for name, value in line["facts"].items())
        where = f"{line['stage']:>6} {line['sweep']:<9}{line['value']:>8g}"
        return f"{where}  {line['step_ms']:9.1f} ms {spread:<20} {facts}"
    keep = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("threads", "cores")}
    return f"{line['part']:>6} {line.get('which', '')} " + ", ".join(f"{name} {value}" for name, value in keep.items())


def key_of(line: Line) -> tuple:
    """Return what a published line is a measurement of; a new one replaces it."""
    names = ("device", "threads", "part", "stage", "sweep", "value", "networks", "which", "profiled", "size")
    return tuple(line.get(name) for name in names)


def publish(lines: list[Line], folder: Path) -> None:
    """Put lines into the results file in the place of older ones of the same measurements, and draw the plots anew."""
    from benchmarks.speed.speed_tables import plots

    new = {key_of(line) for line in lines}
    all_lines = [line for line in read_lines(folder / FILE) if key_of(line) not in new] + lines
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in all_lines)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, text.encode())
    for name, svg in plots(all_lines).items():
        write_whole(folder / f"{name}.svg", svg.encode())


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", help=f"by commas, of {', '.join(PARTS)}; default: all but full")
    parser.add_argument("--sweeps", default="", help="growth only: some, as in fine.tets,coarse.occupied")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: every core")
    parser.add_argument("--networks", choices=("none", "pocket"), default="none", help="of the prior, in growth")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"measured steps a size (default {RUNS})")
    parser.add_argument("--quick", action="store_true", help="small sizes, for trials")
    parser.add_argument("--out", type=from_home, default=RESULTS, help=f"folder of {FILE} and the plots")
    parser.add_argument("--publish", action="store_true", help=f"write the lines to {FILE} and draw the plots")
    args = parser.parse_args(arguments)
    args.parts = args.parts.split(",") if args.parts else [part for part in PARTS if part != "full"]
    args.sweeps = [name for name in args.sweeps.split(",") if name]
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"--parts: {', '.join(unknown)}: wanted {', '.join(PARTS)}")
    if args.threads < 1 or args.runs < 1:
        parser.error("--threads, --runs: wanted at least 1")
    if args.publish and args.quick:
        parser.error("--publish: the numbers of --quick mean nothing")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure and show: 0 done, 1 a run broke, 2 a user's mistake. What was measured before is published either way."""
    from benchmarks.speed.runs import Broken
    from benchmarks.speed.speed_tables import speed_markdown

    args, lines, code = _arguments(arguments), [], 0
    try:
        for line in measure(args):
            lines.append(line)
            print(line_text(line), flush=True)
    except Broken as error:
        print(error, file=sys.stderr)
        code = 1
    except UserError as error:
        print(f"{error.what}\n{error.why}\n{error.fix}", file=sys.stderr)
        code = 2
    if args.publish and lines:
        publish(lines, args.out)
    if lines:
        print(f"\n{speed_markdown(lines)}")
    return code
