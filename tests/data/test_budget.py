"""Large pictures: what they need is known before they are decoded, is limited, and is shared by all processes."""

import contextlib
import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from hostile_shards import jpeg_of_many_scans, png, run_length_bmp, tiled_tiff, webp_of_one_colour
from PIL import Image
from test_stream import encode, make_stream, take, write_tar

from lcm_distill.data import budget, decode, raw
from lcm_distill.data.budget import UNIT, Budget
from lcm_distill.data.decode import memory_to_decode, read_picture
from lcm_distill.data.loader import make_loader
from lcm_distill.data.preflight import inspect_shards
from lcm_distill.data.preparation import Preparation, prepare_sample
from lcm_distill.data.raw import BadSample, RawSample
from lcm_distill.errors import UsageError
from lcm_distill.flags import MAX_DECODE_MB

pytestmark = [pytest.mark.hostile("pictures"), pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]
CONTEXT = multiprocessing.get_context("fork")
LIMIT = MAX_DECODE_MB * 10**6

# Prints how many bytes the second picture takes at most; the first one loads what its kind needs.
MEASURE = """
import ctypes, sys
from pathlib import Path
import numpy as np
from lcm_distill.data.preparation import Preparation, prepare_sample
from lcm_distill.data.raw import RawSample

def status():
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}

# M_MMAP_THRESHOLD: what is freed goes back at once, as the buffers of larger pictures do.
ctypes.CDLL(None).mallopt(-3, 2**20)
samples = [RawSample("a", {"png": Path(path).read_bytes(), "txt": b"a"}) for path in sys.argv[1:]]
prepare_sample(samples[0], Preparation(64), draws=np.zeros(5))
Path("/proc/self/clear_refs").write_text("5")
before = status()
prepare_sample(samples[1], Preparation(64), draws=np.zeros(5))
print(status()["VmHWM:"] - before["VmRSS:"])
"""


def jpeg_that_claims(width, height, **options):
    content = bytearray(encode(Image.new("RGB", (64, 64)), "JPEG", **options))
    frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    content[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(content)


def need(content, resolution=None):
    image, scans = decode._open_picture(content, decode.PILLOW_FORMATS)
    size = image.size
    if resolution:
        image.draft(image.mode, (resolution, resolution))
    return memory_to_decode(image, size=size, scans=scans)


# ------------------------------------------------------------------------------------------------------- the limit


@pytest.mark.parametrize(
    ("content", "resolution"),
    [
        (jpeg_that_claims(11648, 8736), 512),  # 102 megapixels, of medium-format cameras
        (jpeg_that_claims(14204, 10652), 1024),  # 151 megapixels
        (jpeg_that_claims(14204, 10652, progressive=True, subsampling=0), 1024),
        (jpeg_that_claims(11648, 8736), 4096),
        (png(11648, 8736, rows=1), 512),
        (png(11648, 8736, depth=16, colour=6, rows=1), 512),
        (webp_of_one_colour(9504, 6336), 512),  # 60 megapixels
    ],
)
def test_photographs_of_the_largest_cameras_are_under_the_limit(content, resolution):
    assert need(content, resolution) <= LIMIT


@pytest.mark.parametrize(
    "content",
    [
        webp_of_one_colour(16383, 10900),
        webp_of_one_colour(9000, 9000),
        png(13000, 13000, rows=1),
        tiled_tiff(64, 64, 30_000, 20_000),
        run_length_bmp(5000, 5000),
        jpeg_of_many_scans(8000, 99),
    ],
    ids=["webp", "smaller_webp", "png", "tile", "runs", "scans"],
)
def test_what_takes_more_is_left_out_before_it_is_decoded(content):
    """A lossless WebP of 5 KB took 3 GB and 11 s."""
    began = time.monotonic()
    with pytest.raises(BadSample) as caught:
        prepare_sample(RawSample("a", {"png": content, "txt": b"a"}), Preparation(16), draws=np.zeros(5))
    assert caught.value.reason in (raw.LARGE_PICTURE, raw.HUGE_PICTURE) and time.monotonic() - began < 1


TIFFS = ["TIFF", "TIFF, big endian", "BigTIFF", "BigTIFF of tags"]


def tiff_of_parts(kind, count):
    """A grey TIFF of 64 by 64 pixels with `count` strips of 32 rows, or as many tags beside its own."""
    order = ">" if "big endian" in kind else "<"
    is_big = "BigTIFF" in kind
    number, tag = (order + "Q", order + "HHQQ") if is_big else (order + "H", order + "HHII")
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if is_big else 42)
    header += struct.pack(order + ("HHQ" if is_big else "I"), *((8, 0, 16) if is_big else (8,)))
    tags = {256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 277: 1, 278: 32}
    entries, strips = [(name, 4, 1, value) for name, value in tags.items()], 1 if "tags" in kind else count
    more = count if "tags" in kind else 0
    length = len(header) + struct.calcsize(number) + (len(entries) + 1 + more) * struct.calcsize(tag)
    entries += [(273, 4, strips, length if strips == 1 else length + 4096)] + [(60000, 4, 1, 0)] * more
    directory = struct.pack(number, len(entries)) + b"".join(struct.pack(tag, *entry) for entry in entries)
    return header + directory + bytes(4096) + struct.pack(order + "I", length) * strips


