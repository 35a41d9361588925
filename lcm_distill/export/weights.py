"""The result of a finished run: weights that load with one line, a scheduler, a model card."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file

from lcm_distill.distributed.finite import HALF, check_finite
from lcm_distill.distributed.fsdp import check_network, save_network
from lcm_distill.errors import DivergenceError, SaveError
from lcm_distill.export.card import build_model_card, parse_hub_id, strip_folders
from lcm_distill.export.hub import HubUpload
from lcm_distill.models.families import Family
from lcm_distill.models.lora import STUDENT, TARGET, Lora
from lcm_distill.models.teacher import Teacher

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
# What is uploaded: only what users load (no checkpoints, optimizer states, logs or reports), besides the card and the
# one picture that it shows.
UPLOADED = (
    "config.json",
    "scheduler_config.json",
    "diffusion_pytorch_model*",
    "unet/*",
    "unet_target/*",
    "pytorch_lora_weights.safetensors",
    "kohya_lora_weights.safetensors",
    "adapter/*",
)


def export_full_student(
    output_dir: str,
    *,
    student: UNet2DConditionModel,
    target: UNet2DConditionModel,
    scheduler: LCMScheduler,
    teacher: Teacher,
    family: Family,
    guidance_scale: float,
    global_step: int,
    settings: dict[str, Any],
    hub: HubUpload | None = None,
    measured: Mapping[str, float] | None = None,
) -> None:
    """Writes `unet/`, `unet_target/`, and at the top the model with its fp16 variant, scheduler and card.

    Every rank calls it, since split networks are gathered first; the main process does the rest. `DivergenceError` if
    weights are not finite, or too large for float16: then nothing is written. `SaveError` if it cannot be written.

    The model at the top is the student, so that `UNet2DConditionModel.from_pretrained(output_dir)` and, with
    `variant="fp16"`, its half-precision copy both load. The card names the `teacher`, a guidance_scale to use, the
    steps trained, the run's `settings` and what was `measured`, numbers by a description. What users load is staged for
    the `hub`, if there is one; its `push` uploads it. `family` is the module `sd` or `sdxl`.
    """
    folder = Path(output_dir)
    with _refusing():
        check_network(student, "the student", largest=HALF)
        check_network(target, "the target")
    for network in (student, target):
        network.register_to_config(_name_or_path="")  # else the config has the path of the teacher on this machine
    with _writing(folder, global_step):
        save_network(student, folder / "unet", folder)
        save_network(target, folder / "unet_target")
        if not PartialState().is_main_process:
            return
        # Loading also checks that what was saved loads.
        half = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)
        half.register_to_config(_name_or_path="")
        half.save_pretrained(folder, variant="fp16")
        scheduler.save_pretrained(folder)
    _finish(
        folder,
        hub,
        global_step,
        teacher=teacher,
        usage=lambda name, teacher: _FULL_USAGE.format(
            model=name, load=teacher.loading_code(family.PIPELINE, "unet=unet"), guidance_scale=guidance_scale
        ),
        note="`guidance_scale` is w + 1, with w the guidance of the LCM paper (arXiv 2310.04378).",
        relation="finetune",
        settings=settings,
        tags=family.TAGS,
        measured=measured,
    )


def export_lora_student(
    output_dir: str,
    *,
    lora: Lora,
    scheduler: LCMScheduler,
    teacher: Teacher,
    family: Family,
    global_step: int,
    settings: dict[str, Any],
    hub: HubUpload | None = None,
    measured: Mapping[str, float] | None = None,
) -> None:
    """Writes the student's LoRA for Diffusers and for ComfyUI and A1111, its PEFT adapter, scheduler and card.

    `pytorch_lora_weights.safetensors` is what `pipe.load_lora_weights(output_dir)` loads, with its alpha;
    `kohya_lora_weights.safetensors` holds the same weights under kohya's names. Both are float16, as shared LoRAs
    are; `adapter/` is the float32 adapter. The LoRA of an averaged target is in `target/`. `family`, card, `hub`
    and errors are as for a full student. Every rank may call it; only the main process writes.
    """
    if not PartialState().is_main_process:
        return
    folder = Path(output_dir)
    with _refusing():
        check_finite("the student", lora.state_dict(STUDENT).items(), largest=HALF)
        if lora.average:
            check_finite("the target", lora.state_dict(TARGET).items(), largest=HALF)
    with _writing(folder, global_step):
        lora.part(STUDENT).save(folder / "adapter")
        save_lora(folder, lora, STUDENT, family=family)
        if lora.average:
            save_lora(folder / "target", lora, TARGET, family=family)
        scheduler.save_pretrained(folder)
    _finish(
        folder,
        hub,
        global_step,
        teacher=teacher,
        usage=lambda name, teacher: _LORA_USAGE.format(model=name, load=teacher.loading_code(family.PIPELINE)),
        note="The guidance of the training is in the weights, so use a `guidance_scale` of 1 to 2; above 1, "
        "negative prompts have an effect. It can be combined with a style LoRA by `pipe.set_adapters`, and works on "
        "fine-tunes of its teacher. `kohya_lora_weights.safetensors` is the same LoRA for ComfyUI and A1111: "
        "sampler LCM, 2 to 8 steps, CFG 1 to 2.",
        relation="adapter",
        settings=settings,
        tags=["lora", *family.TAGS],
        measured=measured,
    )


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Says of weights that are not finite that they are no result, and what to do."""
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(
            f"the result is not written: {error}. Resume from an earlier checkpoint (--resume_from_checkpoint "
            "checkpoint-N) with a lower --learning_rate, or a lower --max_grad_norm."
        ) from None


