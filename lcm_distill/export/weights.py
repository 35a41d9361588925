"""The result of a finished run: weights that load with one line, a scheduler, a model card."""

import contextlib
import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file

from lcm_distill.distributed.finite import HALF, check_finite
from lcm_distill.distributed.fsdp import check_network, save_network
from lcm_distill.environment import respect_umask
from lcm_distill.errors import DivergenceError, SaveError, UsageError
from lcm_distill.export import usage
from lcm_distill.export.card import build_model_card, parse_hub_id, read_licence, strip_folders
from lcm_distill.export.hub import HubUpload
from lcm_distill.export.metadata import Description, last_picture, public_name, write_metadata
from lcm_distill.export.original import original_name, unet_modules
from lcm_distill.models.families import Family
from lcm_distill.models.lora import STUDENT, TARGET, Lora
from lcm_distill.models.teacher import Teacher
from lcm_distill.objective.schedule import sampling_sigmas

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
    usage.WORKFLOW,
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
        respect_umask(*folder.glob("*.safetensors"))
        scheduler.save_pretrained(folder)
    _finish(
        folder,
        hub,
        global_step,
        teacher=teacher,
        family=family,
        scheduler=scheduler,
        unet_config=student.config,
        code=lambda name, teacher: usage.full_code(
            name, teacher.code(family.PIPELINE, "unet=unet", **usage.CODE_OPTIONS), guidance_scale
        ),
        note="`guidance_scale` is w + 1, with w the guidance of the LCM paper (arXiv 2310.04378).",
        elsewhere=lambda name, title: usage.full_recipe(
            name, f"{title}.safetensors", guidance_scale, lower_start=usage.starts_lower(scheduler.config)
        ),
        hint=usage.usage_hint("full", guidance_scale),
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

    `pytorch_lora_weights.safetensors` is what `pipe.load_lora_weights(output_dir)` loads;
    `kohya_lora_weights.safetensors` holds the same weights under kohya's names. Both are float16, as shared LoRAs are,
    with the scale alpha / rank in the weights; `adapter/` is the float32 adapter, with its alpha. The LoRA of an
    averaged target is in `target/`. `family`, card, `hub` and errors are as for a full student. Every rank may call it;
    only the main process writes.
    """
    if not PartialState().is_main_process:
        return
    folder = Path(output_dir)
    with _refusing():
        check_finite("the student", lora_weights(lora, STUDENT).items(), largest=HALF)
        if lora.average:
            check_finite("the target", lora_weights(lora, TARGET).items(), largest=HALF)
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
        family=family,
        scheduler=scheduler,
        unet_config=lora.unet.config,
        code=lambda name, teacher: usage.lora_code(name, teacher.code(family.PIPELINE, **usage.CODE_OPTIONS)),
        note="The guidance of the training is in the weights, so use a `guidance_scale` of 1 to 2; above 1, "
        "negative prompts have an effect. It can be combined with a style LoRA by `pipe.set_adapters`, and works on "
        f"fine-tunes of its teacher. `{usage.KOHYA_FILE}` is the same LoRA for other programs.",
        elsewhere=lambda *_: usage.lora_recipe(usage.KOHYA_FILE, lower_start=usage.starts_lower(scheduler.config)),
        hint=usage.usage_hint("lora", lower_start=usage.starts_lower(scheduler.config)),
        lora=lora,
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
    family: Family,
    scheduler: LCMScheduler,
    unet_config: Mapping[str, Any],
    code: Callable[[str, Teacher], str],
    elsewhere: Callable[[str, str], str],
    hint: str,
    settings: Mapping[str, Any],
    lora: Lora | None = None,
    **card: Any,
) -> None:
    """Writes metadata, workflow and card, and stages the upload.

    `code` makes the card's from the model's name and its teacher, `elsewhere` the text about other programs from that
    name and its title; `hint` is that of the files' metadata.
    """
    if warning := usage.unlike_other_programs(scheduler.config):
        logger.warning("%s.", warning)
    licence, name, shown = read_licence(teacher.model, teacher.cache_dir), str(folder), teacher
    if hub:
        licence = hub.ensure_repository(parse_hub_id(teacher.model)) or licence
        name = hub.repo_id
        # The public must not see the folders of this machine.
        places = {field: strip_folders(getattr(teacher, field)) for field in ("model", "vae", "config")}
        shown = dataclasses.replace(teacher, **places)
    title = Path(name).resolve().name
    picture = f"validation/step-{global_step:06d}.png"
    has_picture = (folder / picture).is_file()
    resolution = settings.get("resolution") or _native_resolution(unet_config, family)
    description = Description(
        title,
        family.base_model_version(unet_config),
        scheduler.config.prediction_type,
        teacher.model,
        hint,
        resolution=resolution,
        steps=global_step,
        settings=settings,
        licence=licence,
        picture=last_picture(folder, global_step),
    )
    _describe(folder, description, lora)
    with _writing(folder, global_step):
        checkpoint = Path(public_name(teacher.model)).name if lora else title
        workflow = usage.build_workflow(
            f"{checkpoint.removesuffix('.safetensors')}.safetensors",
            lora=usage.KOHYA_FILE if lora else None,
            resolution=resolution,
            zsnr=bool(scheduler.config.rescale_betas_zero_snr),
            prefix=title,
            sigmas=sampling_sigmas(scheduler, 4) if usage.starts_lower(scheduler.config) else None,
        )
        usage.write_workflow(folder / usage.WORKFLOW, workflow)
        build_model_card(
            title,
            base_model=teacher.model,
            usage=code(name, shown),
            elsewhere=elsewhere(name, title),
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


def _native_resolution(unet_config: Mapping[str, Any], family: Family) -> int:
    """The side, in pixels, of the pictures that a U-Net was trained for, as far as its config says it."""
    size = unet_config.get("sample_size")
    return 8 * size if isinstance(size, int) else 1024 if family.NAME == "sdxl" else 512


def _describe(folder: Path, description: Description, lora: Lora | None) -> None:
    """Writes the metadata of the result's files; that these are whole does not depend on it."""
    files: dict[Path, dict[str, str]] = {}
    if lora is None:
        full = description.metadata(layout="diffusers")
        files = {path: full for part in (".", "unet", "unet_target") for path in (folder / part).glob("*.safetensors")}
    else:
        original = "original" if description.base.startswith("sdxl") else "diffusers"
        for path in (file for part in (".", "target") for file in (folder / part).glob("*lora_weights.safetensors")):
            layout = original if path.name == usage.KOHYA_FILE else "diffusers"
            files[path] = description.metadata(layout=layout, lora_rank=lora.config.r)
        for path in (folder / "adapter").glob("*.safetensors"):
            alpha = lora.config.lora_alpha
            files[path] = description.metadata(layout="diffusers", lora_rank=lora.config.r, lora_alpha=alpha)
    for path, metadata in files.items():
        try:
            write_metadata(path, metadata)
        except (OSError, UsageError) as error:
            logger.warning("%s has no metadata, which could not be written (%s); its weights are whole", path, error)


def _list_uploaded(folder: Path) -> list[str]:
    """The files in `folder` that match `UPLOADED`."""
    found = [path for pattern in UPLOADED for path in sorted(folder.glob(pattern)) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in found]


def save_pipeline(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Saves a Diffusers pipeline, to be loaded in float32 where no dtype is named, whatever its own is.

    Transformers writes the dtype of a text encoder into its config, and loads it in that where none is named, Diffusers
    its networks in float32: such a pipeline would fail at its first matrix product.
    """
    pipeline.save_pretrained(folder)
    for config in sorted(folder.glob("*/config.json")):
        known = json.loads(config.read_text(encoding="utf-8"))
        if known.get("dtype"):
            config.write_text(json.dumps({**known, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def lora_weights(lora: Lora, adapter: str) -> dict[str, torch.Tensor]:
    """One adapter's weights, float32 on the CPU, by PEFT's names, with its scale alpha / rank in them.

    So a reader that sees tensors alone, and takes alpha for the rank, has what was trained. The second factor is
    scaled; where that would make its values small for float16, the first has a part of it, a power of two.
    """
    scale = lora.config.lora_alpha / lora.config.r
    first = 2.0 ** round(math.log2(scale) / 2) if scale < 1 else 1.0
    factors = {".lora_A.weight": first, ".lora_B.weight": scale / first}
    weights = {}
    for name, tensor in lora.state_dict(adapter).items():
        (factor,) = (factor for ending, factor in factors.items() if name.endswith(ending))
        weights[name] = tensor.float().cpu() * factor
    return weights


def save_lora(folder: Path, lora: Lora, adapter: str, *, family: Family) -> None:
    """One adapter as float16 LoRA files in `folder`: Diffusers' format and kohya's, each with alpha = rank.

    The scale of the training is in the weights (`lora_weights`). The kohya file has the names under which ComfyUI,
    A1111 and kohya's scripts look for the modules: of SDXL the original ones, of the others Diffusers'.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half() for name, tensor in lora_weights(lora, adapter).items()}
    # Only the configuration that every version of PEFT has, so that older ones load the file. Not the dropout:
    # Diffusers would create dropout layers, in training mode.
    config: dict[str, Any] = {"r": lora.config.r, "lora_alpha": lora.config.r, "bias": lora.config.bias}
    config["target_modules"] = sorted(lora.config.target_modules or ())
    family.PIPELINE.save_lora_weights(folder, unet_lora_layers=weights, unet_lora_adapter_metadata=config)
    base = family.base_model_version(lora.unet.config)
    known = {"ss_base_model_version": base, "ss_v2": str(base.startswith("sd_v2"))}
    known |= {"ss_network_dim": str(lora.config.r), "ss_network_alpha": str(float(lora.config.r))}
    save_file(
        kohya_weights(weights, lora.unet.config, family),
        folder / usage.KOHYA_FILE,
        metadata={"format": "pt", "ss_network_module": "networks.lora", **known},
    )
    respect_umask(*folder.glob("*.safetensors"))


def kohya_weights(
    weights: Mapping[str, torch.Tensor], unet_config: Mapping[str, Any], family: Family
) -> dict[str, torch.Tensor]:
    """A LoRA's `weights`, by PEFT's names, with kohya's names and its alphas, which are the rank."""
    if family.NAME == "sdxl":
        with contextlib.suppress(UsageError):  # of other blocks than SDXL's: no other program has such a U-Net
            modules = unet_modules(unet_config)
            weights = {original_name(name, modules): tensor for name, tensor in weights.items()}
    kohya = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in weights.items()})
    ranks = {name.removesuffix(".lora_down.weight"): len(t) for name, t in kohya.items() if ".lora_down." in name}
    alphas = {f"{name}.alpha": torch.tensor(float(rank)) for name, rank in ranks.items()}
    return {name: tensor.contiguous() for name, tensor in {**kohya, **alphas}.items()}
