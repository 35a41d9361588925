"""From a raw sample to pixels and words: decode, caption, resize and crop, with the true micro-conditioning."""

import contextlib
import io
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from lcm_distill.shards import PICTURES, RawSample, caption_files, json_key

CAPTION_KEYS = ("caption", "text")

# By content, since pictures are often misnamed. Pillow reads more, but some of that runs programs (EPS: ghostscript).
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos", "box", "hamming")}
INTERPOLATIONS |= {"nearest": Image.Resampling.NEAREST, "nearest_exact": Image.Resampling.NEAREST}
MAX_PIXELS = 178_956_970  # a picture of more is taken for a decompression bomb (where Pillow draws the line too)
MAX_CAPTION = 4096  # characters; text encoders read some 77 tokens

# Why a sample is dropped.
NO_PICTURE = "no picture (.jpg, .jpeg, .png or .webp)"
NO_CAPTION = "no caption (.txt, .text, .caption or a JSON caption)"
CAPTION_NOT_UTF8 = "caption is not UTF-8"
NOT_A_PICTURE = "picture file holds no picture"
DAMAGED_PICTURE = "picture is damaged or cut short"
HUGE_PICTURE = "picture is too large (a decompression bomb)"
DUPLICATE_NAME = "two files of one name in a sample"
UNREADABLE_SHARD = "shard cannot be read, or not to its end"


class BadSample(Exception):
    """This sample cannot be used; `reason` is one of the constants above, or one of `caption_reasons`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Sample:
    pixels: np.ndarray  # uint8 [resolution, resolution, 3]
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


def _look_up(meta: dict, key: str) -> object:
    """The value of `key` in a JSON; of the path `a.b` in the object `a`, if no key is spelled so. None for nothing."""
    if key in meta:
        return meta[key]
    value: object = meta
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


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
    sources |= {f'JSON "{key}"': _look_up(meta, key) for key in keys}
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


def decode_picture(content: bytes) -> Image.Image:
    """An upright RGB picture from the bytes of a file; transparent parts become white. Raises `BadSample`."""
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=PILLOW_FORMATS)
    except Image.DecompressionBombError:
        raise BadSample(HUGE_PICTURE) from None
    except Exception:  # noqa: BLE001 - a damaged header can raise nearly anything (SyntaxError, struct.error, ...)
        raise BadSample(NOT_A_PICTURE) from None
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(HUGE_PICTURE)
    try:
        image.load()
        with contextlib.suppress(Exception):  # broken EXIF: take the picture as it lies
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except Exception:  # noqa: BLE001 - decoders raise nearly anything
        raise BadSample(DAMAGED_PICTURE) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image, *, resolution: int, resample: int, top: float, left: float
) -> tuple[Image.Image, tuple[int, int], int]:
    """The shorter side to `resolution`, then a square crop, in one pass over the cropped part only.

    Args:
        top, left: where the crop lies, from 0 (first row or column) to 1 (last), exclusive.

    Returns:
        the square picture; (top, left) of the crop in pixels of the resized picture; that picture's width.
    """
    width, height = image.size
    short = min(width, height)
    resized_width, resized_height = resolution * width // short, resolution * height // short
    y = int(top * (resized_height - resolution + 1))
    x = int(left * (resized_width - resolution + 1))
    per_x, per_y = width / resized_width, height / resized_height
    right, bottom = min((x + resolution) * per_x, width), min((y + resolution) * per_y, height)
    square = image.resize((resolution, resolution), resample, box=(x * per_x, y * per_y, right, bottom))
    return square, (y, x), resized_width


def prepare_sample(
    raw: RawSample,
    *,
    resolution: int,
    resample: int,
    center_crop: bool,
    random_flip: bool,
    proportion_empty_prompts: float,
    caption_column: str | None = None,
    draws: np.ndarray,
) -> Sample:
    """Decode, resize, crop and flip the picture, and choose the caption.

    Args:
        caption_column: as in `read_captions`.
        draws: float64 [5] in [0, 1): top, left, flip, which caption, empty caption. All are always drawn, so that
            switching one option on changes none of the others.

    Raises:
        BadSample: the sample cannot be used.
    """
    if raw.duplicate:
        raise BadSample(DUPLICATE_NAME)
    content = next((raw.files[e] for e in PICTURES if e in raw.files), None)
    if content is None:
        raise BadSample(NO_PICTURE)
    meta = read_json(raw)
    captions, _ = read_captions(raw, meta, caption_column)
    image = decode_picture(content)
    top, left, flip, which, empty = draws.tolist()
    if center_crop:
        top = left = 0.5
    square, (y, x), resized_width = resize_and_crop(image, resolution=resolution, resample=resample, top=top, left=left)
    if random_flip and flip < 0.5:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = resized_width - resolution - x
    picture_size = (image.height, image.width)
    return Sample(
        pixels=np.asarray(square),
        caption="" if empty < proportion_empty_prompts else captions[int(which * len(captions))],
        original_size=_size_in_json(meta) or picture_size,
        crop_top_left=(y, x),
        picture_size=picture_size,
    )
