"""Hostile and damaged shards, each with the results that it must give: for `test_hostile.py`.

    python -m tests.hostile_shards OUT          # writes them all, and lists what is wrong with each

The rule for all of them: a sample is good if its picture can be read and it has a caption that is UTF-8 and not empty.
It is delivered, once, unless the tar is damaged before its end. A sample that is not good is dropped and counted once;
damage of the tar itself is counted once for the shard.

The bytes are the same each time. Nothing is large on the disk: what expands to a lot is written in compressed form.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import struct
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lcm_distill.data.raw import (
    CAPTION_NOT_UTF8,
    DAMAGED_PICTURE,
    DUPLICATE_NAME,
    HUGE_FILE,
    HUGE_PICTURE,
    LARGE_PICTURE,
    NO_CAPTION,
    NO_PICTURE,
    NOT_A_PICTURE,
    OTHER_KIND,
    UNREADABLE_SHARD,
)

# Which of these two Pillow reports depends on its version.
UNREADABLE_PICTURE = (NOT_A_PICTURE, DAMAGED_PICTURE)

MIB = 2**20
BLOCK = 512
END = bytes(2 * BLOCK)
TOUCHED = "hostile-was-here"  # the file that hostile code creates in the working folder if anything runs it
AFTER = "after the damage"  # the caption of a good sample after the damage, which may be delivered or not
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
PICKLED = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "ten", "joblib", "ckpt", "cls", "id", "mp4", "cbor")

# ------------------------------------------------------------------------------------------------------------ tars


def header(
    name: str | bytes,
    size: int = 0,
    kind: bytes = b"0",
    *,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    more: dict[int, bytes] | None = None,
) -> bytes:
    """A tar header; `size` may be one that no real tar has, and `more` overwrites the bytes at its offsets."""
    name = name.encode() if isinstance(name, str) else name
    octal = 0 <= size < 8**11
    number = b"%011o\0" % size if octal else bytearray(size.to_bytes(12, "big", signed=True))
    if not octal and size > 0:
        number[0] |= 0x80
    block = bytearray(BLOCK)
    fields = {0: name, 100: b"0000644\0", 108: b"0000000\0", 116: b"0000000\0", 124: number, 136: b"00000000000\0"}
    fields |= {148: b" " * 8, 156: kind, 157: link, 257: magic, 345: prefix} | (more or {})
    for offset, value in fields.items():
        block[offset : offset + len(value)] = value
    assert len(block) == BLOCK, name
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def member(name: str | bytes, content: bytes = b"", kind: bytes = b"0", **options) -> bytes:
    return header(name, len(content), kind, **options) + padded(content)


def long_name(name: bytes) -> bytes:
    """What GNU tar writes before a member whose name has more than 100 bytes."""
    return member("././@LongLink", name + b"\0", b"L", magic=b"ustar  \0")


def pax(kind: bytes = b"x", **attributes: str | bytes) -> bytes:
    """What POSIX tars write before a member (`g`: before all that follow); "__" in a name stands for a dot."""
    records = b""
    for key, value in attributes.items():
        rest = b" " + key.replace("__", ".").encode() + b"=" + (value.encode() if isinstance(value, str) else value)
        length = len(rest) + 1
        while length != len(str(length)) + len(rest) + 1:
            length = len(str(length)) + len(rest) + 1
        records += str(length).encode() + rest + b"\n"
    return member("PaxHeaders/x", records, kind)


class Tar:
    """A tar that is being written, and the results that it must give."""

    def __init__(self, name: str):
        self.name = name
        self.data = bytearray()
        self.captions: list[str] = []
        self.drops: list[tuple[str | None, ...]] = []
        self._samples = 0

    def next_key(self) -> str:
        self._samples += 1
        return f"{self.name}-{self._samples}"

    def add(self, key: str, files: dict[str, bytes]) -> None:
        for extension, content in files.items():
            self.data += member(f"{key}.{extension}", content)

    def good(self, *, words: str | None = None, **files: bytes) -> str:
        """A sample to be delivered with the caption `words`, or, if that is None, with its key. Returns the key."""
        key = self.next_key()
        if not any(extension.lower() in PICTURES for extension in files):
            files = {"png": PICTURE} | files
        if words is None:
            files["txt"] = key.encode()
        self.captions.append(key if words is None else words)
        self.add(key, files)
        return key

    def bad(self, reason: str | tuple[str | None, ...], **files: bytes) -> None:
        """A sample to be dropped, for one of the reasons; it has a caption, unless that is why."""
        key = self.next_key()
        if reason not in (NO_CAPTION, CAPTION_NOT_UTF8):
            files = {"txt": key.encode()} | files
        self.add(key, files)
        self.count(reason)

    def count(self, reason: str | tuple[str | None, ...]) -> None:
        """Something must be dropped; a None among several reasons: or not be counted at all."""
        self.drops.append(reason if isinstance(reason, tuple) else (reason,))

    def surround(self, *nuisances: bytes) -> None:
        """Each nuisance between two good samples."""
        self.good()
        for nuisance in nuisances:
            self.data += nuisance
            self.good()

    def damage(self, damage: bytes) -> None:
        """Damage after two good samples, and before one that need not be found."""
        self.good()
        self.good()
        self.data += damage
        self.add("after", {"png": PICTURE, "txt": AFTER.encode()})
        self.count(UNREADABLE_SHARD)

    def take(self) -> bytes:
        """What was written since the last call, for a tar in several pieces."""
        written = bytes(self.data)
        self.data.clear()
        return written


def packed(*parts: bytes | tuple[bytes, int]) -> bytes:
    """A gzip file; (chunk, times) is a run of one chunk, packed only once."""
    out, checksum, size = bytearray(b"\x1f\x8b\x08" + bytes(6) + b"\xff"), 0, 0
    for part in parts:
        chunk, times = part if isinstance(part, tuple) else (part, 1)
        deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
        out += (deflate.compress(chunk) + deflate.flush(zlib.Z_FULL_FLUSH)) * times
        size += len(chunk) * times
        for _ in range(times):
            checksum = zlib.crc32(chunk, checksum)
    out += zlib.compressobj(6, zlib.DEFLATED, -15).flush()  # the final, empty block
    return bytes(out) + struct.pack("<II", checksum, size % 2**32)


def zeros(size: int) -> tuple[bytes, int]:
    assert size % MIB == 0
    return bytes(MIB), size // MIB


# -------------------------------------------------------------------------------------------------------- pictures


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values)


PICTURE = encode(noise(8, 8))
Image.init()
AVIF = "AVIF" in Image.SAVE  # not in every Pillow


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, extra: bytes = b"", rows: int | None = None
) -> bytes:
    """A black PNG, with fewer rows than it claims if `rows` are given. Colour 0: grey, 2: RGB, 6: RGBA."""
    rows = height if rows is None else rows
    row = bytes(1 + width * {0: 1, 2: 3, 6: 4}[colour] * depth // 8) if rows else b""
    deflate = zlib.compressobj(1)
    data = b"".join(deflate.compress(row) for _ in range(rows)) + deflate.flush()
    ihdr = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(width: int | None = None, height: int | None = None) -> bytes:
    """A JPEG of 8 x 8 whose header may claim another size."""
    content = bytearray(encode(noise(8, 8), "JPEG"))
    frame = content.index(b"\xff\xc0")
    if width is not None:
        content[frame + 7 : frame + 9] = struct.pack(">H", width)
    if height is not None:
        content[frame + 5 : frame + 7] = struct.pack(">H", height)
    return bytes(content)


def webp(width: int | None = None, height: int | None = None) -> bytes:
    """A lossy WebP of 8 x 8 whose header may claim another size."""
    content = bytearray(encode(noise(8, 8), "WEBP"))
    if width is not None and height is not None:
        content[26:30] = struct.pack("<HH", width, height)
    return bytes(content)


def gif(width: int, height: int) -> bytes:
    """A GIF of one empty frame as large as the picture."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\1\x2c\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame + b";"


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def tiff(*tags: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """A TIFF of these (tag, type, count, value or offset of the values); the `data` are at 8."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def grey_tiff(width: int, height: int, offset: int = 8) -> bytes:
    shape = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1))
    return tiff(*shape, (273, 4, 1, offset), (278, 4, 1, height), (279, 4, 1, 64), data=bytes(64))


def avif(width: int, height: int) -> bytes:
    """An AVIF of 8 x 8 whose header claims another size."""
    content = bytearray(encode(noise(8, 8), "AVIF"))
    place = content.index(b"ispe") + 8
    content[place : place + 8] = struct.pack(">II", width, height)
    return bytes(content)


def jpeg_of_many_scans(side: int, scans: int) -> bytes:
    """A grey progressive JPEG that goes over all of the picture in each of many scans that change nothing."""
    zero_bits = "0" + 14 * "1"  # the only code: 32,767 blocks that stay as they are
    runs = -(-((side // 8) ** 2) // 32767)
    bits = zero_bits * runs
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content

    tables = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0))
    tables += segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    first = segment(0xDA, b"\1\1\0" + bytes((1, 63, 0x01))) + data
    again = segment(0xDA, b"\1\1\0" + bytes((1, 63, 0x10))) + data
    return b"\xff\xd8" + tables + first + again * (scans - 1) + b"\xff\xd9"


def text_bomb(kind: bytes) -> bytes:
    """A PNG chunk of 64 MiB of text, packed."""
    text = zlib.compress(bytes(64 * MIB), 1)
    return chunk(kind, (b"x\0\1\0\0\0" if kind == b"iTXt" else b"x\0\0") + text)


def webp_of_one_colour(width: int, height: int) -> bytes:
    """A lossless, black WebP of the size that it claims: one symbol for each code, so that no pixel takes a bit."""
    bits = (0x2F, 8), (width - 1, 14), (height - 1, 14), (0, 1), (0, 3)  # signature, size, no alpha, version
    bits += (0, 1), (0, 1), (0, 1)  # no transform, no colour cache, one group of codes
    bits += ((1, 1), (0, 1), (0, 1), (0, 1)) * 5  # each code: simple, one symbol, of one bit, 0
    value, length = 0, 0
    for number, width_in_bits in bits:
        value |= number << length
        length += width_in_bits
    data = value.to_bytes(-(-length // 8) + 8, "little")
    data += bytes(len(data) % 2)
    riff = b"WEBPVP8L" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(riff)) + riff


def tiled_tiff(width: int, height: int, tile_width: int, tile_height: int) -> bytes:
    """A small RGB TIFF in one large tile, for all of which the decoder has memory."""
    data = zlib.compress(bytes(MIB)) + bytes(1)
    shape = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 2), (277, 3, 1, 3))
    tile = ((322, 4, 1, tile_width), (323, 4, 1, tile_height), (324, 4, 1, 8), (325, 4, 1, len(data)))
    return tiff(*shape, *tile, data=data + bytes(len(data) % 2))


def run_length_bmp(width: int, height: int) -> bytes:
    """A BMP of runs, each of which ends its row after one pixel."""
    content = (b"\1\1\0\0" * height) + b"\0\1"
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(content), 0, 0, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(content), 0, 0, 14 + len(info)) + info + content


class Touches:
    def __reduce__(self):
        return os.system, (f"touch {TOUCHED}",)


# ---------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class Hostile:
    """A shard, what is wrong with it, and the results that it must give."""

    path: str
    fault: str
    captions: list[str]  # of the samples that must be delivered, each once
    drops: list[tuple[str | None, ...]]  # for each drop its possible reasons; None among them: it need not be counted

    @property
    def name(self) -> str:
        return Path(self.path).name

    def __str__(self) -> str:
        reasons = Counter(" or ".join(reason or "not counted" for reason in drop) for drop in self.drops)
        counts = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
        return f"{self.name}: {self.fault}\n    {len(self.captions)} good samples; dropped: {counts or 'nothing'}"


Maker = Callable[[Tar], bytes | None]  # fills the tar; gives the shard's bytes, or None for the plain tar
MAKERS: dict[str, tuple[Maker, str]] = {}  # by file name: how it is made, and what is wrong with it


def hostile(fault: str, suffix: str = ".tar", name: str | None = None) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        MAKERS[(name or getattr(make, "__name__", "")) + suffix] = make, fault
        return make

    return register


def write_shards(folder: str | os.PathLike) -> list[Hostile]:
    """All hostile shards, written into `folder`."""
    os.makedirs(folder, exist_ok=True)
    found = []
    for name, (make, fault) in MAKERS.items():
        tar = Tar(name.partition(".")[0])
        content = make(tar)
        path = Path(folder, name)
        path.write_bytes(tar.data + END if content is None else content)
        found.append(Hostile(str(path), fault, tar.captions, tar.drops))
    return found


# -------------------------------------------------------------------------------------------------------- pictures


@hostile("pictures cut short, after their header or in it, or by their last bytes only")
def cut_pictures(tar: Tar) -> None:
    picture = noise(40, 30)
    kinds = {"jpg": encode(picture, "JPEG"), "png": encode(picture), "webp": encode(picture, "WEBP")}
    kinds |= {"jpeg": encode(picture, "JPEG", progressive=True), "tif": encode(picture, "TIFF", compression="tiff_lzw")}
    kinds |= {"gif": encode(picture, "GIF"), "bmp": encode(picture, "BMP")}
    if AVIF:
        kinds["avif"] = encode(picture, "AVIF")
    for extension, content in kinds.items():
        for length in (1, 20, len(content) // 4, len(content) // 2, len(content) * 9 // 10):
            tar.bad(UNREADABLE_PICTURE, **{extension: content[:length]})
        tar.good(**{extension: content})


@hostile("text, web pages, code, pickles and pictures that other programs would draw, under a picture's name")
def not_pictures(tar: Tar) -> None:
    eps = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch {TOUCHED}) (w) file\nshowpage\n"
    svg = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg><text>&e;</text></svg>'
    contents = [b"text", b"<!DOCTYPE html><title>404</title>", b'{"error": "gone"}', b"\x1f\x8b\x08 gz", bytes(9999)]
    contents += [pickle.dumps(Touches()), eps.encode(), svg.encode(), b"%PDF-1.4\n1 0 obj << /Type /Catalog >>\n%%EOF"]
    contents += [b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(eps)) + bytes(18) + eps.encode()]  # EPS of DOS
    contents += [encode(noise(8, 8), kind) for kind in ("PPM", "TGA", "ICO", "EPS", "JPEG2000", "SGI")]
    contents += [b"\xd7\xcd\xc6\x9a" + bytes(99), b"8BPS\0\1" + bytes(99), b"\x89HDF\r\n\x1a\n" + bytes(99)]
    for content in contents:
        tar.bad((NOT_A_PICTURE, OTHER_KIND), jpg=content)
        tar.good()


@hostile("pictures of no bytes, no width or no height; of one pixel, which is enough")
def zero_size(tar: Tar) -> None:
    for extension in PICTURES:
        tar.bad(UNREADABLE_PICTURE, **{extension: b""})
    for size in ((0, 0), (0, 8), (8, 0)):
        tar.bad(UNREADABLE_PICTURE, png=png(*size))
        tar.bad(UNREADABLE_PICTURE, png=gif(*size))
        tar.bad(UNREADABLE_PICTURE, png=bmp(*size))
        tar.bad(UNREADABLE_PICTURE, jpg=jpeg(*size))
        tar.bad(UNREADABLE_PICTURE, webp=webp(*size))
        tar.bad(UNREADABLE_PICTURE, tif=grey_tiff(*size))
        if AVIF:
            tar.bad(UNREADABLE_PICTURE, avif=avif(*size))
    for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff"):
        tar.good(**{kind: encode(Image.new("RGB", (1, 1)), kind)})


@hostile("headers that claim gigapixels, a few bytes each")
def pixel_bombs(tar: Tar) -> None:
    tar.bad(HUGE_PICTURE, png=png(50_000, 50_000, rows=1))
    tar.bad(HUGE_PICTURE, png=png(2**31 - 1, 2**31 - 1, rows=0))
    tar.bad(HUGE_PICTURE, png=png(50_000, 50_000, depth=16, colour=6, rows=1))
    tar.bad(HUGE_PICTURE, jpg=jpeg(65_500, 65_500))
    tar.bad(HUGE_PICTURE, webp=webp(16_383, 16_383))
    tar.bad(HUGE_PICTURE, png=gif(65_535, 65_535))
    tar.bad(HUGE_PICTURE, png=bmp(2**31 - 1, 2**31 - 1))
    tar.bad(HUGE_PICTURE, tif=grey_tiff(2**20, 2**20))
    if AVIF:  # its decoder may refuse first
        tar.bad((HUGE_PICTURE, *UNREADABLE_PICTURE), avif=avif(32_000, 32_000))
    tar.good()


@hostile("text of 64 MiB packed into the PNG beside the picture: not drawn, and not unpacked")
def text_bombs(tar: Tar) -> None:
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        tar.bad((*UNREADABLE_PICTURE, HUGE_PICTURE), png=png(8, 8, extra=text_bomb(kind)))
        tar.good()


@hostile("a progressive JPEG of 150 kB that takes minutes to decode: 2,000 scans")
def scan_bomb(tar: Tar) -> None:
    tar.good(jpg=encode(noise(40, 30), "JPEG", progressive=True))
    tar.bad((HUGE_PICTURE, *UNREADABLE_PICTURE), jpg=jpeg_of_many_scans(8000, 2000))
    tar.good()


@hostile("a TIFF of 1 MiB with 1,500 attributes of 1 MiB each, all the same bytes; a picture that is not there")
def tiff_attributes(tar: Tar) -> None:
    tar.bad(UNREADABLE_PICTURE, tif=tiff(*((1000 + i, 1, MIB, 8) for i in range(1500)), data=bytes(MIB)))
    tar.bad(UNREADABLE_PICTURE, tif=grey_tiff(8, 8, offset=2**31))
    tar.good(tif=grey_tiff(8, 8))


@hostile(
    "pictures of a few kilobytes that take gigabytes, or minutes: just under the limit of what any picture may have"
)
def pictures_under_the_limit(tar: Tar) -> None:
    tar.bad(LARGE_PICTURE, webp=webp_of_one_colour(16_383, 10_900))
    tar.bad(LARGE_PICTURE, png=png(13_000, 13_000, rows=1))
    tar.bad(LARGE_PICTURE, png=png(13_000, 13_000, depth=16, colour=6, rows=1))
    tar.bad(LARGE_PICTURE, tif=tiled_tiff(64, 64, 30_000, 20_000))
    tar.bad(HUGE_PICTURE, bmp=run_length_bmp(13_000, 13_000))
    tar.bad(HUGE_PICTURE, jpg=jpeg_of_many_scans(12_000, 99))
    tar.good()


@hostile("large pictures that are what they say: 36 megapixels of 16-bit grey, 42 of RGBA")
def large_pictures(tar: Tar) -> None:
    tar.good(png=png(6000, 6000, depth=16, colour=0))
    tar.good(png=png(6500, 6500, colour=6))


@hostile("pictures 1 pixel high or wide and up to 10 million long")
def extreme_aspects(tar: Tar) -> None:
    for size in ((20_000, 1), (1, 20_000), (10**7, 1), (20_000, 2), (3, 20_000)):
        tar.good(png=png(*size, colour=0))
    tar.good(jpg=encode(Image.new("RGB", (65_500, 1)), "JPEG"))
    tar.good(webp=encode(Image.new("RGB", (1, 16_383)), "WEBP"))


@hostile("every mode, turned and moving pictures, and formats under each other's names: all good")
def odd_pictures(tar: Tar) -> None:
    rgb, grey = noise(20, 16), noise(20, 16, 1)
    exif = Image.Exif()
    for turn in (*range(1, 9), 99):
        exif[0x0112] = turn
        tar.good(jpg=encode(rgb, "JPEG", exif=exif.tobytes()))
    tar.good(jpg=encode(rgb, "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff garbage"))
    images = [noise(20, 16, 4), grey.convert("LA"), grey, grey.convert("1"), rgb.convert("P")]
    images += [Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20)), rgb.quantize(3)]
    for image in images:
        tar.good(png=encode(image))
    tar.good(png=encode(rgb.convert("P"), transparency=3), json=b'{"width": "x"}')
    tar.good(png=encode(rgb, transparency=(1, 2, 3)))
    for image in (grey, rgb.convert("CMYK"), rgb.convert("YCbCr")):
        tar.good(jpeg=encode(image, "JPEG"))
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] * AVIF)):
        tar.good(jpg=encode(rgb, kind))
    wide = np.linspace(0, 1, 320, dtype=np.float32).reshape(16, 20)
    for image in (
        grey,
        rgb.convert("CMYK"),
        Image.merge("LAB", rgb.split()),
        images[-2],
        *map(Image.fromarray, (wide, wide > 0.5)),
    ):
        tar.good(tif=encode(image, "TIFF", compression="tiff_deflate"))
    frames = [noise(20, 16), Image.new("RGB", (20, 16))] * 2
    for kind, extension in (("GIF", "webp"), ("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")):
        tar.good(**{extension: encode(frames[0], kind, save_all=True, append_images=frames[1:])})
    tar.good(webp=encode(noise(20, 16, 4), "WEBP", lossless=True))
    tar.good(JPG=encode(rgb, "JPEG"))
    tar.good(Png=encode(rgb) + b"something behind the end")


# --------------------------------------------------------------------------------------------- captions and JSON


@hostile("captions that are not UTF-8, empty, or hold what no caption should")
def captions(tar: Tar) -> None:
    for text in (b"\xff\xfe\xfd", "Käse".encode("latin-1"), b"cut \xe2\x82", b"\xed\xa0\xbd half", b"\xc0\x80"):
        tar.bad(CAPTION_NOT_UTF8, png=PICTURE, txt=text)
    tar.bad(CAPTION_NOT_UTF8, png=PICTURE, txt="a cat".encode("utf-16"))
    tar.bad(CAPTION_NOT_UTF8, png=PICTURE, txt=pickle.dumps(Touches()))
    for text in (b"", b" \n\t", b"\xef\xbb\xbf", " \u2003\u3000".encode()):
        tar.bad(NO_CAPTION, png=PICTURE, txt=text)
    for number, text in enumerate(("a\0cat", "\x1b]0;title\a\x1b[2J a cat", "a\r\ncat\u2028\u202e", "\U0001f600 cat")):
        tar.good(txt=f"{number} {text}".encode(), words=f"{number} {text}")
    tar.good(txt=b"\xef\xbb\xbf  marked \n", words="marked")
    tar.good(txt=b"long " * 100_000, words=("long " * 100_000)[:4096])
    tar.good(json=b'{"caption": "half \\ud83d of one"}', words="half ? of one")
    tar.good(json=b'{"caption": "\\udc00\\ud800"}', words="??")
    tar.good(txt=b"\xff", json=b'{"caption": "the other caption"}', words="the other caption")


JSONS = [b"[1, 2]", b"3", b"NaN", b"-Infinity", b"null", b"true", b'"text"', b"", b"{", b"\xff\xfe{", b"{}" * 2]
JSONS += [b"[" * 100_000, b'{"a":' * 100_000, b'{"a": [' * 50_000 + b"]}" * 50_000, b'{"a": ' + b"9" * 10**6 + b"}"]
JSONS += [b'{"caption": 3}', b'{"caption": {"text": "x"}}', b'{"caption": [["x"]], "text": null}', b'{"caption": " "}']
JSONS += [b'{"prompt": "x"}', b'{"Caption": "x"}', b'{"caption": "x", "caption": ""}', b'{"caption": NaN}']


@hostile("JSON that is broken, no object, deep, or without a caption: no matter where there is a .txt")
def jsons(tar: Tar) -> None:
    for content in JSONS:
        tar.bad(NO_CAPTION, png=PICTURE, json=content)
        tar.good(json=content)
    sizes = ('"x"', "-5", "0", "1e999", "NaN", "1e300", "1.5", "[1]", "true", "99999999999999999999", "2147483647")
    for size in sizes:
        meta = f'{{"original_width": {size}, "original_height": {size}, "height": {size}, "width": {size}}}'
        tar.good(json=meta.encode())


@hostile("keys and extensions that are endless, many, or write to the terminal")
def terminal_names(tar: Tar) -> None:
    escape = "\x1b]0;owned\a\x1b[2J\r\n"
    meta = {escape: 1, "x" * 100_000: 2, "\ud800": 3, "\u202e": 4, "": 5} | {f"key {i}": i for i in range(1000)}
    tar.good(json=json.dumps(meta).encode())
    tar.data += member(f"a.{escape}")
    tar.data += long_name(b"b." + b"x" * 50_000) + member("b")
    tar.good()


# ---------------------------------------------------------------------------------------------- files of samples


@hostile("code to be unpickled, imported or run, beside good pictures and in place of them")
def code(tar: Tar) -> None:
    payload = pickle.dumps(Touches())
    tar.good(**dict.fromkeys(PICKLED, payload))
    script = f"import os; os.system('touch {TOUCHED}')\n".encode()
    tar.good(py=script, pyc=script, so=script, sh=script, exe=script, html=script)
    for name in ("conftest.py", "__init__.py", "sitecustomize.py", "PIL.py", "__config__.py"):
        tar.data += member(name, script)
    numbers = io.BytesIO()
    np.save(numbers, np.array([Touches()], dtype=object), allow_pickle=True)
    tar.good(npy=numbers.getvalue(), **{"crop.npy": numbers.getvalue()})
    tar.bad(NOT_A_PICTURE, jpg=payload, pkl=payload)
    tar.bad(NOT_A_PICTURE, png=script)
    tar.bad(NO_CAPTION, png=PICTURE, pkl=payload, json=payload)


@hostile("pictures without captions and captions without pictures, alone and across each other")
def parts_missing(tar: Tar) -> None:
    tar.bad(NO_CAPTION, png=PICTURE)
    tar.bad(NO_PICTURE)
    tar.bad(NO_PICTURE, json=b"{}")
    tar.good()
    for extension in ("png", "txt"):  # a.png b.png a.txt b.txt: not next to each other
        for key in ("across-1", "across-2"):
            tar.add(key, {extension: PICTURE if extension == "png" else b"across"})
            tar.count(NO_CAPTION if extension == "png" else NO_PICTURE)
    tar.bad(NO_PICTURE, psd=PICTURE, svg=PICTURE)
    tar.good()


@hostile("names that come twice")
def duplicates(tar: Tar) -> None:
    def twice(*names: str) -> None:
        key = tar.next_key()
        for name in names:
            tar.add(key, {name: PICTURE if name.lower() == "png" else b"twice"})
        tar.count(DUPLICATE_NAME)
        tar.good()

    twice("png", "txt", "png", "txt")
    twice("png", "PNG", "txt")
    twice("png", "txt", "TXT")
    twice("txt", "txt", "png")
    key = tar.good()
    tar.good()
    tar.add(key, {"png": PICTURE, "txt": b"the same key later on"})  # a sample of its own
    tar.captions.append("the same key later on")


@hostile("a sample of 5,000 files")
def sample_of_many_files(tar: Tar) -> None:
    tar.good()
    tar.good(**{f"{number:05d}.cls": b"1" for number in range(5000)})
    tar.good()


@hostile("5,000 small files that belong to no sample")
def files_of_no_sample(tar: Tar) -> None:
    tar.good()
    tar.data += b"".join(member(f"{number:05d}.cls") for number in range(5000))
    tar.good()


# ----------------------------------------------------------------------------------------------------- large files


@hostile("a caption of 300 MiB of nothing, packed", ".tar.gz")
def text_of_300_mib(tar: Tar) -> bytes:
    return with_large_file(tar, "txt", zeros(300 * MIB), png=PICTURE)


@hostile("a JSON of 200 MiB of brackets in brackets, packed", ".tar.gz")
def json_of_200_mib(tar: Tar) -> bytes:
    return with_large_file(tar, "json", (b"[" * MIB, 200), png=PICTURE, txt=b"x")


@hostile("a JSON of 64 MiB of empty lists: gigabytes as Python's objects", ".tar.gz")
def json_of_lists(tar: Tar) -> bytes:
    first, lists, last = b"[".ljust(BLOCK), b"[],[],  " * (MIB // 8), b"[]]".ljust(BLOCK)
    return with_large_file(tar, "json", (first, 1), (lists, 64), (last, 1), png=PICTURE, txt=b"x")


def with_large_file(tar: Tar, extension: str, *content: tuple[bytes, int], **files: bytes) -> bytes:
    tar.good()
    key = tar.next_key()
    tar.add(key, files)
    tar.data += header(f"{key}.{extension}", sum(len(chunk) * times for chunk, times in content))
    before = tar.take()
    tar.count(HUGE_FILE)
    tar.good()
    return packed(before, *content, tar.take() + END)


@hostile("a file of no use, 1 GiB, packed: passed over, not kept", ".tar.gz")
def unused_gib(tar: Tar) -> bytes:
    tar.good()
    tar.data += header("unused.bin", 1024 * MIB)
    before = tar.take()
    tar.good()
    return packed(before, zeros(1024 * MIB), tar.take() + END)


@hostile("a sample of four pictures of 130 MiB of nothing each, packed", ".tar.gz")
def four_large_pictures(tar: Tar) -> bytes:
    parts: list[bytes | tuple[bytes, int]] = []
    tar.good()
    key = tar.next_key()
    for extension in PICTURES[:4]:
        tar.data += header(f"{key}.{extension}", 130 * MIB)
        parts += [tar.take(), zeros(130 * MIB)]
    tar.add(key, {"txt": b"large"})
    tar.count((HUGE_FILE, *UNREADABLE_PICTURE))
    tar.good()
    return packed(*parts, tar.take() + END)


def claims(size: int) -> Maker:
    def make(tar: Tar) -> None:
        tar.damage(header("x.jpg", size) + padded(PICTURE))
        tar.count((HUGE_FILE, None))  # a sample, or part of the damage

    return make


for label, claimed in {"8_gib": 2**33, "10_tib": 10 * 2**40, "8_eib": 2**63 - 512, "2_to_87": 2**87}.items():
    hostile("a picture whose header claims more than there is", name=f"claims_{label}")(claims(claimed))


@hostile("sizes below zero")
def negative_size(tar: Tar) -> None:
    tar.damage(header("below.jpg", -512))


@hostile("a size below zero, to the start of the shard")
def negative_size_loop(tar: Tar) -> None:
    tar.good()
    tar.data += header("below.bin", -len(tar.data) - BLOCK)
    tar.count(UNREADABLE_SHARD)


for extension in ("bin", "jpg"):

    @hostile("a size below zero in the attributes: a circle for who follows it", name=f"negative_pax_size_{extension}")
    def negative_pax_size(tar: Tar, extension=extension) -> None:
        tar.damage(pax(size=str(-3 * BLOCK)) + header(f"below.{extension}"))


def old_sparse(name: str, size: int) -> bytes:
    holes = {386: b"%011o\0%011o\0" % (0, BLOCK), 482: b"\0", 483: header("x", size)[124:136]}
    return header(name, BLOCK, b"S", magic=b"ustar  \0", more=holes) + bytes(BLOCK)


def sparse_01(name: str, size: int) -> bytes:
    return pax(GNU__sparse__map="0,512", GNU__sparse__size=str(size)) + member(name, bytes(BLOCK))


def sparse_10(name: str, size: int) -> bytes:
    version = {"GNU__sparse__major": "1", "GNU__sparse__minor": "0"}
    attributes = pax(**version, GNU__sparse__name=name, GNU__sparse__realsize=str(size))
    return attributes + member("sparse", padded(b"1\n0\n512\n") + bytes(BLOCK))


@hostile("pictures with gigabytes and terabytes of holes, in three notations")
def sparse(tar: Tar) -> None:
    for size in (2**33, 10 * 2**40):
        for notation in (old_sparse, sparse_01, sparse_10):
            tar.good()
            key = tar.next_key()
            tar.data += notation(f"{key}.jpg", size)
            tar.add(key, {"txt": b"x"})
            tar.count((HUGE_FILE, NO_PICTURE, NOT_A_PICTURE))
    tar.good()


@hostile("a file with a list of holes of 50 MiB, packed", ".tar.gz")
def sparse_chain(tar: Tar) -> bytes:
    tar.surround(b"")
    tar.data += header("holes.bin", 0, b"S", magic=b"ustar  \0", more={482: b"\1"})
    holes = (b"%011o\0%011o\0" % (1, 1) * 21 + b"\1").ljust(BLOCK, b"\0")
    tar.count(UNREADABLE_SHARD)
    return packed(tar.take(), (holes * (MIB // BLOCK), 50), bytes(BLOCK) + b"no header".ljust(BLOCK))


# -------------------------------------------------------------------------------------------------------- headers


@hostile("attributes of 400 MiB of nothing, packed", ".tar.gz")
def large_pax(tar: Tar) -> bytes:
    return with_large_header(tar, b"x")


@hostile("attributes of 400 MiB of nothing for all that follows, packed", ".tar.gz")
def large_global_pax(tar: Tar) -> bytes:
    return with_large_header(tar, b"g")


@hostile("a name of 400 MiB of nothing, packed", ".tar.gz")
def large_name(tar: Tar) -> bytes:
    return with_large_header(tar, b"L")


def with_large_header(tar: Tar, kind: bytes) -> bytes:
    tar.good()
    tar.good()
    tar.count(UNREADABLE_SHARD)
    return packed(bytes(tar.data) + header("large", 400 * MIB, kind), zeros(400 * MIB), member("after.txt", b"x") + END)


def slow_attributes(content: bytes) -> Maker:
    def make(tar: Tar) -> None:
        tar.damage(member("PaxHeaders/x", content, b"x") + member("slow.bin"))
        tar.drops = [(UNREADABLE_SHARD, None)]  # who reads them in a second may

    return make


for label, content in {"digits": b"9" * 500_000, "records": b"2 " * 250_000 + b"="}.items():
    hostile("attributes that take hours, or all memory", name=f"slow_pax_{label}")(slow_attributes(content))


@hostile("names that take a regular expression hours")
def slow_names(tar: Tar) -> None:
    names = [b"/" * 60_000, b"a/" * 30_000, b"a/" * 30_000 + b"\n.bin", b"_" * 60_000, b"." * 60_000]
    tar.surround(*(long_name(name) + member("slow") for name in names * 3))


@hostile("long names after long names, 3,000 in a row")
def chained_names(tar: Tar) -> None:
    tar.damage(long_name(b"x.bin") * 3000 + member("x.bin"))
    tar.drops = [(UNREADABLE_SHARD, None)]


@hostile("long names, in all three notations: good")
def long_names(tar: Tar) -> None:
    for length in (90, 100, 101, 255, 256, 5000, 60_000):
        folder = "f" * (length - 20)
        for notation in ("gnu", "pax"):
            key = tar.next_key()
            for extension, content in (("png", PICTURE), ("txt", key.encode())):
                name = f"{folder}/{key}.{extension}"
                tar.data += long_name(name.encode()) if notation == "gnu" else pax(path=name)
                tar.data += member("short." + extension, content)
            tar.captions.append(key)
    key = tar.next_key()
    for extension, content in (("png", PICTURE), ("txt", key.encode())):
        tar.data += member(f"{key}.{extension}", content, prefix=b"p" * 155)
    tar.captions.append(key)


@hostile("attributes with odd values that do not matter: good")
def odd_attributes(tar: Tar) -> None:
    odd = [{"mtime": value} for value in ("nan", "inf", "-1e400", "x", "9" * 5000)]
    odd += [{"uid": "9" * 5000}, {"uid": "-1"}, {"gid": "x"}, {"uname": b"\xff\xfe"}, {"comment": b"\xff" * 50_000}]
    odd += [{"SCHILY__xattr__user__x": b"\0\1=\n"}, {"VENDOR__x": ""}, {"linkpath": "/etc/passwd"}]
    odd += [{"hdrcharset": "BINARY"}, {"hdrcharset": "ISO-IR 10646 2000 UTF-8"}, {"charset": "x"}]
    for attributes in odd:
        tar.data += pax(**attributes)
        tar.good()
    tar.data += pax(b"g", comment="for all that follow")
    tar.good()


for label, attributes in {
    "size_is_text": {"size": "text"},
    "size_too_small": {"size": "5"},
    "sparse_size_is_text": {"GNU__sparse__size": "text"},
    "sparse_map_is_text": {"GNU__sparse__map": "1,text"},
    "sparse_map_is_nowhere": {"GNU__sparse__major": "1", "GNU__sparse__minor": "0"},
}.items():

    @hostile("attributes that no tar can have", name=f"pax_{label}")
    def bogus_attributes(tar: Tar, attributes=attributes) -> None:
        tar.damage(pax(**attributes) + member("x.jpg", noise_bytes(4 * BLOCK)))
        tar.drops = [(UNREADABLE_SHARD, NO_CAPTION, None)]  # believed, or not


def noise_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@hostile("names that lead out of the folder: good, since nothing is unpacked")
def paths_outwards(tar: Tar) -> None:
    for folder in ("../../", "/tmp/", "//etc/", "./", "a/../../", "C:\\", "\\\\host\\x\\", "~/", "/dev/shm/", "$HOME/"):
        key = tar.next_key()
        tar.add(folder + key, {"png": PICTURE, "txt": key.encode()})
        tar.captions.append(key)


@hostile("names that are not UTF-8, hold control characters, or have no dot, or only one at their start")
def odd_names(tar: Tar) -> None:
    for name in (b"\xff\xfe", b"K\xe4se", b"a\x1b[2Jb", b"a b\tc", b"'; touch " + TOUCHED.encode() + b"; '", b"%s%n"):
        key = tar.next_key()
        for extension, content in ((b".png", PICTURE), (b".txt", key.encode())):
            tar.data += member(key.encode() + name + extension, content)
        tar.captions.append(key)
    nameless = (b"", b".", b"..", b"/", b"png", b".png", b".txt", b"a/.png", b"a/._b.png", b"a.", b"a.\xff", b"a.b/c")
    tar.surround(*(member(name, PICTURE) for name in nameless))
    tar.data += member(b"a\nb.png", PICTURE)
    tar.count(NO_CAPTION)


@hostile("links and devices under picture's names: not followed, to /etc/passwd or into the tar")
def links_and_devices(tar: Tar) -> None:
    first = tar.good()
    for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"D", b"K", b"M", b"N", b"V", b"Z"):
        for link in (b"/etc/passwd", f"{first}.png".encode(), b"."):
            key = tar.next_key()
            tar.data += header(f"{key}.jpg", 0, kind, link=link)
            tar.add(key, {"txt": b"x"})
            tar.count(NO_PICTURE)
            tar.good()


@hostile("folders only")
def only_folders(tar: Tar) -> None:
    for name in ("./", "a/", "a/b/", "a/b.jpg/", "a/b.txt/"):
        tar.data += header(name, 0, b"5")


# ------------------------------------------------------------------------------------------------- damaged tars


def cut_at(tenth: int) -> Maker:
    def make(tar: Tar) -> bytes:
        ends = []
        for _ in range(12):
            ends.append(len(tar.good()) - BLOCK + len(tar.data))  # the padding of the caption may be cut
        whole = bytes(tar.data) + END
        cut = len(whole) * tenth // 10
        del tar.captions[sum(end <= cut for end in ends) :]
        tar.count(UNREADABLE_SHARD)
        return whole[:cut]

    return make


for tenth in range(10):
    hostile(f"a tar cut at {10 * tenth} %", name=f"cut_at_{10 * tenth:02d}")(cut_at(tenth))


@hostile("a tar cut in a header")
def cut_in_header(tar: Tar) -> bytes:
    tar.surround(b"")
    tar.count(UNREADABLE_SHARD)
    return bytes(tar.data) + header("next.png", 99)[:300]


@hostile("a tar cut between two files of a sample, to the byte")
def cut_between_files(tar: Tar) -> bytes:
    tar.surround(b"")
    tar.count(UNREADABLE_SHARD)
    return bytes(tar.data) + member("next.png", PICTURE)


@hostile("a tar cut in the padding of a sample's last file: the sample is complete")
def cut_in_padding(tar: Tar) -> bytes:
    tar.surround(b"")
    tar.count(UNREADABLE_SHARD)
    return bytes(tar.data[:-100])


@hostile("a tar whose disk was full: zeros from the middle of a picture on")
def half_written(tar: Tar) -> bytes:
    tar.surround(b"")
    tar.count(UNREADABLE_SHARD)
    return bytes(tar.data) + header("next.png", 9000) + noise_bytes(2000) + bytes(100_000)


@hostile("a download into a file of the final size that ended after 3 of 64 samples: zeros to its end")
def preallocated(tar: Tar) -> bytes:
    for _ in range(3):
        tar.good()
    tar.count(UNREADABLE_SHARD)
    return bytes(tar.data) + bytes(61 * len(tar.data) // 3)


@hostile("a download in several pieces of which the second is missing: zeros in the middle of a file, and after it")
def preallocated_in_pieces(tar: Tar) -> bytes:
    tar.surround(b"")
    tar.count(UNREADABLE_SHARD)
    before = bytes(tar.data) + header("next.png", 9000) + noise_bytes(2000) + bytes(40 * BLOCK)
    tar.add("after", {"png": PICTURE, "txt": AFTER.encode()})
    return before + bytes(tar.data) + END


@hostile("a packed tar of which most is zeros", ".tar.gz")
def gz_preallocated(tar: Tar) -> bytes:
    tar.surround(b"", b"")
    tar.count(UNREADABLE_SHARD)
    return packed(tar.take(), zeros(MIB), member("x.txt", b"x") + END)


@hostile("a download that ended before the first byte: zeros only")
def zeros_only(tar: Tar) -> bytes:
    tar.count(UNREADABLE_SHARD)
    return bytes(300_000)


for label, record in {"by_default": 20 * BLOCK, "of_64_kib": 2**16}.items():

    @hostile("zeros up to a whole record, as tar --blocking-factor writes them: good", name=f"records_{label}")
    def records(tar: Tar, record=record) -> bytes:
        tar.surround(member("x.bin", noise_bytes(8 * record)), b"")
        written = bytes(tar.data) + END
        return written + bytes(-len(written) % record)


def gz_cut_at(tenth: int) -> Maker:
    def make(tar: Tar) -> bytes:
        ends = []
        for seed in range(40):
            ends.append(len(tar.good(cls=noise_bytes(3000, seed))) - BLOCK + len(tar.data))
        whole = gzip.compress(bytes(tar.data) + END, mtime=0)
        cut = whole[: len(whole) * tenth // 10]
        length = len(zlib.decompressobj(31).decompress(cut))
        del tar.captions[sum(end <= length for end in ends) :]
        tar.count(UNREADABLE_SHARD)
        return cut

    return make


for tenth in (2, 5, 9):
    hostile(f"a packed tar cut at {10 * tenth} %", ".tar.gz", f"gz_cut_at_{10 * tenth}")(gz_cut_at(tenth))


@hostile("a packed tar damaged in the middle", ".tar.gz")
def gz_damaged(tar: Tar) -> bytes:
    tar.surround(b"")
    tar.data += member("between.bin", noise_bytes(MIB))
    before = packed(bytes(tar.data))[:-13]
    tar.count(UNREADABLE_SHARD)
    return before + b"\xff" * 1000 + noise_bytes(MIB)


@hostile("a packed tar in several pieces, as bgzip and `cat` write them: good", ".tar.gz")
def gz_in_pieces(tar: Tar) -> bytes:
    for _ in range(20):
        tar.good()
    whole = bytes(tar.data) + END
    return b"".join(gzip.compress(whole[start : start + 5000], mtime=0) for start in range(0, len(whole), 5000))


@hostile("something after the end of a compressed tar: good", ".tar.gz")
def gz_and_more(tar: Tar) -> bytes:
    tar.surround(b"")
    return gzip.compress(bytes(tar.data) + END + bytes(20 * BLOCK), mtime=0) + b"garbage" * 1000


@hostile("a web page, packed", ".tar.gz")
def gz_page(tar: Tar) -> bytes:
    tar.count(UNREADABLE_SHARD)
    return gzip.compress(b"<!DOCTYPE html><title>404</title>" * 100, mtime=0)


@hostile("a header with a wrong checksum in the middle")
def checksum(tar: Tar) -> None:
    damaged = bytearray(member("x.jpg", PICTURE))
    damaged[148:156] = b"0123456\0"
    tar.damage(bytes(damaged))


@hostile("a caption's header is damaged: its picture goes with it")
def checksum_of_a_caption(tar: Tar) -> None:
    tar.good()
    damaged = bytearray(member("x.txt", b"x"))
    damaged[0] ^= 1
    tar.damage(member("x.jpg", PICTURE) + damaged)


@hostile("garbage between two files")
def garbage(tar: Tar) -> None:
    tar.damage(noise_bytes(3 * BLOCK))


@hostile("a few bytes too many between two files")
def shifted(tar: Tar) -> None:
    tar.damage(b"seven..")


@hostile("numbers in a header that are none")
def header_of_text(tar: Tar) -> None:
    tar.damage(header("x.jpg", more={124: b"not a number"}))


@hostile("no end mark, though all is there")
def no_end(tar: Tar) -> bytes:
    tar.surround(b"")
    tar.count((UNREADABLE_SHARD, None))  # cut between two samples, or written without an end: impossible to know
    return bytes(tar.data)


@hostile("one block of zeros for an end mark: good")
def short_end(tar: Tar) -> bytes:
    tar.surround(b"")
    return bytes(tar.data) + bytes(BLOCK)


@hostile("a second tar after the first one's end: what comes after an end mark is not part of a tar")
def two_tars(tar: Tar) -> bytes:
    tar.surround(b"")
    return bytes(tar.data) + END + member("second.png", PICTURE) + member("second.txt", b"second") + END


@hostile("an end mark, and nothing before it")
def empty_tar(tar: Tar) -> None:
    pass


def no_tar(content: bytes) -> Maker:
    def make(tar: Tar) -> bytes:
        tar.count(UNREADABLE_SHARD)
        return content

    return make


for label, content in {
    "no_bytes": b"",
    "ten_zeros": bytes(10),
    "web_page": b"<!DOCTYPE html><html><title>404 Not Found</title></html>\n" * 50,
    "noise": noise_bytes(100_000),
    "zip": b"PK\3\4" + noise_bytes(5000),
    "zstd": b"\x28\xb5\x2f\xfd" + noise_bytes(5000),
    "gz_of_nothing": b"\x1f\x8b\x08",
    "gz_of_noise": b"\x1f\x8b\x08\0" + noise_bytes(5000),
    "bz2_of_noise": b"BZh91AY&SY" + noise_bytes(5000),
    "xz_of_noise": b"\xfd7zXZ\0" + noise_bytes(5000),
}.items():
    hostile("no tar at all", name=f"no_tar_{label}")(no_tar(content))


# ------------------------------------------------------------------------------------------- tars of other times


@hostile("the tar of 1979: good")
def v7(tar: Tar) -> None:
    tar.data += header("folder/", 0, b"\0", magic=bytes(8))
    for _ in range(3):
        key = tar.next_key()
        for extension, content in (("png", PICTURE), ("txt", key.encode())):
            tar.data += member(f"folder/{key}.{extension}", content, b"\0", magic=bytes(8))
        tar.captions.append(key)


@hostile("contiguous files, GNU's magic and a volume label: good")
def gnu(tar: Tar) -> None:
    tar.data += header("a label.jpg", 0, b"V", magic=b"ustar  \0")
    for _ in range(3):
        key = tar.next_key()
        for extension, content in (("png", PICTURE), ("txt", key.encode())):
            tar.data += member(f"{key}.{extension}", content, b"7", magic=b"ustar  \0")
        tar.captions.append(key)


for label, pack in {"bz2": bz2.compress, "xz": lzma.compress, "gz": packed}.items():

    @hostile("packed, and not called so: good", name=f"packed_{label}")
    def packed_tar(tar: Tar, pack=pack) -> bytes:
        tar.surround(b"")
        return pack(tar.take() + END)


@hostile("as Python's tarfile writes it, with fractional times: good")
def by_tarfile(tar: Tar) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as out:
        for name in ("käse", "x" * 300):
            for extension, content in (("png", PICTURE), ("txt", name.encode())):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size, info.mtime = len(content), 0.5
                out.addfile(info, io.BytesIO(content))
            tar.captions.append(name)
    return buffer.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for shard in write_shards(sys.argv[1]):
        print(shard)
