"""Packing a folder into shards: what is stored, what is skipped, and what a kill leaves."""

import contextlib
import csv
import errno
import io
import json
import multiprocessing
import os
import re
import select
import signal
import socket
import sys
import time

import numpy as np
import pytest
from icc_profiles import DISPLAY_P3, rgb_profile, to_srgb
from PIL import Image

from lcm_distill.data import packing
from lcm_distill.data.packing import (
    FOLDER_LINK,
    LINK_OUT,
    MANIFEST,
    METADATA,
    NO_CAPTION,
    UNREADABLE,
    Settings,
    find_pictures,
    make_sample,
    pack_shards,
)
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation, prepare_sample
from lcm_distill.data.raw import HEIC, HUGE_FILE, HUGE_PICTURE, BadSample
from lcm_distill.data.shards import count_samples, expand_shards, read_shard
from lcm_distill.data.stream import ShardStream
from lcm_distill.errors import UsageError
from lcm_distill.pack_shards import main

PREPARATION = Preparation(resolution=8)


@pytest.fixture(autouse=True)
def _fork():
    """Workers see what a test has patched, on macOS too."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def picture(seed=0, size=(12, 8)):
    """Noise of (width, height) `size`."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def save(path, seed=0, size=(12, 8), caption=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def fill(folder, count):
    """Fills a folder with `count` pictures; the captions are 'caption 0', ..."""
    for i in range(count):
        save(folder / f"{i:03d}.png", seed=i, caption=f"caption {i}")
    return folder


def write_jsonl(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pack(images, out, num_workers=1, **settings):
    return pack_shards(images, out, Settings(**settings), num_workers)


def read(out):
    """file_name -> (extensions in their order, raw sample, JSON)."""
    raws = [raw for shard in expand_shards(str(out)) for raw in read_shard(shard)]
    metas = [json.loads(raw.files["json"]) for raw in raws]
    assert len({raw.key for raw in raws}) == len(raws) and not any(raw.duplicate for raw in raws)
    return {meta["file_name"]: (list(raw.files), raw, meta) for raw, meta in zip(raws, metas, strict=True)}


def contents(out):
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


def names(out):
    return sorted(path.name for path in out.iterdir())


# ------------------------------------------------------------------------------------------ what is stored


def test_round_trip(tmp_path):
    """Every file is stored byte for byte with its caption, and the stream reads it."""
    fill(tmp_path / "in", 7)
    save(tmp_path / "in" / "sub" / "photo.jpeg", 50, (30, 20), caption=" a photo\n")
    save(tmp_path / "in" / "sub" / "web.webp", 51, (20, 30), caption="ein Bild, größer")
    packed = pack(tmp_path / "in", tmp_path / "out", samples_per_shard=4)
    assert names(tmp_path / "out") == ["00000.tar", "00001.tar", "00002.tar", MANIFEST]
    assert (packed.shards, packed.samples, packed.skipped) == (3, 9, {})
    assert packed.bytes == sum(map(len, contents(tmp_path / "out").values()))
    samples = read(tmp_path / "out")
    for name, (extensions, raw, _) in samples.items():
        assert raw.files[extensions[0]] == (tmp_path / "in" / name).read_bytes()
        assert extensions[0] == {"photo.jpeg": "jpg", "web.webp": "webp"}.get(os.path.basename(name), "png")
        assert extensions[1:] == ["txt", "json"]
    assert samples["sub/photo.jpeg"][1].files["txt"] == b"a photo"
    assert samples["sub/photo.jpeg"][2] == {"file_name": "sub/photo.jpeg", "width": 30, "height": 20}

    shards = expand_shards(str(tmp_path / "out"))
    assert count_samples(shards) == 9
    report = inspect_shards(shards, PREPARATION)
    assert (report.usable, report.seen, dict(report.caption_sources)) == (9, 9, {".txt": 9})
    stream = iter(ShardStream(shards=shards, preparation=PREPARATION, batch_size=3, seed=0))
    seen = [caption for _ in range(3) for caption in next(stream)["captions"]]
    assert sorted(seen) == sorted(["a photo", "ein Bild, größer", *(f"caption {i}" for i in range(7))])


def test_shards_are_even_and_mixed(tmp_path):
    for folder in ("a", "b"):
        fill(tmp_path / "in" / folder, 6)
    pack(tmp_path / "in", tmp_path / "out", samples_per_shard=5)
    shards = [list(read_shard(shard)) for shard in expand_shards(str(tmp_path / "out"))]
    assert [len(shard) for shard in shards] == [4, 4, 4]
    assert all(len({json.loads(raw.files["json"])["file_name"][0] for raw in shard}) == 2 for shard in shards)


def test_max_shard_mb_is_respected_approximately(tmp_path):
    for i in range(4):
        save(tmp_path / "in" / f"{i}.bmp", i, (500, 400), caption="noise")  # 0.6 MB each
    assert pack(tmp_path / "in", tmp_path / "out", max_shard_mb=1).shards == 3
    (tmp_path / "huge").mkdir()
    save(tmp_path / "huge" / "a.bmp", 0, (1000, 800), caption="noise")
    assert pack(tmp_path / "huge", tmp_path / "out2", max_shard_mb=1).shards == 1


def test_bytes_depend_on_the_seed_and_not_on_the_workers(tmp_path):
    fill(tmp_path / "in", 12)
    pack(tmp_path / "in", tmp_path / "a", samples_per_shard=3)
    os.utime(tmp_path / "in" / "003.png", (1, 1))
    pack(tmp_path / "in", tmp_path / "b", samples_per_shard=3, num_workers=3)
    pack(tmp_path / "in", tmp_path / "c", samples_per_shard=3, seed=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")
    assert set(read(tmp_path / "a")) == set(read(tmp_path / "c"))


@pytest.mark.hostile("folders")
def test_difficult_names(tmp_path):
    """Dots, other scripts, capitals, one name in two folders or of two kinds, names that are not UTF-8."""
    images = tmp_path / "in"
    found = ["v1.5.best.PNG", "x/a.JPG", "y/a.jpg", "y/a.webp", "猫 & ü/写真.Jpeg"]
    for i, name in enumerate(found):
        save(images / name, i)
        (images / os.path.splitext(name)[0]).with_name(os.path.splitext(os.path.basename(name))[0] + ".TXT").write_text(
            os.path.dirname(name) or "top"
        )
    with contextlib.suppress(OSError):  # some file systems have none
        raw_name = os.fsdecode(b"\xff\xfe.png")
        save(images / "plain.png").rename(images / raw_name)
        (images / os.fsdecode(b"\xff\xfe.txt")).write_text("raw")
        found.append(raw_name)
    pack(images, tmp_path / "out")
    samples = read(tmp_path / "out")
    assert sorted(samples) == sorted(found)
    assert samples["v1.5.best.PNG"][1].files["txt"] == b"top"
    assert samples["猫 & ü/写真.Jpeg"][1].files["txt"].decode() == "猫 & ü"
    assert samples["y/a.jpg"][0][0] == "jpg" and samples["y/a.webp"][0][0] == "webp"
    assert all(re.fullmatch(r"\d{9}", raw.key) for _, raw, _ in samples.values())


def test_other_formats_become_png_and_wrong_extensions_are_corrected(tmp_path):
    images = tmp_path / "in"
    for suffix in ("gif", "bmp", "tif", "avif"):
        if suffix != "avif" or "AVIF" in packing.Image.SAVE:
            save(images / f"{suffix}.{suffix}", 3, caption=suffix)
    picture(3).convert("CMYK").save(images / "cmyk.tiff")
    (images / "cmyk.text").write_text("cmyk")
    deep = np.arange(12 * 8, dtype=np.uint16).reshape(8, 12) * 600
    Image.fromarray(deep).save(images / "deep.tiff")
    (images / "deep.caption").write_text("16 bits")
    picture(3).save(images / "really_png.jpg", "PNG")
    (images / "really_png.txt").write_text("png")
    pack(images, tmp_path / "out")
    samples = read(tmp_path / "out")
    assert {extensions[0] for extensions, _, _ in samples.values()} == {"png"} and len(samples) >= 6
    for lossless in ("bmp.bmp", "tif.tif", "really_png.jpg"):
        stored = Image.open(io.BytesIO(samples[lossless][1].files["png"]))
        assert np.array_equal(np.asarray(stored), np.asarray(picture(3)))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(samples["deep.tiff"][1].files["png"]))), deep)


