"""Decodes the file of a picture to an upright RGB picture, by its content, whatever its extension."""

import contextlib
import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from lcm_distill.data.filters import FILTERED
from lcm_distill.data.raw import DAMAGED_PICTURE, HUGE_PICTURE, NOT_A_PICTURE, BadSample

# Pillow reads more formats, but some of them run programs (EPS: ghostscript).
Image.init()
PILLOW_FORMATS = tuple(  # AVIF is not in every Pillow
    name for name in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF") if name in Image.OPEN
)
MAX_PIXELS = 178_956_970  # more is treated as a decompression bomb, as in Pillow
# Scans of a JPEG. Progressive ones have about 10; each costs a pass over the picture, and can be as short as 50 bytes.
MAX_SCANS = 100
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # of the JPEG segments that have a length


def _count_scans(content: bytes) -> int:
    """The number of scans of a JPEG; 0 for anything else."""
    scans, position, components = 0, 2, 0
    while content.startswith(b"\xff\xd8") and (found := _MARKER.search(content, position)):
        marker, position = found.group()[1], found.end()
        if marker == 0xD9:
            break
        if marker in (0xC0, 0xC1):  # the frame header of a baseline JPEG
            components = content[position + 7] if len(content) > position + 7 else 0
        elif marker == 0xDA:
            scans += 1
            if scans == 1 and components and content[position + 2 : position + 3] == bytes([components]):
                return scans  # this scan has all components, and the decoder looks for no other
        position += int.from_bytes(content[position : position + 2], "big")
    return scans


def open_picture(content: bytes) -> Image.Image:
    """Opens a picture, reading only its header; `BadSample` if it is not a picture, or is a decompression bomb."""
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


@dataclass(frozen=True)
class Picture:
    """A decoded picture."""

    image: Image.Image  # 8-bit RGB, upright; possibly smaller than `size`
    size: tuple[int, int]  # the true (height, width), upright
    turned: bool  # the EXIF orientation turned it by 90 degrees


def read_picture(content: bytes, *, resolution: int | None = None, min_image_size: int = 0) -> Picture:
    """Decodes a picture; transparent parts become white.

    Args:
        content: the bytes of a picture's file.
        resolution: if given, the picture may be decoded at a half, quarter or eighth of its true size (JPEG is, in a
            fraction of the time) as long as no side gets shorter than this.
        min_image_size: the minimum length of the shorter side, pixels.

    Raises:
        BadSample: it is too small, too large, damaged, or not a picture.
    """
    image = open_picture(content)
    width, height = image.size
    check_size((height, width), min_image_size)
    try:
        if resolution is not None:
            image.draft(image.mode, (resolution, resolution))
        turned = load_upright(image)
        if image.format == "TIFF":  # its size is that of the upright picture from the start, or, in older Pillows, not
            width, height = image.size
        elif turned:
            width, height = height, width
        return Picture(to_rgb(image), (height, width), turned)
    except Exception:  # noqa: BLE001 - decoders raise nearly anything
        raise BadSample(DAMAGED_PICTURE) from None


def decode_picture(content: bytes, *, resolution: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Returns (an upright RGB picture, its true (height, width)); arguments and errors as in `read_picture`."""
    picture = read_picture(content, resolution=resolution)
    return picture.image, picture.size


def load_upright(image: Image.Image) -> bool:
    """Decodes an opened picture and turns it upright, in place; returns whether that swapped width and height.

    With broken EXIF the picture stays as it is stored.
    """
    by_pillow = image.tag_v2.get(ExifTags.Base.Orientation) if isinstance(image, TiffImageFile) else None
    image.load()  # turns TIFFs
    stored_size = image.size
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)  # in place: otherwise upright pictures are copied
    return image.size != stored_size or by_pillow in (5, 6, 7, 8)


def check_size(size: tuple[int, int], min_image_size: int) -> None:
    """`BadSample`, a filter's, if the shorter side of a picture is shorter than `min_image_size` pixels."""
    if min(size) < min_image_size:
        raise BadSample(f"{FILTERED} --min_image_size {min_image_size}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB; 16-bit grey is scaled, not clipped, and transparent parts become white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.empty((image.height, image.width), np.uint8)
        for top in range(0, image.height, 256):  # in strips, since the floats take eight times the memory
            strip = np.asarray(image.crop((0, top, image.width, min(top + 256, image.height))))
            grey[top : top + 256] = (strip.clip(0, 65535) / 257).round()
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")
