"""Views: the conventions of the whole toolkit, camera and light sampling, rays and projection.

Conventions (tested in tests/render/test_cameras.py, relied on everywhere):
    World   right-handed, y up, the object's front towards +z, object inside the box [-1, 1]^3.
    Azimuth 0 deg puts the camera on +z (it sees the front), 90 deg on +x, 180 deg on -z. Elevation is up.
    Camera  looks along its own -z, x right, y up; `c2w` [B, 4, 4] maps camera to world.
    Clip    OpenGL: x right, y up, z in [-w, w], near = -w.
    Images  [B, H, W, C], row 0 at the top, pixel centres at half integers, linear colour.
    Rays    unit directions, so distance along the ray is metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

NEAR, FAR = 0.1, 100.0


class CameraSettings(BaseModel):
    """Distribution of training views; DreamFusion app. A.2 with wider distances, so no camera enters the box."""

    model_config = ConfigDict(extra="forbid")

    distance: tuple[float, float] = Field((2.8, 3.2), description="camera distance from the look-at point")
    fov_deg: tuple[float, float] = Field((34.0, 42.0), description="vertical field of view in degrees")
    elevation_deg: tuple[float, float] = Field((-10.0, 65.0), description="elevation range in degrees")
    area_uniform: float = Field(0.5, ge=0, le=1, description="probability of sampling elevation uniformly in area")
    elevation_beta: float | None = Field(
        None, gt=0, description="elevations low + (high - low) * Beta(1, this), so mostly low; none: uniform ones"
    )
    jitter_position: float = Field(0.05, ge=0, description="half width of the uniform position jitter, per axis")
    jitter_target: float = Field(0.03, ge=0, description="standard deviation of the look-at point, per axis")
    jitter_up: float = Field(0.01, ge=0, description="standard deviation added to the up vector, per axis")
    light_distance: tuple[float, float] = Field((1.5, 3.0), description="point light distance from the origin")
    light_spread: float = Field(0.6, ge=0, description="std of the light around the camera direction (paper: 1)")


_FIELDS = ("c2w", "fov_deg", "azimuth_deg", "elevation_deg", "light")


@dataclass(frozen=True)
class Views:
    """A batch of views. Angles in degrees; azimuth in [0, 360). On a device they remember their twins on the CPU."""

    c2w: Tensor  # [B, 4, 4]
    fov_deg: Tensor  # [B] vertical
    azimuth_deg: Tensor  # [B]
    elevation_deg: Tensor  # [B]
    light: Tensor  # [B, 3] world position of the point light
    twin: Views | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return self.c2w.shape[0]

    def __getitem__(self, index) -> Views:
        """A sub-batch; an int keeps the batch axis."""
        if isinstance(index, int):
            index = slice(index, index + 1)
        return self._each(lambda values: values[index])

    def repeat(self, times: int) -> Views:
        """Return the views as a whole, `times` over."""
        return self._each(lambda values: values.repeat(times, *[1] * (values.dim() - 1)))

    def to(self, device: torch.device | str) -> Views:
        """Return the views on a device, brought there in one copy."""
        device, here = torch.device(device), self.c2w.device
        if here.type != "cpu" or device.type == "cpu":
            if device.type == "cpu" and self.twin is not None:
                return self.twin
            return Views(*(getattr(self, name).to(device) for name in _FIELDS), self.twin)
        values = [getattr(self, name) for name in _FIELDS]
        packed = torch.cat([value.reshape(len(self), -1) for value in values], 1).to(device)
        parts = packed.split([value[0].numel() for value in values], 1)
        return Views(*(part.reshape(value.shape) for part, value in zip(parts, values, strict=True)), self)

    @property
    def on_host(self) -> Views:
        """The views on the CPU; nothing is copied where they came from there."""
        return self.to("cpu")

    def _each(self, change: Callable[[Tensor], Tensor]) -> Views:
        twin = None if self.twin is None else self.twin._each(change)
        return Views(*(change(getattr(self, name)) for name in _FIELDS), twin)

    def through(self, warp: Tensor) -> Views:
        """Return the views as an object sees them that `warp` [4, 4], an affine map, takes the world to.

        Its rays are those of the views, straight still; angles are left as they are named.
        """
        light = self.light @ warp[:3, :3].T.to(self.light) + warp[:3, 3].to(self.light)
        twin = None if self.twin is None else self.twin.through(warp)
        return Views(warp.to(self.c2w) @ self.c2w, self.fov_deg, self.azimuth_deg, self.elevation_deg, light, twin)

    @property
    def position(self) -> Tensor:
        """Camera centres [B, 3]."""
        return self.c2w[:, :3, 3]


def direction(azimuth_deg: Tensor, elevation_deg: Tensor) -> Tensor:
    """Return unit vectors [B, 3] from the origin towards the given azimuth and elevation."""
    az, el = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    return torch.stack([el.cos() * az.sin(), el.sin(), el.cos() * az.cos()], -1)


def look_at(position: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """Return camera-to-world matrices [B, 4, 4] of cameras at `position` [B, 3] looking at `target` [B, 3]."""
    back = torch.nn.functional.normalize(position - target, dim=-1)
    right = torch.nn.functional.normalize(torch.cross(up, back, dim=-1), dim=-1)
    true_up = torch.cross(back, right, dim=-1)
    c2w = torch.zeros(position.shape[0], 4, 4, dtype=position.dtype, device=position.device)
    c2w[:, :3] = torch.stack([right, true_up, back, position], -1)
    c2w[:, 3, 3] = 1
    return c2w


def orbit_views(
    azimuth_deg: Tensor | list[float],
    elevation_deg: Tensor | list[float] | float = 30.0,
    distance: float = 3.0,
    fov_deg: float = 36.0,
) -> Views:
    """Return fixed views around the origin, the light at the camera shifted up and to its right.

    Args:
        azimuth_deg: [B] degrees.
        elevation_deg: [B] or one value, below 90.
        distance: from the origin.
        fov_deg: vertical field of view.
    """
    azimuth = torch.as_tensor(azimuth_deg, dtype=torch.float32).reshape(-1) % 360
    elevation = torch.as_tensor(elevation_deg, dtype=torch.float32).expand(azimuth.shape).contiguous()
    position = distance * direction(azimuth, elevation)
    up = torch.tensor([0.0, 1.0, 0.0]).expand_as(position)
    c2w = look_at(position, torch.zeros_like(position), up)
    light = position + 0.8 * c2w[:, :3, 0] + 1.2 * c2w[:, :3, 1]
    return Views(c2w, torch.full_like(azimuth, fov_deg), azimuth, elevation, light)


def sample_views(settings: CameraSettings, batch: int, generator: torch.Generator) -> Views:
    """Return random training views: azimuth stratified over the batch, elevation mixed between angle- and area-uniform.

    Source: DreamFusion sec. 3.2.1 and app. A.2; the light is a normalised sample around the camera direction.
    Returns: `batch` views on the CPU, a function of the generator alone.
    """

    def uniform(low_high: tuple[float, float]) -> Tensor:
        low, high = low_high
        return low + (high - low) * torch.rand(batch, generator=generator)

    azimuth = (torch.rand(1, generator=generator) + torch.arange(batch)) / batch * 360
    angle = uniform(settings.elevation_deg)
    if settings.elevation_beta is not None:  # CLIP-Mesh: 5; by the inverse of Beta(1, b)'s distribution function
        least, most = settings.elevation_deg
        share = (angle - least) / max(most - least, 1e-6)
        angle = least + (most - least) * (1 - (1 - share).clamp(0, 1) ** (1 / settings.elevation_beta))
    low, high = (math.sin(math.radians(e)) for e in settings.elevation_deg)
    area = torch.rad2deg(torch.asin(uniform((low, high))))
    by_area = torch.rand(batch, generator=generator) < settings.area_uniform
    elevation = torch.where(by_area & (settings.elevation_beta is None), area, angle)
    distance, fov_deg = uniform(settings.distance), uniform(settings.fov_deg)

    position = distance[:, None] * direction(azimuth, elevation)
    position = position + settings.jitter_position * (2 * torch.rand(batch, 3, generator=generator) - 1)
    target = settings.jitter_target * torch.randn(batch, 3, generator=generator)
    up = torch.tensor([0.0, 1.0, 0.0]) + settings.jitter_up * torch.randn(batch, 3, generator=generator)
    towards = torch.nn.functional.normalize(position, dim=-1)
    towards = towards + settings.light_spread * torch.randn(batch, 3, generator=generator)
    light = uniform(settings.light_distance)[:, None] * torch.nn.functional.normalize(towards, dim=-1)
    return Views(look_at(position, target, up), fov_deg, azimuth, elevation, light)


def rays(views: Views, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the pixel-centre rays of every view.

    Returns: rays_o and unit rays_d, both [B, H, W, 3].
    """
    device = views.c2w.device
    y = 1 - 2 * (torch.arange(height, device=device) + 0.5) / height
    x = 2 * (torch.arange(width, device=device) + 0.5) / width - 1
    tan = torch.tan(torch.deg2rad(views.fov_deg) / 2)  # [B]
    dy = y[None, :, None] * tan[:, None, None]  # [B, H, 1]
    dx = x[None, None, :] * tan[:, None, None] * (width / height)  # [B, 1, W]
    shape = (len(views), height, width)
    local = torch.stack([dx.expand(shape), dy.expand(shape), -torch.ones(shape, device=device)], -1)
    rays_d = torch.einsum("bij,bhwj->bhwi", views.c2w[:, :3, :3], local)
    rays_d = torch.nn.functional.normalize(rays_d, dim=-1)
    return views.position[:, None, None].expand_as(rays_d), rays_d


