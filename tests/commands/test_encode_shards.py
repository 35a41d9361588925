"""Encoded shards: the latents of their pictures; complete, resumable, recognised, refused with other teachers."""

import dataclasses
import io
import itertools
import json
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from icc_profiles import DISPLAY_P3, rgb_profile, to_srgb
from original_layout import save_single_file
from PIL import Image
from safetensors.numpy import load as load_bytes
from safetensors.numpy import save as save_bytes
from safetensors.torch import load_file, save_file
from test_stream import TouchesFile, noise_picture, take, write_tar

from lcm_distill import encode_shards as module
from lcm_distill.data.encoded import EMPTY_CAPTION, HEADER, read_encoding, unpack
from lcm_distill.data.filters import FILTERED, parse_filters
from lcm_distill.data.loader import make_loader
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation, prepare_sample
from lcm_distill.data.raw import (
    DAMAGED_LATENTS,
    DOTTED_NAME,
    DUPLICATE_NAME,
    LATENTS_EXTENSION,
    NO_CAPTION,
    NO_LATENTS,
    NO_PICTURE,
    NOT_A_PICTURE,
    UNREADABLE_SHARD,
)
from lcm_distill.data.shards import count_samples, expand_shards, read_shard
from lcm_distill.data.stream import ShardStream, StreamIterator
from lcm_distill.encode_shards import DROPPED, _Estimate, encode_shards, main, output_names
from lcm_distill.errors import UsageError
from lcm_distill.models import sd, sdxl
from lcm_distill.models.frozen import batch_latents, check_encoding
from lcm_distill.models.teacher import Teacher

FAMILIES = {"sd": sd, "sdxl": sdxl}
PREPARATION = Preparation(resolution=32)


def write_pictures(folder: Path, shards: int = 2, each: int = 5) -> str:
    """Shards of pictures of several sizes; 'caption 0-1', original sizes in every second JSON, two captions in some."""
    for s in range(shards):
        files = []
        for i in range(each):
            meta = {"original_height": 900 + i, "original_width": 700, "aesthetic": i} if i % 2 else {"aesthetic": i}
            captions = f"caption {s}-{i}"
            if i == 3:
                meta["caption"] = [captions, f"other words for {s}-{i}"]
            files += [(f"deep/{s}_{i}.png", noise_picture(10 * s + i, size=(40 + 8 * i, 32 if i else 48)))]
            files += [(f"deep/{s}_{i}.json", json.dumps(meta))]
            files += [(f"deep/{s}_{i}.txt", captions)] if i != 3 else []
        write_tar(folder / f"{s:03d}.tar", files)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def encoded(pictures: str, out: Path, teacher: str, preparation: Preparation = PREPARATION, **options) -> list[str]:
    """The encoded shards of `pictures`, in `out`."""
    encode_shards(expand_shards(pictures), out, teacher=Teacher(teacher), preparation=preparation, **options)
    return expand_shards(str(out))


@pytest.fixture(scope="module")
def latents(pictures, teacher, tmp_path_factory) -> list[str]:
    """By the SD teacher: random crops, mirror images too, captions not encoded."""
    preparation = dataclasses.replace(PREPARATION, random_flip=True)
    return encoded(pictures, tmp_path_factory.mktemp("encoded"), teacher, preparation)


@pytest.fixture(scope="module")
def with_captions(pictures, teacher, tmp_path_factory) -> list[str]:
    return encoded(pictures, tmp_path_factory.mktemp("captions"), teacher, captions=True)


def stream_of(shards: list[str], preparation: Preparation = PREPARATION, **options) -> ShardStream:
    prepared = inspect_shards(shards, preparation).preparation
    defaults = {"batch_size": 2, "seed": 5, "shuffle_window": 3}
    return ShardStream(shards=shards, preparation=prepared, **defaults | options)


def text_part(conditioning: dict) -> dict:
    """A conditioning without SDXL's time ids: what `encode_captions` gives."""
    if "added_cond_kwargs" not in conditioning:
        return conditioning
    added = {name: value for name, value in conditioning["added_cond_kwargs"].items() if name != "time_ids"}
    return conditioning | {"added_cond_kwargs": added}


