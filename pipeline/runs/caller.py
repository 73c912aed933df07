"""The Python program that a run is made for: what it hands in, what it hears, and what of it stays untouched."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pipeline.output.result_mesh import ResultMesh
    from pipeline.priors.source import Kept
    from stages.guidance.prior import Prior


@dataclass
class Caller:
    """Objects that a Python caller gives to a run, and the mesh that it gets back.

    Args:
        priors: objects by stage, in the place of sources.
        on_step: called with stage, step and metrics after every step.
        on_begin: called with a new run's folder, once it is there and before any work.
        kept: where priors stay for the caller's next run; None: they go with the run.
        mesh: what the run came to, as soon as it is made; None before, and where the run was finished already.
        log: names of what else hears the metrics, see pipeline.runs.tracking.
    """

    priors: Mapping[str, Prior] = field(default_factory=dict)
    on_step: Callable[[str, int, dict[str, float]], object] | None = None
    on_begin: Callable[[Path], object] | None = None
    kept: Kept | None = None
    mesh: ResultMesh | None = None
    log: tuple[str, ...] = ()


@contextlib.contextmanager
def deterministic(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Make torch deterministic inside: same seed, same device, same bytes; its state is restored afterwards.

    Torch is asked for its deterministic kernels where it has a choice, unless that is not enabled. The streams matter
    because weights of some modules are drawn from the global one, which make_stage seeds.
    """
    import torch

    # use_deterministic_algorithms loads torch's compiler for it, 1.2 s; filling costs time and hides nothing here.
    mode, fills = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.set_deterministic_debug_mode("warn" if enabled else "default")
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = fills


_UNREPEATABLE = re.compile(
    r"(\w[\w:]*) does not have a deterministic|(\w+ \w+ attention) defaults to a non-determin", re.IGNORECASE
)


@contextlib.contextmanager
def warnings_told(note: Callable[[str], None]) -> Iterator[None]:
    """Tell of each operation that torch cannot repeat in a note, once, in place of its warnings among the progress."""
    names: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message, category, filename, lineno, file=None, line=None) -> None:
            match = _UNREPEATABLE.search(str(message))
            if match is None:
                show(message, category, filename, lineno, file, line)
                return
            name = match[1] or match[2]
            if name not in names:
                names.add(name)
                note(f"{name} does not repeat its sums on this device: another run's bytes may differ")

        warnings.showwarning = tell
        warnings.filterwarnings("always", message=".*(not have a deterministic|defaults to a non-determin)")
        yield
