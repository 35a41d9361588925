"""The shard stream: each sample once per epoch, exact restore, true geometry, and never stuck on bad data."""

import gzip
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from braceexpand import braceexpand
from PIL import Image

from lcm_distill.data import decode, raw, sources
from lcm_distill.data import loader as loader_module
from lcm_distill.data import shards as shards_module
from lcm_distill.data import stream as stream_module
from lcm_distill.data.decode import decode_picture
from lcm_distill.data.filters import FILTERED, parse_filters
from lcm_distill.data.loader import make_loader
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation, resize_and_crop
from lcm_distill.data.raw import CODE_EXTENSIONS, PICTURE_EXTENSIONS
from lcm_distill.data.shards import count_samples, expand_shards
from lcm_distill.data.stream import DropCounter, ShardStream, StreamIterator, deal_shards
from lcm_distill.errors import UsageError, shown

REPO = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(sources, "BACKOFF", 0.01)


def write_tar(path, files, mode="w"):
    """A tar of (name, content) pairs; content may be text or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise_picture(seed, size=(20, 16)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encode(Image.fromarray(values))


def coordinate_picture(width, height):
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return encode(Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1)))


def write_shards(folder, counts):
    """Shards with these numbers of good samples; the captions are 'shard-number'."""
    return [
        write_tar(
            folder / f"{s:03d}.tar",
            [
                file
                for i in range(count)
                for file in ((f"{s}_{i}.png", noise_picture(1000 * s + i)), (f"{s}_{i}.txt", f"{s}-{i}"))
            ],
        )
        for s, count in enumerate(counts)
    ]


def make_stream(shards, **options):
    preparation = {"resolution": 16}
    preparation |= {field.name: options.pop(field.name) for field in fields(Preparation) if field.name in options}
    defaults = {"batch_size": 1, "seed": 0, "shuffle_window": 5}
    return ShardStream(shards=shards, preparation=Preparation(**preparation), **defaults | options)


def read_epochs(shards, *, ranks=1, workers=0, epochs=1, **options):
    """consumer -> epoch -> batches of one sample, read without processes."""
    result = {}
    for rank, worker in itertools.product(range(ranks), range(max(1, workers))):
        stream = make_stream(shards, rank=rank, world_size=ranks, **options)
        iterator = StreamIterator(stream, worker=worker, workers=workers)
        mine = result[rank, worker] = [[] for _ in range(epochs)]
        while True:
            batch = next(iterator)
            if iterator.epoch >= epochs:
                break
            mine[iterator.epoch].append(batch)
    return result


def captions(batches):
    return [caption for batch in batches for caption in batch["captions"]]


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one["captions"] == other["captions"]
        for key in ("pixels", "original_sizes", "crop_top_lefts", "target_sizes"):
            assert torch.equal(one[key], other[key]), key
        assert one["dropped"] == other["dropped"]
        assert one["worker"] == other["worker"]


def take(iterator, count):
    return list(itertools.islice(iterator, count))


# ------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(
    ("counts", "ranks", "workers"),
    [
        ([7], 1, 0),
        ([16], 1, 4),  # one shard, four workers
        ([3], 2, 4),  # fewer samples than consumers
        ([5, 6, 7, 4], 1, 2),
        ([5, 6, 7, 4, 9], 2, 2),  # one shard left over
        ([5, 6, 7, 4, 9, 1, 0], 2, 2),  # three left over, one of them empty
        ([4, 5, 6], 3, 3),  # more consumers than shards
        ([2] * 11, 2, 1),
    ],
)
def test_each_sample_once_per_epoch(tmp_path, counts, ranks, workers):
    shards = write_shards(tmp_path, counts)
    everything = sorted(f"{s}-{i}" for s, count in enumerate(counts) for i in range(count))
    consumers = read_epochs(shards, ranks=ranks, workers=workers, epochs=3)
    for epoch in range(3):
        assert sorted(c for of in consumers.values() for c in captions(of[epoch])) == everything
    # each consumer reads as much as the others, and parts of at most two shards
    slots = {
        (epoch, consumer): deal_shards(len(counts), seed=0, epoch=epoch, consumer=consumer, consumers=len(consumers))
        for epoch in range(3)
        for consumer in range(len(consumers))
    }
    shares = {key: sum(part.high - part.low for part in parts) for key, parts in slots.items()}
    assert set(shares.values()) == {len(counts)}  # in units of 1/consumers of a shard
    for parts in slots.values():
        assert sum((part.low, part.high) != (0, len(consumers)) for part in parts) <= 2


def test_consumer_without_a_sample_gets_one_in_a_later_epoch(tmp_path):
    shards = write_shards(tmp_path, [1])
    for worker in range(4):
        iterator = StreamIterator(make_stream(shards), worker=worker, workers=4)
        assert next(iterator)["captions"] == ["0-0"]
        assert iterator.epoch == worker


def test_loader_with_four_workers_on_one_shard(tmp_path):
    loader = make_loader(make_stream(write_shards(tmp_path, [16])), 4)
    batches = take(iter(loader), 16)
    assert sorted(captions(batches)) == sorted(f"0-{i}" for i in range(16))
    assert [batch["worker"] for batch in batches] == [0, 1, 2, 3] * 4


def test_the_order_depends_on_seed_and_epoch(tmp_path):
    shards = write_shards(tmp_path, [6, 7, 8])
    first, second = captions_of_two_epochs(shards, seed=3)
    assert [first, second] == captions_of_two_epochs(shards, seed=3)
    assert first != second and sorted(first) == sorted(second)
    assert first != captions_of_two_epochs(shards, seed=4)[0]


def captions_of_two_epochs(shards, **options):
    return [captions(epoch) for epoch in read_epochs(shards, epochs=2, **options)[0, 0]]


def test_shuffle_stays_in_the_window(tmp_path):
    """Window 1 is the shard order; window 4 permutes fours; the limit in bytes ends a block early."""
    shards = write_shards(tmp_path, [10])
    files = [f"0-{i}" for i in range(10)]
    assert captions_of_two_epochs(shards, shuffle_window=1)[0] == files
    shuffled = captions_of_two_epochs(shards, shuffle_window=4)[0]
    assert shuffled != files
    for start in range(0, 10, 4):
        assert sorted(shuffled[start : start + 4]) == files[start : start + 4]
    # each block and each epoch has a permutation of its own
    epochs = captions_of_two_epochs(write_shards(tmp_path / "more", [40]), shuffle_window=8)
    orders = [tuple(int(c[2:]) % 8 for c in epoch[i : i + 8]) for epoch in epochs for i in range(0, 40, 8)]
    assert len(set(orders)) == 10


def test_shuffle_window_is_bounded_in_bytes(tmp_path, monkeypatch):
    shards = write_shards(tmp_path, [10])
    monkeypatch.setattr(stream_module, "MAX_BLOCK_BYTES", 1)
    assert captions_of_two_epochs(shards, shuffle_window=10)[0] == [f"0-{i}" for i in range(10)]


def test_draws_do_not_depend_on_who_reads(tmp_path):
    """Crop, flip and emptied captions of a sample come from (seed, epoch, sample)."""
    shards = write_shards(tmp_path, [6, 7, 8])

    def draws(epoch, **layout):
        consumers = read_epochs(shards, epochs=2, random_flip=True, **layout)
        batches = [batch for of in consumers.values() for batch in of[epoch]]
        return {b["captions"][0]: (b["pixels"].numpy().tobytes(), b["crop_top_lefts"].tolist()) for b in batches}

    assert draws(0) == draws(0, ranks=2, workers=3) == draws(0, workers=2, shuffle_window=100)
    assert draws(0) != draws(1)  # another epoch crops anew
    assert draws(0) != draws(0, seed=1)


def test_batches_are_full_and_run_on_across_epochs(tmp_path):
    shards = write_shards(tmp_path, [5, 5])
    batches = take(iter(make_stream(shards, batch_size=4)), 5)
    assert all(batch["pixels"].shape == (4, 3, 16, 16) for batch in batches)
    assert all(batch["pixels"].dtype == torch.uint8 for batch in batches)
    assert all(batch["original_sizes"].shape == batch["crop_top_lefts"].shape == (4, 2) for batch in batches)
    assert all(batch["target_sizes"].tolist() == [[16, 16]] * 4 for batch in batches)
    assert set(Counter(captions(batches)).values()) == {2}  # 20 samples are two epochs of 10


# ------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_restore_is_exact(tmp_path, workers):
    """Saved after every third batch, restored in a new loader: the same remaining batches, into the next epoch."""
    shards = write_shards(tmp_path / "good", [7, 6, 8, 5])
    bad = [("a.txt", "no picture"), ("b.png", noise_picture(1)), ("c.png", b"text"), ("c.txt", "no picture either")]
    shards.append(write_tar(tmp_path / "bad.tar", bad))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(shards[0]).read_bytes()[:1000])
    shards.append(str(cut))

    def loader():
        options = {"batch_size": 3, "random_flip": True, "proportion_empty_prompts": 0.3, "shuffle_window": 4}
        return make_loader(make_stream(shards, **options), workers)

    original, states, batches = loader(), [], []
    iterator = iter(original)
    for _ in range(27):
        states.append(original.state_dict())
        batches.append(next(iterator))
    assert all(of_worker["epoch"] >= 1 for of_worker in loader_module._find_states(states[-1]))
    assert {reason for batch in batches for reason in batch["dropped"]} > {raw.UNREADABLE_SHARD}
    for k in range(0, 27, 3):
        buffer = io.BytesIO()
        torch.save(states[k], buffer)
        assert len(buffer.getvalue()) < 10_000
        buffer.seek(0)
        again = loader()
        again.load_state_dict(torch.load(buffer, weights_only=True))
        assert_same_batches(take(iter(again), 27 - k), batches[k:])


def test_restore_costs_one_block(tmp_path, monkeypatch):
    """Only the block in use is read again, not the shards before it."""
    shards = write_shards(tmp_path, [4] * 10)
    stream = make_stream(shards, shuffle_window=4)
    iterator = iter(stream)
    take(iterator, 34)
    state = iterator.state_dict()
    expected = next(iterator)
    read, original = [], stream_module.read_shard
    monkeypatch.setattr(stream_module, "read_shard", lambda shard, **o: read.append(shard) or original(shard, **o))
    again = iter(stream)
    again.load_state_dict(state)
    assert_same_batches([next(again)], [expected])
    assert len(read) <= 2


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_restore_reads_a_shard_from_the_block_on(tmp_path, monkeypatch, suffix):
    """Reading a large shard up to there would cost a resumed run minutes; in a compressed one it is unavoidable."""
    shards = [write_tar(tmp_path / f"0.tar{suffix}", _numbered(range(60)), mode="w:gz" if suffix else "w")]
    stream = make_stream(shards, shuffle_window=10)
    iterator = iter(stream)
    for taken in (7, 20, 26, 7):  # at a boundary of blocks, and inside; the end of the shard
        take(iterator, taken)
        state, offsets = iterator.state_dict(), []
        original = stream_module.read_shard

        def spy(*args, original=original, offsets=offsets, **options):
            offsets.append(options["offset"])
            return original(*args, **options)

        expected = take(iterator, 3)
        again = iter(stream)
        again.load_state_dict(state)
        with monkeypatch.context() as patch:
            patch.setattr(stream_module, "read_shard", spy)
            assert_same_batches(take(again, 3), expected)
        assert bool(offsets[0]) == (not suffix and state["block"] in (2, 5)), state
        iterator = iter(stream)
        iterator.load_state_dict(state)


def _numbered(numbers):
    return [file for n in numbers for file in ((f"{n}.png", noise_picture(n)), (f"{n}.txt", str(n)))]


def test_resampled_shards_come_with_replacement(tmp_path):
    """As many shards as there are, drawn anew: some twice, with other draws each time; the same for one seed."""
    counts = [4] * 9
    shards = write_shards(tmp_path, counts)
    one, again = (read_epochs(shards, workers=2, epochs=3, resampled=True, random_flip=True) for _ in range(2))
    for consumer, epochs in one.items():
        for first, second in zip(epochs, again[consumer], strict=True):
            assert_same_batches(first, second)
    for epoch in range(3):
        read = Counter(c for of in one.values() for c in captions(of[epoch]))
        assert read.total() == sum(counts) and set(read.values()) > {1}
        of_shard = Counter(c.split("-")[0] for c in read.elements())
        assert all(count % 4 == 0 for count in of_shard.values())
    twice = [c for of in one.values() for c in captions(of[0])]
    repeated = next(c for c, n in Counter(twice).items() if n > 1)
    pictures = [b["pixels"] for of in one.values() for b in of[0] if b["captions"] == [repeated]]
    corners = [b["crop_top_lefts"] for of in one.values() for b in of[0] if b["captions"] == [repeated]]
    assert not torch.equal(pictures[0], pictures[1]) or not torch.equal(corners[0], corners[1])
    parts = [deal_shards(9, seed=1, epoch=e, consumer=0, consumers=1, resampled=True) for e in range(2)]
    assert [p.shard for p in parts[0]] != [p.shard for p in parts[1]]


@pytest.mark.parametrize(("ranks", "workers", "new_ranks", "new_workers"), [(1, 2, 1, 0), (1, 0, 1, 1), (2, 1, 1, 1)])
def test_restore_with_another_layout_continues_at_the_epochs_start(
    tmp_path, caplog, ranks, workers, new_ranks, new_workers
):
    shards = write_shards(tmp_path, [4, 5, 6])
    saved = make_loader(make_stream(shards, world_size=ranks), workers)
    take(iter(saved), 24)  # in the second epoch, or, of two ranks, the fourth
    state = saved.state_dict()
    epoch = min(of_worker["epoch"] for of_worker in loader_module._find_states(state))
    assert epoch >= 1
    restored = make_loader(make_stream(shards, world_size=new_ranks), new_workers)
    with caplog.at_level(logging.WARNING):
        restored.load_state_dict(state)
    assert f"start of epoch {epoch}" in caplog.text and "->" in caplog.text
    fresh = read_epochs(shards, ranks=new_ranks, workers=new_workers, epochs=epoch + 1)[0, 0][epoch]
    assert captions(take(iter(restored), len(fresh))) == captions(fresh)


@pytest.mark.hostile("shards")
def test_restore_with_other_shards_is_logged(tmp_path, caplog):
    shards = write_shards(tmp_path, [4, 5, 6])
    loader = make_loader(make_stream(shards[:2]), 0)
    take(iter(loader), 3)
    other = make_loader(make_stream(shards), 0)
    other.load_state_dict(loader.state_dict())
    assert re.search(
        r"exactly where it was saved \(shards \w+ -> \w+\); it continues at the start of epoch 0", caplog.text
    )
    caplog.clear()
    moved = [write_tar(tmp_path / "moved" / Path(s).name, []) for s in shards[:2]]  # same names elsewhere: same data
    make_loader(make_stream(moved), 0).load_state_dict(loader.state_dict())
    assert not caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(tmp_path, workers):
    """Creating a loader's iterator used to draw from torch's generator, so a resumed run drew other numbers."""
    shards = write_shards(tmp_path, [6])
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    take(iter(make_loader(make_stream(shards, random_flip=True), workers)), 8)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_close_ends_the_workers_and_keeps_the_state(tmp_path):
    loader = make_loader(make_stream(write_shards(tmp_path, [6])), 2)
    take(iter(loader), 3)
    state = loader.state_dict()
    pids = [worker.pid for worker in loader._iterator._workers]
    start = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - start < 4
    assert not any(is_running(pid) for pid in pids)
    assert loader.state_dict() == state


def test_stream_can_be_sent_to_a_spawned_worker(tmp_path):
    stream = make_stream(write_shards(tmp_path, [6]), batch_size=2)
    assert_same_batches(take(iter(pickle.loads(pickle.dumps(stream))), 3), take(iter(stream), 3))


WORKERS_SCRIPT = """
import sys, time
from lcm_distill.data.preparation import Preparation
from lcm_distill.data.loader import make_loader
from lcm_distill.data.stream import ShardStream
stream = ShardStream(shards=sys.argv[1:2], preparation=Preparation(resolution=16), batch_size=1, seed=0)
loader = make_loader(stream, 2)
iterator = iter(loader)
next(iterator)
print(*(worker.pid for worker in loader._iterator._workers), flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


@pytest.mark.hostile("signals")
@pytest.mark.parametrize("end", ["exit", "wait"])
def test_workers_end_with_their_parent(tmp_path, end):
    """Whether the program exits or is killed, no worker survives it."""
    (shard,) = write_shards(tmp_path, [6])
    command = [sys.executable, "-c", WORKERS_SCRIPT, shard, end]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if end == "wait":
            parent.kill()
        assert parent.wait(timeout=15) == (0 if end == "exit" else -9)
    deadline = time.monotonic() + 15
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------ filters and limits


def _filtered_shards(tmp_path):
    files = []
    for n in range(20):
        meta = {"aesthetic": n / 2, "pwatermark": n / 20} if n % 4 else {"other": 1}
        files += [
            (f"{n}.png", noise_picture(n, size=(16 + n, 40))),
            (f"{n}.txt", str(n)),
            (f"{n}.json", json.dumps(meta)),
        ]
    return [write_tar(tmp_path / "0.tar", files)]


@pytest.mark.parametrize(
    ("options", "passes", "reason"),
    [
        ({"filters": parse_filters(["aesthetic>=5"])}, lambda n: n >= 10 or n % 4 == 0, "--filter 'aesthetic>=5'"),
        ({"filters": parse_filters(max_pwatermark=0.5)}, lambda n: n <= 10 or n % 4 == 0, "--max_pwatermark 0.5"),
        ({"filters": parse_filters(min_aesthetic=3)}, lambda n: n >= 6 or n % 4 == 0, "--min_aesthetic 3"),
        ({"min_image_size": 25}, lambda n: n >= 9, "--min_image_size 25"),
    ],
)
def test_filters_reject_by_their_condition_and_never_for_a_missing_key(tmp_path, options, passes, reason):
    """The public programs silently reject all SDXL samples with other JSON keys."""
    shards = _filtered_shards(tmp_path)
    (epoch,) = read_epochs(shards, **options)[0, 0]
    expected = [str(n) for n in range(20) if passes(n)]
    assert sorted(captions(epoch), key=int) == expected
    iterator = iter(make_stream(shards, **options))
    take(iterator, len(expected) + 1)
    assert dict(iterator.dropped)[f"{FILTERED} {reason}"] >= 20 - len(expected)
    report = inspect_shards(shards, Preparation(resolution=16, **options), limit=20)
    assert f"{len(expected)} of 20 samples pass" in str(report) and reason in str(report)


def test_values_of_another_kind_are_counted_and_reported(tmp_path, caplog):
    """A filter that could compare nothing let everything pass in silence."""
    values = [0.1, "unknown", "unknown", True, [1]]
    files = [
        file
        for n, value in enumerate(values)
        for file in ((f"{n}.png", GOOD), (f"{n}.txt", str(n)), (f"{n}.json", json.dumps({"punsafe": value})))
    ]
    filters = parse_filters(["punsafe<0.5", "nsfw=false"])
    shards = [write_tar(tmp_path / "0.tar", files)]
    report = inspect_shards(shards, Preparation(resolution=16, filters=filters))
    assert report.usable == 4 and report.not_compared == {
        "--filter 'punsafe<0.5' (the value is text)": 2,
        "--filter 'punsafe<0.5' (the value is a list)": 1,
        "--filter 'nsfw=false' (no such key, or null)": 5,
    }
    assert "not compared:    5 x --filter 'nsfw=false' (no such key, or null), 2 x" in str(report)
    take(iter(make_stream(shards, filters=filters)), 4)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all("a filter cannot compare" in message for message in messages)
    assert any("the value is text" in message for message in messages) and "no such key" not in "".join(messages)


def test_filters_that_let_nothing_pass_are_reported(tmp_path):
    preparation = Preparation(resolution=16, filters=parse_filters(["aesthetic>99", "other>1"]))
    with pytest.raises(UsageError, match=r"20 of 20 samples are filtered out: give milder filters") as error:
        inspect_shards(_filtered_shards(tmp_path), preparation)
    assert "5 x filtered out by --filter 'other>1'" in str(error.value)


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_end_the_run_with_their_reasons(tmp_path, monkeypatch, workers):
    """If nine of ten samples are silently lost, a run trains on other data than its user thinks."""
    monkeypatch.setattr(stream_module, "MIN_SEEN", 50)
    files = [
        file
        for n in range(100)
        for file in ((f"{n}.png", noise_picture(n) if n % 10 == 0 else b"text"), (f"{n}.txt", str(n)))
    ]
    shards = [write_tar(tmp_path / f"{k}.tar", files) for k in range(2)]
    loader = make_loader(make_stream(shards, max_bad_fraction=0.8), workers)
    with pytest.raises(UsageError, match=r"samples cannot be used, more than --max_bad_fraction 0.8") as error:
        take(iter(loader), 100)
    loader.close()
    assert f"x {raw.NOT_A_PICTURE}" in str(error.value) and "Traceback" not in str(error.value)
    loader = make_loader(make_stream(shards, max_bad_fraction=0.95), workers)
    take(iter(loader), 60)
    loader.close()


def test_a_worker_that_finds_nothing_logs_it(tmp_path, monkeypatch, caplog):
    """With a terabyte of shards without captions a run stood at 0 % for hours, and nothing was logged."""
    monkeypatch.setattr(stream_module, "WARN_AFTER_DROPS", 16)
    files = [(f"{n}.png", b"text" if n < 90 else noise_picture(n)) for n in range(100)]
    files = [file for picture in files for file in (picture, (picture[0].replace("png", "txt"), "x"))]
    take(iter(make_stream([write_tar(tmp_path / "0.tar", files)], shuffle_window=1)), 1)
    messages = [record.getMessage() for record in caplog.records]
    assert [re.search(r"none of the last (\d+)", text)[1] for text in messages] == ["16", "32", "64"]
    assert f"64 x {raw.NOT_A_PICTURE}" in messages[-1]


def test_filtered_samples_are_not_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "MIN_SEEN", 10)
    options = {"filters": parse_filters(["aesthetic>=9"]), "max_bad_fraction": 0.1}
    take(iter(make_stream(_filtered_shards(tmp_path), **options)), 30)


