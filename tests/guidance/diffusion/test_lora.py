"""LoRA and DreamBooth weights: every way of naming them ends in the same weights, and nothing is left out silently."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.errors import UserError
from stages.guidance.diffusion.lora import Lora, from_sgm
from stages.guidance.diffusion.prior import load_prior
from tests import tiny_families, tiny_folders

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
RANK, SCALE = 3, 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folders.stable_diffusion(tmp_path_factory.mktemp("lora") / "sd")


@pytest.fixture(scope="module")
def plain(folder):
    return load_prior(folder, "cpu")


def matrices(weight, seed=0):
    """(down [r, in...], up [out, r, 1...]) for a weight, as trainers write them for linear and convolution layers."""
    generator = torch.Generator().manual_seed(seed)
    rest = weight.shape[1:]
    tail = (1,) * (len(rest) - 1)
    return torch.randn(RANK, *rest, generator=generator), torch.randn(weight.shape[0], RANK, *tail, generator=generator)


def product(weight, seed=0):
    down, up = matrices(weight, seed)
    return (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def write(path, tensors, metadata=None):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def merged(folder, path, scale=1.0):
    return load_prior(folder, "cpu", lora=Lora(path, scale))


def weight_of(module, name):
    return module.get_submodule(name).weight


NAMES = {
    "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "diffusers, older": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "bare": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("naming", NAMES)
@pytest.mark.parametrize("layer", [f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", "mid_block.resnets.0.conv1"])
def test_a_low_rank_change_is_added_to_its_layer_and_no_other(folder, plain, tmp_path, naming, layer):
    down, up = matrices(weight_of(plain.unet, layer))
    name = layer.replace(".", "_") if naming == "kohya" else layer
    keys = [key.format(name) for key in NAMES[naming]]
    prior = merged(folder, write(tmp_path / "a.safetensors", {keys[0]: down, keys[1]: up}), SCALE)
    for name, weight in prior.unet.named_parameters():
        was = plain.unet.get_parameter(name)
        if name == f"{layer}.weight":
            torch.testing.assert_close(weight, was + SCALE * product(was))
        else:
            assert torch.equal(weight, was)
    assert all(torch.equal(a, b) for a, b in zip(prior.vae.parameters(), plain.vae.parameters(), strict=True))


def test_alpha_over_rank_scales_the_change(folder, plain, tmp_path):
    layer = f"{ATTENTION}.to_q"
    was = weight_of(plain.unet, layer)
    down, up = matrices(was)
    flat = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.5)}
    prior = merged(folder, write(tmp_path / "a.safetensors", tensors))
    torch.testing.assert_close(weight_of(prior.unet, layer), was + 1.5 / RANK * product(was))


@pytest.mark.parametrize(("settings", "factor"), [({}, 2.0), ({"use_rslora": True}, 6 / RANK**0.5)])
def test_alpha_in_the_metadata_of_newer_files_counts(folder, plain, tmp_path, settings, factor):
    layer = f"{ATTENTION}.to_q"
    was = weight_of(plain.unet, layer)
    down, up = matrices(was)
    adapter = {"lora_alpha": 6, "r": RANK, "alpha_pattern": {"mid_block": 99}} | settings
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in adapter.items()})}
    tensors = {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    prior = merged(folder, write(tmp_path / "a.safetensors", tensors, metadata))
    torch.testing.assert_close(weight_of(prior.unet, layer), was + factor * product(was))


@pytest.mark.parametrize("processor", ["to_q", "to_out"])
def test_the_oldest_names_of_attention_layers_are_understood(folder, plain, tmp_path, processor):
    layer = f"{ATTENTION}.{processor}" + (".0" if processor == "to_out" else "")
    was = weight_of(plain.unet, layer)
    down, up = matrices(was)
    key = f"unet.{ATTENTION}.processor.{processor}_lora"
    prior = merged(folder, write(tmp_path / "a.safetensors", {f"{key}.down.weight": down, f"{key}.up.weight": up}))
    torch.testing.assert_close(weight_of(prior.unet, layer), was + product(was))


TEXT = {
    "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_{}.weight": "self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.1.self_attn.to_k_lora.{}.weight": "self_attn.k_proj",
    "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer.{}.weight": "mlp.fc1",
    "text_encoder.encoder.layers.1.self_attn.out_proj.lora.{}.weight": "self_attn.out_proj",
}


@pytest.mark.parametrize("key", TEXT)
def test_text_encoders_are_changed_too_also_when_loaded_again(folder, plain, tmp_path, key):
    def layer_of(prior):
        modules = dict(prior.text.encoders[0].load().named_modules())
        return next(m for name, m in modules.items() if name.endswith(f"encoder.layers.1.{TEXT[key]}"))

    was = layer_of(plain).weight
    down, up = matrices(was)
    prior = merged(folder, write(tmp_path / "a.safetensors", {key.format("down"): down, key.format("up"): up}))
    torch.testing.assert_close(layer_of(prior).weight, was + product(was))
    prior.release_text_encoder()
    torch.testing.assert_close(layer_of(prior).weight, was + product(was))


@pytest.mark.parametrize(
    ("sgm", "diffusers"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_0_in_layers_2", "down_blocks_0_resnets_0_conv1"),
        ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("input_blocks_4_1_transformer_blocks_0_norm1", "down_blocks_1_attentions_0_transformer_blocks_0_norm1"),
        ("input_blocks_8_1_proj_in", "down_blocks_2_attentions_1_proj_in"),
        ("input_blocks_8_0_skip_connection", "down_blocks_2_resnets_1_conv_shortcut"),
        ("middle_block_0_emb_layers_1", "mid_block_resnets_0_time_emb_proj"),
        ("middle_block_1_proj_out", "mid_block_attentions_0_proj_out"),
        ("middle_block_2_out_layers_3", "mid_block_resnets_1_conv2"),
        ("output_blocks_2_2_conv", "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_5_1_transformer_blocks_1_ff_net_2", "up_blocks_1_attentions_2_transformer_blocks_1_ff_net_2"),
        ("label_emb_0_2", "add_embedding_linear_2"),
        ("down_blocks_1_attentions_0_proj_in", "down_blocks_1_attentions_0_proj_in"),
    ],
)  # fmt: skip
def test_stabilitys_own_layer_names_are_translated(sgm, diffusers):
    """SDXL has three blocks of two layers: its input blocks 1 to 8 are layer, layer, down, layer, layer, down, ..."""
    assert from_sgm(sgm, 2) == diffusers


def test_sdxl_names_of_kohya_reach_unet_and_both_text_encoders(tmp_path):
    folder = tiny_families.sdxl(tmp_path / "sdxl")
    plain = load_prior(folder, "cpu")
    # one layer a block here: input blocks are conv_in, layer, down, layer
    targets = {
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_v": (
            lambda p: p.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_v
        ),
        "lora_unet_output_blocks_1_1_proj_in": lambda p: p.unet.up_blocks[0].attentions[1].proj_in,
        "lora_te1_text_model_encoder_layers_0_mlp_fc2": (
            lambda p: find(p.text.encoders[0].load(), "layers.0.mlp.fc2")
        ),
        "lora_te2_text_model_encoder_layers_0_self_attn_v_proj": (
            lambda p: find(p.text.encoders[1].load(), "layers.0.self_attn.v_proj")
        ),
    }  # fmt: skip
    tensors = {}
    for seed, (key, layer) in enumerate(targets.items()):
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = matrices(layer(plain).weight, seed)
    prior = merged(folder, write(tmp_path / "a.safetensors", tensors))
    for seed, layer in enumerate(targets.values()):
        was = layer(plain).weight
        torch.testing.assert_close(layer(prior).weight, was + product(was, seed))


def find(model, end):
    return next(module for name, module in model.named_modules() if name.endswith(end))


def test_joined_layers_of_flux_trainers_are_taken_apart(tmp_path):
    folder = tiny_families.flux(tmp_path / "flux")
    plain = load_prior(folder, "cpu")
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(RANK, 32, generator=generator), torch.randn(96, RANK, generator=generator)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(RANK))}
    prior = merged(folder, write(tmp_path / "a.safetensors", tensors))
    for k, name in enumerate(("to_q", "to_k", "to_v")):
        was = weight_of(plain.unet, f"transformer_blocks.0.attn.{name}")
        expected = was + (up @ down)[32 * k : 32 * k + 32]
        torch.testing.assert_close(weight_of(prior.unet, f"transformer_blocks.0.attn.{name}"), expected)
    names = {f"transformer.transformer_blocks.0.attn.to_q.lora_{ab}.weight": m for ab, m in zip("AB", matrices(was))}
    assert merged(folder, write(tmp_path / "b.safetensors", names)).unet is not None


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_dreambooth_weights_replace_the_networks(folder, plain, tmp_path, prefix):
    new = {f"{prefix}{name}": torch.randn_like(tensor) for name, tensor in plain.unet.state_dict().items()}
    new.popitem()  # a part of them will do
    last = list(plain.unet.state_dict())[-1]
    prior = merged(folder, write(tmp_path / "a.safetensors", new))
    for name, tensor in prior.unet.state_dict().items():
        assert torch.equal(tensor, plain.unet.state_dict()[name] if name == last else new[prefix + name])


@pytest.fixture
def dreambooth(folder, tmp_path):
    """A copy of the whole folder whose UNet and text encoder were trained on: other numbers, the same layers."""
    copy = shutil.copytree(folder, tmp_path / "mine")
    generator = torch.Generator().manual_seed(2)
    for path in (copy / "unet").glob("*.safetensors"), (copy / "text_encoder").glob("*.safetensors"):
        (file,) = path
        save_file({k: torch.randn(v.shape, generator=generator) for k, v in load_file(file).items()}, file)
    return copy


def same(module, other):
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole folder", "networks alone", "unet", "shards", "fp16"])
def test_a_dreambooth_folder_takes_the_networks_place(folder, plain, dreambooth, tmp_path, kind):
    expected = load_prior(dreambooth, "cpu")
    path = dreambooth
    if kind == "networks alone":
        for name in ("vae", "scheduler", "tokenizer"):
            shutil.rmtree(dreambooth / name)
        (dreambooth / "model_index.json").unlink()
    elif kind == "unet":
        path = dreambooth / "unet"
    elif kind == "shards":
        file = dreambooth / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = list(load_file(file).items())
        for k, part in enumerate((tensors[:20], tensors[20:])):
            save_file(dict(part), file.with_name(f"diffusion_pytorch_model-0000{k + 1}-of-00002.safetensors"))
        file.unlink()
    elif kind == "fp16":
        file = dreambooth / "unet" / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_suffix(".fp16.safetensors"))
    prior = merged(folder, path)
    assert same(prior.unet, expected.unet) and same(prior.vae, plain.vae)
    result = plain if kind == "unet" else expected
    assert same(prior.text.encoders[0].load(), result.text.encoders[0].load())


@pytest.mark.parametrize("where", [("mine",), ("base",), ("mine", "base")])
def test_what_old_files_count_beside_their_weights_is_left_aside(folder, dreambooth, tmp_path, where):
    expected = load_prior(dreambooth, "cpu").text.encoders[0].load()
    shutil.copytree(folder, tmp_path / "base")
    for name in where:
        (file,) = (tmp_path / name / "text_encoder").glob("*.safetensors")
        save_file(load_file(file) | {"text_model.embeddings.position_ids": torch.arange(40)[None]}, file)
    assert same(merged(tmp_path / "base", dreambooth).text.encoders[0].load(), expected)


def test_half_of_a_dreambooth_is_halfway(folder, plain, dreambooth):
    half, whole = merged(folder, dreambooth, 0.5), merged(folder, dreambooth)
    for a, b, c in zip(*(prior.unet.parameters() for prior in (half, plain, whole)), strict=True):
        torch.testing.assert_close(a, (b + c) / 2)


def test_a_dreambooth_folder_of_another_model_is_refused(folder, dreambooth, tmp_path):
    refuse(folder, tiny_families.sdxl(tmp_path / "sdxl"), "sdxl has .* keys that fit no layer")
    refuse(folder, tiny_families.sd3(tmp_path / "sd3") / "transformer", "fit no layer")
    v = tiny_folders.stable_diffusion(tmp_path / "v", "v_prediction")
    assert f"prior.coarse={v}" in refuse(folder, v, "predicts v_prediction and the prior epsilon").fix
    file = dreambooth / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.bias"]
    save_file(tensors, file)
    refuse(folder, dreambooth, "lacks 1 of the model's .* tensors, conv_in.bias first")
    file.rename(file.with_suffix(".bin"))
    refuse(folder, dreambooth, "only pickled weights")


def refuse(folder, path, pattern):
    with pytest.raises(UserError, match=pattern) as error:
        merged(folder, path)
    assert "prior.lora=" in error.value.what and error.value.fix
    return error.value


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"unet.nowhere.lora_A.weight": (3, 4), "unet.nowhere.lora_B.weight": (4, 3)}, "fit no layer.*nowhere"),
        ({f"unet.{ATTENTION}.to_k.lora_A.weight": (3, 32)}, "without their other half .*to_k"),
        (
            {f"unet.{ATTENTION}.to_k.lora_A.weight": (3, 48), f"unet.{ATTENTION}.to_k.lora_B.weight": (32, 3)},
            "of another shape than the model's.*to_k",
        ),
        (
            {"transformer.x.lora_A.weight": (3, 48), "text_encoder_2.x.lora_B.weight": (32, 3)},
            "fit no layer|text_encoder_2 that",
        ),
        ({f"unet.{ATTENTION}.to_q.lora_magnitude_vector": (32,)}, "fit no layer.*magnitude.*DoRA"),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (3, 3)}, "fit no layer.*hada.*LoHa"),
    ],
)
def test_a_key_that_does_not_fit_is_refused_by_name(folder, plain, tmp_path, change, pattern):
    down, up = matrices(weight_of(plain.unet, f"{ATTENTION}.to_q"))
    tensors = {f"unet.{ATTENTION}.to_q.lora_A.weight": down, f"unet.{ATTENTION}.to_q.lora_B.weight": up}
    tensors |= {name: torch.zeros(shape) for name, shape in change.items()}
    refuse(folder, write(tmp_path / "a.safetensors", tensors), pattern)


def test_only_the_text_encoder_of_another_family_is_refused(folder, tmp_path):
    tensors = {"lora_te2_x.lora_down.weight": torch.zeros(3, 4), "lora_te2_x.lora_up.weight": torch.zeros(4, 3)}
    refuse(folder, write(tmp_path / "a.safetensors", tensors), "text_encoder_2 that Stable Diffusion .* does not have")


def test_files_that_are_no_lora_say_what_they_are(folder, tmp_path):
    whole = write(tmp_path / "w.safetensors", {"model.diffusion_model.out.0.weight": torch.zeros(2)})
    assert "from_single_file" in refuse(folder, whole, "whole checkpoint").fix
    other = write(tmp_path / "o.safetensors", {"something.weight": torch.zeros(2)})
    refuse(folder, other, "fit no layer.*something.weight")
    (tmp_path / "x.ckpt").write_bytes(b"pickle")
    refuse(folder, tmp_path / "x.ckpt", "can run code")
    with pytest.raises(UserError, match="header is cut short"):
        Lora(write_bytes(tmp_path / "cut.safetensors", whole.read_bytes()[:20]))
    refuse(folder, tmp_path / "gone.safetensors", "no such file")
    (tmp_path / "two").mkdir()
    for name in "ab":
        write(tmp_path / "two" / f"{name}.safetensors", {"x": torch.zeros(1)})
    refuse(folder, tmp_path / "two", "2 safetensors files")


def write_bytes(path, data):
    path.write_bytes(data)
    return path


def test_a_folder_may_name_the_file(folder, plain, tmp_path):
    down, up = matrices(weight_of(plain.unet, f"{ATTENTION}.to_q"))
    tensors = {f"unet.{ATTENTION}.to_q.lora_A.weight": down, f"unet.{ATTENTION}.to_q.lora_B.weight": up}
    write(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    write(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    assert Lora(tmp_path).path.name == "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        {"lora_A": torch.ones(32)},
        {"lora_A": torch.ones(0, 32)},
        {"lora_B": torch.tensor(1.0)},
        {"lora_A": torch.ones(1, 32, dtype=torch.int8)},
        {"alpha": torch.ones(2)},
        {"alpha": torch.tensor(float("nan"))},
    ],
)
def test_tensors_that_can_be_no_change_are_refused_by_name(folder, plain, tmp_path, change):
    parts = {"lora_A": torch.ones(1, 32), "lora_B": torch.ones(32, 1), "alpha": torch.tensor(1)} | change
    tensors = {f"unet.{ATTENTION}.to_q.{name}{'' if name == 'alpha' else '.weight'}": t for name, t in parts.items()}
    with pytest.raises(UserError, match=f"of a shape or type of no change: .*{next(iter(change))}"):
        merged(folder, write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize(
    "text", ['{"unet.r": 2', "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"a": "x"}}']
)
def test_settings_of_an_adapter_that_are_damaged_are_told(folder, tmp_path, text):
    tensors = {f"unet.{ATTENTION}.to_q.lora_{ab}.weight": torch.ones(s) for ab, s in (("A", (1, 32)), ("B", (32, 1)))}
    path = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match="its adapter's .* damaged"):
        merged(folder, path)