def assert_same(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def contents(shard: str | Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def changed(shard: str, path: Path, changes: dict[str, bytes | None]) -> str:
    """A copy of a shard in which files with these endings have another content, or, for None, are missing."""
    kept = []
    for name, content in contents(shard).items():
        ending = next((ending for ending in changes if name.endswith(ending)), None)
        new = content if ending is None else changes[ending]
        kept += [] if new is None else [(name, new)]
    return write_tar(path, kept)


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_from_latents_has_the_batches_of_a_run_from_pictures(family, pictures, teachers, tmp_path):
    """Centre crops: the same samples, flips, captions and sizes by the same draws; the same latents to float16."""
    preparation = dataclasses.replace(
        PREPARATION, center_crop=True, random_flip=True, proportion_empty_prompts=0.3, interpolation="bicubic"
    )
    shards = encoded(pictures, tmp_path, teachers[family], preparation, captions=True)
    frozen = FAMILIES[family].load_frozen(Teacher(teachers[family]), device="cpu", dtype=torch.float32)
    streams = [take(iter(stream_of(of, preparation)), 12) for of in (expand_shards(pictures), shards)]
    for number, (of_pictures, of_latents) in enumerate(zip(*streams, strict=True)):
        assert of_pictures["captions"] == of_latents["captions"]
        for key in ("original_sizes", "crop_top_lefts", "target_sizes"):
            assert_same(of_latents[key], of_pictures[key])
        assert "pixels" not in of_latents and of_latents["moments"].dtype == torch.float16
        assert of_latents["moments"].shape == (2, 8, 8, 8)
        first, second = (
            batch_latents(frozen, batch, 8, torch.Generator().manual_seed(number))
            for batch in (of_pictures, of_latents)
        )
        assert second.dtype == torch.float32
        torch.testing.assert_close(second, first, rtol=0, atol=2**-11 * 2 * float(first.abs().max()))
        words, stored = (FAMILIES[family].batch_conditioning(frozen, batch) for batch in (of_pictures, of_latents))
        torch.testing.assert_close(stored, words, rtol=2**-10, atol=1e-3)
    assert {caption for batch in streams[1] for caption in batch["captions"]} > {"", "caption 0-1"}


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_random_crop_is_where_the_shard_says(pictures, latents, teacher, mirrored):
    """The moments are the VAE's of that part of the picture; the mirror image is not the latents' mirror."""
    originals = {raw.key: raw for shard in expand_shards(pictures) for raw in read_shard(shard)}
    vae = sd.load_frozen(Teacher(teacher), device="cpu", dtype=torch.float32).vae
    corners = Counter()
    for raw in itertools.chain.from_iterable(map(read_shard, latents)):
        arrays = load_bytes(raw.files[LATENTS_EXTENSION])
        picture = Image.open(io.BytesIO(originals[raw.key].files["png"]))
        (height, width), (top, left) = picture.size[::-1], arrays["sizes"][1].tolist()
        assert arrays["sizes"][2].tolist() == [height, width]
        if height != 32:
            continue  # the others are not resized
        corners[left] += 1
        square = np.asarray(picture)[top : top + 32, left : left + 32]
        pixels = torch.from_numpy((square[:, ::-1] if mirrored else square).copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            posterior = vae.encode(pixels / 127.5 - 1).latent_dist
        moments = torch.from_numpy(arrays["mirrored_moments" if mirrored else "moments"])
        expected = torch.cat([posterior.mean, posterior.std], 1)[0]
        torch.testing.assert_close(moments.float(), expected, rtol=2**-10, atol=1e-5)
    assert sum(corners.values()) == 8 and len(corners) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_caption_that_is_drawn(family, pictures, teachers, tmp_path):
    """Of several captions too, and of the empty one, which is stored once per shard."""
    shards = encoded(pictures, tmp_path, teachers[family], captions=True)
    frozen = FAMILIES[family].load_frozen(Teacher(teachers[family]), device="cpu", dtype=torch.float32)
    seen = set()
    for proportion in (0.0, 1.0):
        preparation = dataclasses.replace(PREPARATION, proportion_empty_prompts=proportion)
        for batch in take(iter(stream_of(shards, preparation)), 20):
            seen.update(batch["captions"])
            expected = FAMILIES[family].encode_captions(frozen, batch["captions"])
            conditioning, unconditional = FAMILIES[family].batch_conditioning(frozen, batch)
            torch.testing.assert_close(text_part(conditioning), expected, rtol=2**-10, atol=1e-3)
            torch.testing.assert_close(text_part(unconditional), frozen.empty_conditioning, rtol=0, atol=0)
    assert {"", "caption 0-3", "other words for 0-3"} < seen
    encoded_parts = FAMILIES[family].load_frozen(
        Teacher(teachers[family]), device="cpu", dtype=torch.float32, encoding=read_encoding(shards[0])
    )
    unconditional = encoded_parts.empty_conditioning
    assert "text_encoder" not in vars(encoded_parts)  # it is the shards' own
    expected = FAMILIES[family].encode_captions(frozen, [""])
    torch.testing.assert_close(unconditional, expected, rtol=2**-10, atol=1e-3)
    torch.testing.assert_close(frozen.empty_conditioning, expected, rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_of_latents_resumes(latents, workers):
    preparation = dataclasses.replace(PREPARATION, random_flip=True)
    first = make_loader(stream_of(latents, preparation), workers)
    iterator = iter(first)
    take(iterator, 3)
    state = first.state_dict()
    expected = take(iterator, 4)
    first.close()
    resumed = make_loader(stream_of(latents, preparation), workers)
    resumed.load_state_dict(state)
    for one, other in zip(expected, take(iter(resumed), 4), strict=True):
        assert one["captions"] == other["captions"] and one["dropped"] == other["dropped"]
        assert_same(
            *([batch[key] for key in ("moments", "original_sizes", "crop_top_lefts")] for batch in (one, other))
        )
    resumed.close()


def test_filters_and_sizes_still_count_in_training(latents):
    preparation = dataclasses.replace(PREPARATION, min_image_size=33, filters=parse_filters(["aesthetic<3"]))
    stream = iter(stream_of(latents, preparation))
    assert {caption for batch in take(stream, 3) for caption in batch["captions"]} == {"caption 0-0", "caption 1-0"}
    assert set(stream.dropped) == {f"{FILTERED} --min_image_size 33", f"{FILTERED} --filter 'aesthetic<3'"}
    report = inspect_shards(latents, preparation)
    assert (report.usable, report.seen) == (2, 10) and report.smallest == (48, 40)


# ------------------------------------------------------------------------------------------------- what is written


def test_an_encoded_shard_has_the_samples_of_its_source(pictures, latents):
    """The same keys in the same order, captions and JSON byte for byte, no picture; first of all how it was made."""
    for before, after in zip(expand_shards(pictures), latents, strict=True):
        assert Path(before).name == Path(after).name
        old, new = contents(before), contents(after)
        assert next(iter(new)) == HEADER
        header = json.loads(new.pop(HEADER))
        assert (header["resolution"], header["center_crop"], header["random_flip"]) == (32, False, True)
        assert list(new) == [name.replace("png", LATENTS_EXTENSION) for name in old]
        assert all(new[name] == content for name, content in old.items() if not name.endswith("png"))
    assert count_samples(latents) == 10


@pytest.mark.hostile("signals")
def test_the_same_bytes_by_several_processes_and_after_a_kill(pictures, latents, teacher, tmp_path, monkeypatch):
    expected = {Path(shard).name: Path(shard).read_bytes() for shard in latents}

    def run(out, *more):
        main([pictures, str(out), "--pretrained_teacher_model", teacher, "--resolution", "32", "--random_flip", *more])
        return {path.name: path.read_bytes() for path in out.iterdir()}

    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        files = run(tmp_path / "ranks", "--device", "cpu")
        assert len(files) == 2 - rank
    assert files == expected
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")

    out, write = tmp_path / "killed", module._write_batch
    calls = itertools.count()
    monkeypatch.setattr(module, "_write_batch", lambda *a: 1 / 0 if next(calls) == 1 else write(*a))
    with pytest.raises(ZeroDivisionError):  # in the second shard
        run(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"000.tar": expected["000.tar"]}
    monkeypatch.setattr(module, "_write_batch", write)
    stamp = (out / "000.tar").stat().st_mtime_ns
    (out / ".001.tar.7.partial").write_bytes(b"half")
    assert run(out) == expected and (out / "000.tar").stat().st_mtime_ns == stamp
    # With nothing left to do no network is loaded.
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run(out, "--batch_size", "3") == expected


def test_a_batch_is_written_after_the_next_one_was_begun(pictures, teacher, tmp_path, monkeypatch):
    """A GPU had nothing to do while the batch before was written."""
    calls = []
    encode, write = module._encode_batch, module._write_batch

    def noting_encode(samples, *rest):
        calls.append(("encode", samples[0][0].key))
        return encode(samples, *rest)

    def noting_write(batch, *rest):
        calls.append(("write", batch.samples[0][0].key))
        return write(batch, *rest)

    monkeypatch.setattr(module, "_encode_batch", noting_encode)
    monkeypatch.setattr(module, "_write_batch", noting_write)
    (shard, _) = encoded(pictures, tmp_path / "out", teacher, batch_size=2)
    first = [kind + key.rpartition("/")[2] for kind, key in calls if "/0_" in key]
    assert first == ["encode0_0", "encode0_2", "write0_0", "encode0_4", "write0_2", "write0_4"]
    samples = list(read_shard(shard))
    assert [sample.key for sample in samples] == [f"deep/0_{number}" for number in range(5)]


@pytest.mark.hostile("folders")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resolution", "64", "--random_flip"], r"resolution 32 \(now 64\)"),
        (["--resolution", "32"], r"random_flip True \(now False\)"),
        (["--resolution", "32", "--random_flip", "--seed", "1"], r"seed 0 \(now 1\)"),
        (["--resolution", "32", "--random_flip", "--min_aesthetic", "2"], "filters"),
        (["--resolution", "32", "--random_flip", "--captions"], "text None"),
    ],
)
def test_a_folder_started_with_other_flags_is_refused(pictures, latents, teacher, flags, words):
    with pytest.raises(UsageError, match=f"^OUT .* was started with other flags .*{words}"):
        main([pictures, str(Path(latents[0]).parent), "--pretrained_teacher_model", teacher, *flags])


def test_mistakes_are_explained(pictures, latents, teacher, tmp_path, monkeypatch):
    def run(*argv):
        main([*argv, "--pretrained_teacher_model", teacher, "--resolution", "32"])

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.md").touch()
    with pytest.raises(UsageError, match="OUT .*used contains other files"):
        run(pictures, str(tmp_path / "used"))
    with pytest.raises(UsageError, match="^IN contains encoded shards"):
        run(str(Path(latents[0]).parent), str(tmp_path / "twice"))
    with pytest.raises(UsageError, match="^IN: several shards are called 000.tar"):
        run(f"{pictures}/000.tar::{pictures}/000.tar", str(tmp_path / "out"))
    with pytest.raises(UsageError, match="--resolution 36 is not a multiple of 8"):
        main([pictures, str(tmp_path / "out"), "--pretrained_teacher_model", teacher, "--resolution", "36"])
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UsageError, match="^RANK=2 and WORLD_SIZE=1 .* unset both"):
        run(pictures, str(tmp_path / "out"))


def test_names_of_encoded_shards():
    shards = [
        "/a/000.tar",
        "s3://b/001.tar.gz?x=1",
        "pipe:curl -s 'https://h/d/002.tgz?download=true' | cat",
        "pipe:cat x",
    ]
    assert output_names([*shards, "/a/x.tarball"]) == ["000.tar", "001.tar", "002.tar", "00003.tar", "00004.tar"]


def test_the_total_is_exact_for_a_shard_and_by_what_is_done_for_several(tmp_path):
    """Nobody could see how long the encoding would take; to count all samples, all shards would be read twice."""
    shards = []
    for number, count in enumerate((4, 4, 8)):
        files = [file for i in range(count) for file in ((f"{i}.png", noise_picture(i)), (f"{i}.txt", "x"))]
        shards.append(write_tar(tmp_path / f"{number}.tar", files))
    assert _Estimate(shards[:1], None).total == 4
    estimate = _Estimate(shards, None)
    assert estimate.total == pytest.approx(16, abs=2)
    assert estimate.after_shard(4) == estimate.total and estimate.after_shard(8) == estimate.total
    assert estimate.after_shard(15) == 15  # one was bad
    remote = _Estimate(["pipe:cat 0.tar", "https://host/1.tar", "https://host/2.tar"], None)
    assert remote.total is None and remote.after_shard(4) == 12 and remote.after_shard(9) == 14


@pytest.mark.hostile("shards")
def test_bad_samples_are_left_out_and_listed(teacher, tmp_path, capsys):
    files = [("a.png", noise_picture(0)), ("b.png", b"no picture"), ("b.txt", "b"), ("c.png", noise_picture(1))]
    files += [("c.txt", "c"), ("d.txt", "d"), ("c.png", noise_picture(2)), ("c.txt", "c again")]
    write_tar(tmp_path / "in" / "0.tar", files)
    cut = write_tar(tmp_path / "in" / "1.tar", [("e.png", noise_picture(3)), ("e.txt", "e"), ("f.png", bytes(5000))])
    Path(cut).write_bytes(Path(cut).read_bytes()[:-3000])
    write_tar(tmp_path / "in" / "2.tar", [("g.png", b"no picture"), ("g.txt", "g")])
    main([str(tmp_path / "in"), str(tmp_path / "out"), "--pretrained_teacher_model", teacher, "--resolution", "32"])
    output = capsys.readouterr().out
    for reason in (NO_CAPTION, NOT_A_PICTURE, NO_PICTURE, UNREADABLE_SHARD, DUPLICATE_NAME):
        assert reason in output, output
    assert "3 shards, 2 samples" in output
    shards = expand_shards(str(tmp_path / "out"))
    assert [[raw.key for raw in read_shard(shard)] for shard in shards] == [["c"], ["e"], []]
    dropped = [json.loads(contents(shard)[DROPPED]) for shard in shards]
    assert dropped[0] == {NO_CAPTION: ["a"], NOT_A_PICTURE: ["b"], NO_PICTURE: ["d"], DUPLICATE_NAME: ["c"]}
    assert dropped[1] == {UNREADABLE_SHARD: ["1.tar: the tar is cut short in a file"]}
    assert dropped[2] == {NOT_A_PICTURE: ["g"]}


def test_what_is_encoded_is_as_in_training_and_what_is_lost_is_listed(teacher, tmp_path, capsys):
    """Dotted names, values that a filter cannot compare, captions that are cut, turned pictures and wide colours."""
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (60, 40), (20, 200, 40))
    wide.info["icc_profile"] = rgb_profile("Display P3", DISPLAY_P3, 2.2)
    buffer = io.BytesIO()
    wide.save(buffer, "PNG", exif=exif, icc_profile=wide.info["icc_profile"])
    meta = json.dumps({"width": "60", "height": "40", "score": "high", "nsfw": False})
    files = [("a.png", buffer.getvalue()), ("a.txt", "a red circle " * 100), ("a.json", meta)]
    files += [("b v1.0.png", noise_picture(1)), ("b v1.0.txt", "b"), ("c.png", noise_picture(2)), ("c.txt", "c")]
    files += [("c.json", json.dumps({"nsfw": True}))]
    shard = write_tar(tmp_path / "in" / "0.tar", files)
    filters = ["--filter", "score>=5", "nsfw=false"]
    argv = [str(tmp_path / "in"), str(tmp_path / "out"), "--pretrained_teacher_model", teacher, "--resolution", "32"]
    main([*argv, "--captions", "--center_crop", *filters])
    printed = capsys.readouterr()
    assert "captions cut:    1 of 1 is longer than the" in printed.err
    assert "colour profiles: 1 x Display P3: converted to sRGB" in printed.err
    assert "kept, since a filter cannot compare their value: 1 x --filter 'score>=5' (the value is text)" in printed.out
    (encoded_shard,) = expand_shards(str(tmp_path / "out"))
    dropped = json.loads(contents(encoded_shard)[DROPPED])
    assert dropped == {DOTTED_NAME: ["b v1.0.png"], f"{FILTERED} --filter 'nsfw=false'": ["c"]}
    preparation = inspect_shards([encoded_shard], Preparation(resolution=32)).preparation
    (sample,) = read_shard(encoded_shard)
    trained = prepare_sample(sample, preparation, draws=np.zeros(5))
    assert trained.original_size == trained.picture_size == (60, 40)
    plain = next(read_shard(shard))
    pixels = prepare_sample(plain, Preparation(resolution=32, center_crop=True), draws=np.zeros(5)).arrays["pixels"]
    expected = to_srgb(np.array([20, 200, 40]), DISPLAY_P3, 2.2)
    assert np.abs(pixels - expected).max() < 2


