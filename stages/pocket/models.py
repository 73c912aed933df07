"""The pocket models' architectures and their folders: tokenizer, text encoder, two UNets, autoencoder, CLIP.

All are ordinary transformers / diffusers classes saved in their ordinary folder formats, so any other tool opens
them and the toolkit opens any other model by the same code. Two choices keep them small enough for a CPU:

Patches. The pixel UNet sees 64x64x3 images unshuffled by 4 on a 16 x 16 grid (48 channels), the latent UNet 64x64x12
latents unshuffled by 2 on a 32 x 32 grid (48 channels). Unshuffling is orthogonal, so noise and v predictions carry
over unchanged; the loader reads the patch from `in_channels`. Attention runs at 16 x 16 and below.
Layout. A small volume for each object that the words name, looked into by the camera, tells a UNet what is where, in
four of five training batches (stages/guidance/diffusion/layout.py); without it the UNets are ordinary text-to-image
models.
Text. As in DeepFloyd IF, a pooled text embedding joins the time embedding and the attention sees the words.
"""

from __future__ import annotations

from pathlib import Path

from stages.pocket.palette import COLOURS
from stages.pocket.pattern import PATTERNS
from stages.pocket.world import KINDS, RELATIONS, words

CHANNELS = (48, 32, 32)  # of a layout's volume at 8, 16 and 32 cells a side
PAINTS = 48  # of its palettes: the world's parts are painted in some forty ways
CLIP_EOS = 3  # see make_tokenizer
TOKENS = 20  # caption, view words and shading words of the longest pair caption, with both end marks
WIDTH = 128  # text width
GRID = {"pixel": 16, "latent": 32}  # finest features of the UNets
LEVELS = {"pixel": (112, 192), "latent": (64, 128, 192)}  # channels of the UNets, halved in size from level to level
PICTURE = {"pixel": 64, "latent": 128}  # side in pixels of the layout's picture for each
EDGES = 128  # width of the network that makes latents of that picture
PIXEL_LAYOUT = "../../pixel/layout"  # the layout that the latent prior shares; its adapter is its own
PIXEL_PATCH, LATENT_PATCH = 4, 2
LATENT_CHANNELS = 12
LATENT_GAIN, LATENT_MEAN = 2.0, 0.6  # where the autoencoder's colour channels start: 2 (sRGB - 0.6), well inside +-3
WEIGHTS = Path(__file__).parent / "weights"  # prior/ (pixel), latent/ and clip/ below it
VIEW_WORDS = (",", "front", "side", "back", "overhead", "left", "right", "view", "clay", "render")


def make_tokenizer(eos: int = 2):
    """Return a word-level PreTrainedTokenizerFast over the world's words and the view words; [UNK] marks the rest.

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
    """Return a two-layer CLIPTextModel of width 128, which all pocket priors share."""
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


def make_unet(prior: str):
    """Return the UNet2DConditionModel of the pixel or the latent prior, on its grid of patches."""
    from diffusers import UNet2DConditionModel

    channels = 3 * PIXEL_PATCH**2 if prior == "pixel" else LATENT_CHANNELS * LATENT_PATCH**2
    levels = LEVELS[prior]
    return UNet2DConditionModel(
        sample_size=GRID[prior],
        in_channels=channels,
        out_channels=channels,
        block_out_channels=levels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *["SimpleCrossAttnDownBlock2D"] * (len(levels) - 1)),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * (len(levels) - 1), "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=32,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def make_condition(prior: str, layout):
    """Return the adapter between a layout and the UNet of a prior."""
    from stages.guidance.diffusion.layout_condition import LayoutCondition

    latents = LATENT_CHANNELS if prior == "latent" else 0
    return LayoutCondition(layout, PICTURE[prior], GRID[prior], LEVELS[prior], latents, EDGES if latents else 0)


def make_layout(fine: bool = True):
    """Return the layout that both priors share, for this world's words."""
    from stages.guidance.diffusion.layout import Layout

    words = {"kinds": list(KINDS), "patterns": list(PATTERNS), "colours": list(COLOURS)}
    joints = [word for relation in RELATIONS.values() for word in relation]
    return Layout(WIDTH, words | {"joints": joints}, channels=CHANNELS, paints=PAINTS, fine=fine)


def load_layout(state: Path):
    """Load a layout from the tensors that its trainer writes."""
    from safetensors.torch import load_file

    tensors = load_file(state)
    layout = make_layout(fine="eighths" in tensors)
    layout.load_state_dict({k: v.float() for k, v in tensors.items()})
    return layout.eval().requires_grad_(False)


def make_scheduler():
    """Return the scheduler: cosine noise schedule, v prediction (Salimans & Ho 2022)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )


def make_vae():
    """Return an AutoencoderTiny, 8x down to 12 channels; 512x512 takes a fraction of a second forward and backward.

    It starts as an image pyramid: three channels carry averages of red, green and blue through encoder and decoder,
    four times as many where the encoder ends: those of the four quarters of each 8x8 block. Everything else adds
    nothing yet. From a random start the colours alone take most of a short training.
    """
    import torch
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(24, 24, 24, 24),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(3, 3, 1, 0),
    )
    rgb = torch.arange(3)

    @torch.no_grad()
    def carry(conv: torch.nn.Conv2d, parts: int = 1) -> None:
        """Make a convolution pass its first channels on, averaged if it has stride 2, unchanged otherwise."""
        conv.weight[: 3 * parts] = 0
        taps = ((1, 1), (1, 2), (2, 1), (2, 2)) if conv.stride[0] == 2 else ((1, 1),)
        for part in range(parts):
            for k, (y, x) in enumerate(taps):
                weight = float(k == part) if conv.stride[0] == 2 and parts > 1 else 1 / len(taps)
                source = rgb if conv.stride[0] == 2 else rgb + 3 * part
                conv.weight[rgb + 3 * part, source, y, x] = weight
        if conv.bias is not None:
            conv.bias[: 3 * parts] = 0

    halvings = [m for m in vae.encoder.layers if isinstance(m, torch.nn.Conv2d) and m.stride[0] == 2]
    parts = 1
    for layers in (vae.encoder.layers, vae.decoder.layers):
        for module in layers:
            if isinstance(module, torch.nn.Conv2d):
                parts = 4 if module is halvings[-1] else parts
                carry(module, parts)
            elif hasattr(module, "conv"):  # a residual block: what it adds begins at nothing
                with torch.no_grad():
                    module.conv[-1].weight[: 3 * parts] = 0
                    module.conv[-1].bias[: 3 * parts] = 0
        if layers is vae.encoder.layers:
            with torch.no_grad():
                layers[-1].weight[: 3 * parts] *= LATENT_GAIN
                layers[-1].bias[: 3 * parts] = -LATENT_GAIN * LATENT_MEAN
            parts = 1
    first = next(m for m in vae.decoder.layers if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        first.weight[rgb] = 0
        for part in range(4):
            first.weight[rgb, rgb + 3 * part, 1, 1] = 0.25 / LATENT_GAIN
        first.bias[rgb] = LATENT_MEAN
    return vae


def make_clip(vocabulary: int):
    """Return a CLIPModel for `make_tokenizer(CLIP_EOS)`: a ViT on 8 x 8 patches of 64x64 and a text tower."""
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
