"""Validation pictures: drawn as a user would draw them, shown on disk and in every tracker."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from lcm_distill.pictures import labelled_grid

logger = logging.getLogger(__name__)


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

    The networks draw in eval mode and are given back in the mode they were in. Nothing touches torch's global
    random state.
    """
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    pictures: list[Image.Image] = []
    for number, prompt in enumerate(prompts):
        generators = [
            torch.Generator().manual_seed(seed + number * images_per_prompt + k) for k in range(images_per_prompt)
        ]
        pictures += pipeline(
            [prompt] * images_per_prompt,
            num_inference_steps=inference_steps,
            guidance_scale=guidance_scale,
            height=resolution,
            width=resolution,
            generator=generators,
        ).images
    pipeline.unet.train(was_training)
    return pictures


def validate(
    accelerator: Accelerator,
    pipelines: Mapping[str, Any],
    *,
    prompts: Sequence[str],
    output_dir: str | None,
    global_step: int,
    **drawing: Any,
) -> None:
    """Draws `prompts` with each pipeline, a row each under its label: to `validation/step-N.png` and every tracker.

    The main process draws while the others wait. `drawing` are the further arguments of `draw`. Without an
    `output_dir` the pictures go nowhere (a dry run).
    """
    if accelerator.is_main_process:
        with accelerator.autocast():
            rows = {label: draw(pipeline, prompts, **drawing) for label, pipeline in pipelines.items()}
        if output_dir is not None:
            columns = [text for prompt in prompts for text in [prompt, *[""] * (drawing["images_per_prompt"] - 1)]]
            path = Path(output_dir) / "validation" / f"step-{global_step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            labelled_grid(list(rows.items()), columns=columns, size=min(256, drawing["resolution"])).save(path)
            log_pictures(accelerator, rows, global_step)
    accelerator.wait_for_everyone()


def log_pictures(accelerator: Accelerator, rows: Mapping[str, Sequence[Image.Image]], global_step: int) -> None:
    """Sends each row of pictures to every tracker that takes pictures."""
    for tracker in accelerator.trackers:
        for label, pictures in rows.items():
            tag = f"validation/{label}"
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(picture) for picture in pictures])
                tracker.log_images({tag: stacked}, step=global_step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({tag: list(pictures)}, step=global_step)
            else:
                logger.warning("the tracker %s takes no pictures; they are in the output folder", tracker.name)
                break