@pytest.mark.hostile("disks")
def test_a_shard_whose_disk_fails_is_not_written_as_a_short_one(pictures, teacher, tmp_path, monkeypatch):
    def breaking(shard, **options):
        yield from itertools.islice(read_shard(shard, **options), 2)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "read_shard", breaking)
    with pytest.raises(
        UsageError, match=r"^IN: reading .*000.tar failed .*Input/output error.*run the same command again"
    ):
        encoded(pictures, tmp_path / "out", teacher)
    assert not (tmp_path / "out").exists()


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("scale", [1e6, float("nan")])
def test_latents_that_overflow_half_precision_are_refused(pictures, teacher, tmp_path, monkeypatch, scale):
    """SDXL's own VAE overflows in half precision: its black pictures must not be trained on."""
    encode_moments = module.encode_moments
    monkeypatch.setattr(module, "encode_moments", lambda *a: encode_moments(*a) * scale)
    with pytest.raises(UsageError, match="--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix"):
        encoded(pictures, tmp_path / "out", teacher)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- what is read, and what is not


def test_the_preflight_describes_the_encoding(latents, with_captions):
    text = str(inspect_shards(latents, PREPARATION))
    assert "encoded by sd in float32; latents of 32x32, random crop" in text and "captions not encoded" in text
    assert "with their mirror images" in text and "32x56" not in text
    assert "no flip; captions encoded by sd" in str(inspect_shards(with_captions, PREPARATION))


