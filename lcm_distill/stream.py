"""Captioned pictures from WebDataset shards: an endless, seeded stream that knows its place.

    shards = expand_shards("data/{000..010}.tar")
    print(inspect_shards(shards, resolution=512))           # before any model is loaded
    stream = ShardStream(shards=shards, batch_size=16, resolution=512, seed=0)
    loader = make_loader(stream, num_workers=4)             # a StatefulDataLoader
    for batch in loader: ...                                # epoch after epoch; the loop counts steps

Order. C = ranks x workers consumers share the shards. In each epoch the shards are permuted from (seed, epoch)
and dealt whole as long as they go round; the S mod C that are left over are cut into C slots each, dealt evenly,
so a consumer reads at most two of them. Over all consumers each sample comes once an epoch. A consumer permutes
its samples inside consecutive blocks of up to `shuffle_window`, from (seed, epoch, consumer, block).

Place. (epoch, start of the block, place in the block) is the whole state: restoring reads one block again, and
skims the part of its first shard that lies before it.

Safety. Only pictures, captions and JSON are read; nothing in a shard is unpickled or handed to another program.
"""

import contextlib
import glob
import hashlib
import io
import json
import logging
import math
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import torch
from braceexpand import braceexpand
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from webdataset.gopen import gopen, gopen_schemes
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from lcm_distill.errors import UsageError

logger = logging.getLogger(__name__)

FLAG = "--train_shards_path_or_url"
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "text", "caption")
CAPTION_KEYS = ("caption", "text")
WANTED = frozenset((*PICTURES, *CAPTIONS, "json"))

# By content, since pictures are often misnamed. Pillow reads more, but some of that runs programs (EPS: ghostscript).
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
INTERPOLATIONS = {name.lower(): mode for name, mode in Image.Resampling.__members__.items()}
MAX_PIXELS = 178_956_970  # a picture of more is taken for a decompression bomb (where Pillow draws the line too)
MAX_CAPTION = 4096  # characters; text encoders read some 77 tokens
WINDOW_BYTES = 256 * 2**20  # a shuffle block ends here even when it has fewer than `shuffle_window` samples

NO_PICTURE = "no picture (.jpg, .jpeg, .png or .webp)"
NO_CAPTION = "no caption (.txt, .text, .caption or a JSON caption)"
CAPTION_NOT_UTF8 = "caption is not UTF-8"
NOT_A_PICTURE = "picture file holds no picture"
DAMAGED_PICTURE = "picture is damaged or cut short"
HUGE_PICTURE = "picture is too large (a decompression bomb)"
DUPLICATE_NAME = "two files of one name in a sample"
UNREADABLE_SHARD = "shard cannot be read, or not to its end"

SHARD_NEEDS = (
    "A shard is a tar in which the files of a sample share a name and stand next to each other: 0001.jpg (or .jpeg, "
    '.png, .webp) with 0001.txt (or .text, .caption, or 0001.json with a "caption" or "text"). '
    "An extension is what follows the first dot of a name: write a_b.jpg, not a.b.jpg. "
    "To make a shard of a folder: tar --sort=name -cf 000.tar -C FOLDER ."
)

SHARD_ORDER, BLOCK_ORDER, SAMPLE_DRAWS = range(3)  # what a random stream is for, so that no two share numbers


def _rng(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *key))))


class StreamError(UsageError):
    """The shards give nothing to train on. Raised in a worker process too, and reads the same there.

    A loader wraps a worker's error into "Caught ... in worker 0. Original Traceback ..."; what the person at the
    shell needs is the message alone.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{__name__}.StreamError: ")[2].strip())


class BadSample(Exception):
    """This sample cannot be used; `reason` is one of the constants above."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


# ---------------------------------------------------------------------------------------------- which shards


def expand_shards(spec: str | None) -> list[str]:
    """The shards that `--train_shards_path_or_url` names, in a fixed order.

    Args:
        spec: a tar, a brace pattern (`data/{000..010}.tar`), a glob, a folder (its `.tar`, `.tar.gz` and `.tgz`,
            or, if it has none, those of the folders in it), a URL or a `pipe:` command (passed on as they are,
            braces expanded), or several of these with `::` between them.

    Raises:
        UsageError: nothing given, a local path that does not exist, a folder without tars, unbalanced braces, or
            a URL that webdataset does not open.
    """
    parts = [part.strip() for part in (spec or "").split("::") if part.strip()]
    if not parts:
        raise UsageError(
            f"{FLAG} is missing. Give it tar shards: a file, a pattern such as 'data/{{000..010}}.tar', "
            "a folder of tars, a URL, or a 'pipe:' command."
        )
    return [shard for part in parts for shard in _expand_one(part)]


