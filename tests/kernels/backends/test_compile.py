"""Every op inside torch.compile: the bytes of the plain call, forward and backward, whatever is compiled around it.

The dynamo backend "aot_eager" traces and differentiates like the default one and needs no C++ compiler.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.kernels.density import hash_density
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode, hash_gradient
from stages.kernels.lambert import lambert
from stages.kernels.lattice import diffuse
from stages.kernels.marching import marching_tetrahedra, mesh_edges
from stages.kernels.mlp import mlp, mlp_with_slope
from stages.kernels.raster import antialias, edge_topology, interpolate, rasterise, texture, vertex_normals
from stages.kernels.smoothness import smoothness
from stages.kernels.volume import composite, cull, march

SPEC = HashGridSpec(levels=3, log2_table=7, base=3, finest=20)
WIDTH = SPEC.width


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


POINTS, TABLE = torch.rand(30, 3, generator=torch.Generator().manual_seed(1)), randn(SPEC.rows, 2)
WEIGHTS = (randn(8, WIDTH), randn(8), randn(1, 8), randn(1))
CORNERS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
TETRAHEDRON = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], dtype=torch.int32)
CLIP = torch.cat([1.3 * CORNERS[None] - 0.6, torch.ones(1, 4, 1)], -1)
ONE = (
    torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], dtype=torch.int32),
    torch.tensor([[0, 1, 2, 3]], dtype=torch.int32),
    torch.arange(6, dtype=torch.int32)[None],
)
CHAIN = torch.tensor([[-1, 1], [0, 2], [1, 3], [2, -1]], dtype=torch.int32)


def encode(points, table):
    return hash_encode(points * 1.0, table, SPEC).sin()


def gradient(points, table):
    return hash_gradient(points * 1.0, table, SPEC, points.sum(1, keepdim=True).expand(-1, WIDTH)).sin()


def perceptrons(x, *weights):
    out, slope = mlp_with_slope(x * 2, *weights)
    return torch.cat([mlp(x.sin(), *weights), out, slope], 1).cos()


def density(table, *weights):
    features, raw, slope = hash_density(POINTS, table * 1.0, SPEC, weights)
    return torch.cat([features, raw[:, None], slope], 1).sin()


def volume(sigmas, values):
    rays_o = torch.tensor([[0.0, 0, 3], [0.1, 0.2, 3], [5, 5, 3]])
    rays_d = torch.tensor([[0.0, 0, -1]]).expand(3, 3)
    samples = march(rays_o, rays_d, torch.ones(4, 4, 4, dtype=torch.bool), 0.2, torch.full((3,), 0.5))
    sigmas, values = sigmas[: len(samples)].exp(), values[: len(samples)]
    keep, samples = cull(sigmas, samples, 1e-2)
    out, weights, opacity, depth = composite(sigmas[keep], values[keep].sin(), samples)
    return torch.cat([out.reshape(-1), weights, opacity, depth]).cos()


def drawing(clip, colours):
    topology = edge_topology(TETRAHEDRON, 4)
    rast = rasterise(clip * 1.0, TETRAHEDRON, 9, 11)
    picture = interpolate(colours, rast, TETRAHEDRON).sin()
    return antialias(picture, rast, clip, TETRAHEDRON, topology) * 2


def lookup(image, uv):
    return texture(image * 1.0, uv.sigmoid()).sin()


def normals(vertices):
    return vertex_normals(vertices * 1.0, TETRAHEDRON).cos()


def roughness(vertices):
    return torch.stack(smoothness(vertices * 1.0, TETRAHEDRON, *mesh_edges(TETRAHEDRON, 4))).sin()


def shading(albedo, vectors, points):
    return lambert(albedo, vectors * 1.0, points, CORNERS[:1] + 2, 0.3, 0.7, shortest=1e-3).sin()


def surface(positions, sdf):
    vertices, faces, _ = marching_tetrahedra(positions * 1.0, sdf, *ONE, guard=0.01)
    return vertices[faces.long()].sin()


def smoothing(values):
    edges, sides = mesh_edges(TETRAHEDRON, 4)
    return diffuse(values * 1.0, CHAIN, 2.0) + edges.sum() + sides.sum()


OPS = {
    "hash encoding": (encode, (POINTS, TABLE)),
    "hash gradient": (gradient, (POINTS, TABLE)),
    "perceptrons": (perceptrons, (randn(20, WIDTH), *WEIGHTS)),
    "density": (density, (TABLE, *WEIGHTS)),
    "march, cull, composite": (volume, (randn(60), randn(60, 3))),
    "rasterise, interpolate, antialias": (drawing, (CLIP, randn(4, 3))),
    "texture": (lookup, (randn(4, 5, 3), randn(20, 2))),
    "vertex normals": (normals, (CORNERS,)),
    "smoothness": (roughness, (CORNERS,)),
    "shading": (shading, (randn(5, 3), randn(5, 3), randn(5, 3))),
    "marching tetrahedra": (surface, (CORNERS, torch.tensor([-1.0, 0.5, 2, 1]))),
    "diffusion, mesh edges": (smoothing, (randn(4),)),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(function, arguments):
    """The output, and the gradients of its weighted sum where it has any."""
    arguments = [a.clone().requires_grad_() for a in arguments]
    out = function(*arguments)
    if not out.requires_grad:
        return [out]
    loss = (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum()
    return [out, *torch.autograd.grad(loss, arguments, allow_unused=True)]


def assert_equal(actual, expected, tolerance=0.0):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_an_op_inside_torch_compile_is_the_op(name):
    function, arguments = OPS[name]
    expected = results(function, arguments)
    assert expected[0].numel() and expected[0].isfinite().all()
    compiled = torch.compile(function, backend="aot_eager")
    for _ in range(2):  # the second call takes the compiled path from its start
        assert_equal(results(compiled, arguments), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled around it


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hash encoding", "march, cull, composite", "rasterise, interpolate, antialias"])
def test_a_step_with_its_backward_pass_inside_torch_compile_is_the_step(name):
    function, arguments = OPS[name]

    def step(*arguments):
        return torch.autograd.grad((function(*arguments) * 0.5).sum() * 1.0, arguments)

    arguments = [v.clone().requires_grad_() for v in arguments]
    assert_equal(torch.compile(step, backend="aot_eager")(*arguments), step(*arguments))


@pytest.mark.slow
def test_torch_twins_are_compiled_whole():
    def field(points, table, *weights):
        return mlp(hash_encode(points, table, SPEC, backend="torch"), *weights, backend="torch")

    arguments = (POINTS, TABLE, *WEIGHTS)
    compiled = torch.compile(field, backend="aot_eager", fullgraph=True)
    assert_equal(results(compiled, arguments), results(field, arguments), 1e-5)


@pytest.mark.slow
def test_the_default_compiler_around_an_op():
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl") if name):
        pytest.skip("no C++ compiler")
    from torch._inductor.exc import InductorError  # here: it loads the compiler, for every test that is collected

    try:
        actual = results(torch.compile(encode), (POINTS, TABLE))
    except InductorError as error:
        if "C++" not in str(error) or "compile" not in str(error).lower():
            raise
        pytest.skip(f"the C++ compiler does not work: {str(error).splitlines()[0]}")
    assert_equal(actual, results(encode, (POINTS, TABLE)), 1e-5)


@pytest.mark.slow
def test_an_op_does_not_load_the_compiler():
    code = (
        "import sys, torch\n"
        "from stages.kernels.mlp import mlp\n"
        "mlp(torch.rand(3, 4), torch.rand(8, 4), torch.rand(8), torch.rand(2, 8), torch.rand(2))\n"
        "assert 'stages.kernels.cpu.mlp' in sys.modules and 'torch._dynamo' not in sys.modules\n"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