@pytest.mark.parametrize(
    ("preparation", "flag"),
    [
        (Preparation(resolution=64), "--resolution 64: .*give --resolution 32"),
        (Preparation(resolution=32, center_crop=True), "--center_crop: "),
        (Preparation(resolution=32, random_flip=True), "--random_flip: "),
        (Preparation(resolution=32, interpolation="lanczos"), "--interpolation_type lanczos: .*bilinear"),
        (Preparation(resolution=32, caption_column="txt"), "--caption_column txt: .*the usual places"),
    ],
)
def test_flags_that_the_latents_contradict_are_refused(with_captions, preparation, flag):
    with pytest.raises(UsageError, match=f"^{flag}"):
        inspect_shards(with_captions, preparation)


def test_where_captions_come_from_is_remembered(pictures, teacher, tmp_path):
    """A run need not name the column again; and may name another, if the captions are not encoded."""
    write_tar(
        tmp_path / "in" / "0.tar", [("a.png", noise_picture(0)), ("a.blip", "by blip"), ("a.json", '{"x": "by x"}')]
    )
    shards = encoded(str(tmp_path / "in"), tmp_path / "out", teacher, Preparation(resolution=32, caption_column="blip"))
    for column, caption in ((None, "by blip"), ("blip", "by blip"), ("x", "by x")):
        stream = stream_of(shards, Preparation(resolution=32, caption_column=column))
        assert next(iter(stream))["captions"] == [caption] * 2


