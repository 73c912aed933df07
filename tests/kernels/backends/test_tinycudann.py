"""The tinycudann adaptor: its mapping against a stand-in, and the package itself where it is."""

import pytest
import torch

from stages.kernels.adaptors import tinycudann as adaptor_tinycudann
from stages.kernels.density import hash_density
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode, hash_gradient
from stages.kernels.mlp import mlp, mlp_with_slope
from tests.kernels.backends.adaptor_cases import assert_close, real, stand_ins

SMALL = HashGridSpec(levels=5, log2_table=8, base=3, finest=40)  # two dense levels of 64 and 216 rows, three hashed


@pytest.fixture
def fake(monkeypatch):
    """fake(name): the backend of a stand-in in a package's place."""
    yield from stand_ins(monkeypatch)


def grid_problem(spec, n=400, seed=0, device="cpu"):
    """Points away from cell walls (kinks), where the two ways of rounding a position may fall on two sides of one."""
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(4 * n, 3, generator=g)
    for resolution in spec.resolutions:
        share = points * resolution % 1
        points = points[((share > 2e-3) & (share < 1 - 2e-3)).all(1)]
    points = points[:n]
    table = torch.randn(spec.rows, spec.features, generator=g)
    g_out, up = torch.randn(len(points), spec.width, generator=g), torch.randn(len(points), 3, generator=g)
    return [v.to(device) for v in (points, table, g_out, up)]


def grid_results(points, table, g_out, up, spec, backend):
    """Encoding, its gradient by position, and every derivative of both."""
    p, t, h = (v.clone().requires_grad_() for v in (points, table, g_out))
    encoded = hash_encode(p, t, spec, backend=backend)
    first = torch.autograd.grad((encoded * g_out).sum(), (p, t))
    slope = hash_gradient(p, t, spec, h, backend=backend)
    second = torch.autograd.grad((slope * up).sum(), (t, h))
    return [encoded, slope, *first, *second]


def test_tinycudann_grid_is_ours_in_values_and_derivatives(fake):
    for spec in (SMALL, HashGridSpec(levels=4, features=4, log2_table=10, base=5, finest=300)):
        arguments = grid_problem(spec)
        assert len(arguments[0]) > 50
        with fake("tinycudann"):
            actual = grid_results(*arguments, spec, "auto")
        assert_close(actual, grid_results(*arguments, spec, "torch"), 2e-4)


def test_tinycudann_grid_ends_at_the_walls_as_ours_does(fake):
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 1, 0.3], [1, 0.7, 0]])
    points = torch.cat([corners, torch.tensor([[-0.4, 0.31, 1.6], [0.31, 3e38, 0.62]])])
    table = torch.randn(SMALL.rows, 2, generator=torch.Generator().manual_seed(1))
    up = torch.ones(len(points), SMALL.width)
    with fake("tinycudann"):
        actual = grid_results(points, table, up, points[:, :3], SMALL, "auto")
    expected = grid_results(points, table, up, points[:, :3], SMALL, "torch")
    assert float(actual[2][1].abs().min()) > 0  # a point on the far wall has a slope
    assert float(actual[2][4, 0]) == 0 == float(actual[2][5, 1])  # one outside has none
    assert_close(actual[:3], expected[:3], 2e-4)


def test_tinycudann_grid_makes_nan_of_a_point_that_is_not_finite(fake):
    points, table, g_out, up = grid_problem(SMALL, 20)
    points[3, 1], points[5, 0], points[7] = float("nan"), float("inf"), float("-inf")
    with fake("tinycudann"):
        actual = grid_results(points, table, g_out, up, SMALL, "auto")
    for values in actual[:2]:
        assert values.isnan().all(1).nonzero()[:, 0].tolist() == [3, 5, 7]
        assert values.isfinite().all(1).sum() == 17


@pytest.mark.parametrize("cells", [1, 2, 3, 5, 16, 40, 255, 256, 257, 1000, 4095, 65535, 65536])
def test_a_shifted_position_never_leaves_its_cells(cells):
    tiny = torch.finfo(torch.float32).tiny
    x = torch.cat([torch.tensor([0.0, tiny, 1e-7, 1 - 2**-24, 1.0]), torch.rand(200)])
    p = (adaptor_tinycudann._local(x[:, None].expand(-1, 3), cells).double() * cells + 0.5).float()  # its fma
    assert float(p.min()) >= 0 and float(p.max()) < cells
    assert float((p[:, 0].double() - x.double() * cells).abs().max()) <= 2e-7 * cells


def test_a_table_goes_to_tinycudann_row_by_row_with_padding_after_dense_levels():
    spec = HashGridSpec(levels=3, log2_table=8, base=2, finest=8)  # 27, 125 and 256 rows
    table = torch.arange(spec.rows * 2, dtype=torch.float32).reshape(-1, 2)
    rows = adaptor_tinycudann._packed(table, spec).reshape(-1, 2)
    assert len(rows) == 32 + 128 + 256
    assert torch.equal(rows[:27], table[:27]) and not rows[27:32].any()
    assert torch.equal(rows[32:157], table[27:152]) and not rows[157:160].any()
    assert torch.equal(rows[160:], table[152:])


