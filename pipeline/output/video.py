"""A turntable of the finished mesh: animated WebP or GIF with what is required, MP4 with the `video` extra.

The pictures show the exported texture, shaded by a lamp that goes round with the camera, on a plain background.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.output.files import write_whole
from pipeline.output.surface import srgb_bytes, textured
from stages.cameras import Views, orbit_views, to_clip
from stages.errors import UserError
from stages.kernels.raster import interpolate, rasterise, texture, vertex_normals
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.clean import check_mesh
from stages.mesh.mesh import Mesh
from stages.render.shade import LAMBERT, Shading, shade

BACKGROUND = 0.8  # linear grey
GREY = 0.5  # linear colour of a mesh that has none
FRAMES_PER_S = 18
FOV_DEG = 30.0


def _base_colours(mesh: Mesh, albedo: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of rast [1, H, W, 4], covered pixels [N] and their points [N, 3] to linear colours [N, 3]."""
    if albedo is not None:
        return lambda rast, covered, points: albedo(points)
    faces = torch.from_numpy(mesh.faces).int()
    if textured(mesh):
        picture = srgb_to_linear(torch.from_numpy(mesh.texture).float() / 255)
        uv, uv_faces = torch.from_numpy(mesh.uv), torch.from_numpy(mesh.uv_faces).int()

        def look_up(rast: Tensor, covered: Tensor, points: Tensor) -> Tensor:
            return texture(picture, interpolate(uv, rast, uv_faces).flatten(0, 2)[covered])

        return look_up
    if mesh.colours is None:
        return lambda rast, covered, points: torch.full_like(points, GREY)
    colours = torch.from_numpy(mesh.colours)
    return lambda rast, covered, points: interpolate(colours, rast, faces).flatten(0, 2)[covered]


@torch.no_grad()
def render_frames(
    mesh: Mesh,
    views: Views,
    size: int,
    *,
    albedo: Callable[[Tensor], Tensor] | None = None,
    shading: Shading = LAMBERT,
    background: float = BACKGROUND,
    supersample: int = 2,
) -> Iterator[np.ndarray]:
    """Render a mesh with its texture (or vertex colours, or grey), one view at a time.

    Args:
        mesh: with faces.
        views: B views.
        size: pixels a side.
        albedo: linear colour at world points, instead of the mesh's own.
        background: linear grey.
        supersample: samples a pixel along each side.
    Yields: B pictures [size, size, 3] uint8 sRGB.
    """
    check_mesh(mesh)
    vertices, faces = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces).int()
    if mesh.normals is None:
        normals = vertex_normals(vertices, faces)
    else:  # of a user's mesh, whose faces may wind either way
        normals = torch.from_numpy(np.ascontiguousarray(mesh.normals)).float()
    attributes = torch.cat([vertices, normals], -1)
    base_colours = _base_colours(mesh, albedo)
    fine = size * supersample
    for i in range(len(views)):
        view = views[i]
        rast = rasterise(to_clip(vertices, view), faces, fine, fine)
        covered = (rast[..., 3] > 0).reshape(-1).nonzero()[:, 0]  # [N]
        image = torch.full((fine * fine, 3), background)
        if len(covered):
            planes = interpolate(attributes, rast, faces).flatten(0, 2)[covered]
            points, normals = planes[:, :3], torch.nn.functional.normalize(planes[:, 3:], dim=-1)
            image[covered] = shade(base_colours(rast, covered, points), normals, points, view.light, shading)
        yield srgb_bytes(image.view(size, supersample, size, supersample, 3).mean((1, 3)).numpy())