@pytest.mark.hostile("shards")
def test_shards_of_several_kinds_are_refused(pictures, latents, with_captions, teacher, tmp_path):
    """By the preflight as far as it looks, and by the stream when it comes to the other kind."""
    of_pictures = expand_shards(pictures)
    crops = encoded(pictures, tmp_path / "crops", teacher, dataclasses.replace(PREPARATION, center_crop=True))
    for first, second, words in (
        (of_pictures, latents, "is encoded, and others are pictures"),
        (latents, of_pictures, "is a picture, and others are encoded"),
        (latents, crops, "was encoded with other settings than others"),
        (latents, with_captions, "was encoded with other settings than others"),
    ):
        with pytest.raises(UsageError, match=words) as preflight:
            inspect_shards([first[0], second[1]], PREPARATION)
        prepared = inspect_shards(first, PREPARATION).preparation
        stream = iter(ShardStream(shards=[first[0], second[1]], preparation=prepared, batch_size=1, seed=0))
        with pytest.raises(UsageError, match=words) as later:
            take(stream, 11)
        for message in (str(preflight.value), str(later.value)):
            assert second[1] in message and "the sample deep/" in message and message.startswith("--train_shards_path")
    with pytest.raises(UsageError, match=r"^--train_shards_path_or_url: the sample .* is encoded"):  # from a worker
        take(iter(make_loader(ShardStream(shards=latents, preparation=PREPARATION, batch_size=1, seed=0), 1)), 1)


def test_other_seeds_and_names_may_be_mixed(pictures, latents, teacher, tmp_path):
    """For example two crops of each picture; by the same VAE from another folder."""
    shutil.copytree(teacher, tmp_path / "elsewhere")
    preparation = dataclasses.replace(PREPARATION, random_flip=True)
    more = encoded(pictures, tmp_path / "more", str(tmp_path / "elsewhere"), preparation, seed=1)
    batches = take(iter(stream_of([*latents, *more], preparation, batch_size=1)), 20)
    assert not batches[-1]["dropped"]
    assert Counter(batch["captions"][0].split("-")[0] for batch in batches)["caption 0"] >= 8


