"""Hash encoding, its spatial gradient and the small perceptron: hand-worked cells, twin against numba, finite
differences in float64."""

import pytest
import torch

from stages.kernels.cpu import hashgrid as cpu_hashgrid
from stages.kernels.density import hash_density
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode, hash_gradient
from stages.kernels.mlp import mlp, mlp_with_slope

SMALL = HashGridSpec(levels=5, log2_table=8, base=3, finest=40)  # two dense levels, three hashed


def problem(spec: HashGridSpec, n: int, seed: int = 0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(n, 3, generator=g).to(dtype)
    table = torch.randn(spec.rows, spec.features, generator=g).to(dtype)
    return points, table, torch.randn(n, spec.width, generator=g).to(dtype), torch.randn(n, 3, generator=g).to(dtype)


def test_levels_grow_from_base_to_finest_and_dense_ones_never_overflow():
    spec = HashGridSpec()
    assert (spec.levels, spec.resolutions[0], spec.resolutions[-1]) == (16, 16, 256)
    for level, (resolution, dense) in enumerate(zip(spec.resolutions, spec.dense, strict=True)):
        rows = spec.offsets[level + 1] - spec.offsets[level]
        assert rows == ((resolution + 1) ** 3 if dense else 1 << 15)
        assert rows <= 1 << 15
    assert spec.dense[0] and not spec.dense[-1]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_encoding_at_a_vertex_is_its_row_and_at_a_cell_centre_the_mean_of_eight(backend):
    spec = HashGridSpec(levels=1, log2_table=8, base=4, finest=4)
    table = torch.arange(spec.rows * 2, dtype=torch.float32).reshape(-1, 2)
    vertex = torch.tensor([[1 / 4, 2 / 4, 3 / 4], [1.0, 1.0, 1.0]])
    rows = torch.tensor([1 + 2 * 5 + 3 * 25, 4 + 4 * 5 + 4 * 25])
    assert torch.equal(hash_encode(vertex, table, spec, backend=backend), table[rows])
    corner = torch.tensor([x + 5 * y + 25 * z for x in (1, 2) for y in (0, 1) for z in (3, 4)])
    centre = torch.tensor([[1.5 / 4, 0.5 / 4, 3.5 / 4]])
    assert torch.allclose(hash_encode(centre, table, spec, backend=backend), table[corner].mean(0, keepdim=True))


def test_numba_and_torch_agree_in_values_and_every_gradient():
    for spec in (SMALL, HashGridSpec()):
        points, table, g, up = problem(spec, 1500)
        points[:4] = torch.tensor([[0.0, 0, 0], [1, 1, 1], [-0.3, 0.5, 0.5], [0.5, 1.7, 0.2]])
        outputs = {}
        for backend in ("torch", "numba"):
            p, t, h = (v.clone().requires_grad_() for v in (points, table, g))
            encoded = hash_encode(p, t, spec, backend=backend)
            slope = hash_gradient(p, t, spec, h, backend=backend)
            ((encoded * g).sum() + (slope * up).sum()).backward()
            outputs[backend] = (encoded, slope, p.grad, t.grad, h.grad)
        for a, b in zip(outputs["torch"], outputs["numba"], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.detach().abs().max()))
        assert float(outputs["numba"][2][2, 0]) == 0 and float(outputs["numba"][2][2, 1]) != 0  # clamped axis


@pytest.mark.parametrize("levels", [3, 9])  # features in rows of points, and meanwhile in rows of levels
def test_levels_too_large_for_a_cache_are_computed_to_the_same_bytes(levels, monkeypatch):
    spec = HashGridSpec(levels=levels, log2_table=12, base=6, finest=60)
    assert spec.dense[0] and not spec.dense[-1]
    points, table, g, up = problem(spec, 2 * cpu_hashgrid.SPAN + 300)
    wider = torch.cat([torch.full((len(g), 5), torch.nan), g, torch.full((len(g), 3), torch.nan)], 1)

    def everything():
        out = torch.zeros(len(points), spec.width + 8)
        cpu_hashgrid.encode_into(points, table, spec, out, 5)
        return [
            out,
            cpu_hashgrid.directional(points, table, spec, up),
            cpu_hashgrid.gradient(points, table, spec, g),
            cpu_hashgrid.encode_backward(points, spec, wider, 5),
            cpu_hashgrid.scatter(points, spec, g, g, up),
            cpu_hashgrid.gradient_backward_table(points, spec, g, up),
        ]

    narrow = everything()
    monkeypatch.setattr(cpu_hashgrid, "WIDE", 1 << 8)
    assert cpu_hashgrid._span(spec, len(points), 1) > cpu_hashgrid.SPAN
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, narrow, everything()))


