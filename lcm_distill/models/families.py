"""The two families of teachers, and the interface that their modules implement."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel

from lcm_distill.data.encoded import Encoding
from lcm_distill.models import sd, sdxl
from lcm_distill.models.support import is_sdxl
from lcm_distill.models.teacher import Teacher


class Family(Protocol):
    """What a family's module provides: `sd` for Stable Diffusion 1.x and 2.x, `sdxl` for SDXL and SSD-1B.

    A conditioning is a dict of keyword arguments for the U-Net: tensors `[B, …]`, or dicts of them.
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
        """This family's subclass of `FrozenParts`."""

    def load_frozen(
        self,
        teacher: Teacher,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        unet_dtype: torch.dtype = torch.float32,
        encoding: Encoding | None = None,
    ) -> Any:
        """A `Frozen` with all that a training step needs loaded onto `device`."""

    def text_fingerprint(self, teacher: Teacher) -> str:
        """Identifies the text encoders: equal for two teachers if `encode_captions` is."""

    def embedding_shapes(self, teacher: Teacher) -> dict[str, tuple[int, ...]]:
        """The shapes, of one caption, of the arrays that `encode_captions` gives; loads no network."""

    def base_model_version(self, unet_config: Mapping[str, Any]) -> str:
        """The model's name in the metadata of kohya-format LoRAs."""

    def count_tokens(self, teacher: Teacher, captions: Sequence[str]) -> list[tuple[int, int]]:
        """For each caption (its tokens, how many of them the text encoders read); loads only the tokenizers."""

    def encode_captions(self, frozen: Any, captions: list[str]) -> dict[str, Any]:
        """The text part of the conditioning of `captions`."""

    def batch_conditioning(self, frozen: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(conditioning, unconditional) of a batch of the stream; the latter, of the empty caption, has B rows or 1."""

    def build_pipeline(self, frozen: Any, unet: UNet2DConditionModel, scheduler: Any) -> Any:
        """A text-to-image pipeline of `unet` and the frozen parts."""


FAMILIES: Mapping[str, Family] = {"sd": sd, "sdxl": sdxl}


def family_of(unet_config: Mapping[str, Any]) -> Family:
    """The family of a teacher, from its U-Net's config."""
    return FAMILIES["sdxl" if is_sdxl(unet_config) else "sd"]
