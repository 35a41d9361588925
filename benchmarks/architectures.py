"""Teachers of the published shapes with random weights, written as Diffusers saves them: what a step costs depends on
shapes alone. Pictures and losses mean nothing here."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from toy.train_teacher import build_tokenizer

_SDXL = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
UNETS: dict[str, dict[str, Any]] = {
    "half": dict(cross_attention_dim=768, sample_size=64, block_out_channels=(160, 320, 640, 640)),  # of SD 1.5's
    "sd15": dict(cross_attention_dim=768, sample_size=64),
    "sdxl": _SDXL,
    "ssd1b": _SDXL
    | dict(
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[1, 2, 4],
        reverse_transformer_layers_per_block=[[4, 4, 10], [2, 1, 1], 1],
    ),
}
RESOLUTIONS = {"half": 256, "sd15": 512, "sdxl": 1024, "ssd1b": 1024}
_NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def is_sdxl(name: str) -> bool:
    return UNETS[name].get("addition_embed_type") == "text_time"


def build_vae(name: str) -> AutoencoderKL:
    """The autoencoder of the family; of half the width for "half". SDXL's is the one that is safe in half precision."""
    return AutoencoderKL(
        block_out_channels=(64, 128, 256, 256) if name == "half" else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=RESOLUTIONS[name],
        scaling_factor=0.13025 if is_sdxl(name) else 0.18215,
        force_upcast=False,
    )


def build_text_encoders(name: str, **tokens: int) -> list[Any]:
    """CLIP ViT-L's, and for SDXL the one of OpenCLIP ViT-bigG too; `tokens` are the ids that end a caption."""
    encoders = [
        CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                projection_dim=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                **tokens,
            )
        )
    ]
    if is_sdxl(name):
        encoders.append(
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=1280,
                    intermediate_size=5120,
                    projection_dim=1280,
                    num_hidden_layers=32,
                    num_attention_heads=20,
                    hidden_act="gelu",
                    **tokens,
                )
            )
        )
    return encoders


def write_teacher(name: str, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """A pipeline's folder: `name` of `UNETS`, weights drawn at random and saved in `dtype`, and the toy's tokenizer.

    Captions have 77 tokens as with the real one. The weights are drawn on the GPU if there is one.
    """
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    tokens = {f"{which}_token_id": getattr(tokenizer, f"{which}_token_id") for which in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            unet, vae = UNet2DConditionModel(**UNETS[name]), build_vae(name)
            text_encoders = build_text_encoders(name, **tokens)
    finally:
        torch.set_default_dtype(before)
    pipeline: Any
    if is_sdxl(name):
        pipeline = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text_encoders[0],
            text_encoder_2=text_encoders[1],
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=EulerDiscreteScheduler(**_NOISE),
            add_watermarker=False,
        )
    else:
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoders[0],
            tokenizer=tokenizer,
            unet=unet,
            scheduler=PNDMScheduler(**_NOISE, skip_prk_steps=True, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