def header(**fields):
    return lambda old: json.dumps(json.loads(old) | fields).encode()


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda old: b"{broken", "damaged"),
        (lambda old: b"[]", "damaged"),
        (lambda old: b"5", "damaged"),
        (lambda old: b"[" * 100_000, "damaged"),
        (header(format=2), "another version"),
        (header(moments=[8, "x", 8]), "damaged"),
        (header(resolution=None), "damaged"),
        (header(unheard_of=1), "damaged"),
        (header(embeddings={"encoder_hidden_states": [16, 64]}), "damaged"),
        (header(text="someone"), "damaged"),  # but no embeddings
        (header(moments=[7, 4, 4]), "damaged"),  # no mean and deviation of as many channels
        (header(moments=[8, 4, 2]), "damaged"),
        (header(moments=[8, 64, 64]), "damaged"),  # more latents than pixels
        (header(moments=[16]), "damaged"),
        (header(moments=[8, 3, 3]), "damaged"),
        (header(interpolation="of old"), "damaged"),  # it was blamed on --interpolation_type
        (header(caption_column="pkl"), "damaged"),  # and this on --caption_column
        (header(caption_column=" txt"), "damaged"),
        (header(resolution=-32), "damaged"),
        (header(vae_name="x" * 2**20), "damaged"),
    ],
)
def test_a_header_that_cannot_be_used_is_explained(latents, tmp_path, change, problem):
    shard = changed(latents[0], tmp_path / "0.tar", {HEADER: change(contents(latents[0])[HEADER])})
    with pytest.raises(
        UsageError, match=f"0.tar: its .encoding.json cannot be used .*{problem}.*Encode the pictures again"
    ):
        inspect_shards([shard], PREPARATION)


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    "fields",
    [
        {"text": None},  # embeddings of no known text encoder
        {"embeddings": {}},
        {"embeddings": {"pixels": [16, 64]}},  # it would take the place of what the batch has under this name
        {"embeddings": {"encoder_hidden_states": [64]}},
        {"embeddings": {"encoder_hidden_states": [16, 64, 1]}},
        {"embeddings": {"text_embeds": [16, 64]}},
    ],
)
def test_embeddings_that_no_encoder_writes_are_refused(with_captions, tmp_path, fields):
    old = contents(with_captions[0])
    arrays = {name: np.zeros(shape, np.float16) for name, shape in fields.get("embeddings", {}).items()}
    changes = {HEADER: header(**fields)(old[HEADER])} | ({EMPTY_CAPTION: save_bytes(arrays)} if arrays else {})
    with pytest.raises(UsageError, match="its .encoding.json cannot be used .it is damaged"):
        inspect_shards([changed(with_captions[0], tmp_path / "0.tar", changes)], PREPARATION)


