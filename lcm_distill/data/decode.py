"""Decodes the file of a picture to an upright sRGB picture, by its content, whatever its extension."""

import contextlib
import io
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from lcm_distill.data.budget import BUDGET
from lcm_distill.data.colour import MAX_PROFILE_BYTES, to_srgb
from lcm_distill.data.filters import FILTERED
from lcm_distill.data.raw import (
    DAMAGED_PICTURE,
    HEIC,
    HUGE_PICTURE,
    LARGE_PICTURE,
    NO_AVIF,
    NOT_A_PICTURE,
    NOT_ALL_BITS,
    OTHER_KIND,
    UNKNOWN_RANGE,
    UNREAD_TIFF,
    BadSample,
)

# Pillow reads more formats, but some of them run programs (EPS: ghostscript).
Image.init()
PILLOW_FORMATS = tuple(  # AVIF is not in every Pillow
    name for name in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF") if name in Image.OPEN
)
# Of a PNG's profile or one of its texts, of which there may be 64 MB together. Pillow's own limit of 1 MB refuses
# pictures with the profiles of printing presses, or with a workflow.
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE_BYTES
MAX_PIXELS = 178_956_970  # more is treated as a decompression bomb, as in Pillow
# Scans of a JPEG. Progressive ones have about 10; each costs a pass over the picture, and can be as short as 50 bytes.
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 2 * 10**9  # in all scans together: about 12 of a picture of 150 megapixels
# Segments of a JPEG, bytes between them, chunks of a PNG, tags and strips of a TIFF: Pillow goes through them in
# Python, 1 to 30 µs and up to 130 bytes of memory for each of 4 to 20 bytes. A PNG of 256 MB in the usual chunks has
# 32,000, a JPEG some hundreds, a TIFF at most one for each row of each channel.
MAX_PARTS = 50_000
MAX_RUN_LENGTH_PIXELS = 2**24  # of a BMP that Pillow unpacks in Python, pixel by pixel
# Bytes per pixel at most, from the decoder's first buffer to the resized square: measured, by the kernel's high-water
# mark, with pictures that are turned, transparent, and of another colour profile. Most is one picture of four bytes per
# pixel, another one that it is turned or converted to, and its bytes for the resize. WebP's decoder has two of its own.
BYTES_PER_PIXEL = 12
_BYTES_OF_FORMAT = {"WEBP": 20, "AVIF": 16}
_TAGS = {  # of TIFFs
    "BitsPerSample": 258,
    "PhotometricInterpretation": 262,  # 0: white is zero
    "Orientation": 274,
    "SamplesPerPixel": 277,
    "TileWidth": 322,
    "TileLength": 323,
    "SampleFormat": 339,  # 2: signed integers
}
# TIFF's StripOffsets, StripByteCounts, TileOffsets, TileByteCounts; BitsPerSample, ExtraSamples, SampleFormat.
_LISTS = (273, 279, 324, 325, 258, 338, 339)
_PNG = b"\x89PNG\r\n\x1a\n"
_BEGINNINGS = (b"\xff\xd8\xff", _PNG, b"GIF87a", b"GIF89a")
# The first bytes of pictures of other kinds.
_OTHER_KINDS = (
    b"\xff\x0a",  # JPEG XL
    b"\0\0\0\x0cJXL \r\n\x87\n",
    b"\0\0\0\x0cjP  \r\n\x87\n",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    b"II\xbc\x01",  # JPEG XR
    b"8BPS",  # Photoshop
    b"gimp xcf",
    b"\x76\x2f\x31\x01",  # OpenEXR
    b"#?RADIANCE",
    b"DDS ",
    b"qoif",
    b"icns",
    b"\0\0\1\0",  # icons
    b"<svg",
    b"FUJIFILMCCD-RAW",
    *(b"P%d%c" % (kind, space) for kind in range(1, 8) for space in b" \n"),  # PBM, PGM, PPM, PAM
)
_SIGNED = 2  # SampleFormat
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # of the JPEG segments that have a length


def _count_scans(content: bytes) -> int:
    """The number of scans of a JPEG; 0 for anything else. `BadSample` for a JPEG of too many parts."""
    scans, position, components, parts, padding = 0, 2, 0, 0, 0
    while content.startswith(b"\xff\xd8") and (found := _MARKER.search(content, position)):
        parts += 1
        padding += 0 if scans else found.start() - position
        if parts > MAX_PARTS or padding > MAX_PARTS:
            raise BadSample(HUGE_PICTURE)
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


