"""Finished students and style LoRAs of the toy teachers, made quickly: with small random changes, not trained."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextModel

from lcm_distill.export.weights import export_full_student, export_lora_student
from lcm_distill.models.families import FAMILIES
from lcm_distill.models.lora import Lora
from lcm_distill.models.teacher import Teacher
from lcm_distill.models.unets import student_from_teacher, target_from_student
from lcm_distill.objective.schedule import build_lcm_scheduler

GRID = 20  # points of the students' solver; Diffusers' default is 50
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _unet(teacher: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")


def _perturb(parameters, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += spread * torch.randn(parameter.shape, generator=generator)


def full_student(folder: Path, teacher: str, family: str, *, seed: int = 0) -> str:
    """The output folder of a full distillation, whose U-Net depends on the guidance."""
    student = student_from_teacher(_unet(teacher), 64)
    _perturb([student.time_embedding.cond_proj.weight, student.conv_out.weight], seed, 0.05)
    target = target_from_student(student)
    _perturb([target.conv_out.weight], seed + 1, 0.05)
    export_full_student(
        str(folder),
        student=student,
        target=target,
        scheduler=build_lcm_scheduler(SCHEDULE, GRID, 5.0),
        teacher=Teacher(teacher),
        family=FAMILIES[family],
        guidance_scale=8.0,
        global_step=1,
        settings={},
    )
    return str(folder)


def lora_student(folder: Path, teacher: str, family: str, *, seed: int = 0) -> str:
    """The output folder of a LoRA distillation."""
    torch.manual_seed(seed)
    lora = Lora(_unet(teacher), rank=2, alpha=4)
    _perturb(lora.parameters(), seed, 0.03)
    export_lora_student(
        str(folder),
        lora=lora,
        scheduler=build_lcm_scheduler(SCHEDULE, GRID, 5.0),
        teacher=Teacher(teacher),
        family=FAMILIES[family],
        global_step=1,
        settings={},
    )
    return str(folder)


def style_lora(folder: Path, teacher: str, family: str) -> str:
    """A LoRA as other tools train them: for the attention of the U-Net and of the (first) text encoder, in one file."""
    unet, text_encoder = _unet(teacher), CLIPTextModel.from_pretrained(teacher, subfolder="text_encoder")
    states = []
    for network, modules in ((unet, ["to_q", "to_v"]), (text_encoder, ["q_proj", "v_proj"])):
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=modules))
        _perturb([p for name, p in network.named_parameters() if "lora_" in name], 7, 0.1)
        states.append(get_peft_model_state_dict(network, adapter_name="default"))
    FAMILIES[family].PIPELINE.save_lora_weights(folder, unet_lora_layers=states[0], text_encoder_lora_layers=states[1])
    return str(folder)
