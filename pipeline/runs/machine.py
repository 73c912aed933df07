"""The device of a run, and the machine as run.json names it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import UserError
from stages.parallel import size

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """Return the device; `auto` is CUDA where torch finds it. Raises UserError where CUDA is asked for and absent."""
    import torch

    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        why = "torch finds no CUDA device" if torch.version.cuda else f"torch {torch.__version__} is a CPU build"
        raise UserError("device cuda is not there", why, "use --device auto (or device: auto in the run's config.yaml)")
    if not cuda or name == "cpu":
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its sums with it; read when it starts
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device("cuda")


def describe(device: torch.device) -> dict[str, Any]:
    """Return type and name of a device, and how many threads torch takes; JSON-ready."""
    import platform

    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor() or platform.processor()
    facts = {"type": device.type, "name": name, "threads": torch.get_num_threads()}
    return facts | ({"processes": size()} if size() > 1 else {})


def _processor() -> str | None:
    """Return the processor's name as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
