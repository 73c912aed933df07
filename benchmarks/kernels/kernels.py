"""Time every kernel against its plain-torch twin and against other people's packages: `python -m benchmarks.kernels`.

    python -m benchmarks.kernels                        all ops, 1 and 2 threads (about 8 minutes on two cores)
    python -m benchmarks.kernels --only nerf_step       some ops
    python -m benchmarks.kernels --device cuda          Warp and the twins, tinycudann, nvdiffrast, kaolin, nerfacc
    python -m benchmarks.kernels --quick                tiny inputs: does everything run? The numbers mean nothing
    python -m benchmarks.kernels --publish              also into results/kernels.jsonl

The number of threads of many libraries is fixed when they load, so each number has a process of its own. In it,
contestants of one measurement are interleaved (benchmarks/timing.py); a twin that takes seconds gets fewer runs than
its opponents, at least three, spread among theirs. Every line tells how many, and how many cores were busy. One JSON
line per measurement; a package that cannot be used has a line with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, environment, read_lines
from benchmarks.speed.runs import environment_of
from pipeline.output.files import write_whole
from stages.errors import UserError
from stages.paths import from_home

CASES = (
    "hash_encode", "hash_gradient", "hash_density", "nerf_step", "mlp", "mlp_with_slope", "march", "cull",
    "composite", "rasterise", "interpolate", "antialias", "raster_step", "vertex_normals", "edge_topology", "texture",
    "marching_tetrahedra", "mesh_edges", "smoothness", "diffuse",
)  # fmt: skip
OURS = {"cpu": "numba", "cuda": "warp"}
# Packages behind our own ops (stages/kernels/backend.py), and the cases that they have ops for.
ADAPTORS = {
    "tinycudann": ("hash_encode", "hash_gradient", "mlp", "nerf_step"),
    "nvdiffrast": ("rasterise", "interpolate", "antialias", "raster_step", "texture"),
    "kaolin": ("marching_tetrahedra",),
}
ADAPTORS_ON = {"cpu": ("kaolin",), "cuda": ("tinycudann", "nvdiffrast", "kaolin")}
FAMILY_OF = {"tinycudann": ("hash", "mlp"), "nvdiffrast": ("raster",), "kaolin": ("marching",)}
BUDGET_S, QUICK_BUDGET_S = 4.0, 0.02
FILE = "kernels.jsonl"
Line = dict[str, Any]


def backends(name: str, device: str) -> dict[str, str]:
    """Return the backend of every family when `name` runs an op: a package where it has the family, ours elsewhere."""
    from stages.kernels.backend import FAMILIES

    has = FAMILY_OF.get(name, tuple(FAMILIES))
    return {family: name if family in has else OURS[device] for family in FAMILIES}


def measure(args: argparse.Namespace, threads: int) -> Iterator[Line]:
    """Lines of every case, after those of the packages that are absent. Raises UserError without our own backend."""
    import torch

    from benchmarks.kernels.operations import QUICK, Sizes, cases
    from stages.kernels.backend import probe as probe_backend

    device, packages = args.device, {}
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is nothing to measure on cuda", "torch finds no CUDA device", "leave --device out")
    if device == "cpu":
        torch.set_num_threads(threads)
    first = {"benchmark": "kernels", **environment(), "threads": threads if device == "cpu" else None}
    if device == "cpu":  # on a machine with a GPU too
        first["device"] = device
    for name in ADAPTORS_ON[device]:
        package = probe_backend(name)
        if package.state == "ok":
            packages[name] = package.detail
        else:
            yield first | {"contestant": name, "absent": package.detail}
    reasons: dict[str, str] = {}
    for case in cases(QUICK if args.quick else Sizes(), device):
        if args.only and case.name not in args.only:
            continue
        for line in measure_case(case, device, threads, args.budget, tuple(packages)):
            if "absent" in line:
                if reasons.get(line["contestant"]) == line["absent"]:
                    continue
                reasons[line["contestant"]] = line["absent"]
            if line["contestant"] in packages:
                line["version"] = packages[line["contestant"]]
            yield first | line


def measure_case(case: Any, device: str, threads: int, budget_s: float, packages: tuple[str, ...] = ()) -> list[Line]:
    """All contestants of one case against each other; ours first."""
    import torch

    from benchmarks.kernels.peers import Absent, Cast, contestant, peers_of, probe
    from benchmarks.timing import compare

    ours = OURS[device]
    calls = {name: case.call(backends(name, device)) for name in (ours, "torch")}
    calls |= {name: case.call(backends(name, device)) for name in packages if case.name in ADAPTORS[name]}
    more: dict[str, Line] = {}
    lines: list[Line] = []
    builds = {}
    for name in peers_of(case.peers, device):
        try:
            peer = contestant(name, case.peers, case.inputs, threads)
            more[name] = {"version": probe(name)}
            if isinstance(peer, Cast):
                builds[name], calls[name] = peer.build, peer.run
                more[name]["agreement"] = _agreement(peer, case.inputs[1])
            else:
                calls[name] = peer
        except Absent as error:
            lines.append({"contestant": name, "absent": str(error)})
    wait = torch.cuda.synchronize if device == "cuda" else None
    timings = compare(calls, budget_s=budget_s, synchronise=wait)
    facts = {"case": case.name, "work": case.work, "shapes": case.shapes}
    for name, timing in timings.items():
        lines.append(facts | _line(name, timing, timings[ours] if name != ours else None) | more.get(name, {}))
    for name, timing in compare(builds, budget_s=budget_s / 2, synchronise=wait).items():
        lines.append(facts | _line(name, timing, None) | {"work": "build"} | more[name])
    return lines


def _line(name: str, timing: Any, ours: Any) -> Line:
    from benchmarks.timing import ratio

    low, high = timing.quartiles_s
    line = {"contestant": name, "ms": round(1e3 * timing.median_s, 4), "ms_low": round(1e3 * low, 4)}
    line |= {"ms_high": round(1e3 * high, 4), "runs": len(timing.runs_s), "busy_cores": round(timing.cores, 2)}
    if ours is not None:
        times = ratio(timing, ours)
        line |= {"times_ours": round(times.value, 3)}
        line |= {"times_ours_low": round(times.low, 3), "times_ours_high": round(times.high, 3)}
    return line


def _agreement(cast: Any, rast: Any) -> float:
    """Share of the pixels where a ray caster sees the triangle that rasterising sees."""
    import numpy as np

    ids = rast[0, ..., 3].reshape(-1).long().cpu().numpy() - 1
    return round(float(np.mean(cast.triangles(cast.run()) == ids)), 5)


def run(args: argparse.Namespace) -> tuple[list[Line], list[str]]:
    """Return the lines of a worker process per number of threads, and what went wrong in any."""
    lines: list[Line] = []
    broken = []
    for threads in args.threads if args.device == "cpu" else args.threads[:1]:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kernels", *_worker_words(args, threads)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment_of(threads) if args.device == "cpu" else None,
        )
        last = "before its first measurement"
        for text in process.stdout:
            line = json.loads(text)
            lines.append(line)
            last = f"after {line.get('case', line['contestant'])}"
            print(line_text(line), flush=True)
        if process.wait():
            broken.append(f"the process of {threads} threads ended with {process.returncode}, {last}")
    return lines, broken


def _worker_words(args: argparse.Namespace, threads: int) -> list[str]:
    words = ["--worker", "--threads", str(threads), "--device", args.device, "--budget", str(args.budget)]
    words += ["--quick"] if args.quick else []
    return words + (["--only", ",".join(args.only)] if args.only else [])


def line_text(line: Line) -> str:
    """Return a result line as the terminal shows it."""
    threads = f"{line['threads']} threads" if line["threads"] else line["device"]
    if "absent" in line:
        return f"{threads:>9}  {line['contestant']} is not here: {line['absent']}"
    against = f"  {line['times_ours']:8.2f}x" if "times_ours" in line else ""
    spread = f"[{line['ms_low']:.2f}, {line['ms_high']:.2f}]"
    return (
        f"{threads:>9}  {line['case']:<20} {line['work']:<19} {line['contestant']:<11}"
        f"{line['ms']:10.2f} ms {spread:<24} {line['runs']:3} runs{against}"
    )


def key_of(line: Line) -> tuple:
    """Return what a published line is a measurement of; a new one replaces it."""
    shapes = json.dumps(line.get("shapes"), sort_keys=True)
    return line["device"], line["threads"], line["contestant"], line.get("case"), line.get("work"), shapes


def publish(lines: list[Line], path: Path) -> None:
    """Put lines into a results file in the place of older ones of the same measurements.

    What the file says is absent is dropped where it has been measured now; and where a case has been measured now
    without a contestant that is absent, that one's old numbers of the case, whose ratios are to an older us.
    """
    new = {key_of(line) for line in lines}
    contestants = {(line["device"], line["contestant"]) for line in lines}
    gone = {(line["device"], line["contestant"]) for line in lines if "absent" in line}
    cases = {(line["device"], line["threads"], line["case"]) for line in lines if "case" in line}

    def outdated(line: Line) -> bool:
        who = (line["device"], line["contestant"])
        if "absent" in line:
            return who in contestants
        return who in gone and (line["device"], line["threads"], line["case"]) in cases

    others = [line for line in read_lines(path) if key_of(line) not in new and not outdated(line)]
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in [*others, *lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases by commas, as in nerf_step,raster_step,rasterise")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, by commas (CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=float, help=f"seconds of measured runs a case (default {BUDGET_S:g})")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, for trials")
    parser.add_argument("--out", type=from_home, default=RESULTS, help=f"folder of {FILE}")
    parser.add_argument("--publish", action="store_true", help=f"write the lines to {FILE}")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.only = [name for name in args.only.split(",") if name]
    unknown = [name for name in args.only if name not in CASES]
    if unknown:
        parser.error(f"--only: no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    try:
        args.threads = [int(n) for n in args.threads.split(",")]
    except ValueError:
        parser.error("--threads: wanted whole numbers by commas")
    if min(args.threads) < 1:
        parser.error("--threads: wanted at least 1")
    if args.budget is None:
        args.budget = QUICK_BUDGET_S if args.quick else BUDGET_S
    if args.publish and args.quick:
        parser.error("--publish: the numbers of --quick mean nothing")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure and show: 0 everything was measured, 1 a process broke, 2 a user's mistake."""
    args = _arguments(arguments)
    if args.worker:
        return serve(args)
    from benchmarks.kernels.kernel_tables import kernels_markdown

    lines, broken = run(args)
    if args.publish and lines:
        publish(lines, args.out / FILE)
    if any("case" in line for line in lines):
        print(f"\n{kernels_markdown(lines)}")
    for text in broken:
        print(text, file=sys.stderr)
    return 1 if broken else 0


def serve(args: argparse.Namespace) -> int:
    """One process's measurements, as JSON lines on what was stdout; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for line in measure(args, args.threads[0]):
            print(json.dumps(line, ensure_ascii=False, allow_nan=False), file=answers, flush=True)
    except UserError as error:
        print(f"{error.what}\n{error.why}\n{error.fix}", file=sys.stderr)
        return 2
    return 0