def test_shrunk_pictures_look_as_if_the_readers_had_made_them(tmp_path):
    """16-bit grey keeps its greys, transparent parts become white, a BMP becomes PNG."""
    images = tmp_path / "in"
    images.mkdir()
    Image.fromarray(np.full((40, 40), 0x8080, dtype=np.uint16)).save(images / "deep.png")
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(images / "clear.webp", lossless=True)
    Image.new("RGB", (40, 40), (1, 2, 3)).save(images / "plain.bmp")
    for name in ("deep", "clear", "plain"):
        (images / f"{name}.txt").write_text(name)
    pack(images, tmp_path / "out", max_size=10)
    expected = {"deep.png": ("png", 128), "clear.webp": ("jpg", 255), "plain.bmp": ("png", (1, 2, 3))}
    for name, (extensions, raw, _) in read(tmp_path / "out").items():
        stored = np.asarray(Image.open(io.BytesIO(raw.files[extensions[0]])))
        assert extensions[0] == expected[name][0] and stored.shape == (10, 10, 3)
        assert (stored == expected[name][1]).all()


def test_sizes_are_upright_and_original(tmp_path):
    """SDXL's original size of a rotated and shrunk picture is its true size, upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    save(tmp_path / "in" / "rotated.jpg", 1, (60, 40), caption="rotated", exif=exif, quality=95)
    save(tmp_path / "in" / "large.png", 2, (64, 48), caption="large")
    save(tmp_path / "in" / "large.webp", 2, (64, 48), caption="large")
    save(tmp_path / "in" / "small.jpg", 3, (100, 16), caption="small")
    pack(tmp_path / "in", tmp_path / "unshrunk")
    assert read(tmp_path / "unshrunk")["rotated.jpg"][2] == {"file_name": "rotated.jpg", "width": 40, "height": 60}

    pack(tmp_path / "in", tmp_path / "out", max_size=16)
    samples = read(tmp_path / "out")
    expected = {"rotated.jpg": (16, 24, "jpg"), "large.png": (21, 16, "png"), "large.webp": (21, 16, "jpg")}
    for name, (width, height, extension) in expected.items():
        extensions, raw, meta = samples[name]
        stored = Image.open(io.BytesIO(raw.files[extension]))
        assert extensions[0] == extension and stored.size == (width, height) == (meta["width"], meta["height"])
        assert not stored.getexif()
    assert (samples["rotated.jpg"][2]["original_width"], samples["rotated.jpg"][2]["original_height"]) == (40, 60)
    assert samples["small.jpg"][1].files["jpg"] == (tmp_path / "in" / "small.jpg").read_bytes()
    assert "original_width" not in samples["small.jpg"][2]
    preparation = Preparation(resolution=8, interpolation="nearest", center_crop=True)
    for name, size in (("rotated.jpg", (60, 40)), ("large.png", (48, 64)), ("small.jpg", (16, 100))):
        trained = prepare_sample(samples[name][1], preparation, draws=np.zeros(5))
        assert trained.original_size == size


@pytest.mark.parametrize("max_size", [None, 16])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])  # stored as it is, and made a PNG
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"original_width": 600, "original_height": 400}, (600, 400)),  # before turning
        ({"original_width": "400", "original_height": "600.0"}, (600, 400)),  # as seen
        ({"original_width": 60, "original_height": 40}, (60, 40)),
        ({"original_width": "?", "original_height": 40}, (60, 40)),
    ],
)
def test_original_sizes_of_turned_pictures(tmp_path, max_size, suffix, given, expected):
    """Whether EXIF still turns the stored picture or not, the stream finds (height, width) of the upright one."""
    exif = Image.Exif()
    exif[0x0112] = 8
    save(tmp_path / "in" / f"a.{suffix}", 1, (60, 40), exif=exif)
    write_jsonl(tmp_path / "in", {"file_name": f"a.{suffix}", "text": "an a"} | given)
    pack(tmp_path / "in", tmp_path / "out", max_size=max_size)
    ((_, raw, meta),) = read(tmp_path / "out").values()
    assert prepare_sample(raw, PREPARATION, draws=np.zeros(5)).original_size == expected
    assert (meta["original_height"], meta["original_width"]) == expected


# ----------------------------------------------------------------------------------------------- captions


def test_jsonl(tmp_path):
    """Strings, lists, several rows, other columns; metadata of a subfolder; a text file wins."""
    images = tmp_path / "in"
    for i, name in enumerate(["a.png", "b.png", "c.png", "sub/d.png", "sub/e.png"]):
        save(images / name, i)
    (images / "c.txt").write_text("from the text file")
    (images / "f.png").touch()
    write_jsonl(
        images,
        {"file_name": "a.png", "text": "an a", "licence": "CC0", "width": 9999},
        {"file_name": "a.png", "text": "an a"},
        {"file_name": "f.png", "text": "an f"},
        {"file_name": "./b.png", "text": ["b one", " b two ", ""], "nested": {"ü": [1, None]}},
        {"file_name": "c.png", "caption": "from the row"},
        {"file_name": "sub/d.png", "caption": "d one", "text": "unused", "n": 1},
        {"file_name": "sub/d.png", "caption": "d two", "n": 2},
        {"file_name": "gone.png", "caption": "gone"},
    )
    write_jsonl(
        images / "sub", {"file_name": "e.png", "caption": "an e", "original_width": 640, "original_height": 480}
    )
    packed = pack(images, tmp_path / "out")
    assert packed.skipped == {packing.NO_FILE: ["gone.png"], packing.EMPTY_FILE: ["f.png"]}
    samples = read(tmp_path / "out")
    size = {"width": 12, "height": 8}
    assert samples["a.png"][1].files["txt"] == b"an a"
    assert samples["a.png"][2] == {"licence": "CC0", "file_name": "a.png"} | size
    assert "txt" not in samples["b.png"][0]
    assert (
        samples["b.png"][2] == {"caption": ["b one", "b two"], "nested": {"ü": [1, None]}, "file_name": "b.png"} | size
    )
    assert samples["c.png"][1].files["txt"] == b"from the text file"
    assert samples["c.png"][2]["caption"] == "from the row"  # --caption_column caption still finds it
    assert samples["sub/d.png"][2] == {"caption": ["d one", "d two"], "text": "unused", "n": 1} | size | {
        "file_name": "sub/d.png"
    }
    assert (samples["sub/e.png"][2]["original_width"], samples["sub/e.png"][2]["original_height"]) == (640, 480)
    report = inspect_shards(expand_shards(str(tmp_path / "out")), PREPARATION)
    assert report.usable == 5 and report.caption_sources['JSON "caption"'] == 2


def test_csv_and_caption_column(tmp_path):
    images = fill(tmp_path / "in", 2)  # with text files, which --caption_column ignores
    with open(images / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "blip", "original_width", "original_height"])
        writer.writerow(["000.png", "a text", 'a "blip",\nin two lines', "300", "200"])
        writer.writerow(["001.png", "another", "", "", ""])
    packed = pack(images, tmp_path / "out", caption_column="blip")
    assert packed.skipped == {packing.NO_CAPTION: ["001.png"]}
    ((_, raw, meta),) = read(tmp_path / "out").values()
    assert raw.files["txt"] == b'a "blip",\nin two lines'
    assert meta == {
        "text": "a text",
        "file_name": "000.png",
        "width": 12,
        "height": 8,
        "original_width": 300,
        "original_height": 200,
    }


# -------------------------------------------------------------------------------------------- what is skipped


@pytest.mark.hostile("pictures")
def test_bad_pictures_are_skipped_counted_and_listed(tmp_path, capsys):
    images = fill(tmp_path / "in", 2)
    good = (images / "000.png").read_bytes()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    bad = {
        "cut.png": (good[: len(good) // 2], "cut"),
        "text.jpg": (b"not a picture", "text"),
        "bomb.png": ((tmp_path / "bomb.png").read_bytes(), "bomb"),
        "empty.png": (b"", "empty"),
        "none.png": (good, None),
        "blank.png": (good, " \n"),
        "latin.png": (good, "größer".encode("latin-1")),
    }
    for name, (content, caption) in bad.items():
        (images / name).write_bytes(content)
        if caption is not None:
            (images / name).with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    (images / "gone.png").symlink_to("nowhere.png")
    (images / "linked.png").symlink_to("000.png")
    (images / "linked.txt").write_text("a link to a file is followed")
    os.mkfifo(images / "pipe.png")
    save(images / ".hidden.png", caption="hidden")
    save(images / ".cache" / "a.png", caption="hidden")
    main([str(images), str(tmp_path / "out"), "--num_workers", "2"])
    output = capsys.readouterr().out
    assert sorted(read(tmp_path / "out")) == ["000.png", "001.png", "linked.png"]
    manifest = [json.loads(line) for line in (tmp_path / "out" / MANIFEST).read_text().splitlines()]
    skipped = {name: reason for line in manifest for reason, names in line["skipped"].items() for name in names}
    assert skipped == {
        "cut.png": "picture is damaged or cut short",
        "text.jpg": "picture file holds no picture",
        "bomb.png": "picture is too large (a decompression bomb)",
        "empty.png": packing.EMPTY_FILE,
        "none.png": packing.NO_CAPTION,
        "blank.png": packing.NO_CAPTION,
        "latin.png": "caption is not UTF-8",
        "gone.png": packing.UNREADABLE,
        "pipe.png": packing.UNREADABLE,
    }
    assert f"  2 x {packing.NO_CAPTION}: blank.png, none.png\n" in output
    assert "  1 x caption is not UTF-8: latin.png\n" in output
    *_, last = output.splitlines()
    assert re.fullmatch(rf"1 shard, 3 samples, \d\.\d MB: train with --train_shards_path_or_url {tmp_path}/out", last)


@pytest.mark.hostile("pictures")
def test_pictures_of_other_kinds_are_named(tmp_path, monkeypatch):
    """They were not among the skipped, nor anywhere else."""
    images = fill(tmp_path / "in", 1)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    packing.heif_formats.cache_clear()
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    for name in ("IMG_1.HEIC", "sub/IMG_2.heif", "IMG_3.hif", "named.jpg", "a.jxl", "b.psd", "sub/c.NEF", "d.jp2"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(heic)
        (images / name).with_suffix(".txt").write_text(name)
    write_jsonl(images, {"file_name": "IMG_1.HEIC", "text": "of a row"})
    packed = pack(images, tmp_path / "out")
    assert packed.samples == 1 and {reason: sorted(of) for reason, of in packed.skipped.items()} == {
        HEIC: ["IMG_1.HEIC", "IMG_3.hif", "named.jpg", "sub/IMG_2.heif"],
        packing.OTHER_KIND: ["a.jxl", "b.psd", "d.jp2", "sub/c.NEF"],
    }
    (images / "000.png").unlink()
    (images / "named.jpg").unlink()
    with pytest.raises(UsageError, match=r"(?s)no picture that can be used.*3 x HEIC .*pip install pillow-heif\): "):
        pack(images, tmp_path / "none")
    packing.heif_formats.cache_clear()


@pytest.mark.hostile("folders")
def test_files_with_a_caption_that_are_of_no_known_kind_are_named(tmp_path):
    images = fill(tmp_path / "in", 1)
    for name in ("a.jpg_large", "sub/b", "c.jpe", "d.mp4", "000.mask", "e.json", "f.apng"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(b"\xff\xd8")
        (images / name).with_suffix(".txt").write_text(name)
    (images / "without_caption.xyz").write_bytes(b"")
    packed = pack(images, tmp_path / "out")
    assert packed.samples == 1 and {reason: sorted(of) for reason, of in packed.skipped.items()} == {
        packing.NOT_KNOWN: ["a.jpg_large", "d.mp4", "sub/b"],
        packing.OTHER_KIND: ["c.jpe", "f.apng"],
    }


@pytest.mark.parametrize("max_size", [None, 16])
def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, max_size):
    """Its colours become sRGB, it is stored upright, and a size from before turning is that of the upright picture."""
    heif = pytest.importorskip("pillow_heif")
    images = tmp_path / "in"
    images.mkdir()
    heif.register_heif_opener()
    rows, columns = np.mgrid[:64, :96]
    pixels = np.stack([columns * 2, rows * 3, np.full_like(rows, 90)], -1).astype(np.uint8)
    profile = rgb_profile("Display P3", DISPLAY_P3, 2.2)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.heic", "b.HEIF", "c.jpg"):
        Image.fromarray(pixels).save(images / name, "HEIF", quality=100, icc_profile=profile, exif=exif.tobytes())
    texts = {"file_name": "a.heic", "text": "a", "original_width": 960, "original_height": 640}
    write_jsonl(images, texts, {"file_name": "b.HEIF", "text": "b"}, {"file_name": "c.jpg", "text": "c"})
    packed = pack(images, tmp_path / "out", max_size=max_size)
    assert (packed.samples, packed.skipped) == (3, {})
    upright = to_srgb(np.rot90(pixels, -1), DISPLAY_P3, 2.2)
    for name, (extensions, raw, meta) in read(tmp_path / "out").items():
        stored = Image.open(io.BytesIO(raw.files["png"]))
        assert extensions[0] == "png" and stored.size == ((16, 24) if max_size else (64, 96))
        assert "icc_profile" not in stored.info
        expected = Image.fromarray(upright.round().astype(np.uint8)).resize(stored.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(stored, int) - np.asarray(expected)).mean() < 3
        original = (960, 640) if name == "a.heic" else (96, 64)
        assert (meta.get("original_height", meta["height"]), meta.get("original_width", meta["width"])) == original


@pytest.mark.hostile("pictures")
def test_files_that_the_readers_would_not_read_are_skipped(tmp_path, monkeypatch):
    images = fill(tmp_path / "in", 2)
    (images / "000.txt").write_text("long " * 100)
    save(images / "large.bmp", 0, (100, 100), caption="large")
    monkeypatch.setattr(packing, "MAX_FILE_BYTES", 20_000)
    monkeypatch.setattr(packing, "MAX_TEXT_BYTES", 400)
    assert pack(images, tmp_path / "out").skipped == {HUGE_FILE: ["000.png", "large.bmp"]}


# ------------------------------------------------------------------------------------- links, pipes, and their names


@pytest.fixture()
def secret(tmp_path):
    """A file outside the pictures, as /etc/passwd is, and a picture."""
    save(tmp_path / "home" / "private.png", seed=99)
    path = tmp_path / "home" / "secret.txt"
    path.write_text("root:x:0:0")
    return path


def link_out(name, images, secret):
    """Makes a link `name` that leads out of `images`, of one of several kinds."""
    images.mkdir(exist_ok=True)
    if name == "relative":
        return os.path.relpath(secret, images)
    if name == "through a link":
        (images / "hop").symlink_to(secret)
        return "hop"
    if name == "through a folder":
        (images / "deep").symlink_to(secret.parent)
        return "deep/" + secret.name
    if name == "dots":
        return str(images / ".." / "home" / secret.name)
    return {"absolute": secret, "of one that begins alike": images.with_name("in2") / "secret.txt"}[name]


@pytest.mark.hostile("folders")
@pytest.mark.parametrize(
    "kind", ["absolute", "relative", "through a link", "through a folder", "dots", "of one that begins alike"]
)
def test_links_out_of_the_folder_are_no_captions_and_no_pictures(tmp_path, secret, capsys, kind):
    """A dataset's e.txt, a link to /etc/passwd, became a caption of its shards."""
    images = fill(tmp_path / "in", 2)
    (tmp_path / "in2").mkdir()
    (tmp_path / "in2" / "secret.txt").write_text("root:x:0:0")
    target = link_out(kind, images, secret)
    save(images / "e.png")
    (images / "e.txt").symlink_to(target)
    (images / "f.png").symlink_to(str(target).replace("secret.txt", "private.png").replace("hop", "hop2"))
    if kind == "through a link":
        (images / "hop2").symlink_to(secret.with_name("private.png"))
    (images / "f.txt").write_text("a private picture")
    packed = pack(images, tmp_path / "out")
    assert sorted(packed.skipped[LINK_OUT]) == ["e.txt", "f.png"] and packed.skipped[NO_CAPTION] == ["e.png"]
    assert set(packed.skipped) <= {LINK_OUT, NO_CAPTION, FOLDER_LINK}
    assert set(read(tmp_path / "out")) == {"000.png", "001.png"}
    assert all(b"root:x" not in content for content in contents(tmp_path / "out").values())
    main([str(images), str(tmp_path / "out")])
    assert "2 x link to a file outside the folder (to pack what links point to, copy" in capsys.readouterr().out