def _expand_one(spec: str) -> list[str]:
    try:
        names = [spec] if os.path.exists(spec) else list(braceexpand(spec))
    except ValueError as error:
        raise UsageError(f"{FLAG}: the braces of {spec!r} do not match ({error}); write {{000..010}}.") from None
    found, missing = [], []
    for name in names:
        path = _local_path(name)
        if path is None:
            scheme = urlparse(name).scheme
            if scheme not in gopen_schemes:
                raise UsageError(
                    f"{FLAG}: webdataset does not open {scheme}: addresses ({name}). Name the command that does, "
                    "such as 'pipe:aws s3 cp s3://bucket/000.tar -'."
                )
            found.append(name)
        elif os.path.isdir(path):
            found += _tars_in(path)
        elif os.path.exists(path):
            found.append(path)
        else:
            matches = glob.glob(path, recursive=True)
            tars = sorted(match for match in matches if match.lower().endswith(TAR_SUFFIXES))
            found += tars
            if not tars:
                missing.append(path)
    if missing:
        raise UsageError(
            f"{FLAG}: {len(missing)} of the {len(names)} paths of {spec!r} not found, the first is {missing[0]}. "
            f"{_describe_folder(os.path.dirname(missing[0]))} Correct the path; relative ones start at {os.getcwd()}."
        )
    return found


def _local_path(shard: str) -> str | None:
    """The path of a shard on this machine's file systems, None for a URL or a command."""
    url = urlparse(shard)
    if url.scheme == "file":
        return url2pathname(url.path)
    return os.path.expanduser(shard) if url.scheme == "" else None


def _tars_in(folder: str) -> list[str]:
    def tars(where: str, names: list[str]) -> list[str]:
        visible = (name for name in names if not name.startswith("."))
        return [os.path.join(where, name) for name in visible if name.lower().endswith(TAR_SUFFIXES)]

    found = sorted(tars(folder, os.listdir(folder)))
    if not found:
        found = sorted(path for where, _, names in os.walk(folder) for path in tars(where, names))
    if not found:
        raise UsageError(f"{FLAG}: no .tar, .tar.gz or .tgz in {folder}. {_describe_folder(folder)} {SHARD_NEEDS}")
    return found


def _describe_folder(folder: str) -> str:
    """What there is at `folder`, or at the nearest folder above it, in one sentence."""
    folder = folder or "."
    if not os.path.isdir(folder):
        return f"There is no folder {folder}. " + _describe_folder(os.path.dirname(folder.rstrip("/")) or ".")
    with os.scandir(folder) as entries:
        found = sorted((e.name + "/" if e.is_dir() else e.name) for e in islice(entries, 10_000))
    if not found:
        return f"The folder {folder} is empty."
    kinds = Counter("folder" if n.endswith("/") else os.path.splitext(n)[1] or "other file" for n in found)
    names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return f"The folder {folder} holds {_list_counts(kinds)} ({names})."


def _list_counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{count} x {what}" for what, count in ordered[:20]]
    if ordered[20:]:
        listed.append(f"{len(ordered) - 20} more kinds")
    # Names in a hostile tar may hold what no terminal can show.
    return (", ".join(listed) or "nothing").encode("utf-8", "replace").decode()


# ---------------------------------------------------------------------------------------- from tar to samples


@dataclass
class RawSample:
    """The undecoded files of one sample: extension (lower case) to content."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    duplicate: bool = False  # a name came twice: which caption goes with which picture cannot be known

    @property
    def complete(self) -> bool:
        """It has a picture and something to take a caption from."""
        return any(e in self.files for e in PICTURES) and any(e in self.files for e in (*CAPTIONS, "json"))

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.files.values()))


def _split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a file in a tar, split at the first dot of its name as webdataset does.

    Two empty strings for a name without a dot, or with one at its start.
    """
    key, extension = base_plus_ext(name)
    return (key, extension.lower()) if key else ("", "")


