"""The pocket models' architectures and their folders: tokenizer, text encoder, two UNets, autoencoder, CLIP.

All are ordinary transformers / diffusers classes saved in their ordinary folder formats, so any other tool opens
them and the toolkit opens any other model by the same code. Two choices keep them small enough for a CPU:

Patches. Both UNets see a 16 x 16 grid: the pixel UNet 64x64x3 images unshuffled by 4 (48 channels), the latent
UNet 64x64x4 latents unshuffled by 4 (64 channels). Unshuffling is orthogonal, so noise and v predictions carry
over unchanged; the loader reads the patch from `in_channels`. Attention runs at 8 x 8 only.
Camera. A small volume of features, looked into by the camera, tells a UNet what is where
(stages/guidance/diffusion/camera.py), in four of five training batches; without it the UNets are ordinary
text-to-image models.
Text. As in DeepFloyd IF, a pooled text embedding joins the time embedding and the 8 x 8 attention sees the words.
"""

from __future__ import annotations

from pathlib import Path

from stages.pocket.world import words

CLIP_EOS = 3  # see make_tokenizer
TOKENS = 20  # caption, view words and shading words of the longest pair caption, with both end marks
WIDTH = 128  # text width
LEVELS = (112, 192)  # channels of the UNets at 16 x 16 and at 8 x 8
PIXEL_PATCH = LATENT_PATCH = 4
LATENT_CHANNELS = 4
LATENT_GAIN, LATENT_MEAN = 2.0, 0.6  # where the autoencoder's colour channels start: 2 (sRGB - 0.6), well inside +-3
WEIGHTS = Path(__file__).parent / "weights"  # prior/ (pixel), latent/ and clip/ below it
VIEW_WORDS = (",", "front", "side", "back", "overhead", "left", "right", "view", "clay", "render")


def make_tokenizer(eos: int = 2):
    """A word-level PreTrainedTokenizerFast over the world's words and the view words; [UNK] marks the rest.

    Args:
        eos: id of [EOS], 2 or 3 ([UNK] takes the other). The CLIP needs 3: where eos_token_id is 2, transformers pools
            a CLIP text at its highest token id (a fix-up for OpenAI's configs), here some word in mid-sentence.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[BOS]", *(["[EOS]", "[UNK]"] if eos == 2 else ["[UNK]", "[EOS]"])]
    vocabulary = specials + [w for w in dict.fromkeys([*VIEW_WORDS, *sorted(words())])]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", eos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TOKENS,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
    )


def make_text_encoder(vocabulary: int):
    """A two-layer CLIPTextModel of width 128, trained together with the pixel UNet."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def make_unet(channels: int):
    """A UNet2DConditionModel on a 16 x 16 grid of patches with `channels` numbers each."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=LEVELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=32,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def make_camera(channels: int):
    """What tells a UNet of make_unet(channels) camera, light and backdrop."""
    from stages.guidance.diffusion.camera import CameraLayout

    return CameraLayout(WIDTH, LEVELS, channels)


def make_scheduler():
    """Cosine noise schedule, v prediction (Salimans & Ho 2022)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )


def make_vae():
    """An AutoencoderTiny, 8x down to 4 channels: 512x512 encodes forward and backward in a fraction of a second.

    It starts as an image pyramid: three channels carry the 8x8 averages of red, green and blue through encoder and
    decoder, everything else adds nothing yet. From a random start the colours alone take most of a short training.
    """
    import torch
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(24, 24, 24, 24),
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=(2, 2, 1, 1),
    )
    rgb = torch.arange(3)

    @torch.no_grad()
    def carry(conv: torch.nn.Conv2d, gain: float = 1.0, bias: float = 0.0) -> None:
        """Make a convolution hand its first three channels on: averaged when it has stride 2, as they are otherwise."""
        conv.weight[rgb] = 0
        taps = ((1, 1), (1, 2), (2, 1), (2, 2)) if conv.stride[0] == 2 else ((1, 1),)
        for y, x in taps:
            conv.weight[rgb, rgb, y, x] = gain / len(taps)
        if conv.bias is not None:
            conv.bias[rgb] = bias

    for layers in (vae.encoder.layers, vae.decoder.layers):
        for module in layers:
            if isinstance(module, torch.nn.Conv2d):
                carry(module)
            elif hasattr(module, "conv"):  # a residual block: what it adds begins at nothing
                with torch.no_grad():
                    module.conv[-1].weight[rgb] = 0
                    module.conv[-1].bias[rgb] = 0
    carry(vae.encoder.layers[-1], LATENT_GAIN, -LATENT_GAIN * LATENT_MEAN)
    first = next(m for m in vae.decoder.layers if isinstance(m, torch.nn.Conv2d))
    carry(first, 1 / LATENT_GAIN, LATENT_MEAN)
    return vae


def make_clip(vocabulary: int):
    """A CLIPModel for scores, for `make_tokenizer(CLIP_EOS)`: a ViT on 8 x 8 patches of 64x64 and a text tower."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": CLIP_EOS,
    }
    vision = {
        "hidden_size": 144,
        "intermediate_size": 432,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))