def test_tinycudann_refuses_other_feature_counts_and_another_layout(fake, monkeypatch):
    spec = HashGridSpec(levels=2, features=3, log2_table=8, base=3, finest=8)
    with fake("tinycudann"):
        with pytest.raises(ValueError, match="1, 2, 4 or 8 features"):
            hash_encode(torch.rand(2, 3), torch.zeros(spec.rows, 3), spec)
        monkeypatch.setattr(adaptor_tinycudann, "ROWS", 4)
        with pytest.raises(ValueError, match="another version's layout"):
            odd = HashGridSpec(levels=2, log2_table=8, base=2, finest=8)
            hash_encode(torch.rand(2, 3), torch.zeros(odd.rows, 2), odd)


def test_tinycudann_is_not_asked_about_no_points(fake):
    table, g = torch.randn(SMALL.rows, 2, requires_grad=True), torch.zeros(0, SMALL.width, requires_grad=True)
    w = [torch.randn(*shape, requires_grad=True) for shape in ((16, 7), (16,), (3, 16), (3,))]
    with fake("tinycudann"):
        encoded, slope = hash_encode(torch.zeros(0, 3), table, SMALL), hash_gradient(torch.zeros(0, 3), table, SMALL, g)
        out = mlp(torch.zeros(0, 7), *w)
        (encoded.sum() + slope.sum() + out.sum()).backward()
    assert encoded.shape == (0, SMALL.width) and slope.shape == (0, 3) and out.shape == (0, 3)
    assert not table.grad.any() and g.grad.shape == g.shape and not any(v.grad.any() for v in w)


def test_without_gradients_tinycudann_gives_the_same_and_keeps_no_graph(fake):
    points, table, g, _ = grid_problem(SMALL, 50)
    table.requires_grad_()
    with fake("tinycudann"), torch.no_grad():
        slope = hash_gradient(points, table, SMALL, g)
    assert not slope.requires_grad
    assert_close([slope], [hash_gradient(points, table.detach(), SMALL, g, backend="torch")], 2e-4)


def perceptron(n, inputs, hidden, outputs, device="cpu"):
    g = torch.Generator().manual_seed(5)
    shapes = ((n, inputs), (hidden, inputs), (hidden,), (outputs, hidden), (outputs,))
    return [torch.randn(*s, generator=g).to(device).requires_grad_() for s in shapes]


def perceptron_results(arguments, backend, loss_scale=1.0):
    out = mlp(*arguments, backend=backend)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.device)
    gradients = torch.autograd.grad((out * up).mean() * loss_scale, arguments)
    return [out, *(g / loss_scale for g in gradients)]


def assert_half(actual, expected):
    """Equal but for the rounding of half precision, which also switches a few hidden units that are almost zero."""
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a - b).detach().norm()) < 5e-2 * float(b.detach().norm())


@pytest.mark.parametrize("sizes", [(7, 10, 3), (32, 32, 1), (16, 64, 4), (5, 130, 17)])
def test_tinycudann_perceptron_is_ours_to_half_precision(sizes, fake):
    arguments = perceptron(300, *sizes)
    with fake("tinycudann"):
        actual = perceptron_results(arguments, "auto")
    assert_half(actual, perceptron_results(arguments, "torch"))


@pytest.mark.parametrize("loss_scale", [1e-9, 1e-3, 1e6])
def test_gradients_beyond_the_range_of_half_precision_come_through(loss_scale, fake):
    arguments = perceptron(3000, 32, 32, 1)
    with fake("tinycudann"):
        actual = perceptron_results(arguments, "auto", loss_scale)
    assert_half(actual, perceptron_results(arguments, "torch"))


def test_a_zero_gradient_stays_zero(fake):
    arguments = perceptron(20, 7, 10, 3)
    with fake("tinycudann"):
        (mlp(*arguments) * 0).sum().backward()
    assert all(v.grad is not None and not v.grad.any() for v in arguments)


def test_what_tinycudann_has_not_goes_by_device(fake):
    points, table, *_ = grid_problem(SMALL, 100)
    _, *weights = (v.detach() for v in perceptron(1, SMALL.width, 16, 1))
    with fake("tinycudann"):
        x = torch.randn(9, SMALL.width)
        numba = mlp_with_slope(x, *weights, backend="numba")
        assert all(torch.equal(a, b) for a, b in zip(mlp_with_slope(x, *weights), numba, strict=True))
        actual = hash_density(points, table, SMALL, tuple(weights))
    assert_close(actual, hash_density(points, table, SMALL, tuple(weights), backend="torch"), 2e-4)


@pytest.mark.cuda
def test_the_real_tinycudann_grid_is_ours():
    real("tinycudann")
    for spec in (SMALL, HashGridSpec(), HashGridSpec(levels=4, features=4, log2_table=12, base=5, finest=300)):
        arguments = grid_problem(spec, 5000, device="cuda")
        actual = grid_results(*arguments, spec, "tinycudann")
        assert_close(actual, grid_results(*arguments, spec, "torch"), 5e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", [(7, 10, 3), (32, 32, 1), (32, 64, 4), (5, 130, 17)])
def test_the_real_tinycudann_perceptron_is_ours_to_half_precision(sizes):
    real("tinycudann")
    for loss_scale in (1e-9, 1.0):
        arguments = perceptron(5000, *sizes, device="cuda")
        actual = perceptron_results(arguments, "tinycudann", loss_scale)
        assert_half(actual, perceptron_results(arguments, "torch"))
