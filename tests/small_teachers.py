"""The teachers of most tests: building and saving networks is most of a short run's time."""

import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

TOY = Path(__file__).resolve().parents[1] / "toy" / "teachers"
TEACHERS: dict[str, str] = {}  # folders by family; a fixture makes them before the first test


def make_small_teachers(folder: Path) -> None:
    """The toy teachers with smaller U-Nets of random weights; tests of pictures and golden values take the toy's."""
    for family in ("sd", "sdxl"):
        shutil.copytree(TOY / family, folder / family, ignore=shutil.ignore_patterns("unet"))
        config = dict(UNet2DConditionModel.load_config(TOY / family, subfolder="unet")) | {
            "block_out_channels": (8, 16),
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 2),
            "transformer_layers_per_block": (1, 2) if family == "sdxl" else 1,
        }
        torch.manual_seed(0)
        UNet2DConditionModel.from_config(config).half().save_pretrained(folder / family / "unet")
        TEACHERS[family] = str(folder / family)
