"""From a raw sample to pixels and words: decode, caption, resize and crop, with the true micro-conditioning.

An encoded sample (`lcm_distill.encoded`) has the moments of its latents in place of pixels, and perhaps its captions'
embeddings.
"""

import contextlib
import io
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from lcm_distill.encoded import Encoding, OtherEncoding, unpack
from lcm_distill.errors import UsageError
from lcm_distill.filters import FILTERED, Filter, look_up
from lcm_distill.shards import (
    FLAG,
    LATENTS,
    PICTURES,
    RawSample,
    caption_files,
    check_caption_column,
    json_key,
    printable,
)

CAPTION_KEYS = ("caption", "text")

# By content, since pictures are often misnamed. Pillow reads more, but some of that runs programs (EPS: ghostscript).
Image.init()
PILLOW_FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF") if name in Image.OPEN
)  # AVIF is not in every Pillow
INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos", "box", "hamming")}
INTERPOLATIONS |= {"nearest": Image.Resampling.NEAREST, "nearest_exact": Image.Resampling.NEAREST}
with warnings.catch_warnings():  # torch says once in a process that an array is read-only: this is that once
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(1), np.uint8))
_TORCH_MODES = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}
MAX_PIXELS = 178_956_970  # a picture of more is taken for a decompression bomb (where Pillow draws the line too)
MAX_SCANS = 100  # of a JPEG; progressive ones have some 10. Each goes over the whole picture, and can be 50 bytes long
MAX_CAPTION = 4096  # characters; text encoders read some 77 tokens

# Why a sample is dropped.
NO_PICTURE = "no picture (.jpg, .png, .webp or another known kind)"
NO_CAPTION = "no caption (.txt, .text, .caption or a JSON caption)"
CAPTION_NOT_UTF8 = "caption is not UTF-8"
NOT_A_PICTURE = "picture file holds no picture"
DAMAGED_PICTURE = "picture is damaged or cut short"
HUGE_PICTURE = "picture is too large (a decompression bomb)"
HUGE_FILE = "file is too large"
DUPLICATE_NAME = "two files of one name in a sample"
UNREADABLE_SHARD = "shard cannot be read, or not to its end"
NO_LATENTS = "no latents (.latents.safetensors), as the other samples have"
DAMAGED_LATENTS = "latents are damaged, or not what the shard says"


