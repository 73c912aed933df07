"""The energy that a piece of work took, where the machine counts it: the processors' RAPL counters, NVIDIA's power.

RAPL (Linux, /sys/class/powercap) counts what whole processor packages took, in microjoules, other programs' share with
it; its files are often readable by root alone. A GPU's power is asked for five times a second and summed over time.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RAPL = Path("/sys/class/powercap")
INTERVAL_S = 0.2
LONGEST_S = 30.0  # between two readings of RAPL: its 32-bit counters may wrap after a minute at full power


def packages(root: Path = RAPL) -> list[Path]:
    """The readable RAPL counters of whole packages; their parts (cores, memory controller) lie below and are left."""
    folders = []
    for folder in sorted(root.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:
            continue
        try:
            _read(folder)
        except (OSError, ValueError):
            continue
        folders.append(folder)
    return folders


def _read(folder: Path) -> int:
    return int((folder / "energy_uj").read_text())


def joules_between(before: int, after: int, most: int) -> float:
    """Return joules from one reading to the next of a counter in microjoules that starts again at zero after `most`."""
    return ((after - before) if after >= before else (after - before + most)) * 1e-6


@contextmanager
def energy_j(root: Path = RAPL) -> Iterator[dict[str, float]]:
    """Joules taken inside the block, by "cpu" and "gpu", filled in at its end; without a key where nothing counts."""
    counters, joules, stop = packages(root), {}, threading.Event()
    gpu = shutil.which("nvidia-smi") is not None
    most = {c: int((c / "max_energy_range_uj").read_text()) for c in counters}

    began, began_s = {c: _read(c) for c in counters}, time.monotonic()
    watts_then = _gpu_watts() if gpu else None
    joules |= ({"cpu": 0.0} if counters else {}) | ({} if watts_then is None else {"gpu": 0.0})

    def watch() -> None:
        last, last_s, read_s, watts = began, began_s, began_s, watts_then
        ended = False
        while not ended:
            ended = stop.wait(INTERVAL_S if watts is not None else LONGEST_S)
            now = time.monotonic()
            if watts is not None:
                joules["gpu"] += watts * (now - last_s)
                watts, last_s = _gpu_watts(), now
                if watts is None:  # half a count is none
                    del joules["gpu"]
            if counters and (ended or now - read_s >= LONGEST_S):
                present = {c: _read(c) for c in counters}
                joules["cpu"] += sum(joules_between(last[c], present[c], most[c]) for c in counters)
                last, read_s = present, now

    thread = threading.Thread(target=watch, daemon=True)
    if joules:
        thread.start()
    try:
        yield joules
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def _gpu_watts() -> float | None:
    """What all GPUs draw at this moment; None where nobody says."""
    query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return sum(float(line) for line in text.splitlines() if line.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
