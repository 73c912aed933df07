"""The shape that the fine stage colours: a DMTet that moves with the gradient, or a mesh that stays as it is.

FineStage reaches both through one protocol, so its step does not ask which of them it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from stages.errors import UserError
from stages.fields.colour_fit import Sample
from stages.guidance.guide import Metric, metric
from stages.kernels.smoothness import smoothness
from stages.mesh.clean import drop_floaters
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.mesh.sample import asked_samples, painted_samples
from stages.mesh.tets.dmtet import DMTet, Surface
from stages.optimise import GroupedAdam
from stages.ramp import Ramp
from stages.stage import Asset


class Geometry(Protocol):
    """A surface and the part of an optimisation step that is its own."""

    moves: bool  # whether the shape is optimised, or its colour alone

    def surface(self) -> Surface:
        """Return the present surface, differentiable in the parameters."""

    def parameters(self) -> list[tuple[dict[str, Parameter], Ramp]]:
        """Return the parameters by name, in groups, each with its learning rate."""

    def regularise(self, leaf: Tensor, surface: Surface, strength: float = 1.0) -> dict[str, Metric]:
        """Add the gradient of the geometry's own terms to `leaf`, and return their values.

        Args:
            leaf: [V, 3] the surface's vertices, detached; their gradient is collected here.
            surface: as surface() returned it.
            strength: factor on the terms' weights, see GuidanceOutput.
        """

    def backward(self, surface: Surface, gradient: Tensor | None, share: float) -> None:
        """Carry a gradient at the vertices on to the parameters.

        Args:
            surface: as surface() returned it.
            gradient: [V, 3], or None where nothing was seen.
            share: of the stage done, in [0, 1].
        """

    def after_step(self, adam: GroupedAdam) -> None:
        """Restore what must hold of the parameters after `adam` changed them; its moments go with them."""

    def mesh(self) -> Mesh:
        """Return the finished mesh, without colours. Raises: UserError where it bounds no body."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what `from_state` makes an equal geometry of, as NAME.KEY."""


class DMTetGeometry:
    """The surface of a DMTet; its signed distances and offsets are optimised, each with a learning rate.

    Args:
        dmtet: the first surface.
        lr_sdf: learning rate of the signed distances, world units.
        lr_offset: learning rate of the offsets, in shares of their bound.
        spread: length over which a gradient moves the surface, world units.
        normal_consistency: weight of mean 1 - cos across edges.
        laplacian: weight of the mean squared umbrella vector, in edge lengths.
        keep: share of the largest part's area below which a part is dropped at the end.
    """

    moves = True

    def __init__(
        self,
        dmtet: DMTet,
        *,
        lr_sdf: Ramp,
        lr_offset: Ramp,
        spread: Ramp,
        normal_consistency: float,
        laplacian: float,
        keep: float,
    ) -> None:
        self.dmtet = dmtet
        self.lr_sdf, self.lr_offset, self.spread = lr_sdf, lr_offset, spread
        self.normal_consistency, self.laplacian, self.keep = normal_consistency, laplacian, keep

    def surface(self) -> Surface:
        """Return the zero level set. Raises: UserError where it is empty or not finite."""
        return self.dmtet.surface()

    def parameters(self) -> list[tuple[dict[str, Parameter], Ramp]]:
        """Return the signed distances and the offsets, a group each."""
        return [({"dmtet.sdf": self.dmtet.sdf}, self.lr_sdf), ({"dmtet.offset": self.dmtet.offset}, self.lr_offset)]

    def regularise(self, leaf: Tensor, surface: Surface, strength: float = 1.0) -> dict[str, Metric]:
        """Add the gradient of normal consistency and Laplacian; see Geometry."""
        if not self.normal_consistency and not self.laplacian:
            return {}
        bend, rough = smoothness(leaf, surface.faces, surface.edges, surface.sides)
        (strength * self.normal_consistency * bend + strength * self.laplacian * rough).backward()
        return {"bend": metric(bend), "rough": metric(rough)}

    def backward(self, surface: Surface, gradient: Tensor | None, share: float) -> None:
        """Carry the gradient to signed distances and offsets, and spread the former along the band; see Geometry."""
        if gradient is not None:
            surface.vertices.backward(gradient)
            self.dmtet.spread_gradient(self.spread.at(share))

    def after_step(self, adam: GroupedAdam) -> None:
        """Let the band follow the surface; Adam's moments go with their vertices."""
        slots = list(adam.moments(self.dmtet.sdf, self.dmtet.offset))
        moments = self.dmtet.step_done([state[key] for state, key in slots])
        if moments is not None:
            for (state, key), value in zip(slots, moments, strict=True):
                state[key] = value

    def mesh(self) -> Mesh:
        """Return the surface without floaters. Raises: UserError where it bounds no body."""
        mesh = drop_floaters(_as_mesh(self.surface()), self.keep)
        report = measure(mesh)
        if not report.solid:
            raise UserError(
                "The fine stage ended with a broken surface",
                f"{report.boundary_edges} open edges, {report.nonmanifold_edges} edges of more than two faces, "
                f"volume {report.volume:.2g}",
                "lower fine.lr_sdf, or raise fine.normal_consistency",
            )
        return mesh

    def state_dict(self) -> dict[str, Tensor]:
        """Return DMTet.state_dict as dmtet.KEY, for DMTet.from_state."""
        return {f"dmtet.{key}": value.clone() for key, value in self.dmtet.state_dict().items()}


