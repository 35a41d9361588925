"""How a result is used: code for Diffusers, settings and a workflow for ComfyUI, a hint for other programs.

Imports nothing heavy: the report has it, too.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_distill.models.code import LoadingCode

WORKFLOW = "comfyui_workflow.json"
KOHYA_FILE = "kohya_lora_weights.safetensors"
# What ComfyUI's node and the LCM samplers of A1111 and Forge have built in, by the names of LCMScheduler's config.
HARD_WIRED = {
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "prediction_type": "epsilon",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
_WORDS = {
    "num_train_timesteps": "a schedule of {} timesteps",
    "original_inference_steps": "a grid of {}",
    "timestep_scaling": "a timestep scaling of {:g}",
}
_STARTS_LOWER = f"; the sigmas in {WORKFLOW} start ComfyUI where it was trained"
# The code chooses these itself, so that it runs on a machine without a GPU, too.
_DEVICE = 'device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)'
CODE_OPTIONS = {"dtype": "dtype", "device": "device"}  # for `loading_code`


def unlike_other_programs(scheduler_config: Mapping[str, Any]) -> str | None:
    """What of a student's sampler other programs than Diffusers do not respect, as a sentence; None if nothing."""
    different = {
        name: (scheduler_config[name], usual)
        for name, usual in HARD_WIRED.items()
        if scheduler_config.get(name, usual) != usual
    }
    if scheduler_config.get("rescale_betas_zero_snr"):
        different["rescale_betas_zero_snr"] = (True, False)
    if not different:
        return None

    def described(place: int) -> str:
        words = [_WORDS.get(name, f"{name} {{}}").format(values[place]) for name, values in different.items()]
        return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

    remedy = _STARTS_LOWER if starts_lower(scheduler_config) else ""
    return (
        f"this student samples with {described(0)}; ComfyUI, A1111 and Forge have {described(1)} built in for LCMs, so "
        f"that its pictures are worse there than in Diffusers{remedy}"
    )


