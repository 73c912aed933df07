"""What `models check` finds in a folder: every part of every family, and each thing that can be wrong with one."""

import json
import shutil
import time

import pytest
from safetensors.torch import load_file, save_file

from stages.errors import UserError
from stages.guidance.diffusion.audit import audit
from stages.guidance.diffusion.text import load_tokenizer
from tests import tiny_families, tiny_folders

FAMILIES = {
    "stable_diffusion": tiny_folders.stable_diffusion,
    "pocket_latent": tiny_folders.pocket_latent,
    "deepfloyd": tiny_folders.deepfloyd,
    "sdxl": tiny_families.sdxl,
    "sd3": tiny_families.sd3,
    "flux": tiny_families.flux,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("audit")
    return {name: build(root / name) for name, build in FAMILIES.items()}


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


def by_part(findings):
    return {finding.part: finding for finding in findings}


@pytest.mark.parametrize(
    ("name", "family", "fit", "noise"),
    [
        ("stable_diffusion", "Stable Diffusion 1.x / 2.x", "64x64, latents [4, 8, ...]", "epsilon, 1000 levels"),
        ("pocket_latent", "Stable Diffusion 1.x / 2.x", "64x64, latents [4, 16, ...]", "v_prediction, 1000 levels"),
        ("deepfloyd", "DeepFloyd IF", "16x16, pixels [3, 16, ...]", "epsilon, 1000 levels"),
        ("sdxl", "SDXL", "64x64, latents [4, 8, ...]", "epsilon, 1000 levels"),
        ("sd3", "Stable Diffusion 3", "64x64, latents [4, 8, ...]", "flow_prediction, 1000 levels"),
    ],
)
def test_a_whole_folder_is_found_whole(folders, name, family, fit, noise):
    findings = audit(folders[name])
    assert all(finding.ok for finding in findings), [f for f in findings if not f.ok]
    actual = by_part(findings)
    assert actual["family"].detail.startswith(family)
    assert actual["fit"].detail == fit and actual["scheduler"].detail.startswith(noise)
    assert "tokens of a prompt" in actual["tokenizer"].detail


def test_flux_is_checked_at_the_size_asked_for(folders):
    assert by_part(audit(folders["flux"]))["fit"].detail == "1024x1024, latents [4, 128, ...]"
    actual = by_part(audit(folders["flux"], resolution=64))
    assert actual["fit"].detail == "64x64, latents [4, 8, ...]"
    assert not by_part(audit(folders["flux"], resolution=72))["fit"].ok


def test_parameters_are_counted_in_the_files(folders):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folders["sdxl"] / "unet")
    count = sum(p.numel() for p in unet.parameters())
    detail = by_part(audit(folders["sdxl"]))["unet"].detail
    assert detail == f"UNet2DConditionModel, {count / 1e6:.1f} M parameters in F32"


def test_everything_wrong_is_named_at_once(copied):
    folder = copied("sd3")
    shutil.rmtree(folder / "tokenizer_2")
    weights = folder / "text_encoder_3" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    (folder / "vae" / "config.json").write_text("{")
    transformer = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    transformer.write_bytes(transformer.read_bytes()[:-8])
    wrong = {part: finding for part, finding in by_part(audit(folder)).items() if not finding.ok}
    assert set(wrong) == {"tokenizer_2", "text_encoder_3", "vae", "transformer"}
    assert "tokenizer_2/ is missing" in wrong["tokenizer_2"].detail
    assert "can run code" in wrong["text_encoder_3"].detail
    assert "config.json is damaged" in wrong["vae"].detail
    assert "bytes and has" in wrong["transformer"].detail
    assert all(finding.fix for finding in wrong.values())


