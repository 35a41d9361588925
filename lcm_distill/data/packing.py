"""Packs a folder of captioned pictures into shards: the work of `python -m lcm_distill.pack_shards`."""

import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import multiprocessing
import os
import posixpath
import random
import re
import signal
import stat
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from lcm_distill.bars import progress_bar
from lcm_distill.data.budget import BUDGET
from lcm_distill.data.captions import CAPTION_EXTENSIONS, CAPTION_KEYS, clean_text
from lcm_distill.data.colour import to_srgb
from lcm_distill.data.decode import (
    PILLOW_FORMATS,
    fills_16_bits,
    load_upright,
    memory_to_decode,
    open_picture,
    to_8_bits,
    to_rgb,
)
from lcm_distill.data.raw import (
    CAPTION_NOT_UTF8,
    DAMAGED_PICTURE,
    HEIC,
    HUGE_FILE,
    OTHER_KIND,
    PICTURE_EXTENSIONS,
    BadSample,
    list_counts,
    printable,
)
from lcm_distill.data.shards import MAX_FILE_BYTES, MAX_TEXT_BYTES
from lcm_distill.data.sizes import ORIGINAL_SIZE, size_in_json
from lcm_distill.data.sources import open_regular
from lcm_distill.data.tar import PARTIAL, RESUME_HINT, atomic_tar, new_folder, remove_partials
from lcm_distill.errors import UsageError
from lcm_distill.locks import holding_folder
from lcm_distill.machine import usable_cores

MANIFEST = "manifest.jsonl"  # the settings, then a line for each complete shard
METADATA = ("metadata.jsonl", "metadata.csv")
# Formats that are stored byte for byte, with their extension: by content, since names are often wrong.
STORED_UNCHANGED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

HEIC_EXTENSIONS = ("heic", "heif", "hif")  # read where pillow-heif is installed
# Of other pictures, which nothing here reads: they are named, so that none is missing in silence.
OTHER_PICTURES = frozenset(
    "jpe jif jfi pjpeg pjp mpo dib apng avifs heics heifs "
    "jxl jp2 j2k jpx jpf psd psb svg svgz eps ai tga ico icns ppm pgm pbm pnm exr hdr dds pcx xcf jxr wdp qoi "
    "raw dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef srw x3f 3fr iiq rwl".split()
)
# What may stand next to a text file of the same name without being captioned by it.
_DATA_EXTENSIONS = frozenset("json jsonl csv tsv parquet xml yaml yml toml md html htm npy npz pt safetensors".split())

# Why a picture is skipped, besides the reasons of `data.raw`.
EMPTY_FILE = "empty file (zero bytes)"
NO_CAPTION = "no caption, or an empty one"
NOT_KNOWN = "file with a caption, of a kind that is not known (save it as JPEG, PNG, WebP or TIFF)"
NO_FILE = "row of the metadata without its picture"
UNREADABLE = "not a file, a link to nothing, or no permission to read it"
LINK_OUT = "link to a file outside the folder (to pack what links point to, copy the folder with cp -rL)"
FOLDER_LINK = "link to a folder, which is not followed (to pack what is in it, copy the folder with cp -rL)"

# What reading a manifest raises that something else has written, or that was cut short.
_NOT_OURS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)

Skipped = dict[str, list[str]]  # reason to names


@dataclass(frozen=True)
class Settings:
    """What the shards depend on besides the pictures: the flags of these names."""

    caption_column: str | None = None
    max_size: int | None = None
    samples_per_shard: int = 1000
    max_shard_mb: int = 2000
    seed: int = 0


class Picture(NamedTuple):
    """A picture with a text file or metadata for its caption. Paths are relative to IMAGES, with slashes."""

    path: str
    text: str  # path of the text file next to it, "" for none
    rows: bytes  # its rows of the metadata as JSON, one per line, b"" for none
    stamp: tuple[int, ...]  # size and time of the picture, then of the text file: detects edited files


class ShardTask(NamedTuple):
    """What a worker needs to write one shard; `first`, the number of its first picture among all, is for the keys."""

    images: str
    shard: Path
    first: int
    pictures: list[Picture]
    settings: Settings


@dataclass
class PackResult:
    """What was written, and what was skipped."""

    shards: int
    samples: int
    bytes: int
    skipped: Skipped


# ---------------------------------------------------------------------------------------- pictures and captions


