"""The launch of Warp kernels on torch's tensors, device and stream, without copies.

The cuda/*.py modules hold kernels for CUDA written in Warp. The same kernels also run on Warp's CPU device, one thread
after another, which is how they are tested where there is no GPU. Only those modules import warp, and the public ops
import them inside functions, so warp-lang stays optional (extra `cuda`).

Compiled kernels are kept in Warp's cache, which WARP_CACHE_PATH moves. Every module fixes one block size, because Warp
compiles a module once for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from stages.errors import UserError

# Inputs and outputs of the perceptron in mlp.py; beyond, a point's vectors leave the registers. Kept here, where the op
# can read it without warp.
MLP_MAX = (128, 16)
BLOCK = 256  # threads per CUDA block: 8 warps, and up to 8 blocks an SM; also Warp's own default


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Return why Warp cannot be used here, or None; it imports warp."""
    try:
        import warp  # noqa: F401
    except Exception as error:  # a broken install raises more than ImportError
        return f"{type(error).__name__}: {error}"
    return None


def require() -> None:
    """Refuse to go on where warp cannot be imported. Raises: UserError."""
    if missing():
        fix = "pip install 'text3d-pipeline[cuda]', or choose another backend"
        raise UserError("backend 'warp' cannot be used", f"warp-lang does not import: {missing()}", fix)


@lru_cache(maxsize=1)
def _start():
    """Warp, initialised, without its greeting and its line per loaded module; a caller's own log level stands."""
    require()
    import warp

    if warp.config.log_level == warp.LOG_INFO:
        warp.config.log_level = warp.LOG_WARNING
    try:
        warp.init()
    except OSError as error:
        fix = "set WARP_CACHE_PATH to a folder you can write to"
        raise UserError("compiled kernels cannot be stored", str(error), fix) from error
    return warp


def missing_cuda() -> str | None:
    """Return why Warp cannot launch on a GPU here, or None; it starts Warp."""
    return missing() or (None if _start().is_cuda_available() else "Warp finds no CUDA device")


_watchers: list[tuple[Callable[[], None], Callable[[], None]]] = []
_loaded: set[tuple] = set()  # (module, device, block) that a watched launch has seen


@contextlib.contextmanager
def builds_watched(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Call `begin` before and `end` after a launch compiles a module that Warp's cache does not hold."""
    _watchers.append((begin, end))
    try:
        yield
    finally:
        _watchers.remove((begin, end))


def _load_watched(warp, module, where: str, block: int) -> None:
    """Load a module as its first launch would, telling the watchers where that means compiling it."""
    if (module, where, block) in _loaded:
        return
    folder = Path(warp.config.kernel_cache_dir) / module.get_module_identifier(block)
    cached = any(folder.glob("*.o" if where == "cpu" else "*.sm*"))
    with contextlib.ExitStack() as stack:
        for begin, end in [] if cached else list(_watchers):
            begin()
            stack.callback(end)
        warp.load_module(module, device=where, block_dim=block)
    _loaded.add((module, where, block))


@lru_cache(maxsize=64)
def _stream(device: int, handle: int):
    """Warp's view of a torch stream; torch's streams come from a fixed pool and live as long as the process."""
    warp = _start()
    return warp.Stream(warp.get_device(f"cuda:{device}"), cuda_stream=handle)


def launch(kernel, dim: int | tuple[int, ...], arguments: tuple, *, block: int = BLOCK) -> None:
    """Run a Warp kernel over `dim` threads, queued on torch's current stream; returns without waiting.

    Args:
        kernel: a non-generic @wp.kernel without gradients (enable_backward off); its outputs are among its arguments.
        dim: threads a dimension, the last one fastest; nothing is launched where one is 0.
        arguments: one a parameter: a tensor for an array (of any strides, except that the components of a vector or
            matrix dtype lie side by side), a number for a scalar. At least one tensor; all on one device.
        block: threads per CUDA block; the same for all kernels of a module.
    Raises: ValueError for a tensor on another device, of another dtype or number of dimensions; UserError without warp.
    """
    warp = _start()
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    values = [
        _array(warp, parameter, argument, device) if isinstance(argument, Tensor) else argument
        for parameter, argument in zip(kernel.adj.args, arguments, strict=True)
    ]
    if _watchers:
        where, threads = ("cpu", 1) if device.type == "cpu" else (f"cuda:{device.index}", block)
        _load_watched(warp, kernel.module, where, threads)
    if device.type == "cuda":
        stream = _stream(device.index, torch.cuda.current_stream(device).cuda_stream)
        warp.launch(kernel, dim, inputs=values, stream=stream, block_dim=block, record_tape=False)
    else:
        warp.launch(kernel, dim, inputs=values, device="cpu", record_tape=False)


def _array(warp, parameter, tensor: Tensor, device: torch.device):
    """Descriptor of a tensor's memory as the array type that a kernel's parameter wants."""
    expected, name = parameter.type, parameter.label
    if tensor.device != device or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: wanted a tensor on {device} (a CPU or CUDA device), got {tensor.device}")
    inner = len(getattr(expected.dtype, "_shape_", ()))
    if tensor.ndim - inner != expected.ndim:
        raise ValueError(f"{name}: wanted {expected.ndim + inner} dimensions, got shape {list(tensor.shape)}")
    try:
        return warp.from_torch(tensor, dtype=expected.dtype, requires_grad=False, return_ctype=True)
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from error