def starts_lower(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether a student's sampling starts below the last timestep of Stable Diffusion's schedule."""
    return scheduler_config.get("num_train_timesteps", 1000) < 1000


def full_code(model: str, teacher: LoadingCode, guidance_scale: float) -> str:
    """Code that generates with a full student in `model`; `teacher` loads its pipeline with `unet=unet`."""
    lines = [f'unet = UNet2DConditionModel.from_pretrained({model!r}, dtype=dtype, variant="fp16")', *teacher.lines]
    lines += [f"pipe.scheduler = LCMScheduler.from_pretrained({model!r})"]
    return _code({"LCMScheduler", "UNet2DConditionModel"} | teacher.imports, lines, guidance_scale)


def lora_code(model: str, teacher: LoadingCode) -> str:
    """Code that generates with a LoRA student in `model`; `teacher` loads its pipeline."""
    lines = [*teacher.lines, f"pipe.scheduler = LCMScheduler.from_pretrained({model!r})"]
    lines += [f"pipe.load_lora_weights({model!r})"]
    return _code({"LCMScheduler"} | teacher.imports, lines, 1.0)


def pipeline_code(folder: str) -> str:
    """Code that generates with a complete pipeline in `folder`, whose guidance is in its weights."""
    lines = [f"pipe = DiffusionPipeline.from_pretrained({folder!r}, dtype=dtype).to(device)"]
    return _code({"DiffusionPipeline"}, lines, 1.0)


def _code(imports: set[str] | frozenset[str], lines: list[str], guidance_scale: float) -> str:
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {', '.join(sorted(imports))}",
            "",
            _DEVICE,
            *lines,
            f'picture = pipe("your prompt", num_inference_steps=4, guidance_scale={guidance_scale:g}).images[0]',
        ]
    )


def export_command(folder: str, file: str, guidance_scale: float) -> str:
    """The command that makes a single file of a full student in `folder`."""
    words = ["python", "-m", "lcm_distill.export_model", folder, "--single_file", file]
    return shlex.join([*words, "--guidance_scale", f"{guidance_scale:g}"])


def lora_recipe(file: str, *, lower_start: bool = False) -> str:
    """Settings for other programs, in Markdown, of a LoRA's kohya `file`; `lower_start` as `starts_lower` says."""
    if lower_start:
        return _lower_recipe(file, "loras", "KSamplerSelect `lcm` and CFG 1 to 2")
    return (
        f"**ComfyUI**: put `{file}` into `models/loras` and drag `{WORKFLOW}` into the window, or build the same: "
        "the teacher or a fine-tune in CheckpointLoaderSimple, LoraLoaderModelOnly with strength 1, "
        "ModelSamplingDiscrete with `lcm`, and KSampler with sampler `lcm`, scheduler `sgm_uniform`, 2 to 8 steps and "
        "CFG 1 to 2.\n\n**A1111, Forge**: the same file in `models/Lora`, sampler LCM, 2 to 8 steps, CFG 1 to 2."
    )


def single_file_recipe(file: str, *, lower_start: bool = False) -> str:
    """As `lora_recipe`, of a `file` with a whole model, whose guidance is in its weights."""
    if lower_start:
        return _lower_recipe(file, "checkpoints", "KSamplerSelect `lcm` and CFG 1")
    return (
        f"**ComfyUI**: put `{file}` into `models/checkpoints` and drag `{WORKFLOW}` into the window, or build the "
        "same: CheckpointLoaderSimple, ModelSamplingDiscrete with `lcm`, and KSampler with sampler `lcm`, scheduler "
        "`sgm_uniform`, 1 to 8 steps and CFG 1.\n\n**A1111, Forge**: the same file in `models/Stable-diffusion`, "
        "sampler LCM, 1 to 8 steps, CFG 1."
    )


def _lower_recipe(file: str, folder: str, sampler: str) -> str:
    return (
        f"**ComfyUI**: put `{file}` into `models/{folder}` and drag `{WORKFLOW}` into the window: SamplerCustom with "
        f"{sampler}, and ManualSigmas with those of the timesteps that this student starts and continues at. KSampler "
        "starts at the last timestep of the schedule, where this student was not trained, and so do A1111 and Forge."
    )


def full_recipe(folder: str, file: str, guidance_scale: float, *, lower_start: bool = False) -> str:
    """As `single_file_recipe`, of a full student in `folder`, with the command that makes the `file`."""
    return (
        "Other programs than Diffusers do not know its guidance input. This makes one file for them, with a "
        f"`guidance_scale` in its weights:\n\n```sh\n{export_command(folder, file, guidance_scale)}\n```\n\n"
        f"{single_file_recipe(file, lower_start=lower_start)}"
    )


def usage_hint(kind: str, guidance_scale: float = 1.0, *, lower_start: bool = False) -> str:
    """A short hint for a file's metadata; `kind` is "full", with a guidance input, "lora", or "baked"."""
    if kind == "full":
        return f"Diffusers: LCMScheduler, 1 to 8 steps, guidance_scale {guidance_scale:g} (in the guidance embedding)"
    steps, cfg = ("2 to 8", "1 to 2, weight 1") if kind == "lora" else ("1 to 8", "1")
    if lower_start:
        return f"1 to 8 steps, CFG {cfg}. ComfyUI: the sigmas of its {WORKFLOW}. Diffusers: its own LCMScheduler"
    return (
        f"{steps} steps, CFG {cfg}. ComfyUI: sampler lcm, scheduler sgm_uniform, node ModelSamplingDiscrete lcm. "
        "A1111, Forge: sampler LCM. Diffusers: LCMScheduler"
    )


def build_workflow(
    checkpoint: str,
    *,
    lora: str | None = None,
    resolution: int = 512,
    zsnr: bool = False,
    prefix: str = "lcm",
    sigmas: Sequence[float] | None = None,
) -> dict[str, Any]:
    """A ComfyUI workflow, as its "Export (API)" writes it and its window opens it: node numbers to classes and inputs.

    `checkpoint` and `lora` are the names of files in ComfyUI's folders, `resolution` is the side of the picture in
    pixels, and `zsnr` says that the schedule ends at zero SNR. `sigmas` are those of a student that starts below the
    last timestep: KSampler cannot.
    """
    model: list[Any] = ["1", 0]
    nodes: dict[str, Any] = {"1": _node("CheckpointLoaderSimple", ckpt_name=checkpoint)}
    if lora:
        nodes["2"] = _node("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
        model = ["2", 0]
    nodes |= {
        "3": _node("ModelSamplingDiscrete", model=model, sampling="lcm", zsnr=zsnr),
        "4": _node("CLIPTextEncode", clip=["1", 1], text="a castle at dusk"),
        "5": _node("CLIPTextEncode", clip=["1", 1], text=""),
        "6": _node("EmptyLatentImage", width=resolution, height=resolution, batch_size=1),
        "7": _sampling(sigmas, model=["3", 0], positive=["4", 0], negative=["5", 0], latent_image=["6", 0], cfg=1.0),
        "8": _node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "9": _node("SaveImage", images=["8", 0], filename_prefix=prefix),
    }
    if sigmas:
        nodes["10"] = _node("KSamplerSelect", sampler_name="lcm")
        nodes["11"] = _node("ManualSigmas", sigmas=", ".join(f"{sigma:.4f}" for sigma in sigmas))
    return nodes


def _sampling(sigmas: Sequence[float] | None, **inputs: Any) -> dict[str, Any]:
    if sigmas:
        return _node("SamplerCustom", add_noise=True, noise_seed=0, sampler=["10", 0], sigmas=["11", 0], **inputs)
    return _node("KSampler", seed=0, steps=4, sampler_name="lcm", scheduler="sgm_uniform", denoise=1.0, **inputs)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def place_workflow(model: Path, workflow: Mapping[str, Any]) -> Path:
    """Writes the workflow of a `model` file beside it, and returns where.

    That is comfyui_workflow.json, or, where this is another model's, a name that begins with the model's own.
    """
    path = model.with_name(WORKFLOW)
    try:
        taken = json.loads(path.read_text(encoding="utf-8"))["1"]["inputs"]["ckpt_name"] != model.name
    except FileNotFoundError:
        taken = False
    except (OSError, ValueError, LookupError, TypeError):
        taken = True
    if taken:
        path = model.with_name(f"{model.stem}_{WORKFLOW}")
    write_workflow(path, workflow)
    return path


def write_workflow(path: Path, workflow: Mapping[str, Any]) -> None:
    """Writes a workflow, under a temporary name until it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a new file: not what a link of this name points to
    partial.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
