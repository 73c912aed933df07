"""The machine that a run was made on, as run.json names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def describe(device: torch.device) -> dict[str, Any]:
    """Return type and name of a device, and how many threads torch takes; JSON-ready."""
    import platform

    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor() or platform.processor()
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def _processor() -> str | None:
    """Return the processor's name as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