@pytest.mark.slow
def test_twin_gradients_are_float64_finite_differences():
    points, table, g, up = problem(SMALL, 12, dtype=torch.float64)
    step = 1e-6
    numeric = torch.stack(
        [
            ((hash_encode(points + d, table, SMALL) - hash_encode(points - d, table, SMALL)) * g).sum(-1) / (2 * step)
            for d in step * torch.eye(3, dtype=torch.float64)
        ],
        -1,
    )
    away = torch.ones(12, dtype=torch.bool)  # the encoding has kinks at cell walls
    for resolution in SMALL.resolutions:
        fraction = points * resolution % 1
        away &= ((fraction > 1e-3) & (fraction < 1 - 1e-3)).all(-1)
    assert away.sum() > 6
    assert torch.allclose(hash_gradient(points, table, SMALL, g)[away], numeric[away], atol=1e-6)
    t = table.clone().requires_grad_()
    h = g.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: hash_gradient(points, table, SMALL, h), (h,))
    (hash_gradient(points, t, SMALL, g) * up).sum().backward()
    direction = torch.randn(table.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plus, minus = ((hash_gradient(points, table + s * direction, SMALL, g) * up).sum() for s in (1e-3, -1e-3))
    assert torch.allclose((t.grad * direction).sum(), (plus - minus) / 2e-3)


def test_known_features_give_the_same_table_gradient():
    points, table, g, _ = problem(SMALL, 300)
    gradients = []
    for known in (None, hash_encode(points, table, SMALL)):
        t = table.clone().requires_grad_()
        (hash_encode(points, t, SMALL, known=known) * g).sum().backward()
        gradients.append(t.grad)
    assert torch.equal(*gradients)


def test_table_gradient_has_the_same_bytes_at_any_thread_count():
    points, table, g, up = problem(HashGridSpec(), 5000)
    x, (w1, b1, w2, b2) = g, (torch.randn(*s) for s in ((32, 32), (32,), (3, 32), (3,)))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        t, w = table.clone().requires_grad_(), w1.clone().requires_grad_()
        (hash_encode(points, t, HashGridSpec()) * g).sum().backward()
        (hash_gradient(points, t, HashGridSpec(), g) * up).sum().backward()
        mlp(x, w, b1, w2, b2).square().sum().backward()
        results.append((t.grad, w.grad))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_no_points_give_empty_features_and_a_zero_table_gradient():
    table = torch.randn(SMALL.rows, 2, requires_grad=True)
    encoded = hash_encode(torch.zeros(0, 3), table, SMALL)
    encoded.sum().backward()
    assert encoded.shape == (0, SMALL.width) and float(table.grad.abs().max()) == 0


def test_unknown_backend_and_wrong_shapes_say_what_was_wanted():
    points, table, *_ = problem(SMALL, 3)
    with pytest.raises(ValueError, match="numba"):
        hash_encode(points, table, SMALL, backend="nambu")
    with pytest.raises(ValueError, match=r"points: wanted shape \[\*, 3\], got \[3, 2\]"):
        hash_encode(points[:, :2], table, SMALL)
    with pytest.raises(ValueError, match="table: wanted shape"):
        hash_encode(points, table[:-1], SMALL)
    with pytest.raises(ValueError, match="finest"):
        HashGridSpec(base=16, finest=8)


def perceptron(n: int, dtype, inputs: int = 7, hidden: int = 10, outputs: int = 3):
    g = torch.Generator().manual_seed(5)
    shapes = ((n, inputs), (hidden, inputs), (hidden,), (outputs, hidden), (outputs,))
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def test_perceptron_in_numba_is_its_twin_in_values_and_gradients():
    for sizes in ((7, 10, 3), (32, 32, 1)):  # the first is padded to multiples of four
        results = []
        for backend in ("torch", "numba"):
            arguments = perceptron(333, torch.float32, *sizes)
            out, slope = mlp_with_slope(*arguments, backend=backend)
            plain = mlp(*arguments, backend=backend)
            assert torch.allclose(out, plain, atol=1e-6)
            (out.square().sum() + (slope * arguments[0].detach().cos()).sum() + plain.sin().sum()).backward()
            results.append([out, slope, *(a.grad for a in arguments)])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.detach().abs().max()))


def test_perceptron_slope_is_the_derivative_of_its_first_output():
    x, *weights = perceptron(5, torch.float64)
    out, slope = mlp_with_slope(x, *weights)
    (expected,) = torch.autograd.grad(out[:, 0].sum(), x)
    assert torch.allclose(slope, expected)
    assert torch.autograd.gradcheck(lambda *a: mlp_with_slope(*a), (x, *weights))


def test_density_op_is_its_parts_in_values_and_gradients():
    points, table, g, up = problem(SMALL, 400)
    _, *weights = perceptron(1, torch.float32, SMALL.width, 16, 1)
    raw_gradient = torch.randn(400, generator=torch.Generator().manual_seed(8))
    for use in ((1, 1, 1), (0, 1, 1), (0, 0, 1), (0, 1, 0)):  # which outputs a loss looks at
        results = []
        for backend, known in (("torch", None), ("numba", None), ("numba", hash_encode(points, table, SMALL))):
            t, w = table.clone().requires_grad_(), [v.detach().clone().requires_grad_() for v in weights]
            outputs = hash_density(points, t, SMALL, tuple(w), known=known, backend=backend)
            loss = sum((o * f).sum() for o, f, on in zip(outputs, (g, raw_gradient, up), use, strict=True) if on)
            gradients = torch.autograd.grad(loss, (t, *w), allow_unused=True)
            results.append([*outputs, *(torch.zeros(()) if v is None else v for v in gradients)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=2e-5 * max(float(a.detach().abs().max()), 1.0))
