"""What a finished run leaves for its users: weights that load with one line, a scheduler, a model card, the Hub."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors.torch import save_file

from lcm_distill.errors import SaveError, UsageError
from lcm_distill.lora import STUDENT, TARGET, Lora
from lcm_distill.sharding import save_whole
from lcm_distill.teacher import Teacher

logger = logging.getLogger(__name__)

# What is uploaded: what users load, and nothing else (no checkpoints, optimizer states or logs). In the Hub client's
# patterns a * crosses folders: only names that begin like these may match.
UPLOADED = [
    "README.md",
    "config.json",
    "scheduler_config.json",
    "diffusion_pytorch_model*",
    "unet/*",
    "unet_target/*",
    "pytorch_lora_weights.safetensors",
    "kohya_lora_weights.safetensors",
    "adapter/*",
    "validation/*.png",
]


def export_full_student(
    output_dir: str,
    *,
    student: UNet2DConditionModel,
    target: UNet2DConditionModel,
    scheduler: LCMScheduler,
    teacher: Teacher,
    pipeline: Any,
    guidance_scale: float,
    global_step: int,
    settings: dict[str, Any],
    tags: list[str],
    hub: "HubUpload | None" = None,
) -> None:
    """Writes `unet/`, `unet_target/`, and at the top the model with its fp16 variant, scheduler and card.

    Every rank calls it: sharded networks are gathered first. The rest is the main process's.

    The model at the top is the student, so that `UNet2DConditionModel.from_pretrained(output_dir)` and, with
    `variant="fp16"`, its half-size twin both load. The card tells of the `teacher`, a guidance_scale to draw with,
    the steps trained and the run's `settings`. Then all that users load goes to the `hub`, if there is one.
    """
    folder = Path(output_dir)
    with _writing(folder):
        save_whole(student, folder / "unet", folder)
        save_whole(target, folder / "unet_target")
        if not PartialState().is_main_process:
            return
        half = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)  # what is saved does load
        half.save_pretrained(folder, variant="fp16")
        scheduler.save_pretrained(folder)
    usage = _FULL_USAGE.format(
        model=_name(hub, folder), load=teacher.loading_code(pipeline, "unet=unet"), guidance_scale=guidance_scale
    )
    settings = settings | {"max_train_steps": global_step}
    card = model_card(folder, base_model=teacher.model, usage=usage, settings=settings, tags=tags)
    _finish(folder, card, hub, global_step)


def export_lora_student(
    output_dir: str,
    *,
    lora: Lora,
    pipeline: Any,
    base_model_version: str,
    scheduler: LCMScheduler,
    teacher: Teacher,
    global_step: int,
    settings: dict[str, Any],
    tags: list[str],
    hub: "HubUpload | None" = None,
) -> None:
    """Writes the student's LoRA for Diffusers and for ComfyUI and A1111, its PEFT adapter, scheduler and card.

    `pytorch_lora_weights.safetensors` is what `pipe.load_lora_weights(output_dir)` loads, with its alpha;
    `kohya_lora_weights.safetensors` holds the same weights under kohya's names. Both are float16, as shared LoRAs
    are; `adapter/` is the float32 adapter. An averaged target's LoRA is in `target/`. `pipeline` is the family's
    pipeline class, `base_model_version` kohya's name for the family.
    """
    folder = Path(output_dir)
    with _writing(folder):
        lora.part(STUDENT).save(folder / "adapter")
        save_lora(folder, lora, STUDENT, pipeline=pipeline, base_model_version=base_model_version)
        if lora.average:
            save_lora(folder / "target", lora, TARGET, pipeline=pipeline, base_model_version=base_model_version)
        scheduler.save_pretrained(folder)
    usage = _LORA_USAGE.format(model=_name(hub, folder), load=teacher.loading_code(pipeline))
    card = model_card(
        folder,
        base_model=teacher.model,
        usage=usage,
        settings=settings | {"max_train_steps": global_step},
        tags=["lora", *tags],
        note="The guidance of the training is in the weights, so a `guidance_scale` of 1 to 2 is right; above 1, "
        "negative prompts count. It goes together with a style LoRA through `pipe.set_adapters`, and onto fine-tunes "
        "of its teacher. `kohya_lora_weights.safetensors` is the same LoRA for ComfyUI and A1111: sampler LCM, "
        "2 to 8 steps, CFG 1 to 2.",
    )
    _finish(folder, card, hub, global_step)


def _name(hub: "HubUpload | None", folder: Path) -> str:
    return hub.repo_id if hub else str(folder)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What cannot be written is a `SaveError`: the run is over, and its last checkpoint can write it again."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - each writer has its own for a full disk
        raise SaveError(
            f"the result could not be written ({type(error).__name__}: {error}). The run's last checkpoint has it: "
            f"make room in {folder} and launch once more with --resume_from_checkpoint latest, which only writes it."
        ) from error


def _finish(folder: Path, card: ModelCard, hub: "HubUpload | None", global_step: int) -> None:
    with _writing(folder):
        card.save(folder / "README.md")
    logger.info("the result is in %s", folder)
    if hub:
        hub.push(f"Distilled for {global_step} steps")


def save_lora(folder: Path, lora: Lora, adapter: str, *, pipeline: Any, base_model_version: str) -> None:
    """One adapter as float16 LoRA files in `folder`: Diffusers' format with alpha, and kohya's."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.float16).cpu() for name, tensor in lora.state_dict(adapter).items()}
    # Of the configuration, what every version of PEFT knows: a file made here loads there.
    # Not the dropout: Diffusers would make layers of it, in training mode.
    known = ("r", "lora_alpha", "bias", "target_modules")
    config = {name: value for name, value in lora.config.to_dict().items() if name in known}
    config["target_modules"] = sorted(config["target_modules"])
    pipeline.save_lora_weights(folder, unet_lora_layers=weights, unet_lora_adapter_metadata=config)

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


