"""What a folder's prior takes of a process: `python -m MODULE FOLDER WARM RESOLUTION VIEWS`.

WARM is a small folder of the same family. It is run twice before, once for imports and compilations, once for what a
process takes whatever the folder. Prints one line of JSON, of WARM and of FOLDER, in bytes:
    loading  resident memory above what the process had before, at the most while the prompts are embedded and the
             networks loaded
    weights  of the networks that are left then
    step     the most that the tensors of a step take at once, as torch's profiler counts them
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from stages.cameras import orbit_views
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.prompts import ViewPrompts

PROMPT = "a red mug"
WARM_SIDE = 64


def resident(name: str) -> int:
    """Return the bytes of VmRSS, or of VmHWM, the most of it since `forget`."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def forget() -> int:
    """Give free memory back and begin the most anew; returns what is resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def parameters() -> dict[int, int]:
    """Return the bytes of all parameters of the process, by where they lie."""
    alive = (value for value in gc.get_objects() if isinstance(value, torch.nn.Parameter))
    return {value.data_ptr(): value.nbytes for value in alive}


def most_of(step: Callable[[], None]) -> int:
    """Return the most bytes that a step's tensors take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


def run(folder: str, resolution: int, views: int) -> dict[str, int]:
    """Load the prior and take one step with it; returns what that took."""
    others, before, prompts = parameters(), forget(), ViewPrompts(PROMPT)
    settings, generator = DiffusionSettings(resolution=resolution), torch.Generator().manual_seed(0)
    prior = load_prior(folder, "cpu", settings=settings, prompts=[PROMPT, ""])
    guidance = Guidance(prior, GuidanceSettings(), prompts, generator)
    loading = resident("VmHWM") - before
    forget()
    weights = sum(count for place, count in parameters().items() if place not in others)
    images = torch.rand(views, resolution, resolution, 3, requires_grad=True)
    step = most_of(lambda: guidance(images, orbit_views([0.0] * views), 0.5).loss.backward())
    return {"loading": loading, "weights": weights, "step": step}


if __name__ == "__main__":
    torch.set_num_threads(1)
    large, small, side, count = sys.argv[1:]
    run(small, WARM_SIDE, int(count))
    print(json.dumps([run(small, WARM_SIDE, int(count)), run(large, int(side), int(count))]))
