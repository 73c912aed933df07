"""Volume renders of a tri-plane's field, by the toolkit's own renderer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.cameras import Views
from stages.render.shade import ALBEDO, Shading
from stages.render.volume import Sampling, VolumeImages, render_field
from stages.triplane.field import DENSITY, TriplaneField

CELLS = 32  # a side of the occupancy


@torch.no_grad()
def occupied(field: TriplaneField, device: torch.device, cells: int = CELLS) -> Tensor:
    """Return the cells [G, G, G] uint8 that the renderer has to look into: those of the surface and around it.

    What lies more than two cells deep is left out, since no light comes back from there.
    """
    axis = (torch.arange(2 * cells, device=device) + 0.5) / cells - 1
    density = field.density(torch.cartesian_prod(axis, axis, axis)).view(1, 1, 2 * cells, 2 * cells, 2 * cells)
    most = F.max_pool3d(density, 4, stride=2, padding=1)[0, 0]
    least = -F.max_pool3d(-density, 10, stride=2, padding=4)[0, 0]  # of the cell and two around it
    return ((most > 0.5) & (least < DENSITY / 2)).to(torch.uint8)


def draw(
    field: TriplaneField,
    views: Views,
    size: int,
    backdrop: Tensor,
    *,
    shading: Shading = ALBEDO,
    cells: Tensor | None = None,
) -> VolumeImages:
    """Return volume renders of a field, sampled as finely as its surfaces are thin.

    Args:
        views: B views on the field's device.
        size: pixels a side.
        backdrop: linear colour broadcastable to [B, size, size, 3].
        cells: of :func:`occupied`; None: found here.
    """
    device = field.planes.device
    cells = occupied(field, device) if cells is None else cells
    return render_field(
        field, backdrop, cells, views, size, size, shading=shading, sampling=Sampling(min(0.02, 2.5 / size))
    )
