"""The shared optimiser step: rates by group, skipped gradients, state that carries on where it was."""

import math

import pytest
import torch
from torch.nn import Parameter

from stages.errors import UserError
from stages.optimise import GroupedAdam


def two_groups(patience=3):
    a, b = Parameter(torch.tensor([3.0, 4.0])), Parameter(torch.tensor([1.0]))
    options = {"betas": (0.9, 0.99), "eps": 1e-15, "patience": patience, "stage": "test", "advice": "do better"}
    return GroupedAdam([{"a": a}, {"b": b}], **options), a, b


def test_every_group_moves_by_its_own_rate_and_the_norm_is_that_of_all_gradients():
    adam, a, b = two_groups()
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert adam.step((0.1, 0.01), 0) == pytest.approx(5.0)
    assert a.tolist() == pytest.approx([2.9, 4.0])  # Adam's first step has the length of its rate
    assert b.tolist() == pytest.approx([0.99])
    assert a.grad is None and b.grad is None
    assert adam.step((0.1, 0.01), 1) == 0.0  # no gradients, no move
    assert a.tolist() == pytest.approx([2.9, 4.0])


def test_gradients_that_are_not_finite_are_skipped_until_patience_ends():
    adam, a, b = two_groups()
    before = a.detach().clone()
    for bad in (math.nan, math.inf):
        a.grad = torch.tensor([bad, 1.0])
        assert adam.step((0.1, 0.1), 4) == -1.0
    assert torch.equal(a, before) and adam.skipped == 2
    b.grad = torch.ones(1)
    adam.step((0.1, 0.1), 5)
    assert adam.skipped == 0
    for k in range(2):
        a.grad = torch.tensor([math.nan, 1.0])
        adam.step((0.1, 0.1), 6 + k)
    a.grad = torch.tensor([math.nan, 1.0])
    with pytest.raises(UserError, match="The test stage diverged") as error:
        adam.step((0.1, 0.1), 8)
    assert "3 steps in a row, last at step 8" in error.value.why and error.value.fix == "do better"


def test_a_loaded_state_goes_on_to_the_same_bytes():
    def walk(adam, a, b, steps):
        for k in steps:
            a.grad, b.grad = a.detach() * (k + 1), b.detach() - k
            adam.step((0.1, 0.02), k)

    whole, *leaves = two_groups()
    walk(whole, *leaves, range(6))
    first, a, b = two_groups()
    walk(first, a, b, range(3))
    state = {k: v.clone() for k, v in first.state_dict().items()}
    assert {"skipped", "adam.a.step", "adam.a.exp_avg", "adam.b.exp_avg_sq"} <= state.keys()
    again, c, d = two_groups()
    with torch.no_grad():
        c.copy_(a)
        d.copy_(b)
    again.load_state_dict(state | {"something": torch.zeros(1)})
    walk(again, c, d, range(3, 6))
    assert torch.equal(c, leaves[0]) and torch.equal(d, leaves[1])


def test_moments_can_be_exchanged():
    adam, a, b = two_groups()
    assert list(adam.moments(a, b)) == []
    a.grad = torch.ones(2)
    adam.step((0.1, 0.1), 0)
    slots = list(adam.moments(a, b))  # b has had no gradient yet
    assert [key for _, key in slots] == ["exp_avg", "exp_avg_sq"]
    for state, key in slots:
        state[key] = torch.zeros(2)
    assert not adam.state_dict()["adam.a.exp_avg"].any()
