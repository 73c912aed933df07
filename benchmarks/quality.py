"""Compare systems on the same prompts and seeds: `python -m benchmarks.quality --help`.

    python -m benchmarks.quality                                   the pocket suite, every system, two seeds
    python -m benchmarks.quality --quick                           four prompts, one seed, shortened runs
    python -m benchmarks.quality --prompts benchmarks/main_job_prompts.txt --systems coarse,magic3d --seeds 1
    python -m benchmarks.quality --prompts coco.txt --prior SD15 --clip CLIP-B32,CLIP-L14 --systems magic3d

A cell is one system's mesh of one prompt and seed: OUT/cells/<system>/<prompt>-s<seed>/ with the run, mesh.glb's
pictures and result.json, written last and whole. A stopped suite started again keeps its finished cells and resumes
the pipeline runs of the others; `--workers N` makes N cells at once, in N processes.
At the end OUT/results.jsonl holds a line for every cell and OUT/summary.json what benchmarks.report shows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, environment, quiet_libraries, read_lines
from benchmarks.judges import check_judges, judges_of_run
from benchmarks.suite import Suite, load_suite
from benchmarks.systems import SYSTEMS, Failed, Job, find_system
from pipeline.export.files import write_whole
from stages.errors import UserError
from stages.pocket import world

POCKET_CLIP = Path(world.__file__).parent / "weights" / "clip"
DEFAULT_SYSTEMS = "floor,coarse,magic3d,reference,truth"
QUICK_OPTIONS = ("coarse.steps=120", "fine.steps=40", "clipmesh.steps=120")


@dataclass(frozen=True)
class Cell:
    """One system's mesh of one prompt and seed."""

    system: str
    prompt: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / "cells" / _slug(self.system) / f"{_slug(self.prompt)}-s{self.seed}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80]


def cells_of(suite: Suite, systems: list[str], seeds: int) -> list[Cell]:
    """All cells, systems innermost, so that an unfinished suite has whole prompts; coarse goes before magic3d."""
    ordered = sorted(systems, key=lambda name: name != "coarse")
    return [
        Cell(system, prompt, seed)
        for seed in range(seeds)
        for prompt in suite.prompts
        for system in ordered
        if seed == 0 or find_system(system).seeded
    ]


def load_result(cell: Cell, out: Path) -> dict[str, Any] | None:
    """A finished cell's result, None for one that is not."""
    path = cell.folder(out) / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# --- one cell, in a worker process -------------------------------------------------------------------------------


def make_cell(cell: Cell, out: Path, clips: list[Path], options: tuple[str, ...], threads: int, coarse: bool) -> None:
    """Make and measure one cell; result.json is its last act.

    A run that ends without an object is a result (`failed`: it scores nothing); anything else unexpected is raised.
    A CLIP that guided the run does not judge it: the cell goes without its scores and says so (`guided_by`).
    """
    import torch

    from benchmarks.assess import assess, draw_gallery
    from stages.guidance.clip import ClipScorer

    quiet_libraries()
    torch.set_num_threads(max(1, threads or torch.get_num_threads()))
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    coarse_run = (
        Cell("coarse", cell.prompt, cell.seed).folder(out) / "run" if coarse and cell.system == "magic3d" else None
    )
    if coarse_run is not None and not (coarse_run / "mesh.glb").is_file():
        coarse_run = None
    line: dict[str, Any] = {"system": cell.system, "prompt": cell.prompt, "seed": cell.seed, **environment()}
    line["options"] = list(options)
    try:
        mesh, line["cost"] = find_system(cell.system).make(
            Job(cell.prompt, cell.seed, folder, threads, options, coarse_run)
        )
    except Failed as error:
        line["failed"], mesh = str(error), None
    judges = judges_of_run(clips, folder / "run")
    if len(judges) < len(clips):
        line["guided_by"] = [clip.name for clip in clips if clip not in judges]  # and so without their scores
    if mesh is not None:
        began = time.perf_counter()
        line |= assess(mesh, cell.prompt, [ClipScorer(clip) for clip in judges])
        draw_gallery(mesh, folder / "gallery.jpg")
        line["assess_s"] = round(time.perf_counter() - began, 1)
    write_whole(folder / "result.json", (json.dumps(line, allow_nan=False) + "\n").encode())