@pytest.mark.parametrize(("part", "file"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_tensors_are_compared_with_the_config(copied, part, file):
    folder = copied("pocket_latent")
    path = folder / part / f"{file}.safetensors"
    whole = load_file(path)
    name = next(key for key in whole if key.endswith("weight") and whole[key].dim() == 2)
    save_file({key: tensor for key, tensor in whole.items() if key != name}, path, metadata={"format": "pt"})
    finding = by_part(audit(folder))[part]
    assert not finding.ok and "1 tensors are missing" in finding.detail and name.split(".")[-2] in finding.detail
    save_file(whole | {name: whole[name][:, :-1].clone()}, path, metadata={"format": "pt"})
    finding = by_part(audit(folder))[part]
    assert not finding.ok and "another shape than config.json says" in finding.detail


def test_old_names_of_the_autoencoders_attention_are_no_fault(copied):
    folder = copied("stable_diffusion")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(path).items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        renamed[name] = tensor
    assert any("proj_attn" in name for name in renamed)
    save_file(renamed, path, metadata={"format": "pt"})
    assert all(finding.ok for finding in audit(folder))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_parts_of_other_models_and_schedulers_are_named(copied, folders):
    folder = copied("sdxl")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    actual = by_part(audit(folder))
    assert not actual["scheduler"].ok and "flow_prediction" in actual["scheduler"].detail
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(folders["sd3"] / "text_encoder", folder / "text_encoder_2")
    actual = by_part(audit(folder))
    assert not actual["fit"].ok and "numbers a token" in actual["fit"].detail


def test_a_tokenizer_of_another_model_is_named(copied, folders):
    folder = copied("deepfloyd")
    edit(folder / "text_encoder" / "config.json", vocab_size=10)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file(
        {k: v[:10].clone() if v.shape[0] == 64 and "shared" in k else v for k, v in tensors.items()},
        weights,
        metadata={"format": "pt"},
    )
    finding = by_part(audit(folder))["tokenizer"]
    assert not finding.ok and "has embeddings for 10" in finding.detail


def test_a_folder_that_is_no_model_has_one_finding(tmp_path):
    (finding,) = audit(tmp_path)
    assert not finding.ok and finding.part == "model_index.json" and finding.fix


@pytest.mark.parametrize("damage", [b"", b"[]", b"1", b"\xff\xfe", "cut", "folder"])
@pytest.mark.parametrize("name", [pytest.param("stable_diffusion", marks=pytest.mark.slow), "pocket_latent"])
def test_every_file_that_is_cut_emptied_or_of_another_type_is_named(folders, tmp_path, name, damage):
    for path in sorted(p for p in folders[name].rglob("*") if p.is_file()):
        if path.name == "merges.txt" and damage not in (b"", "folder"):
            continue  # any text is one, and these folders have no merges
        place = path.relative_to(folders[name])
        folder = shutil.copytree(folders[name], tmp_path / str(place).replace("/", "-"))
        (folder / place).unlink()
        if damage == "folder":
            (folder / place).mkdir()
        else:
            data = path.read_bytes()
            (folder / place).write_bytes(data[: len(data) // 2] if damage == "cut" else damage)
        wrong = [finding.detail for finding in audit(folder) if not finding.ok]
        assert any(path.name in detail for detail in wrong), (place, wrong)


@pytest.mark.parametrize("lines_left", [6, 5, 1, 0])
def test_merges_cut_at_the_end_of_a_line_are_named(tmp_path, lines_left):
    tiny_folders.byte_tokenizer(tmp_path / "tokenizer")
    place = tmp_path / "tokenizer" / "vocab.json"
    words = [*json.loads(place.read_text()), "re", "red</w>", "mu", "mug</w>", "ug", "mug"]
    place.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    lines = ["r e", "re d</w>", "m u", "mu g</w>", "u g", "m ug"][:lines_left]
    (tmp_path / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    if lines_left == len(words) - 514:
        assert load_tokenizer(tmp_path, "tokenizer")("red mug").input_ids[1:-1] == [515, 517]
        return
    with pytest.raises(UserError, match=f"merges.txt makes {lines_left} of vocab.json's 6 tokens"):
        load_tokenizer(tmp_path, "tokenizer")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_train_timesteps": 0, "set_alpha_to_one": True}, "gives 0 noise levels"),
        ({"num_train_timesteps": 1}, "gives 1 noise levels"),
        ({"trained_betas": 0.5, "set_alpha_to_one": True}, "gives 1 noise levels"),
        ({"beta_start": -0.5, "beta_end": -0.1}, "do not fall within 1 and 0"),
        ({"beta_start": 0, "beta_end": 0}, "do not fall within 1 and 0"),
    ],
)
def test_a_noise_schedule_that_is_none_is_named(copied, change, words):
    folder = copied("stable_diffusion")
    edit(folder / "scheduler" / "scheduler_config.json", beta_schedule="linear", **change)
    finding = by_part(audit(folder))["scheduler"]
    assert not finding.ok and words in finding.detail


def test_a_config_that_makes_far_more_than_the_weights_hold_is_refused_at_once(copied):
    folder = copied("flux")
    edit(folder / "vae" / "config.json", encoder_block_out_channels=[4] * 4, num_encoder_blocks=[10**6] * 4)
    began = time.process_time()
    finding = by_part(audit(folder))["vae"]
    assert not finding.ok and "makes more than" in finding.detail
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ['{"a": ' + "9" * 5000 + "}", "[" * 100_000])
def test_json_that_no_reader_takes_is_told(copied, text):
    folder = copied("stable_diffusion")
    (folder / "unet" / "config.json").write_text(text)
    wrong = [finding.detail for finding in audit(folder) if not finding.ok]
    assert any("config.json is damaged" in detail for detail in wrong), wrong
