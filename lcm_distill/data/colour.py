"""Pictures with a colour profile (ICC) to sRGB, which is what the models know.

image, note = to_srgb(image)        # note: "Display P3: converted to sRGB"; "" if there was nothing to do
"""

import hashlib
import io

import numpy as np
from PIL import Image, ImageCms

from lcm_distill.data.raw import printable

MAX_PROFILE_BYTES = 16 * 2**20  # those of printing presses have up to 9 MB
TOLERANCE = 2  # grey levels: a profile that changes nothing by more is sRGB's own, and its pictures stay as they are
_MAX_REMEMBERED = 32  # profiles; a dataset has a handful
_remembered: dict[bytes, "_Profile"] = {}


def to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    """Returns (the picture in sRGB without its profile; what was done, in a few words).

    A picture without a profile, or with sRGB's own, is returned as it is, with "". A converted one is 8-bit RGB, or
    RGBA if it has transparent parts. A profile that is damaged, or of other colours than the picture's (a CMYK profile
    in an RGB picture), is ignored, and the note says so: then the picture is taken for sRGB, as one without a profile.
    By Pillow's ImageCms (Little CMS), with the perceptual intent where a profile has several.
    """
    content = image.info.pop("icc_profile", None)
    if not content:
        return image, ""
    digest = hashlib.blake2b(content, digest_size=16).digest()
    profile = _remembered.get(digest)
    if profile is None:
        if len(_remembered) >= _MAX_REMEMBERED:
            _remembered.clear()
        profile = _remembered[digest] = _Profile(content)
    return profile.convert(image)


class _Profile:
    """A colour profile, and its transforms to sRGB."""

    def __init__(self, content: bytes):
        self._transforms: dict[str, ImageCms.ImageCmsTransform] = {}
        self._space = self._name = ""
        self._is_srgb = False
        try:
            if len(content) > MAX_PROFILE_BYTES:
                return
            self._profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
            self._name = printable((self._profile.profile.profile_description or "unnamed profile").strip())[:60]
            space = self._profile.profile.xcolor_space.strip()
            if space in _PROBES:
                probe = _PROBES[space]
                converted = np.asarray(self._transform(probe.mode, "RGB").apply(probe), np.int16)
                difference = converted - np.asarray(probe.convert("RGB"), np.int16)
                self._is_srgb = bool(np.abs(difference).max() <= TOLERANCE)
            elif space == "CMYK":
                self._transform("CMYK", "RGB")
            self._space = space
        except Exception:  # noqa: BLE001 - a damaged profile can raise nearly anything
            self._space = ""

    def _transform(self, mode: str, to: str) -> ImageCms.ImageCmsTransform:
        if mode not in self._transforms:
            srgb = ImageCms.createProfile("sRGB")
            self._transforms[mode] = ImageCms.buildTransform(self._profile, srgb, mode, to)  # type: ignore[assignment]
        return self._transforms[mode]

    def convert(self, image: Image.Image) -> tuple[Image.Image, str]:
        if not self._space:
            return image, "damaged profile: ignored"
        in_colour = image.mode in ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "YCbCr")
        is_grey = image.mode in ("1", "L", "LA", "La")
        fits = {"RGB": in_colour or is_grey, "GRAY": is_grey, "CMYK": image.mode == "CMYK"}
        if not fits.get(self._space):
            return image, f"{self._name}, not of the picture's colours: ignored"
        if self._is_srgb:
            return image, ""
        note = f"{self._name}: converted to sRGB"
        if self._space == "RGB":
            mode = "RGBA" if image.has_transparency_data else "RGB"
            return self._apply(image, mode, mode), note
        if self._space == "CMYK":
            return self._apply(image, "CMYK", "RGB"), note
        converted = self._apply(image, "L", "RGB")
        if image.has_transparency_data:
            converted.putalpha(image.convert("LA").getchannel("A"))
        return converted, note

    def _apply(self, image: Image.Image, mode: str, to: str) -> Image.Image:
        converted = self._transform(mode, to).apply(image if image.mode == mode else image.convert(mode))
        converted.info.pop("icc_profile", None)  # sRGB's, which Pillow adds
        return converted


def _colour_cube(steps: int = 9) -> Image.Image:
    levels = np.linspace(0, 255, steps).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(steps, -1, 3))


_PROBES = {"RGB": _colour_cube(), "GRAY": Image.fromarray(np.arange(256, dtype=np.uint8)[None])}
