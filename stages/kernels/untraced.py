"""Calls that torch.compile leaves alone.

The compiled backends work on memory, through numpy or Warp. torch.compile would trace into that: numpy calls as torch
calls, numba kernels with tensors for numbers, which fails or is slower than not compiling at all. Calls of theirs are
breaks in its graph instead; what stands around them is compiled, and so are the torch twins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

_break: list[Callable] = []


def _call(function: Callable, *arguments):
    return function(*arguments)


def untraced(function: Callable, *arguments):
    """Call function(*arguments) outside of any graph that torch.compile is building.

    torch.compiler.disable does that, but loads the compiler (1.6 s), so it is put on once that is loaded anyway. Until
    then nothing can be tracing. Afterwards a call costs 0.4 us more.
    """
    if "torch._dynamo" not in sys.modules:
        return function(*arguments)
    if not _break:
        import torch

        _break.append(torch.compiler.disable(_call))
    return _break[0](function, *arguments)


def stepped_over(function: Callable) -> Callable:
    """Decorate a function to be called through :func:`untraced`; for backward passes, which a step may contain."""

    @wraps(function)
    def call(*arguments):
        return untraced(function, *arguments)

    return call
