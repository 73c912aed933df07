"""What it costs a run that somebody looks at it, and a machine that a page waits for somebody.

    python -m benchmarks.view --rounds 3 coarse.steps=60 fine.steps=30

The same run in turn with nobody there, and with wishes of a camera that moves ten times a second, as a browser's page
writes them (A B A B ...). Counted is the processor time of the run, which other work on the machine hardly changes: all
of it, and what went into answers; and the share of the stages' time on the clock that answers took. Both must come to
the same bytes. The page and the browser are processes of their own: of a page that nobody looks at the processor time
is measured apart; a browser's is its own affair. Linux; the page needs the extra `viewer`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, append_line, environment
from pipeline.api import generate, load_config
from pipeline.view.page import FOV_DEG
from pipeline.watch.mailbox import Mailbox, write_wish
from pipeline.watch.sight import Camera
from stages.cameras import orbit_views
from stages.paths import from_home

FILE = "view.jsonl"
ROOT = Path(__file__).resolve().parents[1]
EVERY_S = 0.1  # between two wishes of a page whose camera moves
ASPECT = 1.33
IDLE_S = 30.0


class Looker:
    """Writes wishes for a run until it is left; `cpu_s` is the processor time that this took."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        places = orbit_views([5.0 * step for step in range(72)], 20.0).c2w.reshape(72, 16).tolist()
        self._cameras = [Camera.read({"c2w": c2w, "fov_deg": FOV_DEG, "aspect": ASPECT}) for c2w in places]
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self, run: Path) -> None:
        """Look at a run."""
        self._thread = threading.Thread(target=self._write, args=(run,))
        self._thread.start()

    def leave(self) -> None:
        """Look no more."""
        self._left.set()
        if self._thread is not None:
            self._thread.join()

    def _write(self, run: Path) -> None:
        for camera in itertools.cycle(self._cameras):
            if self._left.wait(EVERY_S):
                break
            write_wish(run, "run", camera)
            self.cpu_s = time.thread_time()


def measure(overrides: list[str], run: Path, watched: bool) -> dict[str, Any]:
    """Make a run and return what it took, with the parts of it that were answers, and the bytes of its mesh."""
    answer, answers_cpu_s, looker = Mailbox.answer, 0.0, Looker()

    def timed(*words: Any) -> float:
        nonlocal answers_cpu_s
        began = time.thread_time()
        try:
            return answer(*words)
        finally:
            answers_cpu_s += time.thread_time() - began

    Mailbox.answer = timed
    began = time.process_time()
    try:
        config = load_config(None, overrides, {})
        generate(config=config, out=run, on_begin=looker.look if watched else None, quiet=True)
    finally:
        looker.leave()
        Mailbox.answer = answer
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"].values()
    return {
        "cpu_s": time.process_time() - began - looker.cpu_s,
        "answers_cpu_s": answers_cpu_s,
        "stages_s": sum(facts["seconds"] for facts in record),
        "answers_s": sum(facts["phases"].get("view", 0.0) for facts in record),
        "bytes": (run / "mesh.glb").read_bytes(),
    }


def idle_share(run: Path) -> float:
    """Return the share of a core that the page of a run takes while nobody looks at it, once it has started."""
    command = [sys.executable, "-m", "pipeline", "view", str(run), "--port", "0"]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        page.stdout.readline()  # its address
        before = _processor_s(page.pid)
        time.sleep(IDLE_S)
        return (_processor_s(page.pid) - before) / IDLE_S
    finally:
        page.terminate()
        page.wait()


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def look_s(folder: Path, count: int = 10_000) -> float:
    """Return the processor time of a look for a wish where there is none."""
    mailbox, began = Mailbox(folder, print), time.process_time()
    for _ in range(count):
        mailbox.wished()
    return (time.process_time() - began) / count


def compare(rounds: int, overrides: list[str]) -> dict[str, Any]:
    """Return the JSON line of some rounds; its ratio and shares are medians over the rounds."""
    each: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        measure([*overrides, "coarse.steps=2"], Path(work) / "warm", watched=False)  # imports, kernels
        for number in range(rounds):
            alone = measure(overrides, Path(work) / f"alone-{number}", watched=False)
            watched = measure(overrides, Path(work) / f"watched-{number}", watched=True)
            same = alone.pop("bytes") == watched.pop("bytes")
            each.append({"same_bytes": same, "alone": alone, "watched": watched})
            print(each[-1], flush=True)
        idle, look = idle_share(Path(work) / "alone-0"), look_s(Path(work) / "alone-0")
    return {
        "settings": overrides,
        "watched_cpu_ratio": statistics.median(took["watched"]["cpu_s"] / took["alone"]["cpu_s"] for took in each),
        "answers_cpu_share": statistics.median(_share(took, "answers_cpu_s", "cpu_s") for took in each),
        "answers_share": statistics.median(_share(took, "answers_s", "stages_s") for took in each),
        "idle_page_share": idle,
        "look_s": look,
        "each": each,
    }


def _share(took: dict[str, Any], part: str, whole: str) -> float:
    return took["watched"][part] / took["watched"][whole]


def main() -> None:
    """Run the rounds, and add their line to the results where a folder is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.view", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=from_home, help=f"folder of {FILE}, for a line of it; {RESULTS} is the published one"
    )
    arguments = parser.parse_args()
    before = environment()  # the revision that is measured
    line = compare(arguments.rounds, arguments.overrides)
    print({key: value for key, value in line.items() if key != "each"})
    if arguments.out is not None:
        append_line(arguments.out / FILE, before | line)


if __name__ == "__main__":
    main()