@pytest.mark.hostile("folders")
def test_links_within_the_folder_are_followed(tmp_path):
    images = fill(tmp_path / "in", 1)
    (images / ".store").mkdir()
    save(images / ".store" / "1a2b.png", seed=5)
    (images / ".store" / "text").write_text("a stored caption")
    (images / "deep").mkdir()
    (images / "deep" / "b.png").symlink_to("../.store/1a2b.png")
    (images / "deep" / "b.txt").symlink_to(images / ".store" / "text")
    os.link(images / "000.png", images / "hard.png")  # nothing distinguishes it from any other file
    os.link(images / "000.txt", images / "hard.txt")
    (tmp_path / "alias").symlink_to(images)  # what the user names may be a link
    packed = pack(tmp_path / "alias", tmp_path / "out")
    found = read(tmp_path / "out")
    assert set(found) == {"000.png", "hard.png", "deep/b.png"} and not packed.skipped
    assert found["deep/b.png"][1].files["txt"] == b"a stored caption"


@pytest.mark.hostile("folders")
def test_a_snapshot_in_hugging_face_s_cache_is_packed(tmp_path, secret):
    """All its files are links into the blobs beside it; those elsewhere lead out."""
    cache = tmp_path / "hub" / "datasets--org--cats"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0a1b" / "train"
    snapshot.mkdir(parents=True)
    save(blobs / "d41d.png")
    (blobs / "rows").write_text('{"file_name": "a.png", "text": "a cat"}\n')
    (snapshot / "a.png").symlink_to("../../../blobs/d41d.png")
    (snapshot / "metadata.jsonl").symlink_to("../../../blobs/rows")
    (snapshot / "b.png").symlink_to(secret.with_name("private.png"))
    packed = pack(snapshot, tmp_path / "out")
    assert set(read(tmp_path / "out")) == {"a.png"} and packed.skipped == {LINK_OUT: ["b.png"]}
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="metadata.jsonl cannot be read: link to a file outside"):
        pack(snapshot, tmp_path / "out2")


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_is_a_link_out_is_refused_and_not_shown(tmp_path, secret, name):
    images = fill(tmp_path / "in", 1)
    (images / name).symlink_to(secret)
    with pytest.raises(UsageError, match=f"{name} cannot be read: link to a file outside .*cp -rL") as refused:
        pack(images, tmp_path / "out")
    assert "root" not in str(refused.value).replace(str(tmp_path), "") and not (tmp_path / "out").exists()


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "000.txt", "000.png", "sub/metadata.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "loop", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path, name, kind):
    """A pipe among the pictures blocked the packer for ever."""
    images = fill(tmp_path / "in", 3)
    path = images / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))  # such names are short
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.mkdir()
    if path.name in METADATA and kind != "folder":
        with pytest.raises(UsageError, match=f"{name} cannot be read: .*. Fix or move it"):
            pack(images, tmp_path / "out")
        return
    packed = pack(images, tmp_path / "out")
    assert set(read(tmp_path / "out")) == {"001.png", "002.png"} | ({"000.png"} if path.name in METADATA else set())
    named = [one for reason in (UNREADABLE, LINK_OUT, NO_CAPTION) for one in packed.skipped.get(reason, ())]
    expected = {("device", "000.txt"): ["000.txt", "000.png"], ("folder", "000.png"): []}
    assert path.name in METADATA or named == expected.get((kind, name), ["000.png"])


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("deep", [60, 300, 900, 990, 5000])
def test_metadata_that_are_nested_too_deeply_are_refused(tmp_path, deep):
    """What can just be read cannot always be written again, in another process."""
    images = fill(tmp_path / "in", 1)
    row = '{"file_name": "000.png", "text": "x", "y": ' + "[" * deep + "]" * deep + "}"
    (images / "metadata.jsonl").write_text(row)
    with pytest.raises(UsageError, match="metadata.jsonl cannot be used: .*Fix row"):
        pack(images, tmp_path / "out")


