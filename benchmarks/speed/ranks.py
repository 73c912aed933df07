"""What several processes gain: `python -m benchmarks.speed.ranks`, two minutes on two idle cores.

The same coarse steps, of the same views in parts of the same size, by one process and by several, one thread each:
efficiency is the time of one over N times that of N. `apart` is the same of N processes at once that take the same
parts and know nothing of each other: what memory and cores that they share cost, and no exchange could do better.
The built-in prior, so that it runs anywhere; on GPUs give `--config stable-diffusion` and
`--overrides prior.coarse=FOLDER`. Prints one line of JSON. Other work on the machine is measured as well: let there be
none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

WARM = 4  # steps before the first measured one
SMALL = ("checkpoint_every=100000", "preview_every=100000", "coarse.start.source=blob", "export.turntable_frames=0")


def allreduce_seconds(gradient_bytes: float, ranks: int, bytes_per_second: float) -> float:
    """Return the time of a ring all-reduce by its volume alone: 2 (N - 1) / N of the gradients pass each link.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", sec. 3.
    """
    return 2 * (ranks - 1) / ranks * gradient_bytes / bytes_per_second


def efficiency(seconds: dict[int, float]) -> dict[int, float]:
    """Return the share of N times one process's speed that N reach, by N; seconds of a step by N, 1 among them."""
    return {ranks: seconds[1] / (ranks * time) for ranks, time in seconds.items()}


def measure(ranks: int, views: int, steps: int, words: Sequence[str], out: Path) -> float:
    """Return the median seconds of a coarse step of `views` views, in parts of one view, by that many processes."""
    return _finish(_start(ranks, views, views // ranks, steps, words, out), out)


def measure_apart(ranks: int, views: int, steps: int, words: Sequence[str], out: Path) -> float:
    """Return that of a rank's share of the views, by that many processes at once of which none waits for another."""
    folders = [out / str(k) for k in range(ranks)]
    running = [(_start(1, views // ranks, views // ranks, steps, words, folder), folder) for folder in folders]
    return max(_finish(process, folder) for process, folder in running)


def _start(ranks: int, views: int, accumulate: int, steps: int, words: Sequence[str], out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command += ["pipeline", "run", "--stages", "coarse", "--prompt", "a red mug", "--out", str(out), *words]
    command += [f"coarse.steps={steps}", f"coarse.views_per_step={views}", f"coarse.accumulate={accumulate}"]
    return subprocess.Popen([*command, *SMALL], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def _finish(process: subprocess.Popen, out: Path) -> float:
    if process.wait():
        raise RuntimeError(f"a run ended with code {process.returncode}: {process.args}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds"] for row in rows[WARM:])


def gradient_bytes(words: Sequence[str], base: str) -> int:
    """Return the bytes of the gradients that a coarse step sums over the processes: the field's, float32."""
    import torch

    from pipeline import load_config
    from stages.fields.hashfield import HashField

    field = HashField(load_config(base, list(words), {}).coarse.field, torch.Generator())
    return sum(4 * p.numel() for p in field.parameters())


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.ranks", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes, 1 among them")
    parser.add_argument("--views", type=int, default=8, help="views of a step, a multiple of each number")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run")
    parser.add_argument("--config", default="default", help="recipe")
    parser.add_argument("--overrides", nargs="*", default=[], help="settings, key=value")
    asked = parser.parse_args(arguments)
    if 1 not in asked.ranks or asked.steps <= WARM or any(asked.views % n for n in asked.ranks):
        parser.error(f"wanted 1 among the ranks, more than {WARM} steps, views that each of them divides")
    words = ["--config", asked.config, *asked.overrides]
    with tempfile.TemporaryDirectory() as folder:
        settings = asked.views, asked.steps, words
        seconds = {n: measure(n, *settings, Path(folder) / str(n)) for n in asked.ranks}
        apart = {n: measure_apart(n, *settings, Path(folder) / f"apart-{n}") for n in asked.ranks if n > 1}
    facts = {
        "config": asked.config,
        "views": asked.views,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gradient_bytes": gradient_bytes(asked.overrides, asked.config),
        "step_s": seconds,
        "efficiency": efficiency(seconds),
        "apart": efficiency({1: seconds[1]} | apart),
    }
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
