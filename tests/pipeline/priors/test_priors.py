"""Which prior a name means, and what is refused before any work."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pipeline.priors.pocket as pocket_source
import pipeline.priors.sources as priors
from pipeline.config.model import load_config
from stages.errors import UserError
from stages.ramp import constant
from tests.tiny_folders import word_tokenizer
from tests.toy_pipeline import octahedron

WORDS = ["a", "red", "blue", "mug", "car", "on", "table", "and", "clay", "render"]


@pytest.fixture
def pocket(tmp_path, monkeypatch):
    """Pocket folders, of pixels and of latents, that hold no weights; the first of them."""
    folders = {"coarse": tmp_path / "pixel", "fine": tmp_path / "latent"}
    for stage, folder in folders.items():
        (folder / "scheduler").mkdir(parents=True)
        (folder / "pocket.json").write_text(json.dumps({"words": WORDS}))
        index = {"unet": ["diffusers", "UNet2DConditionModel"]}
        index |= {"vae": ["diffusers", "AutoencoderTiny"]} if stage == "fine" else {}
        (folder / "model_index.json").write_text(json.dumps(index))
        prediction = json.dumps({"prediction_type": "v_prediction"})
        (folder / "scheduler" / "scheduler_config.json").write_text(prediction)
        vocabulary = [*WORDS, *"front side left right back overhead view ,".split()]
        word_tokenizer(vocabulary, length=20).save_pretrained(folder / "tokenizer")
    monkeypatch.setattr(pocket_source, "POCKET", tmp_path)
    return folders["coarse"]


def config(*overrides: str, **flags):
    return load_config(None, list(overrides), flags)


def test_known_words_pass(pocket):
    priors.check_priors(config(prompt="A red mug, on a blue table"))


def test_unknown_words_are_listed_with_the_known_ones_and_the_way_out(pocket):
    with pytest.raises(UserError) as refusal:
        priors.check_priors(config(prompt="a rad mug and a zebra"))
    error = refusal.value
    assert "'rad', 'zebra'" in error.why and all(word in error.why for word in WORDS)
    assert "rad -> red" in error.fix and "--force" in error.fix
    assert "--config stable-diffusion prior.coarse=" in error.fix


def test_force_runs_unknown_words(pocket):
    priors.check_priors(config(prompt="a zebra", force=True))


def test_words_are_not_checked_for_other_priors(pocket):
    latent = "guidance.coarse.threshold=none"
    priors.check_priors(config("prior.coarse=some/model", "prior.fine=some/model", latent, prompt="a zebra"))


def test_only_the_priors_of_the_asked_stages_are_checked(pocket):
    priors.check_priors(config("prior.fine=reference", stages="coarse"))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_pocket_weights_that_are_not_there_are_explained(pocket, damage):
    path = pocket / "pocket.json"
    path.unlink() if damage == "missing" else path.write_text('{"words": ["a"' if damage == "cut" else "{}")
    with pytest.raises(UserError, match="pocket prior") as error:
        priors.check_priors(config())
    assert "stages.pocket.train" in error.value.fix


def refused(pattern, *overrides: str, **flags) -> UserError:
    with pytest.raises(UserError, match=pattern) as error:
        priors.check_priors(config(*overrides, **flags))
    assert error.value.why and error.value.fix
    return error.value


def test_guidance_that_no_latent_fits_is_refused_for_the_pocket_prior_before_the_coarse_stage(pocket):
    refused("threshold=static does not fit the prior pocket: its data are latents", "guidance.fine.threshold=static")
    priors.check_priors(config("guidance.coarse.threshold=static"))  # pixels have a range
    path = pocket_source.pocket_folder("fine") / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"prediction_type": "sample"}))
    refused("rule=ism does not fit the prior pocket", "guidance.fine.rule=ism")
    path.unlink()
    assert "stages.pocket.train" in refused("pocket prior .* is not there").fix


def test_a_prompt_longer_than_the_pocket_prior_reads_is_refused_before_any_work(pocket):
    long = "a red mug and a blue mug on a red car"  # 11 words, ", left side view, clay render" and two ends: 20
    priors.check_priors(config(prompt=long))
    error = refused("too long.*is 21 tokens and the encoder reads 20.*cut off", prompt=f"{long} red")
    assert "left side view, clay render" in error.why


SOURCES = ["pocket", "some/model"]  # known by its folder, and not here yet


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("rule=nfsd has no negative prompt", ["guidance.fine.rule=nfsd"]),
        ("blend=perp_neg does not fit scale=1", ["prompts.blend=perp_neg", "guidance.fine.scale=1"]),
        ("rule=vsd does not fit.*leave the device", ["guidance.fine.rule=vsd", "prior.diffusion.offload=blocks"]),
        (
            "half precision is too coarse",
            ["guidance.fine.rule=vsd", "guidance.fine.rule.model=copy", "prior.diffusion.dtype=bfloat16"],
        ),
    ],
)
def test_what_the_settings_alone_rule_out_is_refused_before_any_work(pocket, source, pattern, settings):
    refused(pattern, f"prior.fine={source}", *settings)


def test_half_precision_that_the_device_chooses_counts(pocket, monkeypatch):
    copy = ["guidance.fine.rule=vsd", "guidance.fine.rule.model=copy"]
    priors.check_priors(config(*copy, device="cpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    refused("half precision is too coarse", *copy)
    priors.check_priors(config(*copy, device="cpu"))
    priors.check_priors(config(*copy, "prior.diffusion.dtype=float32"))


@pytest.mark.parametrize(
    ("cores", "settings", "dtype"),
    [
        (True, [], torch.bfloat16),
        (False, [], torch.float32),
        (True, ["prior.diffusion.dtype=float32"], torch.float32),
        (False, ["prior.diffusion.dtype=bfloat16"], torch.bfloat16),
        (True, ["guidance.coarse.rule=vsd"], torch.float32),  # it trains it
    ],
)
def test_the_pocket_prior_runs_in_bfloat16_where_the_cores_have_it(monkeypatch, cores, settings, dtype):
    monkeypatch.setattr("stages.guidance.diffusion.plan.cores_have_bfloat16", lambda: cores)
    prior = priors.stage_prior(config(*settings, prompt="a red mug"), "coarse").load(torch.device("cpu"))
    assert prior.dtype == dtype and prior.unet.dtype == dtype
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = prior.embed(["a red mug"])
    assert prior.predict_noise(x, torch.tensor([500]), text).dtype == torch.float32


def test_a_threshold_is_refused_for_a_latent_model_that_is_not_here_yet(pocket, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cure = "guidance.coarse.threshold=static"
    refused("its data are latents", "prior.coarse=stabilityai/stable-diffusion-xl-base-1.0", cure)
    priors.check_priors(config("prior.coarse=DeepFloyd/IF-I-XL-v1.0", cure))  # pixels
    refused("its data are latents", "prior.coarse=some/model", cure)


def noticed(*overrides):
    return priors.notices(config(*overrides), priors.check_priors(config(*overrides)))


def test_a_negative_prompt_that_no_stage_uses_is_refused_and_one_that_a_stage_does_not_use_is_said(pocket):
    one = ["guidance.coarse.scale=1", "negative=blurry"]
    error = refused("negative prompt.* has no use", *one, "guidance.fine.scale=1")
    assert "guidance.coarse.scale" in error.fix
    refused("negative prompt.* has no use", *one, stages="coarse")
    refused("negative prompt.* has no use", *one[:1], "prompts.per_view_negative.back=blurry", stages="coarse")
    one.append("guidance.fine.scale=4")
    priors.check_priors(config(*one))
    assert noticed(*one) == ["coarse: the negative prompt is not used at guidance.coarse.scale=1"]
    both = ["negative=blurry", "guidance.coarse.scale=2", "guidance.fine.scale=4"]
    for settings in (both, one[:1], [*one, "guidance.coarse.rule=csd"]):
        assert noticed(*settings) == []


def test_a_run_says_at_its_start_what_a_stage_leaves_aside(pocket, tmp_path, monkeypatch):
    import pipeline.runs.run

    notes = []
    monkeypatch.setattr(pipeline.runs.run, "Run", lambda *_: SimpleNamespace(go=lambda: None))
    chosen = config("guidance.coarse.scale=1", "guidance.fine.scale=4", "negative=blurry")
    pipeline.runs.run.start_run(chosen, tmp_path / "out", SimpleNamespace(note=notes.append))
    assert "coarse: the negative prompt is not used at guidance.coarse.scale=1" in notes


def test_a_sentence_that_no_caption_is_like_is_told_once(tmp_path, pocket, monkeypatch):
    import pipeline.runs.run

    lines = []
    monkeypatch.setattr(pipeline.runs.run, "Run", lambda *_: SimpleNamespace(go=lambda: None))
    chosen = config(prompt="a red car on a blue mug")
    pipeline.runs.run.start_run(chosen, tmp_path / "out", SimpleNamespace(note=lines.append))
    assert sum("captions have no car on a mug" in line for line in lines) == 1
    lines.clear()
    pipeline.runs.run.start_run(config(prompt="a red mug"), tmp_path / "mug", SimpleNamespace(note=lines.append))
    assert not any("never saw" in line for line in lines)


def test_a_lora_for_stages_that_do_not_run_is_refused(pocket):
    lora = ["prior.lora=gone.safetensors", "prior.lora_stages=fine"]
    error = refused("prior.lora has no use here", *lora, stages="coarse")
    assert "prior.lora_stages=coarse" in error.fix


def test_unknown_words_of_prompts_by_view_are_refused(pocket):
    priors.check_priors(config("prompts.per_view.back=a red mug, back view", prompt="a red mug"))
    back = ["prompts.per_view.back=a red mug with a zebra"]
    assert "'with', 'zebra'" in refused('cannot read "a red mug with a zebra"', *back, prompt="a red mug").why
    suffix = 'prompts.textureless_suffix=", gypsum"'
    assert "'gypsum'" in refused("cannot read", suffix, prompt="a red mug").why
    priors.check_priors(config(*back, prompt="a red mug", force=True))


def test_reference_without_a_mesh_says_how_to_name_one():
    with pytest.raises(UserError, match="no mesh") as error:
        priors.check_priors(config("prior.coarse=reference"))
    assert "reference.mesh=FILE.glb" in error.value.fix


def test_reference_with_a_missing_mesh_names_it(tmp_path):
    with pytest.raises(UserError, match="Cannot read the mesh .*gone.glb"):
        priors.check_priors(config("prior.coarse=reference", f"reference.mesh={tmp_path / 'gone.glb'}"))


def test_reference_with_a_damaged_mesh_is_refused_before_any_work(tmp_path):
    (tmp_path / "cut.glb").write_bytes(b"glTF\x02\x00")
    with pytest.raises(UserError, match="Cannot read the mesh .*cut.glb"):
        priors.check_priors(config("prior.coarse=reference", f"reference.mesh={tmp_path / 'cut.glb'}"))


@pytest.mark.parametrize("source", ["pockte", "no/such/folder", "./folder"])
def test_name_that_is_no_prior_is_refused(source):
    with pytest.raises(UserError) as error:
        priors.check_priors(config(f"prior.coarse={source}"))
    assert source in error.value.what
    assert ("did you mean pocket?" in error.value.fix) == (source == "pockte")


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError):
        priors.check_priors(config(f"prior.coarse={tmp_path}"))


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("guidance.fine.rule=csd", "rule=csd does not fit the prior reference"),
        ("guidance.fine.rule=vsd", "rule=vsd does not fit the prior reference"),
        ("prompts.blend=perp_neg", "prompts.blend=perp_neg does not fit the prior reference"),
    ],
)
def test_rule_that_needs_words_is_refused_before_the_stage_before_it_is_made(tmp_path, pocket, setting, what):
    import trimesh

    trimesh.creation.box().export(tmp_path / "mesh.glb")
    scales = ["guidance.coarse.scale=2", "guidance.fine.scale=4"]
    words = ["prior.fine=reference", f"reference.mesh={tmp_path / 'mesh.glb'}", *scales, setting]
    with pytest.raises(UserError, match=what):
        priors.check_priors(config(*words, prompt="a red mug"))


def test_reference_prior_has_the_size_of_its_stage(tmp_path):
    from pipeline.output.glb import write_glb
    from stages.mesh.mesh import Mesh

    corners = np.array([[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]], np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], np.int32)
    write_glb(Mesh(corners, faces), tmp_path / "mesh.glb")
    overrides = ["prior.coarse=reference", "prior.fine=reference", f"reference.mesh={tmp_path / 'mesh.glb'}"]
    chosen = config(*overrides, "fine.resolution=96")
    assert priors.stage_prior(chosen, "coarse").load("cpu").resolution == 64
    assert priors.stage_prior(chosen, "fine").load("cpu").resolution == 96
    assert priors.stage_prior(config(*overrides, "reference.resolution=32"), "fine").load("cpu").resolution == 32


def test_guidance_is_that_of_the_stage(tmp_path, monkeypatch):
    from stages.guidance.exact import ReferencePrior

    prior = ReferencePrior(octahedron(), config().reference)
    monkeypatch.setattr(pocket_source.PocketSource, "load", lambda *_: prior)
    chosen = config("guidance.fine.scale=3", "negative=ugly", prompt="a red mug")
    guidance = priors.stage_prior(chosen, "fine").build("cpu")
    assert guidance.settings.scale == 3 and guidance.settings.t_max == constant(0.95)
    assert guidance.prompts.prompt == "a red mug" and guidance.prompts.negative == "ugly"


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red mug \N{HOT BEVERAGE}", ["\N{HOT BEVERAGE}"]),
        ("a \U0001f44d\U0001f3fc mug", ["\U0001f44d\U0001f3fc"]),  # a thumb and its colour
        ("a red\N{HEAVY BLACK HEART}mug", ["\N{HEAVY BLACK HEART}"]),
        ("a mug \N{EURO SIGN}", ["\N{EURO SIGN}"]),
        ("“a red mug” — a mug…", []),
        ("a red, a-mug!", []),
    ],
)
def test_an_emoji_is_a_word_that_is_not_known_and_punctuation_is_none(prompt, unknown):
    from pipeline.priors.words import unknown_words

    assert unknown_words(prompt, ["a", "red", "mug"]) == unknown
