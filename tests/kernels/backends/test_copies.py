"""Between torch and numpy nothing is copied: numba's kernels work in the memory of the tensors, inputs and results."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import stages.kernels.cpu
from stages.kernels.density import hash_density
from stages.kernels.hashgrid import hash_encode, hash_gradient
from stages.kernels.mlp import mlp, mlp_with_slope
from stages.kernels.volume import Samples, composite, cull, march
from tests.kernels.field_cases import SMALL, Draw, problem
from tests.kernels.kernel_cases import OPS as MESH_OPS


def kernels() -> Iterator[tuple[object, str, Callable]]:
    """Module, name and function of everything in cpu/*.py that numba compiles."""
    from numba.core.dispatcher import Dispatcher

    for info in pkgutil.iter_modules(stages.kernels.cpu.__path__):
        module = importlib.import_module(f"stages.kernels.cpu.{info.name}")
        yield from ((module, name, value) for name, value in vars(module).items() if isinstance(value, Dispatcher))


def addresses(values) -> set[int]:
    """Where the arrays or tensors among these values begin, whatever has no elements aside."""
    arrays = {v.ctypes.data for v in values if isinstance(v, np.ndarray) and v.size}
    return arrays | {v.data_ptr() for v in values if isinstance(v, Tensor) and v.numel()}


class Spy:
    """A kernel that notes the memory it is handed, and that of what it returns."""

    def __init__(self, kernel: Callable, memory: set[int], alive: list) -> None:
        self.kernel, self.memory, self.alive = kernel, memory, alive

    def __call__(self, *arguments):
        result = self.kernel(*arguments)
        values = [*arguments, *(result if isinstance(result, tuple) else (result,))]
        self.memory |= addresses(values)
        self.alive.append(values)  # so that no address is given away twice
        return result


def field_calls() -> dict[str, tuple[Callable, dict[str, Tensor]]]:
    """Every field op, and its arguments, in sizes that fill whole tiles."""
    points, table, g, _ = problem(300)
    sigmas, samples = Draw(9, 60).samples()
    values, packed = torch.rand(len(samples), 3), {"t": samples.t, "delta": samples.delta, "o": samples.ray_offsets}
    x, weights = torch.randn(300, 32), [torch.randn(*s) for s in ((16, 32), (16,), (4, 16), (4,))]
    rays = {"rays_o": torch.randn(50, 3), "rays_d": torch.randn(50, 3), "jitter": torch.rand(50)}
    head = tuple(torch.randn(*s) for s in ((16, SMALL.width), (16,), (1, 16), (1,)))
    full = torch.ones(4, 4, 4, dtype=torch.uint8)
    return {
        "hash_encode": (lambda points, table: hash_encode(points, table, SMALL), {"points": points, "table": table}),
        "hash_gradient": (
            lambda table, g, points: hash_gradient(points, table, SMALL, g), {"table": table, "g": g, "points": points},
        ),
        "hash_density": (
            lambda table, points: hash_density(points, table, SMALL, head), {"table": table, "points": points},
        ),
        "mlp": (lambda x: mlp(x, *weights), {"x": x}),
        "mlp_with_slope": (lambda x: mlp_with_slope(x, *weights), {"x": x}),
        "march": (
            lambda rays_o, rays_d, jitter, occupancy: unpacked(march(rays_o, rays_d, occupancy, 0.1, jitter)),
            {**rays, "occupancy": full},
        ),
        "composite": (
            lambda sigmas, values, t, delta, o: composite(sigmas, values, Samples(t, delta, o)),
            {"sigmas": sigmas, "values": values, **packed},
        ),
        "cull": (
            lambda sigmas, delta, o: cull(sigmas, Samples(samples.t, delta, o), 1e-2)[0],
            {"sigmas": sigmas, "delta": samples.delta, "o": samples.ray_offsets},
        ),
    }  # fmt: skip


def unpacked(samples: Samples) -> tuple[Tensor, ...]:
    return samples.t, samples.delta, samples.ray_offsets


def mesh_call(name: str) -> tuple[Callable, dict[str, Tensor]]:
    case = MESH_OPS[name](9)
    arguments = dict(enumerate((*case.leaves, *case.rest)))

    def call(**tensors):
        inputs = {int(k.removeprefix("argument ")): t for k, t in tensors.items()}
        return case.op(*(arguments | inputs).values(), **dict(case.options), backend="numba")

    return call, {f"argument {k}": t for k, t in arguments.items() if isinstance(t, Tensor)}


def there_and_back(call: Callable, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What goes into an op and its backward, and what comes out, by name."""
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items() if t.is_floating_point()}
    outs = call(**(tensors | leaves))
    outs = dict(enumerate(outs if isinstance(outs, tuple) else (outs,)))
    ends = {f"gradient of {k}": out for k, out in outs.items() if out.requires_grad}
    ups = {k: torch.randn(out.shape) for k, out in ends.items()}
    grads = (
        torch.autograd.grad([*ends.values()], [*leaves.values()], [*ups.values()], allow_unused=True) if ends else ()
    )
    back = {f"gradient in {k}": g for k, g in zip(leaves, grads) if g is not None}
    return tensors | ups, {f"result {k}": out for k, out in outs.items()} | back


@pytest.fixture
def watched(monkeypatch) -> Callable[[Callable, dict[str, Tensor]], tuple[set[str], set[str]]]:
    """A function: which tensors, of those that go into an op and of those that come out, no kernel was handed."""

    def watch(call: Callable, tensors: dict[str, Tensor]) -> tuple[set[str], set[str]]:
        there_and_back(call, tensors)  # compiles: numba finds a kernel that calls another by its name
        memory, alive = set(), []
        with monkeypatch.context() as patch:
            for module, name, kernel in [*kernels()]:
                patch.setattr(module, name, Spy(kernel, memory, alive))
            inputs, outs = there_and_back(call, tensors)
        assert memory
        return tuple(
            {k for k, t in part.items() if t.numel() and t.data_ptr() not in memory} for part in (inputs, outs)
        )

    return watch


# What torch handles before or after a kernel, on purpose.
OTHERWISE = {
    "hash_density": {"gradient of 0", "gradient of 1"},  # is added to the kernel's own; is padded to a tile's width
    "composite": {"gradient of 1"},  # the kernel writes into its copy
}


@pytest.mark.parametrize("name", field_calls())
def test_numba_works_in_the_memory_of_contiguous_float32_tensors(name, watched):
    inputs, actual = watched(*field_calls()[name])
    assert inputs == OTHERWISE.get(name, set()) and not actual


@pytest.mark.parametrize("name", [name for name in MESH_OPS if name != "diffuse"])  # starts from a difference
def test_mesh_kernels_read_the_tensors_themselves(name, watched):
    inputs, _ = watched(*mesh_call(name))
    assert not {k for k in inputs if k.startswith("argument")}


def test_a_copy_would_be_seen(watched):
    call, tensors = field_calls()["hash_encode"]
    points = torch.stack([tensors["points"]] * 2, -1)[..., 0]
    assert watched(call, tensors | {"points": points})[0] == {"points"}