class BadSample(Exception):
    """This sample is not used; `reason` is one of the constants above, of `caption_reasons`, or a filter's."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class MixedShards(UsageError):
    """Samples of different kinds are among the shards: pictures, latents, latents of another encoding."""

    def __init__(self, raw: RawSample, what: str):
        super().__init__(
            f"{FLAG}: the sample {printable(raw.key)} {what}. Train on shards of pictures, or on encoded ones that "
            "were all made with the same teacher and flags (python -m lcm_distill.encode_shards)."
        )


@dataclass(frozen=True)
class Preparation:
    """What becomes of a sample on the way to pixels and words; `UsageError` for a value that cannot be.

    resolution: side of the square pictures, pixels.
    interpolation: one of `INTERPOLATIONS` (Pillow's, all antialiased).
    center_crop: crop the middle, not a random part.
    random_flip: mirror every other picture.
    proportion_empty_prompts: of the captions, 0 to 1.
    caption_column: a file extension or a JSON key, the only place to take captions from (`check_caption_column`);
        None for the usual ones.
    min_image_size: pictures whose shorter side is shorter than this many pixels are left out.
    filters: what a sample's JSON must satisfy, by `parse_filters`.
    encoding: of the shards, if they are encoded; the resolution, the interpolation and the crop are then its own.
    """

    resolution: int
    interpolation: str = "bilinear"
    center_crop: bool = False
    random_flip: bool = False
    proportion_empty_prompts: float = 0.0
    caption_column: str | None = None
    min_image_size: int = 0
    filters: Sequence[Filter] = ()
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        for flag, value, least in (("--resolution", self.resolution, 1), ("--min_image_size", self.min_image_size, 0)):
            if value < least:
                raise UsageError(f"{flag} is {value}; give {least} or more.")
        if self.interpolation not in INTERPOLATIONS:
            given = repr(self.interpolation)
            raise UsageError(f"--interpolation_type is {given}; give one of {', '.join(INTERPOLATIONS)}.")
        if not 0 <= self.proportion_empty_prompts <= 1:
            given = str(self.proportion_empty_prompts)
            raise UsageError(f"--proportion_empty_prompts is {given}; give a number from 0 to 1.")
        object.__setattr__(self, "caption_column", check_caption_column(self.caption_column))
        object.__setattr__(self, "filters", tuple(self.filters))


@dataclass
class Sample:
    arrays: dict[str, np.ndarray]  # "pixels" uint8 [resolution, resolution, 3]; or "moments" and embeddings, float16
    caption: str
    original_size: tuple[int, int]  # (height, width)
    crop_top_left: tuple[int, int]
    picture_size: tuple[int, int]  # (height, width) of the picture in the shard, upright


def read_json(raw: RawSample) -> dict:
    """The sample's JSON; {} for none, a broken one, or one that is not an object: JSON is never a reason to drop."""
    try:
        content = json.loads(raw.files.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def caption_reasons(column: str | None) -> tuple[str, str]:
    """Why a sample without a caption is dropped, and one whose caption is not UTF-8."""
    if column is None:
        return NO_CAPTION, CAPTION_NOT_UTF8
    return f'no caption in "{column}" (--caption_column)', f'caption in "{column}" (--caption_column) is not UTF-8'


def read_captions(raw: RawSample, meta: dict, caption_column: str | None = None) -> tuple[list[str], str]:
    """(the sample's captions, where they come from); empty ones do not count.

    Args:
        meta: its JSON, by `read_json`.
        caption_column: as `check_caption_column` gives it: the file with this extension, or, if that has no text,
            the JSON's key of this name, are the only places to look. None: `CAPTIONS` and `CAPTION_KEYS`, in order.

    Raises:
        BadSample: there is none.
    """
    reason, not_utf8 = caption_reasons(caption_column)
    sources: dict[str, object] = {}
    for extension in caption_files(caption_column)[:-1]:  # without the JSON
        try:
            sources["." + extension] = raw.files.get(extension, b"").decode("utf-8-sig")
        except UnicodeDecodeError:
            reason = not_utf8
    keys = CAPTION_KEYS if caption_column is None else (json_key(caption_column),)
    sources |= {f'JSON "{key}"': look_up(meta, key) for key in keys}
    for source, value in sources.items():
        texts = value if isinstance(value, list) else [value]
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        cleaned = [t.encode("utf-8", "replace").decode().strip()[:MAX_CAPTION] for t in texts if isinstance(t, str)]
        if any(cleaned):
            return [text for text in cleaned if text], source
    raise BadSample(reason)


def _size_in_json(meta: dict) -> tuple[int, int] | None:
    """(height, width) before the dataset's maker shrank the picture, if the JSON tells it in a known way."""

    def side(key: str) -> int:
        value = meta.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return 0
        return int(value) if 0 < value < 2**31 and value == int(value) else 0

    for height, width in (("original_height", "original_width"), ("height", "width")):
        if side(height) and side(width):
            return side(height), side(width)
    return None


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
    _check_size((height, width), min_image_size)
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


def _check_size(size: tuple[int, int], min_image_size: int) -> None:
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


def resize_and_crop(
    image: Image.Image, *, true_size: tuple[int, int], resolution: int, resample: int, top: float, left: float
) -> tuple[np.ndarray, tuple[int, int], int]:
    """The shorter side to `resolution`, then a square crop.

    Args:
        image: RGB, at its true size, or decoded at a smaller one.
        true_size: (height, width), which the resized picture's shape comes from.
        top, left: where the crop lies, from 0 (first row or column) to 1 (last), exclusive.

    Returns:
        the square picture, uint8 [resolution, resolution, 3]; (top, left) of the crop in pixels of the resized
        picture; that picture's width.
    """
    short = min(true_size)
    height, width = (resolution * side // short for side in true_size)
    y = int(top * (height - resolution + 1))
    x = int(left * (width - resolution + 1))
    mode = _TORCH_MODES.get(resample)
    if mode is not None and max(height, width) <= 4 * resolution:  # a ribbon's other end is not worth resizing
        square = _resize(image, height, width, mode)[y : y + resolution, x : x + resolution]
    else:
        per_x, per_y = image.width / width, image.height / height
        right, bottom = min((x + resolution) * per_x, image.width), min((y + resolution) * per_y, image.height)
        box = (x * per_x, y * per_y, right, bottom)
        square = np.array(image.resize((resolution, resolution), resample, box=box))
    return square, (y, x), width


def _resize(image: Image.Image, height: int, width: int, mode: str) -> np.ndarray:
    """uint8 [height, width, 3], within some grey levels of Pillow's resize, in a third of its time (with AVX2)."""
    pixels = torch.from_numpy(np.asarray(image))
    resized = torch.nn.functional.interpolate(  # permuted in this order it is taken for channels-last, and not copied
        pixels[None].permute(0, 3, 1, 2), (height, width), mode=mode, antialias=True, align_corners=False
    )
    return resized[0].permute(1, 2, 0).numpy()


def prepare_sample(raw: RawSample, preparation: Preparation, *, draws: np.ndarray) -> Sample:
    """Decode, resize, crop and flip the picture, and choose the caption; or unpack what was encoded.

    Args:
        draws: float64 [5] in [0, 1): top, left, flip, which caption, empty caption. All are always drawn, so that
            switching one option on changes none of the others.

    Raises:
        BadSample: the sample cannot be used.
        MixedShards: it is of another kind than `preparation` is for.
    """
    if raw.duplicate:
        raise BadSample(DUPLICATE_NAME)
    if raw.too_large:
        raise BadSample(HUGE_FILE)
    content = _picture_or_latents(raw, preparation.encoding)
    meta = read_json(raw)
    for condition in preparation.filters:
        if not condition.passes(meta):
            raise BadSample(condition.reason)
    captions, _ = read_captions(raw, meta, preparation.caption_column)
    top, left, flip, which, empty = draws.tolist()
    flipped = preparation.random_flip and flip < 0.5
    number = None if empty < preparation.proportion_empty_prompts else int(which * len(captions))
    if preparation.encoding is not None:
        sample = _unpacked(raw, content, preparation, flipped, number, len(captions))
    else:
        sample = _decoded(content, preparation, top, left, flipped)
        sample.original_size = _size_in_json(meta) or sample.original_size
    sample.caption = "" if number is None else captions[number]
    return sample


def _picture_or_latents(raw: RawSample, encoding: Encoding | None) -> bytes:
    """The file that `encoding` asks for; `MixedShards` if the other is there instead."""
    picture, latents = next((raw.files[e] for e in PICTURES if e in raw.files), None), raw.files.get(LATENTS)
    if encoding is None:
        if picture is None:
            if latents is not None:
                raise MixedShards(raw, "is encoded, and others are pictures (or its shard has lost its first file)")
            raise BadSample(NO_PICTURE)
        return picture
    if latents is None:
        if picture is not None:
            raise MixedShards(raw, "is a picture, and others are encoded")
        raise BadSample(NO_LATENTS)
    return latents


def _decoded(content: bytes, preparation: Preparation, top: float, left: float, flipped: bool) -> Sample:
    """The sample of a picture's file, still without a caption."""
    resolution = preparation.resolution
    image, true_size = decode_picture(content, resolution=resolution, min_image_size=preparation.min_image_size)
    if preparation.center_crop:
        top = left = 0.5
    square, (y, x), resized_width = resize_and_crop(
        image,
        true_size=true_size,
        resolution=resolution,
        resample=INTERPOLATIONS[preparation.interpolation],
        top=top,
        left=left,
    )
    if flipped:
        square = torch.from_numpy(square).flip(1).numpy()  # NumPy copies three bytes at a time
        x = resized_width - resolution - x
    return Sample({"pixels": square}, "", original_size=true_size, crop_top_left=(y, x), picture_size=true_size)


def _unpacked(
    raw: RawSample, content: bytes, preparation: Preparation, flipped: bool, number: int | None, captions: int
) -> Sample:
    """The sample of an encoded picture's file, still without a caption, but with the embeddings of the `number`-th."""
    encoding = preparation.encoding
    assert encoding is not None
    try:
        parts = unpack(content, encoding, mirrored=flipped, captions=captions)
    except OtherEncoding:
        raise MixedShards(raw, "was encoded in another way than others") from None
    except ValueError:
        raise BadSample(DAMAGED_LATENTS) from None
    _check_size(parts.picture_size, preparation.min_image_size)
    chosen = encoding.empty_caption if number is None else {name: e[number] for name, e in parts.embeddings.items()}
    return Sample({"moments": parts.moments} | chosen, "", parts.original_size, parts.crop_top_left, parts.picture_size)