@pytest.mark.hostile("folders")
def test_folders_in_very_many_folders_are_refused(tmp_path, monkeypatch):
    """`os.walk` recurses before Python 3.12, where a thousand levels were a traceback (which take minutes to make)."""

    def walk(folder, onerror):
        yield folder, ["d"], []
        raise RecursionError

    images = fill(tmp_path / "in", 1)
    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UsageError, match="IMAGES: too many folders are nested"):
        find_pictures(str(images), "")


@pytest.mark.hostile("folders")
def test_links_to_folders_are_counted(tmp_path, secret):
    images = fill(tmp_path / "in", 1)
    fill(images / "own", 1)
    (images / "again").symlink_to("own")
    (images / "home").symlink_to(secret.parent)
    (images / "own" / "up").symlink_to("..")
    packed = pack(images, tmp_path / "out")
    assert set(read(tmp_path / "out")) == {"000.png", "own/000.png"}
    assert packed.skipped == {FOLDER_LINK: ["again", "home", "own/up"]}


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("kind", ["link", "pipe", "grown"])
def test_a_file_that_became_something_else_since_it_was_found(tmp_path, secret, monkeypatch, kind):
    images = fill(tmp_path / "in", 2)
    picture = find_pictures(str(images), "")[0][0]
    path = images / picture.text
    path.unlink()
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("x" * 100)
        monkeypatch.setattr(packing, "MAX_TEXT_BYTES", 50)
    reason = {"link": "link to a file outside", "grown": "file is too large", "pipe": "000.txt cannot be read any more"}
    with pytest.raises((BadSample, UsageError), match=reason[kind]):
        make_sample(str(images), picture, Settings())