def turntable(
    mesh: Mesh,
    path: str | Path,
    *,
    frames: int = 36,
    size: int = 384,
    elevation_deg: float = 20.0,
    albedo: Callable[[Tensor], Tensor] | None = None,
) -> Path:
    """Write one turn around the mesh, front first; the suffix chooses the format: .webp, .gif or .mp4.

    Args:
        mesh: about the origin, of any size.
        frames: pictures in a turn.
        size: pixels a side (even for .mp4).
        albedo: linear colour at world points, instead of the mesh's own texture.
    Raises: UserError for an unknown suffix, a missing encoder, a damaged mesh or a failed write.
    """
    path = Path(path)
    writers = {".webp": _write_animation, ".gif": _write_animation, ".mp4": _write_mp4}
    if path.suffix.lower() not in writers:
        raise UserError(f"Cannot write {path.name}", "the suffix names no video format", "use .webp, .gif or .mp4")
    mesh, radius = _fitted(mesh)
    field = None if albedo is None else lambda points: albedo(points * radius)
    views = _orbit(torch.arange(frames) * (360 / frames), elevation_deg)
    return writers[path.suffix.lower()](render_frames(mesh, views, size, albedo=field), path)


def portrait(mesh: Mesh, size: int = 384, azimuth_deg: float = 20.0, elevation_deg: float = 20.0) -> np.ndarray:
    """Render one picture of the turn, uint8 sRGB [size, size, 3].

    Args:
        mesh: about the origin, of any size.
        size: pixels a side.
        azimuth_deg, elevation_deg: of the camera.
    """
    (picture,) = render_frames(_fitted(mesh)[0], _orbit([azimuth_deg], elevation_deg), size)
    return picture


def _fitted(mesh: Mesh) -> tuple[Mesh, float]:
    """The mesh scaled to the unit sphere, so that the whole turn fits the picture at any size, and its radius."""
    check_mesh(mesh)
    radius = float(np.linalg.norm(mesh.vertices[np.unique(mesh.faces)], axis=1).max())
    return replace(mesh, vertices=(mesh.vertices / radius).astype(np.float32)), radius


def _orbit(azimuth_deg: Tensor | list[float], elevation_deg: float) -> Views:
    """Cameras that see the unit sphere with a margin of 5 %."""
    return orbit_views(azimuth_deg, elevation_deg, 1.05 / math.sin(math.radians(FOV_DEG / 2)), FOV_DEG)


def _write_animation(pictures: Iterator[np.ndarray], path: Path) -> Path:
    from PIL import Image, features

    kind = path.suffix.lower()[1:].upper()
    if kind == "WEBP" and not features.check("webp"):
        raise UserError(f"Cannot write {path.name}", "this Pillow was built without WebP", "write a .gif instead")
    images = [Image.fromarray(picture) for picture in pictures]
    if kind == "GIF":
        # One palette for all frames, or colours flicker.
        palette = Image.fromarray(np.concatenate([np.asarray(im) for im in images[:: max(len(images) // 6, 1)]]))
        palette = palette.quantize(256)
        images = [image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
    options = {"quality": 85, "method": 4} if kind == "WEBP" else {"disposal": 1}
    buffer = io.BytesIO()
    duration = round(1000 / FRAMES_PER_S / 10) * 10  # GIF counts in hundredths of a second
    images[0].save(buffer, format=kind, save_all=True, append_images=images[1:], duration=duration, loop=0, **options)
    return write_whole(path, buffer.getvalue())


def _write_mp4(pictures: Iterator[np.ndarray], path: Path) -> Path:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        fix = "pip install 'text3d-pipeline[video]', or write a .webp"
        raise UserError(f"Cannot write {path.name}", f"imageio-ffmpeg is missing ({error})", fix) from None
    with tempfile.TemporaryDirectory(prefix="turntable-") as folder:
        target = os.path.join(folder, "turntable.mp4")
        writer = None
        try:
            for picture in pictures:
                if writer is None:
                    writer = imageio_ffmpeg.write_frames(
                        target, picture.shape[1::-1], fps=FRAMES_PER_S, codec="libx264", quality=7, macro_block_size=2,
                        output_params=["-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact"],
                    )  # fmt: skip
                    writer.send(None)
                writer.send(np.ascontiguousarray(picture))
        except (OSError, RuntimeError) as error:  # the latter where the package is there and its ffmpeg is not
            reason = (str(error).strip().splitlines() or ["ffmpeg stopped"])[-1]
            raise UserError(f"Cannot write {path.name}", reason, "set export.mp4=false; a .webp shows it too") from None
        finally:
            if writer is not None:
                writer.close()
        return write_whole(path, Path(target).read_bytes())
