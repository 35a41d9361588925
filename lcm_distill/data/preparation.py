"""Turns a raw sample into pixels and a caption: decodes, resizes and crops, and records the sizes for SDXL.

An encoded sample (`lcm_distill.data.encoded`) has the moments of its latents in place of pixels, and possibly the
embeddings of its captions.
"""

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from lcm_distill.data.budget import BUDGET
from lcm_distill.data.captions import check_caption_column, read_captions, read_json
from lcm_distill.data.decode import check_size, read_picture
from lcm_distill.data.encoded import Encoding, EncodingMismatch, unpack
from lcm_distill.data.filters import Filter, parse_filters
from lcm_distill.data.raw import (
    DAMAGED_LATENTS,
    DUPLICATE_NAME,
    HUGE_FILE,
    LATENTS_EXTENSION,
    NO_LATENTS,
    NO_PICTURE,
    PICTURE_EXTENSIONS,
    BadSample,
    RawSample,
    printable,
)
from lcm_distill.data.sizes import size_in_json
from lcm_distill.errors import UsageError
from lcm_distill.flags import INTERPOLATIONS, MAX_DECODE_MB, SHARDS_FLAG, PreparationFlags

# The names are torchvision's, which has two kinds of nearest; Pillow has one.
_RESAMPLING = {name: Image.Resampling[name.removesuffix("_exact").upper()] for name in INTERPOLATIONS}
with warnings.catch_warnings():  # torch warns once per process that an array is read-only: here, unseen
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(1), np.uint8))
_TORCH_MODES = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}


class MixedShards(UsageError):
    """The shards contain samples of different kinds: pictures, latents, or latents of another encoding.

    `problem` completes the sentence that begins with the sample's name.
    """

    def __init__(self, raw: RawSample, problem: str):
        super().__init__(
            f"{SHARDS_FLAG}: the sample {printable(raw.key)} {problem}. Train on shards of pictures, or on encoded "
            "ones that were all made with the same teacher and flags (python -m lcm_distill.encode_shards)."
        )


@dataclass(frozen=True)
class Preparation:
    """How a sample becomes pixels and a caption.

    Args:
        resolution: side of the square pictures, pixels.
        interpolation: one of `flags.INTERPOLATIONS` (Pillow's, all antialiased).
        center_crop: crop the middle instead of a random part.
        random_flip: mirror half of the pictures.
        proportion_empty_prompts: share of the captions that are replaced by the empty one, 0 to 1.
        caption_column: a file extension or a JSON key, the only place to take captions from
            (`check_caption_column`); None for the usual places.
        min_image_size: pictures whose shorter side is shorter than this many pixels are left out.
        max_decode_mb: pictures whose decoding takes more megabytes of memory (`memory_to_decode`) are left out.
        filters: conditions on a sample's JSON, from `parse_filters`.
        encoding: that of encoded shards, which then has the same resolution, interpolation and crop; None for
            pictures.
        fixed_size: condition on `resolution` as the original size of every picture, and on no crop.

    Raises:
        UsageError: a value out of range.
    """

    resolution: int
    interpolation: str = "bilinear"
    center_crop: bool = False
    random_flip: bool = False
    proportion_empty_prompts: float = 0.0
    caption_column: str | None = None
    min_image_size: int = 0
    max_decode_mb: int = MAX_DECODE_MB
    filters: Sequence[Filter] = ()
    encoding: Encoding | None = None
    fixed_size: bool = False

    @classmethod
    def from_flags(cls, flags: PreparationFlags) -> "Preparation":
        """The preparation for a group of flags; `UsageError` for an invalid filter or caption column."""
        return cls(
            resolution=flags.resolution,
            interpolation=flags.interpolation_type,
            center_crop=flags.center_crop,
            random_flip=flags.random_flip,
            proportion_empty_prompts=flags.proportion_empty_prompts,
            caption_column=flags.caption_column,
            min_image_size=flags.min_image_size,
            max_decode_mb=flags.max_decode_mb,
            filters=parse_filters(flags.filter, max_pwatermark=flags.max_pwatermark, min_aesthetic=flags.min_aesthetic),
            fixed_size=flags.use_fix_crop_and_size,
        )

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--resolution", self.resolution, 1),
            ("--min_image_size", self.min_image_size, 0),
            ("--max_decode_mb", self.max_decode_mb, 1),
        ):
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
        BUDGET.open()  # before the data workers are forked


@dataclass
class Sample:
    """A prepared sample."""

    arrays: dict[str, np.ndarray]  # "pixels" uint8 [resolution, resolution, 3]; or "moments" and embeddings, float16
    caption: str
    original_size: tuple[int, int]  # (height, width)
    crop_top_left: tuple[int, int]
    picture_size: tuple[int, int]  # (height, width) of the picture in the shard, upright
    colours: str = ""  # what was done about the picture's colour profile (`to_srgb`)
    not_compared: tuple[str, ...] = ()  # filters that could not compare the JSON's value, and why


