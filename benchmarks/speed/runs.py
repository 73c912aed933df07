"""Whole runs of the `pipeline` command, timed from outside: the main job, first and second starts, full-size models."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SHORT = ["coarse.steps=2", "fine.steps=2"]
COMMAND = [sys.executable, "-m", "pipeline"]
Facts = dict[str, Any]


class Broken(Exception):
    """A run ended with an error; the message holds the end of what it said."""


def environment_of(threads: int, **more: str) -> dict[str, str]:
    """Return this process's environment with every thread pool at `threads`."""
    return os.environ | {name: str(threads) for name in POOLS} | more


def run(folder: Path, words: list[str], env: dict[str, str], limit_s: float | None = None) -> float:
    """`pipeline run --out folder words`; wall seconds from start to end. Raises Broken, also after `limit_s`."""
    began = time.perf_counter()
    command = [*COMMAND, "run", "--out", str(folder), *words]
    options = {"env": env, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    try:
        process = subprocess.run(command, timeout=None if limit_s is None else max(limit_s, 0.1), **options)
    except subprocess.TimeoutExpired:
        raise Broken(f"pipeline run {' '.join(words)} was stopped after {limit_s:.0f} s") from None
    seconds = time.perf_counter() - began
    if process.returncode:
        tail = "\n".join((process.stdout + process.stderr).strip().splitlines()[-12:])
        raise Broken(f"pipeline run {' '.join(words)} ended with {process.returncode}:\n{tail}")
    return seconds


def main_job(words: list[str], env: dict[str, str], *, profiled: bool) -> Facts:
    """One main job: wall time, time by stage and phase, peak memory; with its profile, the split of a step too."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        seconds = run(folder, ["--stages", "coarse,fine", *words, *(["--profile"] if profiled else [])], env)
        record = json.loads((folder / "run.json").read_text())
        facts: Facts = {"wall_s": round(seconds, 2), "peak_memory_mb": record["peak_memory_mb"]}
        facts["stages"] = {
            name: {"seconds": stage["seconds"], "steps": stage["steps"]} for name, stage in record["stages"].items()
        }
        facts["export_s"] = round(sum(record["export"]["phases"].values()), 2)
        if profiled:
            facts["profile"] = profile_of(folder)
    return facts


def profile_of(folder: Path) -> Facts:
    """What matters of a run's profile: shares of the networks, what happens once, and the split of a step in ms."""
    profile = json.loads((folder / "profile" / "profile.json").read_text())
    steps: dict[str, dict[str, float]] = {}
    for name, stage in profile["stages"].items():
        kind = "step" if stage["steps"] else "traced step"
        rows = [row for row in profile["phases"] if row["path"][:2] == [name, kind] and len(row["path"]) == 3]
        steps[name] = {row["path"][2]: round(1e3 * row["seconds"] / max(stage["steps"], 1), 3) for row in rows}
    facts = {key: profile[key] for key in ("total_s", "once", "networks_share", "stages")}
    return facts | {"step_phases_ms": steps}


def first_start(words: list[str], threads: int) -> Facts:
    """Run two steps a stage without compiled kernels, then with them; returns how long the compiling takes."""
    with tempfile.TemporaryDirectory() as scratch:
        env = environment_of(threads, NUMBA_CACHE_DIR=str(Path(scratch) / "numba"))
        seconds = run(Path(scratch) / "first", [*SHORT, *words, "--profile"], env)
        first = profile_of(Path(scratch) / "first")["once"]
        again = run(Path(scratch) / "again", [*SHORT, *words, "--profile"], env)
        second = profile_of(Path(scratch) / "again")["once"]
    return {
        "compilation_s": first["compilation"],
        "wall_s": round(seconds, 2),
        "again_wall_s": round(again, 2),
        "again_compilation_s": second["compilation"],
        "again_loading_s": second["kernel cache"],
    }


def second_start(words: list[str], threads: int, times: int) -> Facts:
    """From command to first step where kernels are compiled: seconds to its beginning and to its end, medians."""
    ends, begins = [], []
    with tempfile.TemporaryDirectory() as scratch:
        env = environment_of(threads)
        for k in range(times + 1):  # the first one fills the caches
            folder = Path(scratch) / str(k)
            end = _first_step_s([*COMMAND, "run", "--out", str(folder), "--stages", "coarse", *words], env)
            line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
            if k:
                ends.append(end)
                begins.append(end - line["seconds"])
    return {
        "to_first_step_s": round(statistics.median(begins), 2),
        "low_s": round(min(begins), 2),
        "high_s": round(max(begins), 2),
        "first_step_done_s": round(statistics.median(ends), 2),
        "runs": times,
    }


def _first_step_s(command: list[str], env: dict[str, str]) -> float:
    """Seconds until a run says that it has taken its first step; it is then stopped as Ctrl-C does. Raises Broken."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines, seconds = [], None
    for text in process.stdout:
        lines.append(text.rstrip())
        if seconds is None and text.startswith("coarse  1/"):
            seconds = time.perf_counter() - began
            process.send_signal(signal.SIGINT)
    process.wait()
    if seconds is None:
        raise Broken(f"{' '.join(command)} ended with {process.returncode}:\n" + "\n".join(lines[-12:]))
    return seconds


def full_size_run(words: list[str], size: str, threads: int, device: str, limit_s: float | None = None) -> Facts:
    """Both stages under a random model of that size (time only): step times, split, parameters, device memory."""
    from benchmarks.speed.full_size import write_random_model

    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        parameters = write_random_model(model, size, half=device == "cuda")
        sources = [f"prior.coarse={model}", f"prior.fine={model}"]
        folder = Path(scratch) / "run"
        with device_memory_mb(device) as memory:
            options = ["--config", "stable-diffusion", "--device", device, "--force", "--profile"]
            seconds = run(folder, [*options, *sources, *words], environment_of(threads), limit_s)
        facts = {"size": size, "parameters": parameters, "wall_s": round(seconds, 2), "profile": profile_of(folder)}
        peak = json.loads((folder / "run.json").read_text())["peak_memory_mb"]
    return facts | {"peak_memory_mb": peak, "device_memory_mb": memory["peak"]}


@contextmanager
def device_memory_mb(device: str) -> Iterator[dict[str, float | None]]:
    """Highest use of the GPU's memory inside the block, by all processes, asked from nvidia-smi five times a second."""
    highest: dict[str, float | None] = {"peak": None}
    stop = threading.Event()

    def watch() -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not stop.wait(0.2):
            try:
                text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.SubprocessError):
                return
            highest["peak"] = max(highest["peak"] or 0.0, float(text.split()[0]))

    thread = threading.Thread(target=watch, daemon=True)
    if device == "cuda":
        thread.start()
    try:
        yield highest
    finally:
        stop.set()
        if device == "cuda":
            thread.join()
