"""A single-file checkpoint: all parts in the original layout (LDM, SGM), without configs. What its header says."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    fetch_diffusers_config,
    infer_diffusers_model_type,
)
from safetensors import SafetensorError, safe_open

from lcm_distill.errors import UsageError, brief

# The prefixes of each part's tensors. The moving average, "model_ema.", is not read.
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
_SD2_NAME = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
_FIRST, _LAST = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight"
# What trainers write about the prediction: Stability's ModelSpec, which kohya-ss/sd-scripts writes, and ComfyUI.
_PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
# ModelSpec's name of the Stable Diffusion 2 that predicts v; the other is "…-v2-512".
_ARCHITECTURE_KEY, _SD2_V = "modelspec.architecture", "stable-diffusion-v2-768-v"
_PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps", "noise"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred", "v-pred", "vpred", "velocity"), "v_prediction"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
_SUPPORTED_KINDS = ("v1", "v2", "xl_base", "playground-v2-5", "xl_refiner", "inpainting", "inpainting_v2", "xl_inpaint")


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """The header of the file `path`: its tensors' shapes by name, its metadata. `name` begins messages."""

    path: str
    name: str
    shapes: Mapping[str, list[int]]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: str, name: str) -> "SingleFile":
        """Reads the header of `path`. `UsageError` if the file is missing or damaged."""
        if not Path(path).is_file():
            raise UsageError(f"{name}: no such file.")
        try:
            with safe_open(path, "pt") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
                return cls(path, name, shapes, file.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{name}: not a complete .safetensors file; download it again. ({brief(error)})") from None

    @property
    def prediction_type(self) -> str | None:
        """The prediction that the file says it was trained for; None if it says nothing.

        `UsageError` if it says one that no scheduler config has.
        """
        found = {"v_pred": "v_prediction"} if "v_pred" in self.shapes else {}  # a tensor without values, a marker
        if _SD2_V in self.metadata.get(_ARCHITECTURE_KEY, "").lower():
            found[_ARCHITECTURE_KEY] = "v_prediction"
        for key in _PREDICTION_KEYS:
            said = self.metadata.get(key, "").strip().lower()
            if said and said not in _PREDICTIONS:
                raise UsageError(
                    f"{self.name}: its metadata says {key}: {self.metadata[key]!r}, which is not supported; supported "
                    "are epsilon, v and sample."
                )
            if said:
                found[key] = _PREDICTIONS[said]
        if "v_pred" in found:  # which fine-tunes add, while their metadata stay those of the model they were made from
            return found["v_pred"]
        if len({*found.values()}) > 1:
            raise UsageError(
                f"{self.name}: its metadata contradict each other ({', '.join(map(': '.join, found.items()))}); remove "
                "what is wrong."
            )
        return next(iter(found.values()), None)

    @property
    def ends_at_zero_snr(self) -> bool:
        """Whether the file says that its last timestep is pure noise; most such files say nothing."""
        return "ztsnr" in self.shapes

    def infer_configs(self) -> str:
        """The model on the Hub that Diffusers infers from the header; `UsageError` if its prediction is unclear."""
        said = self.prediction_type
        source = str(fetch_diffusers_config(self._tensors())["pretrained_model_name_or_path"])
        if self.shapes.get(_SD2_NAME, [0])[-1] == 1024:
            if said == "v_prediction":
                return source  # 2.1's, which predicts v
            raise UsageError(  # some predict ε and some v, and most files do not say which
                f"{self.name} is a Stable Diffusion 2 model, of which some predict noise and some v: "
                "pass a Diffusers folder or Hub id with the right scheduler config as --teacher_config."
            )
        if said not in (None, "epsilon"):  # no model that Diffusers infers, apart from 2.1, predicts anything else
            what = {"v_prediction": "v"}.get(said, said)
            raise UsageError(
                f"{self.name} predicts {what}{' and ends at zero SNR' if self.ends_at_zero_snr else ''}: pass a "
                "Diffusers folder or Hub id with such a scheduler config as --teacher_config."
            )
        return source

    def check_scheduler(self, config: Mapping[str, Any], source: str) -> None:
        """`UsageError` if the scheduler's config, of the model `source`, contradicts what the file says."""
        said, configured = self.prediction_type, config.get("prediction_type", "epsilon")
        if said not in (None, configured):
            raise UsageError(
                f"{self.name} says that it predicts {said} (in its metadata, or by a marker), the scheduler of "
                f"{source} {configured}: pass a Diffusers folder or Hub id whose scheduler_config.json has "
                f'"prediction_type": "{said}" as --teacher_config.'
            )
        if self.ends_at_zero_snr and not config.get("rescale_betas_zero_snr") and config.get("trained_betas") is None:
            raise UsageError(
                f"{self.name} says that it ends at zero SNR (its marker ztsnr), the scheduler of {source} does not: "
                'pass a Diffusers folder or Hub id whose scheduler_config.json has "rescale_betas_zero_snr": true as '
                "--teacher_config."
            )

    def check_parts(self, parts: Mapping[str, str]) -> None:
        """`UsageError` unless the file has `parts`, by name, each with the remedy if it is missing."""
        kind = infer_diffusers_model_type(self._tensors())
        if kind not in _SUPPORTED_KINDS:
            raise UsageError(
                f"{self.name} is a model of another kind, {kind}; only Stable Diffusion 1.x, 2.x and SDXL are "
                "supported."
            )
        if markers := sorted(key for key in self.shapes if key.startswith("edm_")):
            raise UsageError(
                f"{self.name} has the continuous noise levels of EDM (its marker {markers[0]}), as Playground v2.5 and "
                "CosXL; only models that were trained with a discrete schedule of betas are supported."
            )
        for part, remedy in parts.items():
            if not any(key.startswith(PREFIXES[part]) for key in self.shapes):
                lora = " (it is a LoRA)" if any("lora_" in key for key in self.shapes) else ""
                raise UsageError(f"{self.name} contains no {part}{lora}; {remedy}.")

    def unet_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A U-Net's config with the file's own numbers of channels: an inpainting model beside others' configs."""
        found = dict(config)
        if len(first := self.shapes.get(_FIRST, [])) == 4:
            found["in_channels"] = first[1]
        if len(last := self.shapes.get(_LAST, [])) == 4:
            found["out_channels"] = last[0]
        return found

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Tensors of the file's shapes, without memory, from which Diffusers infers the model."""
        return {key: torch.empty(shape, device="meta") for key, shape in self.shapes.items()}

    def read(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of `part`, by name."""
        with safe_open(self.path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(PREFIXES[part])}


def from_original_layout(
    kind: Any, weights: dict[str, torch.Tensor], configs: str, name: str, dtype: torch.dtype
) -> torch.nn.Module:
    """A network of class `kind` from its `weights` in the original layout; `ValueError` unless they all fit."""
    if hasattr(kind, "from_single_file"):  # in float32: given a dtype, it warns about modules that are missing
        part = kind.from_single_file(weights, config=configs, subfolder=name)
    else:
        part = create_diffusers_clip_model_from_ldm(
            kind, checkpoint=weights, config=configs, subfolder=name, torch_dtype=dtype
        )
    state = part.state_dict()
    missing = [key for key, tensor in state.items() if tensor.is_meta]
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}")
    if kind is UNet2DConditionModel and len(weights) != len(state):  # the same tensors in both layouts
        raise ValueError(f"{name} has {len(weights)} tensors in the file, {len(state)} by its config")
    return part
