"""Random diffusers folders of a few hundred thousand parameters, one for each prior family, built for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = "a red blue green mug ball chair cat , front side left right back overhead view clay render of".split()
LENGTH = 16


def word_tokenizer(words: list[str] | None = None, length: int = LENGTH):
    """A WordLevel PreTrainedTokenizerFast with [UNK] and fixed padding, as the pocket world's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
    vocabulary = {word: i for i, word in enumerate(special + (words or WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    tokenizer.enable_padding(length=length, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(length)
    names = dict(pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names)


def byte_tokenizer(folder: Path):
    """A real CLIPTokenizer over single bytes, without merges: knows every string, no unknown token ever."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=40)


def clip_text_encoder(width: int = 32, vocabulary: int = 64, length: int = LENGTH):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return CLIPTextModel(config)


def tiny_unet(channels: int, out_channels: int, sample_size: int, width: int = 32, **extra):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=out_channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **extra,
    )


def save_folder(folder: Path, pipeline: str, **parts) -> Path:
    """Write components and model_index.json the way DiffusionPipeline.save_pretrained does; flags go in as they are."""
    index: dict[str, object] = {"_class_name": pipeline, "_diffusers_version": "0.30.0"}
    for name, part in parts.items():
        if isinstance(part, bool):
            index[name] = part
            continue
        part.save_pretrained(str(folder / name))
        library = "diffusers" if type(part).__module__.startswith("diffusers") else "transformers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def stable_diffusion(folder: Path, prediction: str = "epsilon", zero_snr: bool = False) -> Path:
    """Latent, AutoencoderKL (8x), CLIP tokenizer and text encoder; images of 64x64."""
    from diffusers import AutoencoderKL, PNDMScheduler

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    if zero_snr:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction,
            rescale_betas_zero_snr=True,
            steps_offset=1,
            clip_sample=False,
        )
    return save_folder(
        folder,
        "StableDiffusionPipeline",
        tokenizer=byte_tokenizer(folder / "tokenizer"),
        text_encoder=clip_text_encoder(vocabulary=514, length=40),
        unet=tiny_unet(4, 4, 8),
        vae=vae,
        scheduler=scheduler,
    )


def pocket_latent(folder: Path, patch: int = 2) -> Path:
    """Latent, AutoencoderTiny (4x) seen by the UNet in patches, word tokenizer, v prediction; images of 64x64."""
    from diffusers import AutoencoderTiny, DDPMScheduler

    torch.manual_seed(1)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
        scaling_factor=0.7,
    )
    save_folder(
        folder,
        "StableDiffusionPipeline",
        tokenizer=word_tokenizer(),
        text_encoder=clip_text_encoder(),
        unet=tiny_unet(4 * patch**2, 4 * patch**2, 16 // patch),
        vae=vae,
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    )
    (folder / "pocket.json").write_text(json.dumps({"words": WORDS}))
    return folder


def pocket_pixel(folder: Path, patch: int = 4) -> Path:
    """Pixels in patches, pooled text added to the time embedding, word tokenizer, v prediction; images of 32x32."""
    from diffusers import DDPMScheduler

    torch.manual_seed(2)
    channels = 3 * patch**2
    extra = dict(addition_embed_type="text", addition_embed_type_num_heads=4, encoder_hid_dim=32)
    return save_folder(
        folder,
        "IFPipeline",
        tokenizer=word_tokenizer(),
        text_encoder=clip_text_encoder(),
        unet=tiny_unet(channels, channels, 32 // patch, **extra),
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    )


def deepfloyd(folder: Path, length: int = LENGTH) -> Path:
    """Pixels, T5, learned variance (six output channels), epsilon prediction; images of 16x16."""
    from diffusers import DDPMScheduler
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    text_encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    extra = dict(addition_embed_type="text", addition_embed_type_num_heads=4, encoder_hid_dim=24)
    return save_folder(
        folder,
        "IFPipeline",
        tokenizer=word_tokenizer(length=length),
        text_encoder=text_encoder,
        unet=tiny_unet(3, 6, 16, **extra),
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", variance_type="learned_range"
        ),
    )