@pytest.mark.hostile("folders")
def test_names_of_files_reach_no_terminal(tmp_path, capsys):
    """A picture's name cleared the screen and set the terminal's title."""
    evil = "\x1b[2J\x1b]0;x\x07\nerror: \r\x9b1m\u202e"
    images = fill(tmp_path / "in", 1)
    for name in ("a.png", "b.tiff", "c.heic", "d.svg"):
        (images / (evil + name)).write_bytes(b"no picture")
        (images / (evil + name)).with_suffix(".txt").write_text("caption")
    write_jsonl(images, {"file_name": f"{evil}.png", "text": evil, evil: evil})
    main([str(images), str(tmp_path / f"{evil}out")])
    said = capsys.readouterr()
    assert "2 x picture file holds no picture: ?[2J?]0;x??error: ??1m?" in said.out
    assert all(line.isprintable() for line in said.out.split("\n")), said.out
    (images / "000.png").unlink()
    (images / f"{evil}.{evil}").touch()
    (images / evil).mkdir()
    (images / evil / "metadata.csv").write_text(f"file_name,text\n,{evil}\n")
    for options in ([], ["--caption_column", "x"]):
        with pytest.raises(UsageError) as refused:
            main([str(images), str(tmp_path / "out"), *options])
        assert all(line.isprintable() for line in str(refused.value).split("\n")), str(refused.value)