# ------------------------------------------------------------------------------------------ geometry and colours


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (32, 32)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_crop_corner_is_where_the_pixels_come_from(tmp_path, size, flip, center):
    """With the shorter side at the resolution already, each pixel's colour is its place in the picture."""
    width, height = size
    files = [(f"{i}.{e}", c) for i in range(24) for e, c in (("png", coordinate_picture(*size)), ("txt", "x"))]
    shards = [write_tar(tmp_path / "0.tar", files)]
    (epoch,) = read_epochs(shards, resolution=32, random_flip=flip, center_crop=center)[0, 0]
    flipped = set()
    for batch in epoch:
        columns, rows, _ = batch["pixels"][0].int()
        ((top, left),) = batch["crop_top_lefts"].tolist()
        is_flipped = bool(columns[0, 0] > columns[0, 1])
        flipped.add(is_flipped)
        own = columns if not is_flipped else width - 1 - columns  # the column in the picture as it was cropped
        assert torch.equal(own, left + torch.arange(32).expand(32, 32))
        assert torch.equal(rows, top + torch.arange(32)[:, None].expand(32, 32))
        assert batch["original_sizes"].tolist() == [[height, width]]
        if center:
            assert (top, left) == ((height - 32) // 2, (width - 32) // 2)
    assert flipped == ({False, True} if flip else {False})
    corners = {tuple(batch["crop_top_lefts"][0].tolist()) for batch in epoch}
    assert (len(corners) > 4) == (size != (32, 32) and not center)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
@pytest.mark.parametrize("size", [(90, 64), (61, 200), (13, 17), (500, 31)])
def test_both_ways_to_resize_are_resize_then_crop(resample, size):
    values = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    for top, left in ((0.0, 0.0), (0.5, 0.5), (0.999, 0.999), (0.3, 0.8)):
        square, (y, x), width = resize_and_crop(
            image, true_size=size[::-1], resolution=32, resample=resample, top=top, left=left
        )
        height = 32 * size[1] // min(size)
        assert width == 32 * size[0] // min(size)
        assert 0 <= y <= height - 32 and 0 <= x <= width - 32
        reference = image.resize((width, height), resample).crop((x, y, x + 32, y + 32))
        difference = np.abs(np.asarray(square, dtype=int) - np.asarray(reference, dtype=int))
        assert difference.max() <= 4 and difference.mean() < 0.3  # of white noise: rounding between two passes


def test_random_crop_reaches_both_ends():
    image = Image.new("RGB", (40, 32))
    corners = [
        resize_and_crop(image, true_size=(32, 40), resolution=32, resample=2, top=0.5, left=left)[1][1]
        for left in np.linspace(0, 1, 91)[:-1].tolist()
    ]
    assert Counter(corners) == dict.fromkeys(range(9), 10)


def test_a_large_jpeg_is_decoded_small_and_shows_the_same():
    """At a quarter of the work; the place of the crop and the size are those of the true picture."""
    rows, columns = np.mgrid[:1200, :1801] / 1800
    content = encode(Image.fromarray((255 * np.stack([columns, rows, columns * rows], -1)).astype(np.uint8)), "JPEG")
    small, size = decode_picture(content, resolution=128)
    full, _ = decode_picture(content)
    assert size == (1200, 1801) and full.size == (1801, 1200) and small.size == (226, 150)
    crop = {"true_size": size, "resolution": 128, "resample": 2, "top": 0.5, "left": 0.7}
    (first, corner, width), (second, other_corner, other_width) = (resize_and_crop(i, **crop) for i in (small, full))
    assert corner == other_corner and width == other_width == 192
    assert np.abs(first.astype(int) - second.astype(int)).max() <= 4
    rotated = Image.Exif()
    rotated[0x0112] = 6
    upright, size = decode_picture(encode(Image.open(io.BytesIO(content)), "JPEG", exif=rotated), resolution=128)
    assert size == (1801, 1200) and upright.size == (150, 226)


def test_the_size_of_a_turned_jpeg_that_is_nearly_square():
    """Decoded at an eighth it is square, and its true size was that of the picture before it was turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(Image.new("RGB", (800, 797)), "JPEG", exif=exif)
    picture = decode.read_picture(content, resolution=90)
    assert picture.image.size == (100, 100) and picture.size == (800, 797) and picture.turned


@pytest.mark.parametrize("extension", PICTURE_EXTENSIONS)
def test_every_kind_of_picture_is_read(tmp_path, extension):
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "tif": "TIFF"}.get(extension, extension.upper())
    if kind == "AVIF" and kind not in decode.PILLOW_FORMATS:
        pytest.skip("this Pillow has no AVIF")
    files = [(f"a.{extension.upper()}", encode(Image.new("RGB", (20, 24), "red"), kind)), ("a.txt", "red")]
    batch = next(iter(make_stream([write_tar(tmp_path / "0.tar", files)])))
    assert (batch["pixels"].float().mean((0, 2, 3)) - torch.tensor([255.0, 0, 0])).abs().max() < 6


@pytest.mark.hostile("pictures")
@pytest.mark.parametrize("hidden_by", ["an earlier partial scan", "a marker without a length"])
def test_scans_cannot_hide_from_their_count(hidden_by):
    """A JPEG of 20 kB with hundreds of scans, each over all of the picture, kept a worker busy for an hour."""
    content = encode(Image.new("RGB", (64, 64), "red"), "JPEG")
    start = content.index(b"\xff\xda")
    length = int.from_bytes(content[start + 2 : start + 4], "big")
    full = content[start : content.rindex(b"\xff\xd9")]
    partial = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + full[2 + length :]
    if hidden_by == "an earlier partial scan":
        scans = partial + full + partial * 300
    else:
        scans = (partial + b"\xff\x01") * 300
    with pytest.raises(raw.BadSample, match="too large"):
        decode_picture(content[:start] + scans + b"\xff\xd9")
    assert decode_picture(content)[0].size == (64, 64)


def test_exif_rotation_is_undone():
    upright = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8)[:, None] * 8, 16, axis=1)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image, size = decode_picture(encode(upright.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes()))
    assert image.size == (16, 32)
    assert np.array_equal(np.asarray(image), np.asarray(upright))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 51)), "WEBP", (255, 204, 204)),
        (Image.new("LA", (8, 8), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("L", (8, 8), 77), "JPEG", (77, 77, 77)),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (8, 8), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", (10, 200, 30)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)), "PNG", (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(image, kind, expected):
    decoded, _ = decode_picture(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 3


def test_transparent_palette_becomes_white():
    content = encode(Image.new("P", (8, 8), 0), transparency=0)
    assert np.all(np.asarray(decode_picture(content)[0]) == 255)


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"original_height": 900, "original_width": 1200, "height": 9, "width": 12}, [900, 1200]),
        ({"height": 90, "width": 120}, [90, 120]),
        ({"original_height": 900, "width": 120}, [16, 20]),
        ({"original_height": 0, "original_width": 1200, "height": 90.0, "width": 120.0}, [90, 120]),
        ({"original_height": "x", "original_width": True, "height": 10**30, "width": float("nan")}, [16, 20]),
        ({"HEIGHT": 5}, [16, 20]),
        ({"original_width": "3000", "original_height": "2000"}, [2000, 3000]),
        ([1, 2], [16, 20]),
        ("{broken", [16, 20]),
        (b"\xff\xfe{", [16, 20]),
        ("[" * 100_000, [16, 20]),
        (None, [16, 20]),
    ],
)
def test_original_size(tmp_path, meta, expected):
    """SDXL takes (height, width); an unknown or broken JSON never drops the sample."""
    files = [("a.png", noise_picture(0)), ("a.txt", "x")]
    if meta is not None:
        files.append(("a.json", meta if isinstance(meta, (str, bytes)) else json.dumps(meta)))
    (batch,) = take(iter(make_stream([write_tar(tmp_path / "0.tar", files)])), 1)
    assert batch["original_sizes"].tolist() == [expected]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_original_size_of_a_turned_picture(tmp_path, kind, orientation):
    """img2dataset writes the sides as they are stored; SDXL is given those of the picture that it learns."""
    if kind not in decode.PILLOW_FORMATS:
        pytest.skip(f"this Pillow has no {kind}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.new("RGB", (100, 60)), kind, exif=exif)
    upright = [100, 60] if orientation >= 5 else [60, 100]  # (height, width)
    sizes = [{"width": 100, "height": 60}, {"width": upright[1], "height": upright[0]}, {}]
    sizes += [{"original_width": "1000", "original_height": "600", "width": 100, "height": 60}]
    files = [
        file
        for n, meta in enumerate(sizes)
        for file in ((f"{n}.jpg", content), (f"{n}.txt", str(n)), (f"{n}.json", json.dumps(meta)))
    ]
    batches = take(iter(make_stream([write_tar(tmp_path / "0.tar", files)], shuffle_window=1)), 4)
    assert [batch["original_sizes"].tolist() for batch in batches] == [
        [upright],
        [upright],
        [upright],
        [[10 * side for side in upright]],
    ]


# ---------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"txt": " a cat \n"}, "a cat"),
        ({"TXT": "a cat"}, "a cat"),
        ({"text": "a cat"}, "a cat"),
        ({"caption": "a cat", "json": '{"caption": "a dog"}'}, "a cat"),
        ({"json": '{"caption": "a cat"}'}, "a cat"),
        ({"json": '{"text": "a cat", "caption": null}'}, "a cat"),
        ({"txt": "", "json": '{"caption": "a cat"}'}, "a cat"),
        ({"txt": b"\xff\xff", "json": '{"caption": "a cat"}'}, "a cat"),
        ({"txt": b"\xef\xbb\xbfa cat"}, "a cat"),
        ({"json": '{"caption": "a \\ud83d cat"}'}, "a ? cat"),
        ({"json": '{"caption": ["a cat"]}'}, "a cat"),
        ({"txt": "x" * 10_000}, "x" * 4096),
    ],
)
def test_caption_sources(tmp_path, files, expected):
    named = [("a.PNG", noise_picture(0)), *((f"a.{extension}", content) for extension, content in files.items())]
    (batch,) = take(iter(make_stream([write_tar(tmp_path / "0.tar", named)])), 1)
    assert batch["captions"] == [expected]


def test_one_of_several_captions_is_drawn(tmp_path):
    files = [("a.png", noise_picture(0)), ("a.json", json.dumps({"caption": ["one", "two", "", 3, "three"]}))]
    batches = take(iter(make_stream([write_tar(tmp_path / "0.tar", files)])), 60)
    counts = Counter(captions(batches))
    assert set(counts) == {"one", "two", "three"} and min(counts.values()) > 8


COLUMN_FILES = {
    "txt": "of the txt", "caption": "of the file", "blip": " of blip\n", "blip.txt": "of blip.txt", "empty": " ",
    "json": json.dumps({
        "caption": "of the JSON", "empty": "of the JSON's empty", "TOP": "upper case", "top_caption": ["listed"],
        "meta": {"caption": "nested", "deep": {"er": "deeper"}}, "dot.ted": "spelled with a dot", "dot": {"ted": "no"},
        "json": {"json": "json in json"}, "pt": "um gato",
    }),
}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "expected", "source"),
    [
        (None, "of the txt", ".txt"),
        ("txt", "of the txt", ".txt"),
        ("caption", "of the file", ".caption"),  # a file takes precedence over a key of that name,
        ("json.caption", "of the JSON", 'JSON "caption"'),  # unless the JSON is named,
        ("empty", "of the JSON's empty", 'JSON "empty"'),  # or the file has no text
        (".blip", "of blip", ".blip"),
        (" BLIP ", "of blip", ".blip"),  # extensions are read in lower case,
        ("TOP", "upper case", 'JSON "TOP"'),  # keys as they are written
        ("JSON.TOP", "upper case", 'JSON "TOP"'),
        ("blip.txt", "of blip.txt", ".blip.txt"),
        ("top_caption", "listed", 'JSON "top_caption"'),
        ("meta.caption", "nested", 'JSON "meta.caption"'),
        ("json.meta.deep.er", "deeper", 'JSON "meta.deep.er"'),
        ("dot.ted", "spelled with a dot", 'JSON "dot.ted"'),
        ("json.json.json", "json in json", 'JSON "json.json"'),
        ("json.pt", "um gato", 'JSON "pt"'),
    ],
)
def test_caption_column_names_the_only_source(tmp_path, column, expected, source):
    named = [("a.png", noise_picture(0)), *((f"a.{extension}", content) for extension, content in COLUMN_FILES.items())]
    shards = [write_tar(tmp_path / "0.tar", named)]
    (batch,) = take(iter(make_stream(shards, caption_column=column)), 1)
    assert batch["captions"] == [expected] and not batch["dropped"]
    assert inspect_shards(shards, Preparation(resolution=16, caption_column=column)).caption_sources == {source: 1}


@pytest.mark.parametrize("column", ["blip", "top", "json.top", "meta.top"])
def test_samples_without_the_caption_column_are_dropped_with_its_name(tmp_path, column):
    """Neither other captions nor values that are not text replace it."""
    key = column.rpartition(".")[2]
    files = [("none.txt", "another caption"), ("empty.blip", " \n"), ("empty.json", json.dumps({key: "", "meta": {}}))]
    files += [("number.json", json.dumps({key: 3, "meta": {key: {"x": "y"}}})), ("broken.json", "{")]
    files += [("meta.json", json.dumps({"meta": "text", "caption": "another"}))]
    names = sorted({name.partition(".")[0] for name, _ in files})
    files = [file for name in names for file in [(f"{name}.png", GOOD), *(f for f in files if f[0].startswith(name))]]
    good = [("z.png", GOOD), ("z.blip", "good"), ("z.json", json.dumps({"top": "good", "meta": {"top": "good"}}))]
    stream = make_stream([write_tar(tmp_path / "0.tar", files + good)], shuffle_window=1, caption_column=column)
    (batch,) = take(iter(stream), 1)
    assert batch["captions"] == ["good"]
    assert batch["dropped"] == {f'no caption in "{column}" (--caption_column)': 5}


def test_a_caption_column_that_is_not_utf8_is_reported_by_its_name(tmp_path):
    files = [("a.png", GOOD), ("a.blip", b"\xff\xfe\xfd"), ("a.txt", "another caption")]
    shards = [write_tar(tmp_path / "0.tar", files)]
    with pytest.raises(UsageError, match=r'(?s)^--caption_column blip .*1 x caption in "blip" .* is not UTF-8'):
        inspect_shards(shards, Preparation(resolution=16, caption_column="blip"))


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("column", [*sorted(CODE_EXTENSIONS), ".PKL", "blip.pickle", "pt.txt", "meta.npy"])
def test_a_caption_column_that_can_contain_code_is_refused(tmp_path, column):
    """Such a file would only be read as text; still, it is not even opened."""
    touched = tmp_path / "touched"
    shards = [write_tar(tmp_path / "0.tar", [("a.png", GOOD), (f"a.{column}", pickle.dumps(TouchesFile(touched)))])]
    for refused in (
        lambda: make_stream(shards, caption_column=column),
        lambda: inspect_shards(shards, Preparation(resolution=16, caption_column=column)),
        lambda: count_samples(shards, caption_column=column),
    ):
        with pytest.raises(UsageError, match=f"--caption_column {re.escape(column)}: .*can contain code.* json"):
            refused()
    assert not touched.exists()


@pytest.mark.hostile("shards")
def test_a_pickle_under_a_harmless_name_is_only_text(tmp_path):
    touched = tmp_path / "touched"
    payload = pickle.dumps(TouchesFile(touched), protocol=0)  # protocol 0 is ASCII
    shards = [write_tar(tmp_path / "0.tar", [("a.png", GOOD), ("a.blip", payload)])]
    (batch,) = take(iter(make_stream(shards, caption_column="blip")), 1)
    assert batch["captions"] == [payload.decode().strip()]
    assert not touched.exists()


@pytest.mark.parametrize("column", ["", "  ", ".", "json.", "blip.", "json", ".JSON", "blip.json", "jpg", "crop.png"])
def test_a_caption_column_without_a_caption_is_refused(column):
    with pytest.raises(UsageError, match=r"^--caption_column .*Give the extension of a text file"):
        make_stream(["0.tar"], caption_column=column)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_caption_column_that_no_sample_has_lists_those_that_exist(tmp_path, workers):
    """The same message from preflight and stream: the flag, and the extensions and keys to choose from."""
    files = [("a.png", GOOD), ("a.txt", "x"), ("a.json", '{"caption": "x", "url": 1}'), ("a.blip2", "x")]
    shards = [write_tar(tmp_path / "0.tar", files + [("b.png", GOOD), ("b.txt", "x")])]
    with pytest.raises(UsageError) as preflight:
        inspect_shards(shards, Preparation(resolution=16, caption_column="blip"))
    message = str(preflight.value)
    assert message.startswith("--caption_column blip gives nothing to train on. Give one of the file extensions")
    assert "file extensions: 2 x png, 2 x txt, 1 x blip2, 1 x json" in message
    assert "JSON keys:       1 x caption, 1 x url" in message
    assert 'dropped:         2 x no caption in "blip" (--caption_column)' in message
    loader = make_loader(make_stream(shards, caption_column="blip"), workers)
    with pytest.raises(UsageError) as stream:
        next(iter(loader))
    loader.close()
    assert str(stream.value) == message


def test_without_captions_the_preflight_names_the_flag_that_helps(tmp_path):
    shards = [write_tar(tmp_path / "0.tar", [("a.png", GOOD), ("a.blip", "x")])]
    with pytest.raises(UsageError, match=r"(?s)^--train_shards.*1 x blip.*--caption_column"):
        inspect_shards(shards, Preparation(resolution=16))


@pytest.mark.hostile("shards")
def test_a_bad_picture_is_not_blamed_on_the_caption_column(tmp_path):
    shards = [write_tar(tmp_path / "0.tar", [("a.png", b"?"), ("a.blip", "x")])]
    with pytest.raises(UsageError, match="^--train_shards_path_or_url gives nothing"):
        inspect_shards(shards, Preparation(resolution=16, caption_column="blip"))


def test_files_that_are_not_the_caption_column_do_not_matter(tmp_path):
    """Two files of one name drop a sample, but not when none of them is read."""
    shards = [write_tar(tmp_path / "0.tar", [("a.png", GOOD), ("a.txt", "x"), ("a.txt", "y"), ("a.blip", "good")])]
    assert captions(take(iter(make_stream(shards, caption_column="blip")), 1)) == ["good"]
    assert count_samples(shards, caption_column="blip") == 1 and count_samples(shards) == 0


@pytest.mark.parametrize("column", [None, "caption", "json.caption", "meta.captions"])
def test_each_epoch_draws_one_of_several_captions(tmp_path, column):
    """From (seed, epoch, sample) alone, each as often as the others, and never the empty one."""
    texts = ["one", "", "two", "  ", None, "three"]
    meta = json.dumps({"caption": texts, "meta": {"captions": texts}})
    files = [file for i in range(8) for file in ((f"{i}.png", GOOD), (f"{i}.json", meta))]
    shards = [write_tar(tmp_path / "0.tar", files)]

    def draw(epochs=12, **options):
        (consumer,) = read_epochs(shards, epochs=epochs, shuffle_window=1, caption_column=column, **options).values()
        return [captions(epoch) for epoch in consumer]

    epochs = draw()
    assert len({tuple(epoch) for epoch in epochs}) == 12
    assert len({caption for epoch in epochs for caption in epoch[:1]}) == 3  # the first sample's own, epoch by epoch
    counts = Counter(caption for epoch in epochs for caption in epoch)
    assert set(counts) == {"one", "two", "three"} and min(counts.values()) > 16  # 32 expected, 3.5 deviations
    assert epochs[:2] == draw(2) != draw(2, seed=1)


@pytest.mark.parametrize("proportion", [0.0, 0.5, 1.0])
def test_proportion_of_empty_prompts(tmp_path, proportion):
    batches = take(iter(make_stream(write_shards(tmp_path, [20]), proportion_empty_prompts=proportion)), 400)
    empty = captions(batches).count("")
    assert abs(empty - 400 * proportion) <= (40 if proportion == 0.5 else 0)  # 4 standard deviations
    # the other draws are the same whatever the proportion
    plain = take(iter(make_stream(write_shards(tmp_path, [20]))), 5)
    assert all(torch.equal(a["pixels"], b["pixels"]) for a, b in zip(plain, batches, strict=False))


# ---------------------------------------------------------------------------------------------------- bad data


def bomb():
    """A PNG that claims 30,000 x 30,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = ((len(chunk) - 4, chunk, zlib.crc32(chunk)) for chunk in (header, b"IDAT" + zlib.compress(bytes(1000))))
    packed = (struct.pack(">I", size) + chunk + struct.pack(">I", crc) for size, chunk, crc in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


class TouchesFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


GOOD = noise_picture(0)
BAD_SAMPLES = [
    (raw.NO_PICTURE, [("a.txt", "x")]),
    (raw.NO_PICTURE, [("a.psd", GOOD), ("a.txt", "x")]),
    (raw.NO_CAPTION, [("a.png", GOOD)]),
    (raw.NO_CAPTION, [("a.png", GOOD), ("a.txt", " \n")]),
    (raw.NO_CAPTION, [("a.png", GOOD), ("a.json", '{"prompt": "x"}')]),
    (raw.NO_CAPTION, [("a.png", GOOD), ("b/a.txt", "of another folder")]),
    (raw.CAPTION_NOT_UTF8, [("a.png", GOOD), ("a.txt", b"\xff\xfe\xfd")]),
    (raw.NOT_A_PICTURE, [("a.jpg", "text in place of a picture"), ("a.txt", "x")]),
    (raw.NOT_A_PICTURE, [("a.jpg", ""), ("a.txt", "x")]),
    (raw.NOT_A_PICTURE, [("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("a.txt", "x")]),
    (raw.DAMAGED_PICTURE, [("a.png", GOOD[:20]), ("a.txt", "x")]),
    (raw.DAMAGED_PICTURE, [("a.png", GOOD[: len(GOOD) // 2]), ("a.txt", "x")]),
    (raw.HUGE_PICTURE, [("a.png", bomb()), ("a.txt", "x")]),
    (raw.DUPLICATE_NAME, [("a.png", GOOD), ("a.txt", "x"), ("a.png", noise_picture(1)), ("a.txt", "y")]),
    (raw.DUPLICATE_NAME, [("a.png", GOOD), ("a.PNG", noise_picture(1)), ("a.txt", "y")]),
]


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_and_counted(tmp_path, workers):
    """All kinds of them in one shard, a good sample after each: all good ones come, and every count is right."""
    files = [("first.png", GOOD), ("first.txt", "first"), ("second.png", GOOD), ("second.txt", "second")]
    for i, (_, bad) in enumerate(BAD_SAMPLES):
        files += [(re.sub(r"\ba\.", f"bad{i}.", name), content) for name, content in bad]
        files += [(f"good{i}.png", GOOD), (f"good{i}.txt", str(i))]
    # File order, so that all of the first epoch's drops come before the second epoch's first sample(s).
    stream = make_stream([write_tar(tmp_path / "0.tar", files)], shuffle_window=1)
    expected = Counter(reason for reason, _ in BAD_SAMPLES)
    expected[raw.NO_PICTURE] += 1  # the caption of another folder is a sample of its own
    seen, counters = {}, {}
    for worker in range(max(1, workers)):
        iterator = StreamIterator(stream, worker=worker, workers=workers)
        counter = DropCounter()
        while iterator.epoch == 0:
            batch = next(iterator)
            seen.setdefault(iterator.epoch, []).extend(batch["captions"])
            counter.update(batch)
        counters[worker] = counter.total()
    assert sorted(seen[0]) == sorted(["first", "second", *map(str, range(len(BAD_SAMPLES)))])
    assert sum(map(Counter, counters.values()), Counter()) == expected


def test_drop_counter_totals_the_workers():
    counter = DropCounter()
    for worker, dropped in ((0, {"a": 1}), (1, {"a": 2, "b": 9}), (0, {"a": 3})):
        counter.update({"worker": worker, "dropped": dropped})
    assert list(counter.total().items()) == [("b", 9), ("a", 5)]  # the most frequent first
    assert str(counter) == "9 x b, 5 x a"


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("reason_and_files", BAD_SAMPLES, ids=lambda case: case[0])
def test_each_kind_of_bad_sample_has_its_reason(tmp_path, reason_and_files):
    reason, files = reason_and_files
    good = [("good.png", GOOD), ("good.txt", "good")]
    shards = [write_tar(tmp_path / "0.tar", [*files, *good])]
    stream = make_stream(shards, shuffle_window=1)  # in file order: the bad one comes first
    (batch,) = take(iter(stream), 1)
    assert batch["captions"] == ["good"]
    assert reason in batch["dropped"]
    report = inspect_shards(shards, Preparation(resolution=16))
    assert (report.usable, report.seen) == (1, 1 + sum(batch["dropped"].values()))
    assert dict(report.dropped) == batch["dropped"]
    assert reason in str(report)


def named(*names):
    """Files of these names: pictures, captions, or something else."""
    return [
        (name, GOOD if name.endswith(".png") else f"of {name}" if name.endswith(".txt") else "{}") for name in names
    ]


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    ("names", "lost", "reasons"),
    [
        ([f"photo v1.{i}.{e}" for i in range(9) for e in ("png", "txt")], 9, {}),
        ([f"d.ot/photo v1.{i}.{e}" for e in ("png", "txt") for i in range(9)], 9, {}),
        (["a.b.c.png", "a.b.c.txt", "a.b.d.PNG", "a.b.d.txt"], 2, {}),
        (["a.1.png", "b.1.png"], 2, {}),  # without a caption, too
        (["a.1.png", "a.1.json", "b.2.cls"], 1, {}),
        (["a.1.png", "a.1.txt", "a.png", "a.txt"], 1, {}),  # beside a sample of that key, before or after it
        (["a.png", "a.txt", "a.1.png", "a.1.txt"], 1, {}),
        (["a.png", "a.txt", "a.mask.png", "a.blip.txt"], 0, {}),  # other files of a sample
        (["a.mask.png", "a.png", "a.txt"], 0, {}),
        (["a.mask.png", "a.txt"], 0, {raw.NO_PICTURE: 1}),  # counted as a sample
        (["._a.b.png", "d/.a.b.png", "a.b.c.txt"], 0, {}),  # hidden files, and no picture
    ],
)
def test_pictures_with_dots_in_their_names_are_counted(tmp_path, names, lost, reasons):
    """Half of a shard was missing from the training, and no message said so."""
    files = [*named("0.png", "0.txt"), *named(*names), *named("z.png", "z.txt")]
    shards = [write_tar(tmp_path / "0.tar", files)]
    expected = ({raw.DOTTED_NAME: lost} if lost else {}) | reasons
    report = inspect_shards(shards, Preparation(resolution=16))
    assert report.dropped == expected and report.extensions.total() == len(files) - sum("/." in f"/{n}" for n in names)
    assert (raw.DOTTED_NAME in str(report)) == bool(lost)
    iterator = StreamIterator(make_stream(shards), worker=0, workers=0)
    delivered, dropped = [], {}
    while iterator.epoch == 0:
        dropped = dict(iterator.dropped)  # without those of the next epoch
        delivered += next(iterator)["captions"]
    assert dropped == expected and {"of 0.txt", "of z.txt"} <= set(delivered)
    for workers in (2, 3):  # which share the shard: one of them counts each
        total = Counter()
        for worker in range(workers):
            iterator = StreamIterator(make_stream(shards), worker=worker, workers=workers)
            for _ in iterator._read_epoch():
                pass
            total += iterator.dropped
        assert total == Counter({raw.DOTTED_NAME: lost})


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_restore_counts_dotted_names_once(tmp_path, suffix):
    files = [f for i in range(12) for f in named(f"{i}.1.png", f"{i}.1.txt", f"{i}.png", f"{i}.txt", f"{i}x.y.png")]
    shards = [write_tar(tmp_path / f"{n}.{suffix}", files, "w:gz" if "gz" in suffix else "w") for n in range(2)]
    stream = make_stream(shards, shuffle_window=3)
    iterator, states, batches = iter(stream), [], []
    for _ in range(30):
        states.append(iterator.state_dict())
        batches.append(next(iterator))
    assert batches[24]["dropped"][raw.DOTTED_NAME] >= 48
    for state, expected in zip(states, batches, strict=True):
        again = iter(stream)
        again.load_state_dict(state)
        assert_same_batches([next(again)], [expected])


@pytest.mark.hostile("shards")
def test_a_shard_of_a_million_dotted_names_takes_no_memory(tmp_path, monkeypatch):
    """Names are remembered until another key follows; a hostile tar has no other key."""
    monkeypatch.setattr(shards_module._Names, "MAX_REMEMBERED", 10)
    files = [*named("0.png", "0.txt"), *((f"a.{i}.png", "") for i in range(200))]
    report = inspect_shards([write_tar(tmp_path / "0.tar", files)], Preparation(resolution=16))
    assert report.dropped == {raw.DOTTED_NAME: 200}


@pytest.mark.parametrize(
    "extensions", [("png", "txt"), ("cls", "png", "txt"), ("txt", "png", "x.npy"), ("0.cls", "png", "json", "txt")]
)
def test_the_preflight_counts_the_files_of_the_samples_it_tried(tmp_path, extensions):
    """It said "16 of 16 samples" and "17 x jpg": the first file of the next sample was counted, too."""
    shards = [write_tar(tmp_path / "0.tar", named(*(f"{i}.{e}" for i in range(20) for e in extensions)))]
    for limit in (1, 16, 20):
        report = inspect_shards(shards, Preparation(resolution=16), limit=limit)
        assert report.seen == limit and report.extensions == dict.fromkeys(extensions, limit)


@pytest.mark.hostile("shards")
def test_nothing_in_a_shard_is_executed(tmp_path):
    """`wds.decode` unpickles .pyd and .pkl members: a shard from the internet could run anything."""
    touched = tmp_path / "touched"
    payload = pickle.dumps(TouchesFile(touched))
    extensions = ("pyd", "pkl", "pickle", "pth", "npy", "pt", "ten", "cls")
    files = [("a.png", GOOD), ("a.txt", "x"), *((f"a.{extension}", payload) for extension in extensions)]
    files += [("b.png", payload), ("b.txt", payload), ("b.json", payload)]
    shards = [write_tar(tmp_path / "0.tar", files)]
    inspect_shards(shards, Preparation(resolution=16))
    assert count_samples(shards) == 2
    assert set(captions(take(iter(make_stream(shards)), 4))) == {"x"}
    assert not touched.exists()
    pickle.loads(payload)  # the payload does work
    assert touched.exists()


def test_other_files_do_not_split_a_sample(tmp_path):
    files = [("d/a.png", GOOD), ("d/._a.jpg", b"finder"), ("d/a.npy", b"?"), (".hidden", b""), ("d/a.txt", "x")]
    shards = [write_tar(tmp_path / "0.tar", files)]
    assert captions(take(iter(make_stream(shards)), 2)) == ["x", "x"]


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_cut_tar_gives_its_complete_samples(tmp_path, suffix):
    """A tar cut at every tenth of its length: the samples before the cut, no crash, no repetition."""
    complete = Path(write_shards(tmp_path / "complete", [8])[0])
    plain = complete.read_bytes()
    with tarfile.open(complete) as tar:
        ends = [member.offset_data + member.size for member in tar if member.name.endswith(".txt")]
    spare = write_shards(tmp_path / "spare", [1])
    for tenth in range(10):
        cut = tmp_path / f"{tenth}{suffix}"
        length = len(plain) * tenth // 10
        compressed = zlib.compressobj(0, wbits=31)
        data = compressed.compress(plain[:length]) + compressed.flush(zlib.Z_FULL_FLUSH)
        cut.write_bytes(plain[:length] if suffix == ".tar" else data)
        consumer = read_epochs([str(cut), *spare], seed=tenth)[0, 0]
        expected = ["0-0"] + [f"0-{i}" for i, end in enumerate(ends) if end <= length]
        assert sorted(captions(consumer[0])) == sorted(expected)


@pytest.mark.hostile("shards")
def test_unreadable_shards_are_counted_once(tmp_path):
    """Several consumers share the remaining shards; only one of them counts a shard that cannot be read."""
    good = write_shards(tmp_path, [8, 8])
    (tmp_path / "not_a.tar").write_bytes(b"x" * 5000)
    (tmp_path / "nothing.tar").write_bytes(b"")
    shards = [*good, str(tmp_path / "not_a.tar"), str(tmp_path / "nothing.tar"), str(tmp_path / "gone.tar")]
    shards += ["pipe:exit 3", "http://127.0.0.1:9/000.tar"]
    for workers in (0, 4, 12):
        dropped = Counter()
        for worker in range(max(1, workers)):
            iterator = StreamIterator(make_stream(shards), worker=worker, workers=workers)
            for _ in iterator._read_epoch():
                pass
            dropped += iterator.dropped
        assert dropped == {raw.UNREADABLE_SHARD: 5}, workers


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_without_a_usable_sample_end_in_one_clear_error(tmp_path, workers):
    """Training used to stay at 0 % forever. The message is the same from a worker, without a traceback."""
    shards = [
        write_tar(tmp_path / "0.tar", [("a.png", GOOD), ("b.png", GOOD), ("c.psd", GOOD)]),
        write_tar(tmp_path / "1.tar", [("a.jpg", b"?"), ("a.txt", "x"), ("a.cls", "1")]),
        write_tar(tmp_path / "2.tar", []),
    ]
    loader = make_loader(make_stream(shards), workers)
    with pytest.raises(UsageError) as caught:
        next(iter(loader))
    loader.close()
    message = str(caught.value)
    with pytest.raises(UsageError, match=r"^--train_shards_path_or_url gives nothing to train on") as preflight:
        inspect_shards(shards, Preparation(resolution=16))
    assert message == str(preflight.value)
    assert "0 of 3 samples usable, in the first 3 of 3 shards" in message
    assert f"2 x {raw.NO_CAPTION}, 1 x {raw.NOT_A_PICTURE}" in message
    assert "1 x cls" in message and "1 x psd" in message
    assert "Traceback" not in message


def test_worker_with_only_bad_shards_waits_for_its_turn(tmp_path):
    """One good shard for four workers: each has epochs without a sample, and none stops."""
    good = write_shards(tmp_path, [3])
    bad = [write_tar(tmp_path / f"bad{i}.tar", [("a.png", GOOD)]) for i in range(3)]
    batches = take(iter(make_loader(make_stream(bad + good), 4)), 12)
    assert {batch["worker"] for batch in batches} == {0, 1, 2, 3}
    assert set(captions(batches)) == {"0-0", "0-1", "0-2"}


# ------------------------------------------------------------------------------------------- shards and preflight


def test_expand_shards(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "data", [1, 1, 1])
    nested = [write_tar(tmp_path / "nested" / name, []) for name in ("a/1.tar", "b/0.tar.gz", "b/1.TGZ")]
    for other in ("data/notes.txt", "data/000.json", "data/._000.tar", "nested/readme"):
        (tmp_path / other).write_text("x")
    assert expand_shards(shards[0]) == shards[:1]
    assert expand_shards(f"{tmp_path}/data/{{000..002}}.tar") == shards
    assert expand_shards(f"{tmp_path}/data/{{002,000}}.tar") == [shards[2], shards[0]]
    assert expand_shards(f"{tmp_path}/data") == shards
    assert expand_shards(f"{tmp_path}/data/00*") == shards
    assert expand_shards(f"{tmp_path}/*/0*.tar") == shards
    assert expand_shards(f"{tmp_path}/nested") == nested
    assert expand_shards(f"{tmp_path}/{{data,nested}}") == shards + nested
    assert expand_shards(f"{shards[1]}::{tmp_path}/nested") == [shards[1], *nested]
    assert expand_shards(f"file:{shards[0]}") == shards[:1]
    assert expand_shards("https://host/{00..02}.tar") == [f"https://host/{i:02d}.tar" for i in range(3)]
    assert expand_shards("pipe:aws s3 cp s3://b/{0..1}.tar -") == [f"pipe:aws s3 cp s3://b/{i}.tar -" for i in (0, 1)]
    monkeypatch.chdir(tmp_path)
    assert expand_shards("data") == [f"data/{i:03d}.tar" for i in range(3)]
    literal = write_tar(tmp_path / "odd{1,2}[x].tar", [])
    assert expand_shards(literal) == [literal]


@pytest.mark.hostile("folders")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (None, ["missing", "{000..010}"]),
        ("  ", ["missing"]),
        ("{tmp}/nowhere/0.tar", ["nowhere", "There is no folder", "Correct the path"]),
        ("{tmp}/data/{{000..004}}.tar", ["2 of the 5", "003.tar", "contains 3 x .tar (000.tar, 001.tar, 002.tar)"]),
        ("{tmp}/data/*.tgz", ["1 of the 1", "contains 3 x .tar"]),
        ("{tmp}/pictures", ["no .tar", "2 x .jpg", "1 x .txt", "pack_shards FOLDER OUT"]),
        ("{tmp}/empty", ["no .tar", "is empty"]),
        ("{tmp}/data/{{000", ["braces"]),
        ("s3://bucket/0.tar", ["s3:", "pipe:aws s3 cp"]),
    ],
)
def test_mistakes_in_the_shards_flag_are_explained(tmp_path, spec, words):
    write_shards(tmp_path / "data", [1, 1, 1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    for name in ("a.jpg", "b.jpg", "a.txt"):
        (tmp_path / "pictures" / name).write_text("x")
    with pytest.raises(UsageError, match="--train_shards_path_or_url") as caught:
        expand_shards(spec and spec.format(tmp=tmp_path))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.hostile("folders")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{0..9999999}", "10,000,000 names; at most 1,000,000"),
        ("x{0..9999}/{0..9999}.tar", "100,000,000 names"),
        ("{0..9999999999..7}.tar", "1,428,571,429 names"),
        ("{a..z}{a..z}{a..z}{a..z}{a..z}", "11,881,376 names"),
        ("{a,b}" * 60, "names"),
        ("{" + "{a,b}" * 20 + "{c,d},e}", "2,097,153 names"),
        ("{" + ",".join(["{0..399999}"] * 3) + "}", "1,200,000 names"),
        ("{x,{y,{z,{0..1000000}}}}", "1,000,004 names"),
        ("{" * 8 + "0..1000000" + "}" * 8, "1,000,001 names"),
        ("{" * 100_000, "do not match"),
        ("{a," * 100_000, "do not match"),
        ("{" * 9 + "0..9" + "}" * 9, "nested"),
        ("{0.." + "9" * 5000 + "}", "more than 18 digits"),
        ("{" + "0" * 100_000 + "1..2}", "more than 18 digits"),
        ("x" * 1000 + "{0..999999}", "names of 1,00"),
        ("a}b{c", "do not match"),
    ],
    ids=lambda value: value[:20],
)
def test_braces_that_stand_for_too_much_are_refused_at_once(spec, words):
    """They took gigabytes, or a traceback, before they were refused."""
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UsageError, match=f"^--train_shards_path_or_url: .*{words}"):
        expand_shards(spec)
    assert time.process_time() - start < 1
    if sys.platform == "linux":  # kilobytes; elsewhere bytes
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000


@pytest.mark.hostile("folders")
def test_a_list_of_braces_is_counted_together(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_SHARDS", 100)
    (tmp_path / "list.txt").write_text("http://host/{00..59}.tar\n" * 1000)
    for spec in (str(tmp_path / "list.txt"), "http://host/{00..59}.tar::http://host/{00..59}.tar"):
        with pytest.raises(UsageError, match="with what stands before it, 120 shards; at most 100"):
            expand_shards(spec)
    assert len(expand_shards("http://host/{00..59}.tar::http://host/{60..99}.tar")) == 100


@pytest.mark.hostile("folders")
@pytest.mark.parametrize(
    "url", ["http://[bad/x.tar", "http://exa[mple].com/x.tar", "https://host\u2100/x.tar", "s3://[/x"]
)
@pytest.mark.parametrize("listed", [False, True])
def test_what_is_no_url_is_refused(tmp_path, url, listed):
    """A traceback of the standard library."""
    (tmp_path / "shards.txt").write_text(url + "\n")
    with pytest.raises(UsageError, match=re.escape(f"--train_shards_path_or_url: {url} is not a URL (")):
        expand_shards(str(tmp_path / "shards.txt") if listed else url)


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("entry", ["a.txt", "{a.txt,b.tar}", "a.tx{t,t}", "{,./}a.txt", "A.LIST", "https://host/b.lst"])
def test_a_list_that_names_a_list_is_refused(tmp_path, entry):
    """One that named itself in braces: RecursionError."""
    (tmp_path / "a.txt").write_text(entry + "\n")
    with pytest.raises(UsageError, match="the list .*a.txt names another list"):
        expand_shards(str(tmp_path / "a.txt"))


@pytest.mark.hostile("folders")
def test_a_link_to_itself_beside_a_mistake_is_no_traceback(tmp_path):
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    for name in ("missing.tar", "loop.tar"):
        with pytest.raises(UsageError, match=f"1 of the 1 paths of .*{name}.* not found.*contains 1 x .tar"):
            expand_shards(str(tmp_path / name))


@pytest.mark.hostile("folders")
def test_a_folder_or_list_that_cannot_be_read_is_a_message(tmp_path, monkeypatch):
    """A traceback; as root every file can be read, so the system is asked to refuse."""
    (tmp_path / "a.txt").write_text("b.tar\n")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    for name in ("", "a.txt"):
        with pytest.raises(UsageError, match="cannot be read .*Permission denied.*permissions"):
            expand_shards(str(tmp_path / name))


@pytest.mark.hostile("shards")
@pytest.mark.parametrize(
    "url", ["reference://0::file://{tmp}/e.json", "simplecache::Reference://0::file://{tmp}/e.json"]
)
@pytest.mark.parametrize("listed", [False, True])
def test_templates_are_not_evaluated(tmp_path, url, listed):
    """What a file of references says is a program in Jinja: a list of shards may have been downloaded."""
    url = url.format(tmp=tmp_path)
    (tmp_path / "a.txt").write_text(url + "\n")
    (tmp_path / "e.json").write_text("{}")
    # On the command line :: separates shards.
    with pytest.raises(
        UsageError, match="reference: URLs are not opened" if listed or url[0] == "r" else "simplecache"
    ):
        expand_shards(str(tmp_path / "a.txt") if listed else url)


@pytest.mark.hostile("shards")
def test_a_fifo_is_refused_under_every_name_of_a_local_file(tmp_path):
    """`local:` is fsspec's name of it: opening the pipe waited for ever."""
    os.mkfifo(tmp_path / "a.tar")
    for name in ("local://{}", "LOCAL://{}", "file://{}", "local:{}"):
        with pytest.raises(UsageError, match="is a named pipe"):
            expand_shards(name.format(tmp_path / "a.tar"))


def test_braces_are_counted_as_they_are_expanded():
    pieces = ["{", "}", ",", "a", "0..3", "07..10", "a..e", "9..1..3", "\\", "x", "{1..3}", "{a,b}", "-2..2", "\n"]
    rng, counted = random.Random(0), 0
    for _ in range(20_000):
        pattern = "".join(rng.choices(pieces, k=rng.randint(1, 8)))
        try:
            count, characters = shards_module._count_expansion(pattern)
        except ValueError:
            continue
        names = list(braceexpand(pattern))
        counted += 1
        assert count == len(names) and characters >= sum(map(len, names)), pattern
    assert counted > 5000


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ({"shards": []}, "--train_shards_path_or_url"),
        ({"batch_size": 0}, "--train_batch_size"),
        ({"resolution": 0}, "--resolution"),
        ({"min_image_size": -1}, "--min_image_size"),
        ({"seed": -1}, "--seed"),
        ({"shuffle_window": 0}, "--shuffle_window"),
        ({"proportion_empty_prompts": 1.5}, "--proportion_empty_prompts"),
        ({"interpolation": "spline"}, "--interpolation_type"),
        ({"caption_column": "pkl"}, "--caption_column"),
    ],
)
def test_arguments_out_of_range_name_their_flag(option, flag):
    with pytest.raises(UsageError, match=f"^{flag} "):
        make_stream(**({"shards": ["0.tar"]} | option))


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(UsageError, match="^--dataloader_num_workers is -1; give 0 or more"):
        make_loader(make_stream(["0.tar"]), -1)


def test_pipe_and_compressed_shards_read_like_files(tmp_path):
    (shard,) = write_shards(tmp_path, [6])
    packed = tmp_path / "0.tgz"
    with tarfile.open(packed, "w:gz") as out, tarfile.open(shard) as tar:
        for member in tar:
            out.addfile(member, tar.extractfile(member))
    reference = take(iter(make_stream([shard])), 8)
    assert_same_batches(take(iter(make_stream([str(packed)])), 8), reference)
    assert_same_batches(take(iter(make_stream([f"pipe:cat {shard}"])), 8), reference)


def test_count_samples(tmp_path):
    shards = write_shards(tmp_path, [4, 0, 7])
    assert count_samples(shards) == 11
    odd = [("a.png", GOOD), ("b.txt", "x"), ("c.png", GOOD), ("c.json", "{}"), ("d.png", GOOD), ("d.png", GOOD)]
    odd += [("d.txt", "x"), ("e.cls", "x"), ("f.JPEG", GOOD), ("f.x", "?"), ("f.caption", "x")]
    assert count_samples([*shards, write_tar(tmp_path / "odd.tar.gz", odd, "w:gz")]) == 13
    (tmp_path / "broken.tar").write_bytes(b"x" * 3000)
    assert count_samples([*shards, str(tmp_path / "broken.tar")]) == 11
    assert count_samples([*shards, "https://host/0.tar"]) is None
    assert count_samples([f"pipe:cat {shards[0]}"]) is None
    columns = [(f"{i}.{e}", GOOD) for i in range(3) for e in ("png", "txt", "blip.txt")[: i + 1]] + [("3.json", "{}")]
    columns += [("4.png", GOOD), ("4.json", "{}")]
    other = [write_tar(tmp_path / "columns.tar", columns)]
    counts = {column: count_samples(other, caption_column=column) for column in (None, "txt", "blip.txt", "json.x")}
    assert counts == {None: 3, "txt": 3, "blip.txt": 2, "json.x": 1}


def test_the_preflight_reports_what_it_finds(tmp_path):
    files = [("a.jpg", encode(Image.new("RGB", (40, 30)), "JPEG")), ("a.txt", "first"), ("a.json", '{"url": 1}')]
    files += [("b.png", noise_picture(0)), ("b.json", '{"caption": "second", "url": 2}'), ("b.cls", "3")]
    files += [("c.png", noise_picture(0)), ("c.txt", "first"), ("d.png", noise_picture(0))]
    empty, broken = write_tar(tmp_path / "0.tar", []), tmp_path / "1.tar"
    broken.write_bytes(b"x" * 3000)
    shards = [empty, str(broken), write_tar(tmp_path / "2.tar", files), write_tar(tmp_path / "3.tar", [])]
    report = inspect_shards(shards, Preparation(resolution=24), limit=4)
    assert (report.opened, report.seen, report.usable, report.enlarged) == (3, 4, 3, 2)
    assert report.extensions == {"jpg": 1, "png": 3, "txt": 2, "json": 2, "cls": 1}
    assert report.caption_sources == {".txt": 2, 'JSON "caption"': 1}
    assert report.json_keys == {"url": 2, "caption": 1}
    assert (report.smallest, report.largest) == ((16, 20), (30, 40))
    assert report.captions == ["first", "second"]
    assert report.dropped == {raw.NO_CAPTION: 1, raw.UNREADABLE_SHARD: 1}
    text = str(report)
    assert "3 of 4 samples usable" in text and "20x16 to 40x30 (width x height)" in text and "1.tar" in text


@pytest.mark.hostile("shards")
def test_the_preflight_shows_nothing_that_a_terminal_obeys(tmp_path, caplog):
    """Extensions, JSON keys and shards may be called anything, and the run's log shows them."""
    evil = "\x1b[2J\x1b]0;x\x07\nerror: \r\x9b1m\u202e"
    files = [
        ("a.png", noise_picture(0)),
        (f"a.{evil}", b"x"),
        ("a.json", json.dumps({"caption": evil, evil: evil}).encode()),
    ]
    (tmp_path / evil).mkdir()
    shard = write_tar(tmp_path / evil / "0.tar", files)
    cut = tmp_path / evil / "1.tar"
    cut.write_bytes(Path(shard).read_bytes()[:600])
    report = inspect_shards([shard, str(cut)], Preparation(resolution=8), limit=9)
    assert report.problems and report.captions == [evil.strip()]
    assert all(line.isprintable() for line in str(report).split("\n")), str(report)
    with pytest.raises(UsageError) as refused:
        inspect_shards([str(cut)], Preparation(resolution=8))
    assert all(line.isprintable() for line in str(refused.value).split("\n")), str(refused.value)
    stream = ShardStream(shards=[str(cut), shard], preparation=Preparation(resolution=8), batch_size=2, seed=0)
    with caplog.at_level(logging.INFO):
        next(iter(stream))
        count_samples([str(cut)])
    assert len(caplog.records) >= 2
    assert all(shown(record.getMessage()) == record.getMessage() for record in caplog.records)


def test_the_preflight_stops_early(tmp_path):
    """It tries `limit` samples if one is usable, continues if none is, and reports how far it went."""
    good = write_shards(tmp_path, [40])
    assert inspect_shards(good, Preparation(resolution=16), limit=5).seen == 5
    assert len(inspect_shards(good, Preparation(resolution=16)).captions) == 4
    bad = write_tar(tmp_path / "bad.tar", [(f"{i}.png", GOOD) for i in range(50)])
    assert inspect_shards([bad, *good], Preparation(resolution=16), limit=5).usable == 1
    with pytest.raises(UsageError, match="as far as this first look went: 0 of 20 samples usable, in the first 1 of 2"):
        inspect_shards([bad, *good], Preparation(resolution=16), max_samples=20)
    with pytest.raises(UsageError, match="as far as this first look went"):
        inspect_shards([bad, *good], Preparation(resolution=16), max_shards=1)
    # extensions with dots in them are many, and the message stays short
    dotted = write_tar(tmp_path / "dotted.tar", [(f"photo.{i}.jpg", GOOD) for i in range(200)])
    with pytest.raises(UsageError, match="more kinds") as caught:
        inspect_shards([dotted], Preparation(resolution=16))
    assert "first dot" in str(caught.value) and len(str(caught.value)) < 2000


# ------------------------------------------------------------------------------- shards that change before a resume


def _until(iterator, count):
    return captions([next(iterator) for _ in range(count)])


def _repack(shards, how):
    """Replaces the first shard as if its author had packed it anew; returns the captions that it has then."""
    path = Path(shards[0])
    packed = path.suffix == ".gz"
    raw_tar = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(raw_tar)) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]
    if how == "shorter":
        files = files[: len(files) // 4]
    elif how == "larger pictures":
        files = [(name, noise_picture(1, (40, 40)) if name.endswith("png") else content) for name, content in files]
    elif how == "other names":
        files = [(f"new-{name}", content) for name, content in files]
    elif how == "one more in front":
        files = [("first.png", noise_picture(1)), ("first.txt", "the first"), *files]
    elif how == "empty":
        files = []
    write_tar(path, files, "w:gz" if packed else "w")
    if how == "zeros":
        path.write_bytes(path.read_bytes()[:512] + bytes(len(raw_tar) - 512))
    return [content.decode() if isinstance(content, bytes) else content for name, content in files if "txt" in name]


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("how", ["shorter", "larger pictures", "other names", "one more in front", "empty", "zeros"])
@pytest.mark.parametrize("taken", [20, 23, 25])  # inside a block of five, and between two
def test_a_shard_that_has_changed_since_the_checkpoint_is_counted(tmp_path, suffix, how, taken, caplog):
    """What was left of it went missing, and nothing was counted."""
    if suffix == ".tar.gz" and how == "zeros":
        pytest.skip("is no gzip file")
    files = [
        (f"{n:02}.{end}", noise_picture(n) if end == "png" else f"{n}") for n in range(40) for end in ("png", "txt")
    ]
    shards = [write_tar(tmp_path / f"000{suffix}", files, "w:gz" if suffix.endswith("gz") else "w")]
    stream = make_stream(shards)
    iterator = StreamIterator(stream, worker=0, workers=0)
    seen = _until(iterator, taken)
    state = json.loads(json.dumps(iterator.state_dict()))
    assert state["dropped"] == {}
    now = _repack(shards, how)
    again = StreamIterator(stream, worker=0, workers=0)
    again.load_state_dict(state)
    if how in ("empty", "zeros"):
        with pytest.raises(UsageError, match="gives nothing to train on"):
            next(again)
    else:
        delivered = []
        while again.epoch == 0:
            batch = next(again)
            delivered += batch["captions"] if again.epoch == 0 else []
        assert set(now[taken:]) <= set(delivered) | set(seen)
    dropped = again.dropped
    assert dropped[raw.CHANGED_SHARD] + dropped[raw.UNREADABLE_SHARD] >= 1
    assert dropped[raw.CHANGED_SHARD] or how == "zeros"
    assert "is not what it was when the checkpoint was saved" in caplog.text or how == "zeros"


@pytest.mark.hostile("shards")
@pytest.mark.parametrize("taken", [0, 3, 5, 23, 38, 40])
def test_a_shard_that_was_only_copied_continues_exactly(tmp_path, taken, caplog):
    shards = write_shards(tmp_path / "a", [38])
    stream = make_stream(shards)
    iterator = StreamIterator(stream, worker=0, workers=0)
    _until(iterator, taken)
    state = iterator.state_dict()
    expected = _until(iterator, 60)
    content = Path(shards[0]).read_bytes()
    os.remove(shards[0])
    Path(shards[0]).write_bytes(content)
    again = StreamIterator(stream, worker=0, workers=0)
    again.load_state_dict(state)
    assert _until(again, 60) == expected and not again.dropped and not caplog.text


@pytest.mark.parametrize("taken", [0, 23, 25])
def test_a_state_of_an_earlier_version_continues_exactly(tmp_path, taken, caplog):
    shards = write_shards(tmp_path, [38])
    iterator = StreamIterator(make_stream(shards), worker=0, workers=0)
    _until(iterator, taken)
    state = iterator.state_dict()
    expected = _until(iterator, 60)
    del state["shard_size"], state["block_digest"]
    again = StreamIterator(make_stream(shards), worker=0, workers=0)
    again.load_state_dict(state)
    assert _until(again, 60) == expected and not again.dropped and not caplog.text