def serve() -> None:
    """A worker: makes the cells that come as JSON lines on stdin, answers each with a line on stdout.

    A cell that raises leaves its traceback in its folder's error.txt. Ends at the end of stdin, or when the suite dies.
    """
    _die_with_parent()
    signal.signal(signal.SIGINT, lambda *_: None)  # the run in progress gets it too, saves itself and says so
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    for text in sys.stdin:
        words = json.loads(text)
        cell, out = Cell(words["system"], words["prompt"], words["seed"]), Path(words["out"])
        error = cell.folder(out) / "error.txt"
        error.unlink(missing_ok=True)
        try:
            clips = [Path(clip) for clip in words["clips"]]
            make_cell(cell, out, clips, tuple(words["options"]), words["threads"], words["take_over"])
        except Exception:  # reported with its traceback; the other cells go on
            cell.folder(out).mkdir(parents=True, exist_ok=True)
            error.write_text(traceback.format_exc())
        print(json.dumps({"finished": not error.exists()}), file=answers, flush=True)


def _die_with_parent() -> None:
    """End this process and the run it started when the suite that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Worker:
    """One worker process, started when first needed and again when it has died."""

    def __init__(self, args: argparse.Namespace, number: int) -> None:
        self._args, self._log = args, args.out / f"worker-{number}.log"
        self._process: subprocess.Popen | None = None

    def make(self, cell: Cell) -> None:
        """Have a cell made; afterwards it has a result or it broke."""
        args = self._args
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        words = {"system": cell.system, "prompt": cell.prompt, "seed": cell.seed, "out": str(args.out)}
        words |= {"clips": [str(c) for c in args.clip], "options": list(args.options)}
        words |= {"threads": args.threads, "take_over": args.take_over}
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return
        self._process.stdout.readline()  # empty when the process died

    def _start(self) -> subprocess.Popen:
        with open(self._log, "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.quality", "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def end(self) -> None:
        """Stop the process and a run it may have started, which keeps its last checkpoint."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        for number in (signal.SIGINT, signal.SIGKILL):
            if self._process is None or self._process.poll() is not None:
                return
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return


# --- the suite --------------------------------------------------------------------------------------------------


def run_cells(cells: list[Cell], args: argparse.Namespace) -> list[Cell]:
    """Make what is missing, `args.workers` at a time; returns the cells that broke (a bug or a lost machine).

    Cells of one prompt and seed go to one worker in turn, since magic3d takes over the coarse cell's stage.
    """
    waiting = [c for c in cells if load_result(c, args.out) is None]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} finished before", flush=True)
    tasks: queue.SimpleQueue[list[Cell]] = queue.SimpleQueue()
    for group in _groups(waiting):
        tasks.put(group)
    workers = [Worker(args, k) for k in range(min(args.workers, len(waiting)))]
    done: list[Cell] = []
    stopped, began = threading.Event(), time.monotonic()

    def work(worker: Worker) -> None:
        while not stopped.is_set():
            try:
                group = tasks.get_nowait()
            except queue.Empty:
                return
            for cell in group:
                if stopped.is_set():
                    return
                worker.make(cell)
                done.append(cell)
                if not stopped.is_set():
                    left = (len(waiting) - len(done)) * (time.monotonic() - began) / len(done)
                    said = f"{_headline(cell, args.out)}; about {left / 60:.0f} min left"
                    print(f"{cell.system:>10}  {cell.prompt} (seed {cell.seed}): {said}", flush=True)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stopped.set()
        for worker in workers:
            worker.end()
    return [cell for cell in waiting if load_result(cell, args.out) is None]


