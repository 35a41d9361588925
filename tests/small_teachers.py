"""Teachers that are made, saved and trained quickly."""

import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

TOY = Path(__file__).resolve().parents[1] / "toy" / "teachers"


def make_small_teacher(family: str, parent: Path) -> Path:
    """The toy teacher with a smaller U-Net of random weights, in a folder of its own in `parent`."""
    folder = parent / family
    shutil.copytree(TOY / family, folder, ignore=shutil.ignore_patterns("unet"))
    config = dict(UNet2DConditionModel.load_config(TOY / family, subfolder="unet")) | {
        "block_out_channels": (8, 16),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 2),
        "transformer_layers_per_block": (1, 2) if family == "sdxl" else 1,
    }
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).half().save_pretrained(folder / "unet")
    return folder
