"""Random diffusers folders of SDXL, Stable Diffusion 3 and Flux: tens of thousands of parameters, loaded as real."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny_folders import byte_tokenizer, save_folder, tiny_unet, word_tokenizer

BYTES, LENGTH = 514, 40  # tokens of byte_tokenizer, and how many of them an encoder reads


def clip(width: int, projection: int | None = None):
    """A CLIP text encoder, with a projected pooled embedding if asked; the pooled token is that of the largest id."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=BYTES,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=projection or width,
        bos_token_id=512,
        eos_token_id=2,
        pad_token_id=1,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def t5(width: int):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def vae(channels: int, **extra):
    """AutoencoderKL, eight pixels a latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        sample_size=64,
        **extra,
    )


def tiny_vae(channels: int):
    """AutoencoderTiny, eight pixels a latent, scaled as taef1 and taesd3 are."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
        latent_channels=channels,
        scaling_factor=1.0,
    )


def sdxl(folder: Path, prediction: str = "epsilon") -> Path:
    """Two CLIP encoders, pooled text and sizes added to the time; images of 64x64."""
    from diffusers import EulerDiscreteScheduler

    torch.manual_seed(4)
    unet = tiny_unet(
        4,
        4,
        8,
        width=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    spacing = dict(timestep_spacing="leading", steps_offset=1)  # whole timesteps, as SDXL's own config has it
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, **spacing
    )
    return save_folder(
        folder,
        "StableDiffusionXLPipeline",
        tokenizer=byte_tokenizer(folder / "tokenizer"),
        tokenizer_2=byte_tokenizer(folder / "tokenizer_2"),
        text_encoder=clip(16),
        text_encoder_2=clip(24, projection=20),
        unet=unet,
        vae=vae(4, scaling_factor=0.13025),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
    )


def sd3(folder: Path, shift: float = 3.0, with_t5: bool = True) -> Path:
    """Two projected CLIP encoders and T5, joint attention, rectified flow; images of 64x64."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    torch.manual_seed(5)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=12 + 20,
        pos_embed_max_size=8,
    )
    last = {"tokenizer_3": word_tokenizer(), "text_encoder_3": t5(48)} if with_t5 else {}
    return save_folder(
        folder,
        "StableDiffusion3Pipeline",
        tokenizer=byte_tokenizer(folder / "tokenizer"),
        tokenizer_2=byte_tokenizer(folder / "tokenizer_2"),
        text_encoder=clip(16, projection=12),
        text_encoder_2=clip(24, projection=20),
        **last,
        transformer=transformer,
        vae=vae(4, scaling_factor=1.5305, shift_factor=0.0609),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )


def flux(folder: Path, guidance: bool = True) -> Path:
    """CLIP for the pooled embedding, T5 for the tokens, packed latents, dynamic shifting, tiny autoencoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(6)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    dynamic = dict(shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    return save_folder(
        folder,
        "FluxPipeline",
        tokenizer=byte_tokenizer(folder / "tokenizer"),
        tokenizer_2=word_tokenizer(),
        text_encoder=clip(32),
        text_encoder_2=t5(24),
        transformer=transformer,
        vae=tiny_vae(4),
        scheduler=FlowMatchEulerDiscreteScheduler(**dynamic),
    )
