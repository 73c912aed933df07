"""The Python program that a run is made for: what it hands in, what it hears, and what of it stays untouched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pipeline.output.result_mesh import ResultMesh
    from stages.guidance.prior import Prior


@dataclass
class Caller:
    """Objects that a Python caller gives to a run, and the mesh that it gets back.

    Args:
        priors: objects by stage, in the place of sources.
        on_step: called with stage, step and metrics after every step.
        mesh: what the run came to, as soon as it is made; None before, and where the run was finished already.
    """

    priors: Mapping[str, Prior] = field(default_factory=dict)
    on_step: Callable[[str, int, dict[str, float]], object] | None = None
    mesh: ResultMesh | None = None


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Make torch deterministic inside: same seed, same device, same bytes; its state is restored afterwards.

    Torch is asked for its deterministic kernels where it has a choice. The streams matter because weights of some
    modules are drawn from the global one, which make_stage seeds.
    """
    import torch

    # use_deterministic_algorithms loads torch's compiler for it, 1.2 s; filling costs time and hides nothing here.
    mode, fills = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.set_deterministic_debug_mode("warn")
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = fills
