"""Colour profiles: pictures are converted to sRGB as Pillow's own conversion does it, and as computed by hand."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from icc_profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    PROPHOTO,
    SRGB,
    SRGB_CURVE,
    cmyk_profile,
    grey_profile,
    rgb_profile,
    to_srgb,
)
from PIL import Image, ImageCms
from test_stream import encode, make_stream, take, write_tar

from lcm_distill.data import colour, decode
from lcm_distill.data.decode import decode_picture, read_picture
from lcm_distill.data.packing import Settings, pack_shards
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.shards import expand_shards, read_shard

SPACES = {"Adobe RGB": (ADOBE_RGB, 2.19921875), "Display P3": (DISPLAY_P3, 2.2), "ProPhoto": (PROPHOTO, 1.8)}
PROFILES = {name: rgb_profile(name, *space) for name, space in SPACES.items()}
CMYK = cmyk_profile("Inks", (20, 30, 10, 90))
INTEGERS = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}


def noise(channels=3, size=24):
    return np.random.default_rng(1).integers(0, 256, (size, size, channels), dtype=np.uint8)


def by_pillow(image, profile, mode="RGB"):
    """The reference: one call of Pillow."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return np.asarray(ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode))


def stored(image, kind, **options):
    """(the file, the pixels that are in it)."""
    content = encode(image, kind, **INTEGERS.get(kind, {}), **options)
    return content, Image.open(io.BytesIO(content))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("name", PROFILES)
def test_wide_colours_are_converted(name, kind):
    """They were trained as if they were sRGB: too pale, and of another hue."""
    content, pixels = stored(Image.fromarray(noise()), kind, icc_profile=PROFILES[name])
    picture = read_picture(content)
    assert np.array_equal(np.asarray(picture.image), by_pillow(pixels.convert("RGB"), PROFILES[name]))
    by_hand = to_srgb(np.asarray(pixels), *SPACES[name])
    assert np.abs(np.asarray(picture.image) - by_hand).max() < 1.5
    assert np.abs(by_hand - np.asarray(pixels)).max() > 80
    assert picture.colours == f"{name}: converted to sRGB"


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "I;16"])
def test_every_mode_with_an_rgb_profile(mode):
    """Grey has the profile of the colours that it was made from."""
    if mode == "I;16":
        image = Image.fromarray(np.arange(24 * 24, dtype=np.uint16).reshape(24, 24) * 113)
        grey = (np.asarray(image) / 257).round().astype(np.uint8)
        expected = Image.fromarray(grey).convert("RGB")
    else:
        image = Image.fromarray(noise()).convert(mode)
        if "A" in mode:
            image.putalpha(Image.fromarray(np.where(noise(1)[..., 0] < 128, 0, 255).astype(np.uint8)))
        expected = image.convert("RGBA" if "A" in mode else "RGB")
    content = encode(image, "PNG", icc_profile=PROFILES["Adobe RGB"])
    colours = by_pillow(expected.convert("RGB"), PROFILES["Adobe RGB"])
    if "A" in mode:
        colours = np.where(np.asarray(expected)[..., 3:] == 0, 255, colours)  # transparent parts are white
    decoded, _ = decode_picture(content)
    assert decoded.mode == "RGB" and np.array_equal(np.asarray(decoded), colours)


@pytest.mark.parametrize("gamma", [1.8, 2.6, 3.0])
@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("L", "PNG"), ("LA", "PNG")])
def test_grey_profiles(gamma, mode, kind):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)
    content, pixels = stored(image, kind, icc_profile=grey_profile("Grey", gamma))
    grey = np.asarray(pixels.convert("L"))
    picture = read_picture(content)
    linear = (grey / 255.0) ** gamma
    by_hand = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(np.asarray(picture.image) - by_hand[..., None]).max() < 2
    assert picture.colours == "Grey: converted to sRGB"


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_profiles(kind):
    """Without one Pillow's plain formula is used, in which black ink is black."""
    image = Image.merge("CMYK", Image.fromarray(noise(4)).split())
    content, pixels = stored(image, kind, icc_profile=CMYK)
    assert pixels.mode == "CMYK"
    picture = read_picture(content)
    assert np.array_equal(np.asarray(picture.image), by_pillow(pixels, CMYK))
    assert picture.colours == "Inks: converted to sRGB"
    black = Image.new("CMYK", (8, 8), (0, 0, 0, 255))
    with_profile, _ = decode_picture(stored(black, "TIFF", icc_profile=CMYK)[0])
    assert abs(np.asarray(with_profile).mean() - 27) < 1  # of L* 10, in sRGB
    assert not np.asarray(decode_picture(stored(black, "TIFF")[0])[0]).any()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_srgb_stays_as_it_is(kind, monkeypatch):
    """To the bit, with or without its profile, and without the time of a conversion."""
    content, pixels = stored(Image.fromarray(noise()), kind)
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (built_in, rgb_profile("sRGB by hand", SRGB, SRGB_CURVE)):
        own, _ = stored(Image.fromarray(noise()), kind, icc_profile=profile)
        picture = read_picture(own)
        assert np.array_equal(np.asarray(picture.image), np.asarray(pixels)) and picture.colours == ""
    monkeypatch.setattr(decode, "to_srgb", lambda image: pytest.fail("a picture without a profile was converted"))
    picture = read_picture(content)
    assert np.array_equal(np.asarray(picture.image), np.asarray(pixels)) and picture.colours == ""


