"""The two geometries of the fine stage: what each returns, moves, refuses and saves."""

import numpy as np
import pytest
import torch

from stages.errors import UserError
from stages.geometry import DMTetGeometry, LockedGeometry
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.mesh.tets.dmtet import DMTet, from_function
from stages.mesh.tets.tetrahedra import Lattice
from stages.optimise import GroupedAdam
from stages.ramp import Ramp, constant
from tests.mesh.mesh_shapes import sphere

CPU = torch.device("cpu")


def ball(radius: float = 0.5, **changes) -> DMTetGeometry:
    values = {"lr_sdf": constant(0.01), "lr_offset": Ramp(0.02, 0.01), "spread": constant(0.0), "keep": 0.05}
    values |= {"normal_consistency": 0.0, "laplacian": 0.0}
    return DMTetGeometry(from_function(Lattice(12), lambda p: p.norm(dim=-1) - radius), **(values | changes))


def locked(mesh: Mesh, source: Mesh | None = None) -> LockedGeometry:
    return LockedGeometry(torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces), CPU, source)


def leaf_of(geometry):
    surface = geometry.surface()
    return surface, surface.vertices.detach().requires_grad_(geometry.moves)


def test_each_group_of_a_dmtet_has_its_own_rate_and_locked_triangles_have_none():
    (sdf, rate), (offset, other) = ball().parameters()
    assert (list(sdf), list(offset)) == (["dmtet.sdf"], ["dmtet.offset"])
    assert (rate.at(1.0), other.at(1.0)) == (0.01, 0.01) and other.at(0.0) == 0.02
    assert locked(sphere()).parameters() == [] and not locked(sphere()).surface().vertices.requires_grad


def test_a_gradient_that_points_outwards_shrinks_the_ball():
    geometry = ball()
    adam = GroupedAdam(
        [group for group, _ in geometry.parameters()], betas=(0.9, 0.99), eps=1e-15, patience=3, stage="t", advice=""
    )
    before = geometry.surface().vertices.detach().norm(dim=1).mean()
    for _ in range(3):
        surface, leaf = leaf_of(geometry)
        geometry.backward(surface, leaf.detach() / leaf.detach().norm(dim=1, keepdim=True), 0.0)
        adam.step([rate.at(0.0) for _, rate in geometry.parameters()], 0)
        geometry.after_step(adam)
    assert geometry.surface().vertices.detach().norm(dim=1).mean() < before - 0.02


def test_a_step_that_saw_nothing_leaves_no_gradient():
    geometry = ball()
    surface, leaf = leaf_of(geometry)
    geometry.backward(surface, leaf.grad, 0.0)
    assert geometry.dmtet.sdf.grad is None and geometry.regularise(leaf, surface) == {}


def test_spread_reaches_vertices_that_the_gradient_does_not():
    reached = []
    for length in (0.0, 0.3):
        geometry = ball(spread=constant(length))
        surface, _ = leaf_of(geometry)
        gradient = torch.zeros_like(surface.vertices)
        gradient[0, 0] = 1.0
        geometry.backward(surface, gradient, 0.0)
        reached.append(int((geometry.dmtet.sdf.grad != 0).sum()))
    assert reached[1] > 10 * reached[0]


def test_regularise_collects_the_weighted_gradient_and_returns_the_terms():
    gradients = []
    for weight in (10.0, 20.0):
        geometry = ball(normal_consistency=weight, laplacian=weight)
        surface, leaf = leaf_of(geometry)
        terms = geometry.regularise(leaf, surface)
        assert terms["bend"] > 0 and terms["rough"] > 0
        gradients.append(leaf.grad)
    torch.testing.assert_close(2 * gradients[0], gradients[1])


def test_a_surface_that_bounds_nothing_is_refused():
    geometry = ball()
    geometry.surface = lambda: LockedGeometry(torch.eye(3), torch.tensor([[0, 1, 2]]), CPU).surface()
    with pytest.raises(UserError, match="broken surface"):
        geometry.mesh()


def test_a_locked_mesh_is_handed_on_as_its_source_or_as_its_triangles():
    view, source = sphere(), sphere(0.3)
    assert np.array_equal(locked(view).mesh().vertices, view.vertices)
    mesh = locked(view, source).mesh()
    assert mesh is not source and mesh.vertices is source.vertices  # its colours are to be set, the user's are not
    surface, leaf = leaf_of(locked(view))
    assert locked(view).regularise(leaf, surface) == {} and not leaf.requires_grad


def test_states_make_equal_geometries():
    geometry = ball()
    with torch.no_grad():
        geometry.dmtet.offset += 0.3
    state = geometry.state_dict()
    under = {key.removeprefix("dmtet."): value for key, value in state.items()}
    again = ball(0.4)
    again.dmtet = DMTet.from_state(Lattice(12), under)
    assert torch.equal(again.surface().vertices, geometry.surface().vertices) and measure(again.mesh()).solid
    stays = locked(sphere())
    copy = LockedGeometry.from_state(stays.state_dict() | {"step_index": torch.tensor(3)}, CPU)
    assert torch.equal(copy.surface().vertices, stays.surface().vertices)
    assert torch.equal(copy.surface().faces, stays.surface().faces)