def _group(files: Iterable[tuple[str, bytes]]) -> Iterator[RawSample]:
    """Consecutive files of one key make a sample (webdataset's own grouping raises on duplicates or mixes them)."""
    sample = None
    try:
        for name, content in files:
            key, extension = _split_name(name)
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = RawSample(key)
            if extension in sample.files:
                sample.duplicate = True
            else:
                sample.files[extension] = content
    except Exception:
        # The tar is cut. Its last sample is good if it was whole by then; otherwise it is part of the damage.
        if sample is not None and sample.complete:
            yield sample
        raise
    if sample is not None:
        yield sample


def read_shard(shard: str, *, extensions: Counter | None = None) -> Iterator[RawSample]:
    """The samples of a shard in file order, undecoded; files that are neither picture, caption nor JSON stay unread.

    Args:
        shard: a path, URL or `pipe:` command, as webdataset's `gopen` takes it.
        extensions: if given, counts the extensions of all files passed, the unread ones too.

    Raises:
        Exception: what opener and tar reader raise (many kinds), after the samples that could be read.
    """

    def wanted(name: str) -> bool:
        _, extension = _split_name(name)
        if extension and extensions is not None:
            extensions[extension] += 1
        return extension in WANTED

    source = gopen(shard)
    try:
        yield from _group((f["fname"], f["data"]) for f in tar_file_iterator(source, select_files=wanted))
    finally:
        with contextlib.suppress(OSError):  # the command behind a pipe minds that nobody listens any more
            source.close()


def count_samples(shards: list[str]) -> int | None:
    """How many samples the shards hold, from the tar headers alone; None if a shard is not on a local file system.

    Counts samples with a picture and a caption file or a JSON; whether they decode is not known here. What cannot
    be read counts as nothing. Takes about a second for 10,000 samples; a compressed tar has to be unpacked for it.
    """
    total = 0
    for shard in shards:
        path = _local_path(shard)
        if path is None:
            return None
        try:
            with tarfile.open(path) as tar:
                names = (member.name for member in tar if member.isreg())
                wanted = ((name, b"") for name in names if _split_name(name)[1] in WANTED)
                for sample in _group(wanted):
                    total += sample.complete and not sample.duplicate
        except Exception as error:  # noqa: BLE001 - as in the stream
            logger.warning("%s cannot be read to its end: %s", shard, error)
    return total


# ----------------------------------------------------------------------------------- from sample to pixels, words


@dataclass
class Sample:
    pixels: np.ndarray  # uint8 [resolution, resolution, 3]
    caption: str
    original_size: tuple[int, int]  # (height, width)
    crop_top_left: tuple[int, int]
    picture_size: tuple[int, int]  # (height, width) of the picture in the shard, upright