def projection(fov_deg: Tensor, aspect: float = 1.0) -> Tensor:
    """Return OpenGL perspective matrices [B, 4, 4] for vertical fields of view [B] and aspect = width / height."""
    f = 1 / torch.tan(torch.deg2rad(fov_deg) / 2)
    p = torch.zeros(fov_deg.shape[0], 4, 4, dtype=fov_deg.dtype, device=fov_deg.device)
    p[:, 0, 0], p[:, 1, 1] = f / aspect, f
    p[:, 2, 2], p[:, 2, 3] = -(FAR + NEAR) / (FAR - NEAR), -2 * FAR * NEAR / (FAR - NEAR)
    p[:, 3, 2] = -1
    return p


def to_clip(vertices: Tensor, views: Views, aspect: float = 1.0) -> Tensor:
    """Return clip coordinates [B, V, 4] of world vertices [V, 3] in every view; differentiable in the vertices."""
    w2c = torch.linalg.inv_ex(views.c2w)[0]  # inv would wait for a GPU, to look whether it went well
    matrix = projection(views.fov_deg, aspect) @ w2c  # [B, 4, 4]
    homogeneous = torch.nn.functional.pad(vertices, (0, 1), value=1.0)  # [V, 4]
    return torch.einsum("bij,vj->bvi", matrix.to(vertices.dtype), homogeneous).contiguous()