class LockedGeometry:
    """Triangles that stay where they are: nothing of them is optimised.

    Args:
        vertices: [V, 3] world.
        faces: [F, 3].
        device: where they are rendered.
        source: the user's mesh that they show, which is handed on as it came; None hands on the triangles themselves.
    """

    moves = False

    def __init__(self, vertices: Tensor, faces: Tensor, device: torch.device, source: Mesh | None = None) -> None:
        none = torch.zeros(0, 2, dtype=torch.int32, device=device)  # no term asks for edges
        self._surface = Surface(vertices.detach().float().to(device), faces.int().to(device), none, none)
        self.source = source

    def surface(self) -> Surface:
        """Return the triangles."""
        return self._surface

    def parameters(self) -> list[tuple[dict[str, Parameter], Ramp]]:
        """Return no group."""
        return []

    def regularise(self, leaf: Tensor, surface: Surface, strength: float = 1.0) -> dict[str, Metric]:
        """Add nothing; see Geometry."""
        return {}

    def backward(self, surface: Surface, gradient: Tensor | None, share: float) -> None:
        """Drop the gradient; see Geometry."""

    def after_step(self, adam: GroupedAdam) -> None:
        """Do nothing; see Geometry."""

    def mesh(self) -> Mesh:
        """Return the user's triangles, seams and texture coordinates, or the triangles that were locked."""
        return _as_mesh(self._surface) if self.source is None else replace(self.source)

    def state_dict(self) -> dict[str, Tensor]:
        """Return locked.vertices and locked.faces."""
        return {"locked.vertices": self._surface.vertices.clone(), "locked.faces": self._surface.faces.clone()}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], device: torch.device, source: Mesh | None = None
    ) -> LockedGeometry:
        """Return the geometry of a state.

        Args:
            state: with the entries of state_dict; others are left alone.
            device: see LockedGeometry.
            source: see LockedGeometry.
        """
        return cls(state["locked.vertices"].clone(), state["locked.faces"].clone(), device, source)


def _as_mesh(surface: Surface) -> Mesh:
    return Mesh(surface.vertices.detach().cpu().numpy().copy(), surface.faces.cpu().numpy().copy())


def colours_to_learn(previous: Asset, geometry: Geometry, generator: torch.Generator) -> Sample | None:
    """Return places of a surface with the colours that a field has to learn before its first step; None for none.

    Those of a user's mesh, or of a draft whose field cannot be inherited.

    Args:
        previous: what the stage begins with.
        geometry: the surface that it begins with.
        generator: of the places.
    """
    if previous.density is None:
        if previous.mesh is None or previous.albedo is None:
            return None if previous.mesh is None else painted_samples(previous.mesh, generator)
        return asked_samples(previous.mesh, previous.albedo, generator)  # finer than the colours of its vertices
    if previous.field is not None or previous.albedo is None:
        return None
    surface = geometry.surface()
    vertices, faces = (t.detach().cpu().numpy() for t in (surface.vertices, surface.faces))
    return asked_samples(Mesh(vertices, faces.astype(np.int32)), previous.albedo, generator)