def reshaped(shard: str, path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """A copy of an encoded shard in which these arrays have other shapes, with a header and tags that say so."""
    old = read_encoding(shard)
    embeddings = {name: shapes.get(name, shape) for name, shape in old.embeddings.items()}
    empty = {name: np.zeros(shape, np.float16) for name, shape in embeddings.items()}
    moments = shapes.get("moments", old.moments)
    new = dataclasses.replace(old, moments=moments, embeddings=embeddings, empty_caption=empty)
    changes: dict[str, bytes | None] = dict(new.header_files())
    for name, content in contents(shard).items():
        if name.endswith(LATENTS_EXTENSION):
            arrays = load_bytes(content)
            captions = {name: len(arrays[name]) for name in embeddings}
            arrays = {name: array for name, array in arrays.items() if name != "encoding"}
            arrays |= {name: np.ones(moments, np.float16) for name in arrays if name.endswith("moments")}
            arrays |= {name: np.ones((captions[name], *shape), np.float16) for name, shape in embeddings.items()}
            changes[name] = new.pack(arrays)
    return changed(shard, path, changes)


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    ("family", "shapes"),
    [
        *(("sd", {"moments": moments}) for moments in [(8, 1, 1), (6, 4, 4), (10, 4, 4), (8, 2, 2), (8, 32, 32)]),
        *(("sd", {"encoder_hidden_states": shape}) for shape in [(77, 32), (1, 64), (76, 64), (77, 65)]),
        ("sdxl", {"moments": (32, 4, 4)}),
        ("sdxl", {"text_embeds": (63,)}),
        ("sdxl", {"text_embeds": (1280,)}),
        ("sdxl", {"encoder_hidden_states": (77, 64)}),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_the_teacher_are_refused(family, shapes, pictures, teachers, tmp_path):
    """Such shards were trained on, or ended in a traceback: all in them fits together, but not the networks."""
    good = encoded(pictures, tmp_path / "good", teachers[family], captions=True)[0]
    teacher, of = Teacher(teachers[family]), FAMILIES[family]
    check_encoding(read_encoding(good), teacher, of)
    bad = inspect_shards([reshaped(good, tmp_path / "0.tar", shapes)], PREPARATION)
    assert bad.usable and not bad.dropped
    (name, shape), given = next(iter(shapes.items())), read_encoding(good)
    right = given.moments if name == "moments" else given.embeddings[name]
    wrong, right = ("x".join(map(str, sides)) for sides in (shape, right))
    with pytest.raises(
        UsageError, match=rf"{name} {wrong}\b.* where the teacher gives .*{name} {right}\b.*ncode the pict"
    ):
        check_encoding(bad.preparation.encoding, teacher, of)


@pytest.mark.hostile("shards")
def test_the_header_is_read_once(latents, tmp_path):
    """A shard of nothing but headers is not read to its end."""
    old = contents(latents[0])
    write_tar(tmp_path / "0.tar", [(HEADER, old[HEADER]), (HEADER, b"{broken"), *old.items()])
    assert read_encoding(str(tmp_path / "0.tar")) == read_encoding(latents[0])


@pytest.mark.hostile("shards")
def test_names_in_a_header_reach_no_terminal(latents, tmp_path):
    evil = "\x1b]0;x\x07\u202e"
    fields = {"vae_name": evil, "vae_dtype": evil, "text_name": evil, "vae": evil, "filters": [evil]}
    shard = changed(latents[0], tmp_path / "0.tar", {HEADER: header(**fields)(contents(latents[0])[HEADER])})
    encoding = read_encoding(shard)
    said = [str(encoding), *encoding.differences(read_encoding(latents[0]))]
    said += read_encoding(latents[0]).differences(encoding)
    assert all(text.isprintable() for text in said), said


@pytest.mark.hostile("shards")
def test_a_shard_that_lost_its_header_is_refused(latents, tmp_path):
    with pytest.raises(UsageError, match="its shard has lost its first file"):
        inspect_shards([changed(latents[0], tmp_path / "0.tar", {HEADER: None})], PREPARATION)


def _as_npy(arrays):
    file = io.BytesIO()
    np.save(file, np.array([TouchesFile("hostile-was-here")], dtype=object), allow_pickle=True)
    return file.getvalue()


def _with(name, change):
    return lambda arrays: save_bytes(arrays | {name: change(arrays[name])})


def _not_finite(value):
    def change(array):
        array = array.copy()
        array[-1, -1, -1] = value
        return array

    return change


HOSTILE = {
    "cut": lambda arrays: save_bytes(arrays)[:-100],
    "empty": lambda arrays: b"",
    "pickle": lambda arrays: pickle.dumps(TouchesFile("hostile-was-here")),
    "pickled npy": _as_npy,
    "a header of 2**60 bytes": lambda arrays: (2**60).to_bytes(8, "little") + save_bytes(arrays)[8:],
    "a header of a megabyte": lambda arrays: save_bytes(arrays, {"more": "m" * 2**20}),
    "more at the end": lambda arrays: save_bytes(arrays) + b"more",
    "no tag": lambda arrays: save_bytes({name: array for name, array in arrays.items() if name != "encoding"}),
    "a short tag": _with("encoding", lambda tag: tag[:8]),
    "wrong shape": _with("moments", lambda moments: moments[:, :4]),
    "wrong dtype": _with("moments", lambda moments: moments.astype(np.float32)),
    "NaN": _with("moments", _not_finite(np.nan)),
    "infinite": _with("mirrored_moments", _not_finite(-np.inf)),
    "no mirror image": lambda arrays: save_bytes({n: a for n, a in arrays.items() if n != "mirrored_moments"}),
    "no sizes": _with("sizes", lambda sizes: sizes[:1]),
    "no height": _with("sizes", lambda sizes: sizes * [[1, 1], [1, 1], [0, 1]]),
    "a crop outside": _with("sizes", lambda sizes: sizes + [[0, 0], [0, 99], [0, 0]]),
    "negative": _with("sizes", lambda sizes: sizes - [[9999, 0], [0, 0], [0, 0]]),
}


ONE_SIDED = ("wrong shape", "wrong dtype", "NaN", "infinite", "no mirror image")


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_latents_are_dropped_with_a_reason(latents, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    good = contents(latents[0])
    name = f"deep/0_1.{LATENTS_EXTENSION}"
    shard = changed(latents[0], tmp_path / "0.tar", {name: HOSTILE[kind](load_bytes(good[name]))})
    preparation = dataclasses.replace(PREPARATION, random_flip=True)
    iterator = StreamIterator(stream_of([shard], preparation, batch_size=1), worker=0, workers=0)
    delivered: set[str] = set()
    while iterator.epoch < 6:  # with both flips
        (caption,) = next(iterator)["captions"]
        delivered.add(caption)
    drops = iterator.dropped[DAMAGED_LATENTS]
    if kind in ONE_SIDED:  # the other of picture and mirror image is good
        assert 0 < drops < 6 and "caption 0-1" in delivered
    else:
        assert drops >= 6 and "caption 0-1" not in delivered
    assert delivered >= {"caption 0-0", "caption 0-2", "caption 0-4"} and set(iterator.dropped) == {DAMAGED_LATENTS}
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    "change",
    [
        lambda states: states.astype(np.float32),
        lambda states: states.astype(np.int16),
        lambda states: states[:, :-1],
        lambda states: states[..., :-1],
        lambda states: states[0],
        lambda states: np.concatenate([states, states]),
        lambda states: states[:0],
        _not_finite(np.inf),
        _not_finite(np.nan),
    ],
)
def test_hostile_embeddings_are_dropped_with_a_reason(with_captions, tmp_path, change):
    """At the first look into the shards already."""
    name = f"deep/0_1.{LATENTS_EXTENSION}"
    arrays = load_bytes(contents(with_captions[0])[name])
    content = save_bytes(arrays | {"encoder_hidden_states": change(arrays["encoder_hidden_states"])})
    shard = changed(with_captions[0], tmp_path / "0.tar", {name: content})
    report = inspect_shards([shard], PREPARATION)
    assert report.dropped == {DAMAGED_LATENTS: 1} and report.usable == 4


@pytest.mark.hostile("shards")
def test_arrays_are_found_wherever_they_are_in_the_file(latents):
    """Files of the same shapes share a header; those of other writers have more arrays, in another order."""
    encoding = read_encoding(latents[0])
    content = next(content for name, content in contents(latents[0]).items() if name.endswith(LATENTS_EXTENSION))
    arrays = load_bytes(content)
    others = {"moments": arrays["moments"] + 1}
    more = {"another": np.arange(7.0)}  # float64: comes first
    for changes in ({}, others, more, others | more):
        for written in (save_bytes(arrays | changes), save_bytes(arrays | changes, {"by": "another"})):
            for mirrored in (False, True):
                found = unpack(written, encoding, mirrored=mirrored)
                name = "mirrored_moments" if mirrored else "moments"
                np.testing.assert_array_equal(found.moments, (arrays | changes)[name], strict=True)
                assert found.picture_size == tuple(arrays["sizes"][2])


@pytest.mark.hostile("shards")
def test_embeddings_that_do_not_fit_the_captions_are_dropped(with_captions, tmp_path):
    """Someone edited the captions: it is unknown which embedding belongs to which."""
    changes = {"0_0.txt": b"", "0_1.json": json.dumps({"caption": ["a", "b"]}).encode(), "0_1.txt": None}
    shard = changed(with_captions[0], tmp_path / "0.tar", changes | {f"0_2.{LATENTS_EXTENSION}": None})
    stream = stream_of([shard], shuffle_window=1, batch_size=1)
    assert next(iter(stream))["dropped"] == {NO_CAPTION: 1, DAMAGED_LATENTS: 1, NO_LATENTS: 1}


# ---------------------------------------------------------------------------------------------- another teacher


def vae_copy(teacher: str, folder: Path, change=lambda name, tensor: tensor) -> str:
    """The teacher's VAE in a folder of its own, with other weights."""
    shutil.copytree(Path(teacher) / "vae", folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: change(name, tensor) for name, tensor in weights.items()}, path)
    return str(folder)


@pytest.mark.hostile("teachers")
def test_another_vae_is_refused_and_the_same_in_another_form_is_not(latents, teacher, tmp_path, monkeypatch):
    encoding = read_encoding(latents[0])

    def check(**options):
        check_encoding(encoding, Teacher(**{"model": teacher} | options), sd)

    pipeline = sd.PIPELINE.from_pretrained(teacher, torch_dtype=torch.float32)
    save_single_file(pipeline, str(tmp_path / "one.safetensors"))
    pipeline.vae.half().save_pretrained(tmp_path / "half", variant="fp16")
    (tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors").rename(
        tmp_path / "half" / "diffusion_pytorch_model.safetensors"
    )
    decoder = vae_copy(teacher, tmp_path / "decoder", lambda name, w: w + 1 if name.startswith("decoder") else w)
    other = vae_copy(teacher, tmp_path / "other", lambda name, w: w * 1.01 if name == "encoder.conv_in.weight" else w)
    scaled = vae_copy(teacher, tmp_path / "scaled")
    config = Path(scaled) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 1.0}))
    pickled = vae_copy(teacher, tmp_path / "pickled")
    torch.save(load_file(Path(pickled) / "diffusion_pytorch_model.safetensors"), Path(pickled) / "x")
    (Path(pickled) / "x").rename(Path(pickled) / "diffusion_pytorch_model.bin")
    (Path(pickled) / "diffusion_pytorch_model.safetensors").unlink()

    check(vae=pickled)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("a model was loaded"))
    check()
    check(model=str(tmp_path / "one.safetensors"), config=teacher)
    check(vae=str(tmp_path / "half"))
    check(vae=decoder)  # the same encoder gives the same latents
    for vae in (other, scaled):
        with pytest.raises(UsageError, match=r"another VAE, sd\..* --pretrained_vae_model_name_or_path"):
            check(vae=vae)