@pytest.mark.hostile("folders")
@pytest.mark.parametrize(
    "line",
    [
        "5", "[]", "null", '"00000.tar"', "[" * 5000, '{"shard": ["00000.tar"], "bytes": 0}',
        '{"shard": "00000.tar", "bytes": 10240}',
        '{"shard": "00000.tar", "bytes": 10240, "samples": "1", "skipped": {}}',
        '{"shard": "00000.tar", "bytes": 10240, "samples": 1, "skipped": []}',
        '{"shard": "00000.tar", "bytes": 10240, "samples": 1, "skipped": {"x": [5]}}',
        '{"shard": "\\u0000", "bytes": 10240, "samples": 1, "skipped": {}}',
    ],
)  # fmt: skip
def test_a_manifest_with_foreign_lines_is_continued(tmp_path, line):
    """Each was a traceback, and the shard is written again."""
    images = fill(tmp_path / "in", 2)
    pack(images, tmp_path / "out")
    before = contents(tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    first, _ = manifest.read_text().splitlines()
    assert len(before["00000.tar"]) == 10240
    manifest.write_text(f"{first}\n{line}\n")
    assert pack(images, tmp_path / "out").samples == 2 and contents(tmp_path / "out") == before


@pytest.mark.hostile("folders")
def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path):
    images = fill(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / MANIFEST)
    with pytest.raises(UsageError, match="contains other files"):
        pack(images, tmp_path / "out")


