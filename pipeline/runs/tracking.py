"""Metrics and previews of a run for trackers that people already have open: TensorBoard.

RUN/metrics.jsonl holds the same numbers whether or not anybody tracks. A resumed run's later file of events takes the
place of steps that were taken twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import UserError

TENSORBOARD = "tensorboard"  # the tracker's name, and its folder in that of the run


class Board:
    """What hears of every step; this one lets all pass."""

    def add(self, stage: str, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step, which took so many seconds."""

    def show(self, stage: str, step: int, image: np.ndarray) -> None:
        """Take a preview, uint8 sRGB [H, W, 3]."""

    def flush(self) -> None:
        """Write what was taken to the disk."""


class TensorBoard(Board):
    """Events for `tensorboard --logdir RUN`, or a folder of runs, by the package tensorboard (extra `tensorboard`)."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._writer = folder / TENSORBOARD, None

    def _events(self) -> Any:
        if self._writer is None:  # a run that fails before its first step leaves no events
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        return self._writer

    def add(self, stage: str, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step, which took so many seconds."""
        for name, value in {"seconds": seconds, **metrics}.items():
            self._events().add_scalar(f"{stage}/{name}", value, step)

    def show(self, stage: str, step: int, image: np.ndarray) -> None:
        """Take a preview, uint8 sRGB [H, W, 3]."""
        self._events().add_image(f"{stage}/preview", image, step, dataformats="HWC")

    def flush(self) -> None:
        """Write what was taken to the disk."""
        if self._writer is not None:
            self._writer.flush()


TRACKERS = {TENSORBOARD: TensorBoard}


def check_log(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is unknown or not installed."""
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise UserError(f"cannot log to {', '.join(unknown)}", f"trackers: {', '.join(TRACKERS)}", "choose from these")
    if TENSORBOARD in names:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            fix = "pip install 'text3d-pipeline[tensorboard]'; RUN/metrics.jsonl has the numbers without it"
            raise UserError("cannot log to tensorboard", f"it is not installed ({error})", fix) from None


def open_board(names: Sequence[str], folder: Path) -> Board:
    """Return what hears a run's steps: the tracker that was named, or nobody."""
    return next((TRACKERS[name](folder) for name in names), Board())