def _check_chunks(content: bytes) -> None:
    """`BadSample` for a PNG of too many parts; what follows its end is no part of it."""
    if content.startswith(_PNG):
        position = len(_PNG)
        for _ in range(MAX_PARTS):
            is_last = content[position + 4 : position + 8] == b"IEND"
            position += 12 + int.from_bytes(content[position : position + 4], "big")
            if is_last or position >= len(content):
                return
        raise BadSample(HUGE_PICTURE)


def _check_strips(content: bytes) -> None:
    """`BadSample` for a TIFF of too many tags, or whose strips, tiles or channels are too many."""
    if content[:2] not in (b"II", b"MM") or not {content[2:3], content[3:4]} & {b"*", b"+"}:
        return
    order, is_big = "<" if content[:2] == b"II" else ">", b"+" in content[2:4]
    number, tag = (struct.Struct(order + kind) for kind in (("Q", "HHQ8x") if is_big else ("H", "HHI4x")))
    with contextlib.suppress(struct.error):  # it ends before: damaged, which Pillow finds
        (position,) = struct.unpack_from(order + ("Q" if is_big else "I"), content, 8 if is_big else 4)
        (tags,) = number.unpack_from(content, position)
        for index in range(min(tags, MAX_PARTS + 1)):
            name, _, values = tag.unpack_from(content, position + number.size + index * tag.size)
            if index == MAX_PARTS or (name in _LISTS and values > MAX_PARTS):
                raise BadSample(HUGE_PICTURE)


def open_picture(content: bytes, formats: tuple[str, ...] = PILLOW_FORMATS) -> Image.Image:
    """Opens a picture of one of Pillow's `formats`, reading only its header.

    `BadSample` if it is not such a picture, or is a decompression bomb.
    """
    return _open_picture(content, formats)[0]


def _open_picture(content: bytes, formats: tuple[str, ...]) -> tuple[Image.Image, int]:
    """(the opened picture, the number of its scans if it is a JPEG)."""
    scans = _count_scans(content)
    if scans > MAX_SCANS:
        raise BadSample(HUGE_PICTURE)
    _check_chunks(content)
    _check_strips(content)
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=formats)
    except Image.DecompressionBombError:
        raise BadSample(HUGE_PICTURE) from None
    except Exception as error:  # noqa: BLE001 - a damaged header can raise nearly anything (SyntaxError, ...)
        if "MAX_TEXT" in str(error):  # a PNG's texts or profile that expand to more than they may
            raise BadSample(HUGE_PICTURE) from None
        raise BadSample(_why_not_opened(content)) from None
    pixels = image.width * image.height
    too_slow = scans * pixels > MAX_SCANNED_PIXELS or (_is_run_length_bmp(image) and pixels > MAX_RUN_LENGTH_PIXELS)
    if pixels > MAX_PIXELS or too_slow:
        raise BadSample(HUGE_PICTURE)
    return image, scans


def memory_to_decode(image: Image.Image, *, size: tuple[int, int] | None = None, scans: int = 2) -> int:
    """Bytes that an opened picture takes at most while it is decoded, turned, converted to RGB and resized.

    Args:
        image: possibly to be decoded at a smaller size than its own (`Image.draft`).
        size: its own (width, height), if it is.
        scans: of a JPEG; with several, the decoder keeps the coefficients of all of the picture.
    """
    width, height = image.size
    need = width * height * _BYTES_OF_FORMAT.get(image.format or "", BYTES_PER_PIXEL)
    if isinstance(image, JpegImageFile) and scans > 1:
        blocks = [(across, down) for _, across, down, _ in image.layer]  # of each component, in the smallest unit
        largest = max((across for across, _ in blocks), default=1) * max((down for _, down in blocks), default=1)
        need += 2 * math.prod(size or image.size) * sum(across * down for across, down in blocks) // max(1, largest)
    elif isinstance(image, TiffImageFile):
        # The decoder has memory for a whole tile, however small the picture is.
        tags = [_tag(image, name) for name in ("TileWidth", "TileLength", "BitsPerSample", "SamplesPerPixel")]
        width_of_tile, height_of_tile, bits, samples = (tag if isinstance(tag, int) else 1 for tag in tags)
        need += width_of_tile * height_of_tile * bits * samples // 8
    elif _is_run_length_bmp(image):
        need += 256 * width  # some versions of Pillow unpack a jump over so many rows, though there are fewer
    return need


def _is_run_length_bmp(image: Image.Image) -> bool:
    return image.format == "BMP" and image.info.get("compression") in (1, 2)


