"""A picture's file to an upright RGB picture, whatever the bytes claim to be."""

import contextlib
import io
import re

import numpy as np
from PIL import Image, ImageOps

from lcm_distill.data.filters import FILTERED
from lcm_distill.data.raw import DAMAGED_PICTURE, HUGE_PICTURE, NOT_A_PICTURE, BadSample

# By content, since pictures are often misnamed. Pillow reads more, but some of that runs programs (EPS: ghostscript).
Image.init()
PILLOW_FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF") if name in Image.OPEN
)  # AVIF is not in every Pillow
MAX_PIXELS = 178_956_970  # a picture of more is taken for a decompression bomb (where Pillow draws the line too)
MAX_SCANS = 100  # of a JPEG; progressive ones have some 10. Each goes over the whole picture, and can be 50 bytes long
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # of those that a length follows


def _count_scans(content: bytes) -> int:
    """The scans of a JPEG; 0 of anything else."""
    scans, position, components = 0, 2, 0
    while content.startswith(b"\xff\xd8") and (found := _MARKER.search(content, position)):
        marker, position = found.group()[1], found.end()
        if marker == 0xD9:
            break
        if marker in (0xC0, 0xC1):  # a baseline JPEG of so many components
            components = content[position + 7] if len(content) > position + 7 else 0
        elif marker == 0xDA:
            scans += 1
            if scans == 1 and components and content[position + 2 : position + 3] == bytes([components]):
                return scans  # all of them in this scan: the decoder looks for no other
        position += int.from_bytes(content[position : position + 2], "big")
    return scans


def open_picture(content: bytes) -> Image.Image:
    """A picture, its header alone read from a file's bytes; `BadSample` for what is none, or is a bomb."""
    if _count_scans(content) > MAX_SCANS:
        raise BadSample(HUGE_PICTURE)
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=PILLOW_FORMATS)
    except Image.DecompressionBombError:
        raise BadSample(HUGE_PICTURE) from None
    except Exception:  # noqa: BLE001 - a damaged header can raise nearly anything (SyntaxError, struct.error, ...)
        raise BadSample(NOT_A_PICTURE) from None
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(HUGE_PICTURE)
    return image


def decode_picture(
    content: bytes, *, resolution: int | None = None, min_image_size: int = 0
) -> tuple[Image.Image, tuple[int, int]]:
    """(an upright RGB picture from the bytes of a file, its true (height, width)); transparent parts become white.

    Args:
        resolution: if given, the format may decode at a half, quarter or eighth of the true size (JPEG does, in a
            fraction of the time) as long as no side gets shorter than this.
        min_image_size: the least length of the shorter side, pixels.

    Raises:
        BadSample: it is too small, too large, damaged, or no picture.
    """
    image = open_picture(content)
    width, height = image.size
    check_size((height, width), min_image_size)
    try:
        if resolution is not None:
            image.draft(image.mode, (resolution, resolution))
        image.load()
        lies = image.size
        with contextlib.suppress(Exception):  # broken EXIF: take the picture as it lies
            ImageOps.exif_transpose(image, in_place=True)  # without it, a copy of each picture that needs no turning
        return to_rgb(image), ((width, height) if image.size != lies else (height, width))
    except Exception:  # noqa: BLE001 - decoders raise nearly anything
        raise BadSample(DAMAGED_PICTURE) from None


def check_size(size: tuple[int, int], min_image_size: int) -> None:
    if min(size) < min_image_size:
        raise BadSample(f"{FILTERED} --min_image_size {min_image_size}")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits; 16-bit grey is scaled, not clipped, and transparent parts become white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.empty((image.height, image.width), np.uint8)
        for top in range(0, image.height, 256):  # a strip at a time: floats are eight times as large
            strip = np.asarray(image.crop((0, top, image.width, min(top + 256, image.height))))
            grey[top : top + 256] = (strip.clip(0, 65535) / 257).round()
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")
