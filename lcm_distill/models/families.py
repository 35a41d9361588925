"""The families of teachers."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lcm_distill.models import sd, sdxl

FAMILIES: Mapping[str, ModuleType] = {"sd": sd, "sdxl": sdxl}


def family_of(unet_config: Mapping[str, Any]) -> str:
    """ "sd" or "sdxl", by a U-Net's config."""
    return "sdxl" if unet_config.get("addition_embed_type") == "text_time" else "sd"
