"""Teachers as users have them: folders, variants, separate autoencoders, single files; mistakes in naming them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from lcm_distill import sd, sdxl
from lcm_distill.errors import UsageError
from lcm_distill.latents import vae_factor
from lcm_distill.teacher import Teacher, read_configs

CONFIGS = {"family": "sd", "resolution": 64, "num_ddim_timesteps": 50}


@pytest.fixture()
def configs_only(teacher, tmp_path) -> Path:
    """A copy of the teacher without weights: nothing could be loaded from it."""
    copy = tmp_path / "teacher"
    for part in ("unet", "vae", "scheduler"):
        (copy / part).mkdir(parents=True)
        for file in (Path(teacher) / part).glob("*.json"):
            shutil.copy(file, copy / part)
    return copy


def test_configs_say_what_is_wrong_before_weights_are_read(teacher, configs_only, tmp_path):
    """Every message names its flag."""
    configs = read_configs(Teacher(teacher), **CONFIGS)
    assert vae_factor(configs.vae) == 4
    copy = str(configs_only)
    read_configs(Teacher(copy), **CONFIGS)
    with pytest.raises(UsageError, match=r"--resolution 66 .*64 and 72"):
        read_configs(Teacher(copy), **CONFIGS | {"resolution": 66})
    with pytest.raises(UsageError, match="--num_ddim_timesteps 1001"):
        read_configs(Teacher(copy), **CONFIGS | {"num_ddim_timesteps": 1001})
    with pytest.raises(UsageError, match="--pretrained_teacher_model .*nowhere"):
        read_configs(Teacher(str(tmp_path / "nowhere")), **CONFIGS)
    with pytest.raises(UsageError, match="--pretrained_vae_model_name_or_path .*config.json"):
        read_configs(Teacher(copy, vae=str(tmp_path)), **CONFIGS)
    with pytest.raises(UsageError, match="--teacher_config is for a single-file teacher"):
        read_configs(Teacher(copy, config=copy), **CONFIGS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"time_cond_proj_dim": 256}, "is an LCM"),
        ({"addition_embed_type": "text_time"}, "train_lcm_distill_sdxl_wds.py or train_lcm_distill_lora_sdxl_wds.py"),
        ({"in_channels": 9}, "channels"),
    ],
)
def test_a_u_net_of_another_kind_is_refused(change, message, configs_only):
    path = configs_only / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=message):
        read_configs(Teacher(str(configs_only)), **CONFIGS)


def test_a_folder_without_a_u_net_is_refused(configs_only):
    shutil.rmtree(configs_only / "unet")
    with pytest.raises(UsageError, match="no unet/config.json"):
        read_configs(Teacher(str(configs_only)), **CONFIGS)


def test_a_hub_teacher_that_cannot_be_had_is_a_message():
    with pytest.raises(UsageError, match="--pretrained_teacher_model nobody/nothing"):
        read_configs(Teacher("nobody/nothing"), **CONFIGS)


def test_sd_and_sdxl_teachers_are_told_apart(teachers):
    read_configs(Teacher(teachers["sdxl"]), **CONFIGS | {"family": "sdxl"})
    with pytest.raises(UsageError, match="train_lcm_distill_sdxl_wds.py"):
        read_configs(Teacher(teachers["sdxl"]), **CONFIGS)
    with pytest.raises(UsageError, match="train_lcm_distill_sd_wds.py"):
        read_configs(Teacher(teachers["sd"]), **CONFIGS | {"family": "sdxl"})