@pytest.mark.hostile("folders")
@pytest.mark.parametrize(
    ("name", "problem"), [("nothing", "no folder"), ("file", "no folder"), ("", "no picture.*nothing")]
)
def test_nothing_to_pack(tmp_path, name, problem):
    (tmp_path / "file").write_text("")
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match=f"IMAGES: there is {problem}"):
        pack(tmp_path / (name or "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_name_the_remedy(tmp_path):
    images = tmp_path / "in"
    save(images / "a.png")
    (images / "notes.md").write_text("")

    def refused(match, **settings):
        with pytest.raises(UsageError, match=match):
            pack(images, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()

    refused(r'(?s)none of the 1 pictures .*a\.txt.*"file_name".*1 x \.md.*1 x no caption.*a\.png')
    refused("--samples_per_shard is 0; give 1 or more", samples_per_shard=0)
    refused("--max_size is -1", max_size=-1)
    refused("--num_workers is 0", num_workers=0)
    write_jsonl(images, {"file_name": "a.png", "text": "an a"})
    refused("--caption_column blip: .*no such column, but 1 x text", caption_column="blip")
    write_jsonl(images, {"file_name": "a.png", "text": "an a"}, {"image": "b.png", "text": "a b"})
    refused(r"metadata.jsonl cannot be used: no file_name.*b\.png")
    (images / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_na')
    refused("metadata.jsonl cannot be used: .*Fix row 1 or the next")
    (images / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}\n')
    refused("metadata.jsonl cannot be used: .*utf-8")


@pytest.mark.hostile("folders")
def test_nothing_usable_leaves_nothing(tmp_path):
    save(tmp_path / "in" / "a.png", caption="a").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"(?s)nothing in .* can be trained on.*1 x picture file holds no.*: a\.png"):
        pack(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(tmp_path / "in" / "a.png")  # fixed: the same command works
    assert pack(tmp_path / "in", tmp_path / "out").samples == 1


@pytest.mark.hostile("disks")
@pytest.mark.parametrize(("name", "kind"), [("Value", OSError(28, "No space left on device")),
                                            ("Event", OSError(38, "Function not implemented")),
                                            ("Value", PermissionError(13, "Permission denied"))])  # fmt: skip
def test_missing_shared_memory_is_not_blamed_on_the_disk(tmp_path, monkeypatch, name, kind):
    def failing(*args):
        raise kind

    monkeypatch.setattr(packing.multiprocessing, name, failing)
    with pytest.raises(UsageError, match=f"^the worker processes have no shared memory .{kind.strerror}.*--shm-size"):
        pack(fill(tmp_path, 1), tmp_path / "out")


@pytest.mark.hostile("folders")
def test_shards_inside_the_images_are_not_packed(tmp_path):
    images = fill(tmp_path, 3)
    pack(images, images / "out")
    save(images / "out" / "stray.png", caption="stray")
    pictures, _ = find_pictures(str(images), str(images / "out"))
    assert [p.path for p in pictures] == ["000.png", "001.png", "002.png"]
    with pytest.raises(UsageError, match="contains other files"):
        pack(images, images)


# -------------------------------------------------------------------------------- continuing, and refusing to


def test_a_second_run_keeps_complete_shards(tmp_path):
    fill(tmp_path / "in", 9)
    (tmp_path / "in" / "004.png").write_bytes(b"bad")
    first = pack(tmp_path / "in", tmp_path / "out", samples_per_shard=3)
    before, times = contents(tmp_path / "out"), {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    manifest = (tmp_path / "out" / MANIFEST).read_text()
    assert pack(tmp_path / "in", tmp_path / "out", samples_per_shard=3) == first
    assert times == {p: p.stat().st_mtime_ns for p in times}
    assert (tmp_path / "out" / MANIFEST).read_text() == manifest

    (tmp_path / "out" / "00000.tar").unlink()
    (tmp_path / "out" / "00001.tar").write_bytes(b"cut")
    (tmp_path / "out" / ".00001.tar.77.partial").write_bytes(b"half")
    (tmp_path / "out" / MANIFEST).write_text(manifest[:-9])  # the last line was cut by the kill
    assert pack(tmp_path / "in", tmp_path / "out", samples_per_shard=3) == first
    assert contents(tmp_path / "out") == before
    assert names(tmp_path / "out") == ["00000.tar", "00001.tar", "00002.tar", MANIFEST]


@pytest.mark.hostile("disks")
def test_an_error_in_the_middle_leaves_complete_shards(tmp_path, monkeypatch):
    """A full disk: complete shards stay, unfinished ones do not, and the same command continues."""
    fill(tmp_path / "in", 12)
    pack(tmp_path / "in", tmp_path / "expected", samples_per_shard=3)

    def full(source, target):
        if str(target).endswith("00002.tar"):
            raise OSError(errno.ENOSPC, "No space left on device")
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(packing.os, "replace", full)
        with pytest.raises(UsageError, match=r"OUT .*No space left on device\. .*run the same command again"):
            pack(tmp_path / "in", tmp_path / "out", samples_per_shard=3)
    assert names(tmp_path / "out")[:2] == ["00000.tar", "00001.tar"] and "00002.tar" not in names(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))
    kept = (tmp_path / "out" / "00000.tar").stat().st_ino
    pack(tmp_path / "in", tmp_path / "out", samples_per_shard=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert (tmp_path / "out" / "00000.tar").stat().st_ino == kept


def slowly(images, picture, settings, make_sample=packing.make_sample):
    time.sleep(0.2)  # long enough for the test to see the first shard before the last, on a busy machine too
    return make_sample(images, picture, settings)


def run_slowly(argv):
    packing.make_sample = slowly
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background of a shell ignores
    with open(os.path.join(os.path.dirname(argv[1]), "stderr"), "w") as file, contextlib.redirect_stderr(file):
        main(argv)


@pytest.mark.hostile("signals")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed(tmp_path, kill):
    """A real kill of the main process; with SIGINT, as Ctrl-C in a terminal, of all of its group."""
    fill(tmp_path / "in", 24)
    pack(tmp_path / "in", tmp_path / "expected", samples_per_shard=4)
    out = tmp_path / "out"
    argv = [str(tmp_path / "in"), str(out), "--samples_per_shard", "4", "--num_workers", "2"]
    alive, held_by_all = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=run_slowly, args=(argv,))
    process.start()
    os.close(held_by_all)
    deadline = time.monotonic() + 20
    while not (out.exists() and (out / MANIFEST).exists() and len((out / MANIFEST).read_text().splitlines()) > 1):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    (os.kill if kill == signal.SIGKILL else os.killpg)(process.pid, kill)
    process.join(10)
    assert process.exitcode == (-signal.SIGKILL if kill == signal.SIGKILL else 130)
    assert select.select([alive], [], [], 10)[0] and os.read(alive, 1) == b""  # the workers have ended too
    os.close(alive)
    if kill == signal.SIGINT:
        assert "run the same command again" in (tmp_path / "stderr").read_text()
        assert not list(out.glob(".*"))
    left = contents(out)
    assert 0 < len(left) < 6 and left.items() <= contents(tmp_path / "expected").items()
    pack(tmp_path / "in", out, samples_per_shard=4)
    assert contents(out) == contents(tmp_path / "expected")
    assert names(out) == names(tmp_path / "expected")


@pytest.mark.hostile("signals")
def test_a_worker_that_dies_ends_in_a_message(tmp_path, monkeypatch):
    fill(tmp_path / "in", 2)
    monkeypatch.setattr(packing, "make_sample", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UsageError, match="a worker process died.*--num_workers"):
        pack(tmp_path / "in", tmp_path / "out")


@pytest.mark.hostile("folders")
def test_other_settings_or_files_are_refused(tmp_path):
    images = fill(tmp_path / "in", 4)
    pack(images, tmp_path / "out", samples_per_shard=2)
    before = contents(tmp_path / "out")

    def refused(match, **settings):
        with pytest.raises(UsageError, match=match):
            pack(images, tmp_path / "out", **{"samples_per_shard": 2} | settings)
        assert contents(tmp_path / "out") == before

    refused("was started with --samples_per_shard 2 and --seed 0. Give another folder", samples_per_shard=3, seed=1)
    (images / "000.txt").write_text("edited: other")
    refused("was started with 4 pictures, some of which were changed, added or removed")
    save(images / "new.png", caption="new")
    refused("was started with 4 pictures")
    (tmp_path / "out" / MANIFEST).write_text("{}")
    refused("is not from pack_shards")
    (tmp_path / "out" / MANIFEST).unlink()
    refused("contains other files; give a new or empty folder")


@pytest.mark.hostile("folders")
def test_a_file_that_disappears_stops_the_packing(tmp_path, monkeypatch):
    """It is not skipped: when a network disk was disconnected, the shards would be empty."""
    images = fill(tmp_path / "in", 2)
    monkeypatch.setattr(packing, "find_pictures", lambda *a: (find_pictures(*a), (images / "001.png").unlink())[0])
    with pytest.raises(UsageError, match=r"001\.png cannot be read any more .*run the same command again"):
        pack(images, tmp_path / "out")
    assert names(tmp_path / "out") == [MANIFEST]


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    texts = ("pack_shards photos shards", "metadata.jsonl", "--samples_per_shard")
    places = [output.index(text) for text in texts]
    assert places == sorted(places)


@pytest.mark.hostile("pictures")
def test_a_jpeg_of_hundreds_of_scans_is_not_decoded(tmp_path):
    """The packer opened pictures without the readers' count of scans: 20 kB could keep a worker busy for an hour."""
    images = tmp_path / "in"
    images.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG")
    content = buffer.getvalue()
    start = content.index(b"\xff\xda")
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + content[start + 14 : content.rindex(b"\xff\xd9")]
    (images / "bomb.jpg").write_bytes(content[:start] + scan * 300 + b"\xff\xd9")
    (images / "good.jpg").write_bytes(content)
    for name in ("bomb", "good"):
        (images / f"{name}.txt").write_text(name)
    packed = pack_shards(images, tmp_path / "out", num_workers=1)
    assert packed.samples == 1 and packed.skipped == {HUGE_PICTURE: ["bomb.jpg"]}


# --------------------------------------------------------------------------------------------- two at the same time


@pytest.mark.hostile("folders")
def test_a_second_packer_is_refused_while_the_first_one_packs(tmp_path):
    """It removed what the first was writing, and both wrote the manifest."""
    from lcm_distill.locks import FolderLock

    images, out = fill(tmp_path / "in", 3), tmp_path / "out"
    out.mkdir()
    context = multiprocessing.get_context("fork")
    held, end = context.Event(), context.Event()

    def hold():
        FolderLock.take(out, "OUT", "pack_shards")
        held.set()
        end.wait()

    first = context.Process(target=hold)
    first.start()
    assert held.wait(timeout=30)
    (out / ".00000.tar.77.partial").write_bytes(b"half")
    with pytest.raises(UsageError, match=f"OUT .* is in use: pack_shards, process {first.pid} on"):
        pack_shards(images, out, num_workers=1)
    assert (out / ".00000.tar.77.partial").exists()
    end.set()
    first.join()
    pack_shards(images, out, num_workers=1)
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "manifest.jsonl"]


@pytest.mark.hostile("folders")
def test_what_a_living_process_writes_of_a_tar_is_no_leftover(tmp_path):
    from lcm_distill.data.tar import atomic_tar, remove_partials

    (tmp_path / ".a.tar.1.partial").write_bytes(b"of a killed one")
    with atomic_tar(tmp_path / "a.tar") as tar:
        tar.add("x.txt", b"x")
        living = remove_partials(tmp_path, "a.tar.*")
        assert living is not None and living.exists() and not (tmp_path / ".a.tar.1.partial").exists()
        with atomic_tar(tmp_path / "a.tar") as other:  # of a process with the same number on another machine
            other.add("y.txt", b"y")
        assert living.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]
    assert remove_partials(tmp_path) is None