def model_card(
    folder: Path,
    *,
    base_model: str,
    usage: str,
    settings: Mapping[str, Any],
    tags: list[str],
    note: str = "`guidance_scale` is w + 1, with w the guidance of the LCM paper (arXiv 2310.04378).",
) -> ModelCard:
    """A card for the model in `folder`: what it is, how to draw with it, what it drew, what it was trained with.

    `base_model` is linked when it is a Hub id; `usage` is Python code, `note` what to say below it.
    """
    is_hub_id = not Path(base_model).exists() and base_model.count("/") == 1
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base_model if is_hub_id else None,
        tags=["lcm", "latent-consistency-models", "text-to-image", "diffusers", *tags],
    )
    base = f"[{base_model}](https://huggingface.co/{base_model})" if is_hub_id else f"`{Path(base_model).name}`"
    drawn = sorted((folder / "validation").glob("step-*.png"))
    shown = f"![What it drew at the end of the training](validation/{drawn[-1].name})\n\n" if drawn else ""
    used = {name: str(value).replace("|", "\\|") for name, value in settings.items() if value is not None}
    rows = "\n".join(f"| `--{name}` | {value} |" for name, value in used.items())
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {folder.resolve().name}\n\n"
        f"A latent consistency model distilled from {base}: it draws in 1 to 8 steps.\n\n{shown}"
        f"## Use\n\n```python\n{usage}\n```\n\n"
        f"{note}\n\n"
        f"## Training\n\n| flag | value |\n|---|---|\n{rows}\n"
    )


class HubUpload:
    """The upload of a run's results. The repository is made at once, so that a wrong token shows before training."""

    def __init__(self, repo_id: str | None, token: str | None, output_dir: str):
        self._api = HfApi(token=token)
        self._output_dir = output_dir
        try:
            self.repo_id = self._api.create_repo(repo_id or Path(output_dir).resolve().name, exist_ok=True).repo_id
        except Exception as error:  # no connection, no token, no right: each its own class
            raise UsageError(
                f"--push_to_hub: the Hub refused the repository {repo_id or Path(output_dir).name!r} "
                f"({str(error).strip().splitlines()[0]}). Check --hub_model_id, --hub_token and the connection."
            ) from None

    def push(self, message: str) -> bool:
        """Uploads what users load; a failure is reported, never raised: the results are on the disk."""
        try:
            self._api.upload_folder(
                repo_id=self.repo_id, folder_path=self._output_dir, commit_message=message, allow_patterns=UPLOADED
            )
        except Exception as error:
            logger.error(
                "the upload to %s failed (%s); the model is in %s, upload it with: hf upload %s %s",
                self.repo_id,
                error,
                self._output_dir,
                self.repo_id,
                self._output_dir,
            )
            return False
        return True


def open_hub(accelerator: Accelerator, repo_id: str | None, token: str | None, output_dir: str) -> HubUpload | None:
    """The upload on the main process, None on the others; a refusal is a `UsageError` on all of them."""
    upload, refusal = None, None
    if accelerator.is_main_process:
        try:
            upload = HubUpload(repo_id, token, output_dir)
        except UsageError as error:
            refusal = str(error)
    if refusal := broadcast_object_list([refusal])[0]:
        raise UsageError(refusal)
    return upload
