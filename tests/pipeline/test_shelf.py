"""Priors that outlive a stage or a run: loaded once, and each run has the bytes that it has with priors of its own."""

import pytest
from rich.console import Console
from safetensors.torch import load_file

from pipeline.config.model import load_config
from pipeline.priors.source import Kept
from pipeline.runs.caller import Caller
from pipeline.runs.progress import Progress
from pipeline.runs.run import start_run
from stages.guidance.diffusion import prior as diffusion

SETTINGS = {"stages": "coarse", "coarse.steps": 9, "checkpoint_every": 2, "coarse.views_per_step": 1}


class Enough(Exception):
    """Raised after the second step, whose checkpoint is compared."""


class Remembering:
    """Stands for a prior: remembers what it embedded."""

    def __init__(self, texts):
        self.embedded = [texts]

    def embed_anew(self, texts):
        self.embedded.append(texts)


@pytest.fixture
def loads(monkeypatch):
    """The folders of the priors that are loaded."""
    folders, load = [], diffusion.load_prior

    def counted(folder, *args, **kwargs):
        folders.append(folder.name)
        return load(folder, *args, **kwargs)

    monkeypatch.setattr(diffusion, "load_prior", counted)
    return folders


def two_steps(folder, prompt, kept):
    def on_step(stage, step, metrics):
        if step == 2:
            raise Enough

    config = load_config(None, SETTINGS, {"prompt": prompt, "device": "cpu"})
    with pytest.raises(Enough):
        start_run(config, folder, Progress(Console(quiet=True)), None, Caller(on_step=on_step, kept=kept))
    return load_file(folder / "coarse" / "checkpoint.safetensors"), (folder / "config.yaml").read_text()


def test_a_prior_is_kept_for_the_same_key_alone():
    loaded = []

    def load():
        loaded.append(Remembering([]))
        return loaded[-1]

    kept = Kept()
    first = kept.take("a", [], load)
    assert kept.take("a", [], load) is first and kept.take("b", [], load) is not first and len(loaded) == 2
    assert kept.take("a", [], load) is loaded[2] and kept.take(None, [], load) is loaded[3]
    assert kept.take(None, [], load) is loaded[4]


def test_of_several_priors_the_one_not_used_for_longest_goes_before_another_is_loaded():
    kept = Kept(2)
    alive = []

    def load(name):
        def call():
            alive.append(sorted(kept._priors))
            return Remembering(name)

        return call

    a, b = kept.take("a", [], load("a")), kept.take("b", [], load("b"))
    assert kept.take("a", [], load("a")) is a and kept.take("b", [], load("b")) is b
    assert kept.take("a", [], load("a")) is a
    kept.take("c", [], load("c"))
    assert alive == [[], ["a"], ["a"]]
    assert kept.take("a", [], load("a")) is a and kept.take("b", [], load("b")) is not b
    kept.drop()
    assert kept.take("a", [], load("a")) is not a


def test_only_other_texts_are_embedded_anew_and_what_cannot_be_is_kept_no_longer():
    kept = Kept()
    prior = kept.take("a", ["a mug"], lambda: Remembering(["a mug"]))
    for texts in (["a mug"], ["a cat", "a mug"], ["a cat", "a mug"], ["a mug"]):
        assert kept.take("a", list(texts), pytest.fail) is prior
    assert prior.embedded == [["a mug"], ["a cat", "a mug"], ["a mug"]]

    def refuse(texts):
        raise ValueError("too long")

    prior.embed_anew = refuse
    with pytest.raises(ValueError, match="too long"):
        kept.take("a", ["a long one"], pytest.fail)
    assert kept.take("a", ["a mug"], lambda: Remembering(["a mug"])) is not prior


@pytest.mark.slow
def test_a_prior_is_loaded_once_and_a_later_run_has_the_bytes_of_one_with_its_own(tmp_path, loads):
    alone, settings = two_steps(tmp_path / "alone", "a blue cat on a red table", None)
    loads.clear()
    kept = Kept()
    two_steps(tmp_path / "first", "a red mug", kept)
    second, same = two_steps(tmp_path / "second", "a blue cat on a red table", kept)
    assert loads == ["pixel"]
    assert settings == same
    assert alone.keys() == second.keys()
    different = [name for name in alone if not alone[name].equal(second[name])]
    assert different == []
