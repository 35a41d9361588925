"""What a weight file says about itself: ModelSpec's and kohya's keys in the header of a .safetensors file.

    describe(…)                       the keys, https://github.com/Stability-AI/ModelSpec, version 1.0.1
    write_metadata(path, metadata)    puts them into a file, with the SHA-256 of its tensors

Programs with a library of models (SwarmUI, InvokeAI, ComfyUI's and A1111's model browsers) show these.
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lcm_distill.errors import UsageError
from lcm_distill.export.card import parse_hub_id, strip_folders

_THUMBNAIL = 512  # pixels of its longer side, at most
_BLOCK = 2**22
_ARCHITECTURES = {"sd_v1": "stable-diffusion-v1", "sdxl_base_v1-0": "stable-diffusion-xl-v1-base"}
_PREDICTIONS = {"v_prediction": "v"}  # ModelSpec's word
_IMPLEMENTATIONS = {"diffusers": "diffusers", "original": "https://github.com/Stability-AI/generative-models"}


@dataclasses.dataclass(frozen=True)
class Description:
    """What is known about a model, for the metadata of its files.

    `base` is kohya's name of what it fits ("sd_v1", "sd_v2", "sdxl_base_v1-0"), `settings` the flags of its run by
    name, `steps` its optimizer steps (None: unknown), `resolution` the side of its pictures in pixels, `licence` has a
    card's keys.
    """

    title: str
    base: str
    prediction_type: str
    teacher: str
    usage_hint: str
    resolution: int | None = None
    steps: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    licence: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    picture: Path | None = None

    def metadata(
        self,
        *,
        layout: str,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        merged_from: Sequence[str] = (),
    ) -> dict[str, str]:
        """The keys of a file in `layout`, "diffusers" or "original" (LDM, SGM; of a LoRA its names).

        `lora_rank` if it is a LoRA, `lora_alpha` if it is not the rank; `merged_from` are the models, or their titles,
        that are merged in the file.
        """
        teacher = public_name(self.teacher)
        is_lora = lora_rank is not None
        size = "" if self.resolution is None else f"{self.resolution}x{self.resolution}"
        what = "LCM-LoRA" if is_lora else "latent consistency model"
        found = {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": self._architecture() + ("/lora" if is_lora else ""),
            "modelspec.implementation": _IMPLEMENTATIONS[layout],
            "modelspec.title": self.title,
            "modelspec.resolution": size,
            "modelspec.description": f"A {what} distilled from {teacher}: it generates pictures in 1 to 8 steps.",
            "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "modelspec.prediction_type": _PREDICTIONS.get(self.prediction_type, self.prediction_type),
            "modelspec.usage_hint": self.usage_hint,
            "modelspec.tags": "lcm, latent consistency model" + (", lcm-lora" if is_lora else ""),
            "modelspec.license": str(self.licence.get("license_name") or self.licence.get("license") or ""),
            "modelspec.merged_from": ", ".join(public_name(name) for name in merged_from),
            "modelspec.thumbnail": thumbnail(self.picture) if self.picture else "",
            "ss_base_model_version": self.base,
            "ss_v2": str(self.base.startswith("sd_v2")),
            "ss_sd_model_name": teacher,
            "ss_output_name": self.title,
            "ss_steps": "" if self.steps is None else str(self.steps),
            "ss_resolution": f"({self.resolution}, {self.resolution})" if self.resolution else "",
            "ss_training_comment": f"latent consistency distillation; {self.usage_hint}",
        }
        for key, flag in _SETTINGS.items():
            if self.settings.get(flag) is not None:
                found[key] = str(self.settings[flag])
        if is_lora:
            found |= {
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(lora_rank),
                "ss_network_alpha": str(float(lora_alpha or lora_rank or 0)),
            }
        # "format", by which Transformers and Diffusers recognize the file.
        return {"format": "pt"} | {key: value for key, value in found.items() if value}

    def _architecture(self) -> str:
        if self.base == "sd_v2":
            return f"stable-diffusion-v2-{'768-v' if self.prediction_type == 'v_prediction' else '512'}"
        return _ARCHITECTURES[self.base]


_SETTINGS = {
    "ss_learning_rate": "learning_rate",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_batch_size_per_device": "train_batch_size",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_mixed_precision": "mixed_precision",
    "ss_seed": "seed",
    "ss_loss_type": "loss_type",
}


def public_name(model: str) -> str:
    """A model's name for the public: a Hub id, or the last part of a path."""
    return parse_hub_id(model) or str(strip_folders(model))


def thumbnail(picture: Path) -> str:
    """A picture as ModelSpec's data URL, a small JPEG; empty if it cannot be read."""
    try:
        with Image.open(picture) as opened:
            opened.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            opened.convert("RGB").save(buffer, "JPEG", quality=80)
    except OSError:
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def last_picture(folder: Path, step: int | None = None) -> Path | None:
    """The last validation picture in a run's `folder`, up to `step` (None: of all); None if there is none."""
    found = {
        int(match[1]): path
        for path in (folder / "validation").glob("step-*.png")
        if (match := re.fullmatch(r"step-(\d+)\.png", path.name)) and (step is None or int(match[1]) <= step)
    }
    return found[max(found)] if found else None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a .safetensors file."""
    with open(path, "rb") as file:
        return _read_header(file).get("__metadata__", {})


def write_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Adds `metadata` to the header of a .safetensors file, and the SHA-256 of its tensors; other keys stay.

    The tensors are copied into a new file, which replaces it once it is whole. `OSError` if that cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with open(path, "rb") as source:
            header = _read_header(source)
            start, digest = source.tell(), hashlib.sha256()
            while block := source.read(_BLOCK):
                digest.update(block)
            known = {**header.get("__metadata__", {}), **metadata, "modelspec.hash_sha256": f"0x{digest.hexdigest()}"}
            text = json.dumps({**header, "__metadata__": known}, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # the tensors are aligned
            source.seek(start)
            with open(partial, "xb") as target:
                target.write(len(text).to_bytes(8, "little") + text)
                shutil.copyfileobj(source, target, _BLOCK)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _read_header(file: Any) -> dict[str, Any]:
    """The header of an opened .safetensors file, which is then at its first tensor; `UsageError` if it is none."""
    try:
        found = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        if isinstance(found, dict):
            return found
    except (ValueError, OverflowError, MemoryError):
        pass
    raise UsageError(f"{file.name} is not a .safetensors file.")