def resize_and_crop(
    image: Image.Image, *, true_size: tuple[int, int], resolution: int, resample: int, top: float, left: float
) -> tuple[np.ndarray, tuple[int, int], int]:
    """Resizes the shorter side to `resolution`, then crops a square.

    Args:
        image: RGB, at its true size or decoded at a smaller one.
        true_size: (height, width), from which the shape of the resized picture is computed.
        resolution: side of the square, pixels.
        resample: one of Pillow's filters.
        top, left: place of the crop, from 0 (first row or column) to 1 (last), exclusive.

    Returns:
        the square picture, uint8 [resolution, resolution, 3]; (top, left) of the crop in pixels of the resized
        picture; the width of the resized picture.
    """
    short = min(true_size)
    height, width = (resolution * side // short for side in true_size)
    y = int(top * (height - resolution + 1))
    x = int(left * (width - resolution + 1))
    mode = _TORCH_MODES.get(resample)
    if mode is not None and max(height, width) <= 4 * resolution:  # resizing all of a very long picture costs more
        square = _resize(image, height, width, mode)[y : y + resolution, x : x + resolution]
    else:
        per_x, per_y = image.width / width, image.height / height
        right, bottom = min((x + resolution) * per_x, image.width), min((y + resolution) * per_y, image.height)
        box = (x * per_x, y * per_y, right, bottom)
        square = np.array(image.resize((resolution, resolution), resample, box=box))
    return square, (y, x), width


def _resize(image: Image.Image, height: int, width: int, mode: str) -> np.ndarray:
    """uint8 [height, width, 3], within a few grey levels of Pillow's resize, in a third of its time (with AVX2)."""
    pixels = torch.from_numpy(np.asarray(image))
    resized = torch.nn.functional.interpolate(  # permuted like this, it counts as channels-last and is not copied
        pixels[None].permute(0, 3, 1, 2), (height, width), mode=mode, antialias=True, align_corners=False
    )
    return resized[0].permute(1, 2, 0).numpy()


def prepare_sample(raw: RawSample, preparation: Preparation, *, draws: np.ndarray) -> Sample:
    """Decodes, resizes, crops and flips the picture and chooses a caption, or unpacks an encoded sample.

    Args:
        draws: float64 [5] in [0, 1): top, left, flip, which caption, empty caption. All five are always drawn, so
            that switching one option on does not change the others.

    Raises:
        BadSample: the sample cannot be used.
        MixedShards: the sample is of another kind than `preparation` is for.
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
        sample = _unpack_sample(raw, content, preparation, flipped, number, len(captions))
    else:
        sample = _decode_sample(content, meta, preparation, top, left, flipped)
    sample.caption = "" if number is None else captions[number]
    sample.not_compared = filters_that_cannot_compare(meta, preparation.filters)
    if preparation.fixed_size:
        sample.original_size, sample.crop_top_left = (preparation.resolution, preparation.resolution), (0, 0)
    return sample


def filters_that_cannot_compare(meta: dict, filters: Sequence[Filter]) -> tuple[str, ...]:
    """For each filter that cannot compare the value in this JSON, and so lets the sample pass: its flag, and why."""
    reasons = ((condition.flag, condition.not_compared(meta)) for condition in filters)
    return tuple(f"{flag} ({reason})" for flag, reason in reasons if reason is not None)


def _picture_or_latents(raw: RawSample, encoding: Encoding | None) -> bytes:
    """The content of the file that `encoding` asks for; `MixedShards` if the sample has the other instead."""
    picture = next((raw.files[extension] for extension in PICTURE_EXTENSIONS if extension in raw.files), None)
    latents = raw.files.get(LATENTS_EXTENSION)
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


def _decode_sample(
    content: bytes, meta: dict, preparation: Preparation, top: float, left: float, flipped: bool
) -> Sample:
    """The sample of a picture's file with the JSON `meta`, without its caption."""
    resolution = preparation.resolution
    if preparation.center_crop:
        top = left = 0.5
    with contextlib.ExitStack() as while_large:
        picture = read_picture(
            content,
            resolution=resolution,
            min_image_size=preparation.min_image_size,
            max_bytes=preparation.max_decode_mb * 10**6,
            while_large=while_large,
        )
        true_size, turned, colours = picture.size, picture.turned, picture.colours
        square, (y, x), resized_width = resize_and_crop(
            picture.image,
            true_size=true_size,
            resolution=resolution,
            resample=_RESAMPLING[preparation.interpolation],
            top=top,
            left=left,
        )
        del picture  # before its share of the memory is returned
    if flipped:
        square = torch.from_numpy(square).flip(1).numpy()  # NumPy copies three bytes at a time
        x = resized_width - resolution - x
    original_size = size_in_json(meta, true_size, turned=turned) or true_size
    return Sample(
        {"pixels": square},
        "",
        original_size=original_size,
        crop_top_left=(y, x),
        picture_size=true_size,
        colours=colours,
    )


def _unpack_sample(
    raw: RawSample, content: bytes, preparation: Preparation, flipped: bool, number: int | None, captions: int
) -> Sample:
    """The sample of an encoded picture's file, without its caption, but with the embeddings of caption `number`.

    `number` None is the empty caption; `captions` is how many the sample has.
    """
    encoding = preparation.encoding
    assert encoding is not None
    try:
        encoded = unpack(content, encoding, mirrored=flipped, captions=captions)
    except EncodingMismatch:
        raise MixedShards(raw, "was encoded with other settings than others") from None
    except ValueError:
        raise BadSample(DAMAGED_LATENTS) from None
    check_size(encoded.picture_size, preparation.min_image_size)
    if number is None:
        embeddings = encoding.empty_caption
    else:
        embeddings = {name: of_captions[number] for name, of_captions in encoded.embeddings.items()}
    return Sample(
        {"moments": encoded.moments} | embeddings,
        "",
        original_size=encoded.original_size,
        crop_top_left=encoded.crop_top_left,
        picture_size=encoded.picture_size,
    )