def _why_not_opened(content: bytes) -> str:
    """The reason to leave out what Pillow does not open: a picture of another kind, a damaged one, or none."""
    if content[4:8] == b"ftyp":
        brands = {content[place : place + 4] for place in (8, *range(16, min(len(content), 64), 4))}
        if brands & {b"avif", b"avis"}:
            return DAMAGED_PICTURE if "AVIF" in PILLOW_FORMATS else NO_AVIF
        if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
            return HEIC
        if b"crx " in brands:  # Canon's raw pictures
            return OTHER_KIND
    if content.startswith(_OTHER_KINDS) or (content.startswith(b"<?xml") and b"<svg" in content[:4096]):
        return OTHER_KIND
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        try:
            TiffImageFile(io.BytesIO(content))
        except Exception as error:  # noqa: BLE001 - as above
            if "unknown pixel mode" in str(error):  # whole, but its bits, channels or kind of numbers are not known
                return UNREAD_TIFF
        return DAMAGED_PICTURE
    is_webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    return DAMAGED_PICTURE if is_webp or content.startswith(_BEGINNINGS) else NOT_A_PICTURE


@dataclass(frozen=True)
class Picture:
    """A decoded picture."""

    image: Image.Image  # 8-bit sRGB, upright; possibly smaller than `size`
    size: tuple[int, int]  # the true (height, width), upright
    turned: bool  # the EXIF orientation turned it by 90 degrees
    colours: str  # what was done about its colour profile, or its gamma (`to_srgb`)


def read_picture(
    content: bytes,
    *,
    resolution: int | None = None,
    min_image_size: int = 0,
    max_bytes: int | None = None,
    while_large: contextlib.ExitStack | None = None,
) -> Picture:
    """Decodes a picture; transparent parts become white, and colours those of sRGB if it has a colour profile.

    Args:
        content: the bytes of a picture's file.
        resolution: if given, the picture may be decoded at a half, quarter or eighth of its true size (JPEG is, in a
            fraction of the time) as long as no side gets shorter than this.
        min_image_size: the minimum length of the shorter side, pixels.
        max_bytes: the most memory that it may take to decode (`memory_to_decode`); None: any.
        while_large: holds the picture's share of `BUDGET` until it is closed: close it once the picture is resized.
            None: the share is returned when the picture is decoded.

    Raises:
        BadSample: it is too small, too large, damaged, not a picture, or of values whose range is not known.
    """
    image, scans = _open_picture(content, PILLOW_FORMATS)
    width, height = image.size
    check_size((height, width), min_image_size)
    try:
        if resolution is not None:
            image.draft(image.mode, (resolution, resolution))
        need = memory_to_decode(image, size=(width, height), scans=scans)
    except Exception:  # noqa: BLE001 - a damaged header can raise nearly anything
        raise BadSample(DAMAGED_PICTURE) from None
    if max_bytes is not None and need > max_bytes:
        raise BadSample(LARGE_PICTURE)
    with contextlib.ExitStack() as while_decoded:
        (while_large or while_decoded).enter_context(BUDGET.share(need))
        return _load_picture(image, (width, height))


def _load_picture(image: Image.Image, size: tuple[int, int]) -> Picture:
    """Decodes an opened picture whose true size is this (width, height), and converts it."""
    width, height = size
    try:
        turned = load_upright(image)
        if not isinstance(image, JpegImageFile):  # only JPEG is decoded small
            width, height = image.size
        elif turned:
            width, height = height, width
        image, colours = to_rgb(image)
        return Picture(image, (height, width), turned, colours)
    except BadSample:
        raise
    except Exception:  # noqa: BLE001 - decoders raise nearly anything
        raise BadSample(DAMAGED_PICTURE) from None