@pytest.mark.hostile("pictures")
@pytest.mark.parametrize(
    ("profile", "mode", "note"),
    [
        (b"no profile", "RGB", "damaged profile: ignored"),
        (PROFILES["Adobe RGB"][:300], "RGB", "damaged profile: ignored"),
        (PROFILES["Adobe RGB"][:128] + b"\xff" * 400, "L", "damaged profile: ignored"),
        (CMYK[:200], "CMYK", "damaged profile: ignored"),
        (CMYK, "RGB", "Inks, not of the picture's colours: ignored"),
        (grey_profile("Grey", 1.8), "RGB", "Grey, not of the picture's colours: ignored"),
        (PROFILES["ProPhoto"], "CMYK", "ProPhoto, not of the picture's colours: ignored"),
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored(profile, mode, note):
    image = Image.merge(mode, Image.fromarray(noise(4)).split()[: len(Image.new(mode, (1, 1)).getbands())])
    picture = read_picture(encode(image, "TIFF", icc_profile=profile))
    assert picture.colours == note
    assert np.array_equal(np.asarray(picture.image), np.asarray(image.convert("RGB")))


def png_chunks(gamma, space=None):
    chunks = [(b"gAMA", struct.pack(">I", round(gamma * 100_000)))]
    if space is not None:
        red, green, blue, white = space
        points = [round(value * 100_000) for point in (white, red, green, blue) for value in point]
        chunks.append((b"cHRM", struct.pack(">8I", *points)))
    return chunks


def with_chunks(image, chunks):
    """The PNG of an image with (type, content) of more chunks."""
    content = encode(image, "PNG")
    added = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return content[:33] + added + content[33:]  # after the header


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize(
    ("gamma", "space"), [(1, None), (1 / 1.8, None), (1 / 2.2, ADOBE_RGB), (1 / 1.8, PROPHOTO), (1 / 2.2, DISPLAY_P3)]
)
def test_the_gamma_and_primaries_of_a_png_are_a_profile(gamma, space, mode):
    """They were ignored."""
    image = Image.fromarray(noise()).convert(mode)
    picture = read_picture(with_chunks(image, png_chunks(gamma, space)))
    profile = rgb_profile("reference", space or SRGB, 1 / gamma)
    difference = np.asarray(picture.image, int) - by_pillow(image.convert("RGB"), profile)
    assert np.abs(difference).max() <= 1 and picture.colours.endswith(": converted to sRGB")
    by_hand = to_srgb(image.convert("RGB"), space or SRGB, 1 / gamma)
    assert np.abs(np.asarray(picture.image) - by_hand).max() < 1


@pytest.mark.parametrize(
    ("chunks", "note"),
    [
        (png_chunks(1 / 2.2), ""),
        (png_chunks(1 / 2.2, SRGB), ""),
        ([(b"sRGB", b"\0"), *png_chunks(1)], ""),
        (png_chunks(0), "implausible gamma (0) or primaries: ignored"),
        (png_chunks(20), "implausible gamma (20) or primaries: ignored"),
        (png_chunks(1 / 2.2, [(0.3, 0.3)] * 4), "implausible gamma (0.45455) or primaries: ignored"),
        ([*png_chunks(1 / 2.2), (b"cHRM", bytes(32))], "implausible gamma (0.45455) or primaries: ignored"),
    ],
)
def test_a_gamma_that_is_srgb_s_or_none_changes_nothing(chunks, note):
    pixels = noise()
    picture = read_picture(with_chunks(Image.fromarray(pixels), chunks))
    assert np.array_equal(np.asarray(picture.image), pixels) and picture.colours == note


def test_a_profile_counts_before_a_gamma():
    image = Image.fromarray(noise())
    chunk = b"x\0\0" + zlib.compress(PROFILES["Adobe RGB"])
    content = with_chunks(image, [*png_chunks(1), (b"iCCP", chunk)])
    picture = read_picture(content)
    assert np.array_equal(np.asarray(picture.image), by_pillow(image, PROFILES["Adobe RGB"]))


def test_lab_is_converted_and_its_profile_is_no_foreign_one():
    """The report had it as "not of the picture's colours: ignored"."""
    lab = ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(noise()), ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    picture = read_picture(encode(image, "TIFF"))
    reference = ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert np.array_equal(np.asarray(picture.image), np.asarray(reference)) and picture.colours == ""


def test_a_png_may_have_a_large_profile():
    """From 1 MB on the picture was left out, as none."""
    image = Image.fromarray(noise())
    picture = read_picture(encode(image, "PNG", icc_profile=PROFILES["Adobe RGB"] + bytes(3 * 2**20)))
    assert np.array_equal(np.asarray(picture.image), by_pillow(image, PROFILES["Adobe RGB"]))


def test_many_profiles_are_not_all_remembered(monkeypatch):
    monkeypatch.setattr(colour, "_remembered", {})
    for number in range(100):
        read_picture(encode(Image.new("RGB", (2, 2)), icc_profile=rgb_profile(f"{number}", ADOBE_RGB, 1.5)))
    assert len(colour._remembered) <= 32
    huge = rgb_profile("huge", ADOBE_RGB, 1.5) + bytes(colour.MAX_PROFILE_BYTES)
    assert (
        read_picture(encode(Image.new("RGB", (2, 2)), "TIFF", icc_profile=huge)).colours == "damaged profile: ignored"
    )


def test_the_stream_converts_and_the_preflight_says_so(tmp_path):
    profiles = [PROFILES["Adobe RGB"], PROFILES["ProPhoto"], PROFILES["ProPhoto"], b"damaged"]
    contents = [encode(Image.new("RGB", (20, 20), (0, 200, 0)), "JPEG", icc_profile=profile) for profile in profiles]
    files = [file for n, content in enumerate(contents) for file in ((f"{n}.jpg", content), (f"{n}.txt", str(n)))]
    shards = [write_tar(tmp_path / "0.tar", files)]
    report = inspect_shards(shards, Preparation(resolution=16))
    assert report.colours == {
        "Adobe RGB: converted to sRGB": 1,
        "ProPhoto: converted to sRGB": 2,
        "damaged profile: ignored": 1,
    }
    assert "colour profiles: 2 x ProPhoto: converted to sRGB, 1 x" in str(report)
    batches = take(iter(make_stream(shards, shuffle_window=1)), 4)
    expected = [decode_picture(content)[0].getpixel((9, 9)) for content in contents]
    assert [tuple(batch["pixels"][0, :, 8, 8].tolist()) for batch in batches] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("max_size", [None, 16])
def test_the_packer_s_pictures_have_the_same_colours(tmp_path, max_size):
    """Stored files keep their profile; new ones are sRGB, and have none that would convert them a second time."""
    images = tmp_path / "in"
    images.mkdir()
    cmyk = Image.merge("CMYK", Image.fromarray(np.full((40, 40, 4), (200, 90, 30, 20), np.uint8)).split())
    flat = {"a.jpg": (Image.new("RGB", (40, 40), (20, 200, 40)), PROFILES["Adobe RGB"]),
            "b.png": (Image.new("RGBA", (40, 40), (20, 200, 40, 255)), PROFILES["ProPhoto"]),
            "c.tif": (Image.new("RGB", (40, 40), (20, 200, 40)), PROFILES["Display P3"]),
            "d.tif": (cmyk, CMYK), "e.tif": (Image.new("L", (40, 40), 99), grey_profile("Grey", 1.0)),
            "f.tif": (Image.new("L", (40, 40), 99), PROFILES["ProPhoto"]),
            "g.tif": (Image.new("RGB", (40, 40), (20, 200, 40)), b"damaged"),
            "h.jpg": (cmyk, CMYK)}  # fmt: skip
    for name, (image, profile) in flat.items():
        image.save(images / name, icc_profile=profile, **({"quality": 100} if name.endswith("jpg") else {}))
        (images / name).with_suffix(".txt").write_text(name)
    pack_shards(images, tmp_path / "out", Settings(max_size=max_size), num_workers=1)
    samples = [raw.files for shard in expand_shards(str(tmp_path / "out")) for raw in read_shard(shard)]
    assert len(samples) == len(flat)
    for files in samples:
        name = json.loads(files["json"])["file_name"]
        content = files.get("png") or files["jpg"]
        expected = np.asarray(decode_picture((images / name).read_bytes())[0], int).mean((0, 1))
        packed = np.asarray(decode_picture(content)[0], int).mean((0, 1))
        assert np.abs(packed - expected).max() <= 2, name
        changed = max_size is not None or name.endswith("tif")
        assert ("icc_profile" in Image.open(io.BytesIO(content)).info) == (not changed)
