"""The choice of a kernel's implementation: by name, by the run's `kernels` settings, or by device and dtype.

Every op takes `backend`. A name in a call wins. "auto" looks at the selection of this process, made of the `kernels`
settings, and where that says auto too, at the tensors: numba for float32 on the CPU, Warp for float32 on CUDA (plain
torch where Warp is missing), plain torch for everything else.

The selection is one per process, put in place by `selected` for the time of a run, and not an argument of every
constructor on the way down: it is a fact about the machine, not about the scene; every backend computes the same
function; and ops are called from some forty places (fields, renderers, meshes, baking, pictures, priors) that would
each have to carry five names that they never read. It is read in the forward pass only, so a backward pass that
autograd runs in another thread needs no copy of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stages.errors import UserError
from stages.kernels.untraced import untraced

BACKENDS = {
    "auto": "what the `kernels` settings say; else numba on the CPU and warp on CUDA for float32, torch otherwise",
    "torch": "the plain-torch twin: the definition, any device, float32 or float64",
    "numba": "compiled CPU kernels, float32 only",
    "warp": "CUDA kernels, float32 only; on the CPU too, one thread after another",
    "tinycudann": "NVIDIA's tiny-cuda-nn (hash, mlp), CUDA, float32",
    "nvdiffrast": "NVIDIA's rasteriser (raster), CUDA, float32; non-commercial licence",
    "kaolin": "NVIDIA's kaolin (marching), float32",
}
FAMILIES = {
    "hash": "hash encoding and its gradient",
    "mlp": "the small perceptrons",
    "volume": "ray marching and compositing",
    "raster": "rasterise, interpolate, antialias, texture",
    "marching": "marching tetrahedra, the lattice, the surface's smoothness",
}
_PACKAGE_OF = {"hash": "tinycudann", "mlp": "tinycudann", "raster": "nvdiffrast", "marching": "kaolin"}
_DEVICES = {"numba": ("cpu",), "warp": ("cpu", "cuda"), "kaolin": ("cpu", "cuda")}  # the others: CUDA
_ON = {("cpu",): "the CPU", ("cpu", "cuda"): "the CPU or CUDA", ("cuda",): "CUDA"}
_PLAIN = Literal["auto", "torch", "numba", "warp"]
_WITH_TINYCUDANN = Literal["auto", "torch", "numba", "warp", "tinycudann"]


class KernelSettings(BaseModel):
    """The implementation of each family of ops."""

    model_config = ConfigDict(extra="forbid")

    hash: _WITH_TINYCUDANN = Field("auto", description="hash encoding; auto: numba on the CPU, warp or torch on CUDA")
    mlp: _WITH_TINYCUDANN = Field("auto", description="perceptrons; tinycudann computes them in half precision")
    volume: _PLAIN = Field("auto", description="ray marching and compositing")
    raster: Literal["auto", "torch", "numba", "warp", "nvdiffrast"] = Field(
        "auto", description="rasteriser; nvdiffrast's licence allows non-commercial use only"
    )
    marching: Literal["auto", "torch", "numba", "warp", "kaolin"] = Field(
        "auto", description="marching tetrahedra and smoothing"
    )


@dataclass(frozen=True)
class Package:
    """An optional package behind ops of ours: the module to import, its licence, its name on a package index."""

    module: str
    licence: str
    distribution: str


PACKAGES = {
    "warp": Package("warp", "Apache-2.0", "warp-lang"),
    "tinycudann": Package("tinycudann", "BSD-3-Clause", "tinycudann"),
    "nvdiffrast": Package("nvdiffrast.torch", "NVIDIA Source Code License, non-commercial use only", "nvdiffrast"),
    "kaolin": Package("kaolin.ops.conversions", "Apache-2.0", "kaolin"),
}


@dataclass(frozen=True)
class Probe:
    """The result of importing a package. state: ok, missing (not there) or broken; detail: version or reason."""

    state: Literal["ok", "missing", "broken"]
    detail: str


@cache
def probe(name: str) -> Probe:
    """Import a package of PACKAGES, once per process; whatever it raises is kept as the reason.

    tinycudann raises OSError without a GPU, kaolin's stub on PyPI ImportError, a stale build of any of them anything.
    On a GPU nvdiffrast must also open its context: older versions compile themselves there, and fail there.
    """
    package = PACKAGES[name]
    try:
        if importlib.util.find_spec(package.module.partition(".")[0]) is None:
            return Probe("missing", "not installed")
        importlib.import_module(package.module)
        if name == "nvdiffrast" and torch.cuda.is_available():
            from stages.kernels.adaptors import nvdiffrast

            nvdiffrast.context(torch.device("cuda", torch.cuda.current_device()))
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Probe("broken", f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
    try:
        return Probe("ok", importlib.metadata.version(package.distribution))
    except importlib.metadata.PackageNotFoundError:
        return Probe("ok", "version unknown")


@lru_cache(maxsize=1)
def warp_off_cuda() -> str | None:
    """Return why Warp cannot compute on CUDA tensors here, None where it can; checked once."""
    if probe("warp").state != "ok":
        return f"warp does not import: {probe('warp').detail}"
    from stages.kernels.cuda import launch

    try:
        return launch.missing_cuda()
    except UserError as error:
        return str(error)


def _auto(device: str, single: bool) -> str:
    if not single or device not in ("cpu", "cuda"):
        return "torch"
    if device == "cpu":
        return "numba"
    return "torch" if untraced(warp_off_cuda) else "warp"


def _absent(backend: str, device: str) -> str | None:
    """Return why a backend that could compute on a device is not there; None where it is."""
    if backend == "warp" and device == "cuda":
        return untraced(warp_off_cuda)
    if backend in PACKAGES:
        package = untraced(probe, backend)
        return None if package.state == "ok" else f"{backend} does not import: {package.detail}"
    return None


def _where(backend: str) -> str:
    return _ON[_DEVICES.get(backend, ("cuda",))]


@dataclass(frozen=True)
class Selection:
    """The resolved settings of a run on its device: a backend per family, and notices for the user."""

    device: str
    backends: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


_EMPTY = Selection("")
_selection = _EMPTY


def resolve(settings: KernelSettings, device: torch.device | str) -> Selection:
    """Choose the backend of every family for float32 tensors on a device, with notices for the user.

    Raises: UserError where a backend is asked for by name and cannot be used here, or numba's compiler is switched off.
    """
    _check_compiler()
    kind = torch.device(device).type
    backends = {}
    for family in FAMILIES:
        setting = getattr(settings, family)
        if setting in ("auto", "torch"):
            backends[family] = _auto(kind, True) if setting == "auto" else setting
            continue
        what = f"kernels.{family}={setting} cannot be used"
        if kind not in _DEVICES.get(setting, ("cuda",)):
            why = f"it computes on {_where(setting)}, and this run is on {kind}"
            raise UserError(what, why, f"kernels.{family}=auto")
        why = _absent(setting, kind)
        if why:
            raise UserError(what, why, f"kernels.{family}=auto; `pipeline doctor` says what is installed")
        backends[family] = setting
    return Selection(kind, backends, tuple(_notices(settings, backends, kind)))


def _check_compiler() -> None:
    with suppress(ImportError):  # without numba, of which `pipeline doctor` tells
        from stages.kernels.cpu.jit import check_compiler

        check_compiler()


def _notices(settings: KernelSettings, backends: dict[str, str], device: str) -> Iterator[str]:
    slow = [family for family in FAMILIES if getattr(settings, family) == "auto" and backends[family] == "torch"]
    if slow and device == "cuda":
        why = warp_off_cuda()
        yield f"kernels: {', '.join(slow)} run as plain torch, slower than Warp would (warp: {why}; extra: cuda)"
    elif slow:
        yield f"kernels: {', '.join(slow)} run as plain torch: there are no compiled kernels for {device}"
    if "nvdiffrast" in backends.values():
        yield f"kernels: nvdiffrast draws this run; its licence: {PACKAGES['nvdiffrast'].licence}"
    if backends["mlp"] == "tinycudann":
        yield (
            "kernels: tinycudann computes perceptrons in half precision, and none of their derivatives: those with "
            f"shaded normals run on {_auto(device, True)}"
        )
    unordered = sorted({"tinycudann", "nvdiffrast"} & set(backends.values()))
    if unordered:
        yield f"kernels: {', '.join(unordered)} sum gradients in any order: the same seed, but not the same bytes"


@contextmanager
def selected(selection: Selection) -> Iterator[None]:
    """Let "auto" mean this selection inside the block; the one before is back afterwards."""
    global _selection
    before, _selection = _selection, selection
    try:
        yield
    finally:
        _selection = before


def check_alike(name: str, tensor: Tensor, other: Tensor) -> None:
    """Raise ValueError naming argument, wanted and got unless a tensor has the dtype and the device of another one."""
    if (tensor.dtype, tensor.device) != (other.dtype, other.device):
        expected, got = (f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in (other, tensor))
        raise ValueError(f"{name}: wanted {expected}, got {got}")


def choose_backend(backend: str, *tensors: Tensor, family: str, adaptor: bool = False) -> str:
    """Resolve a backend name for one call of an op with these tensors.

    The selection holds for float32 tensors on the run's device, "torch" for all; others, such as the CPU tensors of an
    export on a CUDA run, go by device and dtype. So do, where a family is left to a package, those of its ops that the
    package does not have (vertex normals under nvdiffrast).
    Args:
        backend: a key of BACKENDS; of the packages, only the one that covers the family.
        tensors: the floating point arguments of the op; they must share one device and one dtype.
        family: a key of FAMILIES.
        adaptor: whether this op has an adaptor for the family's package.
    Returns: "torch", "numba", "warp" or, for an op with an adaptor, the package's name.
    Raises: ValueError for an unknown name, and where a backend is asked for what it does not compute; UserError where
        it is not installed.
    """
    package = _PACKAGE_OF.get(family)
    names = [name for name in BACKENDS if name == package or name not in _PACKAGE_OF.values()]
    if backend not in names:
        raise ValueError(f"backend: unknown name {backend!r}, have {', '.join(names)}")
    kinds = {t.device.type for t in tensors}
    single = all(t.dtype == torch.float32 for t in tensors)
    kind = kinds.pop() if len(kinds) == 1 else "several devices"
    if backend == "auto":
        selection = _selection.backends.get(family)
        if selection is None or (selection != "torch" and not (single and kind == _selection.device)):
            return _auto(kind, single)
        return selection if selection != package or adaptor else _auto(kind, single)
    if backend == package and not adaptor:
        return _auto(kind, single)
    if backend == "torch":
        return backend
    if not single or kind not in _DEVICES.get(backend, ("cuda",)):
        got = ", ".join(f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors)
        raise ValueError(f"backend: {backend!r} takes float32 tensors on {_where(backend)}, got {got}")
    why = _absent(backend, kind)
    if why:
        raise UserError(f"backend {backend!r} cannot be used", why, "`pipeline doctor` says what is installed")
    return backend
