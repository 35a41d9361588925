"""The two families of teachers, and the interface that their modules share."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel

from lcm_distill.data.encoded import Encoding
from lcm_distill.models import sd, sdxl
from lcm_distill.models.teacher import Teacher


class Family(Protocol):
    """What a family's module has: `sd` for Stable Diffusion 1.x and 2.x, `sdxl` for SDXL and SSD-1B.

    A conditioning is keyword arguments of the U-Net: tensors `[B, …]`, or mappings of them.
    """

    @property
    def NAME(self) -> str:
        """ "sd" or "sdxl"."""

    @property
    def PIPELINE(self) -> Any:
        """Diffusers' text-to-image pipeline class."""

    @property
    def TAGS(self) -> list[str]:
        """Tags of the model card."""

    @property
    def Frozen(self) -> Any:
        """The `FrozenParts` of this family, nothing loaded yet."""

    def load_frozen(
        self,
        teacher: Teacher,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        unet_dtype: torch.dtype = torch.float32,
        encoding: Encoding | None = None,
    ) -> Any:
        """`Frozen` with all that a training step needs loaded onto `device`."""

    def text_fingerprint(self, teacher: Teacher) -> str:
        """Tells what `encode_captions` gives for this teacher from what it gives for others."""

    def base_model_version(self, unet_config: Mapping[str, Any]) -> str:
        """The model's name in the metadata of kohya-format LoRAs."""

    def encode_captions(self, frozen: Any, captions: list[str]) -> dict[str, Any]:
        """The text part of the conditioning for `captions`."""

    def batch_conditioning(self, frozen: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The conditioning of a batch of the stream, and that of the empty caption, of B rows or of 1."""

    def build_pipeline(self, frozen: Any, unet: UNet2DConditionModel, scheduler: Any) -> Any:
        """A pipeline that draws with `unet` and the frozen parts."""


FAMILIES: Mapping[str, Family] = {"sd": sd, "sdxl": sdxl}


def family_of(unet_config: Mapping[str, Any]) -> Family:
    """The family of a teacher, by the config of its U-Net."""
    return FAMILIES["sdxl" if unet_config.get("addition_embed_type") == "text_time" else "sd"]
