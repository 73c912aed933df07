"""What is Warp's own of the field kernels: sums in fixed point, launches, streams, and PTX compiled without a GPU.

Their agreement with the twins is in test_kernels_fields.py, together with numba's.
"""

import re
import subprocess
import sys

import pytest
import torch

from stages.kernels.density import hash_density
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode, hash_gradient
from stages.kernels.mlp import mlp
from stages.kernels.volume import Samples, composite, march

wp = pytest.importorskip("warp", reason="warp-lang is not installed (extra: cuda)")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = HashGridSpec(levels=5, log2_table=8, base=3, finest=40)  # two dense levels, three hashed
every_device = pytest.mark.parametrize("device", DEVICES)


class Draw:
    """Random tensors whose memory takes turns at the layouts that an op may meet."""

    def __init__(self, seed: int, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.turn = device, seed

    def __call__(self, *shape: int, uniform: bool = False) -> torch.Tensor:
        """Normal (or uniform in [0, 1)) values."""
        make = torch.rand if uniform else torch.randn
        return self.lay(make(*shape, generator=self.generator).to(self.device))

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


def packed(draw: Draw, rays: int) -> tuple[torch.Tensor, Samples]:
    """Densities, and samples of rays some of which have none."""
    counts = torch.randint(-3, 9, (rays,), generator=draw.generator).clamp(min=0)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    n = int(offsets[-1])
    t, delta = draw(n, uniform=True) + 1, 0.02 + 0.1 * draw(n, uniform=True)
    return 5 * draw(n, uniform=True), Samples(t, delta, offsets.to(draw.device))


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
    from stages.kernels.cuda import volume as cuda_volume
    from stages.kernels.cuda.launch import launch

    def arguments(**changes):
        expected = {"values": torch.ones(4, 2), "weights": torch.ones(4), "offsets": torch.tensor([0, 4])}
        return (*(expected | changes).values(), torch.zeros(1, 2))

    launch(cuda_volume._blend, (1, 2), arguments())
    for name, wrong, why in (
        ("weights", torch.ones(4, dtype=torch.float64), "float64"),
        ("values", torch.ones(4), "wanted 2 dimensions"),
        ("offsets", torch.zeros(2, dtype=torch.int64, device="meta"), "wanted a tensor on cpu"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{why}"):
            launch(cuda_volume._blend, (1, 2), arguments(**{name: wrong}))


@pytest.mark.slow
def test_importing_the_public_ops_does_not_import_warp():
    ops = "density, hashgrid, lattice, marching, mlp, raster, volume"
    code = f"import sys; from stages.kernels import {ops}; assert 'warp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def ptx_kernels(path) -> dict[str, str]:
    """Text of each kernel of a PTX file, by the name of its Python function."""
    text = path.read_text(encoding="utf-8", errors="replace")
    entries = re.findall(r"\.entry (?:\w+__locals__)?(\w+?)_[0-9a-f]{8}_cuda_kernel_forward(.*?\n}\n)", text, re.DOTALL)
    return dict(entries)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hashgrid", "mlp", "volume", "normals"])
def test_kernels_compile_to_ptx_for_sm_80_and_sm_90_without_a_gpu(name, tmp_path):
    from stages.kernels.cuda import hashgrid as cuda_hashgrid
    from stages.kernels.cuda import mlp as cuda_mlp
    from stages.kernels.cuda import normals as cuda_normals
    from stages.kernels.cuda import volume as cuda_volume

    module, expected, fused = {
        "hashgrid": (
            cuda_hashgrid._encode.module,
            {"_encode", "_gradient", "_directional", "_scale", "_scatter", "_to_float"},
            {"_scale"},  # powers and logarithms are built of them
        ),
        "mlp": (cuda_mlp.kernels(32, 4).module, {"forward", "backward"}, {"forward", "backward"}),
        "volume": (
            cuda_volume._march.module,
            {"_march", "_weights", "_blend", "_composite_backward", "_cull"},
            {"_weights", "_composite_backward", "_cull"},  # so is the exponential
        ),
        "normals": (cuda_normals._forward.module, {"_forward", "_backward"}, set()),
    }[name]
    paths = wp.compile_aot_module(module, arch=[80, 90], use_ptx=True, module_dir=tmp_path)
    assert len(paths) == 2
    for arch, path in zip((80, 90), paths, strict=True):
        assert f".target sm_{arch}" in path.read_text(encoding="utf-8", errors="replace")
        kernels = ptx_kernels(path)
        assert set(kernels) == expected
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
    """march and cull wait once each, for the number of samples; nothing else of a step does."""
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
        actual = hash_encode(points, scaled, SMALL, backend="warp")
    stream.synchronize()
    assert torch.allclose(actual, 2 * hash_encode(points, table, SMALL, backend="warp"), atol=1e-5)