def decode_picture(content: bytes, *, resolution: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Returns (an upright RGB picture, its true (height, width)); arguments and errors as in `read_picture`."""
    picture = read_picture(content, resolution=resolution)
    return picture.image, picture.size


def load_upright(image: Image.Image) -> bool:
    """Decodes an opened picture and turns it upright, in place; returns whether that swapped width and height.

    With broken EXIF the picture stays as it is stored. `BadSample` if Pillow cuts off the bits that hold the picture.
    """
    # Pillow turns TIFFs when it loads them, pillow-heif HEIC when it opens them.
    orientation = _tag(image, "Orientation") or image.info.get("original_orientation")
    if _tag(image, "SampleFormat") == _SIGNED and image.mode == "L":  # Pillow takes negative greys for bright ones
        raise BadSample(UNREAD_TIFF)
    has_16_bits = image.mode in ("RGB", "RGBX", "RGBA", "LA") and any(
        ";16" in str(tile[3]) for tile in getattr(image, "tile", ())
    )
    image.load()
    if has_16_bits:  # of which Pillow keeps the upper 8
        colours = len(image.getbands()) - (image.getbands()[-1] in "AX")
        # Cameras and scanners write 14 bits or fewer into the 16 of a TIFF. PNG's are scaled to all 16: only 12 or
        # fewer, which would be nearly black, are taken for an error. With 8, nothing is left: no one can tell it from
        # a picture that is black.
        if np.asarray(image.getextrema())[:colours, 1].max() < (64 if image.format == "TIFF" else 16):
            raise BadSample(NOT_ALL_BITS)
    with contextlib.suppress(Exception):
        by_exif = image.getexif().get(_TAGS["Orientation"])
        ImageOps.exif_transpose(image, in_place=True)  # in place: otherwise upright pictures are copied
        orientation = orientation or by_exif
    return orientation in (5, 6, 7, 8)


def check_size(size: tuple[int, int], min_image_size: int) -> None:
    """`BadSample`, a filter's, if the shorter side of a picture is shorter than `min_image_size` pixels."""
    if min(size) < min_image_size:
        raise BadSample(f"{FILTERED} --min_image_size {min_image_size}")


def to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """Returns (the picture as 8-bit sRGB, transparent parts white; what was done about its colour profile).

    Deep grey is scaled, not clipped: `to_8_bits`, which see for the errors.
    """
    if image.mode == "RGB" and not {"transparency", "icc_profile", "gamma"}.intersection(image.info):
        return image, ""
    image, colours = to_srgb(to_8_bits(image))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        image = white
    return (image if image.mode == "RGB" else image.convert("RGB")), colours


def is_deep(image: Image.Image) -> bool:
    """Whether its pixels are integers of more than 8 bits, or floats; Pillow's own conversions clip these at 255."""
    return image.mode == "F" or image.mode.startswith("I")


def to_8_bits(image: Image.Image) -> Image.Image:
    """A deep picture as 8-bit grey, scaled so that `find_white` becomes 255; any other as it is."""
    if not is_deep(image):
        return image
    white = find_white(image)
    grey = np.empty((image.height, image.width), np.uint8)
    for top, strip in _strips(image):
        scaled = (strip.clip(0, white) / (white / 255)).round()
        grey[top : top + len(strip)] = 255 - scaled if _tag(image, "PhotometricInterpretation") == 0 else scaled
    result = Image.fromarray(grey)
    result.info = dict(image.info)
    transparent = result.info.pop("transparency", None)  # the one deep value that is transparent, in a PNG
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)))
    return result


def fills_16_bits(image: Image.Image) -> bool:
    """Whether a deep picture is as PNG stores 16 bits: 0 for black, 65535 for white. Errors as in `find_white`."""
    return find_white(image) == 2**16 - 1 and _tag(image, "PhotometricInterpretation") != 0


def find_white(image: Image.Image) -> float:
    """The value that stands for white in a deep picture, by what its file says, else by what it holds.

    Integers of a TIFF: the largest of the least depth that holds the largest value, of 1, 8, 10, 12, 14 and 16 bits (of
    16 signed ones 15), since cameras and scanners write their 10 to 14 bits into 16. PNG scales to all of its 16 bits,
    by its specification: a smaller depth is only assumed where 16 would be nearly black. Floats: 1, or else such a
    depth, with a tolerance of a tenth for what a resize overshoots.

    Raises:
        BadSample: values are negative, infinite, not a number, too large, or from 2 to 15 at most.
    """
    low, high, whole = np.inf, -np.inf, image.mode != "F"
    for _, strip in _strips(image):
        low, high = np.minimum(low, strip.min()), np.maximum(high, strip.max())  # of NaN, NaN
    slack = 0.0 if whole else 0.1
    white = _usual_white(image, float(high) / (1 + slack), whole)
    if white is None or not -slack * white <= low:
        raise BadSample(UNKNOWN_RANGE)
    return white


def _usual_white(image: Image.Image, high: float, whole: bool) -> float | None:
    if _tag(image, "BitsPerSample") == 12:
        return 2**12 - 1
    if high <= 1:
        return 1
    if high < 16:
        return None  # nearly black at any depth: classes rather than greys, or the highlights of linear light
    depths = [8, 10, 12, 14, 16]
    if _tag(image, "SampleFormat") == _SIGNED and _tag(image, "BitsPerSample") == 16:
        depths = [8, 10, 12, 14, 15]
    elif whole and image.format != "TIFF" and high >= 2**12:
        depths = [16]
    return next((2**depth - 1 for depth in depths if high <= 2**depth - 1), None)


def _tag(image: Image.Image, name: str) -> Any:
    """A TIFF's tag, of several values the first; None without it and in other formats."""
    value = image.tag_v2.get(_TAGS[name]) if isinstance(image, TiffImageFile) else None
    return value[0] if isinstance(value, tuple) and value else value


def _strips(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, the rows) from top to bottom: as floats, all of a picture takes eight times the memory."""
    for top in range(0, image.height, 256):
        yield top, np.asarray(image.crop((0, top, image.width, min(top + 256, image.height))))