@contextlib.contextmanager
def _writing(folder: Path, global_step: int) -> Iterator[None]:
    """Turns an error into a `SaveError`: the run is over, but its last checkpoint, if there is one, has the result."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a full disk is a different exception in each writer
        last = f"checkpoint-{global_step}"
        if (folder / last / "run.json").is_file():
            remedy = f"launch again with --resume_from_checkpoint latest: with {last} that only writes it."
        elif any(_CHECKPOINT.fullmatch(path.parent.name) for path in folder.glob("checkpoint-*/run.json")):
            remedy = (
                f"launch again with --resume_from_checkpoint latest: {last} was not written either, so that the run "
                "continues from the checkpoint before it."
            )
        else:
            remedy = "launch again: no checkpoint was written, so that the run starts anew."
        raise SaveError(
            f"the result could not be written ({type(error).__name__}: {error}). Free disk space in {folder}, then "
            f"{remedy}"
        ) from error


def _finish(
    folder: Path,
    hub: HubUpload | None,
    global_step: int,
    *,
    teacher: Teacher,
    usage: Callable[[str, Teacher], str],
    settings: Mapping[str, Any],
    **card: Any,
) -> None:
    """Writes the card and stages the upload. `usage` makes the card's code from the model's name and its teacher."""
    licence, name, shown = {}, str(folder), teacher
    if hub:
        licence = hub.ensure_repository(parse_hub_id(teacher.model))
        name = hub.repo_id
        # The public must not see the folders of this machine.
        places = {field: strip_folders(getattr(teacher, field)) for field in ("model", "vae", "config")}
        shown = dataclasses.replace(teacher, **places)
    picture = f"validation/step-{global_step:06d}.png"
    has_picture = (folder / picture).is_file()
    with _writing(folder, global_step):
        build_model_card(
            Path(name).resolve().name,
            base_model=teacher.model,
            usage=usage(name, shown),
            settings={**settings, "max_train_steps": global_step},
            picture=picture if has_picture else None,
            licence=licence,
            **card,
        ).save(folder / "README.md")
    logger.info("the result is in %s", folder)
    if hub:
        hub.stage(
            ["README.md", *_list_uploaded(folder), *([picture] if has_picture else [])],
            f"Distilled for {global_step} steps",
        )


def _list_uploaded(folder: Path) -> list[str]:
    """The files in `folder` that match `UPLOADED`."""
    found = [path for pattern in UPLOADED for path in sorted(folder.glob(pattern)) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in found]


def save_lora(folder: Path, lora: Lora, adapter: str, *, family: Family) -> None:
    """One adapter as float16 LoRA files in `folder`: Diffusers' format with alpha, and kohya's."""
    base_model_version = family.base_model_version(lora.unet.config)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.float16).cpu() for name, tensor in lora.state_dict(adapter).items()}
    # Only the configuration that every version of PEFT has, so that older ones load the file. Not the dropout:
    # Diffusers would create dropout layers, in training mode.
    known = ("r", "lora_alpha", "bias", "target_modules")
    config = {name: value for name, value in lora.config.to_dict().items() if name in known}
    config["target_modules"] = sorted(config["target_modules"])
    family.PIPELINE.save_lora_weights(folder, unet_lora_layers=weights, unet_lora_adapter_metadata=config)

    kohya = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in weights.items()})
    alpha = torch.tensor(float(lora.config.lora_alpha), dtype=torch.float32)
    kohya = {name: alpha.clone() if name.endswith(".alpha") else tensor for name, tensor in kohya.items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in kohya.items()},
        folder / "kohya_lora_weights.safetensors",
        metadata={
            "format": "pt",
            "ss_base_model_version": base_model_version,
            "ss_v2": str(base_model_version.startswith("sd_v2")),
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(lora.config.r),
            "ss_network_alpha": str(float(lora.config.lora_alpha)),
        },
    )


_LORA_USAGE = """\
import torch
from diffusers import LCMScheduler

{load}
pipe.scheduler = LCMScheduler.from_pretrained({model!r})
pipe.load_lora_weights({model!r})
picture = pipe("your prompt", num_inference_steps=4, guidance_scale=1.0).images[0]"""

_FULL_USAGE = """\
import torch
from diffusers import LCMScheduler, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained({model!r}, torch_dtype=torch.float16, variant="fp16")
{load}
pipe.scheduler = LCMScheduler.from_pretrained({model!r})
picture = pipe("your prompt", num_inference_steps=4, guidance_scale={guidance_scale:g}).images[0]"""
