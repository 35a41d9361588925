"""Deep pictures: 16-bit, 32-bit and float pixels become the 8-bit greys that they stand for, or are left out."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from test_stream import encode, make_stream, take, write_tar

from lcm_distill.data import decode, raw
from lcm_distill.data.decode import decode_picture
from lcm_distill.data.packing import Settings, pack_shards
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.raw import BadSample
from lcm_distill.data.shards import expand_shards, read_shard

GREYS = np.linspace(0, 1, 12 * 16).reshape(12, 16)
WHITE_IS_ZERO = {262: 0}


def tiff(array, tags=None, bits=None, order="<", data=None):
    """An uncompressed TIFF of the values in `array` [height, width] or [height, width, channels], with these tags."""
    channels = array.shape[2] if array.ndim == 3 else 1
    data = np.ascontiguousarray(array, array.dtype.newbyteorder(order)).tobytes() if data is None else data
    bits = bits or 8 * array.dtype.itemsize
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    entries = {256: array.shape[1], 257: array.shape[0], 258: bits, 259: 1, 262: 2 if channels == 3 else 1, 273: 8}
    entries |= {277: channels, 278: array.shape[0], 279: len(data), 339: kind} | (tags or {})
    start, extra = 8 + len(data), b""
    table = struct.pack(order + "H", len(entries))
    extra_at = start + 2 + 12 * len(entries) + 4
    for tag, value in sorted(entries.items()):
        many = channels if tag in (258, 339) else 1
        if many > 2:
            table += struct.pack(order + "HHII", tag, 3, many, extra_at + len(extra))
            extra += struct.pack(f"{order}{many}H", *[value] * many)
        else:
            table += struct.pack(order + "HHII", tag, 4, 1, value)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", start) + data + table + bytes(4) + extra


def scaled(white, dtype):
    values = GREYS * white
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else values.round().astype(dtype)


def greys(content):
    picture = np.asarray(decode_picture(content)[0])
    assert picture.ndim == 3 and (picture == picture[..., :1]).all()
    return picture[..., 0]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("white", "dtype"),
    [(1, np.float32), (255, np.float32), (65535, np.float32), (4095, np.float32), (1, np.int32), (255, np.int32),
     (4095, np.int32), (65535, np.int32), (255, np.uint32), (65535, np.uint32), (32767, np.int16), (4095, np.int16),
     (255, np.uint16), (1023, np.uint16), (4095, np.uint16), (16383, np.uint16), (65535, np.uint16), (1, np.uint16)],
)  # fmt: skip
def test_a_deep_tiff_has_its_greys(white, dtype, order):
    """They were black, or nearly: values from 0 to 1 as greys of 255, 12 bits as the lowest of 16."""
    values = scaled(white, dtype)
    content = tiff(values, order=order)
    if dtype == np.uint32 and order == ">":  # Pillow does not read it
        with pytest.raises(BadSample, match="TIFF of a kind that is not read"):
            decode_picture(content)
        return
    assert np.abs(greys(content) - values.astype(np.float64) * 255 / white).max() <= 0.51


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("white", "dtype"), [(65535, np.uint16), (4095, np.uint16), (1, np.float32)])
def test_white_is_zero(white, dtype, order):
    """Pillow turns only 8-bit greys of this kind the right way round."""
    content = tiff(scaled(white, dtype), WHITE_IS_ZERO, order=order)
    if dtype == np.uint16 and order == ">":
        with pytest.raises(BadSample, match="TIFF of a kind that is not read"):
            decode_picture(content)
        return
    assert np.abs(greys(content) - (1 - GREYS) * 255).max() <= 0.6


def test_a_tiff_of_12_bits_says_so():
    """Its largest value is below 10 bits, and it is as dark as it says."""
    values = scaled(900, np.uint16)
    packed = [(a << 12) | b for a, b in values.reshape(-1, 2).tolist()]
    content = tiff(values, bits=12, data=b"".join(pair.to_bytes(3, "big") for pair in packed))
    assert np.abs(greys(content) - values * (255 / 4095)).max() <= 0.51


@pytest.mark.hostile("pictures")
@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([-1, 1], np.float32),  # signed
        ([0, np.nan], np.float32),
        ([0, np.inf], np.float32),
        ([0, 12.5], np.float32),  # the highlights of linear light, or nearly black
        ([0, 1e6], np.float32),
        ([-100, 255], np.int32),
        ([0, 70_000], np.int32),
        ([0, 2**31 - 1], np.int32),
        ([0, 9], np.int32),  # classes
        ([-5, 4000], np.int16),
        ([1, 15], np.uint16),
    ],
)
def test_values_of_an_unknown_range_are_left_out(tmp_path, values, dtype):
    content = tiff(np.resize(np.array(values, dtype), (8, 8)))
    with pytest.raises(BadSample, match="of an unknown range"):
        decode_picture(content)
    files = [("a.tif", content), ("a.txt", "a"), ("b.png", encode(Image.new("RGB", (8, 8)))), ("b.txt", "b")]
    report = inspect_shards([write_tar(tmp_path / "0.tar", files)], Preparation(resolution=8))
    assert report.dropped == {raw.UNKNOWN_RANGE: 1} and report.usable == 1


@pytest.mark.parametrize("values", [[-0.04, 1.07], [-3.0, 262.0]])
def test_what_a_resize_overshoots_is_clipped(values):
    white = 1 if values[1] < 2 else 255
    assert greys(tiff(np.resize(np.array([*values, 0.6 * white], np.float32), (8, 8))))[0, :3].tolist() == [0, 255, 153]


@pytest.mark.parametrize(
    ("highest", "expected"), [(65535, 255), (32768, 128), (4112, 16), (0, 0), (4095, 255), (255, 255)]
)
def test_a_deep_png_uses_all_of_16_bits_unless_that_is_black(highest, expected):
    values = np.zeros((8, 8), np.uint16)
    values[0, 0] = highest
    assert greys(encode(Image.fromarray(values)))[0, 0] == expected


@pytest.mark.parametrize("order", "<>")
def test_colour_of_16_bits(order):
    """Pillow keeps the upper 8 bits: what uses 12 would be black, and is left out."""
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    values[0, 0] = 65535
    assert np.array_equal(np.asarray(decode_picture(tiff(values, order=order))[0]), values >> 8)
    for unused in (2, 4, 6, 8, 16):  # 14, 12, 10 and 8 bits, and black
        with pytest.raises(BadSample) as caught:
            decode_picture(tiff(values >> unused, order=order))
        assert caught.value.reason == raw.NOT_ALL_BITS


def png(values, kind, *chunks):
    """A PNG of 16 bits; `kind`: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA. `chunks` (type, content) stand before it."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">2I5B", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    before = b"".join(chunk(*of) for of in chunks)
    after = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + after


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize(
    ("highest", "left_out"), [(65535, False), (16383, False), (4095, True), (255, True), (1, True)]
)
def test_colour_of_16_bits_in_a_png(kind, channels, highest, left_out):
    """Values up to 255 became black without a word."""
    values = np.full((8, 8, channels), highest, np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535
    if left_out:
        with pytest.raises(BadSample) as caught:
            decode_picture(png(values, kind))
        assert caught.value.reason == raw.NOT_ALL_BITS
    else:
        assert set(np.unique(decode_picture(png(values, kind))[0])) == {highest >> 8}


@pytest.mark.parametrize("max_size", [None, 4])
def test_a_transparent_value_of_deep_grey_becomes_white(tmp_path, max_size):
    values = np.linspace(0, 65535, 16 * 16).round().astype(np.uint16).reshape(16, 16)
    values[:8] = 1000
    content = png(values, 0, (b"tRNS", struct.pack(">H", 1000)))
    expected = np.where(values == 1000, 255, (values / 257).round())
    assert np.array_equal(greys(content), expected)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(content)
    (tmp_path / "in" / "a.txt").write_text("a")
    pack_shards(tmp_path / "in", tmp_path / "out", Settings(max_size=max_size), num_workers=1)
    (sample,) = read_shard(expand_shards(str(tmp_path / "out"))[0])
    assert (greys(sample.files["png"])[: (max_size or 16) // 4] == 255).all()


@pytest.mark.hostile("pictures")
@pytest.mark.parametrize("values", [[0, 127], [-128, 127], [-1, -1]])
def test_signed_bytes_are_left_out(values):
    """Pillow shows -1 as 255."""
    with pytest.raises(BadSample) as caught:
        decode_picture(tiff(np.resize(np.array(values, np.int8), (8, 8))))
    assert caught.value.reason == raw.UNREAD_TIFF


@pytest.mark.hostile("pictures")
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_picture_that_is_cut_short_in_its_header_is_no_other_file(kind):
    """It was "no picture"."""
    with pytest.raises(BadSample) as caught:
        decode_picture(encode(Image.new("RGB", (8, 8)), kind)[:12])
    assert caught.value.reason == raw.DAMAGED_PICTURE


@pytest.mark.hostile("pictures")
@pytest.mark.parametrize("size", [2**21, 8 * 2**20, 80 * 2**20])
def test_a_png_may_have_a_large_text(size):
    """From 1 MB on it was "no picture"."""
    text = b"Comment\0\0" + zlib.compress(bytes(size))
    content = png(np.full((8, 8, 3), 65535), 2, (b"zTXt", text))
    if size < 16 * 2**20:
        assert np.asarray(decode_picture(content)[0]).all()
        return
    with pytest.raises(BadSample) as caught:
        decode_picture(content)
    assert caught.value.reason == raw.HUGE_PICTURE


@pytest.mark.hostile("pictures")
@pytest.mark.parametrize(
    "first", [b"\xff\x0a\xfa", b"\0\0\0\x0cJXL \r\n\x87\n", b"\0\0\0\x0cjP  \r\n\x87\n", b"8BPS", b"<svg>",
              b"<?xml version='1.0'?><svg>", b"\0\0\0\x18ftypcrx ", b"P6\n8 8\n255\n"],
)  # fmt: skip
def test_pictures_of_other_kinds_are_named(first):
    """With a wrong extension they were "no picture"."""
    with pytest.raises(BadSample) as caught:
        decode_picture(first + bytes(99))
    assert caught.value.reason == raw.OTHER_KIND


@pytest.mark.hostile("pictures")
@pytest.mark.parametrize("array", [GREYS, np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 3), np.int32)])
def test_a_tiff_of_another_kind_is_named(array):
    """It is no damaged file."""
    with pytest.raises(BadSample) as caught:
        decode_picture(tiff(array))
    assert caught.value.reason == raw.UNREAD_TIFF


@pytest.mark.parametrize("max_size", [None, 4])
@pytest.mark.parametrize(
    ("white", "dtype", "tags"),
    [(1, np.float32, {}), (255, np.int32, {}), (4095, np.uint16, {}), (65535, np.uint16, {}),
     (65535, np.uint16, WHITE_IS_ZERO), (16383, np.uint16, {}), (65535, np.int32, {})],
)  # fmt: skip
def test_packed_deep_pictures_look_the_same(tmp_path, white, dtype, tags, max_size):
    images = tmp_path / "in"
    images.mkdir()
    (images / "a.tif").write_bytes(tiff(scaled(white, dtype), tags))
    (images / "a.txt").write_text("a")
    (images / "b.tif").write_bytes(tiff(np.full((8, 8), -1, np.float32)))
    (images / "b.txt").write_text("b")
    packed = pack_shards(images, tmp_path / "out", Settings(max_size=max_size), num_workers=1)
    assert packed.skipped == {raw.UNKNOWN_RANGE: ["b.tif"]}
    (shard,) = expand_shards(str(tmp_path / "out"))
    (sample,) = read_shard(shard)
    assert json.loads(sample.files["json"])["file_name"] == "a.tif"
    expected = Image.fromarray(greys((images / "a.tif").read_bytes()))
    if max_size:
        expected = expected.convert("RGB").resize((5, 4), Image.Resampling.LANCZOS).convert("L")
    assert np.array_equal(greys(sample.files["png"]), np.asarray(expected))


def test_the_stream_delivers_the_greys(tmp_path):
    files = [("a.tif", tiff(np.full((16, 16), 0.6, np.float32) + np.eye(16, dtype=np.float32) * 0.4)), ("a.txt", "a")]
    (batch,) = take(iter(make_stream([write_tar(tmp_path / "0.tar", files)])), 1)
    assert batch["pixels"][0, :, 0, 5].tolist() == [153] * 3 and batch["pixels"][0, :, 3, 3].tolist() == [255] * 3


@pytest.mark.hostile("pictures")
@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevc"])
def test_heic_is_named(brand):
    content = struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1heic" + bytes(99)
    with pytest.raises(BadSample) as caught:
        decode_picture(content)
    assert caught.value.reason == raw.HEIC


@pytest.mark.hostile("pictures")
@pytest.mark.parametrize("readable", [True, False])
def test_avif_is_named_where_pillow_does_not_read_it(monkeypatch, readable):
    formats = [name for name in decode.PILLOW_FORMATS if name != "AVIF"] + ["AVIF"] * readable
    monkeypatch.setattr(decode, "PILLOW_FORMATS", tuple(formats))
    damaged = struct.pack(">I", 24) + b"ftypavif" + bytes(4) + b"mif1avif" + bytes(99)
    with pytest.raises(BadSample) as caught:
        decode_picture(damaged)
    assert caught.value.reason == (raw.DAMAGED_PICTURE if readable else raw.NO_AVIF)