@pytest.mark.hostile("teachers")
@pytest.mark.parametrize("family", FAMILIES)
def test_other_text_encoders_are_refused(family, pictures, teachers, tmp_path):
    shards = encoded(pictures, tmp_path / "out", teachers[family], captions=True)
    encoding, of = read_encoding(shards[0]), FAMILIES[family]
    check_encoding(encoding, Teacher(teachers[family]), of)
    folder = tmp_path / "teacher"
    shutil.copytree(teachers[family], folder)
    path = folder / ("text_encoder_2" if family == "sdxl" else "text_encoder") / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if name.endswith("q_proj.weight"))  # as after merging a LoRA
    save_file(weights | {name: weights[name] * 1.01}, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"other text encoders than the teacher's, those of {family}"):
        check_encoding(encoding, Teacher(str(folder)), of)
    check_encoding(dataclasses.replace(encoding, text=None), Teacher(str(folder)), of)
    if family == "sdxl":
        shutil.copy(Path(teachers[family]) / path.relative_to(folder), path)
        check_encoding(encoding, Teacher(str(folder)), of)
        index = folder / "model_index.json"
        zeros = not sdxl.uses_zeros_for_empty_caption(Teacher(str(folder)))
        index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": zeros}))
        with pytest.raises(UsageError, match="other text encoders"):
            check_encoding(encoding, Teacher(str(folder)), of)
