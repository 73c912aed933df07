"""The table of prior sources: an entry is all that a source needs to be set, checked, run, resumed and found."""

from __future__ import annotations

import pytest
import torch

import pipeline.doctor as doctor
from pipeline import UserError, cli, generate, load_config, load_prior
from pipeline.config.model import Config, config_model, read_config
from pipeline.priors.source import Facts, Offer, PriorSource, check_guidance
from pipeline.priors.sources import SOURCES, check_priors, parse_source
from stages.guidance.compatibility import PriorDescription
from tests.guidance.gaussian_prior import GaussianPrior

TINY = [
    *("coarse.steps=3", "coarse.resolution=16", "coarse.views_per_step=2", "coarse.samples=16", "checkpoint_every=2"),
    *("coarse.field.levels=2", "coarse.field.log2_table=10", "export.tets=16", "export.turntable_frames=0"),
    *("export.texture_size=64", "export.unwrap=boxes", "export.faces=500", "device=cpu"),
]


class GreySource(PriorSource):
    """`grey:SHADE`, all of one shade; it refuses more than white, and reads one setting of the exact prior's."""

    form = "grey:SHADE"

    def reads(self, stage):
        return [f"guidance.{stage}", "reference.std"]

    def facts(self, ask):
        if float(self.text.partition(":")[2]) > 1:
            raise UserError(f"prior.{ask.stage} = {self.text}", "nothing is brighter than white", "grey:0.5")
        description = PriorDescription("grey", reads_prompts=False)
        check_guidance(ask, description)
        return Facts(description)

    def load(self, ask, facts, device, *, keep_text=False):
        prior = GaussianPrior()
        prior.name, prior.reads_prompts = facts.description.name if facts.description else "grey", False
        return prior

    @classmethod
    def offers(cls):
        check = lambda: ("ok", "256 shades")  # noqa: E731
        return [Offer("grey:0.5", "a shade", "coarse", "8", "0", "-", check=check, cost="no greys")]


@pytest.fixture
def grey():
    SOURCES["grey:"] = GreySource
    yield
    del SOURCES["grey:"]


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    return stopped.value.code or 0


@pytest.mark.slow
def test_a_new_source_runs_is_resumed_and_feeds_back(grey, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--stages", "coarse", "prior.coarse=grey:0.4", "reference.std=0.5", *TINY]
    assert command("run", "--out", "run", *words) == 0
    mesh = (tmp_path / "run" / "mesh.glb").read_bytes()
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "  coarse: grey:0.4  #" in text and "\nreference:\n  std: 0.5  #" in text and "supersample" not in text
    assert command("run", "--out", "again", "--config", "run/config.yaml") == 0
    assert (tmp_path / "again" / "mesh.glb").read_bytes() == mesh
    (tmp_path / "run" / "mesh.glb").unlink()
    (tmp_path / "run" / "coarse" / "checkpoint.safetensors").unlink()
    assert command("resume", "run") == 0 and (tmp_path / "run" / "mesh.glb").read_bytes() == mesh
    result = generate("a mug", stages="coarse", prior="grey:0.4", out="api", settings={"coarse.steps": 2}, quiet=True)
    assert result.config.prior.coarse == "grey:0.4" and len(result.metrics) == 2
    assert load_prior("grey:0.1").name == "grey"


def test_a_new_source_is_found_wherever_sources_are_named(grey, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert command("settings", "prior.coarse") == 0
    assert "grey:SHADE" in capsys.readouterr().out
    assert command("models", "list") == 0
    assert any(line.split()[:3] == ["grey:0.5", "a", "shade"] for line in capsys.readouterr().out.splitlines())
    actual = {finding.name: finding for finding in doctor.examine()}
    assert actual["grey:0.5 prior, coarse"].detail == "256 shades"
    with pytest.raises(UserError) as unknown:
        check_priors(load_config(None, ["prior.coarse=gery:SHADE"]))
    assert "grey:SHADE" in unknown.value.why and unknown.value.fix == "did you mean grey:SHADE?"


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["prior.coarse=grey:2"], "prior.coarse = grey:2"),
        (["guidance.coarse.rule=csd", "guidance.coarse.scale=2"], "rule=csd does not fit the prior grey"),
        (["prior.lora=mine.safetensors", "prior.lora_stages=coarse"], "prior.lora does not go with|no such file"),
    ],
)
def test_a_new_source_is_checked_before_any_work(grey, words, pattern):
    with pytest.raises(UserError, match=pattern):
        check_priors(load_config(None, ["prior.coarse=grey:0.5", *words], {"stages": "coarse"}))


@pytest.mark.parametrize("text", ["pocket", "reference", "clip:x", "python:x", "some/model", "C:/models/sd", "pocket2"])
def test_a_text_is_the_source_of_its_first_part(text):
    kinds = {"pocket": "pocket", "reference": "reference", "clip:x": "clip:", "python:x": "python:"}
    assert type(parse_source(text)) is SOURCES[kinds.get(text, "")]


def test_without_the_new_source_the_configuration_is_the_old_one(tmp_path):
    assert (
        config_model() is Config
        and "grey" not in Config().prior.model_json_schema()["properties"]["coarse"]["description"]
    )


def test_what_a_run_knows_of_its_priors_is_handed_on(tmp_path):
    from tests import tiny_folders

    folder = tiny_folders.stable_diffusion(tmp_path / "sd")
    words = [f"prior.coarse={folder}", f"prior.fine={folder}", "guidance.coarse.threshold=none", "prompt=a mug"]
    checked = check_priors(load_config(None, words))
    assert checked["coarse"].ask.prompts is checked["fine"].ask.prompts
    prior = checked["coarse"].fetched()
    assert prior.facts.plan is checked["coarse"].facts.plan and prior.facts.latents.startswith("Stable Diffusion")
    guidance = prior.build(torch.device("cpu"))
    assert guidance.prompts is prior.ask.prompts and guidance.prior.schedule is prior.facts.plan.schedule


def test_the_written_source_reads_back(grey, tmp_path):
    from pipeline.config.written import dump_read, read_part

    config = load_config(None, ["prior.coarse=grey:0.5"], {"stages": "coarse"})
    (tmp_path / "config.yaml").write_text(dump_read(config))
    assert read_config(tmp_path) == read_part(config)