def find_pictures(images: str, out: str, caption_column: str | None = None) -> tuple[list[Picture], Skipped]:
    """Returns (the pictures below `images`, but not in `out`, that may have a caption, by path; what was skipped).

    Reads only the metadata.

    Raises:
        UsageError: there is no picture, or none with a caption; a folder or the metadata cannot be read, or these are
            no file or a link to one outside; the metadata have no column `caption_column`.
    """
    roots = _link_roots(images)
    found: list[Picture] = []
    rows: dict[str, bytes] = {}
    columns: Counter = Counter()
    other_files: Counter = Counter()
    skipped: Skipped = defaultdict(list)
    out = os.path.realpath(out)
    bar = progress_bar("searching", unit="picture", leave=False, delay=1)
    for folder, folders, names in _walk(images):
        prefix = os.path.relpath(os.path.join(folder, "x"), images)[:-1]
        visible = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in visible if os.path.realpath(os.path.join(folder, name)) != out]
        if links := [prefix + name for name in folders if os.path.islink(os.path.join(folder, name))]:
            skipped[FOLDER_LINK] += links
        texts: dict[str, dict[str, str]] = {}
        pictures, unknown = [], []
        for name in sorted(name for name in names if not name.startswith(".")):
            stem, dotted = os.path.splitext(name)
            suffix = dotted.lower().removeprefix(".")
            if suffix in PICTURE_EXTENSIONS or (suffix in HEIC_EXTENSIONS and heif_formats()):
                pictures.append((stem, name))
                continue
            if suffix in HEIC_EXTENSIONS or suffix in OTHER_PICTURES:
                skipped[HEIC if suffix in HEIC_EXTENSIONS else OTHER_KIND].append(prefix + name)
            elif suffix not in _DATA_EXTENSIONS and suffix not in CAPTION_EXTENSIONS:
                unknown.append((stem, name))
            other_files[dotted.lower() or "other file"] += 1
            if suffix in CAPTION_EXTENSIONS and caption_column is None:
                if _leads_out(os.path.join(folder, name), roots):
                    skipped[LINK_OUT].append(prefix + name)
                else:
                    texts.setdefault(stem, {})[suffix] = prefix + name
            if name in METADATA:
                for path, row in _read_metadata(os.path.join(folder, name), roots):
                    path = posixpath.normpath(posixpath.join(prefix, path))
                    columns.update(row.keys())
                    rows[path] = rows.get(path, b"") + json.dumps(row).encode() + b"\n"
        stems = {stem for stem, _ in pictures}
        if lost := [prefix + name for stem, name in unknown if stem in texts and stem not in stems]:
            skipped[NOT_KNOWN] += lost
        for stem, name in pictures:
            bar.update()
            text = next((texts[stem][suffix] for suffix in CAPTION_EXTENSIONS if suffix in texts.get(stem, ())), "")
            if _leads_out(os.path.join(folder, name), roots):
                skipped[LINK_OUT].append(prefix + name)
                continue
            picture = Picture(prefix + name, text, b"", _stamp(images, prefix + name) + _stamp(images, text))
            limits = (MAX_FILE_BYTES, MAX_TEXT_BYTES)
            if len(picture.stamp) < (4 if text else 2):
                skipped[UNREADABLE].append(picture.path)
            elif picture.stamp[0] == 0:
                skipped[EMPTY_FILE].append(picture.path)
            elif any(size > limit for size, limit in zip(picture.stamp[::2], limits, strict=False)):
                skipped[HUGE_FILE].append(picture.path)
            else:
                found.append(picture)
    bar.close()
    if not found:
        raise UsageError(
            f"IMAGES: there is no picture that can be used in {images}, but {list_counts(other_files)}. Give a folder "
            f"of {', '.join(sorted(PICTURE_EXTENSIONS))} files."
            + ("\nSkipped:\n" + describe_skipped(skipped) if skipped else "")
        )
    if caption_column is not None and caption_column not in columns:
        raise UsageError(
            f"--caption_column {caption_column}: the {' or '.join(METADATA)} in {images} has no such column, but "
            f"{list_counts(columns)}. Name one of these, or omit the flag to use the text files next to the pictures "
            f"and the columns {' and '.join(CAPTION_KEYS)}."
        )
    for names in skipped.values():
        for name in names:
            rows.pop(name, None)
    captioned = []
    for picture in sorted(found):
        own_rows = rows.pop(picture.path, b"")
        if picture.text or own_rows:
            captioned.append(picture._replace(rows=own_rows))
        else:
            skipped[NO_CAPTION].append(picture.path)
    if rows:
        skipped[NO_FILE] = sorted(rows)
    if not captioned:
        raise UsageError(
            f"IMAGES: none of the {len(found)} pictures in {images} has a caption. Put that of a.jpg into a.txt next "
            'to it, or into a metadata.jsonl as a line {"file_name": "a.jpg", "text": "a caption"}. Other files in '
            f"the folder: {list_counts(other_files)}. Skipped:\n{describe_skipped(skipped)}"
        )
    return captioned, skipped


