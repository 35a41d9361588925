"""Pictures as users generate them: a pipeline, a sampler, prompts, and noise that depends only on a seed."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import tokenization_utils_base

from lcm_distill.data.captions import describe_cut
from lcm_distill.errors import UsageError
from lcm_distill.models.tokenizer import count_tokens
from lcm_distill.models.unets import keeping_config
from lcm_distill.objective.schedule import SAMPLER_OPTIONS, complete_schedule

logger = logging.getLogger(__name__)

# By the names in `flags.SAMPLERS`.
_SCHEDULERS = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}


def build_teacher_sampler(scheduler_config: Mapping[str, Any], name: str = "DDIM") -> Any:
    """The sampler of a teacher, one of `flags.SAMPLERS`, with the noise schedule of its config; with trailing spacing.

    Options of the teacher's own sampler (Karras sigmas, an SDE solver, clipping) have no effect: what is called DDIM or
    DPM-Solver++ is that for every teacher. DDIM ends at timestep 0, as the solver in training does: with as many steps
    as that solver's grid has points, its result is the end of the trajectory that a student learns to reach in one
    step. `UsageError` if the config is not one of a discrete schedule of betas.
    """
    options = SAMPLER_OPTIONS | {"timestep_spacing": "trailing"}
    if name != "DDIM":
        options = {key: value for key, value in options.items() if key not in ("clip_sample", "set_alpha_to_one")}
    return _SCHEDULERS[name](**complete_schedule(scheduler_config), **options)


def check_steps(flag: str, steps: int, sampler: Any, strength: float = 1.0) -> None:
    """`UsageError`, which names `flag`, if a Diffusers scheduler cannot take `steps`, at img2img's `strength`.

    An `LCMScheduler` takes at most as many as its grid has points, others at most the number of training timesteps.
    """
    most = sampler.config.num_train_timesteps
    if isinstance(sampler, LCMScheduler):
        most = sampler.config.original_inference_steps
    if steps_before_strength(steps, strength) > most:
        at = "" if strength == 1 else f" at --strength {strength:g}"
        raise UsageError(
            f"{flag} {steps}: {type(sampler).__name__} has a grid of {most} and takes at most "
            f"{int(most * strength)} steps{at}; use that or fewer."
        )


@torch.no_grad()
def generate_latents(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    inference_steps: int,
    guidance_scale: float,
    resolution: int | tuple[int, int],
    batch_size: int,
    negative_prompt: str | None = None,
    on_step: Callable[[], object] | None = None,
) -> torch.Tensor:
    """Latents `[N, C, h, w]`, one for each prompt and its seed, from a pipeline of either family; not yet decoded.

    `resolution` is the side of the pictures in pixels, or their (width, height).
    All randomness comes from each picture's seed, on the CPU: the initial noise in float32, then what the sampler
    draws. So a picture depends neither on the device nor on the batch or the other pictures, and different samplers and
    networks start from the same noise. Under autocast, sampling is in float32 and only the U-Net's products are not;
    without it, everything is in the U-Net's dtype. The U-Net is in eval mode for the call, and then in its previous
    mode; PyTorch's global random state is not used. The `negative_prompt` has an effect if the pipeline guides with a
    second pass. `on_step` is called after each step of each batch.
    """
    unet = pipeline.unet
    dtype = torch.float32 if torch.is_autocast_enabled(unet.device.type) else unet.dtype
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    factor = pipeline.vae_scale_factor
    shape = (1, unet.config.in_channels, height // factor, width // factor)

    def start(generators: list[torch.Generator]) -> dict[str, Any]:
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        return {"latents": noise.to(dtype), "height": height, "width": width}

    return _run_in_batches(
        pipeline,
        prompts,
        seeds,
        start,
        batch_size=batch_size,
        negative_prompt=negative_prompt,
        on_step=on_step,
        num_inference_steps=inference_steps,
        guidance_scale=guidance_scale,
    )


@torch.no_grad()
def generate_from_picture(
    pipeline: Any,
    picture: Image.Image,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    strength: float,
    inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    negative_prompt: str | None = None,
    on_step: Callable[[], object] | None = None,
) -> torch.Tensor:
    """What `generate_latents` returns, by img2img: from `picture` (RGB, of the size to generate), noised by `strength`.

    Uses Diffusers' img2img pipeline with the parts of `pipeline`, a text-to-image one. Of its num_inference_steps, that
    takes the share `strength`, in (0, 1]; here the U-Net takes `inference_steps`, on an accordingly finer grid. The VAE
    encodes once, in its own dtype: SDXL's img2img pipeline would leave it in half precision.
    """
    vae = pipeline.vae
    pixels = VaeImageProcessor(vae_scale_factor=pipeline.vae_scale_factor).preprocess(picture)
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with keeping_config(pipeline.unet):
        img2img = AutoPipelineForImage2Image.from_pipe(pipeline)
    img2img.set_progress_bar_config(disable=True)

    def start(generators: list[torch.Generator]) -> dict[str, Any]:
        samples = torch.cat([posterior.sample(generator) for generator in generators])
        return {"image": (samples - shift) * vae.config.scaling_factor}

    return _run_in_batches(
        img2img,
        prompts,
        seeds,
        start,
        batch_size=batch_size,
        negative_prompt=negative_prompt,
        on_step=on_step,
        num_inference_steps=steps_before_strength(inference_steps, strength),
        strength=strength,
        guidance_scale=guidance_scale,
    )


def count_steps(pictures: int, batch_size: int, inference_steps: int) -> int:
    """How often `on_step` is called while that many pictures are generated."""
    return -(-pictures // batch_size) * inference_steps


def steps_before_strength(steps: int, strength: float) -> int:
    """The smallest `num_inference_steps` of which img2img at `strength`, above 0, takes `steps`."""
    total = max(steps, int(steps / strength) - 1)
    while int(total * strength) < steps:  # Diffusers rounds 0.29 · 100 down to 28
        total += 1
    return total


def _run_in_batches(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    start: Callable[[list[torch.Generator]], dict[str, Any]],
    *,
    batch_size: int,
    negative_prompt: str | None,
    on_step: Callable[[], object] | None,
    **options: Any,
) -> torch.Tensor:
    """Calls `pipeline` batch by batch; `start` makes a batch's initial inputs from its pictures' generators."""
    unet = pipeline.unet
    was_training = unet.training
    hook = None
    if on_step is not None:
        step = on_step

        def count(*_: Any) -> None:
            step()

        hook = unet.register_forward_hook(count)  # the samplers call it once for each step, guided or not
    unet.eval()
    latents = []
    try:
        for first in range(0, len(prompts), batch_size):
            chosen = list(prompts[first : first + batch_size])
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + batch_size]]
            if negative_prompt is not None:
                options["negative_prompt"] = [negative_prompt] * len(chosen)
            options |= start(generators)
            with _no_warnings_of_long_prompts(pipeline):
                latents += pipeline(chosen, generator=generators, output_type="latent", **options).images
    finally:
        unet.train(was_training)
        if hook is not None:
            hook.remove()
    return torch.stack(latents)


@contextlib.contextmanager
def _no_warnings_of_long_prompts(pipeline: Any) -> Iterator[None]:
    """Inside, the libraries do not warn, for each batch again, of a prompt that is longer than the text encoder."""
    loggers = [logging.getLogger(name) for name in (type(pipeline).__module__, tokenization_utils_base.__name__)]
    for library_logger in loggers:
        library_logger.addFilter(_is_not_of_long_prompts)
    try:
        yield
    finally:
        for library_logger in loggers:
            library_logger.removeFilter(_is_not_of_long_prompts)


def _is_not_of_long_prompts(record: logging.LogRecord) -> bool:
    beginnings = ("The following part of your input was truncated", "Token indices sequence length is longer than")
    return not record.getMessage().startswith(beginnings)


def warn_of_long_prompts(pipeline: Any, prompts: Sequence[str]) -> None:
    """Logs one warning if the pipeline's text encoders do not read all of some of the prompts."""
    names = ("tokenizer", "tokenizer_2")
    tokenizers = [getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None]
    cut = describe_cut(count_tokens(tokenizers, list(dict.fromkeys(prompts)))) if prompts else None
    if cut:
        logger.warning("prompts: %s", cut)


def read_prompts(values: Sequence[str] | None, flag: str = "--validation_prompts") -> list[str] | None:
    """The prompts of a `flag`: each value is a prompt, or the name of a `.txt` file with a prompt on each line.

    Blank lines, and spaces around a line, are ignored. None, for a flag that is not given, stays None.

    Raises:
        UsageError: a value ends in `.txt`, and the file does not exist, cannot be read, is not UTF-8 or has no prompt.
    """
    if values is None:
        return None
    prompts: list[str] = []
    for value in values:
        prompts += _prompts_of_file(value, flag) if value.lower().endswith(".txt") else [value]
    return prompts


def _prompts_of_file(name: str, flag: str) -> list[str]:
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{flag}: {name} is not UTF-8; save it in that encoding.") from None
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the name; RuntimeError: ~nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{flag}: {name} cannot be read ({reason}). A value that ends in .txt is a file with a prompt on each "
            f"line: correct its path (relative to {Path.cwd()}), or end the prompt differently."
        ) from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"{flag}: {name} is empty; write a prompt on each line.")
    return prompts