def picture_of_parts(kind, count):
    """A picture with so many parts that hold nothing, each of which costs Pillow time and memory."""
    if "TIFF" in kind:
        return tiff_of_parts(kind, count)
    content = encode(Image.new("RGB", (64, 64)), kind.partition(" ")[0])
    if kind == "JPEG":
        return content[:2] + b"\xff\xe5\0\2" * count + content[2:]
    if kind == "JPEG padding":
        return content[:2] + b"\xff" * count + content[2:]
    chunk = b"IDAT" if kind == "PNG data" else b"teSt"
    chunk = bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    place = content.index(b"IDAT" if kind == "PNG" else b"IEND") - 4
    return content[:place] + chunk * count + content[place:]


@pytest.mark.parametrize("kind", ["JPEG", "JPEG padding", "PNG", "PNG data", "PNG end", *TIFFS])
def test_a_picture_of_a_million_parts_is_left_out_at_once(kind):
    """One of 8 MB, a few kilobytes in a compressed tar, kept a worker busy for a minute and took 260 MB."""
    assert read_picture(picture_of_parts(kind, 100)).size == (64, 64)
    content = picture_of_parts(kind, 10**6)
    start = time.process_time()
    with pytest.raises(BadSample, match=raw.HUGE_PICTURE.partition(" (")[0]):
        read_picture(content)
    assert time.process_time() - start < 2  # about 0.1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_follows_a_picture_s_end_is_no_part_of_it(kind):
    """A picture that was padded with zeros was taken for one of a million chunks."""
    content = encode(Image.new("RGB", (64, 64)), kind)
    assert read_picture(content + bytes(10**6)).size == (64, 64)