def _groups(cells: list[Cell]) -> list[list[Cell]]:
    """Cells by prompt and seed, in their order."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.prompt, cell.seed), []).append(cell)
    return list(groups.values())


def _headline(cell: Cell, out: Path) -> str:
    result = load_result(cell, out)
    if result is None:
        return f"broke, see {cell.folder(out)}"
    if "failed" in result:
        return "no object: " + result["failed"].splitlines()[-1][:100]
    parts = [f"{result['cost']['wall_s']:.0f} s"] if result["cost"].get("wall_s") else []
    parts += [f"chamfer {result['geometry']['chamfer']}"] if "geometry" in result else []
    return ", ".join([*parts, f"{result['mesh']['faces']} faces"])


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "; ".join(f"{name}: {system.meaning}" for name, system in SYSTEMS.items())
    parser.add_argument("--systems", default=DEFAULT_SYSTEMS, help=f"by commas. {names}; or a recipe or YAML file")
    parser.add_argument("--prompts", default="pocket", help="pocket, or a file with one caption a line")
    parser.add_argument("--distractors", type=Path, help="file of further candidate captions")
    parser.add_argument("--seeds", type=int, help="how many, from 0 (default 2; quick 1)")
    parser.add_argument("--clip", default="pocket", help="CLIPModel folders by commas; pocket is the built-in one")
    parser.add_argument("--prior", help="diffusers folder or hub id for both stages, or COARSE,FINE")
    parser.add_argument(
        "--set",
        dest="options",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of every pipeline run, repeatable",
    )
    parser.add_argument("--quick", action="store_true", help=f"four prompts, one seed, {', '.join(QUICK_OPTIONS)}")
    parser.add_argument("--limit", type=int, help="only the first N prompts")
    parser.add_argument("--workers", type=int, default=1, help="cells at once; more than one: a single thread each")
    parser.add_argument(
        "--no-take-over",
        dest="take_over",
        action="store_false",
        help="magic3d makes its own coarse stage, although the coarse cell's is the same",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of the cells")
    parser.add_argument("--publish", action="store_true", help=f"also add the lines to {RESULTS.name}/quality.jsonl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.workers < 1 or (args.seeds is not None and args.seeds < 1):
        parser.error("--workers, --seeds: wanted at least 1")
    args.seeds = args.seeds or (1 if args.quick else 2)
    args.threads = 1 if args.workers > 1 else 0
    args.clip = [POCKET_CLIP if c == "pocket" else Path(c).expanduser().absolute() for c in args.clip.split(",")]
    options = list(QUICK_OPTIONS) if args.quick else []
    if args.prior:
        coarse, _, fine = args.prior.partition(",")
        options += [f"prior.coarse={coarse}", f"prior.fine={fine or coarse}"]
    args.options = [*options, *args.options]
    args.out = args.out.absolute()
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run a suite (or serve as its worker): 0 all cells have results, 1 some broke, 2 a user's mistake."""
    args = _arguments(arguments)
    if args.worker:
        serve()
        return 0
    try:
        return run_suite(args)
    except UserError as error:
        print(f"{error.what}\n{error.why}\n{error.fix}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def run_suite(args: argparse.Namespace) -> int:
    """All cells, then their lines and the summary."""
    from benchmarks.summary import as_text, summarise

    suite = load_suite(args.prompts, args.distractors, args.quick)
    if args.limit:
        groups = {name: [p for p in group if p in suite.prompts[: args.limit]] for name, group in suite.groups.items()}
        others = suite.distractors + suite.prompts[args.limit :]
        suite = Suite(suite.name, {k: g for k, g in groups.items() if g}, others, suite.distractors_textureless)
    systems = args.systems.split(",")
    for name in systems:
        find_system(name)
    for clip in args.clip:
        if not clip.is_dir():
            raise UserError(f"no such CLIP: {clip}", "--clip names it", "give a CLIPModel folder, or pocket")
    check_judges({name: find_system(name).recipe for name in systems}, args.clip, args.options)
    _check_same(args, suite)
    cells = cells_of(suite, systems, args.seeds)
    broken = run_cells(cells, args)
    lines = [line | {"suite": suite.name} for cell in cells if (line := load_result(cell, args.out)) is not None]
    write_whole(args.out / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    summary = summarise(lines, suite, args.clip)
    write_whole(args.out / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    if args.publish:
        _publish(lines, summary)
    print(as_text(summary))
    for cell in broken:
        print(
            f"broken: {cell.system}, {cell.prompt}, seed {cell.seed}: {cell.folder(args.out)}",
            file=sys.stderr,
        )
    return 1 if broken else 0


def _check_same(args: argparse.Namespace, suite: Suite) -> None:
    """Refuse to mix cells of other options or CLIPs in one folder."""
    path = args.out / "suite.json"
    now = {"options": args.options, "clips": [c.name for c in args.clip], "prompts": args.prompts}
    if path.is_file():
        before = json.loads(path.read_text())
        if {k: before.get(k) for k in ("options", "clips")} != {k: now[k] for k in ("options", "clips")}:
            raise UserError(f"{args.out} holds another suite", f"its settings were {before}", "choose another --out")
    write_whole(path, (json.dumps(now | {"suite": suite.name}) + "\n").encode())


def _publish(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Replace this suite's lines in results/quality.jsonl and its summary in results/quality_<suite>.json."""
    from benchmarks.summary import key_of

    path = RESULTS / "quality.jsonl"
    kept = [line for line in read_lines(path) if line["suite"] != summary["suite"]]
    bare = [
        {k: v for k, v in line.items() if k != "clip"} | {"scores": summary["scores"][key_of(line)]} for line in lines
    ]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in [*kept, *bare]).encode())
    short = {k: v for k, v in summary.items() if k != "scores"}
    write_whole(RESULTS / f"quality_{summary['suite']}.json", (json.dumps(short, indent=1) + "\n").encode())


if __name__ == "__main__":
    raise SystemExit(main())
