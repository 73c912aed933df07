"""The field kernels in Warp, on its CPU device and (marked `cuda`) on a GPU: against the torch twins at a hundred sizes
each, against float64 finite differences, and compiled to PTX without a GPU."""

import re
import subprocess
import sys

import pytest
import torch

from stages.kernels.density import hash_density
from stages.kernels.hashgrid import HashGridSpec, hash_encode, hash_gradient
from stages.kernels.mlp import mlp, mlp_with_slope
from stages.kernels.raster import vertex_normals
from stages.kernels.volume import Samples, composite, march, visible

wp = pytest.importorskip("warp", reason="warp-lang is not installed (extra: cuda)")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = HashGridSpec(levels=5, log2_table=8, base=3, finest=40)  # two dense levels, three hashed
SPECS = (SMALL, HashGridSpec(levels=1, log2_table=8, base=4, finest=4), HashGridSpec(levels=7, log2_table=10))
every_device = pytest.mark.parametrize("device", DEVICES)


def sizes(largest: int, count: int = 100) -> list[int]:
    """Empty, one, and random sizes."""
    drawn = torch.randint(2, largest, (count - 2,), generator=torch.Generator().manual_seed(largest))
    return [0, 1, *drawn.tolist()]


class Draw:
    """Random tensors whose memory takes turns at the layouts that an op may meet."""

    def __init__(self, seed: int, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.turn = device, seed

    def __call__(self, *shape: int, grid: float | None = None, uniform: bool = False) -> torch.Tensor:
        """Normal (or uniform in [0, 1)) values; with `grid` rounded to multiples of it."""
        make = torch.rand if uniform else torch.randn
        values = make(*shape, generator=self.generator)
        values = values if grid is None else (values / grid).round() * grid
        return self.lay(values.to(self.device))

    def lay(self, values: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        kind = self.turn % 4
        if kind == 1:  # stored last dimension first
            return values.movedim(-1, 0).contiguous().movedim(0, -1)
        if kind == 2:  # every second of twice as many
            return torch.stack([values, values - 1], 1)[:, 0]
        if kind == 3:  # not at the beginning of its memory, nor at a multiple of 8 bytes
            return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
        return values


def assert_close(fast, slow, message: str, tolerance: float = 2e-5) -> None:
    assert fast.shape == slow.shape and fast.dtype == slow.dtype and fast.device == slow.device, message
    if fast.numel():
        largest = max(float(slow.detach().abs().max()), 1e-3)
        wrong = float((fast - slow).detach().abs().max())
        assert wrong <= tolerance * largest, f"{message}: off by {wrong:.2e} where the largest is {largest:.2e}"


def compare(op, arguments, message: str, tolerance: float = 2e-5, skip: tuple[str, ...] = ()) -> None:
    """Outputs, and gradients in every argument of a random contraction of the outputs, Warp against torch."""
    found = []
    for backend in ("torch", "warp"):
        leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
        outputs = op(**leaves, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        factors = [torch.randn(o.shape, generator=generator).to(o.device) for o in outputs]
        loss = sum((o * f).sum() for o, f in zip(outputs, factors, strict=True))
        wanted = [v for name, v in leaves.items() if name not in skip]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        found.append((outputs, [torch.zeros(()) if g is None else g for g in gradients]))
    names = [name for name in arguments if name not in skip]
    for k, (slow, fast) in enumerate(zip(found[0][0], found[1][0], strict=True)):
        assert_close(fast, slow, f"{message}, output {k}", tolerance)
    for name, slow, fast in zip(names, found[0][1], found[1][1], strict=True):
        assert_close(fast, slow, f"{message}, gradient in {name}", tolerance)


@every_device
def test_hash_ops_in_warp_are_their_twins_at_a_hundred_sizes(device):
    for k, n in enumerate(sizes(100)):
        spec, draw = SPECS[k % len(SPECS)], Draw(k, device)
        points = draw(n, 3, uniform=True)
        if n > 2:
            points[0], points[1], points[2] = (points.new_tensor(v) for v in ([0, 1, 0], [-0.3, 0.5, 1], [0.2, 1.7, 2]))
        table, g = draw(spec.rows, 2), draw(n, spec.width)

        def encode(points, table, backend, spec=spec):
            return hash_encode(points, table, spec, backend=backend)

        def gradient(points, table, g, backend, spec=spec):
            return hash_gradient(points, table, spec, g, backend=backend)

        compare(encode, {"points": points, "table": table}, f"encode {n}")
        compare(gradient, {"points": points, "table": table, "g": g}, f"gradient {n}", skip=("points",))


@every_device
def test_known_features_and_a_broadcast_gradient_are_taken_as_they_are(device):
    draw = Draw(0, device)
    points, table = draw(300, 3, uniform=True), draw(SMALL.rows, 2)
    known = hash_encode(points, table, SMALL, backend="warp")
    gradients = []
    for kwargs in ({"backend": "warp"}, {"backend": "warp", "known": known}, {"backend": "torch"}):
        t = table.detach().requires_grad_()
        encoded = hash_encode(points, t, SMALL, **kwargs)
        encoded.sum().backward()  # upstream is one number, with strides of 0
        gradients.append(t.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert_close(gradients[0], gradients[2], "sum of features")


def away_from_kinks(points, table, w1, b1) -> torch.Tensor:
    """The points none of whose hidden units is within rounding of zero, where the slope jumps."""
    hidden = hash_encode(points.double(), table.double(), SMALL, backend="torch") @ w1.double().T + b1.double()
    return points[(hidden.abs() > 1e-4).all(-1)]


@every_device
def test_density_in_warp_is_its_twin_at_a_hundred_sizes(device):
    for k, n in enumerate(sizes(100)):
        draw = Draw(k, device)
        table, w1, b1 = draw(SMALL.rows, 2), draw(12, SMALL.width), draw(12)
        w2, b2 = draw(1, 12), draw(1)
        points = away_from_kinks(draw(n, 3, uniform=True), table, w1, b1)

        def op(table, w1, b1, w2, b2, backend, points=points):
            return hash_density(points, table, SMALL, (w1, b1, w2, b2), backend=backend)

        compare(op, {"table": table, "w1": w1, "b1": b1, "w2": w2, "b2": b2}, f"density {n}", 5e-5)


@every_device
def test_perceptron_in_warp_is_its_twin_at_a_hundred_sizes(device):
    """Inputs and first layer on a grid of eighths: hidden units come out exact, those that are 0 included."""
    for k, n in enumerate(sizes(200)):
        inputs, outputs = ((7, 3), (32, 1))[k % 2]
        draw, hidden = Draw(k, device), 1 + k % 40
        x, w1, b1 = draw(n, inputs, grid=0.125), draw(hidden, inputs, grid=0.125), draw(hidden, grid=0.125)
        arguments = {"x": x, "w1": w1, "b1": b1, "w2": draw(outputs, hidden), "b2": draw(outputs)}
        compare(mlp, arguments, f"mlp {n} {inputs}-{hidden}-{outputs}", 3e-5)
        compare(mlp_with_slope, arguments, f"mlp_with_slope {n} {inputs}-{hidden}-{outputs}", 3e-5)


@every_device
def test_perceptron_in_warp_sums_gradients_over_more_points_than_one_piece(device):
    draw = Draw(0, device)
    x, w1, b1 = draw(5000, 32, grid=0.125), draw(16, 32, grid=0.125), draw(16, grid=0.125)
    compare(mlp_with_slope, {"x": x, "w1": w1, "b1": b1, "w2": draw(1, 16), "b2": draw(1)}, "5000 points", 3e-5)


@every_device
def test_march_in_warp_is_its_twin_at_a_hundred_sizes(device):
    for k, rays in enumerate(sizes(60)):
        draw, cells = Draw(k, device), 1 + k % 17
        o = 3 * torch.nn.functional.normalize(draw(rays, 3), dim=-1)
        d = torch.nn.functional.normalize(0.7 * draw(rays, 3) - o, dim=-1)
        occupancy = (3 * draw(cells, cells, cells, uniform=True)).to(torch.uint8)
        occupancy = occupancy if k % 3 else occupancy > 0
        jitter, stride = draw(rays, uniform=True), 1 + k % 4
        slow, fast = (march(o, d, occupancy, 0.05, jitter, stride=stride, backend=b) for b in ("torch", "warp"))
        same = slow.counts == fast.counts  # a sample within float rounding of a cell wall may fall on either side
        assert (~same).sum() <= 0.01 * rays + (device == "cuda")
        for name in ("t", "delta"):
            assert_close(getattr(fast, name)[same[fast.rays]], getattr(slow, name)[same[slow.rays]], f"{name} {rays}")
        assert fast.ray_offsets.dtype == torch.int64 and int(fast.ray_offsets[-1]) == len(fast)


@every_device
def test_a_ray_without_direction_gets_no_samples_and_does_not_hang(device):
    o, d = torch.zeros(2, 3, device=device), torch.tensor([[0.0, 0, 0], [0, 0, 1]], device=device)
    full = torch.ones(4, 4, 4, dtype=torch.uint8, device=device)
    assert march(o, d, full, 0.1, torch.full((2,), 0.5, device=device), backend="warp").counts.tolist() == [0, 10]


def packed(draw: Draw, rays: int) -> tuple[torch.Tensor, Samples]:
    """Densities, and samples of rays some of which have none."""
    counts = torch.randint(-3, 9, (rays,), generator=draw.generator).clamp(min=0)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    n = int(offsets[-1])
    t, delta = draw(n, uniform=True) + 1, 0.02 + 0.1 * draw(n, uniform=True)
    return 5 * draw(n, uniform=True), Samples(t, delta, offsets.to(draw.device))


@every_device
def test_composite_and_visible_in_warp_are_their_twins_at_a_hundred_sizes(device):
    for k, rays in enumerate(sizes(60)):
        draw = Draw(k, device)
        sigmas, samples = packed(draw, rays)
        values = draw(len(samples), k % 6)

        def op(sigmas, values, backend, samples=samples):
            return composite(sigmas, values, samples, backend=backend)

        compare(op, {"sigmas": sigmas, "values": values}, f"composite {rays}")
        index, kept = visible(20 * sigmas, samples, 1e-2, 0.05, backend="warp")
        wanted, kept_wanted = visible(20 * sigmas, samples, 1e-2, 0.05, backend="torch")
        assert torch.equal(index, wanted) and torch.equal(kept.ray_offsets, kept_wanted.ray_offsets), f"visible {rays}"


@every_device
def test_each_output_of_composite_sends_back_its_own_gradient(device):
    sigmas, samples = packed(Draw(3, device), 20)
    values = torch.rand(len(samples), 3, device=device)
    for chosen in range(4):
        gradients = []
        for backend in ("torch", "warp"):
            s = sigmas.detach().requires_grad_()
            composite(s, values, samples, backend=backend)[chosen].square().sum().backward()
            gradients.append(s.grad)
        assert_close(*reversed(gradients), f"output {chosen}")


@every_device
def test_vertex_normals_in_warp_are_their_twin_at_a_hundred_sizes(device):
    for k, faces in enumerate(sizes(80)):
        draw, vertices = Draw(k, device), 3 + k % 30
        corners = torch.randint(0, max(vertices - 1, 1), (faces, 3), generator=draw.generator)  # the last is in no face
        triangles = draw.lay(corners.to(torch.int32).to(device))

        def op(vertices, backend, triangles=triangles):
            return vertex_normals(vertices, triangles, backend=backend)

        compare(op, {"vertices": draw(vertices, 3)}, f"normals {faces}", 1e-4)


def test_gradients_in_warp_are_float64_finite_differences():
    draw, step = Draw(0, "cpu"), 1e-6
    points, table = draw(12, 3, uniform=True), draw(SMALL.rows, 2)
    g, up = draw(12, SMALL.width), draw(12, 3)
    away = torch.ones(12, dtype=torch.bool)  # the encoding has kinks at cell walls
    for resolution in SMALL.resolutions:
        fraction = points * resolution % 1
        away &= ((fraction > 1e-3) & (fraction < 1 - 1e-3)).all(-1)
    assert away.sum() > 6
    exact = (points.double(), table.double())
    numeric = [
        sum(s * (hash_encode(exact[0] + s * d, exact[1], SMALL) * g).sum(-1) for s in (1, -1)) / (2 * step)
        for d in step * torch.eye(3, dtype=torch.float64)
    ]
    found = hash_gradient(points, table, SMALL, g, backend="warp")
    assert_close(found[away], torch.stack(numeric, -1).float()[away], "gradient by the points")
    t, direction = table.clone().requires_grad_(), draw(SMALL.rows, 2).double()
    (hash_gradient(points, t, SMALL, g, backend="warp") * up).sum().backward()
    ends = [(hash_gradient(exact[0], exact[1] + s * direction, SMALL, g.double()) * up).sum() for s in (1e-3, -1e-3)]
    assert float((t.grad * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-3, rel=1e-4)
    sigmas, samples = packed(draw, 6)
    s, along = sigmas.clone().requires_grad_(), draw(len(samples)).double()
    (composite(s, samples.t[:, None], samples, backend="warp")[0][:, 0].cos()).sum().backward()
    doubled = Samples(samples.t.double(), samples.delta.double(), samples.ray_offsets)
    ends = [composite(sigmas + e * along, doubled.t[:, None], doubled)[0].cos().sum() for e in (1e-5, -1e-5)]
    assert float((s.grad * along).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4)


@every_device
def test_no_product_is_fused_with_the_subtraction_of_the_cell(device):
    """With one, features at 8192 cells a side would be off by up to 4e-4 of the table's values."""
    spec = HashGridSpec(levels=2, log2_table=12, base=4096, finest=8192)
    draw = Draw(0, device)
    points, table = draw(4000, 3, uniform=True), draw(spec.rows, 2).clamp(-1, 1)
    slow, fast = (hash_encode(points, table, spec, backend=backend) for backend in ("torch", "warp"))
    assert float((slow - fast).abs().max()) < 1e-6


@every_device
def test_table_gradient_has_the_same_bytes_in_any_order_of_the_points(device):
    draw = Draw(0, device)
    points, g, up = draw(3000, 3, uniform=True), draw(3000, SMALL.width), draw(3000, 3)
    gradients = []
    for order in (torch.arange(3000), torch.randperm(3000, generator=draw.generator)):
        table = torch.zeros(SMALL.rows, 2, device=device, requires_grad=True)
        p, h, u = (v[order.to(device)] for v in (points, g, up))
        encoded = (hash_encode(p, table, SMALL, backend="warp") * h).sum()
        (encoded + (hash_gradient(p, table, SMALL, h, backend="warp") * u).sum()).backward()
        gradients.append(table.grad)
    assert torch.equal(*gradients) and float(gradients[0].abs().max()) > 100


@every_device
@pytest.mark.parametrize("size", [2.0**-60, 2.0**60])
def test_table_gradient_keeps_its_precision_at_any_magnitude(device, size):
    draw, spec = Draw(0, device), HashGridSpec(levels=4, log2_table=14, base=8, finest=200)
    points, g = draw(500, 3, uniform=True), draw(500, spec.width)
    g[::2] *= 1e-4  # beside terms ten thousand times larger

    def gradient(points, upstream):
        table = torch.zeros(spec.rows, 2, device=device, requires_grad=True)
        (hash_encode(points, table, spec, backend="warp") * upstream).sum().backward()
        return table.grad

    together = gradient(points, g)
    assert torch.equal(together, gradient(points, size * g) / size)
    small, large = gradient(points[::2], g[::2]), gradient(points[1::2], g[1::2])
    untouched = (large == 0) & (small != 0)  # by the large terms
    assert untouched.sum() > 1000 and torch.allclose(together[untouched], small[untouched], rtol=1e-6)


@every_device
def test_what_is_not_finite_stays_visible(device):
    points, table = torch.rand(9, 3, device=device), torch.randn(SMALL.rows, 2, device=device)
    points[4, 1] = float("nan")
    encoded = hash_encode(points, table, SMALL, backend="warp")
    assert encoded[4].isnan().all() and encoded[:4].isfinite().all() and encoded[5:].isfinite().all()
    for bad in (float("nan"), float("inf")):
        t, g = table.clone().requires_grad_(), torch.ones(9, SMALL.width, device=device)
        g[2, 3] = bad
        (hash_encode(points.nan_to_num(0.5), t, SMALL, backend="warp") * g).sum().backward()
        assert t.grad.isnan().any()
    x, w1, b1 = torch.randn(5, 7, device=device), torch.randn(6, 7, device=device), torch.zeros(6, device=device)
    x[3, 2] = float("nan")
    out = mlp(x, w1, b1, torch.randn(3, 6, device=device), torch.zeros(3, device=device), backend="warp")
    assert out[3].isnan().all() and out[:3].isfinite().all()


@every_device
def test_other_dtypes_and_sizes_are_refused_by_name(device):
    table = torch.zeros(SMALL.rows, 2, device=device)
    for dtype in (torch.float16, torch.float64):
        points = torch.zeros(4, 3, dtype=dtype, device=device)
        with pytest.raises(ValueError, match=f"'warp' takes float32 .* got {str(dtype)[6:]}"):
            hash_encode(points, table.to(dtype), SMALL, backend="warp")
        with pytest.raises(ValueError, match="'warp' takes float32"):
            mlp(*(torch.zeros(s, dtype=dtype, device=device) for s in ((4, 7), (5, 7), 5, (3, 5), 3)), backend="warp")
        with pytest.raises(ValueError, match="'warp' takes float32"):
            march(points, points, torch.ones(2, 2, 2, device=device), 0.1, points[:, 0], backend="warp")
    wide = HashGridSpec(levels=2, features=4, log2_table=6, base=3, finest=5)
    points = torch.zeros(4, 3, device=device)
    with pytest.raises(ValueError, match="'warp' is written for 2 features a level, got 4"):
        hash_encode(points, torch.zeros(wide.rows, 4, device=device), wide, backend="warp")
    for inputs, outputs in ((129, 3), (7, 17), (0, 1)):
        shapes = ((4, inputs), (5, inputs), (5,), (outputs, 5), (outputs,))
        with pytest.raises(ValueError, match=f"128 inputs and 16 outputs, got {inputs} and {outputs}"):
            mlp(*(torch.zeros(s, device=device) for s in shapes), backend="warp")


def test_a_launch_refuses_by_name_what_its_kernel_would_misread():
    from stages.kernels import cuda_volume
    from stages.kernels.cuda_launch import launch

    def arguments(**changes):
        wanted = {"values": torch.ones(4, 2), "weights": torch.ones(4), "offsets": torch.tensor([0, 4])}
        return (*(wanted | changes).values(), torch.zeros(1, 2))

    launch(cuda_volume._blend, (1, 2), arguments())
    for name, wrong, why in (
        ("weights", torch.ones(4, dtype=torch.float64), "float64"),
        ("values", torch.ones(4), "wanted 2 dimensions"),
        ("offsets", torch.zeros(2, dtype=torch.int64, device="meta"), "wanted a tensor on cpu"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{why}"):
            launch(cuda_volume._blend, (1, 2), arguments(**{name: wrong}))


def test_importing_the_public_ops_does_not_import_warp():
    ops = "density, hashgrid, lattice, marching, mlp, raster, volume"
    code = f"import sys; from stages.kernels import {ops}; assert 'warp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def ptx_kernels(path) -> dict[str, str]:
    """Text of each kernel of a PTX file, by the name of its Python function."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"\.entry (?:\w+__locals__)?(\w+?)_[0-9a-f]{8}_cuda_kernel_forward(.*?\n}\n)", text, re.DOTALL)
    return dict(found)


@pytest.mark.parametrize("name", ["hashgrid", "mlp", "volume", "normals"])
def test_kernels_compile_to_ptx_for_sm_80_and_sm_90_without_a_gpu(name, tmp_path):
    from stages.kernels import cuda_hashgrid, cuda_mlp, cuda_normals, cuda_volume

    module, wanted, fused = {
        "hashgrid": (
            cuda_hashgrid._encode.module,
            {"_encode", "_gradient", "_directional", "_scale", "_scatter", "_to_float"},
            {"_scale"},  # powers and logarithms are built of them
        ),
        "mlp": (cuda_mlp.kernels(32, 4).module, {"forward", "backward"}, {"forward", "backward"}),
        "volume": (
            cuda_volume._march.module,
            {"_march", "_weights", "_blend", "_composite_backward", "_visible"},
            {"_weights", "_composite_backward", "_visible"},  # so is the exponential
        ),
        "normals": (cuda_normals._forward.module, {"_forward", "_backward"}, set()),
    }[name]
    paths = wp.compile_aot_module(module, arch=[80, 90], use_ptx=True, module_dir=tmp_path)
    assert len(paths) == 2
    for arch, path in zip((80, 90), paths, strict=True):
        assert f".target sm_{arch}" in path.read_text(encoding="utf-8", errors="replace")
        kernels = ptx_kernels(path)
        assert set(kernels) == wanted
        for kernel, text in kernels.items():
            assert ".local" not in text, f"{kernel} keeps vectors in memory instead of registers"
            assert ("fma.rn.f32" in text) == (kernel in fused and kernel != "_scale"), kernel
        if name == "hashgrid":
            assert kernels["_encode"].count("ld.global.u64") == 8, "a row is one read"
            assert not re.search(r"(atom|red)\.\S*f32", kernels["_scatter"])
        if name == "mlp":
            assert kernels["forward"].count("ld.global.nc.v4.f32") == 32 // 4 + 1


@pytest.mark.cuda
def test_a_step_does_not_wait_for_the_device():
    """March and visible wait once each, for the number of samples; nothing else of a step does."""
    draw = Draw(0, "cuda")
    spec = HashGridSpec(log2_table=12)
    sigmas, samples = packed(draw, 50)
    points = torch.rand(len(samples), 3, device="cuda")
    head = [torch.randn(*s, device="cuda") for s in ((32, 32), (32,), (1, 32), (1,))]
    table = torch.randn(spec.rows, 2, device="cuda")

    def step():
        leaves = [v.detach().requires_grad_() for v in (table, *head)]
        features, raw, gradient = hash_density(points, leaves[0], spec, tuple(leaves[1:]), backend="warp")
        plain = mlp(hash_encode(points, leaves[0], spec, backend="warp"), *leaves[1:], backend="warp")
        values = torch.cat([gradient, plain, features[:, :2]], 1)
        out = composite(raw.exp() + sigmas, values, samples, backend="warp")
        sum(o.square().sum() for o in out).backward()
        return leaves[0].grad

    first = step()  # compiles, and copies the levels to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


@pytest.mark.cuda
def test_kernels_run_on_torchs_current_stream():
    points, table = torch.rand(1 << 18, 3, device="cuda"), torch.randn(SMALL.rows, 2, device="cuda")
    hash_encode(points, table, SMALL, backend="warp")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        scaled = 2 * table  # late on this stream, so a kernel on another would read old memory
        found = hash_encode(points, scaled, SMALL, backend="warp")
    stream.synchronize()
    assert torch.allclose(found, 2 * hash_encode(points, table, SMALL, backend="warp"), atol=1e-5)