def test_the_limit_can_be_set_and_what_it_drops_is_counted(tmp_path):
    files = [("a.png", encode(Image.new("RGB", (1000, 1000)))), ("a.txt", "a")]
    files += [("b.png", encode(Image.new("RGB", (999, 999)))), ("b.txt", "b")]
    files += [("c.jpg", encode(Image.new("RGB", (1000, 1000)), "JPEG")), ("c.txt", "c")]  # decoded at an eighth
    shard = write_tar(tmp_path / "0.tar", files)
    report = inspect_shards([shard], Preparation(resolution=16, max_decode_mb=12))
    assert (report.usable, report.dropped) == (3, {})
    stream = make_stream([shard], max_decode_mb=11)
    batch = take(iter(stream), 2)[-1]
    assert batch["captions"] and batch["dropped"] == {raw.LARGE_PICTURE: 2}
    with pytest.raises(UsageError, match="--max_decode_mb is 0; give 1 or more"):
        Preparation(resolution=16, max_decode_mb=0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True, "quality": 0, "method": 0}),
        ("JPEG", {"progressive": True, "subsampling": 0}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_no_picture_takes_more_than_is_expected(tmp_path, kind, options):
    """The kernel's high-water mark of a process that prepares a turned, transparent picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [tmp_path / "small", tmp_path / "large"]
    for path, size in zip(paths, [(24, 20), (2400, 2000)], strict=True):
        picture = Image.new("RGB" if kind == "JPEG" else "RGBA", size, (200, 100, 50))
        path.write_bytes(encode(picture, kind, exif=exif.tobytes(), **options))
    # A process of its own, since what other tests have freed would hide what is taken.
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    taken = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    expected = need(paths[1].read_bytes(), 64)
    assert 0.5 * expected < taken <= expected + 4 * 2**20


# ------------------------------------------------------------------------------------------------------ the budget


def hold(path, units, entered, leave):
    """Holds so many units of the budget of four until it may leave."""
    with Budget(path, 4).share(units * UNIT):
        entered.set()
        leave.poll(30)


@contextlib.contextmanager
def holding(path, units):
    entered, (waits, leave) = CONTEXT.Event(), CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=hold, args=(path, units, entered, waits))
    process.start()
    try:
        yield entered, leave, process
    finally:
        process.kill()
        process.join()


def test_forked_processes_wait_for_each_other(tmp_path):
    path = str(tmp_path / "lock")
    with holding(path, 3) as (first, leave, _):
        assert first.wait(20)
        with holding(path, 2) as (second, _, _), holding(path, 1) as (third, _, _):
            assert third.wait(20) and not second.wait(0.3)
            leave.send(None)
            assert second.wait(20)


def test_processes_that_inherit_nothing_wait_for_each_other(tmp_path):
    """Those of another rank, or spawned ones."""
    path = str(tmp_path / "lock")
    code = f"from lcm_distill.data.budget import *\nwith Budget({path!r}, 4).share(3 * UNIT): print('in'); input()"
    command = [sys.executable, "-uc", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in\n"
        with holding(path, 2) as (entered, _, _):
            assert not entered.wait(0.3)
            process.communicate("\n")
            assert entered.wait(20)


def test_as_many_as_fit_decode_at_the_same_time(tmp_path):
    path = str(tmp_path / "lock")
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(holding(path, 2)) for _ in range(3)]
        deadline = time.monotonic() + 20
        while sum(entered.is_set() for entered, _, _ in held) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        inside = [number for number, (entered, _, _) in enumerate(held) if entered.is_set()]
        assert len(inside) == 2
        held[inside[0]][1].send(None)
        assert all(entered.wait(20) for entered, _, _ in held)


def test_a_killed_process_holds_nothing(tmp_path):
    path = str(tmp_path / "lock")
    with holding(path, 4) as (entered, _, process):
        assert entered.wait(20)
        with holding(path, 2) as (second, _, _):
            assert not second.wait(0.3)
            process.kill()
            assert second.wait(20)


def test_a_stopped_process_does_not_stop_the_others(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(budget, "PATIENCE", 0.3)
    path = str(tmp_path / "lock")
    with holding(path, 4) as (entered, _, process):
        assert entered.wait(20)
        os.kill(process.pid, signal.SIGSTOP)
        with Budget(path, 4).share(2 * UNIT):
            assert "beyond the budget" in caplog.text
        os.kill(process.pid, signal.SIGCONT)


@pytest.mark.parametrize("has_file", [True, False])
def test_threads_share_it_too(tmp_path, has_file):
    shared = Budget(str(tmp_path / ("lock" if has_file else "no-folder/lock")), 4)
    inside, most, mutex = 0, 0, threading.Lock()

    def work():
        nonlocal inside, most
        for _ in range(5):
            with shared.share(2 * UNIT):
                with mutex:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.002)
                with mutex:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, inside) == (2, 0)


def test_threads_that_open_it_at_the_same_time_share_it(tmp_path, monkeypatch):
    """The second found it opened while the first still computed its size, and decoded without a share."""
    monkeypatch.setattr(budget, "machine_memory", lambda: time.sleep(0.2) or 2**40)
    shared, both_inside = Budget(str(tmp_path / "lock"), 4), threading.Barrier(2, timeout=20)

    def work():
        with shared.share(2 * UNIT):
            both_inside.wait()
            taken.append(len(shared._mine))
            both_inside.wait()

    taken: list[int] = []
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert taken == [4, 4]


def test_more_than_there_is_takes_all_and_an_error_returns_it(tmp_path):
    shared = Budget(str(tmp_path / "lock"), 4)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), shared.share(10**15):
            raise ZeroDivisionError
    with holding(str(tmp_path / "lock"), 4) as (entered, _, _):
        assert entered.wait(20)


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_no_file_of_this_user_is_not_used(tmp_path, kind):
    path = tmp_path / "lock"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "target")
    else:
        path.mkdir()
    with Budget(str(path), 4).share(2 * UNIT):
        pass
    assert not (tmp_path / "target").exists()


def test_small_pictures_open_no_file_and_take_no_lock(tmp_path):
    shared = Budget(str(tmp_path / "lock"), 4)
    with shared.share(budget.SMALL - 1):
        assert not (tmp_path / "lock").exists()
    began = time.perf_counter()
    for _ in range(1000):
        with shared.share(10**6):
            pass
    assert time.perf_counter() - began < 0.1


def test_the_picture_s_share_is_held_until_it_is_resized(monkeypatch, tmp_path):
    shared = Budget(str(tmp_path / "lock"), 4)
    monkeypatch.setattr(budget, "SMALL", 1)
    monkeypatch.setattr(decode, "BUDGET", shared)
    content = encode(Image.new("RGB", (100, 100)))
    with contextlib.ExitStack() as while_large:
        read_picture(content, while_large=while_large)
        assert len(shared._mine) == 1
    assert not shared._mine
    read_picture(content)
    assert not shared._mine
    with pytest.raises(BadSample), contextlib.ExitStack() as while_large:
        read_picture(content[:-30], while_large=while_large)
    assert not shared._mine


def test_workers_that_meet_large_pictures_take_turns(monkeypatch, tmp_path):
    """Four workers, a budget for one picture: the stream is the same, and no two decode at the same time."""
    shared = Budget(str(tmp_path / "lock"), 4)
    shared.open()
    files = [(f"{n}.{end}", content) for n in range(6) for end, content in (("png", png(700, 700)), ("txt", f"{n}"))]
    shards = [write_tar(tmp_path / f"{n}.tar", files) for n in range(4)]
    loader = make_loader(make_stream(shards), 4)
    expected = [batch["captions"] for batch in take(iter(loader), 12)]
    loader.close()
    monkeypatch.setattr(budget, "SMALL", 1)
    monkeypatch.setattr(decode, "BUDGET", shared)
    monkeypatch.setattr(decode, "BYTES_PER_PIXEL", 3 * UNIT // 700**2)
    load, trace = decode.load_upright, tmp_path / "trace"

    def slowly(image):
        with open(trace, "ab", buffering=0) as file:
            file.write(b"(")
            time.sleep(0.01)
            result = load(image)
            file.write(b")")
        return result

    monkeypatch.setattr(decode, "load_upright", slowly)
    loader = make_loader(make_stream(shards), 4)
    assert [batch["captions"] for batch in take(iter(loader), 12)] == expected
    loader.close()
    assert trace.read_bytes().rstrip(b"(") == b"()" * (len(trace.read_bytes()) // 2)


def test_pictures_are_packed_within_the_budget(monkeypatch, tmp_path):
    from lcm_distill.data import packing

    shared = Budget(str(tmp_path / "lock"), 4)
    monkeypatch.setattr(budget, "SMALL", 1)
    monkeypatch.setattr(packing, "BUDGET", shared)
    held = []
    load = packing.load_upright
    monkeypatch.setattr(packing, "load_upright", lambda image: held.append(len(shared._mine)) or load(image))
    buffer = io.BytesIO()
    Image.new("RGB", (50, 50)).save(buffer, "PNG")
    packing._read_picture(buffer.getvalue(), None)
    assert held == [1] and not shared._mine
