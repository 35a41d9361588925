"""Pictures with a colour profile (ICC), or with the gamma and primaries of a PNG, to sRGB, which the models know.

image, note = to_srgb(image)        # note: "Display P3: converted to sRGB"; "" if there was nothing to do
"""

import hashlib
import io
import struct

import numpy as np
from PIL import Image, ImageCms

from lcm_distill.data.raw import printable

MAX_PROFILE_BYTES = 16 * 2**20  # those of printing presses have up to 9 MB
TOLERANCE = 2  # grey levels: a profile that changes nothing by more is sRGB's own, and its pictures stay as they are
# Of a PNG's chunk gAMA. Within a twentieth of 1/2.2, which is what sRGB's programs write, nothing has to be done.
_GAMMAS, _USUAL_GAMMAS = (0.2, 1.5), (0.43, 0.48)
_SRGB_PRIMARIES = ((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # white, red, green, blue
_D50 = np.array([0.9642, 1.0, 0.8249])  # XYZ
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_MAX_REMEMBERED = 32  # profiles; a dataset has a handful
_remembered: dict[bytes, "_Profile"] = {}


def to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    """Returns (the picture in sRGB without its profile; what was done, in a few words).

    A PNG without a profile may have a gamma and primaries instead (its chunks gAMA and cHRM), which are then taken for
    its profile, unless it says that it is sRGB, or they are implausible. A picture without a profile, or with sRGB's
    own, is returned as it is, with "". A converted one is 8-bit RGB, or RGBA if it has transparent parts. A profile
    that is damaged, or of other colours than the picture's (a CMYK profile in an RGB picture), is ignored, and the note
    says so: then the picture is taken for sRGB, as one without a profile.
    By Pillow's ImageCms (Little CMS), with the perceptual intent where a profile has several.
    """
    content = image.info.pop("icc_profile", None)
    gamma, primaries = image.info.pop("gamma", None), image.info.pop("chromaticity", None)
    if not content and gamma is not None and "srgb" not in image.info:
        content = _profile_of_png(gamma, primaries)
        if content is None:
            return image, f"implausible gamma ({gamma:g}) or primaries: ignored"
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
        if self._space == "Lab" and image.mode == "LAB":  # Pillow's own conversion is by such a profile
            return image, ""
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


def _profile_of_png(gamma: float, primaries: tuple[float, ...] | None) -> bytes | None:
    """A profile (ICC version 2) of a PNG's chunks; b"" if they are those of sRGB, None if they are not plausible.

    Args:
        gamma: the exponent from linear light to pixels, 1/2.2 for most pictures.
        primaries: x and y of white, red, green and blue; None: sRGB's.
    """
    points = np.reshape(primaries or _SRGB_PRIMARIES, (4, 2))
    if _USUAL_GAMMAS[0] < gamma < _USUAL_GAMMAS[1] and np.abs(points - _SRGB_PRIMARIES).max() < 0.005:
        return b""
    x, y = points.T
    if not _GAMMAS[0] <= gamma <= _GAMMAS[1] or not (y > 0).all():
        return None
    white, *colours = np.stack([x / y, np.ones(4), (1 - x - y) / y], 1)
    try:
        matrix = np.transpose(colours)
        matrix = matrix * np.linalg.solve(matrix, white)
        matrix = np.linalg.solve(_BRADFORD, (_BRADFORD @ _D50 / (_BRADFORD @ white))[:, None] * (_BRADFORD @ matrix))
    except np.linalg.LinAlgError:
        return None

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(values * 65536).round().clip(-(2**31), 2**31 - 1).astype(int))

    name = f"gamma {gamma:g}".encode() + (b"" if primaries is None else b" and primaries of a PNG") + b"\0"
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 / gamma))
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78),
        b"wtpt": xyz(_D50),
        **{b"%cXYZ" % letter: xyz(column) for letter, column in zip(b"rgb", matrix.T, strict=True)},
        **{b"%cTRC" % letter: curve for letter in b"rgb"},
    }
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">2I", 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(data)
    header = struct.pack(">I4x4s4s4s4s", size, b"\2\x40\0\0", b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    return (header + bytes(28) + xyz(_D50)[8:]).ljust(128, b"\0") + table + data


def _colour_cube(steps: int = 9) -> Image.Image:
    levels = np.linspace(0, 255, steps).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(steps, -1, 3))


_PROBES = {"RGB": _colour_cube(), "GRAY": Image.fromarray(np.arange(256, dtype=np.uint8)[None])}
