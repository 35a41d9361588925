"""Validation pictures: drawn as a user would draw them, shown on disk and in every tracker."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from lcm_distill.errors import UsageError
from lcm_distill.latents import decode_latents
from lcm_distill.pictures import labelled_grid
from lcm_distill.sharding import is_split, release
from lcm_distill.trackers import log_pictures

logger = logging.getLogger(__name__)


def read_prompts(values: Sequence[str] | None) -> list[str] | None:
    """The prompts of `--validation_prompts`: each value is one, or names a `.txt` file with a prompt on each line.

    Blank lines and the spaces around a line do not count. None, for a flag that is not given, stays None.

    Raises:
        UsageError: a value ends in `.txt` and there is no such file, or it cannot be read, is not UTF-8 or is empty.
    """
    if values is None:
        return None
    prompts: list[str] = []
    for value in values:
        prompts += _prompts_of_file(value) if value.lower().endswith(".txt") else [value]
    return prompts


def _prompts_of_file(name: str) -> list[str]:
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"--validation_prompts: {name} is not UTF-8; save it in that encoding.") from None
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the name; RuntimeError: ~nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"--validation_prompts: {name} cannot be read ({reason}). What ends in .txt is a file with a prompt on "
            f"each line: correct its path (relative ones start at {Path.cwd()}), or end the prompt in another way."
        ) from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"--validation_prompts: {name} is empty; write a prompt on each line.")
    return prompts


def validation_guidance_scale(chosen: float | None, w_min: float, w_max: float) -> float:
    """`chosen`, or else the pipelines' guidance_scale 8 brought into the trained range [w_min + 1, w_max + 1]."""
    return min(max(8.0, w_min + 1), w_max + 1) if chosen is None else chosen


@torch.no_grad()
def draw(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    images_per_prompt: int,
    inference_steps: int,
    guidance_scale: float,
    resolution: int,
    seed: int,
) -> list[Image.Image]:
    """`images_per_prompt` pictures of each prompt, prompt by prompt, from noise that depends on `seed` alone.

    The networks draw in eval mode and are given back in the mode they were in. Autocast, if it is on, holds for all
    but the VAE, which decodes in its own dtype, one picture after the other (at 1024 pixels that takes gigabytes).
    Nothing touches torch's global random state.
    """
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    pictures: list[Image.Image] = []
    for number, prompt in enumerate(prompts):
        generators = [
            torch.Generator().manual_seed(seed + number * images_per_prompt + k) for k in range(images_per_prompt)
        ]
        latents = pipeline(
            [prompt] * images_per_prompt,
            num_inference_steps=inference_steps,
            guidance_scale=guidance_scale,
            height=resolution,
            width=resolution,
            generator=generators,
            output_type="latent",
        ).images
        pictures += decode_latents(pipeline.vae, latents, batch_size=1)
    pipeline.unet.train(was_training)
    return pictures


def validate(
    accelerator: Accelerator,
    pipelines: Mapping[str, Any],
    *,
    prompts: Sequence[str],
    inference_steps: Sequence[int],
    output_dir: str | None,
    global_step: int,
    within: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
    **drawing: Any,
) -> None:
    """Draws `prompts` with each pipeline in each number of steps, to `validation/step-N.png` and every tracker.

    A row for each pair, "student, 4 steps", from the same noise; a number given twice is drawn once. The main process
    draws while the others wait; with sharded networks all draw, the same. `drawing` are the further arguments of
    `draw`. Without an `output_dir` the pictures go nowhere (a dry run). `within` has, by label, a context that a
    pipeline draws in.
    """
    if accelerator.is_main_process or is_split(accelerator):
        rows = {}
        for label, pipeline in pipelines.items():
            with accelerator.autocast(), (within or {}).get(label, contextlib.nullcontext)():
                for steps in dict.fromkeys(inference_steps):
                    row = f"{label}, {steps} step{'' if steps == 1 else 's'}"
                    rows[row] = draw(pipeline, prompts, inference_steps=steps, **drawing)
            release(pipeline.unet)
        if output_dir is not None and accelerator.is_main_process:
            columns = [text for prompt in prompts for text in [prompt, *[""] * (drawing["images_per_prompt"] - 1)]]
            path = Path(output_dir) / "validation" / f"step-{global_step:06d}.png"
            grid = labelled_grid(list(rows.items()), columns=columns, size=min(256, drawing["resolution"]))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                grid.save(path)
            except OSError as error:
                logger.error("%s could not be written (%s); the run goes on", path, error)
            log_pictures(accelerator, rows, global_step)
    accelerator.wait_for_everyone()
