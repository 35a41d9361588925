"""Full students: a U-Net that starts as its teacher, its target, how they are checked, saved, sped up."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.utils import is_xformers_available

from lcm_distill.distributed.compiling import compile_networks
from lcm_distill.distributed.fsdp import load_network, save_network
from lcm_distill.errors import brief
from lcm_distill.flags import FullStudentFlags, SpeedFlags
from lcm_distill.models.norms import set_norm_precision
from lcm_distill.objective.consistency import guidance_embedding

logger = logging.getLogger(__name__)


def full_student_architecture(teacher_config: Mapping[str, Any], flags: FullStudentFlags) -> dict[str, Any]:
    """The architecture of a full student of this teacher: a checkpoint's must be equal for its weights to fit."""
    return architecture({**teacher_config, "time_cond_proj_dim": flags.unet_time_cond_proj_dim})


def student_from_teacher(teacher: UNet2DConditionModel, time_cond_proj_dim: int) -> UNet2DConditionModel:
    """A float32 copy of `teacher`, on the CPU, that takes a guidance embedding (`timestep_cond`, `[B, dim]`).

    The projection of the embedding starts at zero, so that the untrained student equals the teacher for every w.
    """
    with init_empty_weights():  # initializing weights at random, to be replaced, would take longer than all the rest
        student = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=time_cond_proj_dim)
    weights = {name: weight.to("cpu", torch.float32, copy=True) for name, weight in teacher.state_dict().items()}
    projection = "time_embedding.cond_proj.weight"
    weights[projection] = torch.zeros(student.get_parameter(projection).shape)
    student.load_state_dict(weights, assign=True)
    return student.train()


@torch.no_grad()
def bake_guidance(student: UNet2DConditionModel, guidance_w: float) -> UNet2DConditionModel:
    """The U-Net that a full student is at one `guidance_w`, the w of the LCM paper: without a guidance embedding.

    What the embedding e of w adds in front of the first layer of the time embedding, W (t + P e) + b, goes into that
    layer's bias: b + W P e, summed in float64. All other weights are shared with `student`, which stays as it is.
    """
    embedding = guidance_embedding(torch.tensor([guidance_w]), student.config.time_cond_proj_dim)
    weights = dict(student.state_dict())
    projection = weights.pop("time_embedding.cond_proj.weight").double()
    weight, bias = (weights[f"time_embedding.linear_1.{name}"] for name in ("weight", "bias"))
    added = weight.double() @ (projection @ embedding[0].to(projection))
    weights["time_embedding.linear_1.bias"] = (bias.double() + added).to(bias.dtype)
    with init_empty_weights():
        baked = UNet2DConditionModel.from_config({**student.config, "time_cond_proj_dim": None})
    baked.load_state_dict(weights, assign=True)
    return baked.requires_grad_(False).eval()


def target_from_student(student: UNet2DConditionModel) -> UNet2DConditionModel:
    """The target: a frozen float32 copy in eval mode (no dropout)."""
    return copy.deepcopy(student).requires_grad_(False).eval()


def cast(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts a frozen network in place, with `nn.Module.to`: Diffusers' warns about modules that the network lacks."""
    torch.nn.Module.to(network, dtype=dtype)


def to_channels_last(*networks: torch.nn.Module) -> None:
    """Puts convolutions' weights in channels-last memory format, in place.

    A convolution then returns its output in that format, and accepts either. Results are equal up to rounding.
    """
    for network in networks:
        torch.nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]


class UNetPart:
    """A U-Net as a part of a checkpoint, in Diffusers' format; complete even if it is split over ranks."""

    def __init__(self, unet: UNet2DConditionModel):
        self._unet = unet

    def save(self, folder: Path) -> None:
        save_network(self._unet, folder)

    def load(self, folder: Path) -> None:
        load_network(self._unet, folder)


@contextlib.contextmanager
def keeping_config(unet: UNet2DConditionModel) -> Iterator[None]:
    """Restores the config of `unet` afterwards: Diffusers' SD pipelines replace a small sample_size of an old one."""
    before = dict(unet.config)
    try:
        yield
    finally:
        changed = {key: value for key, value in before.items() if unet.config[key] != value}
        if changed:
            unet.register_to_config(**changed)


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """What two U-Nets must share for one's weights to fit the other: the config, without names and versions."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if not key.startswith("_") and key != "sample_size"
    }


def apply_speed_flags(flags: SpeedFlags, trained: UNet2DConditionModel, *others: UNet2DConditionModel) -> None:
    """Sets memory format, norms, attention, gradient checkpointing, compilation; in place."""
    if flags.channels_last:
        to_channels_last(trained, *others)
    set_norm_precision(trained, *others, float32=flags.float32_norms)
    if flags.enable_xformers_memory_efficient_attention:
        enable_xformers(trained, *others)
    if flags.gradient_checkpointing:
        for unet in (trained, *others):  # has no effect without a backward pass; a teacher's is that of a fake score
            unet.enable_gradient_checkpointing()
    compile_networks(flags.compile, trained, *others)


def enable_xformers(*unets: UNet2DConditionModel) -> None:
    """Switches `unets` to xformers' attention; if that fails, logs one warning with the reason and keeps PyTorch's."""
    reason = None
    if not torch.cuda.is_available():
        reason = "it needs a CUDA GPU"
    elif not is_xformers_available():
        reason = 'the package xformers is not installed: pip install -e ".[xformers]"'
    else:
        try:
            for unet in unets:
                unet.enable_xformers_memory_efficient_attention()
        except Exception as error:  # xformers fails in many ways when built for another PyTorch or GPU
            reason = f"{brief(error).rstrip(':')}; `python -m xformers.info` lists what it can run here"
            for unet in unets:
                unet.disable_xformers_memory_efficient_attention()
    if reason:
        logger.warning("xformers' attention is not used (%s), but PyTorch's own", reason)