def _walk(images: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`; `UsageError` for a folder that cannot be read, and for folders in too many others."""
    try:
        yield from os.walk(images, onerror=_raise_unreadable)
    except RecursionError:  # until Python 3.12
        raise UsageError(f"IMAGES: too many folders are nested in {images}; move what is in them up.") from None


def _raise_unreadable(error: OSError) -> None:
    folder = printable(str(error.filename), 1000)
    raise UsageError(f"IMAGES: the folder {folder} cannot be read ({error.strerror}); fix or move it.")


def _stamp(images: str, path: str) -> tuple[int, ...]:
    """(size in bytes, time of the last change in ns) of a regular file, also through links; () for anything else."""
    with contextlib.suppress(OSError):
        status = os.stat(os.path.join(images, path))
        return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else ()
    return ()


def _link_roots(images: str) -> tuple[str, ...]:
    """The folders that links in `images` may lead to: itself, and the files of its snapshot in Hugging Face's cache.

    There, all files in `datasets--NAME/snapshots/REVISION` are links into `datasets--NAME/blobs`.
    """
    root = Path(os.path.realpath(images))
    caches = [folder.parent for folder in (root, *root.parents) if folder.name == "snapshots"]
    blobs = [cache / "blobs" for cache in caches if re.fullmatch(r"(datasets|models|spaces)--.+", cache.name)]
    return (str(root), *(str(folder) for folder in blobs if not folder.is_symlink()))


def _leads_out(path: str, roots: tuple[str, ...]) -> bool:
    """Whether a file is a link that ends outside these folders: a dataset must not choose which other files it has."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    return not any(os.path.commonpath((root, target)) == root for root in roots)


def _open(path: str, roots: tuple[str, ...]) -> IO[bytes]:
    """Opens a regular file; `OSError` for any other kind, which may block for ever, and for a link that leads out."""
    if _leads_out(path, roots):
        raise OSError(errno.ELOOP, LINK_OUT)
    return open_regular(os.path.realpath(path))


def _read_metadata(path: str, roots: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """Yields (file name, the other columns) of each row of a .jsonl or .csv."""
    number = 0
    try:
        with io.TextIOWrapper(_open(path, roots), encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file) if path.endswith(".csv") else map(json.loads, filter(str.strip, file))
            for row in rows:
                number += 1
                name = row.pop("file_name", None) if isinstance(row, dict) else None
                if not isinstance(name, str) or not name:
                    raise ValueError(f"no file_name, which names the picture, in {str(row)[:200]}")
                if _is_deep(row):
                    raise ValueError(f"lists and objects of {printable(name)} are nested too deeply")
                yield name, {key: value for key, value in row.items() if key is not None and value is not None}
    except OSError as error:
        problem = error.strerror or error
        raise UsageError(f"IMAGES: {printable(path, 1000)} cannot be read: {problem}. Fix or move it.") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise UsageError(
            f"IMAGES: {printable(path, 1000)} cannot be used: {error}. Fix row {number} or the next."
        ) from None


def _is_deep(value: Any, most: int = 50) -> bool:
    """Whether lists and objects are nested more than `most` deep: such a value may be read, but not written again."""
    level = [value]
    for _ in range(most):
        level = [
            one
            for found in level
            if isinstance(found, (dict, list))
            for one in (found.values() if isinstance(found, dict) else found)
        ]
        if not level:
            return False
    return True


# --------------------------------------------------------------------------------------------------- a sample


def make_sample(images: str, picture: Picture, settings: Settings) -> dict[str, bytes]:
    """Makes the files of a sample, by extension: the picture, `txt` unless it has several captions, and `json`.

    The JSON has the metadata's other columns, `file_name`, the `width` and `height` of the stored picture, upright,
    and `original_width` and `original_height` if those differ. Several captions are its list `caption`.

    Raises:
        BadSample: the picture cannot be trained on.
        UsageError: a file that existed before cannot be read any more.
    """
    captions, meta = _read_captions(images, picture, settings.caption_column)
    stored = _read_picture(_read(images, picture.path, MAX_FILE_BYTES), settings.max_size)
    height, width = stored.size
    meta |= {"file_name": picture.path, "width": width, "height": height}
    original_size = size_in_json(meta, stored.true_size, turned=stored.turned, keys=(ORIGINAL_SIZE,))
    original_size = original_size or stored.true_size
    if original_size != stored.size or any(key in meta for key in ORIGINAL_SIZE):
        meta |= dict(zip(ORIGINAL_SIZE, original_size, strict=True))
    content, extension = stored.content, stored.extension
    files = {extension: content}
    if len(captions) > 1:
        meta["caption"] = captions
    else:
        files["txt"] = captions[0].encode()
    files["json"] = json.dumps(meta).encode()
    if len(content) > MAX_FILE_BYTES or len(files["json"]) > MAX_TEXT_BYTES:
        raise BadSample(HUGE_FILE)
    return files


def _read(images: str, path: str, most: int) -> bytes:
    """A file's content; `BadSample` if it has more than `most` bytes, or has become a link that leads out."""
    try:
        with _open(os.path.join(images, path), _link_roots(images)) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise BadSample(HUGE_FILE)
            return file.read(size)
    except PermissionError:
        raise BadSample(UNREADABLE) from None
    except OSError as error:
        if error.strerror == LINK_OUT:
            raise BadSample(LINK_OUT) from None
        # It existed a moment ago: more likely a disk was disconnected than one file is bad.
        raise UsageError(
            f"IMAGES: {printable(path)} cannot be read any more ({error.strerror}). {RESUME_HINT}."
        ) from None


def _read_captions(images: str, picture: Picture, caption_column: str | None) -> tuple[list[str], dict]:
    """Returns (the captions, at least one; the other columns of its first row)."""
    rows = [json.loads(line) for line in picture.rows.splitlines()]
    meta = rows[0] if rows else {}
    reason = NO_CAPTION
    if picture.text:
        try:
            text = _read(images, picture.text, MAX_TEXT_BYTES).decode("utf-8-sig").strip()
            if text:
                return [text], meta
        except UnicodeDecodeError:
            reason = CAPTION_NOT_UTF8
    for column in CAPTION_KEYS if caption_column is None else (caption_column,):
        values = [row.get(column) for row in rows]
        texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
        captions = [clean_text(text) for text in texts if isinstance(text, str)]
        if any(captions):
            meta.pop(column, None)
            return list(dict.fromkeys(filter(None, captions))), meta
    raise BadSample(reason)


@functools.cache
def heif_formats() -> tuple[str, ...]:
    """Pillow's name of HEIC, which it then reads in this process, if pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return ()
    pillow_heif.register_heif_opener()
    return ("HEIF",)


class _Stored(NamedTuple):
    """A picture as it is stored; sizes are (height, width), upright."""

    content: bytes
    extension: str
    size: tuple[int, int]
    true_size: tuple[int, int]  # before it was shrunk
    turned: bool  # the EXIF orientation turns it by 90 degrees


def _read_picture(content: bytes, max_size: int | None) -> _Stored:
    image = open_picture(content, (*PILLOW_FORMATS, *heif_formats()))
    extension = STORED_UNCHANGED.get(image.format or "")
    with BUDGET.share(memory_to_decode(image)):
        return _store(image, content, extension, max_size)


def _store(image: Image.Image, content: bytes, extension: str | None, max_size: int | None) -> _Stored:
    try:
        turned = load_upright(image)
        true_size = image.size
        if max_size and min(true_size) > max_size:
            image = _shrink(image, max_size)
            extension = "jpg" if extension in ("jpg", "webp") else "png"
            content = _encode(image, extension)
        elif extension is None:
            extension = "png"
            content = _encode(_for_png(image), extension)
    except BadSample:
        raise
    except Exception:  # noqa: BLE001 - decoders raise nearly anything
        raise BadSample(DAMAGED_PICTURE) from None
    return _Stored(content, extension, image.size[::-1], true_size[::-1], turned)


def _for_png(image: Image.Image) -> Image.Image:
    """The picture in sRGB and in a mode that PNG has, as the readers would see it: deep grey as 8 bits, or all 16."""
    if not (image.mode == "I;16" and fills_16_bits(image)) or image.info.get("icc_profile"):
        image = to_8_bits(image)
    image, _ = to_srgb(image)
    return image if image.mode in ("1", "L", "LA", "P", "RGBA", "I;16") else image.convert("RGB")


def _shrink(image: Image.Image, short: int) -> Image.Image:
    """An RGB picture whose shorter side has `short` pixels."""
    width, height = (round(side * short / min(image.size)) for side in image.size)
    return to_rgb(image)[0].resize((width, height), Image.Resampling.LANCZOS)


def _encode(image: Image.Image, extension: str) -> bytes:
    file = io.BytesIO()
    if extension == "png":
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=95, subsampling=0)  # with subsampling, colours bleed in training
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------- a shard

# Set in each worker.
_num_done: Any = None  # the number of pictures that all workers have finished
_stop: Any = None  # the event at which a worker abandons its shard


def _start_worker(num_done: Any, stop: Any) -> None:
    global _num_done, _stop
    _num_done, _stop = num_done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process sets `stop`
    warnings.simplefilter("ignore")  # Pillow's do not name the file
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Without it the workers of a killed process would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_shard(task: ShardTask) -> dict[str, Any]:
    """Writes one shard, which gets its name when it is complete, and returns its line of the manifest."""
    skipped: Skipped = defaultdict(list)
    count = 0
    with atomic_tar(task.shard) as tar:
        for number, picture in enumerate(task.pictures, task.first):
            if _stop.is_set():
                raise InterruptedError  # not reported: the main process is exiting
            try:
                files = make_sample(task.images, picture, task.settings)
                count += 1
            except BadSample as bad:
                files = {}
                skipped[bad.reason].append(picture.path)
            for extension, content in files.items():
                tar.add(f"{number:09d}.{extension}", content)
            with _num_done.get_lock():
                _num_done.value += 1
    return {"shard": task.shard.name, "samples": count, "bytes": tar.size, "skipped": skipped}


# -------------------------------------------------------------------------------------------------- all shards


def pack_shards(
    images: str | os.PathLike, out: str | os.PathLike, settings: Settings | None = None, num_workers: int | None = None
) -> PackResult:
    """Packs the pictures in `images` into shards in `out`, or continues an earlier run that was stopped.

    Args:
        num_workers: processes, each of which writes one shard at a time; None for one per CPU.

    Raises:
        UsageError: a value out of range; nothing to pack; an `out` that contains anything else, or was packed from
            other files or with other settings; a failure on the way (a full disk), after which completed shards stay.
    """
    images, out, settings = os.path.realpath(images), Path(out), settings or Settings()
    for name, value in (asdict(settings) | {"num_workers": num_workers}).items():
        if name not in ("caption_column", "seed") and value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; give 1 or more")
    if not os.path.isdir(images):
        raise UsageError(f"IMAGES: there is no folder {images}; give the one with the pictures")
    if out.exists() and not (out / MANIFEST).is_file():
        if not out.is_dir() or not all(name.startswith(".") for name in os.listdir(out)):
            raise UsageError(f"OUT {out} is a file, or contains other files; give a new or empty folder")

    pictures, skipped = find_pictures(images, str(out), settings.caption_column)
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr(tuple(picture)).encode())
    header = {"settings": asdict(settings), "pictures": len(pictures), "digest": digest.hexdigest(), "skipped": skipped}
    try:
        with new_folder(out), holding_folder(out, f"OUT {out}", "pack_shards"):
            records = _start_manifest(out, header)
            tasks = [task for task in _plan_shards(images, out, pictures, settings) if task.shard.name not in records]
            with open(out / MANIFEST, "a", encoding="utf-8") as manifest:
                _write_shards(tasks, len(pictures), num_workers or usable_cores(), manifest, records)
            written = [record for record in records.values() if record["samples"]]
            for record in records.values():
                for reason, names in record["skipped"].items():
                    skipped[reason] = sorted(skipped[reason] + names)
            if not written:
                (out / MANIFEST).unlink()  # otherwise it would refuse the pictures once they are fixed
                raise UsageError(
                    f"IMAGES: nothing in {images} can be trained on. Skipped:\n{describe_skipped(skipped)}"
                )
    except OSError as error:
        raise UsageError(f"OUT {out}: {error.strerror or error}. {RESUME_HINT} once that is fixed") from None
    except BrokenProcessPool:
        raise UsageError(
            f"a worker process died, most likely because memory ran out. {RESUME_HINT}, with a smaller --num_workers"
        ) from None
    return PackResult(len(written), sum(r["samples"] for r in written), sum(r["bytes"] for r in written), dict(skipped))


def _plan_shards(images: str, out: Path, pictures: list[Picture], settings: Settings) -> list[ShardTask]:
    """Shuffles the pictures and cuts them into shards of equal length, since training workers get whole shards."""
    random.Random(settings.seed).shuffle(pictures)
    total = sum(picture.stamp[0] for picture in pictures)
    by_bytes = min(len(pictures), -(-total // (settings.max_shard_mb * 10**6)))
    count = max(-(-len(pictures) // settings.samples_per_shard), by_bytes)
    bounds = [shard * len(pictures) // count for shard in range(count + 1)]
    return [
        ShardTask(images, out / f"{shard:05d}.tar", first, pictures[first:end], settings)
        for shard, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]


def _start_manifest(out: Path, header: dict[str, Any]) -> dict[str, dict]:
    """Writes a clean manifest; returns its lines by the names of the shards that exist and are complete."""
    remove_partials(out)
    records: dict[str, dict] = {}
    if (out / MANIFEST).is_file():
        try:
            first, *lines = (out / MANIFEST).read_text(encoding="utf-8").split("\n")
            earlier = json.loads(first)
            differences = [f"--{name} {value}" for name, value in earlier["settings"].items()
                           if value != header["settings"][name]]  # fmt: skip
            if earlier["digest"] != header["digest"]:
                differences.append(f"{earlier['pictures']} pictures, some of which were changed, added or removed")
        except _NOT_OURS:
            raise UsageError(f"OUT {out}: its {MANIFEST} is not from pack_shards; give another folder") from None
        if differences:
            raise UsageError(
                f"OUT {out} was started with {' and '.join(differences)}. Give another folder for these pictures and "
                "flags, or remove that one"
            )
        for line in lines:
            with contextlib.suppress(*_NOT_OURS):  # a kill may have cut the last line
                record = json.loads(line)
                sizes = _stamp(str(out), record["shard"]) or (0,)
                if _is_record(record) and sizes[0] == record["bytes"]:
                    records[record["shard"]] = record
    partial = out / f".{MANIFEST}{PARTIAL}"
    partial.unlink(missing_ok=True)  # of a run that was killed; a link would be written through
    with open(partial, "x", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in (header, *records.values()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, out / MANIFEST)
    return records


def _is_record(record: dict[str, Any]) -> bool:
    """Whether a line of the manifest is as `_write_shard` returns it."""
    numbers, skipped = (record["samples"], record["bytes"]), record["skipped"].items()
    return all(type(number) is int and number >= 0 for number in numbers) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for _, names in skipped
    )


def _write_shards(
    tasks: list[ShardTask], pictures: int, num_workers: int, manifest: IO[str], records: dict[str, dict]
) -> None:
    """Writes the shards in several processes; adds the complete ones to `manifest` and `records`."""
    if not tasks:
        return
    earlier = pictures - sum(len(task.pictures) for task in tasks)
    try:
        num_done, stop = multiprocessing.Value("Q", 0), multiprocessing.Event()
        processes = ProcessPoolExecutor(min(num_workers, len(tasks)), None, _start_worker, (num_done, stop))
    except OSError as error:  # not of OUT: locks between processes are in /dev/shm
        raise UsageError(
            f"the worker processes have no shared memory ({error.strerror or error}). Start the container with more, "
            "such as docker run --shm-size 1g."
        ) from None
    with processes as pool:
        try:
            pending = {pool.submit(_write_shard, task) for task in tasks}
            with progress_bar("packing", unit="picture", total=pictures, initial=earlier) as bar:
                while pending:
                    finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    bar.update(earlier + num_done.value - bar.n)
                    for future in finished:
                        record = future.result()
                        records[record["shard"]] = record
                        manifest.write(json.dumps(record) + "\n")
                        manifest.flush()
                        os.fsync(manifest.fileno())
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def describe_skipped(skipped: Skipped) -> str:
    """One line per reason, the most frequent first, with the first names."""
    ordered = sorted(skipped.items(), key=lambda item: -len(item[1]))
    return "\n".join(
        f"  {len(names)} x {reason}: {', '.join(map(printable, names[:3]))}{', ...' * (len(names) > 3)}"
        for reason, names in ordered
    )
