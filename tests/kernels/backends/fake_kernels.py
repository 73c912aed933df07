"""Stand-ins for tinycudann, nvdiffrast and kaolin in their documented conventions, made of our torch twins.

They differ from our ops as the packages do: rows from the bottom, grids with vertices between the walls, parameters in
one vector with padding, half precision, positive insides. What the packages refuse, they refuse.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor, nn

from stages.kernels.reference import antialias as reference_antialias
from stages.kernels.reference import marching as reference_marching
from stages.kernels.reference import raster as twin

PRIMES = (1, 2654435761, 805459861)


def _module(name: str, **members) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def _contiguous(*tensors: Tensor) -> None:
    assert all(t.is_contiguous() for t in tensors), "wants contiguous tensors"


class _Once(torch.autograd.Function):
    """A derivative that has none itself, and that wants its gradient contiguous."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        _contiguous(grad)
        return grad


class _Times(torch.autograd.Function):
    """The identity; its gradient is multiplied, in its own precision."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class _Grid(nn.Module):
    """Its "Grid" of type "Hash": DOCUMENTATION.md and the paper's appendix A."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        assert (config["otype"], config["type"], config["hash"]) == ("Grid", "Hash", "CoherentPrime")
        assert config["n_features_per_level"] in (1, 2, 4, 8)
        self.features, self.levels = config["n_features_per_level"], []
        growth, offset = config["per_level_scale"], 0
        for level in range(config["n_levels"]):
            scale = growth**level * config["base_resolution"] - 1
            side = math.ceil(scale) + 1
            rows = min(-(-(side**3) // 8) * 8, 1 << config["log2_hashmap_size"])
            self.levels.append((scale, side, offset, rows))
            offset += rows
        self.params = nn.Parameter(torch.full((offset * self.features,), float("nan")))

    def encode(self, x: Tensor, params: Tensor) -> Tensor:
        table, columns = params.reshape(-1, self.features), []
        for scale, side, offset, rows in self.levels:
            p = (x.double() * scale + 0.5).float()  # fma
            cell = p.detach().floor()
            share = p - cell
            bits = torch.tensor([[c & 1, c >> 1 & 1, c >> 2] for c in range(8)])
            at = ((cell.long()[:, None] + bits) & 0xFFFFFFFF).unbind(-1)  # uint32
            if side**3 <= rows:
                index = at[0] + at[1] * side + at[2] * side * side
            else:
                index = (at[0] * PRIMES[0]) ^ (at[1] * PRIMES[1]) ^ (at[2] * PRIMES[2])
            index = (index & 0xFFFFFFFF) % rows
            weights = torch.where(bits.bool(), share[:, None], 1 - share[:, None]).prod(-1)
            columns.append((weights[..., None] * table[offset + index]).sum(1))
        return torch.cat(columns, 1)


class Encoding(nn.Module):
    """tinycudann.Encoding: one grid, or a "Composite" of grids on slices of the input, without a second derivative."""

    def __init__(self, n_input_dims: int, encoding_config: dict, seed: int = 1337, dtype=None) -> None:
        super().__init__()
        assert dtype == torch.float32, "the default is half precision"
        composite = encoding_config["otype"] == "Composite"
        nested = encoding_config["nested"] if composite else [encoding_config]
        assert n_input_dims == 3 * len(nested) and all(c.get("n_dims_to_encode", 3) == 3 for c in nested)
        grids = [_Grid(config) for config in nested]
        self._grids, self._composite = tuple(grids), composite  # a tuple: only `params` is a parameter of ours
        self.params = nn.Parameter(torch.cat([grid.params.detach() for grid in grids]))

    def forward(self, x: Tensor) -> Tensor:
        assert len(x), "wants at least one point"
        _contiguous(self.params)
        parts = self.params.split([len(grid.params) for grid in self._grids])
        slices = x.split(3, 1)
        out = torch.cat([g.encode(s, p) for g, s, p in zip(self._grids, slices, parts, strict=True)], 1)
        return _Once.apply(out) if self._composite else out


class Network(nn.Module):
    """tinycudann.Network of one hidden layer: no biases, half precision, inputs padded by ones, gradients times 128."""

    def __init__(self, n_input_dims: int, n_output_dims: int, network_config: dict, seed: int = 1337) -> None:
        super().__init__()
        width = network_config["n_neurons"]
        assert network_config["n_hidden_layers"] == 1 and network_config["activation"] == "ReLU"
        assert width in (16, 32, 64, 128) if network_config["otype"] == "FullyFusedMLP" else width % 16 == 0
        self.shapes = ((width, -(-n_input_dims // 16) * 16), (-(-n_output_dims // 16) * 16, width))
        self.outputs = n_output_dims
        self.params = nn.Parameter(torch.full((sum(a * b for a, b in self.shapes),), float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        assert len(x), "wants at least one point"
        x, params = _Times.apply(x, 1 / 128), _Times.apply(self.params.half(), 1 / 128).float()
        first, second = (
            part.reshape(shape)
            for part, shape in zip(params.split([a * b for a, b in self.shapes]), self.shapes, strict=True)
        )
        wide = nn.functional.pad(x, (0, first.shape[1] - x.shape[1]), value=1.0)
        hidden = (wide.half().float() @ first.T).half().float().relu()
        out = (hidden @ second.T).half()
        return _Once.apply(_Times.apply(out, 128.0)[:, : self.outputs])


def tinycudann() -> dict[str, ModuleType]:
    return {"tinycudann": _module("tinycudann", Encoding=Encoding, Network=Network)}


class RasterizeCudaContext:
    opened = 0

    def __init__(self, device=None) -> None:
        type(self).opened += 1


def rasterize(glctx, pos, tri, resolution, ranges=None, grad_db=True):
    """Rows from the bottom: y = -1 is before row 0."""
    assert isinstance(glctx, RasterizeCudaContext) and ranges is None and len(tri) and pos.shape[0] and pos.shape[1]
    _contiguous(pos, tri)
    rast = twin.rasterise(pos, tri, *resolution).flip(1)
    return rast, torch.zeros_like(rast)


def interpolate(attr, rast, tri, rast_db=None, diff_attrs=None):
    _contiguous(attr, rast, tri)
    assert attr.numel() and len(tri) and attr.shape[0] in (1, rast.shape[0])
    return twin.interpolate(attr, rast, tri), rast.new_zeros(*rast.shape[:3], 0)


def antialias(color, rast, pos, tri, topology_hash=None, pos_gradient_boost=1.0):
    _contiguous(color, rast, pos, tri)
    assert color.numel() and len(tri)
    topology = reference_antialias.edge_topology(tri, pos.shape[1])
    return reference_antialias.antialias(color.flip(1), rast.flip(1), pos, tri, topology).flip(1)


def texture(tex, uv, uv_da=None, mip_level_bias=None, mip=None, filter_mode="auto", boundary_mode="wrap", **_):
    """v = 0 before the first row."""
    _contiguous(tex, uv)
    assert (filter_mode, boundary_mode) == ("linear", "clamp") and tex.shape[0] == 1 and uv.ndim == 4 and uv.numel()
    return twin.texture(tex[0], torch.stack([uv[..., 0], 1 - uv[..., 1]], -1))


def nvdiffrast() -> dict[str, ModuleType]:
    members = (RasterizeCudaContext, rasterize, interpolate, antialias, texture)
    inner = _module("nvdiffrast.torch", **{member.__name__: member for member in members})
    return {"nvdiffrast": _module("nvdiffrast", torch=inner), "nvdiffrast.torch": inner}


def marching_tetrahedra(vertices, tets, sdf, return_tet_idx=False):
    """One list entry a batch item; faces point to where sdf > 0, and the tetrahedra with one triangle come first."""
    assert tets.dtype == torch.int64
    meshes = [_marching(v, tets, s) for v, s in zip(vertices, sdf, strict=True)]
    return [list(part) for part in zip(*meshes, strict=True)][: 3 if return_tet_idx else 2]


def _marching(vertices, tets, sdf):
    ends = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    edges, of_tet = torch.unique(tets[:, ends].reshape(-1, 2).sort(1).values, dim=0, return_inverse=True)
    signed = torch.where(sdf > 0, 1.0, -1.0)
    _, faces, chosen = reference_marching.march(
        vertices.detach(), signed, edges.int(), tets.int(), of_tet.reshape(-1, 6).int(), 1.0
    )
    a, b = edges[chosen.long()].unbind(1)
    points = (vertices[a] * sdf[b, None] - vertices[b] * sdf[a, None]) / (sdf[b] - sdf[a])[:, None]
    positive = (sdf > 0)[tets].sum(1)
    count = torch.where((positive == 0) | (positive == 4), 0, torch.where(positive == 2, 2, 1))
    owner = torch.arange(len(tets)).repeat_interleave(count)
    order = torch.cat([(count[owner] == inside).nonzero()[:, 0] for inside in (1, 2)])
    return points, faces.long()[order], owner[order]


def kaolin() -> dict[str, ModuleType]:
    inner = _module("kaolin.ops.conversions", marching_tetrahedra=marching_tetrahedra)
    return {
        "kaolin": _module("kaolin"),
        "kaolin.ops": _module("kaolin.ops", conversions=inner),
        "kaolin.ops.conversions": inner,
    }
