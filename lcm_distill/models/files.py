"""A model's files, in a folder or on the Hub, and the JSON in them. No weights are read."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from lcm_distill.errors import UsageError, brief

_AGAIN = "download it again, or write it anew"
_DEEPEST = 16  # levels of nesting; real configs have at most 6, and Python's own limits are met far below this
# DPM-Solver's default, which Diffusers writes; every other infinite number is a mistake.
_MAY_BE_INFINITE = ("lambda_min_clipped",)


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The files of `model`, a folder or a Hub id (at `revision`), which the user gave as `flag`."""

    model: str
    flag: str
    revision: str | None = None
    cache_dir: str | None = None

    def __str__(self) -> str:
        return f"{self.flag} {self.model}"

    @property
    def is_local(self) -> bool:
        try:
            return Path(self.model).exists()
        except OSError as error:  # a folder of another user, a name that is too long
            raise UsageError(f"{self} cannot be read. ({brief(error)})") from None

    def find(self, file: str) -> Path | None:
        """The path of `file`, downloaded if need be; None if the model has none. `UsageError` without such a model."""
        if self.is_local:
            path = Path(self.model) / file
            try:
                return path if path.is_file() else None
            except OSError as error:
                raise UsageError(f"{self}: {file} cannot be read. ({brief(error)})") from None
        if self.model.startswith((".", "/", "~")) or self.model.count("/") > 1:
            raise UsageError(f"{self}: no such folder; pass a Diffusers pipeline folder or a Hub id.")
        try:
            return Path(hf_hub_download(self.model, file, revision=self.revision, cache_dir=self.cache_dir))
        except EntryNotFoundError:  # without a connection: it is not in the cache
            return None
        except (OSError, ValueError) as error:
            raise self._not_found(brief(error)) from None

    def _not_found(self, reason: str) -> UsageError:
        return UsageError(
            f"{self}: neither a local folder nor a model that the Hub provides; check the name, the revision and the "
            f"connection. ({reason})"
        )

    def read_json(self, file: str) -> dict[str, Any]:
        """The JSON object in `file`; `UsageError` if there is none, or if a number in it is not finite."""
        path = self.find(file)
        if path is None and not self.is_local:
            raise self._not_found(f"there is no {file}, or it cannot be downloaded")
        if path is None:
            raise UsageError(f"{self} contains no {file}; pass a Diffusers pipeline folder, which has {file}.")
        content = parse_object(path, f"{self}: {file}")
        _check_values(content, f"{self}: {file}")
        return content

    def read_optional_json(self, file: str) -> dict[str, Any]:
        """As `read_json`; an empty object if there is no such file."""
        return {} if self.find(file) is None else self.read_json(file)


def check_pickles(folder: Path, name: str) -> None:
    """`UsageError` if the weights in `folder`, called `name`, are pickles of anything but weights. Runs none of it."""
    if any(folder.glob("*.safetensors")):
        return
    for path in sorted(folder.glob("*.bin")):
        try:
            code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # of an older format, or no pickle at all: PyTorch refuses to load what is not weights
            continue
        if code:
            raise UsageError(
                f"{name}/{path.name} is a pickle that holds code ({', '.join(sorted(code)[:3])}), not weights alone: "
                "it is not supported, since it can do anything when it is loaded. Pass the model as .safetensors."
            )


def parse_object(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `path`; `UsageError`, which calls it `name`, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read; {_AGAIN}. ({brief(error)})") from None
    except RecursionError:
        raise UsageError(f"{name} is nested too deeply for a config; {_AGAIN}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{name} holds a {type(content).__name__}, not an object with settings; {_AGAIN}.")
    return content


def _check_values(content: dict[str, Any], name: str) -> None:
    """`UsageError` if a number in a config is not finite, or the config is nested as no config is."""
    level: list[tuple[str, Any]] = list(content.items())
    for _ in range(_DEEPEST):
        for key, value in level:
            if isinstance(value, float) and not math.isfinite(value):
                if math.isnan(value) or key not in _MAY_BE_INFINITE:
                    raise UsageError(f"{name}: {key} is {value}; write the number that the model was trained with.")
        inner = [(key, value) for key, value in level if isinstance(value, (dict, list))]
        level = [
            (sub_key, item)
            for key, value in inner
            for sub_key, item in (value.items() if isinstance(value, dict) else ((key, item) for item in value))
        ]
        if not level:
            return
    raise UsageError(f"{name} is nested too deeply for a config; {_AGAIN}.")