def _read_json(raw: RawSample) -> dict:
    """The sample's JSON; {} for none, a broken one, or one that is not an object: JSON is never a reason to drop."""
    try:
        content = json.loads(raw.files.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_captions(raw: RawSample, meta: dict) -> tuple[list[str], str]:
    """(the sample's captions, where they come from); empty ones do not count. Raises `BadSample`."""
    reason = NO_CAPTION
    sources: dict[str, object] = {}
    for extension in CAPTIONS:
        try:
            sources["." + extension] = raw.files.get(extension, b"").decode("utf-8-sig")
        except UnicodeDecodeError:
            reason = CAPTION_NOT_UTF8
    sources |= {f'JSON "{key}"': meta.get(key) for key in CAPTION_KEYS}
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
    draws: np.ndarray,
) -> Sample:
    """Decode, resize, crop and flip the picture, and choose the caption.

    Args:
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
    meta = _read_json(raw)
    captions, _ = _read_captions(raw, meta)
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


# -------------------------------------------------------------------------------------------------- the stream


def deal_shards(num_shards: int, *, seed: int, epoch: int, consumer: int, consumers: int) -> list[tuple[int, int, int]]:
    """What a consumer reads in an epoch: (shard, low, high), its samples i with low <= (i + epoch) % consumers < high.

    Over all consumers each sample comes exactly once. The epoch turns the slots, so that a consumer that gets
    nothing of a tiny shard gets some the next time.
    """
    order = _rng(seed, SHARD_ORDER, epoch).permutation(num_shards).tolist()
    left_over = num_shards % consumers
    dealt, shared = order[: num_shards - left_over], order[num_shards - left_over :]
    parts = [(shard, 0, consumers) for shard in dealt[consumer::consumers]]
    slot, end = consumer * left_over, (consumer + 1) * left_over
    while slot < end:
        number, low = divmod(slot, consumers)
        high = min(consumers, low + end - slot)
        parts.append((shared[number], low, high))
        slot += high - low
    return parts


class ShardStream(IterableDataset):
    """Endless batches of captioned pictures; see the module's docstring for their order.

    A batch is a dict of
        pixels: uint8 [batch_size, 3, resolution, resolution], 0 to 255
        captions: list of str, "" with probability `proportion_empty_prompts`
        original_sizes: int64 [batch_size, 2], (height, width) by the JSON's original_height and original_width, else
            its height and width, else of the picture itself, in pixels
        crop_top_lefts: int64 [batch_size, 2], (top, left) of the crop in pixels of the resized picture, mirrored
            with it if it was flipped
        dropped: dict of reason to count: what this worker has dropped since the run began; see `DropCounter`
        worker: int, the worker that made the batch
    All batches are full: the last samples of an epoch share a batch with the first of the next. All draws come
    from (seed, epoch, place of the shard in the list, number of the sample in it), whoever reads the sample.

    Args:
        shards: as `expand_shards` gives them.
        batch_size: samples in a batch (of one rank).
        resolution: side of the square pictures, pixels.
        seed: not negative.
        rank, world_size: of this process among those that train together.
        interpolation: nearest, box, bilinear, hamming, bicubic or lanczos (Pillow's, all antialiased).
        center_crop: crop the middle, not a random part.
        random_flip: mirror every other picture.
        proportion_empty_prompts: 0 to 1.
        shuffle_window: samples in a shuffle block; a block also ends at 256 MiB. Each worker holds one in memory.

    Raises:
        UsageError: from the constructor for an argument out of range; from the iterator, in the words of
            `inspect_shards`, when it went through an epoch without a sample and no shard has one to give.
    """

    def __init__(
        self,
        *,
        shards: list[str],
        batch_size: int,
        resolution: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        interpolation: str = "bilinear",
        center_crop: bool = False,
        random_flip: bool = False,
        proportion_empty_prompts: float = 0.0,
        shuffle_window: int = 1000,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        if not shards:
            raise UsageError(f"{FLAG} names no shard.")
        for flag, value, least in (
            ("--train_batch_size", batch_size, 1),
            ("--resolution", resolution, 1),
            ("--seed", seed, 0),
            ("--shuffle_window", shuffle_window, 1),
        ):
            if value < least:
                raise UsageError(f"{flag} is {value}; give {least} or more.")
        if not 0 <= proportion_empty_prompts <= 1:
            raise UsageError(f"--proportion_empty_prompts is {proportion_empty_prompts}; give a number from 0 to 1.")
        self.shards = list(shards)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle_window = shuffle_window
        self.start_epoch = 0
        names = [os.path.basename(shard.partition("?")[0]) for shard in shards]  # data may move between runs
        self._digest = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        self.prepare_options: dict[str, Any] = {
            "resolution": resolution,
            "resample": _resample_filter(interpolation),
            "center_crop": center_crop,
            "random_flip": random_flip,
            "proportion_empty_prompts": proportion_empty_prompts,
        }

    def __iter__(self) -> "StreamIterator":
        info = get_worker_info()
        return StreamIterator(self, worker=info.id if info else 0, workers=info.num_workers if info else 0)

    def layout(self, workers: int) -> dict:
        """What a saved place depends on: with any of these changed it points at other samples.

        Args:
            workers: of the loader; 0 and 1 give the same samples, but torchdata stores their states differently.
        """
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "workers": workers,
            "shards": self._digest,
            "seed": self.seed,
            "shuffle_window": self.shuffle_window,
        }


def _resample_filter(interpolation: str) -> int:
    if interpolation not in INTERPOLATIONS:
        raise UsageError(f"--interpolation_type is {interpolation!r}; give one of {', '.join(INTERPOLATIONS)}.")
    return INTERPOLATIONS[interpolation]


class StreamIterator:
    """One consumer's pass through a `ShardStream`, with a state that `StatefulDataLoader` saves batch by batch."""

    def __init__(self, stream: ShardStream, *, worker: int, workers: int):
        self.stream = stream
        self.worker = worker
        self.workers = workers
        self.consumer = stream.rank * max(1, workers) + worker
        self.consumers = stream.world_size * max(1, workers)
        self.epoch = stream.start_epoch
        self.block = 0  # number of the block in the epoch
        self.part = 0  # the block starts in this part of what `deal_shards` gave,
        self.sample = 0  # at this sample of the shard
        self.place = 0  # so many of the block's samples, in its shuffled order, are used up
        self.dropped: Counter = Counter()
        self._samples = self._run()

    def state_dict(self) -> dict:
        place = {name: getattr(self, name) for name in ("epoch", "block", "part", "sample", "place")}
        return {"layout": self.stream.layout(self.workers), **place, "dropped": dict(self.dropped)}

    def load_state_dict(self, state: dict) -> None:
        assert state["layout"] == self.stream.layout(self.workers)  # `ShardLoader` sees to it
        for name in ("epoch", "block", "part", "sample", "place"):
            setattr(self, name, state[name])
        self.dropped = Counter(state["dropped"])
        self._samples = self._run()

    def __iter__(self) -> "StreamIterator":
        return self

    def __next__(self) -> dict:
        size, resolution = self.stream.batch_size, self.stream.prepare_options["resolution"]
        pixels = torch.empty((size, 3, resolution, resolution), dtype=torch.uint8)
        samples = list(islice(self._samples, size))
        for row, sample in zip(pixels.numpy(), samples, strict=True):
            row[:] = sample.pixels.transpose(2, 0, 1)
        return {
            "pixels": pixels,
            "captions": [sample.caption for sample in samples],
            "original_sizes": torch.tensor([sample.original_size for sample in samples]),
            "crop_top_lefts": torch.tensor([sample.crop_top_left for sample in samples]),
            "dropped": dict(self.dropped),
            "worker": self.worker,
        }

    def _run(self) -> Iterator[Sample]:
        """Sample after sample, for ever."""
        stream, barren = self.stream, 0
        while True:
            reader, delivered = self._read_epoch(), False
            while window := self._fill(reader):
                next_start = window[-1][:2]
                order = _rng(stream.seed, BLOCK_ORDER, self.epoch, self.consumer, self.block).permutation(len(window))
                while self.place < len(window):
                    drawn = int(order[self.place])
                    _, _, shard, index, raw = window[drawn]
                    window[drawn] = None  # its bytes are not needed any more
                    self.place += 1
                    draws = _rng(stream.seed, SAMPLE_DRAWS, self.epoch, shard, index).random(5)
                    try:
                        sample = prepare_sample(raw, draws=draws, **stream.prepare_options)
                    except BadSample as bad:
                        self.dropped[bad.reason] += 1
                        continue
                    delivered = True
                    yield sample
                (self.part, self.sample), self.block, self.place = next_start, self.block + 1, 0
            self.epoch, self.block, self.part, self.sample, self.place = self.epoch + 1, 0, 0, 0, 0
            # Nothing for this consumer: bad luck (others have the good shards), or nothing to be had? Looking costs
            # up to a pass over the data, so do it after 1, 2, 4, 8, ... such epochs.
            barren = 0 if delivered else barren + 1
            if barren.bit_count() == 1:
                self._look_for_a_usable_sample()

    def _read_epoch(self) -> Iterator[tuple[int, int, int, int, RawSample]]:
        """From the block's start on: (part and sample after this one, shard, number in the shard, the sample)."""
        epoch, start_part, start_sample = self.epoch, self.part, self.sample
        parts = deal_shards(
            len(self.stream.shards),
            seed=self.stream.seed,
            epoch=epoch,
            consumer=self.consumer,
            consumers=self.consumers,
        )
        for part in range(start_part, len(parts)):
            shard, low, high = parts[part]
            first, index = start_sample if part == start_part else 0, 0
            try:
                for raw in read_shard(self.stream.shards[shard]):
                    if index >= first and low <= (index + epoch) % self.consumers < high:
                        yield part, index + 1, shard, index, raw
                    index += 1
            except Exception as error:  # noqa: BLE001 - opener, decompressor and tar reader raise nearly anything
                if low <= (index + epoch) % self.consumers < high:  # one of those who share the shard counts it
                    self.dropped[UNREADABLE_SHARD] += 1
                    logger.info("%s, sample %d: %s", self.stream.shards[shard], index, error)

    def _fill(self, reader: Iterator) -> list:
        """The next block: up to `shuffle_window` samples, or `WINDOW_BYTES`; [] at the end of the epoch."""
        window, nbytes = [], 0
        dropped_before = Counter(self.dropped)
        for item in reader:
            window.append(item)
            nbytes += item[-1].nbytes
            if len(window) >= self.stream.shuffle_window or nbytes >= WINDOW_BYTES:
                break
        if self.place:  # restored inside this block: what reading it again counted is in the saved counts already
            self.dropped = dropped_before
        return window

    def _look_for_a_usable_sample(self) -> None:
        try:
            inspect_shards(self.stream.shards, resolution=1, limit=1, max_samples=None, max_shards=None)
        except UsageError as error:
            raise StreamError(str(error)) from None


class DropCounter:
    """Totals what this process's workers dropped: give it each batch, and read `total()` or print it."""

    def __init__(self):
        self._of_worker: dict[int, dict[str, int]] = {}

    def update(self, batch: dict) -> None:
        self._of_worker[batch["worker"]] = batch["dropped"]

    def total(self) -> dict[str, int]:
        """Reason to count, the most frequent first."""
        return dict(sum(map(Counter, self._of_worker.values()), Counter()).most_common())

    def __str__(self) -> str:
        return _list_counts(self.total())


# ---------------------------------------------------------------------------------------------------- the loader


class ShardLoader(StatefulDataLoader):
    """A `StatefulDataLoader` that can also take the state of a run with other ranks, workers or shards."""

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly behind the batch after which `state_dict` was called.

        If ranks, workers, shards, seed or shuffle window are not those of the saved run, that place does not exist:
        then continue at the start of the saved epoch, and log a warning.
        """
        saved = list(_places(state))
        layout = self.dataset.layout(self.num_workers)
        changed = {
            f"{name} {place['layout'].get(name)} -> {value}"
            for place in saved
            for name, value in layout.items()
            if place["layout"].get(name) != value
        }
        if saved and not changed:
            return super().load_state_dict(state)
        super().load_state_dict({})
        self.dataset.start_epoch = min((place["epoch"] for place in saved), default=0)
        logger.warning(
            "The shard stream cannot continue at the very sample where it was saved (%s); it continues at the "
            "start of epoch %d, so some samples come a second time.",
            ", ".join(sorted(changed)) or "the saved state holds no place",
            self.dataset.start_epoch,
        )

    def close(self) -> None:
        """End the worker processes, now and not when the garbage collector comes by; `state_dict` stays valid.

        If an error's traceback holds the iterator, its queues may be gone before it is: then each worker is waited
        for in vain, for five seconds, at some later time.
        """
        if self._iterator is not None and self.num_workers:
            self._iterator._shutdown_workers()


def _places(state: object) -> Iterator[dict]:
    """The states of all `StreamIterator`s in a loader's state, which differs with and without workers."""
    if isinstance(state, dict):
        if "layout" in state:
            yield state
        else:
            for value in state.values():
                yield from _places(value)


def make_loader(stream: ShardStream, num_workers: int) -> ShardLoader:
    """A loader over the stream; iterate it once, it is endless. Its state is that of the last batch it gave.

    Args:
        num_workers: processes that read and decode; 0 does it in this one.

    The tensors are pinned if there is a CUDA device. Nothing is drawn from torch's global generator.
    """
    if num_workers < 0:
        raise UsageError(f"--dataloader_num_workers is {num_workers}; give 0 or more.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata 0.11 calls what torch 2.13 deprecates
        return ShardLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if num_workers else None,
            # The workers of an endless stream live as long as its only iterator. "Persistent" ones add nothing to that,
            # and with pinned memory each costs five seconds at exit.
            persistent_workers=False,
            generator=torch.Generator(),  # without it, making the iterator draws from the global one
        )


# -------------------------------------------------------------------------------------------------- the preflight


@dataclass
class ShardReport:
    """What a first look into the shards found; print it."""

    shards: int  # how many there are
    resolution: int
    opened: int = 0  # how many were looked into
    seen: int = 0  # samples
    usable: int = 0
    enlarged: int = 0  # usable samples whose picture is smaller than the resolution
    extensions: Counter = field(default_factory=Counter)  # of all files, the unread ones too
    caption_sources: Counter = field(default_factory=Counter)
    json_keys: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    smallest: tuple[int, int] | None = None  # (height, width) of the usable picture with the fewest pixels
    largest: tuple[int, int] | None = None
    captions: list[str] = field(default_factory=list)  # the first distinct ones, at most 4
    problems: list[str] = field(default_factory=list)  # shards that could not be read, and why

    def __str__(self) -> str:
        lines = [
            f"{self.usable} of {self.seen} samples usable, in the first {self.opened} of {self.shards} shards",
            f"  file extensions: {_list_counts(self.extensions)}",
            f"  captions from:   {_list_counts(self.caption_sources)}",
            f"  JSON keys:       {_list_counts(self.json_keys)}",
        ]
        if self.smallest and self.largest:
            (h, w), (H, W) = self.smallest, self.largest
            lines.append(f"  picture sizes:   {w}x{h} to {W}x{H} (width x height)")
        if self.enlarged:
            lines.append(f"  {self.enlarged} of {self.usable} pictures are enlarged to --resolution {self.resolution}")
        if self.dropped:
            lines.append(f"  dropped:         {_list_counts(self.dropped)}")
        return "\n".join(lines + [f"  unreadable:      {problem}" for problem in self.problems[:3]])


def inspect_shards(
    shards: list[str],
    *,
    resolution: int,
    limit: int = 16,
    max_samples: int | None = 1000,
    max_shards: int | None = 32,
) -> ShardReport:
    """The preflight: open the first shards, try their first samples, and tell what is there.

    Args:
        shards: as `expand_shards` gives them.
        resolution: of the training, to tell which pictures are enlarged.
        limit: samples to look at. As long as none of them is usable the search goes on, up to
        max_samples: samples, in up to
        max_shards: shards; None for no bound.

    Raises:
        UsageError: no usable sample in what was looked at; says how many were dropped and why, which files were
            found, and what a shard needs.
    """
    report = ShardReport(shards=len(shards), resolution=resolution)

    def done() -> bool:
        enough = report.usable and report.seen >= limit
        return bool(enough or (max_samples is not None and report.seen >= max_samples))

    for shard in shards[:max_shards]:
        report.opened += 1
        try:
            for raw in read_shard(shard, extensions=report.extensions):
                _inspect_sample(raw, report)
                if done():
                    break
        except Exception as error:  # noqa: BLE001 - as in the stream
            report.dropped[UNREADABLE_SHARD] += 1
            report.problems.append(f"{shard}: {error}")
        if done():
            break
    if report.usable:
        return report
    all_seen = report.opened == report.shards and (max_samples is None or report.seen < max_samples)
    raise UsageError(
        f"{FLAG} gives nothing to train on{'' if all_seen else ' as far as this first look went'}: "
        f"{report}\n{SHARD_NEEDS}"
    )


def _inspect_sample(raw: RawSample, report: ShardReport) -> None:
    report.seen += 1
    meta = _read_json(raw)
    report.json_keys.update(meta.keys())
    try:
        sample = prepare_sample(
            raw,
            resolution=1,  # whether it decodes is the question, not how it looks
            resample=Image.Resampling.NEAREST,
            center_crop=True,
            random_flip=False,
            proportion_empty_prompts=0.0,
            draws=np.zeros(5),
        )
        _, source = _read_captions(raw, meta)
    except BadSample as bad:
        report.dropped[bad.reason] += 1
        return
    height, width = sample.picture_size
    report.usable += 1
    report.caption_sources[source] += 1
    report.enlarged += min(height, width) < report.resolution
    report.smallest = min(report.smallest or sample.picture_size, sample.picture_size, key=math.prod)
    report.largest = max(report.largest or sample.picture_size, sample.picture_size, key=math.prod)
    if sample.caption not in report.captions and len(report.captions) < 4:
        report.captions.append(sample.caption)
