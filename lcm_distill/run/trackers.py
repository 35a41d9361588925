"""Trackers (tensorboard, wandb, …): one that fails is removed and never ends the run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from PIL import Image

from lcm_distill.errors import UsageError

logger = logging.getLogger(__name__)


def parse_trackers(report_to: str | None) -> list[str]:
    """The trackers in `--report_to`, separated by commas or spaces; "all" means every installed one."""
    names = [name for name in (report_to or "none").lower().replace(",", " ").split() if name != "none"]
    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    known = [str(getattr(name, "value", name)) for name in LOGGER_TYPE_TO_CLASS]
    if "all" in names:
        return installed
    for name in names:
        if name not in known:
            raise UsageError(f"--report_to {name}: no such tracker; choose from {', '.join(known)}, all and none.")
        if name not in installed:
            raise UsageError(
                f"--report_to {name}: its package is not installed; pip install {name}, or choose another."
            )
    return list(dict.fromkeys(names))


def need_connection(accelerator: Accelerator) -> bool:
    """Whether a tracker may ask for a login or a connection, which is better known before weights are loaded."""
    return any(str(getattr(name, "value", name)) != "tensorboard" for name in accelerator.log_with)


def start_trackers(
    accelerator: Accelerator, project: str, flags: Mapping[str, Any], *, resumed: Mapping[str, Any]
) -> dict[str, str]:
    """Starts the trackers with the run's `flags` as their configuration; they write into the logging folder.

    A resumed run (`resumed` is its run.json) continues in wandb as the same run, and in tensorboard as the same curve
    without the points after the checkpoint. Returns what this needs: the trackers' ids of this run by tracker (only
    wandb's, on the main process). `UsageError` if one does not start.
    """
    if not accelerator.log_with:
        return {}
    config = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in flags.items()
    }
    folder = str(accelerator.logging_dir)
    if accelerator.is_main_process:
        Path(folder).mkdir(parents=True, exist_ok=True)
    options: dict[str, dict[str, Any]] = {"wandb": {"dir": folder}}
    if resumed:
        options["tensorboard"] = {"purge_step": resumed["global_step"] + 1}
        if run := resumed.get("trackers", {}).get("wandb"):
            options["wandb"] |= {"id": run, "resume": "allow"}
    try:
        accelerator.init_trackers(project, config=config, init_kwargs=options)
    except Exception as error:  # a different class in each tracker: no login, no connection, no such project
        raise UsageError(
            f"--report_to: a tracker did not start ({str(error).strip().splitlines()[0]}). Log in to it, choose "
            "another, or set WANDB_MODE=offline for wandb without a connection."
        ) from None
    return {
        tracker.name: str(tracker.tracker.id)
        for tracker in accelerator.trackers
        if tracker.name == "wandb" and accelerator.is_main_process
    }


def _for_each(accelerator: Accelerator, action: Callable[[GeneralTracker], None]) -> None:
    for tracker in list(accelerator.trackers):
        try:
            action(tracker)
        except Exception as error:  # noqa: BLE001 - a lost connection, a full disk, a run deleted on the server
            accelerator.trackers.remove(tracker)
            logger.error(
                "the tracker %s failed (%s: %s) and is removed; the run continues",
                tracker.name,
                type(error).__name__,
                error,
            )


def log_values(accelerator: Accelerator, values: Mapping[str, float], global_step: int) -> None:
    """Sends `values`, numbers by name, to every tracker."""
    _for_each(accelerator, lambda tracker: tracker.log(dict(values), step=global_step))


def log_pictures(accelerator: Accelerator, rows: Mapping[str, Sequence[Image.Image]], global_step: int) -> None:
    """Sends `rows` of pictures to every tracker that takes pictures; "student, 4 steps" is tagged `student_4_steps`."""

    def send(tracker: GeneralTracker) -> None:
        for label, pictures in rows.items():
            tag = f"validation/{label.replace(',', '').replace(' ', '_')}"
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(picture) for picture in pictures])
                tracker.log_images({tag: stacked}, step=global_step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({tag: list(pictures)}, step=global_step)
            else:
                logger.warning("the tracker %s does not take pictures; they are in the output folder", tracker.name)
                break

    _for_each(accelerator, send)


def finish_trackers(accelerator: Accelerator) -> None:
    """Closes the trackers; one that fails is reported."""
    _for_each(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers = []
