"""The best checkpoint: the one with the smallest distance to the teacher."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_distill.data.sources import open_regular
from lcm_distill.run.record import DamageError, read_record

RATING = "rating.json"
_LONGEST = 100_000  # bytes of one; real ones have about 50
# The flags that decide which pictures the distance of --keep_best compares.
_DISTANCE_FLAGS = (
    "validation_prompts",
    "num_validation_images",
    "validation_guidance_scale",
    "validation_teacher_steps",
    "w_min",
    "w_max",
    "resolution",
    "pretrained_vae_model_name_or_path",
)


def read_rating(path: Path) -> tuple[float, bool]:
    """(a checkpoint's distance to the teacher, whether it was saved only for that); infinity if never the best."""
    try:
        with open_regular(str(path / RATING)) as file:  # not a pipe, which might block
            rating = json.loads(file.read(_LONGEST))
        distance = float(rating["distance"])
        return (distance if math.isfinite(distance) else math.inf), rating.get("saved_for_it") is True
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return math.inf, False


def changed_distance_flags(path: Path, run: Mapping[str, Any]) -> list[str]:
    """The flags that differ so that the distances of the checkpoint at `path` and of `run` cannot be compared."""
    try:
        before = read_record(path)["flags"]
    except (DamageError, KeyError):
        return []  # unknown
    now = json.loads(json.dumps(run.get("flags", {}), default=str))
    captions_are_prompts = not (before.get("validation_prompts") and now.get("validation_prompts"))
    names = [*_DISTANCE_FLAGS, *["train_shards_path_or_url"] * captions_are_prompts]
    return [name for name in names if before.get(name) != now.get(name)]


def pick_best(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the smallest distance; None if none is rated."""
    distances = {path: read_rating(path)[0] for path in checkpoints}
    best = min(checkpoints, key=distances.__getitem__, default=None)
    return best if best is not None and distances[best] < math.inf else None
