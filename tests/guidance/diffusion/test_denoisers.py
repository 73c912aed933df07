"""The denoiser's calls recorded and replayed: the same numbers from buffers that stay, and never over what changed."""

import pytest
import torch

from stages.guidance.diffusion import denoisers
from stages.guidance.diffusion.denoisers import StaticCalls
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from tests import tiny_families, tiny_folders


def in_place(run):
    """What a CUDA graph does: it computes from the buffers of its recording into the result of its recording."""
    result = run()

    def replay():
        result.copy_(run())

    return replay, result


def test_a_replayed_call_gives_each_inputs_own_value_in_a_tensor_of_its_own():
    calls = []

    def function(a, pair, *, added):
        calls.append(len(a))
        return a * 2 + pair[0] - pair[1] + added

    static = StaticCalls(function, in_place)
    one, two = torch.ones(3), torch.full((3,), 5.0)
    first = static(one, (two, one), added=two)
    second = static(two, (one, one), added=one)
    assert first.tolist() == [11.0] * 3 and second.tolist() == [11.0] * 3 and first is not second
    assert static(two, (two, one), added=one).tolist() == [15.0] * 3 and second.tolist() == [11.0] * 3
    static(torch.ones(2), (torch.ones(2), torch.ones(2)), added=torch.ones(2))
    assert len(static._recorded) == 2  # one a shape


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("priors")
    return {"sd": tiny_folders.stable_diffusion(root / "sd"), "sdxl": tiny_families.sdxl(root / "sdxl")}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_recorded_denoiser_predicts_the_same_and_copies_nothing_from_the_host_again(folders, name, monkeypatch):
    prior = load_prior(folders[name], "cpu")
    denoiser = prior.denoiser
    embedding = prior.embed(["a mug", "a cat"])
    inputs = [torch.randn(2, prior.channels, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    t = torch.tensor([100, 700])
    plain = [prior.predict_noise(z, t, embedding) for z in inputs]
    denoiser.fast = StaticCalls(denoiser._plain, in_place)
    assert torch.equal(prior.predict_noise(inputs[0], t, embedding), plain[0])
    made = []
    monkeypatch.setattr(denoisers.torch, "tensor", lambda *args, **kwargs: made.append(args))
    assert torch.equal(prior.predict_noise(inputs[1], t, embedding), plain[1]) and made == []


def test_a_network_that_hooks_change_or_that_is_trained_is_called_itself(folders):
    prior = load_prior(folders["sd"], "cpu")
    z, t, embedding = torch.randn(1, 4, 8, 8), torch.tensor([300]), prior.embed(["a mug"])

    def refuse(*inputs, **conditions):
        raise AssertionError("the recording was asked")

    plain = prior.predict_noise(z, t, embedding)
    prior.denoiser.fast = refuse
    with pytest.raises(AssertionError, match="recording"):
        prior.predict_noise(z, t, embedding)
    assert torch.equal(prior.noise(prior.unet, z, t, embedding), plain)  # with gradients
    hook = prior.unet.conv_in.register_forward_hook(lambda module, inputs, output: output + 1)
    changed = prior.predict_noise(z, t, embedding)
    hook.remove()
    assert not torch.equal(changed, plain)


def test_the_compiler_is_given_the_network_and_a_graph_needs_cuda(folders, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: given.append((network, dynamic)) or network)
    prior = load_prior(folders["sd"], "cpu", settings=DiffusionSettings(compile="inductor"))
    assert given == [(prior.unet, False)]
    z, t, embedding = torch.randn(1, 4, 8, 8), torch.tensor([300]), prior.embed(["a mug"])
    fast = prior.predict_noise(z, t, embedding)
    prior.denoiser.fast = None
    assert torch.equal(prior.predict_noise(z, t, embedding), fast)
    assert load_prior(folders["sd"], "cpu", settings=DiffusionSettings(compile="graph")).denoiser.fast is None


def test_convolutions_are_channels_last_where_asked_for_and_not_on_the_cpu_by_itself(folders):
    def last(**settings):
        weight = load_prior(folders["sd"], "cpu", settings=DiffusionSettings(**settings)).unet.conv_in.weight
        return weight.is_contiguous(memory_format=torch.channels_last)

    assert last(channels_last=True) and not last() and not last(channels_last=False)
